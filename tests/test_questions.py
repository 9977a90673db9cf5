"""The five scripts from the command line: options, names, the sample end to end, and what bad input comes to."""

import json
import os
import sys
import threading

import pytest
import torch
from conftest import folders

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
from common import Split, build, count_parameters, make_parser, select_runs
from parts.augment import HorizontalFlip

QUESTIONS = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)
CPU = torch.device("cpu")


@pytest.fixture
def quick(narrow, small, monkeypatch):
    """A narrow network, and a few images in place of the sample and of CIFAR-10."""
    monkeypatch.setattr(common, "load_sample", lambda: small)
    monkeypatch.setattr(common, "load_cifar10", lambda _: small)


def listed(question, *options, capsys) -> list[str]:
    question.main(["--list", "--device=cpu", *options])
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


# ----------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("question", "options", "names"),
    [
        (q1_convnet, ["--epochs=50"], ["convnet_50epochs"]),
        (q1_convnet, ["--epochs=20", "--precision=fp32"], ["convnet_fp32"]),
        (q1_convnet, ["--seeds=2"], ["convnet", "convnet"]),
        (q2_batchnorm_earlystop, ["--patience", "3", "5", "--only", "convnet_patience3"], ["convnet_patience3"]),
        (q3_augment_dropout, ["--dropout", "0.05", "0.1", "--only", "dropout_0.05", "crop"], ["dropout_0.05", "crop"]),
        (q4_vgg_transfer, ["--weights=none"], ["scratch"]),
        (q5_modern_recipe, ["--tune", "--only", "heavy"], ["heavy"]),
    ],
)
def test_options_name_runs(question, options, names, tmp_path, capsys):
    assert listed(question, *options, *folders(tmp_path), capsys=capsys) == names


def test_seed_is_one_seed_and_seeds_are_many():
    parser = make_parser("")
    assert [run.settings.seed for run in select_runs(q1_convnet.RUNS, parser.parse_args(["--seed=7"]), CPU)] == [7]
    assert [run.settings.seed for run in select_runs(q1_convnet.RUNS, parser.parse_args(["--seeds=3"]), CPU)] == [
        0,
        1,
        2,
    ]


def test_a_further_patience_is_no_training_of_its_own():
    run = q2_batchnorm_earlystop.stopped("batchnorm", 3)
    assert run.settings.key() == q2_batchnorm_earlystop.RUNS[-1].settings.key()


BAD = [
    (q1_convnet, ["--epochs=0"], "--epochs: must be a whole number from 1 up"),
    (q1_convnet, ["--seeds=2.5"], "--seeds: must be a whole number from 1 up"),
    (q1_convnet, ["--seed=-1"], "must be a whole number from 0 up"),
    (q1_convnet, ["--seed=1", "--seeds=2"], "not allowed with argument"),
    (q1_convnet, ["--epoch=3"], "did you mean --epochs?"),
    (q1_convnet, ["--only", "resnet"], "no such run; there are convnet"),
    (q1_convnet, ["--device=cuda:99"], "--device cuda:99 is not there; on this machine:"),
    (q1_convnet, ["--output-dir="], "a path on the command line is empty"),
    (q2_batchnorm_earlystop, ["--patience=0"], "--patience: must be a whole number"),
    (q3_augment_dropout, ["--dropout=0.99996"], "--dropout: must be a rate between 0 and 1"),
    (q3_augment_dropout, ["--dropout=nan"], "--dropout: must be a rate between 0 and 1"),
    (q3_augment_dropout, ["--preview", "--only", "dropout_0.1"], "none of these runs has an augmentation"),
    (q5_modern_recipe, ["--tune", "--sample"], "--tune needs all training images"),
]


@pytest.mark.parametrize(("question", "options", "message"), BAD)
def test_bad_options_are_one_line(question, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        question.main(options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("option", ["--output-dir", "--checkpoint-dir"])
@pytest.mark.parametrize("folder", ["file/out", "x" * 300])
def test_a_folder_that_cannot_be_written(quick, tmp_path, capsys, option, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as end:
        q1_convnet.main(["--sample", "--device=cpu", *folders(tmp_path), f"{option}={tmp_path / folder}"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and str(tmp_path / folder) in err


def test_in_a_folder_of_the_users_nothing_is_replaced_and_nothing_trained(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(SystemExit) as end:
        q1_convnet.main(["--device=cpu", "--output-dir=.", "--checkpoint-dir=checkpoints"])
    assert end.value.code == 2 and "README.md was not written by these scripts" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# -------------------------------------------------------------------------------------------------------- end to end


def test_the_sample_end_to_end(finished):
    folder, out, err = finished
    first, *epochs = err.splitlines()
    assert first.startswith("convnet_3epochs_fp32 seed 0 trains on ") and "fp32" in first
    assert [line.split(":")[0] for line in epochs] == [f"convnet_3epochs_fp32 seed 0 epoch {n}/3" for n in (1, 2, 3)]
    run = folder / "out/sample/q1/convnet_3epochs_fp32"
    names = {"seed0.json", "seed0.npz", "losses.png", "accuracy.png", "filters.png", "confusion.png"}
    assert {path.name for path in run.iterdir()} == names
    result = json.loads((run / "seed0.json").read_text())
    assert len(result["history"]) == 3 and result["settings"]["data"] == "cifar10-sample"
    assert "Conv2d(3, 8" in out and "trainable parameters" in out  # the printed network
    assert "claim" not in out and "page: " in out  # no verdict on a sample
    for page in (run.parents[1] / "README.md", run.parent / "README.md"):
        assert page.read_text().splitlines()[1].startswith("# SAMPLE") and "report / ours" not in page.read_text()


def test_replot_changes_nothing_and_list_says_done(finished, capsys, narrow):
    folder = finished[0]
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*.*")}
    options = ["--sample", "--epochs=3", "--precision=fp32", "--device=cpu", *folders(folder)]
    q1_convnet.main(["--replot", *options])
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*.*")} == before
    capsys.readouterr()
    q1_convnet.main(["--list", *options])
    words = capsys.readouterr().out.split()
    assert words[:5] == ["convnet_3epochs_fp32", "seed", "0", "3", "epochs"] and words[6:] == ["done"]
    assert (folder / "checkpoints" / words[5]).exists()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda module: module.__name__)
def test_every_question_trains_and_reports(question, quick, tmp_path, capsys):
    """Its first run with an epoch or two, on a few images; in a thread, as a notebook may."""
    run = "scratch" if question is q4_vgg_transfer else question.RUNS[-1].name
    options = ["--sample", "--epochs=1", "--device=cpu", "--only", run, *folders(tmp_path)]
    options += ["--weights=none"] if question is q4_vgg_transfer else []
    thread = threading.Thread(target=question.main, args=(options,))
    thread.start()
    thread.join()
    found = list((tmp_path / "out/sample" / question.QUESTION.name).glob("*/seed0.json"))
    assert len(found) == 1 and found[0].parent.name == f"{run}_1epochs"
    assert f"page: {tmp_path}" in capsys.readouterr().out


def test_python_without_docstrings(monkeypatch, capsys):
    """As under python -OO."""
    monkeypatch.setattr(q1_convnet, "__doc__", None)
    with pytest.raises(SystemExit) as end:
        q1_convnet.main(["--help"])
    assert end.value.code == 0 and "--seeds" in capsys.readouterr().out


def test_a_reader_that_goes_away_does_not_end_a_run(quick, tmp_path, monkeypatch):
    """As `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        q1_convnet.main(["--sample", "--epochs=1", "--device=cpu", *folders(tmp_path)])
    assert list((tmp_path / "out").rglob("seed0.json"))


# --------------------------------------------------------------------------------------------------- questions' own


def test_preview_draws_every_augmentation_asked_for(tmp_path, capsys):
    q3_augment_dropout.main(["--preview", "--only", "crop", "flip_p0.5", *folders(tmp_path)])
    paths = capsys.readouterr().out.split()
    assert [path.split("/")[-2] for path in paths] == ["crop", "flip_p0.5"]
    images = torch.rand(2, 3, 32, 32).mul(255).to(torch.uint8)
    figure = q3_augment_dropout.preview((HorizontalFlip(p=1.0),), images, "heading")
    original, drawn = (figure.axes[i].images[0].get_array() for i in range(2))
    assert len(figure.axes) == 18 and (drawn == original[:, ::-1]).all()


def test_question_5_keeps_the_reports_network():
    counted = {run.name: count_parameters(build(run, CPU)) for run in q5_modern_recipe.RUNS}
    assert counted.pop("fast_no_batchnorm") == 7_678_474
    assert set(counted.values()) == {7_682_826}


def test_tuning_sees_no_test_images(quick, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(q5_modern_recipe, "HELD_OUT", 60)
    data = q5_modern_recipe.hold_out(small)
    images = torch.cat([small["train"].images, small["validation"].images])
    assert torch.equal(data["train"].images, images[:110]) and torch.equal(data["test"].images, images[110:])
    assert data["validation"] is data["test"]
    empty = small | {"test": Split(small["test"].images[:0], small["test"].labels[:0])}
    monkeypatch.setattr(common, "load_cifar10", lambda _: empty)
    q5_modern_recipe.main(["--tune", "--only", "fast", "--epochs=1", "--device=cpu", *folders(tmp_path)])
    (path,) = (tmp_path / "out/q5_tuning").glob("*/seed0.json")
    assert json.loads(path.read_text())["settings"]["data"] == "cifar10-tuning"
    assert "held-out training images" in (path.parents[1] / "README.md").read_text()
