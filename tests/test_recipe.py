"""Question 5: how its settings were chosen."""

import json

import pytest
import torch

import common
import q5_modern_recipe
from common import Split, build, count_parameters
from q5_modern_recipe import FAST, RUNS, hold_out


def test_the_network_is_the_reports():
    counted = {run.name: count_parameters(build(run, torch.device("cpu"))) for run in RUNS}
    assert counted.pop("fast_no_batchnorm") == 7_678_474
    assert set(counted.values()) == {7_682_826}


def test_the_settings_were_chosen_on_the_last_training_images(official):
    data = hold_out(None, official, FAST)
    training = torch.cat([official["train"].images, official["validation"].images])
    assert torch.equal(data["train"].images, training[:45_000]) and len(data["train"].labels) == 45_000
    for part in ("validation", "test"):  # no test images
        assert torch.equal(data[part].images, training[45_000:])
        assert torch.equal(data[part].labels[-1000:], official["validation"].labels)


def test_tuning_writes_what_every_setting_came_to(small, tmp_path, monkeypatch, capsys):
    def load(_):  # the test images are not there
        return small | {"test": Split(small["test"].images[:0], small["test"].labels[:0])}

    monkeypatch.setattr(common, "load_cifar10", load)
    monkeypatch.setattr(q5_modern_recipe, "HELD_OUT", 50)
    folders = ["--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    q5_modern_recipe.main(["--tune", "--only", "tune_fast", *folders])
    q5_modern_recipe.main(["--tune", "--only", "tune_fast,filter_learning_rate=0.06", "--seeds", "2", *folders])
    tried = json.loads((tmp_path / "q5/tuning.json").read_text())
    assert {name: list(by_seed) for name, by_seed in tried.items()} == {
        "tune_fast": ["0"],
        "tune_fast,filter_learning_rate=0.06": ["0", "1"],
    }
    paths = set(tmp_path.glob("checkpoints/*.pt"))
    assert len(paths) == 3 and tmp_path / f"checkpoints/{FAST.key()}.pt" not in paths
    assert not list(tmp_path.glob("q5/*/"))  # no results
    page = (tmp_path / "README.md").read_text()
    assert "2 settings tried" in page and f"| {tried['tune_fast']['0']['accuracy']:.2f} [" in page
    assert "| `python q5_modern_recipe.py --tune --only tune_fast,filter_learning_rate=0.06 --seeds 2` |" in page
    capsys.readouterr()
    q5_modern_recipe.main(["--tune", "--list", "--only", "tune_fast", *folders])
    assert "tune_fast  seed 0    2 epochs  done" in capsys.readouterr().out
    (tmp_path / "q5/tuning.json").unlink()
    q5_modern_recipe.main(["--tune", "--list", "--only", "tune_fast", *folders])
    assert "tune_fast  seed 0    2 epochs  trained, no result yet" in capsys.readouterr().out


def test_tuning_needs_all_images(tmp_path, capsys):
    with pytest.raises(SystemExit):
        q5_modern_recipe.main(["--tune", "--sample", "--output-dir", str(tmp_path)])
    assert "--tune needs all training images" in capsys.readouterr().err
