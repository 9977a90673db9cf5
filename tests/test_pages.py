"""Figures and pages, from results alone."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
from common import ROOT, Run, Settings, make_parser, select_runs
from made import make, seeds
from parts.machine import UserError
from report import figures, numbers, page

COMMITTED = ROOT / "results"
QUESTIONS = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)


def options(folder: Path, *more: str) -> Namespace:
    return make_parser("").parse_args([f"--output-dir={folder}", *more])


def check(question: page.Question, args: Namespace) -> None:
    page.check_pages(question, select_runs(question.runs, args, torch.device("cpu")), args)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.suffix != ".lock"}


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_figures_are_the_same_every_time_and_replace_nothing_that_is_not_ours(tmp_path, kind):
    contents, path = [], tmp_path / "a.png"
    for _ in range(2):  # the second is written over the first
        with figures.plain_style():
            figure, axes = figures.new_axes(make(), "heading", "loss")
            axes.plot([1, 2], [1, 2])
            figures.save_figure(figure, path, kind, "stamp1")
        contents.append(files(tmp_path))
    assert contents[0] == contents[1] and set(contents[0]) == {"a.png", f"a.{kind}"}
    assert figures.is_drawn(path, "stamp1") and not figures.is_drawn(path, "stamp2")
    shutil.copy(ROOT / "sample/train.png", path)
    with pytest.raises(UserError, match=f"{path} was not written by these scripts: move it away"):
        figures.save_figure(figure, path)
    assert path.read_bytes() == (ROOT / "sample/train.png").read_bytes()


@pytest.mark.parametrize("data", ["cifar10", "cifar10-sample"])
def test_the_reports_curves_stand_beside_ours_but_not_beside_the_samples(data):
    for plot, curves in ((figures.plot_losses, 2), (figures.plot_accuracy, 1)):
        (axes,) = plot([make("crop", question="q3", data=data)]).axes
        theirs = [line for line in axes.lines if "report, Figure 20" in line.get_label()]
        assert len(theirs) == (curves if data == "cifar10" else 0)
        assert ("SAMPLE" in axes.get_title()) == (data == "cifar10-sample")


def test_the_reports_filters_stand_below_ours():
    panels = figures.plot_filters(numbers.read_run(COMMITTED / "q1/convnet")).axes
    assert [re.findall(r"Figure \d", axes.get_title()) for axes in panels] == [[], [], ["Figure 2"], ["Figure 3"]]
    assert len(figures.plot_filters(numbers.read_run(COMMITTED / "q2/batchnorm")).axes) == 2  # the report has none


def test_a_runs_pictures_show_its_seeds():
    """Mean and a band of one standard deviation, every seed's best epoch; confusion in percent of the true class."""
    found = [make("crop", seed, test, question="q3") for seed, test in enumerate((80, 82))]
    (axes,) = figures.plot_accuracy(found).axes
    assert axes.lines[0].get_ydata().tolist() == [80, 81]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.extents.tolist() == pytest.approx([1, 80 - 2**0.5, 2, 81 + 2**0.5])
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"] == [[[2, 80]], [[2, 82]]]
    found[0].confusion["best"][3, 4] = 1
    (axes,) = figures.plot_confusion(found).axes
    assert axes.images[0].get_array()[3, 3:5].tolist() == pytest.approx([200 / 3, 100 / 3])


def test_stops_are_read_from_the_whole_training():
    curves = {"train_loss": [6, 5, 4, 3, 2, 1], "validation_loss": [1] * 6}
    curves["validation_accuracy"] = [50, 60, 59, 58, 57, 61]
    full = make("convnet_full", question="q2", curves=curves, epochs=50)
    rules = [make(f"convnet_patience{n}", question="q2", epochs=50, patience=n) for n in (2, 5)]
    results = {result.run: [result] for result in (full, *rules)}
    axes = q2_batchnorm_earlystop.figures(results)["early_stopping.png"].axes[0]
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("2", 4)]  # 5 does not stop here
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"] == [6, 2, 6]  # all, 2, 5


def test_the_readmes_pictures_say_what_was_judged():
    runs = {"crop": (81.5, 2.0), "grayscale": (84, 2.0), "flip_p0.1": (84, 12.0), "flip_p0.3": (84, None)}
    rows = [numbers.ReportRow("q3", run, told, seeds(run, [80, 82]), half) for run, (told, half) in runs.items()]
    (axes,) = figures.plot_overview(rows).axes
    words = ["inside", "outside", "inside, but wide", "too few seeds"]
    assert [text.get_text() for text in axes.texts] == words
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"] == [81.5, 84, 84, 84]
    parts = [{"mark": mark} for mark in ("does not hold", "holds", "cannot be told")]
    (axes,) = figures.plot_claims([{"number": 1, "text": "claim", "note": "", "parts": parts}]).axes
    assert [text.get_text() for text in axes.texts[-3:]] == ["✗", "✓", "?"]


def test_question_3_draws_what_there_is():
    drawn = q3_augment_dropout.figures({"dropout_0.2": seeds("dropout_0.2", [80, 81], question="q3", dropout=0.2)})
    assert set(drawn) == {"dropout_validation.png", "dropout_bars.png", "dropout_sweep.png"}
    runs = {name: seeds(name, [80, 81], question="q3") for name in ("dropout_0.2", "dropout_after_pool_0.6")}
    for axes in q3_augment_dropout.figures(runs)["dropout_sweep.png"].axes:
        assert axes.get_xlim()[1] > 0.6
    flip = seeds("flip_p0.3", [80, 81], question="q3", augment=["HorizontalFlip(p=0.3)"])
    assert set(q3_augment_dropout.figures({"flip_p0.3": flip})) == {"augmentations.png", "flip_sweep.png"}


def test_the_committed_pages_are_what_the_results_give(tmp_path, monkeypatch):
    """Line by line; a run that was just added, and not yet trained, is not on them. Pictures by their stamps."""
    shutil.copytree(COMMITTED, tmp_path, dirs_exist_ok=True)
    stale = []

    def check_stamp(figure, path, also=None, stamp=""):
        if not figures.is_drawn(path, stamp):
            stale.append(path)

    for module in (figures, page):
        monkeypatch.setattr(module, "save_figure", check_stamp)
    for module in QUESTIONS:
        page.write_pages(module.QUESTION, options(tmp_path))
    assert stale == []
    for path in [*tmp_path.glob("**/README.md"), *tmp_path.glob("**/claims.json")]:
        committed = (COMMITTED / path.relative_to(tmp_path)).read_text().splitlines()
        lines = [line for line in path.read_text().splitlines() if line in committed or "| not run |" not in line]
        assert lines == committed, path


@pytest.mark.parametrize("module", QUESTIONS, ids=lambda module: module.__name__)
def test_a_page_without_results(module, tmp_path):
    (tmp_path / module.QUESTION.name).mkdir()
    page.finish_pages(module.QUESTION, options(tmp_path, "--replot"))
    text = (tmp_path / module.QUESTION.name / "README.md").read_text()
    assert all(f"\n| {numbers.name_of(run.name)} | not run |" in text for run in module.RUNS)


def test_the_overview_leaves_out_what_options_named(tmp_path):
    for run in ("crop", "crop_20epochs"):
        shutil.copytree(COMMITTED / "q3/crop", tmp_path / "q3" / run)
        for path in (tmp_path / "q3" / run).glob("*.json"):
            path.write_text(path.read_text().replace('"run": "crop"', f'"run": "{run}"'))
    assert [run for _, run in page.question_3_content(numbers.read_questions(tmp_path)["q3"])["augmented"]] == ["crop"]


def test_every_link_leads_somewhere():
    for text in (ROOT / "README.md", COMMITTED / "README.md", *COMMITTED.glob("q*/README.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
            assert re.match("https?:", target) or (text.parent / unquote(target)).exists(), (text, target)


def test_from_two_files_a_seed_to_everything_else_and_again(q1, capsys):
    """Nothing is drawn twice; backups change nothing; a figure of other results is drawn again."""
    root, args = q1.parent, options(q1.parent)
    shutil.copytree(root / "q1", root / "q1_before")
    shutil.copytree(root / "q1/convnet", root / "q1/convnet_old")
    page.finish_pages(q1_convnet.QUESTION, args)
    assert f"{root / 'q1/convnet_old'} holds results of q1's convnet, a copy: not counted" in capsys.readouterr().err
    before = files(root)
    assert {"README.md", "overview.png", "claims.png", "q1/README.md", "q1/claims.json"} < before.keys()
    assert {f"q1/convnet/{name}.png" for name in ("losses", "accuracy", "filters", "confusion")} < before.keys()
    text = before["q1/README.md"].decode()
    assert "| 80.7 / " in text and "convnet_old" not in text
    assert before["README.md"].decode().count("| 1 | Without") == 1
    drawn = (root / "q1/convnet/filters.png").stat().st_mtime_ns
    page.update_pages(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    assert files(root) == before and (root / "q1/convnet/filters.png").stat().st_mtime_ns == drawn
    for path in (root / "q1/convnet").glob("seed2.*"):
        path.unlink()
    page.update_pages(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    assert files(root)["q1/convnet/losses.png"] != before["q1/convnet/losses.png"]


def test_somebody_elses_file_is_found_before_the_training(q1):
    root, args = q1.parent, options(q1.parent)
    for name in ("README.md", "q1/README.md", "q1/claims.json", "overview.png", "q1/convnet/losses.png"):
        (root / name).write_bytes(b"somebody's")
        with pytest.raises(UserError, match=f"{root / name} was not written by these scripts"):
            check(q1_convnet.QUESTION, args)
        (root / name).unlink()


def test_damage_of_another_question_is_found_before_and_does_not_end_a_sweep(q1, monkeypatch, capsys):
    root, args = q1.parent, options(q1.parent)
    monkeypatch.setattr(figures, "RUN_FIGURES", {})
    for run in ("q5/strong", "q3/crop"):
        shutil.copytree(COMMITTED / run, root / run)
        path = root / run / "seed0.json"
        whole = path.read_text()
        path.write_text(whole[:2000])
        with pytest.raises(UserError, match=f"{path} is damaged"):
            check(q1_convnet.QUESTION, args)
        if run == "q5/strong":
            path.write_text(whole)
    page.update_pages(q1_convnet.QUESTION, args, q1_convnet.RUNS[0])
    line = f"convnet is trained and its result written, but not all pictures and pages: {path}"
    assert line in capsys.readouterr().err
    path.unlink()
    claims = (COMMITTED / "q3/claims.json").read_text()
    for content in ("{", claims.replace('"unit"', '"units"', 1)):
        (root / "q3/claims.json").write_text(content)
        with pytest.raises(UserError, match="claims.json is damaged, or of an older version: delete it"):
            check(q1_convnet.QUESTION, args)


def test_a_result_of_edited_settings_stops_a_sweep_that_does_not_replace_it(q1):
    root = q1.parent
    runs = [Run(name, Settings(learning_rate=0.1)) for name in ("convnet", "other")]
    edited = replace(q1_convnet.QUESTION, runs=runs)
    check(edited, options(root, "--seeds=3"))  # all of them are about to be replaced
    check(edited, options(root, "--seeds=3", "--epochs=20"))  # that many they have anyway
    path = root / "q1/convnet/seed0.json"
    old = path.read_text()
    path.write_text(old.replace('"learning_rate": 0.002', '"learning_rate": 0.1'))
    check(edited, options(root, "--seeds=3"))  # and one was, when the sweep was interrupted
    with_option = replace(q1_convnet.QUESTION, runs=())  # so it is of a run that an option makes
    page.check_pages(with_option, select_runs(runs, options(root, "--seeds=3"), torch.device("cpu")), options(root))
    path.write_text(old)
    with pytest.raises(UserError, match="learning_rate 0.002, but the run convnet of q1 has 0.1"):
        page.check_pages(with_option, select_runs(runs, options(root, "--seed=1"), torch.device("cpu")), options(root))
    for more in (["--seeds=1"], ["--seeds=3", "--only", "other"], ["--seeds=3", "--epochs=3"]):
        with pytest.raises(UserError, match="learning_rate 0.002, but the run convnet of q1 has 0.1"):
            check(edited, options(root, *more))


def test_a_page_names_stand_ins_and_batch_norm_by_parts(tmp_path):
    found = make("batchnorm", question="q2", batch_norm=True, weights="a.pth sha256:0123abcd")
    found.environments[0]["batch_norm"] = "over each process's part of the batch"
    own = {"batchnorm": [found]}
    content = page.question_content(q2_batchnorm_earlystop.QUESTION, own, own, options(tmp_path))
    assert content["by_parts"] == ["batch norm"] and content["stand_ins"] == ["a.pth sha256:0123abcd"]
