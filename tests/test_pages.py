"""Figures and pages, from results alone."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
import report.page
from common import ROOT
from parts.machine import UserError
from report.figures import (
    MADE_BY,
    Figure,
    is_drawn,
    new_axes,
    plain_style,
    plot_accuracy,
    plot_curve,
    plot_losses,
    save_figure,
    write_ours,
)
from report.page import check_report, finish_report, update_report
from results import make, seeds

COMMITTED = ROOT / "results"


@pytest.fixture
def q1(tmp_path):
    """Question 1's committed results alone, without pictures and pages; and the options that find them."""
    (tmp_path / "q1/convnet").mkdir(parents=True)
    for path in (COMMITTED / "q1/convnet").glob("seed*"):
        shutil.copy(path, tmp_path / "q1/convnet")
    return tmp_path, argparse.Namespace(
        output_dir=tmp_path, sample=False, replot=False, figures=None, list=False, seed=None, seeds=1
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.suffix != ".lock"}


# ------------------------------------------------------------------------------------------------------------ pieces


def test_nothing_that_is_not_ours_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# My own project\n")
    with pytest.raises(UserError, match=f"{path} was not written by these scripts: move it away"):
        write_ours(path, b"x")
    assert path.read_text() == "# My own project\n"
    write_ours(tmp_path / "new.md", MADE_BY.encode())
    write_ours(tmp_path / "new.md", MADE_BY.encode() + b" again")
    assert (tmp_path / "new.md").read_bytes().endswith(b"again")


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_figures_are_the_same_every_time_and_say_what_they_are_drawn_from(tmp_path, kind):
    contents = []
    for folder in ("one", "other"):
        with plain_style():
            figure, axes = new_axes("heading", "loss")
            axes.plot([1, 2], [1, 2])
            save_figure(figure, tmp_path / folder / "a.png", kind, "stamp1")
        contents.append(files(tmp_path / folder))
    assert contents[0] == contents[1] and set(contents[0]) == {"a.png", f"a.{kind}"}
    assert is_drawn(tmp_path / "one/a.png", "stamp1") and not is_drawn(tmp_path / "one/a.png", "stamp2")
    save_figure(Figure(), tmp_path / "one/a.png", kind)  # ours: it may be replaced
    (tmp_path / "two").mkdir()
    shutil.copy(ROOT / "sample/train.png", tmp_path / "two/a.png")
    with pytest.raises(UserError, match="was not written by these scripts"):
        save_figure(Figure(), tmp_path / "two/a.png")


def test_several_seeds_are_a_mean_and_a_band_and_one_epoch_is_a_dot():
    axes = Figure().add_subplot()
    plot_curve(axes, seeds("a", [80, 82, 84]), "validation_accuracy", "three")
    assert list(axes.lines[0].get_ydata()) == [81, 82] and len(axes.collections) == 1
    plot_curve(axes, [make(curves={"train_loss": [1.0]})], "train_loss", "one")
    assert axes.lines[1].get_marker() == "o"


def test_seeds_that_stopped_after_different_epochs_are_drawn_whole():
    axes = Figure().add_subplot()
    found = [make(seed=i, curves={"train_loss": [1.0] * length}) for i, length in enumerate((2, 5))]
    plot_curve(axes, found, "train_loss", "stopped")
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 5]


def test_the_reports_curves_stand_beside_ours_but_not_beside_the_samples():
    for data, expected in (("cifar10", 2), ("cifar10-sample", 0)):
        for plot, curves in ((plot_losses, 2), (plot_accuracy, 1)):
            (axes,) = plot([make("crop", question="q3", data=data)]).axes
            labels = [line.get_label() for line in axes.lines]
            assert len([x for x in labels if "report, Figure 20" in x]) == (curves if expected else 0)
            assert ("SAMPLE" in axes.get_title()) == (data == "cifar10-sample")


def test_the_stops_of_the_same_training_alone_are_marked():
    curve = [50, 60, 59, 58, 57, 61.0]
    loss = {"train_loss": [1.0] * 6, "validation_loss": [1.0] * 6}
    full = make("convnet_full", question="q2", curves=loss | {"validation_accuracy": curve}, epochs=50)
    short = {name: values[:4] for name, values in (loss | {"validation_accuracy": curve}).items()}
    same = make("convnet_patience2", question="q2", curves=short, epochs=50, patience=2)
    other = make("convnet_patience3", question="q2", curves=short | {"validation_accuracy": [50, 60, 59, 57.5]},
                 epochs=50, patience=3)  # of another machine  # fmt: skip
    results = {"convnet_full": [full], "convnet_patience2": [same], "convnet_patience3": [other]}
    assert q2_batchnorm_earlystop.rules_of(full, results) == [same]
    axes = q2_batchnorm_earlystop.figures(results)["early_stopping.png"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["2"]


def test_minutes_of_another_machine_are_not_drawn():
    here, elsewhere = make("fast", 0, question="q5"), make("fast", 1, question="q5")
    elsewhere.environments[0]["device"] = "another machine"
    axes = q5_modern_recipe.figures({"fast": [here, elsewhere]})["time.png"].axes[0]
    assert len([line for line in axes.lines if line.get_marker() == "s"]) == 1


# ------------------------------------------------------------------------------------------------------------- pages


def test_the_committed_pages_are_what_the_results_give():
    """Word for word; and every link leads somewhere."""
    for module in (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe):
        question = module.QUESTION
        args = argparse.Namespace(output_dir=COMMITTED, sample=False)
        own = report.page.read_question(COMMITTED / question.name, question.runs, False)
        results = own | report.page.read_beside(COMMITTED, question)
        claims = report.page.judge_claims(question.claims, results)
        if claims:
            assert json.loads((COMMITTED / question.name / "claims.json").read_text())["claims"] == claims
        page = (COMMITTED / question.name / "README.md").read_text()
        for row in report.page.run_table(question, results, False):
            assert f"| {' | '.join(row)} |" in page
        assert report.page.question_content(question, results, args)["findings"] in page
    for page in [ROOT / "README.md", COMMITTED / "README.md", *COMMITTED.glob("q*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert re.match("https?:", target) or (page.parent / unquote(target)).exists(), (page, target)


def test_pages_stay_within_their_length():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert len((COMMITTED / "README.md").read_text().splitlines()) <= 120
    for page in COMMITTED.glob("q*/README.md"):
        assert len(page.read_text().splitlines()) <= 150, page


def test_a_clean_start_and_again(q1):
    """From two files a seed to everything else; the same again; and nothing is drawn twice."""
    root, args = q1
    finish_report(q1_convnet.QUESTION, args)
    before = files(root)
    assert {"README.md", "overview.png", "claims.png", "q1/README.md", "q1/claims.json"} < before.keys()
    assert {f"q1/convnet/{name}.png" for name in ("losses", "accuracy", "filters", "confusion")} < before.keys()
    assert "80.7 / 78.9" in before["q1/README.md"].decode() and "| 1 | Without" in before["README.md"].decode()
    drawn = (root / "q1/convnet/filters.png").stat().st_mtime_ns
    update_report(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    assert files(root) == before and (root / "q1/convnet/filters.png").stat().st_mtime_ns == drawn


def test_a_figure_of_other_results_is_drawn_again_and_backups_change_nothing(q1):
    root, args = q1
    shutil.copytree(root / "q1", root / "q1_before")
    shutil.copytree(root / "q1/convnet", root / "q1/convnet_old")
    finish_report(q1_convnet.QUESTION, args)
    before = files(root)
    assert "convnet_old" not in before["q1/README.md"].decode() and "80.7 / 78.9" in before["q1/README.md"].decode()
    assert before["README.md"].decode().count("| 1 | Without") == 1
    for path in (root / "q1/convnet").glob("seed2.*"):
        path.unlink()
    finish_report(q1_convnet.QUESTION, args)
    assert files(root)["q1/convnet/losses.png"] != before["q1/convnet/losses.png"]


def test_somebody_elses_page_is_found_before_the_training(q1):
    root, args = q1
    for name in ("README.md", "q1/README.md", "q1/claims.json", "overview.png", "q1/convnet/losses.png"):
        (root / name).write_bytes(b"somebody's")
        with pytest.raises(UserError, match=f"{root / name} was not written by these scripts"):
            check_report(q1_convnet.QUESTION, args)
        (root / name).unlink()


def test_damage_of_another_question_is_found_before_and_does_not_end_a_sweep(q1, capsys):
    root, args = q1
    shutil.copytree(COMMITTED / "q3/crop", root / "q3/crop")
    path = root / "q3/crop/seed0.json"
    path.write_text(path.read_text()[:2000])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check_report(q1_convnet.QUESTION, args)
    update_report(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    assert (
        f"convnet is trained and its result written, but not all pictures and pages: {path}" in capsys.readouterr().err
    )
    (root / "q3/crop").rename(root / "elsewhere")
    (root / "q2").mkdir()
    (root / "q2/claims.json").write_text("{")
    with pytest.raises(UserError, match="claims.json is damaged: delete it"):
        check_report(q1_convnet.QUESTION, args)


def test_a_file_that_cannot_be_replaced_is_one_line(q1, monkeypatch, capsys):
    args = q1[1]

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", target)

    monkeypatch.setattr(os, "replace", refuse)
    update_report(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "losses.png: Permission denied" in err


def test_results_trained_by_parts_of_a_batch_and_stand_ins_are_named(tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, sample=False)
    found = make("batchnorm", question="q2", batch_norm=True, weights="a.pth sha256:0123abcd")
    found.environments[0]["batch_norm"] = "over each process's part of the batch"
    content = report.page.question_content(q2_batchnorm_earlystop.QUESTION, {"batchnorm": [found]}, args)
    assert content["by_parts"] == ["batch norm"] and content["stand_ins"] == ["a.pth sha256:0123abcd"]


def test_a_row_says_which_seeds_and_precisions_it_has():
    found = [make("convnet", 0), make("convnet", 2)]
    found[1].settings["precision"] = "bf16"
    _, row = report.page.run_table(q1_convnet.QUESTION, {"convnet": found}, sample=False)
    assert row[1] == "2/2, 2/2 (seed 0, 2) (bf16, fp32)"


def test_question_3_draws_what_there_is():
    drawn = q3_augment_dropout.figures({"dropout_0.2": seeds("dropout_0.2", [80, 81], question="q3", dropout=0.2)})
    assert set(drawn) == {"dropout_validation.png", "dropout_bars.png", "dropout_sweep.png"}
    flip = seeds("flip_p0.3", [80, 81], question="q3", augment=["HorizontalFlip(p=0.3)"])
    assert set(q3_augment_dropout.figures({"flip_p0.3": flip})) == {"augmentations.png", "flip_sweep.png"}
