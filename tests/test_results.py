import json
import math
import re
import shutil
from collections.abc import Sequence
from urllib.parse import unquote

import numpy as np
import pytest
import torch

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
import report
from augment import Grayscale
from common import ROOT, correct_images, load_result, make_parser, score, select_runs
from q1_convnet import filters_become_smooth
from q2_batchnorm_earlystop import restores_others
from q3_augment_dropout import about_equal, narrowest_gap, two_best
from report import (
    Claim,
    Difference,
    Results,
    beats,
    make_difference,
    overfits,
    paired_difference,
    pooled_variance,
    smoothness,
    t_quantile,
    training_variance,
    validation_difference,
    verdict,
    wilson_interval,
)

QUESTIONS = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 25.5275, 36.6201),  # Newcombe 1998, table I: 81 of 263, score interval .2553 to .3662
        (15, 148, 6.2386, 16.0503),  # 15 of 148: .0624 to .1605
        (0, 20, 0.0, 16.1125),  # 0 of 20: 0 to .1611
        (29, 29, 88.3031, 100.0),
    ],
)
def test_wilson_interval_against_published_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=0.01)


def test_score_counts_what_it_says():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (10_000,), generator=rng)
    predictions = torch.where(
        torch.rand(10_000, generator=rng) < 0.8, labels, torch.randint(0, 10, (10_000,), generator=rng)
    ).to(torch.uint8)
    scored = score(predictions, labels, epoch=3)
    right = (predictions == labels).numpy()
    assert scored["all_images"]["accuracy"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert scored["report_images"]["accuracy"] == pytest.approx(100 * right[:1000].mean(), abs=1e-3)
    np.testing.assert_array_equal(correct_images(scored), right)
    confusion = np.array(scored["confusion"])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(labels, minlength=10))
    assert confusion[3, 5] == int(((labels == 3) & (predictions == 5)).sum())
    assert scored["report_images"]["images"] == 1000 and scored["all_images"]["images"] == 10_000


def as_results(correct: np.ndarray, validation: float = 80.0) -> list[dict]:
    """Results of a run with the given correctness, bool [seeds, images]; every one a training of its own."""
    labels, results = torch.zeros(correct.shape[1], dtype=torch.long), []
    for seed, right in enumerate(correct):
        scored = score(torch.from_numpy(np.where(right, 0, 1)), labels, 1)
        history = [{"epoch": 1, "validation_accuracy": validation, "digest": hash(right.tobytes())}]
        settings = {"precision": "fp32", "data": "cifar10"}
        test = {"best": scored, "last": scored}
        results.append({"seed": seed, "settings": settings, "history": history, "best_epoch": 1, "test": test})
    return results


def draw(accuracy: float, seeds: int, seed: int, images: int = 10_000) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < accuracy


def test_student_quantiles_against_the_tables():
    for df, exact in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (6, 2.44691), (30, 2.04227), (math.inf, 1.95996)):
        assert t_quantile(df) == pytest.approx(exact, rel=1e-4)
    for df, exact in ((1, 63.6567), (2, 9.92484), (6, 3.70743), (30, 2.75000), (9999, 2.57632), (math.inf, 2.57583)):
        assert t_quantile(df, 0.01) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("interval", "zone", "expected"),
    [
        ((0.1, 2.0), (0, math.inf), "holds"),
        ((-0.1, 2.0), (0, math.inf), "within noise"),
        ((-2.0, -0.1), (0, math.inf), "does not hold"),
        ((0.0, 0.0), (0, math.inf), "within noise"),  # no difference at all
        ((-1.0, 1.0), (-2, 2), "holds"),
        ((-1.0, 3.0), (-2, 2), "within noise"),
        ((2.5, 3.0), (-2, 2), "does not hold"),
        ((-math.inf, -math.inf), (5, math.inf), "does not hold"),
    ],
)
def test_a_verdict_says_whether_the_interval_lies_in_the_zone(interval, zone, expected):
    assert verdict(interval, zone) == expected


def test_one_of_many_comparisons_is_reversed_by_chance_no_more_often_than_one_alone():
    """Brute force: 10 comparisons without a difference; the claim that all are above zero is false, not reversed."""
    rng, reversed_ones, trials = np.random.default_rng(1), 0, 2000
    for values in rng.normal(0, 0.5, (trials, 10)):
        verdicts = [make_difference(value[None], 0.25, None, []).verdict(comparisons=10) for value in values]
        reversed_ones += "does not hold" in verdicts
    assert 0.01 < reversed_ones / trials < 0.035  # one side of 5 %
    assert make_difference(np.ones(1), 0.25, None, []).verdict(comparisons=10) == "holds"  # by its own 95 %


def test_the_variance_between_seeds_is_pooled_over_settings():
    groups = [np.array([80.0, 82.0]), np.array([10.0, 10.0, 13.0])]
    found = pooled_variance(groups)
    assert found.df == 3 and found.value == pytest.approx((2 + 6) / 3)
    assert pooled_variance(groups[:1]) is None  # one degree of freedom says too little
    images = pooled_variance([np.array([[0.0, 100.0], [0.0, 0.0], [0.0, 100.0]])])  # [seeds, images]
    assert images.df == 2 and images.value == pytest.approx((0 + 10_000 / 3) / 2)


def test_three_seeds_measure_the_noise_of_training_and_fewer_borrow_it():
    repeated = [np.array([80.0, 81.0, 82.0])]  # variance 1
    assert vars(training_variance(np.array([1.0, 2.0, 6.0]), repeated)) == {"value": pytest.approx(7 / 3), "df": 2}
    assert vars(training_variance(np.array([1.0, 2.0]), repeated)) == {"value": 1.0, "df": 2}  # 2 * 1 / 2
    assert vars(training_variance(np.array([1.0]), repeated)) == {"value": 2.0, "df": 2}
    assert training_variance(np.array([1.0, 2.0]), []) is None


def test_a_run_whose_seeds_lie_far_apart_is_told_by_them_alone():
    pooled, wild = [np.array([80.0, 81.0, 82.0])], np.array([30.0, 50.0])  # variances 1 and 200
    one = training_variance(np.array([40.0]), pooled, [wild])
    assert one.value == pytest.approx(201) and one.df == pytest.approx(201**2 / (200**2 / 1 + 1**2 / 2))
    both = training_variance(np.array([0.0, 1.0]), pooled, [wild, wild])
    assert both.value == pytest.approx(200) and both.df == pytest.approx(2)
    assert training_variance(np.array([40.0]), [], [wild]) is None  # nothing tells the other run's


def test_paired_interval_without_repeated_settings_is_that_of_the_images():
    a, b = draw(0.82, 1, 0), draw(0.80, 1, 1)
    found = paired_difference(Results({"a": as_results(a), "b": as_results(b)}), "a", "b")
    difference = a[0].astype(int) - b[0]
    error = 196 * difference.std() / math.sqrt(difference.size)
    assert found.value == pytest.approx(100 * difference.mean(), abs=1e-6) and not found.training
    assert found.interval() == pytest.approx((found.value - error, found.value + error), abs=0.001)
    assert "without the noise of training" in found.in_words()


def trained(logits: np.ndarray, seeds: int, spread: float, rng: np.random.Generator) -> list[dict]:
    """Trainings of one setting: every one is better or worse as a whole, and gets other images right by chance."""
    shifted = logits + rng.normal(0, spread, (seeds, 1))
    return as_results(rng.random((seeds, logits.size)) < 1 / (1 + np.exp(-shifted)))


@pytest.mark.parametrize(
    ("seeds", "spread", "wilder"),
    [((1, 1), 0.15, 1), ((2, 2), 0.15, 1), ((3, 3), 0.15, 1), ((3, 3), 0.01, 1), ((1, 3), 0.15, 6)],
)
def test_an_interval_covers_the_true_difference_as_often_as_it_says(seeds, spread, wilder):
    """Brute force, the images drawn anew every time: some are harder for one setting than for the other. The seeds of the
    last case's second run lie further apart than the repeated settings'.
    """
    rng, covered, trials = np.random.default_rng(3), 0, 1500
    for _ in range(trials):
        harder, easier = rng.normal(1.5, 2, (2, 400))  # on the same images, so the true difference is zero
        common = rng.normal(0, 1.5, 400)
        repeated = [trained(common + rng.normal(1.5, 2, 400), 3, spread, rng) for _ in range(3)]
        one = trained(common + harder, seeds[0], spread, rng)
        other = trained(common + easier, seeds[1], spread * wilder, rng)
        for result in other:
            result["settings"] = result["settings"] | {"dropout": 0.6}
        low, high = paired_difference(Results({"a": one, "b": other}, repeated), "a", "b").interval()
        covered += low < 0 < high
    assert 0.93 < covered / trials < 0.97


def test_the_noise_of_training_widens_the_interval_and_more_seeds_narrow_it():
    a, b = draw(0.82, 2, 0), draw(0.80, 2, 1)
    repeated = [as_results(draw(p, 3, seed)) for seed, p in enumerate((0.79, 0.80, 0.81), 5)]
    one = Results({"a": as_results(a[:1]), "b": as_results(b[:1])})
    alone = paired_difference(one, "a", "b")
    one.repeated = repeated
    widened = paired_difference(one, "a", "b")
    two = paired_difference(Results({"a": as_results(a), "b": as_results(b)}, repeated), "a", "b")
    widths = [d.interval()[1] - d.interval()[0] for d in (two, widened, alone)]
    assert widths[0] < widths[1] > widths[2] and widened.training and two.seeds == 2
    assert "2 seeds" in two.in_words() and "without the noise" not in two.in_words()


def test_a_runs_own_seeds_count_towards_the_noise_of_training():
    """At a high dropout rate two seeds lie far apart, and settings without dropout do not tell."""
    repeated = [as_results(draw(0.8, 3, 5))]
    calm, wild = as_results(draw(0.8, 1, 0)), as_results(np.concatenate([draw(0.5, 1, 1), draw(0.3, 1, 2)]))
    for result in wild:
        result["settings"] = result["settings"] | {"dropout": 0.6}
    results = Results({"calm": calm, "wild": wild, "wild, one seed": wild[:1]}, repeated)
    assert results.noise_of(("calm", "wild"), report.test_accuracy) == (repeated, [wild])
    assert results.noise_of(("calm", "wild, one seed"), report.test_accuracy) == (repeated, [])
    assert results.noise_of(("calm", "wild"), lambda result: 80.0 + result["seed"] / 100) == ([*repeated, wild], [])
    again = [r | {"settings": r["settings"] | {"epochs": 3, "patience": 5, "seed": 1}} for r in repeated[0]]
    found = Results({"again": again}, repeated).noise_of(("again",), report.test_accuracy)
    assert found == (repeated, [])  # the same trainings, read otherwise
    one, two = (paired_difference(results, "calm", run) for run in ("wild, one seed", "wild"))
    assert one.value == two.value and two.error > 10 * one.error and two.df < 1.1
    assert one.verdict() == "holds" and two.verdict() == "within noise"


def test_what_training_adds_to_the_images_is_not_counted_twice():
    rng = np.random.default_rng(0)
    easy, hard, other = rng.normal(1.5, 2, (3, 10_000))
    groups = [trained(other, 3, 0.1, rng) for _ in range(3)]
    one, two = trained(easy, 1, 0.1, rng), trained(hard, 1, 0.1, rng)
    found = paired_difference(Results({"a": one, "b": two}, groups), "a", "b")
    right = [100.0 * np.array([correct_images(r["test"]["best"]) for r in group]) for group in (one, two, *groups)]
    of_training = 2 * np.mean([points.mean(1).var(ddof=1) for points in right[2:]])
    of_images = (right[0] - right[1]).var() / 10_000
    in_both = 2 * np.mean([points.var(0, ddof=1).mean() for points in right[2:]]) / 10_000
    assert 0 < in_both < min(of_images, of_training)
    assert found.error == pytest.approx(math.sqrt(of_training + of_images - in_both))


def test_seeds_that_agree_by_chance_leave_the_noise_of_the_images():
    rng = np.random.default_rng(0)
    one, other = (np.array([rng.permutation(10_000) < 8000 for _ in range(3)]) for _ in range(2))  # all at 80 %
    found = paired_difference(Results({"a": as_results(one), "b": as_results(other)}), "a", "b")
    by_image = (100.0 * (one.mean(0) - other.mean(0))).var() / 10_000
    assert found.value == 0 and found.training and found.error == pytest.approx(math.sqrt(by_image))


def test_last_weights_borrow_the_noise_of_last_weights():
    def with_last(best: np.ndarray, last: np.ndarray) -> list[dict]:
        found = as_results(best)
        for result, other in zip(found, as_results(last)):
            result["test"]["last"] = other["test"]["best"]
        return found

    alike, apart = np.repeat(draw(0.8, 1, 0), 3, axis=0), draw(0.8, 3, 1)
    apart[1, :2000] = False
    results = Results({"a": as_results(draw(0.8, 1, 2)), "b": as_results(draw(0.8, 1, 3))}, [with_last(alike, apart)])
    errors = [paired_difference(results, "a", "b", (which, which)).error for which in ("best", "last")]
    assert errors[1] > 5 * errors[0]


def test_pairing_makes_the_interval_narrower():
    a = draw(0.80, 1, 5)
    b = a.copy()
    b[0, np.flatnonzero(a[0])[:100]] = False  # worse on 100 images, equal on all others
    low, high = paired_difference(Results({"a": as_results(a), "b": as_results(b)}), "a", "b").interval()
    assert 0.7 < low < 1.0 < high < 1.3


def test_best_and_last_weights_of_one_training_borrow_no_noise_of_training():
    run = as_results(draw(0.8, 1, 6))[0]
    last = correct_images(run["test"]["best"])
    last[np.flatnonzero(last)[:100]] = False  # worse on 100 images of 10,000
    run["test"] = run["test"] | {"last": as_results(last[None])[0]["test"]["best"]}
    results = Results({"a": [run]}, [as_results(draw(0.8, 4, 9))])
    found = paired_difference(results, "a", "a", weights=("best", "last"))
    assert found.value == pytest.approx(1.0) and found.verdict() == "holds"
    assert 0.7 < found.interval()[0] and not found.training  # of the images alone: other settings' seeds do not tell it
    assert paired_difference(results, "a", "a", weights=("last", "best")).value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(0.85, 0.80, "holds"), (0.80, 0.85, "does not hold"), (0.80, 0.80, "within noise")],
)
def test_beats(better, worse, expected):
    results = Results({"a": as_results(draw(better, 1, 6)), "b": as_results(draw(worse, 1, 7))})
    assert beats("a", "b")(results).verdict == expected
    assert beats("a", "missing")(results).verdict == "not run"


def test_a_comparison_of_two_precisions_says_so():
    one, other = as_results(draw(0.8, 1, 6)), as_results(draw(0.8, 1, 7))
    assert "trained in" not in beats("a", "b")(Results({"a": one, "b": other})).evidence
    other[0]["settings"]["precision"] = "bf16"
    assert "trained in bf16 and fp32" in beats("a", "b")(Results({"a": one, "b": other})).evidence


def test_a_claim_of_several_parts():
    results = Results(
        {n: as_results(draw(p, 1, seed)) for seed, (n, p) in enumerate((("a", 0.9), ("b", 0.8), ("c", 0.7)))}
    )

    def judged(*pairs):
        return Claim(1, "text", tuple(beats(*pair) for pair in pairs)).judge(results)["verdict"]

    assert judged(("a", "b"), ("b", "c")) == "holds"
    assert judged(("a", "b"), ("c", "b")) == "does not hold"
    assert judged(("a", "b"), ("b", "missing")) == "not run"
    assert judged(("c", "b"), ("b", "missing")) == "does not hold"
    found = Claim("1", "text", (beats("a", "b"), beats("b", "missing"))).judge(results)
    assert report.in_short(found) == "**not run** (1 of 2 parts holds, 1 not run, without the noise of training)"
    first, missing = report.evidence(found)
    assert first.startswith("holds: a − b, test: +") and missing == "1 of 2 parts not run"
    assert report.in_short(Claim("1", "text", (beats("b", "missing"),) * 2).judge(results)) == "**not run**"


def test_a_validation_accuracy_is_better_beyond_the_noise_of_1000_images():
    def compare(a: float, b: float, data: str = "cifar10") -> Difference:
        results = {}
        for seed, (name, value) in enumerate((("a", a), ("b", b))):
            results[name] = as_results(draw(0.8, 1, seed), value)
            results[name][0]["settings"]["data"] = data
        return validation_difference(Results(results), "a", "b")

    assert compare(86.0, 82.0).verdict() == "holds"
    assert compare(82.0, 86.0).verdict() == "does not hold"
    assert compare(82.1, 82.0).verdict() == "within noise"
    close = compare(84.5, 82.0)  # sqrt(.845 * .155 + .82 * .18) * 1.96 = 3.27
    assert close.interval()[1] - close.value == pytest.approx(3.27, abs=0.01)
    one = Results({"a": as_results(draw(0.8, 1, 0), 82.0)})
    assert validation_difference(one, "a", "a").interval() == (0.0, 0.0)
    assert validation_difference(one, "a", "a").in_words() == "+0.00 points, of the same weights"
    sample = compare(60.0, 51.0, "cifar10-sample")  # 200 images
    assert sample.interval()[1] - sample.value == pytest.approx(9.7, abs=0.05)
    assert validation_difference(Results({}), "a", "b") is None


def with_history(**curves: list[float]) -> dict:
    """A result with these entries over epochs."""
    epochs = range(len(next(iter(curves.values()))))
    history = [{"epoch": e + 1} | {name: values[e] for name, values in curves.items()} for e in epochs]
    places = {"earlier_environments": [], "environment": {"device": "A", "from_epoch": 1}}
    return {"seed": 0, "history": history, "settings": {"data": "cifar10", "precision": "fp32"}} | places


def test_overfitting_criterion():
    def found(train, *validation):
        runs = [with_history(train_loss=train, validation_loss=v) | {"seed": s} for s, v in enumerate(validation)]
        return overfits("a")(Results({"a": runs})).verdict

    assert overfits("a")(Results({})).verdict == "not run"
    assert found([2.0, 1.0, 0.5, 0.2], [1.5, 1.0, 1.1, 1.4]) == "holds"
    assert found([2.0, 1.0, 0.5, 0.2], [1.5, 1.0, 0.9, 0.8]) == "does not hold"
    assert found([2.0, 1.0, 1.1, 1.2], [1.5, 1.0, 1.1, 1.4]) == "does not hold"  # diverges
    assert (
        found([2.0, 1.0, 0.5, 0.2], [1.5, 1.0, 1.1, 1.4], [1.5, 1.0, 0.9, 0.8]) == "within noise"
    )  # one seed each way


def test_smoothness_of_known_filters():
    flat, checkers = np.ones((1, 3, 3, 3)), np.tile([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], (1, 3, 1, 1))
    ramp = np.tile([[1.0, 0, -1]], (1, 3, 3, 1))
    assert smoothness(flat) == pytest.approx(1) and smoothness(ramp) == pytest.approx(1)
    assert smoothness(checkers) == pytest.approx(0, abs=1e-12)
    noise = np.random.default_rng(0).normal(size=(20_000, 3, 3, 3))
    assert smoothness(noise).mean() == pytest.approx(1 / 3, abs=0.005)


def test_filter_criterion(tmp_path):
    rng = np.random.default_rng(0)
    noise, ramp = rng.normal(size=(128, 3, 3, 3)), np.tile([[1.0, 0, -1]], (128, 3, 3, 1))
    (tmp_path / "convnet").mkdir()

    def found(*seeds):
        for seed, (before, after) in enumerate(seeds):
            arrays = {"before": before, "last": after, "step_losses": np.zeros((1, 1))}
            np.savez_compressed(tmp_path / f"convnet/seed{seed}.npz", **arrays)
        results = Results({"convnet": [{"seed": seed} for seed in range(len(seeds))]}, folder=tmp_path)
        return filters_become_smooth("convnet")(results)

    smoother = found((noise, noise + ramp))
    assert smoother.verdict == "holds" and smoother.lacks_training
    assert "the report's own filters: before 33.0 %, after 46.7 %" in smoother.evidence
    assert found((noise, noise)).verdict == "within noise"
    assert found((noise + ramp, noise)).verdict == "does not hold"
    assert found((noise + 0.3 * ramp, noise + ramp)).verdict == "within noise"  # no white noise before
    both = found((noise, noise + ramp), (noise, noise + 2 * ramp))
    assert both.verdict == "holds" and not both.lacks_training and "; seed 1: before" in both.evidence
    assert found((noise, noise + ramp), (noise, noise)).verdict == "within noise"
    assert filters_become_smooth("convnet")(Results({})).verdict == "not run"


def test_making_no_difference():
    accuracies = (("a", 0.80), ("b", 0.80), ("c", 0.7))
    results = Results({n: as_results(draw(p, 1, seed)) for seed, (n, p) in enumerate(accuracies, 6)})
    assert about_equal("a", "b", margin=2.0)(results).verdict == "holds"
    assert about_equal("a", "b", margin=0.5)(results).verdict == "within noise"
    assert about_equal("a", "c", margin=2.0)(results).verdict == "does not hold"
    assert about_equal("a", "missing", margin=2.0)(results).verdict == "not run"


def test_the_narrowest_gap():
    def with_gap(gap: float, seed: int = 0, data: str = "cifar10") -> dict:
        result = with_history(train_loss=[1.0], validation_loss=[1.0 + gap]) | {"seed": seed}
        result["settings"]["data"] = data
        return result

    gaps = {"zero": 0.1, "close": 0.14, "wide": 0.9, "negative": -0.5}
    results = Results({name: [with_gap(gap)] for name, gap in gaps.items()})
    assert narrowest_gap("zero", ["wide", "negative"])(results).verdict == "holds"
    assert narrowest_gap("negative", ["wide", "zero"])(results).verdict == "does not hold"
    assert narrowest_gap("zero", ["close", "wide"])(results).verdict == "within noise"
    assert narrowest_gap("close", ["zero", "wide"])(results).verdict == "within noise"
    assert narrowest_gap("zero", ["missing"])(results).verdict == "not run"
    results["wide"].append(with_gap(0.0, seed=1))
    assert narrowest_gap("zero", ["wide"])(results).verdict == "holds"  # the other seed has nothing to compare with
    gaps = {"zero": [with_gap(0.1, data="cifar10-sample")], "wide": [with_gap(0.45, data="cifar10-sample")]}
    assert narrowest_gap("zero", ["wide"])(Results(gaps)).verdict == "within noise"  # 200 images: sqrt(5) times 0.17
    repeated = [[with_gap(gap, seed) for seed, gap in enumerate((0.0, 0.5, 1.0, 1.5))]]
    results = Results({"zero": [with_gap(0.1)], "wide": [with_gap(0.9)]}, repeated)
    assert narrowest_gap("zero", ["wide"])(results).verdict == "within noise"  # seeds differ by more


def test_the_two_best_augmentations_must_beat_the_third_beyond_noise():
    runs = {"crop_flip": 0.85, "crop": 0.8, "flip": 0.7, "mixture": 0.83}
    check = two_best(["crop_flip", "mixture"], list(runs))

    def found(**changes: float):
        return check(Results({n: as_results(draw(p, 1, seed)) for seed, (n, p) in enumerate((runs | changes).items())}))

    assert found().verdict == "holds" and "mixture − crop:" in found().evidence
    assert found(mixture=0.8).verdict == "within noise"
    assert found(mixture=0.75).verdict == "does not hold"
    assert "crop_flip − crop:" in found(mixture=0.9).evidence  # the lesser of the two decides
    assert check(Results({"crop_flip": [], "mixture": []})).verdict == "not run"
    results = Results({name: as_results(draw(p, 1, seed)) for seed, (name, p) in enumerate(runs.items())})
    results["mixture"] += as_results(draw(0.9, 3, 9))[1:]  # better with two seeds that the others do not have
    assert "mixture − crop:" in check(results).evidence


def validated(accuracies: list[float], best: int, right: int = 322, run: str = "a", **settings) -> dict:
    """A result with this validation accuracy over epochs, 10 seconds each, and `right` of 400 test images."""
    result = with_history(validation_accuracy=accuracies, seconds=[10.0] * len(accuracies))
    labels = torch.zeros(400, dtype=torch.long)
    test = {
        name: score((torch.arange(400) >= count).long(), labels, 1) for name, count in (("best", right), ("last", 317))
    }
    settings = (
        result["settings"] | {"patience": None, "weights": "none", "dropout": 0.0, "epochs": len(accuracies)} | settings
    )
    return result | {"run": run, "best_epoch": best, "test": test, "settings": settings}


def with_losses(result: dict, train: list[float], validation: list[float]) -> dict:
    for entry, train_loss, validation_loss in zip(result["history"], train, validation):
        entry |= {"train_loss": train_loss, "validation_loss": validation_loss}
    return result | {"question": "q3"}


def test_the_table_of_gaps_compares_every_run_with_the_baseline():
    def rows_of(results: dict) -> dict[str, list[str]]:
        (table,) = q3_augment_dropout.tables(Results(results))
        return {row[0]: row[1:-1] for row in table}

    results = {
        "baseline": [with_losses(validated([70.0, 80.0], 2), [1.5, 0.1], [1.4, 0.9])],
        "crop_flip": [with_losses(validated([70.0, 80.5], 2, right=342), [2.5, 0.5], [1.5, 0.6])],
    }
    rows = rows_of(results)
    assert rows["baseline"] == ["0.100", "0.900", "+0.800", "80.0", "-"]
    assert rows["crop_flip"][:4] == ["0.500", "0.600", "+0.100", "80.5"]
    assert rows["crop_flip"][4].startswith("+5.00 points, 95 % [+")
    assert rows["dropout_0.6"] == ["-"] * 5
    seeds = {run: [*found] for run, found in results.items()}
    for run, precision, right in (("baseline", "fp32", 317), ("crop_flip", "bf16", 325)):
        second = with_losses(validated([70.0, 80.0], 2, right=right, precision=precision), [1.5, 0.1], [1.4, 0.9])
        seeds[run].append(second | {"seed": 1})
    both = rows_of(seeds)["crop_flip"][4]
    assert both.startswith("+3.50 points") and both.endswith("2 seeds, trained in bf16 and fp32")
    for entry, accuracy in zip(results["crop_flip"][0]["history"], (79.0, 78.0)):
        entry |= {"augmented_validation_accuracy": accuracy, "augmented_validation_loss": 0.7}
    assert rows_of(results)["crop_flip"][1:4] == ["0.600 / 0.700", "+0.200", "80.5 / 79.0"]
    fewer = {"crop_flip_1epochs": [with_losses(validated([70.0], 1), [2.5], [1.5])]}
    rows = rows_of(results | fewer)
    assert rows["crop_flip_1epochs"][4] == "-"  # not of the baseline's training length
    del results["baseline"]
    assert rows_of(results)["crop_flip"][4] == "-"  # nothing to compare with


def test_small_multiples_show_all_of_every_curve():
    results = {
        name: [with_losses(validated([70.0, 80.0], 2), [highest, 0.1], [1.4, 0.9])]
        for name, highest in (("baseline", 1.5), ("flip_p0.1", 2.0), ("crop_flip", 2.5))
    }
    for entry in results["crop_flip"][0]["history"]:
        entry |= {"augmented_validation_accuracy": 79.0, "augmented_validation_loss": 0.7}
    results["crop_flip"][0]["run"] = "crop_flip"  # the report's curves are of this one
    panels = q3_augment_dropout.figures(Results(results))["augmentations.png"].axes[:3]
    for axes in panels:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.5
    named = [text.get_text() for text in panels[0].get_legend().get_texts()]  # all lines, though the baseline has two
    ours = ["training", "validation", "validation, augmented as in the report"]
    assert named == [*ours, "report: training", "report: validation"]


def test_one_training_in_two_questions_counts_once(finished, tmp_path):
    result = json.loads((finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text())
    for question, seconds in (("q1", 1.0), ("q2", 2.0)):  # trained in each
        for entry in result["history"]:
            entry["seconds"] = seconds
        (tmp_path / question / "convnet").mkdir(parents=True)
        (tmp_path / question / "convnet/seed0.json").write_text(json.dumps(result))
    assert "median of 1 trainings" in report.general_practices(tmp_path)[0][1]


def test_two_patiences_restore_the_same_weights_only_if_trained_alike_until_then():
    five, seven = validated([70.0, 80.0, 79.0], 2), validated([70.0, 80.0, 79.0, 78.0], 2)
    results = Results({"batchnorm_patience5": [five], "batchnorm_patience7": [seven]})
    assert restores_others(results).evidence == "both restore the same weights"
    for entry in seven["history"]:
        entry["seconds"] += 1.0  # the same training, done again
    assert restores_others(results).evidence == "both restore the same weights"
    results["batchnorm_patience7"] = [validated([71.0, 80.0, 79.0, 78.0], 2)]  # the same epoch of another training
    assert "restore different weights" in restores_others(results).evidence


def test_the_table_of_stopping_rules():
    full = [70.0, 80.0, 79.0, 80.0, 78.0, 81.0]  # the tie in epoch 4 does not count

    def named(run: str, result: dict) -> dict:
        return {run: [result | {"run": run}]}

    results = Results(
        named("batchnorm_patience2", validated(full[:5], 2, patience=2))
        | named("convnet_full", validated(full, 6, right=342))
        | named("convnet_patience10", validated(full, 6, right=342, patience=10))
        | named("convnet_patience2", validated(full[:5], 2, patience=2))
        | named("convnet_full_30epochs", validated(full, 6))  # no rule of the report's 50 epochs
    )
    ((_, stopped, never, unstopped, alone),) = q2_batchnorm_earlystop.tables(results)  # by network and patience
    assert stopped[:5] == ["convnet_patience2", "5", "2", "80.0 / 80.50", "78.0 / 79.25"]
    assert stopped[5].startswith("+1.25 [+0.") and stopped[6] == "1, 00:10 on A" and stopped[7].startswith("+5.00 [+")
    assert stopped[8] == "python q2_batchnorm_earlystop.py --only convnet_patience2 --patience 2"
    assert never[:3] == ["convnet_patience10", "6 (did not stop)", "6"]
    assert unstopped[:3] == ["convnet_full", "6", "6"]
    assert unstopped[6:8] == ["-", "-"]  # it is what the others are compared with
    assert alone[0] == "batchnorm_patience2" and alone[6:8] == ["-", "-"]  # nothing to compare with
    results |= named("convnet_full", validated([71.0, *full[1:]], 6))  # another training
    assert q2_batchnorm_earlystop.tables(results)[0][1][6:8] == ["-", "-"]


def test_what_a_tie_changes_for_early_stopping():
    full = {"convnet_full": [validated([70.0, 80.0, 79.0, 80.0, 78.0, 77.0, 76.0, 75.0, 81.0], 9)]}
    (row,) = q2_batchnorm_earlystop.practices(Results(full))
    assert row[1] == "convnet, patience 5, seed 0: ends after epoch 8; if a tie counted, after epoch 7"


def test_the_figure_of_stopping_rules_marks_stops_of_the_same_training_alone():
    full = [70.0, 80.0, 79.0, 78.0, 77.0]
    whole = validated(full, 2) | {"question": "q2"}
    for entry in whole["history"]:
        entry["validation_loss"] = 1.0

    def rule(patience, history):
        settings = whole["settings"] | {"patience": patience}
        return [whole | {"history": history, "settings": settings}]

    other = [dict(entry, validation_accuracy=entry["validation_accuracy"] + 1) for entry in whole["history"]]
    results = {
        "convnet_full": [whole],
        "convnet_patience1": rule(1, whole["history"][:3]),
        "convnet_patience2": rule(2, whole["history"][:4]),
        "convnet_patience3": rule(3, whole["history"]),  # stops exactly at the end
        "convnet_patience9": rule(9, whole["history"]),  # never stops
        "convnet_patience4": rule(4, other),
    }
    figure = q2_batchnorm_earlystop.figures(Results(results))["early_stopping.png"]
    for axes in figure.axes:
        assert {t.get_text(): t.get_position()[0] for t in axes.texts} == {"1": 3, "2": 4, "3": 5}


def test_seeds_that_stopped_after_different_epochs_are_drawn_whole():
    _, axes = report.new_axes("", "accuracy (%)")
    report.plot_curve(axes, [validated([70.0, 80.0], 2)] * 2, "validation_accuracy", "a")
    assert len(axes.lines) == 1  # the mean
    stopped = [validated([70.0, 80.0], 2), validated([70.0, 80.0, 79.0], 2)]
    report.plot_curve(axes, stopped, "validation_accuracy", "b")
    assert [len(line.get_xdata()) for line in axes.lines[1:]] == [2, 3]
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_a_single_epoch_is_a_dot():
    _, axes = report.new_axes("", "accuracy (%)")
    report.plot_curve(axes, [validated([70.0], 1)], "validation_accuracy", "one")
    report.plot_curve(axes, [validated([70.0, 71.0], 2)], "validation_accuracy", "two")
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]


def test_several_seeds_are_mean_and_standard_deviation():
    assert report.mean_and_deviation([80.0]) == "80.0"
    assert report.mean_and_deviation([80.0, 82.0]) == "81.0 ± 1.4"
    several = as_results(np.repeat([[True] * 80 + [False] * 20, [True] * 82 + [False] * 18], 100, axis=1))
    assert report.mean_test_accuracy(several) == pytest.approx(81.0)
    assert report.test_interval(several) == pytest.approx((81 - math.sqrt(2), 81 + math.sqrt(2)))
    assert report.test_interval(several[:1]) == pytest.approx(wilson_interval(8000, 10_000), abs=0.01)


# -------------------------------------------------------------------------------------------------------- the report


def test_the_reports_figures_are_all_there():
    figures = [f["figure"] for f in report.the_report()["figures"]]
    assert [int("".join(filter(str.isdigit, f))) for f in figures] == sorted(
        int("".join(filter(str.isdigit, f))) for f in figures
    )
    assert {int("".join(filter(str.isdigit, f))) for f in figures} == set(range(1, 34))
    names = {question.__name__[:2]: {run.name for run in question.RUNS} for question in QUESTIONS}
    for figure in report.the_report()["figures"]:
        runs = [f"dropout_{p}" for p in figure["bars"]] if "bars" in figure else [figure["run"]]
        assert set(runs) <= names[figure["question"]], figure["figure"]
    for question, numbers in report.the_report()["numbers"].items():
        assert set(numbers) <= names[question]


def test_the_distance_is_the_mean_absolute_difference_over_the_epochs_both_have():
    figure = {"validation_accuracy": [70.0, 80.0, 85.0], "train_loss": [1.0, 0.5]}
    ours = with_history(validation_accuracy=[72.0, 79.0], train_loss=[1.1, 0.6])
    assert report.distance(figure, [ours], "validation_accuracy") == pytest.approx(1.5)
    assert report.distance(figure, [ours], "train_loss") == pytest.approx(0.1)
    assert report.distance(figure, [ours], "validation_loss") is None
    augmented = with_history(validation_accuracy=[72.0, 79.0], augmented_validation_accuracy=[70.0, 76.0])
    assert report.distance(figure, [augmented], "validation_accuracy") == pytest.approx(2.0)  # as the report validates


def test_a_runs_figures_carry_the_reports_curves():
    curve = {"train_loss": [1.0, 0.5], "validation_loss": [1.0, 0.8], "validation_accuracy": [60.0, 70.0]}
    result = with_history(**curve) | {"question": "q3", "run": "crop_flip", "best_epoch": 2}
    labels = report.plot_losses([result]).axes[0].get_legend_handles_labels()[1]
    assert labels[2:] == ["report, Figure 21: training", "report, Figure 21: validation"]
    axes = report.plot_accuracy([result]).axes[0]
    assert axes.get_legend_handles_labels()[1][-1] == "report, Figure 21"
    theirs = next(f for f in report.the_report()["figures"] if f["figure"] == "21")
    assert axes.lines[-1].get_ydata().tolist() == theirs["validation_accuracy"]


def test_a_number_of_the_report_stands_beside_its_figures():
    def shown(question, run):
        return [report.printed_and_drawn(run, report.reported(question, run), name) for name in ("validation", "test")]

    assert shown("q3", "crop_flip") == ["85.0", "84.6"]
    assert shown("q3", "crop_flip_gray_blur") == ["82.9 (Figure 25: 81.8)", "81.8 (Figure 25: 82.9)"]
    assert shown("q2", "batchnorm_patience7") == ["85.8", "-"]  # its figure is another run's
    assert shown("q4", "frozen_train_mode_imagenet") == ["61-66", "-"]
    assert shown("q3", "baseline") == ["-", "-"]


def test_what_the_reports_text_and_its_plots_contradict():
    """As listed by whoever read the report: Figures 15, 20, 24, 25 and 26."""
    found = {number: (run, round(apart, 1)) for number, run, apart in report.contradicted()}
    assert found == {
        "15": ("flip_p0.1", 0.9),
        "20": ("crop", -0.2),
        "24": ("color_jitter", 2.0),
        "25": ("crop_flip_gray_blur", 1.1),
        "26": ("crop_flip_gray_blur_jitter", 4.8),
    }


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("question", "options", "names"),
    [
        (q2_batchnorm_earlystop, ["--patience", "5", "3"], {"convnet_patience3", "batchnorm_patience3"}),
        (q3_augment_dropout, ["--dropout", "0.1", "0.05"], {"dropout_0.05"}),
    ],
)
def test_options_add_runs(question, options, names, tmp_path, capsys):
    question.main(["--list", *options, f"--checkpoint-dir={tmp_path}", f"--output-dir={tmp_path}"])
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "seed 0" in line}
    assert shown - {run.name for run in question.RUNS} == names


def test_a_further_patience_is_no_training_of_its_own():
    stopped = q2_batchnorm_earlystop.stopped("batchnorm", 3)
    assert stopped.settings.key() == q2_batchnorm_earlystop.BATCHNORM.key()


def selected(*options: str) -> list:
    return select_runs(q3_augment_dropout.RUNS, make_parser("").parse_args(options), torch.device("cpu"))


def test_only_keeps_the_order_asked_for():
    assert [run.name for run in selected("--only", "dropout_0.1", "crop", "crop")] == ["dropout_0.1", "crop"]


@pytest.mark.parametrize("name", ["crop", "crop_3epochs"])
def test_only_takes_the_names_that_list_shows(name):
    (run,) = selected("--epochs", "3", "--only", name)
    assert run.name == "crop_3epochs" and run.settings.epochs == 3


def test_the_command_line_end_to_end(finished):
    folder, out, err = finished
    assert "7,678,474" in out and "SAMPLE" in (folder / "out/sample/README.md").read_text()
    assert err.count("img/s") == 3 and "\r" not in err  # not a terminal: one line per epoch
    run = folder / "out/sample/q1/convnet_3epochs"
    names = {path.name for path in run.iterdir()}
    assert names == {"seed0.json", "seed0.npz", *(f"{name}.png" for name in report.RUN_FIGURES)}
    result = load_result(run / "seed0.json")
    assert result["settings"]["data"] == "cifar10-sample" and len(result["history"]) == 3
    assert result["history"][0]["train_loss"] > result["history"][2]["train_loss"]
    assert result["parameters"]["trainable"] == 7_678_474
    assert {"torch", "torchvision", "device", "threads", "precision"} <= result["environment"].keys()
    assert not (folder / "out/q1").exists()  # never among the full results
    with np.load(run / "seed0.npz", allow_pickle=False) as filters:
        assert filters["before"].shape == (128, 3, 3, 3)
        assert not np.array_equal(filters["before"], filters["last"])
        assert filters["step_losses"].shape == (3, 60)
        assert filters["step_losses"][0].mean() == pytest.approx(result["history"][0]["train_loss"], rel=1e-4)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replot_rebuilds_everything_and_changes_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    (tmp_path / "out/sample/README.md").unlink()
    q1_convnet.main(["--sample", "--replot", "--output-dir", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == before
    assert "convnet_3epochs" in capsys.readouterr().out


def test_a_new_result_leaves_no_older_figures_beside_it(tmp_path):
    """Else an interrupt before they are drawn would leave curves that lack a seed."""
    result = validated([70.0], 1) | {"question": "q1"}
    state = {"filters": {0: torch.zeros(1), 1: torch.ones(1)}, "step_losses": [torch.ones(2)]}
    figure, preview = tmp_path / "losses.png", tmp_path / "preview.png"
    for path in (figure, preview):
        path.write_bytes(b"older")
    assert common.write_result(tmp_path, result, state)
    assert not figure.exists() and preview.exists()
    figure.write_bytes(b"drawn since")
    assert not common.write_result(tmp_path, result, state) and figure.exists()


def test_figures_and_gallery_do_not_wait_for_the_last_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_sample", lambda: small)
    seen, real_train = [], common.train

    def train(run, *args):
        seen.append((run.name, {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("losses.png")}))
        return real_train(run, *args)

    monkeypatch.setattr(common, "train", train)
    options = ["--sample", "--epochs", "1", "--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")]
    q2_batchnorm_earlystop.main([*options, "--only", "batchnorm", "convnet"])
    drawn = "sample/q2/batchnorm_1epochs/losses.png"
    assert seen == [("batchnorm_1epochs", set()), ("convnet_1epochs", {drawn})]
    assert "batchnorm_1epochs" in (tmp_path / "sample/README.md").read_text()


def test_the_page_shows_what_is_missing(tmp_path, capsys):
    q1_convnet.main(["--replot", "--output-dir", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    row = "| convnet | - | - (Figure 1b: 78.1, Figure 5: 82.7) / - | 80.7 / - | - | - |"
    assert f"{row} `python q1_convnet.py --only convnet` |" in text and "0 of 30 so far, trained" in text
    assert "after. | **not run** |" in text and "| 5 | losses, validation and test accuracy, ConvNet" in text


def test_a_row_says_which_seeds_it_has_where_one_is_missing():
    found = [{"seed": seed, "best_epoch": 3, "history": [{}] * 5} for seed in range(3)]
    assert report.best_epochs(found) == "3 of 5, 3 of 5, 3 of 5" and report.best_epochs(found[:1]) == "3 of 5"
    assert report.best_epochs(found[::2]) == "3 of 5, 3 of 5 (seeds 0, 2)"
    assert report.best_epochs(found[1:2]) == "3 of 5 (seed 1)"


def test_the_page_names_all_machines_and_every_row_those_of_its_seconds():
    def result(seconds: list[float], *devices: str) -> dict:
        history = [{"epoch": epoch, "seconds": spent} for epoch, spent in enumerate(seconds, 1)]
        places = [
            {"device": device, "precision": "fp32", "torch": "2.14.1", "from_epoch": epoch}
            for epoch, device in enumerate(devices, 1)
        ]
        return {"history": history, "earlier_environments": places[:-1], "environment": places[-1]}

    alone, moved = result([60.0, 30.0, 30.0], "A"), result([10.0, 5.0, 5.0], "A", "B")  # the second epoch on B
    alone["seed"], moved["seed"] = 0, 2
    assert report.time_taken([alone]) == "02:00 on A"
    assert report.time_taken([alone, moved]) == "02:10 on A (seeds 0, 2); 00:10 on B (seed 2)"
    assert report.time_taken([moved], after=2) == "00:05 on B" and report.time_taken([alone], after=3) == ""
    assert report.trained_on([alone]) == ["A (convolutions in fp32, torch 2.14.1)"]
    q1 = {"trained_on": {"convnet": report.trained_on([alone])}}
    q3 = {"trained_on": {"crop": report.trained_on([moved])}}
    assert report.machines([]) == "" and report.machines([q1]) == "Trained on A (convolutions in fp32, torch 2.14.1)."
    both = "Trained on A (convolutions in fp32, torch 2.14.1) and on B (convolutions in fp32, torch 2.14.1)."
    assert report.machines([q3, q1]) == both


def test_the_committed_page_is_what_the_results_give(tmp_path, capsys):
    committed = ROOT / "results"
    ignored = shutil.ignore_patterns("sample", "*.png", "*.lock", "README.md", "summary.json")
    shutil.copytree(committed, tmp_path / "results", ignore=ignored)
    for question in QUESTIONS:
        question.main(["--replot", "--output-dir", str(tmp_path / "results")])
        summary = f"{question.__name__[:2]}/summary.json"
        assert (tmp_path / "results" / summary).read_text() == (committed / summary).read_text()
    assert (tmp_path / "results/README.md").read_text() == (committed / "README.md").read_text()


def test_the_page_says_where_a_question_rests_on_results_that_have_changed(finished, tmp_path, capsys):
    here = ["--output-dir", str(tmp_path)]
    q2_batchnorm_earlystop.main(["--replot", *here])
    assert "changed since" not in (tmp_path / "README.md").read_text()
    shutil.copytree(finished[0] / "out/sample/q1/convnet_3epochs", tmp_path / "q1/convnet")
    q1_convnet.main(["--replot", *here])
    text = (tmp_path / "README.md").read_text()
    assert "**q1/convnet changed since" in text and "`python q2_batchnorm_earlystop.py --replot`" in text
    q2_batchnorm_earlystop.main(["--replot", *here])
    assert "changed since" not in (tmp_path / "README.md").read_text()


def test_every_link_of_the_committed_page_leads_somewhere():
    page = (ROOT / "results/README.md").read_text()
    links = set(re.findall(r"\]\(([^)#]+)\)", page))
    assert not [link for link in links if not (ROOT / "results" / unquote(link)).exists()]


@pytest.mark.parametrize("content", ["<<<<<<< HEAD", "[]", '{"verdicts": [{"claim": 3, "verdict": "holds"}]}'])
def test_a_damaged_summary_of_another_question_is_one_line(tmp_path, capsys, content):
    (tmp_path / "q2").mkdir()
    (tmp_path / "q2/summary.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        q1_convnet.main(["--replot", "--output-dir", str(tmp_path)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"{tmp_path / 'q2/summary.json'} is damaged" in err and err.count("\n") == 1


def test_commands_are_whole():
    def typed(run: str, declared: bool = True, seeds: Sequence[int] = (0,), **settings) -> str:
        found = [validated([70.0], 1, **settings) | {"seed": seed} for seed in seeds]
        return report.command("q2", run, found, declared).removeprefix("python q2_batchnorm_earlystop.py --only ")

    assert typed("a") == "a" and typed("a", seeds=(0, 2)) == typed("a", seeds=(2,)) == "a --seeds 3"
    assert typed("a_patience3", declared=False, patience=3) == "a_patience3 --patience 3"
    assert typed("a_patience5", patience=5) == "a_patience5"
    assert typed("dropout_0.05", declared=False, dropout=0.05) == "dropout_0.05 --dropout 0.05"
    assert typed("a_5epochs_fp32", epochs=5) == "a_5epochs_fp32 --precision fp32 --epochs 5"
    assert typed("a", weights="my w (v2).pth sha256:00") == "a --weights 'my w (v2).pth'"
    assert typed("a", data="cifar10-sample") == "a --sample"
    assert report.command("q2", "a", sample=True).endswith("--only a --sample")


def test_links_hold_blanks_and_brackets():
    assert report.link("a", "q4/my run (2)/x.png") == "[a](q4/my%20run%20%282%29/x.png)"


def test_figures_and_tables_cope_with_a_subset(finished, tmp_path, capsys):
    """Real results of the sample under some of the questions' names."""
    text = (finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text()
    for question, names in (
        (QUESTIONS[0], ["convnet"]),
        (QUESTIONS[1], ["batchnorm", "convnet_full", "convnet_patience5"]),
        (QUESTIONS[2], ["flip_p0.5", "dropout_0.1"]),
        (QUESTIONS[3], ["scratch", "frozen_train_mode_other_0123abcd"]),
        (QUESTIONS[4], ["fast", "fast_adam"]),
    ):
        for name in names:
            folder = tmp_path / "sample" / question.__name__[:2] / name
            shutil.copytree(finished[0] / "out/sample/q1/convnet_3epochs", folder)
            dropout = 0.1 if "dropout" in name else 0.0
            for seed in (0, 1):
                changed = text.replace('"question": "q1"', f'"question": "{question.__name__[:2]}"')
                changed = changed.replace('"dropout": 0.0', f'"dropout": {dropout}').replace("convnet_3epochs", name)
                (folder / f"seed{seed}.json").write_text(changed.replace('"seed": 0', f'"seed": {seed}'))
            shutil.copy(folder / "seed0.npz", folder / "seed1.npz")
        question.main(["--sample", "--replot", "--output-dir", str(tmp_path)])
    figures = {path.name for path in tmp_path.glob("sample/q?/*.png")}
    assert figures >= {
        "batchnorm.png",
        "early_stopping.png",
        "augmentations.png",
        "flip_sweep.png",
        "dropout_sweep.png",
        "dropout_bars.png",
        "transfer.png",
        "steps.png",
        "time.png",
    }
    gallery = (tmp_path / "sample/README.md").read_text()
    assert "convnet − frozen_train_mode_other_0123abcd, test: +0.00 points" in gallery  # question 1's network, in 4
    assert "`python q5_modern_recipe.py --only fast_no_smoothing --sample`" in gallery
    assert "| Muon and SGD (the exercise's Adam) |" in gallery and "| label smoothing | - | - |" in gallery
    assert " ± 0.0" in gallery and "| crop | - | - / - | - / - | - | - | `python q3" in gallery  # no report of a sample


def test_minutes_of_a_training_on_two_machines_are_not_drawn(finished):
    result = json.loads((finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text())
    moved = result | {"earlier_environments": [result["environment"] | {"device": "another machine"}]}

    def drawn(strong: dict) -> str:
        figure = q5_modern_recipe.figures(Results({"fast": [result], "strong": [strong]}))["time.png"]
        return " ".join(figure.axes[0].get_legend_handles_labels()[1])

    assert "strong" in drawn(result) and "fast" in drawn(moved) and "strong" not in drawn(moved)


def test_the_sweep_marks_dropout_after_the_pooling(finished):
    """With the accuracy and the gap of its own runs, in sight where no rate as high has been run before the pooling."""
    text = (finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text()
    before, after = json.loads(text.replace('"dropout": 0.0', '"dropout": 0.1')), json.loads(text)
    after["test"]["best"]["all_images"]["accuracy"], after["history"][-1]["train_loss"] = 12.5, 9.0
    results = {"dropout_0.1": [before], "dropout_after_pool_0.6": [after]}
    panels = q3_augment_dropout.figures(results)["dropout_sweep.png"].axes
    for axes, expected in zip(panels, (12.5, after["history"][-1]["validation_loss"] - 9.0)):
        handles, labels = axes.get_legend_handles_labels()
        line = handles[labels.index("ours, after the pooling")][0]
        np.testing.assert_allclose(line.get_xydata(), [[0.6, expected]])
        assert axes.get_xlim()[1] > 0.6
    results["dropout_after_pool_0.6"].append(after | {"seed": 1})
    labels = q3_augment_dropout.figures(results)["dropout_sweep.png"].axes[0].get_legend_handles_labels()[1]
    assert "ours, best weights, all images (several seeds: ± standard deviation; one: 95 %)" in labels


def test_the_command_of_figure_30_makes_the_seeds_of_every_rate(finished):
    result = json.loads((finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text())
    results = Results({"dropout_0.1": [result], "dropout_0.6": [result | {"seed": seed} for seed in (0, 1)]})
    (row,) = (row for row in report.figure_rows("q3", results) if row[0] == "30")
    rest = "dropout_0.2 dropout_0.3 dropout_0.4 dropout_0.5 dropout_0.7 dropout_0.8 dropout_0.9"
    script = "python q3_augment_dropout.py --only"
    assert row[-1] == f"`{script} dropout_0.1 {rest} --sample && {script} dropout_0.6 --sample --seeds 2`"


def test_preview_draws_every_augmentation_asked_for(tmp_path, capsys):
    options = ["--sample", "--preview", "--output-dir", str(tmp_path)]
    q3_augment_dropout.main([*options, "--only", "crop_flip", "dropout_0.1", "grayscale"])
    paths = [tmp_path / "sample/q3" / name / "preview.png" for name in ("crop_flip", "grayscale")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    images = common.load_sample()["train"].images[:2]
    drawn = q3_augment_dropout.preview((Grayscale(p=0.5),), images, "")
    shown = np.stack([axes.images[0].get_array() for axes in drawn.axes])
    shown = shown.reshape(2, 9, 32, 32, 3)  # every row the original and eight draws
    np.testing.assert_allclose(shown[:, 0], images.permute(0, 2, 3, 1) / 255)
    grey = (np.ptp(shown, axis=-1) == 0).all((2, 3))
    assert not grey[:, 0].any() and grey[:, 1:].any() and not grey[:, 1:].all()
    with pytest.raises(SystemExit):
        q3_augment_dropout.main([*options, "--only", "dropout_0.1"])
    assert "none of these runs has an augmentation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        q1_convnet.main(options)
    assert "unrecognized arguments: --preview" in capsys.readouterr().err


def test_list_shows_every_runs_state(finished, tmp_path, capsys):
    folder = finished[0]
    where = ["--sample", "--list", "--checkpoint-dir", str(folder / "checkpoints"), "--output-dir"]
    q1_convnet.main([*where, str(folder / "out"), "--epochs", "3"])
    assert "done" in capsys.readouterr().out
    q1_convnet.main([*where, str(folder / "out"), "--epochs", "3", "--precision", "fp32"])
    assert "done" not in capsys.readouterr().out  # asked for by name, it is a run of its own
    q1_convnet.main([*where, str(tmp_path), "--epochs", "5", "--seeds", "2"])
    first, second, both = capsys.readouterr().out.splitlines()
    assert "epoch 3 " in first and "left" in first and "not started" in second
    seconds = [
        sum(60**i * int(t) for i, t in enumerate(line.split()[-2].split(":")[::-1])) for line in (first, second, both)
    ]
    assert both.startswith("in all") and abs(sum(seconds[:2]) - seconds[2]) <= 2  # rounded
    other = ["--only", "convnet", "--epochs", "5"]  # the same trajectory as question 1's
    q2_batchnorm_earlystop.main([*where, str(tmp_path), *other])
    assert "epoch 3 " in capsys.readouterr().out
    q2_batchnorm_earlystop.main([*where, str(tmp_path), "--only", "batchnorm"])
    assert "at most" in capsys.readouterr().out  # not started, but the other network's epochs tell its time
