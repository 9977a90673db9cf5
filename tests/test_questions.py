"""The five scripts from the command line: options, names, the sample end to end, and what bad input comes to."""

import json
import threading

import numpy as np
import pytest
import torch

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
from conftest import folders, three_epochs
from parts.augment import HorizontalFlip
from parts.machine import UserError

QUESTIONS = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)
EVERY = pytest.mark.parametrize("question", QUESTIONS, ids=lambda module: module.__name__)


@EVERY
def test_help_shows_the_scripts_docstring(question, capsys):
    with pytest.raises(SystemExit) as end:
        question.main(["--help"])
    assert end.value.code == 0 and question.__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("question", "options", "names"),
    [
        (q1_convnet, ["--epochs=50", "--seed=7"], ["convnet_50epochs 7"]),
        (q1_convnet, ["--precision=bf16"], ["convnet_bf16 0"]),  # of another machine
        (q1_convnet, ["--epochs=20", "--seeds=2"], ["convnet 0", "convnet 1"]),
        (q2_batchnorm_earlystop, ["--patience=3", "--patience=9", "--only=convnet_patience3"], ["convnet_patience3 0"]),
        (q3_augment_dropout, ["--dropout=0.05", "--only=dropout_0.05", "--only=crop"], ["dropout_0.05 0", "crop 0"]),
        (q4_vgg_transfer, ["--weights=none"], ["scratch 0"]),
        (q5_modern_recipe, ["--tune", "--only", "heavy"], ["heavy 0"]),
    ],
)
def test_options_name_runs(question, options, names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("parts.machine.cpu_capabilities", dict)  # a CPU without bfloat16
    question.main(["--list", "--device=cpu", *options, *folders(tmp_path)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [f"{name} {seed}" for name, _, seed, *_ in lines] == names


BAD = [
    (q1_convnet, ["--epoch=3"], "did you mean --epochs?"),
    (q1_convnet, ["--epochs=0"], "--epochs: must be a whole number from 1 up"),
    (q1_convnet, ["--seed=1", "--seeds=2"], "not allowed with argument"),
    (q1_convnet, ["--only", "convnt"], "no such run; there are convnet; did you mean convnet?"),
    (q1_convnet, ["--output-dir="], "'' is no path: it is empty"),
    (q1_convnet, ["--data-dir=data "], "'data ' is no path"),
    (q1_convnet, ["--replot", "--output-dir=reslts"], "--replot: there are no results in reslts/q1"),
    (q3_augment_dropout, ["--dropout=0.99996"], "--dropout: must be a rate from 0.0001 to 0.9999"),
    (q3_augment_dropout, ["--preview", "--only", "dropout_0.1"], "none of these runs has an augmentation"),
    (q5_modern_recipe, ["--tune", "--sample"], "--tune needs all training images"),
]


@pytest.mark.parametrize(("question", "options", "message"), BAD)
def test_bad_options_are_one_line(question, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        question.main(options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and message in err


def test_two_runs_of_one_name_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(q1_convnet, "RUNS", [*q1_convnet.RUNS, common.Run("convnet", common.Settings(dropout=0.5))])
    with pytest.raises(SystemExit):
        q1_convnet.main(["--list", *folders(tmp_path)])
    assert "two of the script's runs have one name" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output-dir", "--checkpoint-dir"])
def test_a_folder_that_cannot_be_written(quick, tmp_path, capsys, option):
    (tmp_path / "file").write_text("in the way")
    for folder in ("file/out", "x" * 300):
        with pytest.raises(SystemExit) as end:
            q1_convnet.main([*three_epochs(tmp_path), f"{option}={tmp_path / folder}"])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and str(tmp_path / folder) in err


@EVERY
def test_in_a_users_folder_nothing_is_replaced_and_nothing_trained(question, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(SystemExit) as end:
        question.main(["--device=cpu", "--output-dir=.", "--checkpoint-dir=checkpoints"])
    assert end.value.code == 2 and "README.md was not written by these scripts" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_the_sample_end_to_end(finished):
    folder, out, err = finished
    first, *epochs = err.splitlines()
    assert first.startswith("convnet_3epochs_fp32 seed 0 trains on ") and "fp32" in first
    assert [line.split(":")[0] for line in epochs] == [f"convnet_3epochs_fp32 seed 0 epoch {n}/3" for n in (1, 2, 3)]
    run = folder / "out/sample/q1/convnet_3epochs_fp32"
    names = {"seed0.json", "seed0.npz", "losses.png", "accuracy.png", "filters.png", "confusion.png"}
    assert {path.name for path in run.iterdir()} == names
    result = json.loads((run / "seed0.json").read_text())
    assert result["settings"]["data"] == "cifar10-sample" and result["history"][0]["lr"] == 1e-3  # half the real rate
    assert np.load(run / "seed0.npz")["step_losses"].shape == (3, 60)  # batches of 25: in 8 of 200 it learns nothing
    assert "Conv2d(3, 8" in out and "trainable parameters" in out  # the printed network
    assert "claim" not in out and "page: " in out  # no verdict on a sample
    for page in (run.parents[1] / "README.md", run.parent / "README.md"):
        assert page.read_text().splitlines()[1].startswith("# SAMPLE") and "report / ours" not in page.read_text()


def test_replot_makes_everything_again_and_list_says_done(finished, capsys, narrow):
    folder = finished[0]
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*.*")}
    (losses,) = (folder / "out").rglob("losses.png")
    losses.write_bytes(before[losses] + b"of an older matplotlib")
    q1_convnet.main(["--replot", *three_epochs(folder)])
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*.*")} == before
    capsys.readouterr()
    q1_convnet.main(["--list", *three_epochs(folder)])
    words = capsys.readouterr().out.split()
    assert words[:5] == ["convnet_3epochs_fp32", "seed", "0", "3", "epochs"] and words[6:] == ["done"]
    assert (folder / "checkpoints" / words[5]).exists()


@pytest.mark.parametrize("question", QUESTIONS[1:], ids=lambda module: module.__name__)
def test_every_question_trains_and_reports(question, quick, tmp_path, capsys):
    """Its last run, an epoch on a few images; in a thread, as a notebook may."""
    run = question.RUNS[-1].name
    options = ["--sample", "--epochs=1", "--device=cpu", "--figures=svg", "--only", run, *folders(tmp_path)]
    thread = threading.Thread(target=question.main, args=(options,))
    thread.start()
    thread.join()
    (found,) = (tmp_path / "out/sample" / question.QUESTION.name).glob("*/seed0.json")
    assert found.parent.name == f"{run}_1epochs" and found.with_name("losses.svg").exists()
    assert f"page: {found.parents[1] / 'README.md'}" in capsys.readouterr().out


def test_question_4_loads_torchvisions_weights_only_for_runs_that_need_them(quick, tmp_path, monkeypatch, capsys):
    def load():
        raise UserError("loaded")

    monkeypatch.setattr(q4_vgg_transfer, "imagenet_weights", load)
    options = ["--sample", "--epochs=1", "--device=cpu", *folders(tmp_path), "--only", "scratch"]
    q4_vgg_transfer.main(options)
    for more, message in (["scrtch", "did you mean scratch?"], ["finetune_imagenet", "loaded"]):
        with pytest.raises(SystemExit):
            q4_vgg_transfer.main([*options, more])
        assert message in capsys.readouterr().err


def test_preview_draws_every_augmentation_asked_for(tmp_path, capsys):
    q3_augment_dropout.main(["--preview", "--only", "baseline", "flip_p0.5", *folders(tmp_path)])
    assert [path.split("/")[-2] for path in capsys.readouterr().out.split()] == ["flip_p0.5"]
    images = torch.rand(2, 3, 32, 32).mul(255).to(torch.uint8)
    figure = q3_augment_dropout.preview((HorizontalFlip(p=1.0),), images, "heading")
    original, drawn = (figure.axes[i].images[0].get_array() for i in range(2))
    assert len(figure.axes) == 18 and (drawn == original[:, ::-1]).all()


def test_tuning_sees_no_test_images(quick, small, tmp_path, monkeypatch):
    monkeypatch.setattr(q5_modern_recipe, "HELD_OUT", 60)
    data = q5_modern_recipe.hold_out(small)
    images = torch.cat([small["train"].images, small["validation"].images])
    assert torch.equal(data["train"].images, images[:110]) and torch.equal(data["test"].images, images[110:])
    assert data["validation"] is data["test"]
    empty = small | {"test": common.Split(small["test"].images[:0], small["test"].labels[:0])}
    opened = []
    monkeypatch.setattr(common, "load_cifar10", lambda folder: opened.append(folder) or empty)
    options = ["--tune", "--only", "fast", "--epochs=1", "--device=cpu", f"--data-dir={tmp_path}"]
    q5_modern_recipe.main([*options, *folders(tmp_path)])
    assert opened == [tmp_path]
    (path,) = (tmp_path / "out/q5_tuning").glob("*/seed0.json")
    assert json.loads(path.read_text())["settings"]["data"] == "cifar10-tuning"
    text = (path.parents[1] / "README.md").read_text()
    assert "held-out training images" in text and "`python q5_modern_recipe.py --tune` trains" in text
