"""A claim's parts and their marks."""

import pytest

from made import make, seeds
from report.claims import about_equal, better, by_eye, judge, narrowest_gap, overfits
from report.numbers import difference, steady_noise
from report.page import in_words, interval_in_words

LEVEL = {"a": seeds("a", [80.0, 80.2, 80.4], batch_norm=True), "b": seeds("b", [78.0, 78.2, 78.4])}


@pytest.mark.parametrize(
    ("part", "mark"),
    [
        (better("a", "b"), "holds"),
        (better("b", "a"), "does not hold"),
        (better("a", "c"), "not run"),
        (about_equal("a", "b", 3.0), "holds"),
        (about_equal("a", "b", 1.0), "does not hold"),
        (about_equal("a", "b", 2.1), "cannot be told"),
        (by_eye("look"), "by eye"),
    ],
)
def test_marks(part, mark):
    assert judge(part, LEVEL)["mark"] == mark


def test_a_part_that_was_not_run_names_all_that_it_wants():
    parts = better("a", "c"), better("c", "a", "b")
    assert [judge(part, LEVEL)["text"] for part in parts] == ["a against c", "c against the best of a, b"]


def test_a_part_is_printed_as_the_table_prints_the_same_difference():
    """Half of the interval is 1.8253: rounded to 1.825 in between it would become 1.82."""
    results = {"a": seeds("a", [84, 84.8052, 85.6104], batch_norm=True), "b": seeds("b", [80, 80.8052, 81.6104])}
    found = difference(results["a"], results["b"], "test", steady_noise(results.values(), "test"))
    assert interval_in_words(judge(better("a", "b"), results)) == f"{in_words(*found)} points" == "+4.00 ± 1.83 points"


def test_two_readings_that_agree_need_no_more_seeds():
    results = {run: seeds(run, [80, 81], patience=patience) for run, patience in (("a", 5), ("b", 7))}
    assert interval_in_words(judge(better("a", "b"), results)) == "+0.00 points (alike in every seed)"
    results = {run: found[:1] for run, found in LEVEL.items()}
    assert interval_in_words(judge(better("a", "b"), results)) == "+2.00 points (too few seeds)"


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
    assert found["text"].endswith(" of narrow is than that of the best of the others, below")
    assert judge(narrowest_gap("below", "wide", "narrow"), results)["mark"] == "does not hold"


def test_overfitting_is_a_validation_loss_that_ends_above_its_lowest():
    for lasts, mark in (([1.2, 1.22, 1.21], "holds"), ([1.01, 1.01, 1.02], "does not hold"), ([1.5], "cannot be told")):
        assert judge(overfits("a"), {"a": with_losses("a", 0.5, lasts)})["mark"] == mark
    lowest_at_the_end = {"a": with_losses("a", 0.5, [0.9])}
    assert interval_in_words(judge(overfits("a"), lowest_at_the_end)) == "+0.00 % (too few seeds)"
