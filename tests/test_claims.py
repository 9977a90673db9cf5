"""A claim's parts and their marks."""

import pytest

import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
from common import ROOT
from report.claims import about_equal, better, for_the_eye, judge, judge_claims, narrowest_gap, overfits
from report.numbers import read_beside, read_question, read_run
from report.page import Question, run_table
from results import make, seeds

QUESTIONS = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer)
LEVEL = {"a": seeds("a", [80.0, 80.2, 80.4], batch_norm=True), "b": seeds("b", [78.0, 78.2, 78.4])}


@pytest.mark.parametrize(
    ("part", "mark"),
    [
        (better("a", "b"), "holds"),
        (better("b", "a"), "reversed"),
        (better("a", "c"), "not run"),
        (about_equal("a", "b", 3.0), "holds"),
        (about_equal("a", "b", 1.0), "reversed"),
        (about_equal("a", "b", 2.1), "cannot be told"),
        (for_the_eye("look"), "for the eye"),
    ],
)
def test_marks(part, mark):
    assert judge(part, LEVEL)["mark"] == mark


def test_a_run_is_weighed_against_the_best_of_the_others():
    tests = {"first": 84, "second": 82, "third": 83}
    results = {run: seeds(run, [test, test + 0.1], batch_size=test) for run, test in tests.items()}
    found = judge(better("first", "second", "third"), results)
    assert found["runs"] == ["first", "third"] and found["difference"] == 1.0 and found["mark"] == "holds"


def with_losses(run, training, lasts, **settings):
    """A seed for each of the last validation losses; the lowest is 1."""
    curves = [{"train_loss": [1, training], "validation_loss": [1, last]} for last in lasts]
    return [make(run, seed, curves=curve, **settings) for seed, curve in enumerate(curves)]


def test_the_narrowest_gap_counts_either_way():
    lasts = {"wide": [1.5, 1.52], "narrow": [1.1, 1.12], "below": [0.7, 0.68]}
    results = {run: with_losses(run, 1, last, batch_size=last[0]) for run, last in lasts.items()}
    found = judge(narrowest_gap("narrow", "wide", "below"), results)
    assert found["runs"] == ["narrow", "below"] and found["mark"] == "holds"
    assert found["difference"] == pytest.approx(0.2) and found["unit"] == "in loss"
    assert judge(narrowest_gap("below", "wide", "narrow"), results)["mark"] == "reversed"


def test_overfitting_is_a_validation_loss_that_ends_above_its_lowest():
    for lasts, mark in (([1.2, 1.22, 1.21], "holds"), ([1.01, 1.01, 1.02], "reversed"), ([1.5], "cannot be told")):
        assert judge(overfits("a"), {"a": with_losses("a", 0.5, lasts)})["mark"] == mark


@pytest.mark.parametrize("module", QUESTIONS, ids=lambda module: module.__name__)
def test_every_difference_is_the_subtraction_of_two_cells_of_the_table(module):
    """With the committed results, cells as the page prints them."""
    question, root = module.QUESTION, ROOT / "results"
    own = read_question(root / question.name, question.runs, sample=False)
    columns = {"test": 4, "validation": 5, "gap": 8, "narrowness": 8}
    head, *rows = run_table(question, own, sample=False)
    assert [head[4], head[5], head[8]] == ["ours: test", "validation", "gap"]
    cells = {row[0].rsplit("](", 1)[-1].rstrip("/)"): row for row in rows}
    for path in question.beside:
        name, run = path.split("/")
        (cells[run],) = run_table(Question(name, "", []), {run: read_run(root / path)}, sample=False)[1:]
    for claim in judge_claims(question.claims, own | read_beside(root, question.beside, sample=False)):
        for part in claim["parts"]:
            if part["mark"] == "not run" or len(part.get("runs", ())) < 2:
                continue
            ours, theirs = (
                float(cells[run][columns[part["on"]]].split(" ± ")[0].replace("−", "-")) for run in part["runs"]
            )
            if part["on"] == "narrowness":
                ours, theirs = -abs(ours), -abs(theirs)
            assert part["difference"] == pytest.approx(ours - theirs, abs=1e-9), part["text"]
