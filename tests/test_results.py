import math
import shutil

import numpy as np
import pytest
import torch

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
from common import Claim, Grayscale, correct_images, judge, load_result, paired_difference, score, wilson_interval
from q1_convnet import filters_become_smooth, smoothness
from q2_batchnorm_earlystop import better_on_validation, patience_pays, stopping_table
from q3_augment_dropout import about_equal, narrowest_gap, spread


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
    assert scored["all_10000"]["accuracy"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert scored["first_1000"]["accuracy"] == pytest.approx(100 * right[:1000].mean(), abs=1e-3)
    assert scored["all_10000"]["ci95"] == pytest.approx(wilson_interval(int(right.sum()), 10_000), abs=0.01)
    np.testing.assert_array_equal(correct_images(scored), right)
    confusion = np.array(scored["confusion"])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(labels, minlength=10))
    assert confusion[3, 5] == int(((labels == 3) & (predictions == 5)).sum())
    assert scored["per_class"]["dog"] == pytest.approx(100 * confusion[5, 5] / confusion[5].sum(), abs=0.01)


def as_results(correct: np.ndarray) -> list[dict]:
    """Results of a run with the given correctness, bool [seeds, images]."""
    labels = torch.zeros(correct.shape[1], dtype=torch.long)
    return [
        {
            "seed": s,
            "settings": {"precision": "fp32"},
            "test": {"best": score(torch.from_numpy(np.where(c, 0, 1)), labels, 1)},
        }
        for s, c in enumerate(correct)
    ]


def draw(accuracy: float, seeds: int, seed: int, images: int = 10_000) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < accuracy


def test_paired_interval_with_one_seed_is_the_closed_form():
    a, b = draw(0.82, 1, 0), draw(0.80, 1, 1)
    found = paired_difference(as_results(a), as_results(b))
    difference = a[0].astype(int) - b[0]
    error = 1.96 * difference.std() / math.sqrt(difference.size)
    assert found["difference"] == pytest.approx(100 * difference.mean(), abs=0.01)
    assert found["ci95"] == pytest.approx(
        [100 * (difference.mean() - error), 100 * (difference.mean() + error)], abs=0.06
    )


def test_paired_interval_with_seeds_is_brute_force_resampling():
    a, b = draw(0.82, 3, 2, images=400), draw(0.80, 3, 3, images=400)
    a[2] |= draw(0.3, 1, 4, images=400)[0]  # seeds that differ
    rng, means = np.random.default_rng(9), []
    for _ in range(6000):
        drawn = np.ix_(rng.choice(3, 3), rng.choice(400, 400))
        means.append(a[drawn].mean() - b[drawn].mean())
    found = paired_difference(as_results(a), as_results(b))
    assert found["seeds"] == 3
    assert found["ci95"] == pytest.approx(100 * np.percentile(means, [2.5, 97.5]), abs=0.5)


def test_pairing_makes_the_interval_narrower():
    a = draw(0.80, 1, 5)
    b = a.copy()
    b[0, np.flatnonzero(a[0])[:100]] = False  # worse on 100 images, equal on all others
    low, high = paired_difference(as_results(a), as_results(b))["ci95"]
    assert 0.7 < low < 1.0 < high < 1.3


def test_best_and_last_weights_of_one_run_are_compared_on_the_same_images():
    run = as_results(draw(0.8, 1, 6))[0]
    last = correct_images(run["test"]["best"])
    last[np.flatnonzero(last)[:100]] = False  # worse on 100 images of 10,000
    run["test"]["last"] = as_results(last[None])[0]["test"]["best"]
    found = paired_difference([run], [run], weights=("best", "last"))
    assert found["difference"] == 1.0 and found["verdict"] == "holds"
    assert paired_difference([run], [run], weights=("last", "best"))["difference"] == -1.0


@pytest.mark.parametrize(
    ("better", "worse", "verdict"), [(0.85, 0.80, "holds"), (0.80, 0.85, "does not hold"), (0.80, 0.80, "within noise")]
)
def test_verdicts(tmp_path, better, worse, verdict):
    results = {"a": as_results(draw(better, 1, 6)), "b": as_results(draw(worse, 1, 7))}
    found = judge(Claim(1, "a beats b", (("a", "b"),)), results, tmp_path)
    assert found["verdict"] == verdict and "the noise of training is not included" in found["evidence"]


def test_a_comparison_of_two_precisions_says_so(tmp_path):
    one, other = as_results(draw(0.8, 1, 6)), as_results(draw(0.8, 1, 7))
    assert "trained in" not in judge(Claim(1, "", (("a", "b"),)), {"a": one, "b": other}, tmp_path)["evidence"]
    other[0]["settings"]["precision"] = "bf16"
    assert (
        "trained in bf16 and fp32" in judge(Claim(1, "", (("a", "b"),)), {"a": one, "b": other}, tmp_path)["evidence"]
    )


def test_verdicts_of_several_comparisons(tmp_path):
    results = {"a": as_results(draw(0.9, 1, 6)), "b": as_results(draw(0.8, 1, 7)), "c": as_results(draw(0.7, 1, 8))}

    def verdict(*comparisons):
        return judge(Claim(1, "text", comparisons), results, tmp_path)["verdict"]

    assert verdict(("a", "b"), ("b", "c")) == "holds"
    assert verdict(("a", "b"), ("c", "b")) == "does not hold"
    assert verdict(("a", "b"), ("b", "missing")) == "not run"
    assert judge(Claim(1, "text", (("a", "missing"),)), {}, tmp_path)["verdict"] == "not run"


def test_overfitting_criterion():
    def run(train, validation):
        history = [
            {"epoch": i, "train_loss": t, "validation_loss": v} for i, (t, v) in enumerate(zip(train, validation), 1)
        ]
        return [{"seed": 0, "history": history}]

    assert common.overfits([]) is None
    once = judge(common.overfitting_claim("a"), {"a": run([2, 1], [1, 2])}, None)
    assert once["evidence"].endswith("One seed: the noise of training is not included")
    assert common.overfits(run([2.0, 1.0, 0.5, 0.2], [1.5, 1.0, 1.1, 1.4]))["verdict"] == "holds"
    assert common.overfits(run([2.0, 1.0, 0.5, 0.2], [1.5, 1.0, 0.9, 0.8]))["verdict"] == "does not hold"
    assert common.overfits(run([2.0, 1.0, 1.1, 1.2], [1.5, 1.0, 1.1, 1.4]))["verdict"] == "does not hold"  # diverges


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

    def verdict(before, after):
        np.savez_compressed(tmp_path / "seed0.npz", before=before, best=after, last=after)
        return filters_become_smooth([{"seed": 0}], tmp_path)["verdict"]

    assert verdict(noise, noise + ramp) == "holds"
    assert verdict(noise, noise) == "within noise"
    assert verdict(noise + ramp, noise) == "does not hold"
    assert filters_become_smooth([], tmp_path) is None


def test_criteria_of_question_3():
    results = {"a": as_results(draw(0.80, 1, 6)), "b": as_results(draw(0.80, 1, 7)), "c": as_results(draw(0.7, 1, 8))}
    assert about_equal("a", "b", results, margin=2.0)["verdict"] == "holds"
    assert about_equal("a", "b", results, margin=0.5)["verdict"] == "within noise"
    assert about_equal("a", "c", results, margin=2.0)["verdict"] == "does not hold"
    assert about_equal("a", "missing", results, margin=2.0) is None
    gaps = {"zero": 0.1, "close": 0.14, "wide": 0.9, "negative": -0.5}

    def with_gap(gap: float, seed: int = 0, data: str = "cifar10") -> dict:
        history = [{"train_loss": 1.0, "validation_loss": 1.0 + gap}]
        return {"seed": seed, "history": history, "settings": {"data": data}}

    histories = {n: [with_gap(gap)] for n, gap in gaps.items()}
    assert narrowest_gap("zero", ["wide", "negative"], histories)["verdict"] == "holds"
    assert narrowest_gap("negative", ["wide", "zero"], histories)["verdict"] == "does not hold"
    assert narrowest_gap("zero", ["close", "wide"], histories)["verdict"] == "within noise"
    assert narrowest_gap("close", ["zero", "wide"], histories)["verdict"] == "within noise"
    assert narrowest_gap("zero", ["missing"], histories) is None
    histories["wide"].append(with_gap(0.0, seed=1))
    assert narrowest_gap("zero", ["wide"], histories)["seeds"] == 1  # the other seed has nothing to compare with
    assert narrowest_gap("zero", ["wide"], histories)["verdict"] == "holds"
    sample = {"zero": [with_gap(0.1, data="cifar10-sample")], "wide": [with_gap(0.45, data="cifar10-sample")]}
    assert narrowest_gap("zero", ["wide"], sample)["verdict"] == "within noise"  # 200 images: 0.17 times sqrt(5)
    seeds = {
        "zero": [with_gap(gap, seed) for seed, gap in enumerate([0.0, 0.5])],
        "wide": [with_gap(0.6, seed) for seed in range(2)],
    }
    assert narrowest_gap("zero", ["wide"], seeds)["verdict"] == "within noise"  # leads of 0.6 and 0.1


def test_the_two_best_augmentations_must_beat_the_third_beyond_noise(tmp_path):
    accuracy = dict.fromkeys(q3_augment_dropout.AUGMENTATIONS, 0.7) | {"crop_flip": 0.85, "crop": 0.8}

    def found(mixture: float) -> dict:
        values = accuracy | {"crop_flip_gray_blur_jitter": mixture}
        results = {n: as_results(draw(value, 1, seed)) for seed, (n, value) in enumerate(values.items())}
        return q3_augment_dropout.two_best(results, tmp_path)

    assert found(0.83)["verdict"] == "holds" and "crop_flip_gray_blur_jitter − crop:" in found(0.83)["evidence"]
    assert found(0.8)["verdict"] == "within noise"
    assert found(0.75)["verdict"] == "does not hold"
    assert "crop_flip − crop:" in found(0.9)["evidence"]  # the lesser of the two decides
    del accuracy["grayscale"]
    assert found(0.83) is None


def validated(accuracies: list[float], best: int, right: int = 322, **settings) -> dict:
    """A result with this validation accuracy over epochs, 10 seconds each, and `right` of 400 test images."""
    history = [{"validation_accuracy": accuracy, "seconds": 10.0} for accuracy in accuracies]
    labels = torch.zeros(400, dtype=torch.long)
    test = {
        name: score((torch.arange(400) >= count).long(), labels, 1) for name, count in (("best", right), ("last", 317))
    }
    settings = {"data": "cifar10", "patience": None, "precision": "fp32"} | settings
    return {"seed": 0, "history": history, "best_epoch": best, "test": test, "settings": settings}


def test_a_validation_accuracy_is_better_beyond_the_noise_of_1000_images():
    results = {name: [validated([value], 1)] for name, value in (("a", 86.0), ("b", 82.0), ("c", 82.1))}
    assert better_on_validation("a", "b", results)["verdict"] == "holds"
    assert better_on_validation("b", "a", results)["verdict"] == "does not hold"
    assert better_on_validation("c", "b", results)["verdict"] == "within noise"
    assert better_on_validation("a", "missing", results) is None
    close = {"a": [validated([84.5], 1)], "b": [validated([82.0], 1)]}  # sqrt(.845 * .155 + .82 * .18) * 1.96 = 3.27
    assert "noise ±3.3" in better_on_validation("a", "b", close)["evidence"]
    sample = {"a": [validated([60.0], 1, data="cifar10-sample")], "b": [validated([51.0], 1, data="cifar10-sample")]}
    assert "noise ±9.7" in better_on_validation("a", "b", sample)["evidence"]  # 200 images
    four = {name: [found[0] | {"seed": seed} for seed in range(4)] for name, found in close.items()}
    assert "noise ±3.3" in better_on_validation("a", "b", four)["evidence"]  # the same 1,000 images four times
    apart = {
        name: [validated([value], 1) | {"seed": seed} for seed, value in enumerate(values)]
        for name, values in (("a", [96.0, 84.0]), ("b", [84.0, 84.0]))
    }  # +12 and 0: 1.96 * 8.49 / sqrt(2) = 11.8, and 2.9 of the images
    assert "noise ±12.1" in better_on_validation("a", "b", apart)["evidence"]
    assert better_on_validation("a", "b", apart)["verdict"] == "within noise"


def with_losses(result: dict, train: list[float], validation: list[float]) -> dict:
    for entry, train_loss, validation_loss in zip(result["history"], train, validation):
        entry |= {"train_loss": train_loss, "validation_loss": validation_loss}
    return result | {"question": "q3"}


def test_the_table_of_gaps_compares_every_run_with_the_baseline():
    results = {
        "baseline": [with_losses(validated([70.0, 80.0], 2), [1.5, 0.1], [1.4, 0.9])],
        "crop_flip": [with_losses(validated([70.0, 80.0], 2, right=342), [2.5, 0.5], [1.5, 0.6])],
    }
    rows = {row[0]: row[1:] for row in q3_augment_dropout.gap_table(results)}
    assert rows["baseline"] == ["0.100", "0.900", "+0.800", "-", "-"]
    assert rows["crop_flip"][:4] == ["0.500", "0.600", "+0.100", "-"]
    assert rows["crop_flip"][4].startswith("+5.00 [+")
    assert rows["dropout_0.6"] == ["-", "-", "-", "-", "-"]
    for entry, accuracy, loss in zip(results["crop_flip"][0]["history"], (79.0, 78.0), (0.7, 0.8)):
        entry |= {"augmented_validation_accuracy": accuracy, "augmented_validation_loss": loss}
    rows = {row[0]: row[1:] for row in q3_augment_dropout.gap_table(results)}
    assert rows["crop_flip"][3] == "79.0, 0.800"
    fewer = {"crop_flip_1epochs": [with_losses(validated([70.0], 1), [2.5], [1.5])]}
    other = {"crop_flip_bf16": [with_losses(validated([70.0, 80.0], 2, precision="bf16"), [2.5, 0.5], [1.5, 0.6])]}
    rows = {row[0]: row[1:] for row in q3_augment_dropout.gap_table(results | fewer | other)}
    assert rows["crop_flip_1epochs"] == ["2.500", "1.500", "-1.000", "-", "-"]  # not of the baseline's training length
    assert rows["crop_flip_bf16"][4] == "-"
    del results["baseline"]
    rows = {row[0]: row[1:] for row in q3_augment_dropout.gap_table(results)}
    assert rows["baseline"][4] == rows["crop_flip"][4] == "-"  # nothing to compare with


def test_small_multiples_show_all_of_every_curve():
    results = {
        name: [with_losses(validated([70.0, 80.0], 2), [highest, 0.1], [1.4, 0.9])]
        for name, highest in (("baseline", 1.5), ("flip_p0.1", 2.0), ("crop_flip", 2.5))
    }
    for axes in q3_augment_dropout.figures(results)["augmentations.png"].axes[:3]:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.5


def test_two_patiences_restore_the_same_weights_only_if_trained_alike_until_then():
    five, seven = validated([70.0, 80.0, 79.0], 2, patience=5), validated([70.0, 80.0, 79.0, 78.0], 2, patience=7)
    results = {"batchnorm_patience5": [five], "batchnorm_patience7": [seven]}
    assert "both restore the same weights" in patience_pays(results)["evidence"]
    other = validated([71.0, 80.0, 79.0, 78.0], 2, patience=7)  # the same epoch of another training
    results["batchnorm_patience7"] = [other]
    assert "restore" not in patience_pays(results)["evidence"]


def test_the_table_of_stopping_rules():
    full = [70.0, 80.0, 79.0, 78.0, 81.0]
    results = {
        "batchnorm_patience2": [validated(full[:4], 2, patience=2)],
        "convnet_full": [validated(full, 5, right=342)],
        "convnet_patience10": [validated(full, 5, right=342, patience=10)],
        "convnet_patience2": [validated(full[:4], 2, patience=2)],
        "convnet_full_30epochs": [validated(full, 5)],  # no rule of the report's 50 epochs
    }
    _, stopped, never, unstopped, alone = stopping_table(results)  # in order of network and patience
    assert stopped[:5] == ["convnet, patience 2", "4", "2", "80.0 / 80.50", "78.0 / 79.25"]
    assert stopped[5].startswith("+1.25 [+0.") and stopped[6] == "1, 00:10" and stopped[7].startswith("+5.00 [+")
    assert never[:3] == ["convnet, patience 10", "5 (did not stop)", "5"]
    assert unstopped[:3] == ["convnet, no early stopping", "5", "5"]
    assert unstopped[-2:] == ["0, 00:00", "+0.00 [+0.00, +0.00]"]
    assert alone[-2:] == ["-", "-"]  # nothing to compare with
    results["convnet_full"] = [validated([71.0, *full[1:]], 5)]  # another training
    assert stopping_table(results)[1][-2:] == ["-", "-"]


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
    figure = q2_batchnorm_earlystop.figures(results)["early_stopping.png"]
    for axes in figure.axes:
        assert {t.get_text(): t.get_position()[0] for t in axes.texts} == {"1": 3, "2": 4, "3": 5}


def test_seeds_that_stopped_after_different_epochs_are_drawn_whole():
    _, axes = common.new_axes("", "accuracy (%)")
    common.plot_curve(axes, [validated([70.0, 80.0], 2)] * 2, "validation_accuracy", "a")
    assert len(axes.lines) == 1  # the mean
    stopped = [validated([70.0, 80.0], 2), validated([70.0, 80.0, 79.0], 2)]
    common.plot_curve(axes, stopped, "validation_accuracy", "b")
    assert [len(line.get_xdata()) for line in axes.lines[1:]] == [2, 3]
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_several_seeds_are_mean_and_standard_deviation():
    assert common.mean_and_deviation([80.0]) == "80.0"
    assert common.mean_and_deviation([80.0, 82.0]) == "81.0 ± 1.4"
    several = as_results(np.repeat([[True] * 80 + [False] * 20, [True] * 82 + [False] * 18], 100, axis=1))
    assert common.mean_test_accuracy(several) == pytest.approx(81.0)
    assert spread(several) == pytest.approx((81 - math.sqrt(2), 81 + math.sqrt(2)))
    assert spread(several[:1]) == pytest.approx(wilson_interval(8000, 10_000), abs=0.01)


@pytest.mark.parametrize(
    ("question", "options", "names"),
    [
        (q2_batchnorm_earlystop, ["--patience", "5", "3"], {"convnet_patience3", "batchnorm_patience3"}),
        (q3_augment_dropout, ["--dropout", "0.1", "0.05"], {"dropout_0.05"}),
    ],
)
def test_options_add_runs(question, options, names):
    args = common.make_parser(question.QUESTION).parse_args(options)
    runs = {run.name: run for run in common.select_runs(question.QUESTION, args, torch.device("cpu"))}
    assert runs.keys() - {run.name for run in question.RUNS} == names
    if "--patience" in options:  # no training of their own
        assert runs["batchnorm_patience3"].settings.key() == runs["batchnorm_full"].settings.key()


def test_only_keeps_the_order_asked_for():
    args = common.make_parser(q3_augment_dropout.QUESTION).parse_args(["--only", "dropout_0.1", "crop", "crop"])
    runs = common.select_runs(q3_augment_dropout.QUESTION, args, torch.device("cpu"))
    assert [run.name for run in runs] == ["dropout_0.1", "crop"]


@pytest.mark.parametrize("name", ["crop", "crop_3epochs"])
def test_only_takes_the_names_that_list_shows(name):
    args = common.make_parser(q3_augment_dropout.QUESTION).parse_args(["--epochs", "3", "--only", name])
    (run,) = common.select_runs(q3_augment_dropout.QUESTION, args, torch.device("cpu"))
    assert run.name == "crop_3epochs" and run.settings.epochs == 3


def test_the_command_line_end_to_end(finished):
    folder, out, err = finished
    assert "7,678,474" in out and "SAMPLE" in (folder / "out/sample/README.md").read_text()
    assert err.count("img/s") == 3 and "\r" not in err  # not a terminal: one line per epoch
    run = folder / "out/sample/q1/convnet_3epochs"
    names = {path.name for path in run.iterdir()}
    figures = {f"{name}.png" for name in (*common.RUN_FIGURES, "filters_before", "filters_after")}
    assert names == {"seed0.json", "seed0.npz", "network.txt", *figures}
    result = load_result(run / "seed0.json")
    assert result["settings"]["data"] == "cifar10-sample" and len(result["history"]) == 3
    assert result["history"][0]["train_loss"] > result["history"][2]["train_loss"]
    assert result["parameters"]["trainable"] == 7_678_474 and result["reported"] == {}  # not the report's epochs
    assert {"torch", "torchvision", "device", "threads", "precision"} <= result["environment"].keys()
    assert not (folder / "out/q1").exists()  # never among the full results
    with np.load(run / "seed0.npz", allow_pickle=False) as filters:
        assert filters["before"].shape == (128, 3, 3, 3)
        assert not np.array_equal(filters["before"], filters["last"])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replot_rebuilds_everything_and_changes_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    (tmp_path / "out/sample/README.md").unlink()
    common.run_question(q1_convnet.QUESTION, ["--sample", "--replot", "--output-dir", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == before
    assert "convnet_3epochs" in capsys.readouterr().out


def test_figures_and_gallery_do_not_wait_for_the_last_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_sample", lambda: small)
    seen, real_train = [], common.train

    def train(run, *args):
        seen.append((run.name, {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("losses.png")}))
        return real_train(run, *args)

    monkeypatch.setattr(common, "train", train)
    options = ["--sample", "--epochs", "1", "--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")]
    common.run_question(q2_batchnorm_earlystop.QUESTION, [*options, "--only", "batchnorm", "convnet"])
    drawn = "sample/q2/batchnorm_1epochs/losses.png"
    assert seen == [("batchnorm_1epochs", set()), ("convnet_1epochs", {drawn})]
    assert "batchnorm_1epochs" in (tmp_path / "sample/README.md").read_text()


def test_the_gallery_shows_what_is_missing(tmp_path, capsys):
    common.run_question(q1_convnet.QUESTION, ["--replot", "--output-dir", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| convnet | - | - | - / - | 80.7 / - | - | - | - |" in text and "**not run**" in text


QUESTIONS = [q.QUESTION for q in (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer)]


def test_the_committed_gallery_is_what_the_results_give(tmp_path, capsys):
    committed = common.ROOT / "results"
    ignored = shutil.ignore_patterns("sample", "*.png", "*.lock", "README.md", "claims.json")
    shutil.copytree(committed, tmp_path / "results", ignore=ignored)
    for question in QUESTIONS:
        common.run_question(question, ["--replot", "--output-dir", str(tmp_path / "results")])
        claims = f"{question.name}/claims.json"
        assert (tmp_path / "results" / claims).read_text() == (committed / claims).read_text()
    assert (tmp_path / "results/README.md").read_text() == (committed / "README.md").read_text()


def test_figures_and_tables_cope_with_a_subset(finished, tmp_path, capsys):
    """Real results of the sample under some of the questions' names."""
    text = (finished[0] / "out/sample/q1/convnet_3epochs/seed0.json").read_text()
    for question, names in (
        (QUESTIONS[0], ["convnet"]),
        (QUESTIONS[1], ["batchnorm", "convnet_full", "convnet_patience5"]),
        (QUESTIONS[2], ["flip_p0.5", "dropout_0.1"]),
        (QUESTIONS[3], ["scratch", "frozen_other_0123abcd"]),
    ):
        for name in names:
            folder = tmp_path / "sample" / question.name / name
            shutil.copytree(finished[0] / "out/sample/q1/convnet_3epochs", folder)
            dropout = 0.1 if "dropout" in name else 0.0
            for seed in (0, 1):
                changed = text.replace('"question": "q1"', f'"question": "{question.name}"')
                changed = changed.replace('"dropout": 0.0', f'"dropout": {dropout}')
                (folder / f"seed{seed}.json").write_text(changed.replace('"seed": 0', f'"seed": {seed}'))
        common.run_question(question, ["--sample", "--replot", "--output-dir", str(tmp_path)])
    figures = {path.name for path in tmp_path.glob("sample/q?/*.png")}
    assert figures >= {
        "batchnorm.png",
        "early_stopping.png",
        "augmentations.png",
        "flip_sweep.png",
        "dropout_sweep.png",
        "transfer.png",
    }
    gallery = (tmp_path / "sample/README.md").read_text()
    assert "convnet − frozen_other_0123abcd: +0.00 points" in gallery  # question 1's network, in question 4
    assert " ± 0.0" in gallery and "| crop | - | - | 82.7 / - | 82.9 / - | - | - | - |" in gallery


def test_preview_draws_every_augmentation_asked_for(tmp_path, capsys):
    options = ["--sample", "--preview", "--output-dir", str(tmp_path)]
    common.run_question(q3_augment_dropout.QUESTION, [*options, "--only", "crop_flip", "dropout_0.1", "grayscale"])
    paths = [tmp_path / "sample/q3" / name / "preview.png" for name in ("crop_flip", "grayscale")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    images = common.load_sample()["train"].images[:2]
    shown = np.stack([axes.images[0].get_array() for axes in common.preview((Grayscale(p=0.5),), images, "").axes])
    shown = shown.reshape(2, 9, 32, 32, 3)  # every row the original and eight draws
    np.testing.assert_allclose(shown[:, 0], images.permute(0, 2, 3, 1) / 255)
    grey = (np.ptp(shown, axis=-1) == 0).all((2, 3))
    assert not grey[:, 0].any() and grey[:, 1:].any() and not grey[:, 1:].all()
    with pytest.raises(SystemExit):
        common.run_question(q3_augment_dropout.QUESTION, [*options, "--only", "dropout_0.1"])
    assert "none of these runs has an augmentation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.run_question(q1_convnet.QUESTION, options)
    assert "unrecognized arguments: --preview" in capsys.readouterr().err


def test_list_shows_every_runs_state(finished, tmp_path, capsys):
    folder = finished[0]
    where = ["--sample", "--list", "--checkpoint-dir", str(folder / "checkpoints"), "--output-dir"]
    common.run_question(q1_convnet.QUESTION, [*where, str(folder / "out"), "--epochs", "3"])
    assert "done" in capsys.readouterr().out
    common.run_question(q1_convnet.QUESTION, [*where, str(folder / "out"), "--epochs", "3", "--precision", "fp32"])
    assert "done" not in capsys.readouterr().out  # asked for by name, it is a run of its own
    common.run_question(q1_convnet.QUESTION, [*where, str(tmp_path), "--epochs", "5", "--seeds", "2"])
    first, second, both = capsys.readouterr().out.splitlines()
    assert "epoch 3 " in first and "left" in first and "not started" in second
    seconds = [
        sum(60**i * int(t) for i, t in enumerate(line.split()[-2].split(":")[::-1])) for line in (first, second, both)
    ]
    assert both.startswith("in all") and abs(sum(seconds[:2]) - seconds[2]) <= 2  # rounded
    other = ["--only", "convnet", "--epochs", "5"]  # the same trajectory as question 1's
    common.run_question(q2_batchnorm_earlystop.QUESTION, [*where, str(tmp_path), *other])
    assert "epoch 3 " in capsys.readouterr().out
    common.run_question(q2_batchnorm_earlystop.QUESTION, [*where, str(tmp_path), "--only", "batchnorm"])
    assert "at most" in capsys.readouterr().out  # not started, but the other network's epochs tell its time
