"""Question 3: twelve augmentations and six dropout rates.

    python q3_augment_dropout.py                             # 19 runs of 30 epochs
    python q3_augment_dropout.py --only crop_flip            # one of them
    python q3_augment_dropout.py --sample                    # the bundled images
    python q3_augment_dropout.py --preview                   # look at what every augmentation does, train nothing
    python q3_augment_dropout.py --dropout 0.9 --only dropout_0.9   # a further dropout rate, alone

The report: crop + flip (84.6 %) and the full mixture (83.0 %) are the best augmentations; dropout helps a little at
0.1 (83.5 %) and ruins the network at 0.6 (51.6 %). The baseline is question 1's network at 30 epochs: the same
trajectory, continued.

Here, one seed: on all 10,000 test images crop + flip lifts accuracy from the baseline's 78.7 to 82.9 %, flips alone
(p = 0.5) to 81.7 % (p = 0.1: 80.3 %), dropout 0.1 to 82.8 %. On the first 1,000 they reach 83.6, 81.9 and 82.8 %, on
validation 84.8, 84.1 and 85.2 %. After 30 epochs validation loss and training loss differ by 0.03, 0.39 and 0.26,
instead of 0.79.
"""

import argparse
import math
import re
import statistics
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import (
    VALIDATION_IMAGES,
    Claim,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Question,
    RandomCrop,
    Run,
    Settings,
    difference_cell,
    mean_and_deviation,
    mean_test_accuracy,
    new_axes,
    new_panels,
    paired_difference,
    plot_curve,
    points,
    run_question,
    style_axes,
    title,
    with_seed_noise,
)

CROP, FLIP, GRAY = RandomCrop(padding=4), HorizontalFlip(p=0.5), Grayscale(p=0.1)
BLUR = GaussianBlur(kernel_size=13, sigma=(0.1, 2.0), p=0.2)
JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.4)

AUGMENTATIONS = {  # run: augmentation, the report's validation and test accuracy (percent)
    "flip_p0.1": ((HorizontalFlip(p=0.1),), 82.5, 81.7),
    "flip_p0.3": ((HorizontalFlip(p=0.3),), 84.3, 82.6),
    "flip_p0.5": ((HorizontalFlip(p=0.5),), 84.7, 83.0),
    "flip_p0.7": ((HorizontalFlip(p=0.7),), 84.4, 83.8),
    "flip_p0.9": ((HorizontalFlip(p=0.9),), 83.1, 78.7),
    "crop": ((CROP,), 82.7, 82.9),
    "crop_flip": ((CROP, FLIP), 85.0, 84.6),
    "grayscale": ((Grayscale(p=0.2),), 80.7, 79.0),
    "crop_flip_gray": ((CROP, FLIP, GRAY), 82.0, 81.6),
    "color_jitter": ((JITTER,), 82.1, 81.1),
    "crop_flip_gray_blur": ((CROP, FLIP, GRAY, BLUR), 82.9, 81.8),
    "crop_flip_gray_blur_jitter": ((CROP, FLIP, JITTER, GRAY, BLUR), 84.9, 83.0),
}
DROPOUT = {  # rate: the report's test accuracy, from 0.7 on printed in its figures alone
    0.1: 83.5,
    0.2: 80.5,
    0.3: 79.9,
    0.4: 76.0,
    0.5: 69.0,
    0.6: 51.6,
    0.7: 17.4,
    0.8: 19.6,
    0.9: 11.6,
}
AFTER_POOL = (0.5, 0.6)  # not in the report: dropout at its usual place
FLIPS = [name for name in AUGMENTATIONS if name.startswith("flip")]
SINGLES = [name for name, (augment, *_) in AUGMENTATIONS.items() if len(augment) == 1]


def dropout_run(rate: float) -> Run:
    return Run(
        f"dropout_{rate:g}", Settings(epochs=20, dropout=rate), {"test": DROPOUT[rate]} if rate in DROPOUT else {}
    )


def after_pool_run(rate: float) -> Run:
    return Run(f"dropout_after_pool_{rate:g}", Settings(epochs=20, dropout=rate, dropout_after_pool=True))


RUNS = [
    Run("baseline", Settings(epochs=30)),
    Run("baseline_20", Settings(epochs=20)),  # beside the dropout runs
    *(
        Run(name, Settings(epochs=30, augment=augment), {"validation": validation, "test": test})
        for name, (augment, validation, test) in AUGMENTATIONS.items()
    ),
    *map(dropout_run, DROPOUT),
    *map(after_pool_run, AFTER_POOL),
]
BASELINES = ("baseline", "baseline_20")
REPORTED = {run.name: run.reported["test"] for run in RUNS if "test" in run.reported}  # percent


def about_equal(one: str, other: str, results: dict[str, list[dict]], margin: float) -> dict | None:
    """Criterion of "makes no difference": the 95 % interval of the paired difference lies within +-`margin` points."""
    found = paired_difference(results.get(one, []), results.get(other, []))
    if "difference" not in found:
        return None
    low, high = found["ci95"]
    overlaps = low < margin and high > -margin
    verdict = "holds" if -margin < low and high < margin else "within noise" if overlaps else "does not hold"
    return {**found, "verdict": verdict, "evidence": f"{one} − {other}: {points(found)}, within ±{margin:g}?"}


def loss_gap(results: list[dict]) -> float:
    """Validation loss minus training loss in the last epoch, mean over seeds: the gap the report's curves show."""
    return statistics.mean(r["history"][-1]["validation_loss"] - r["history"][-1]["train_loss"] for r in results)


def narrowest_gap(name: str, others: list[str], results: dict[str, list[dict]]) -> dict | None:
    """Criterion: of all these runs, `name` has the smallest gap between training and validation loss, either way, by
    more than the noise. A validation loss is a mean over 1,000 images: 1.96 standard errors are 0.12 for question 1's
    last weights, and 0.17 for the difference of two, as of independent runs; of several seeds: `with_seed_noise`.
    """
    runs = [name, *others]
    seeds = set.intersection(*({r["seed"] for r in results.get(n, [])} for n in runs))
    if not seeds:
        return None
    gaps = {n: abs(loss_gap([r for r in results[n] if r["seed"] in seeds])) for n in runs}
    rival = min(others, key=gaps.get)
    lead = gaps[rival] - gaps[name]
    by_seed = [{r["seed"]: abs(loss_gap([r])) for r in results[n]} for n in (rival, name)]
    noise = 0.17 * math.sqrt(1000 / VALIDATION_IMAGES[results[name][0]["settings"]["data"]])
    noise = with_seed_noise(noise, [by_seed[0][seed] - by_seed[1][seed] for seed in seeds])
    verdict = "within noise" if abs(lead) <= noise else "holds" if lead > 0 else "does not hold"
    evidence = f"loss gap, noise ±{noise:.2f}: " + ", ".join(f"{n} {gap:.3f}" for n, gap in gaps.items())
    return {"verdict": verdict, "evidence": evidence, "seeds": len(seeds)}


def two_best(results: dict[str, list[dict]], folder: Path) -> dict | None:
    """Criterion of claim 8: the lesser of the two beats the best of the others (`paired_difference`)."""
    if not all(name in results for name in AUGMENTATIONS):
        return None
    accuracy = {n: mean_test_accuracy(results[n]) for n in AUGMENTATIONS}
    named = ["crop_flip", "crop_flip_gray_blur_jitter"]
    lesser = min(named, key=accuracy.get)
    rival = max((n for n in AUGMENTATIONS if n not in named), key=accuracy.get)
    found = paired_difference(results[lesser], results[rival])
    if "difference" not in found:
        return None
    ranking = ", ".join(f"{n} {accuracy[n]:.2f}" for n in sorted(accuracy, key=accuracy.get, reverse=True)[:4])
    return {**found, "evidence": f"best four: {ranking}; {lesser} − {rival}: {points(found)}"}


CLAIMS = [
    Claim(
        5,
        "Horizontal flipping helps, best near p=0.5 to 0.7, and p=0.9 hurts.",
        (
            *((f"flip_p{p}", worse) for p in (0.5, 0.7) for worse in ("baseline", "flip_p0.1", "flip_p0.3")),
            ("baseline", "flip_p0.9"),
        ),
    ),
    Claim(
        6,
        "Random crop helps; crop + flip is best of the simple ones "
        "and narrows the gap between training and validation.",
        (("crop", "baseline"), *(("crop_flip", single) for single in SINGLES)),
        criterion=lambda results, folder: narrowest_gap("crop_flip", ["baseline"], results),
    ),
    Claim(
        7,
        "Grayscale alone barely helps or hurts.",
        criterion=lambda results, folder: about_equal("grayscale", "baseline", results, margin=2.0),
    ),
    Claim(
        8,
        "The full mixture (crop, flip, gray, blur, jitter) and crop + flip are the best augmentations.",
        criterion=two_best,
    ),
    Claim(
        9,
        "Dropout helps a little at 0.1 to 0.3, then accuracy falls, to 51.6 % at 0.6; "
        "0.2 narrows the train/validation gap the most.",
        (
            *((f"dropout_{p}", "baseline_20") for p in (0.1, 0.2, 0.3)),
            *((f"dropout_{p}", f"dropout_{q}") for p, q in ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6))),
        ),
        criterion=lambda results, folder: narrowest_gap(
            "dropout_0.2", [f"dropout_{p}" for p in DROPOUT if p != 0.2], results
        ),
    ),
]


def rate(text: str) -> float:
    """Type of --dropout."""
    try:
        value = round(float(text), 4)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a rate between 0 and 1, not '{text}'")
    return value


def more_dropout(runs: list[Run], args: argparse.Namespace) -> list[Run]:
    """The report's runs, and one for every other dropout rate asked for."""
    return [*runs, *(dropout_run(p) for p in args.dropout if p not in DROPOUT)]


def spread(results: list[dict]) -> tuple[float, float]:
    """The interval drawn around a test accuracy: Wilson's of one seed, a standard deviation each way of several."""
    if len(results) == 1:
        return tuple(results[0]["test"]["best"]["all_10000"]["ci95"])
    mean, deviation = (
        mean_test_accuracy(results),
        statistics.stdev(r["test"]["best"]["all_10000"]["accuracy"] for r in results),
    )
    return mean - deviation, mean + deviation


def plot_sweep(results: dict[str, list[dict]], points: dict[float, str], heading: str, xlabel: str) -> Figure:
    """Over a rate: test accuracy on all images with its interval, beside the report's numbers and the baseline; and the
    gap between the losses.
    """
    there = {x: results[name] for x, name in points.items() if name in results}
    ylabels = ("test accuracy (%)", "validation loss − training loss, last epoch")
    figure, (accuracies, gaps) = new_panels(title(next(iter(there.values()))[0], heading), ylabels, xlabel)
    means = [mean_test_accuracy(found) for found in there.values()]
    bounds = np.array([spread(found) for found in there.values()])  # [rates, 2]
    several = any(len(found) > 1 for found in there.values())
    label = "ours (several seeds: ± standard deviation; one: 95 %)" if several else "ours (95 %)"
    accuracies.errorbar(list(there), means, np.abs(bounds.T - means), fmt="o-", capsize=4, label=label)
    reported = {x: REPORTED[name] for x, name in points.items() if name in REPORTED}
    accuracies.plot(list(reported), list(reported.values()), "x", color="gray", label="report, 1,000 images")
    gaps.plot(list(there), [loss_gap(found) for found in there.values()], "o-", label="ours")
    if "baseline" in results and 0.0 not in points:
        value = mean_test_accuracy(results["baseline"])
        for axes, number, text in (
            (accuracies, value, f"{value:.1f} %"),
            (gaps, loss_gap(results["baseline"]), f"{loss_gap(results['baseline']):.2f}"),
        ):
            axes.axhline(number, color="tab:green", linestyle=":", label=f"baseline {text}")
    for axes in (accuracies, gaps):
        axes.xaxis.get_major_locator().set_params(integer=False)
        axes.set_xlim(min(points) - 0.05, max(points) + 0.05)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    return figure


def plot_augmentations(results: dict[str, list[dict]]) -> Figure:
    """Small multiples: losses of every augmentation there is, on common axes."""
    names = [name for name in ("baseline", *AUGMENTATIONS) if name in results]
    columns = min(4, len(names))
    figure = Figure(figsize=(4 * columns, 3 * -(-len(names) // columns)))
    grid = figure.subplots(-(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(grid, names):
        style_axes(axes, "cross entropy")
        plot_curve(axes, results[name], "train_loss", "training", color="tab:blue")
        plot_curve(axes, results[name], "validation_loss", "validation", color="tab:orange")
        axes.set_title(f"{name}: test {mean_test_accuracy(results[name]):.1f} %", fontsize=10)
        axes.tick_params(labelbottom=True)
    grid[0].set_ylim(bottom=0)  # of all: the axes are common
    grid[0].legend()
    for axes in grid[len(names) :]:
        axes.axis("off")
    figure.suptitle(title(results[names[0]][0], "augmentations"))
    figure.tight_layout()
    return figure


def plot_dropout(results: dict[str, list[dict]], points: dict[float, str]) -> Figure:
    """The report's Figure 30: validation accuracy over epochs for all dropout rates."""
    there = {p: results[name] for p, name in points.items() if name in results}
    heading = title(next(iter(there.values()))[0], "dropout (the report's Figure 30)")
    figure, axes = new_axes(heading, "validation accuracy (%)")
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(there)))
    for (p, found), color in zip(there.items(), colors):
        plot_curve(axes, found, "validation_accuracy", f"{p:g} (loss gap {loss_gap(found):+.2f})", color=color)
    axes.legend(title="dropout", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def budget(result: dict) -> tuple[int, str]:
    """What two runs must share to be compared."""
    return len(result["history"]), result["settings"]["precision"]


def as_the_report_validates(results: list[dict]) -> str:
    """Best accuracy and last loss on augmented validation images; "-" for runs that augment nothing."""
    if "augmented_validation_loss" not in results[0]["history"][-1]:
        return "-"
    best = [max(h["augmented_validation_accuracy"] for h in r["history"]) for r in results]
    last = [r["history"][-1]["augmented_validation_loss"] for r in results]
    return f"{mean_and_deviation(best)}, {mean_and_deviation(last, 3)}"


def gap_table(results: dict[str, list[dict]]) -> list[list[str]]:
    """Every run's losses in the last epoch; its best validation accuracy and last validation loss as the report
    measures them, on augmented images; and its paired difference in test accuracy (points) to the baseline of as many
    epochs in the same precision. "-" where there is none.
    """
    augmented = "on augmented images: best accuracy, last loss"
    rows = [["run", "training loss", "validation loss", "gap", augmented, "run − baseline, test [95 %]"]]
    for name in {run.name: run for run in RUNS} | results:
        if not (found := results.get(name)):
            rows.append([name] + ["-"] * 5)
            continue
        last = [r["history"][-1] for r in found]
        losses = [mean_and_deviation([h[f"{part}_loss"] for h in last], 3) for part in ("train", "validation")]
        baselines = [r for baseline in BASELINES for r in results.get(baseline, [])]
        alike = [r for r in baselines if budget(r) == budget(found[0])]
        against = difference_cell(found, alike) if name not in BASELINES else "-"
        rows.append([name, *losses, f"{loss_gap(found):+.3f}", as_the_report_validates(found), against])
    return rows if results else []


def figures(results: dict[str, list[dict]]) -> dict[str, Figure]:
    """Whatever the runs there are allow."""
    rates = {r[0]["settings"]["dropout"]: n for n, r in results.items() if re.fullmatch(r"dropout_[\d.]+", n)}
    rates = dict(sorted({0.0: "baseline_20", **{p: dropout_run(p).name for p in DROPOUT}, **rates}.items()))
    drawn = {}
    if any(name in results for name in AUGMENTATIONS):
        drawn["augmentations.png"] = plot_augmentations(results)
    if any(name in results for name in FLIPS):
        flips = {AUGMENTATIONS[name][0][0].p: name for name in FLIPS}
        drawn["flip_sweep.png"] = plot_sweep(results, flips, "horizontal flip", "probability of a flip")
    if any(name in results for rate, name in rates.items() if rate):
        drawn["dropout_validation.png"] = plot_dropout(results, rates)
        drawn["dropout_sweep.png"] = plot_sweep(results, rates, "dropout", "dropout rate")
    return drawn


QUESTION = Question(
    "q3",
    "Question 3: augmentation and dropout",
    __doc__,
    RUNS,
    CLAIMS,
    figures,
    gap_table,
    options={
        "--dropout": {"type": rate, "nargs": "+", "default": [], "metavar": "P", "help": "further dropout rates to run"}
    },
    configure=more_dropout,
)

if __name__ == "__main__":
    run_question(QUESTION)
