"""What `results/` tells: intervals and verdicts, the report's numbers and curves beside ours, figures, tables, the page.

    results/<question>/<run>/seed<N>.json  ->  figures beside it  ->  results/<question>/summary.json  ->  results/README.md

A question script declares its claims, figures and tables and calls `write_report`.
"""

import argparse
import functools
import hashlib
import json
import math
import shlex
import statistics
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import (
    CLASSES,
    ROOT,
    RUN_FIGURES,
    VALIDATION_IMAGES,
    Run,
    correct_images,
    duration,
    load_results,
    question_folder,
    visualize_filters,
)
from machine import UserError, file_lock, on_first, write_atomic

Z95 = statistics.NormalDist().inv_cdf(0.975)  # two-sided 95 % of the normal distribution
Interval = tuple[float, float]
# The settings whose seeds measure the noise of training: question and run.
REPEATED = (("q1", "convnet"), ("q2", "batchnorm"), ("q3", "crop_flip"))
# A run whose seeds lie this many times as far apart as those of the repeated settings is told by its own alone.
UNSTEADY = 3.0


class Results(dict[str, list[dict]]):
    """A question's results by run, one dict per seed.

    repeated: those of the settings whose seeds measure the noise of training. folder: where the question's runs are.
    """

    def __init__(self, found: dict[str, list[dict]], repeated: Sequence[list[dict]] = (), folder: Path | None = None):
        super().__init__(found)
        self.repeated, self.folder = repeated, folder

    def seeds_of(self, *runs: str) -> list[dict[int, dict]]:
        """For every run its results by seed, of the seeds that all of them have."""
        found = [{r["seed"]: r for r in self.get(run, ())} for run in runs]
        common = set.intersection(*(set(by_seed) for by_seed in found))
        return [{seed: by_seed[seed] for seed in sorted(common)} for by_seed in found]

    def pairs_of(self, better: str, worse: str) -> list[tuple[dict, dict]]:
        """The results of two runs, of every seed that both have."""
        return list(zip(*(by_seed.values() for by_seed in self.seeds_of(better, worse))))

    def noise_of(
        self, runs: Sequence[str], measure: Callable[[dict], float]
    ) -> tuple[list[list[dict]], list[list[dict]]]:
        """The results that tell how far seeds lie apart in `measure`. First those that are pooled: of the repeated settings,
        and of these runs where they have several seeds of other settings. Then those of the unsteady ones among these runs.
        """
        known = [weights_settings(found[0]) for found in self.repeated]
        own = [self[run] for run in runs if len(self[run]) > 1 and weights_settings(self[run][0]) not in known]
        usual = pooled_variance(values_of(self.repeated, measure))
        limit = UNSTEADY**2 * usual.value if usual else math.inf
        unsteady = [found for found in own if np.var([*map(measure, found)], ddof=1) > limit]
        return [*self.repeated, *(found for found in own if found not in unsteady)], unsteady


def weights_settings(result: dict) -> dict:
    """The settings but for the seed, the precision, and how far the training is followed."""
    reading = ("seed", "precision", "epochs", "patience")
    return {name: value for name, value in result["settings"].items() if name not in reading}


# ---------------------------------------------------------------------------------------------- intervals, verdicts


def wilson_interval(correct: int, total: int) -> Interval:
    """95 % score interval of a proportion, in percent (Wilson 1927; formula as in Brown, Cai and DasGupta 2001)."""
    p, n, z = correct / total, total, Z95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


@functools.cache
def t_quantile(df: float, outside: float = 0.05) -> float:
    """Of Student's t with one or more degrees of freedom: what this share lies beyond, on either side of zero. Infinitely
    many make it the normal distribution's.

    t is sqrt(df) tan(a), and the density of the angle a is proportional to cos(a) ** (df - 1).
    """
    if df > 10_000:
        return statistics.NormalDist().inv_cdf(1 - outside / 2)
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos((angles[:-1] + angles[1:]) / 2) ** (df - 1)
    inside = np.concatenate([[0.0], np.cumsum(density)])
    return math.sqrt(df) * math.tan(np.interp((1 - outside) * inside[-1], inside, angles))


def verdict(interval: Interval, zone: Interval = (0.0, math.inf), wider: Interval | None = None) -> str:
    """On a claim that a value lies in `zone`: it holds where the value's interval lies inside, and does not where that,
    or the `wider` one that allows for several comparisons, lies outside.
    """
    (low, high), (lowest, highest) = interval, wider or interval
    if zone[0] < low and high < zone[1]:
        return "holds"
    if highest < zone[0] or zone[1] < lowest:
        return "does not hold"
    return "within noise"


@dataclass(frozen=True)
class Variance:
    """An estimated variance, and its degrees of freedom."""

    value: float
    df: float


def values_of(groups: Sequence[Sequence[dict]], measure: Callable[[dict], float | np.ndarray]) -> list[np.ndarray]:
    """For every group of results, one per seed: [seeds], or [seeds, images]."""
    return [np.array([*map(measure, found)]) for found in groups]


def pooled_variance(groups: Sequence[np.ndarray], least_df: int = 2) -> Variance | None:
    """Between the seeds of a setting, pooled over settings; None below so many degrees of freedom.

    groups: for every setting [seeds], or [seeds, images], of which it is the mean over images.
    """
    df = sum(len(values) - 1 for values in groups)
    if df < least_df:
        return None
    squares = sum(((values - values.mean(0)) ** 2).sum(0) for values in groups)
    return Variance(float(np.mean(squares)) / df, df)


def training_variance(
    differences: np.ndarray, pooled: Sequence[np.ndarray], unsteady: Sequence[np.ndarray] = ()
) -> Variance | None:
    """Of the mean of `differences`, [seeds] or [seeds, images], between two runs: the part that training's chance adds.

    Three seeds or more measure it themselves. With fewer it is the sum of two trainings' (`Results.noise_of`): of an
    unsteady run by its own seeds, of any other by the pooled ones; the degrees of freedom of a sum are Satterthwaite's
    (1946). None where too little is there.
    """
    if len(differences) >= 3:
        parts = [pooled_variance([differences])]
    else:
        parts = [pooled_variance([values], least_df=1) for values in unsteady]
        if len(parts) < 2 and (usual := pooled_variance(pooled)):
            parts.append(Variance((2 - len(parts)) * usual.value, usual.df))
        elif len(parts) < 2:
            return None
    value, weights = sum(part.value for part in parts), sum(part.value**2 / part.df for part in parts)
    return Variance(value / len(differences), value**2 / weights if weights else parts[0].df)


@dataclass(frozen=True)
class Difference:
    """Between two runs, with its standard error and that one's degrees of freedom; `training`: does the error include
    the noise of training?
    """

    value: float
    error: float
    df: float
    seeds: int
    training: bool
    precisions: tuple[str, ...] = ()

    def interval(self, comparisons: int = 1) -> Interval:
        """95 %; of several comparisons, all values lie in theirs at least that often (Bonferroni)."""
        half = t_quantile(self.df, 0.05 / comparisons) * self.error
        return self.value - half, self.value + half

    def verdict(self, zone: Interval = (0.0, math.inf), comparisons: int = 1) -> str:
        """With several comparisons it takes more to be "does not hold": one of many is soon reversed by chance."""
        return verdict(self.interval(), zone, self.interval(comparisons))

    def __str__(self) -> str:
        """+1.86 [+1.07, +2.67]"""
        if not self.error:
            return "the same weights"
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(self.value, *self.interval())

    def in_words(self, unit: str = "points") -> str:
        if not self.error:
            return f"{self.value:+.2f} {unit}, of the same weights"
        text = "{:+.2f} {}, 95 % [{:+.2f}, {:+.2f}]".format(self.value, unit, *self.interval())
        if self.seeds > 1:
            text += f", {self.seeds} seeds"
        if len(self.precisions) > 1:
            text += f", trained in {' and '.join(self.precisions)}"
        return text if self.training else f"{text}, without the noise of training"


def make_difference(
    values: np.ndarray, image_variance: float, training: Variance | None, found: Sequence[dict]
) -> Difference:
    """values: the difference for every seed. The variance of their mean is that of the images, which all seeds share, and
    that of training. The latter is estimated, so the interval is Student's (Welch 1947, Satterthwaite 1946).
    """
    variance, df = image_variance, math.inf
    if training:
        variance += training.value
        if training.value > 0:
            df = training.df * (variance / training.value) ** 2
    precisions = tuple(sorted({r["settings"]["precision"] for r in found}))
    return Difference(float(np.mean(values)), math.sqrt(variance), df, len(values), training is not None, precisions)


def paired_difference(
    results: Results,
    better: str,
    worse: str,
    weights: tuple[str, str] = ("best", "best"),
    seeds: Collection[int] | None = None,
) -> Difference | None:
    """Difference in accuracy on all test images, in points, image by image; None where the runs share no seed.

    The images are taken as a sample of all images one could ask about. `weights` says which weights of each run are
    compared, "best" or "last"; of two runs, the same of both. seeds: of those that both have, only these.

    An image's difference varies because images do, and because another training gets other images right. The latter is
    in the noise of training too, and counts once; but three seeds that agree by chance do not take it off.
    """
    pairs = [pair for pair in results.pairs_of(better, worse) if seeds is None or pair[0]["seed"] in seeds]
    if not pairs:
        return None
    correct = [[correct_images(r["test"][which]) for r, which in zip(pair, weights)] for pair in pairs]
    points = 100.0 * np.array(correct)  # [seeds, 2, images]
    difference = points[:, 0] - points[:, 1]
    image_variance = difference.mean(0).var() / difference.shape[1]
    in_percent = functools.partial(test_accuracy, weights=weights[0])
    noise = ([], []) if same_trainings(pairs) else results.noise_of((better, worse), in_percent)
    by_image = [values_of(groups, functools.partial(test_points, weights=weights[0])) for groups in noise]
    training = training_variance(difference.mean(1), *([points.mean(1) for points in groups] for groups in by_image))
    if training:
        in_both = training_variance(difference, *by_image).value / difference.shape[1]
        image_variance = max(0.0, image_variance - min(in_both, training.value))
    return make_difference(difference.mean(1), image_variance, training, [r for pair in pairs for r in pair])


def test_points(result: dict, weights: str) -> np.ndarray:
    """100 for every test image that these weights get right, 0 for the others, [images]."""
    return 100.0 * correct_images(result["test"][weights])


def validation_difference(results: Results, better: str, worse: str) -> Difference | None:
    """Difference in the best validation accuracy, in points, as of different images, which is cautious: the results hold
    no predictions of the validation images. Zero where both have the same weights. None where the runs share no seed.
    """
    pairs = results.pairs_of(better, worse)
    if not pairs:
        return None
    accuracies = np.array([[best_validation(r) for r in pair] for pair in pairs])  # [seeds, 2]
    values, means = accuracies[:, 0] - accuracies[:, 1], accuracies.mean(0)
    images = VALIDATION_IMAGES[pairs[0][0]["settings"]["data"]]
    image_variance = float((means * (100 - means)).sum()) / images
    if all(same_weights(*pair) for pair in pairs):
        image_variance = 0.0
    noise = ([], []) if same_trainings(pairs) else results.noise_of((better, worse), best_validation)
    training = training_variance(values, *(values_of(groups, best_validation) for groups in noise))
    return make_difference(values, image_variance, training, [r for pair in pairs for r in pair])


def same_trainings(pairs: Sequence[tuple[dict, dict]]) -> bool:
    """Are both runs readings of the same trajectories? Their difference then depends on the trajectory in its own way, and
    other settings' seeds do not tell how.
    """
    return all(same_training(*pair) for pair in pairs)


def same_training(one: dict, other: dict) -> bool:
    """Are both readings of one trajectory? Trained twice, it gives the same metrics; only the seconds differ."""
    return all(a == b for a, b in zip(metrics(one), metrics(other)))


def metrics(result: dict) -> list[dict]:
    """The history without the seconds, the one thing in it that does not repeat."""
    return [{name: value for name, value in h.items() if name != "seconds"} for h in result["history"]]


def same_weights(one: dict, other: dict) -> bool:
    """Do both restore the same epoch of one trajectory?"""
    return one["best_epoch"] == other["best_epoch"] and same_training(one, other)


def test_accuracy(result: dict, weights: str = "best", images: str = "all_images") -> float:
    """Percent of all test images, or of the `report_images`, by the best or the last weights."""
    return result["test"][weights][images]["accuracy"]


def best_validation(result: dict) -> float:
    """Validation accuracy of the best epoch, percent."""
    return result["history"][result["best_epoch"] - 1]["validation_accuracy"]


def mean_test_accuracy(found: Sequence[dict]) -> float:
    return statistics.mean(map(test_accuracy, found))


def test_interval(found: Sequence[dict]) -> Interval:
    """Around a run's accuracy on all test images: Wilson's of one seed, a standard deviation each way of several."""
    values = [*map(test_accuracy, found)]
    if len(values) == 1:
        correct = correct_images(found[0]["test"]["best"])
        return wilson_interval(int(correct.sum()), len(correct))
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return mean - deviation, mean + deviation


# ------------------------------------------------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Finding:
    """What one part of a claim comes to, the numbers it rests on, and whether these lack the noise of training."""

    verdict: str
    evidence: str = ""
    lacks_training: bool = False


NOT_RUN = Finding("not run")
Check = Callable[[Results, int], Finding]  # the second: how many comparisons a claim makes; 1 by default


@dataclass(frozen=True)
class Claim:
    """One of the report's ten conclusions, and the checks that decide it."""

    number: str  # the report's, from 1 to 10
    text: str  # the report's sentence
    checks: tuple[Check, ...] | Callable[[Results], tuple[Check, ...]]  # or what makes them, from the runs there are

    def judge(self, results: Results) -> dict:
        """A claim of several parts holds where all do, and does not where one is reversed beyond noise."""
        checks = self.checks(results) if callable(self.checks) else self.checks
        findings = [check(results, len(checks)) for check in checks] or [NOT_RUN]
        verdicts = [finding.verdict for finding in findings]
        worst = next((v for v in ("does not hold", "not run", "within noise") if v in verdicts), "holds")
        parts = [vars(finding) for finding in findings]
        return {"claim": self.number, "report": self.text, "verdict": worst, "parts": parts}


def in_short(judged: dict) -> str:
    """A claim's verdict, and what must be known beside it."""
    parts, notes = judged["parts"], []
    verdicts = [part["verdict"] for part in parts]
    if len(parts) > 1 and set(verdicts) != {"not run"}:
        holding = verdicts.count("holds")
        notes.append(f"{holding} of {len(parts)} parts {'holds' if holding == 1 else 'hold'}")
        if missing := verdicts.count("not run"):
            notes.append(f"{missing} not run")
    if any(part["lacks_training"] for part in parts):
        notes.append("without the noise of training")
    return f"**{judged['verdict']}**" + f" ({', '.join(notes)})" * bool(notes)


def evidence(judged: dict) -> list[str]:
    """What was measured, a line per part."""
    parts = judged["parts"]
    lines = [part["evidence"] for part in parts if part["evidence"]]
    if len(parts) > 1:
        lines = [f"{part['verdict']}: {part['evidence']}" for part in parts if part["evidence"]]
        if missing := [part["verdict"] for part in parts].count("not run"):
            lines.append(f"{missing} of {len(parts)} parts not run")
    return lines


def beats(better: str, worse: str, on: str = "test") -> Check:
    """A check that one run's accuracy is above another's: on the test images, image by image, or on validation."""
    compare = {"test": paired_difference, "validation": validation_difference}[on]

    def check(results: Results, comparisons: int = 1) -> Finding:
        if (found := compare(results, better, worse)) is None:
            return NOT_RUN
        measured = f"{better} − {worse}, {on}: {found.in_words()}"
        return Finding(found.verdict(comparisons=comparisons), measured, not found.training)

    return check


def overfits(run: str) -> Check:
    """A check, for every seed, that the validation loss ends more than 5 % above its lowest value while the training
    loss has fallen since.
    """

    def check(results: Results, comparisons: int = 1) -> Finding:
        rises, curves = [], []
        for result in results.get(run, ()):
            low, last = min(result["history"], key=lambda h: h["validation_loss"]), result["history"][-1]
            falls = last["train_loss"] < low["train_loss"]
            rises.append(100 * (last["validation_loss"] / low["validation_loss"] - 1) if falls else -math.inf)
            curves.append(
                f"seed {result['seed']}: validation loss lowest in epoch {low['epoch']} ({low['validation_loss']:.3f}), "
                f"{last['validation_loss']:.3f} in epoch {last['epoch']}; "
                f"training loss {low['train_loss']:.3f} to {last['train_loss']:.3f}"
            )
        if not rises:
            return NOT_RUN
        return Finding(verdict((min(rises), max(rises)), (5.0, math.inf)), "; ".join(curves), len(rises) == 1)

    return check


# -------------------------------------------------------------------------------------------------------- the report


@functools.cache
def the_report() -> dict:
    """What the report prints and what its figures show; `results/report.json` says how it was read."""
    return json.loads((ROOT / "results" / "report.json").read_text(encoding="utf-8"))


def reported(question: str, run: str) -> dict:
    """The percentages the report prints for a run: `validation`, of the best epoch, and `test`; empty where it has none."""
    return the_report()["numbers"].get(question, {}).get(run, {})


def of_the_report(result: dict) -> bool:
    """Does it belong to one of the report's questions?"""
    return result["question"] in the_report()["numbers"]


def report_figures(question: str) -> list[dict]:
    """The report's figures that belong to a question, in order."""
    return [f for f in the_report()["figures"] if f["question"] == question]


def figures_of(run: str) -> list[dict]:
    """The report's figures that show this run, in whichever question."""
    return [f for f in the_report()["figures"] if f["run"] == run]


def report_filters() -> dict[str, np.ndarray]:
    """First-layer filters of the report's Figures 2 ("before") and 3 ("last"), [128, 3, 3, 3], up to a factor. Their zero
    is not printed: before training it is the middle of the range, as PyTorch draws them; after training it is taken to be
    the mean.
    """
    with np.load(ROOT / "results" / "report_filters.npz") as saved:
        return {"before": saved["before"] - 127.5, "last": saved["after"] - saved["after"].mean()}


def smoothness(filters: np.ndarray) -> np.ndarray:
    """Share of every 3x3 filter's energy in its three smoothest patterns, [C_out] in [0, 1]; white noise has 1/3.

    The patterns are those of the two-dimensional cosine transform: constant, horizontal ramp, vertical ramp; of nine.
    """
    basis = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])  # orthonormal DCT-II of length 3
    energy = (np.einsum("ui,vj,ncij->ncuv", basis, basis, filters.astype(float)) ** 2).sum(1)  # [C_out, 3, 3]
    return (energy[:, 0, 0] + energy[:, 0, 1] + energy[:, 1, 0]) / energy.sum((1, 2))


def contradicted() -> list[tuple[str, str, float]]:
    """Where the report's text prints another best validation accuracy than its own plot shows: the plot's figure, its
    run, and text − plot in points.
    """
    found = []
    for figure in the_report()["figures"]:
        printed = reported(figure["question"], figure["run"]).get("validation")
        if printed and "validation_accuracy" in figure and differs(printed, max(figure["validation_accuracy"])):
            found.append((figure["figure"], figure["run"], printed - max(figure["validation_accuracy"])))
    return found


def as_the_report_validates(result: dict, name: str) -> list[float]:
    """A history entry over epochs; of validation on augmented images where there are such, as in the report."""
    augmented = f"augmented_{name}"
    return [h.get(augmented, h[name]) for h in result["history"]]


def augmented_validation(results: dict[str, list[dict]]) -> str:
    """What validation on augmented images is worth, in words; empty where no run has it."""
    lower = []
    for run, found in results.items():
        if "augmented_validation_accuracy" in found[0]["history"][0]:
            apart = [max(as_the_report_validates(r, "validation_accuracy")) - best_validation(r) for r in found]
            lower.append(f"{run} {statistics.mean(apart):+.1f}")
    return f"best validation accuracy, augmented − as it is: {', '.join(lower)}" if lower else ""


def distance(figure: dict, found: Sequence[dict], name: str) -> float | None:
    """Mean absolute difference of a curve from the report's, over the epochs both have; mean over seeds."""
    if name not in figure:
        return None
    return statistics.mean(mean_distance(as_the_report_validates(r, name), figure[name]) for r in found)


def mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference over the epochs both have."""
    return statistics.mean(abs(a - b) for a, b in zip(one, other))


# ----------------------------------------------------------------------------------------------------------- figures

GREYS = ("0.4", "0.7")  # of the report's curves: it shows some runs twice


@contextmanager
def plain_style():
    """matplotlib's own defaults, whatever the user's matplotlibrc says: figures are the same for everyone."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def save_figure(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomic(path, buffer.getbuffer())


def is_sample(result: dict) -> bool:
    """Of the bundled excerpt? The report's numbers never stand beside it."""
    return result["settings"]["data"] != "cifar10"


def title(result: dict, text: str, run: bool = False) -> str:
    """Heading of a figure of a question, or of one run. Figures of the sample say so."""
    sample = "SAMPLE (not CIFAR-10's full size): " if is_sample(result) else ""
    name = f"{result['question']} {result['run']}" if run else result["question"]
    return f"{sample}{name}: {text}"


def plot_curve(axes, found: Sequence[dict], name: str, label: str | None, **style) -> None:
    """One history entry over epochs: the mean over seeds; of several, a band of one standard deviation too.

    Seeds that early stopping ended after different epochs have a line each. A single epoch is a dot.
    """
    if len({len(r["history"]) for r in found}) > 1:
        for result in found:
            plot_curve(axes, [result], name, label if result is found[0] else None, **style)
        return
    values = np.array([[h[name] for h in r["history"]] for r in found])  # [seeds, epochs]
    epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
    marker = "o" if len(epochs) == 1 else None
    (line,) = axes.plot(epochs, mean, label=label, **{"marker": marker} | style)
    if len(found) > 1:
        deviation = values.std(0, ddof=1)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_reports_curves(axes, result: dict, names: dict[str, str]) -> None:
    """The report's curves of a run, unobtrusive; none beside the sample. names: entry of the history -> line style."""
    if is_sample(result):
        return
    drawn = [figure for figure in figures_of(result["run"]) if names.keys() & figure.keys()]
    for figure, grey in zip(drawn, GREYS):
        for name, style in names.items():
            if name in figure:
                values = figure[name]
                label = f"report, Figure {figure['figure']}"
                if len(names) > 1:
                    label += ": " + name.replace("_", " ").replace(" loss", "").replace("train", "training")
                axes.plot(range(1, len(values) + 1), values, color=grey, linewidth=1, linestyle=style, label=label)


def style_axes(axes, ylabel: str, xlabel: str = "epoch") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def new_axes(heading: str, ylabel: str):
    """A figure with one set of axes over epochs; returns both."""
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot(title=textwrap.fill(heading, 64))
    style_axes(axes, ylabel)
    return figure, axes


def new_panels(heading: str, ylabels: tuple[str, str], xlabel: str = "epoch"):
    """A figure with two panels; returns it and both axes."""
    figure = Figure(figsize=(14, 4.8))
    panels = figure.subplots(1, 2)
    for axes, ylabel in zip(panels, ylabels):
        style_axes(axes, ylabel, xlabel)
    figure.suptitle(heading)
    return figure, panels


def new_grid(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure of rows x columns panels of this size (inches); returns it and the axes, row by row."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def shades(count: int) -> np.ndarray:
    """Colours for an ordered family of curves, [count, 4]."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def plot_losses(found: Sequence[dict]) -> Figure:
    """Training and validation loss over epochs, all seeds of one run, beside the report's curves."""
    figure, axes = new_axes(title(found[0], "loss", run=True), "cross entropy")
    plot_loss_curves(axes, found)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def plot_loss_curves(axes, found: Sequence[dict]) -> None:
    """All losses of a run, and the report's."""
    plot_curve(axes, found, "train_loss", "training", color="tab:blue")
    plot_curve(axes, found, "validation_loss", "validation", color="tab:orange")
    if of_the_report(found[0]) and "augmented_validation_loss" in found[0]["history"][0]:
        style = {"color": "tab:orange", "linestyle": ":"}
        plot_curve(axes, found, "augmented_validation_loss", "validation, augmented as in the report", **style)
    plot_reports_curves(axes, found[0], {"train_loss": "-", "validation_loss": "--"})


def plot_accuracy(found: Sequence[dict]) -> Figure:
    """Validation accuracy over epochs, every seed's best epoch marked, beside the report's curves."""
    first = found[0]
    figure, axes = new_axes(title(first, "validation accuracy", run=True), "accuracy (%)")
    plot_curve(axes, found, "validation_accuracy", "validation", color="tab:orange")
    if of_the_report(first) and "augmented_validation_accuracy" in first["history"][0]:
        style = {"color": "tab:orange", "linestyle": ":"}
        plot_curve(axes, found, "augmented_validation_accuracy", "validation, augmented as in the report", **style)
    for result in found:
        best, value = result["best_epoch"], best_validation(result)
        axes.plot(best, value, "o", color="tab:red", label=f"seed {result['seed']}: best {value:.1f} %, epoch {best}")
    plot_reports_curves(axes, first, {"validation_accuracy": "--"})
    axes.legend(fontsize=8)
    return figure


def plot_confusion(found: Sequence[dict]) -> Figure:
    """Confusion matrix of the best weights on all test images, summed over seeds; rows in percent of the true class."""
    counts = sum(np.array(r["test"]["best"]["confusion"]) for r in found)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    heading = textwrap.fill(title(found[0], "test confusion (% of the true class)", run=True), 64)
    figure = Figure(figsize=(7, 6))
    axes = figure.add_subplot(title=heading, xlabel="predicted", ylabel="true")
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    for (row, column), value in np.ndenumerate(percent):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    return figure


def load_arrays(run_folder: Path, result: dict) -> dict[str, np.ndarray]:
    """The run's first-layer filters (before training and at the last epoch) and `step_losses`. Raises UserError."""
    path = run_folder / f"seed{result['seed']}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in ("before", "last", "step_losses")}
    except Exception as error:  # a damaged file fails anywhere in zipfile, zlib or numpy
        raise UserError(f"{path} is missing or damaged ({error}): restore it, or run again") from error


def plot_filters(found: Sequence[dict], run_folder: Path) -> Figure:
    """The first seed's filters before training and at its last epoch, as the report shows them, on one scale."""
    first = found[0]
    arrays = load_arrays(run_folder, first)
    before, after = arrays["before"], arrays["last"]
    scale = float(np.quantile(np.abs([before, after]), 0.998))
    panels = {"before training": before, f"after {len(first['history'])} epochs": after}
    return visualize_filters(panels, title(first, "first-layer filters", run=True), scale)


def draw_run(found: Sequence[dict], run_folder: Path) -> None:
    """RUN_FIGURES of one run, from its results (all seeds) and saved filters alone."""
    save_figure(plot_losses(found), run_folder / "losses.png")
    save_figure(plot_accuracy(found), run_folder / "accuracy.png")
    save_figure(plot_filters(found, run_folder), run_folder / "filters.png")
    save_figure(plot_confusion(found), run_folder / "confusion.png")


def draw_runs(results: Results, changed: Collection[str]) -> None:
    """The figures of the runs that have changed, and of those that lack some."""
    for run, found in results.items():
        drawn = all((results.folder / run / f"{name}.png").exists() for name in RUN_FIGURES)
        if run in changed or not drawn:
            draw_run(found, results.folder / run)


# ------------------------------------------------------------------------------------------------------------ tables

Table = list[list[str]]  # a head and rows


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """ "80.7", or with several seeds "80.7 ± 0.3" (standard deviation)."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def with_interval(found: Sequence[dict]) -> str:
    """Accuracy on all test images: "78.70 [77.9, 79.5]", or with several seeds "78.70 ± 0.41"."""
    text = mean_and_deviation([*map(test_accuracy, found)], 2)
    return f"{text} [{{:.1f}}, {{:.1f}}]".format(*test_interval(found)) if len(found) == 1 else text


def command(question: str, run: str, found: Sequence[dict] = (), declared: bool = True, sample: bool = False) -> str:
    """What to type to get this run. declared: the script knows it by name, without a further option."""
    return f"python {script(question)} --only {run}{further_options(run, found, declared, sample)}"


def script(question: str) -> str:
    return next(path.name for path in ROOT.glob(f"{question}_*.py"))


def further_options(run: str, found: Sequence[dict], declared: bool, sample: bool) -> str:
    """Beside --only: what makes this run from what its name does not say."""
    if not found:
        return " --sample" if sample else ""
    settings, options = found[0]["settings"], ""
    if not declared and settings["patience"]:
        options += f" --patience {settings['patience']}"
    if not declared and settings["dropout"]:
        options += f" --dropout {settings['dropout']:g}"
    if run.endswith(f"_{settings['precision']}"):
        options += f" --precision {settings['precision']}"
    if f"_{settings['epochs']}epochs" in run:
        options += f" --epochs {settings['epochs']}"
    if " sha256:" in settings["weights"]:
        options += f" --weights {shlex.quote(settings['weights'].rsplit(' sha256:')[0])}"
    if settings["data"] != "cifar10":
        options += " --sample"
    if last := max(r["seed"] for r in found):
        options += f" --seeds {last + 1}"
    return options


def run_table(question: str, runs: Sequence[str], results: Results, sample: bool) -> Table:
    """A line per run: the report's numbers beside ours, measured as the report does, then what we would report."""
    images = ("500 images", "500") if sample else ("first 1,000 images", "10,000")
    head = ["run", "best epoch", "validation: report / ours", f"last weights, {images[0]}: report / ours"]
    head += [f"best weights, {images[1]} images [95 %]", "time", "command"]
    rows = []
    for run in dict.fromkeys([*runs, *results]):
        found, numbers = results.get(run, []), {} if sample else reported(question, run)
        rows.append(run_row(run, found, numbers, command(question, run, found, run in runs, sample)))
    return [head, *rows]


def run_row(run: str, found: list[dict], numbers: dict, what: str) -> list[str]:
    """ "-" stands for what has not been run, or what the report does not print. numbers: as `reported`."""
    validation, test = (printed_and_drawn(run, numbers, name) for name in ("validation", "test"))
    if not found:
        return [run, "-", f"{validation} / -", f"{test} / -", "-", "-", what]
    best = [best_validation(r) for r in found]
    if of_the_report(found[0]):
        best = [max(as_the_report_validates(r, "validation_accuracy")) for r in found]
    last = [test_accuracy(r, "last", "report_images") for r in found]
    return [
        run,
        best_epochs(found),
        f"{validation} / {mean_and_deviation(best)}",
        f"{test} / {mean_and_deviation(last)}",
        with_interval(found),
        time_taken(found),
        what,
    ]


def best_epochs(found: Sequence[dict]) -> str:
    """Of every seed; which seeds these are is said where one before the last is missing."""
    text = ", ".join(f"{r['best_epoch']} of {len(r['history'])}" for r in found)
    seeds = [r["seed"] for r in found]
    return text if seeds == [*range(len(seeds))] else f"{text} ({seeds_in_words(seeds)})"


def time_taken(found: Sequence[dict], after: int = 0) -> str:
    """By the epochs from `after` on, summed over seeds: one sum for every machine that trained some of them."""
    seconds: dict[str, dict[int, float]] = {}  # by machine and seed
    for result in found:
        places = [*result["earlier_environments"], result["environment"]]
        for h in result["history"][after:]:
            device = [e["device"] for e in places if e["from_epoch"] <= h["epoch"]][-1]
            of_seed = seconds.setdefault(device, {})
            of_seed[result["seed"]] = of_seed.get(result["seed"], 0.0) + h["seconds"]
    which = {device: f" ({seeds_in_words(by_seed)})" if len(found) > 1 else "" for device, by_seed in seconds.items()}
    return "; ".join(
        f"{duration(sum(by_seed.values()))} on {device}{which[device]}" for device, by_seed in seconds.items()
    )


def seeds_in_words(seeds: Iterable[int]) -> str:
    """ "seed 2" or "seeds 0, 2"."""
    numbers = [str(seed) for seed in seeds]
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def layer_table(question: str, run: str, found: Sequence[dict]) -> Table:
    """A line per layer, and the sum: PyTorch's counts beside the report's formulas (batch norm's is ours)."""
    what, parameters = command(question, run, found), found[0]["parameters"]
    rows = [["layer", "type", "parameters", "by formula", "command"]]
    for row in parameters["layers"]:
        rows.append([row["layer"], row["type"], f"{row['parameters']:,}", f"{row['formula']:,}", what])
    total = sum(row["formula"] for row in parameters["layers"])
    return [*rows, ["all", "", f"{parameters['trainable']:,}", f"{total:,}", what]]


def printed_and_drawn(run: str, numbers: dict, name: str) -> str:
    """The report's number, and its figure's where that is another; `name`: "validation" or "test"."""
    drawn = []
    for figure in figures_of(run) if numbers else []:
        best = max(figure["validation_accuracy"]) if "validation_accuracy" in figure else None
        drawn.append((figure["figure"], best if name == "validation" else figure.get("printed", {}).get("test")))
    printed = numbers.get(name, "-")
    others = [
        f"Figure {number}: {value:.1f}" for number, value in drawn if value is not None and differs(printed, value)
    ]
    return str(printed) + f" ({', '.join(others)})" * bool(others)


def differs(printed: float | str, drawn: float) -> bool:
    """Beyond rounding; a range that is printed as text is taken as it is."""
    return printed == "-" or (type(printed) is float and abs(printed - drawn) > 0.05)


def figure_rows(question: str, results: Results) -> list[list[str]]:
    """The report's figures of this question: number, what it shows, ours, how far ours is from it, its reading error."""
    rows = []
    for figure in report_figures(question):
        runs = [f"dropout_{rate}" for rate in figure["bars"]] if "bars" in figure else [figure["run"]]
        there = [run for run in runs if run in results]
        ours, apart = "not run", "-"
        if there:
            ours = " ".join(link(kind, f"{question}/{path}") for kind, path in figure["ours"].items())
            apart = bars_distance(figure, results) if "bars" in figure else distances(figure, there[0], results)
        shows = figure["shows"] + (f" (*{figure['remark']}*)" if "remark" in figure else "")
        rows.append([figure["figure"], shows, ours, apart or "-", f"`{commands(question, runs, results)}`"])
    return rows


def commands(question: str, runs: Sequence[str], results: Results) -> str:
    """What to type to get these runs with their seeds: a command for all that have as many."""
    groups: dict[int, list[str]] = {}  # by the last seed
    for run in runs:
        groups.setdefault(max((r["seed"] for r in results.get(run, ())), default=0), []).append(run)
    found = [max((results.get(run, ()) for run in group), key=len) for group in groups.values()]
    return " && ".join(command(question, " ".join(group), of) for group, of in zip(groups.values(), found))


def distances(figure: dict, run: str, results: Results) -> str:
    """How far ours is, in words; empty where there is nothing to compare."""
    found, parts, losses = results[run], [], []
    if (points := distance(figure, found, "validation_accuracy")) is not None:
        parts.append(f"accuracy {points:.1f} points")
    for name, short in (("train_loss", "training"), ("validation_loss", "validation")):
        if (apart := distance(figure, found, name)) is not None:
            losses.append(f"{short} {apart:.3f}")
    if losses:
        error = f"read ± {figure['loss_error']:.1g}" if figure["loss_error"] else "read exactly"
        parts.append(f"loss {', '.join(losses)} ({error})")
    printed, last = figure.get("printed", {}), [r["history"][-1] for r in found]
    ours = {
        "best_validation": [best_validation(r) for r in found],
        "last_validation": [h["validation_accuracy"] for h in last],
        "test": [test_accuracy(r, "last", "report_images") for r in found],
    }
    for name, theirs in printed.items():
        parts.append(f"{name.replace('_', ' ')} {theirs} / {mean_and_deviation(ours[name])}")
    if "parameters" in figure:
        parts.append(f"parameters {figure['parameters']:,} / {found[0]['parameters']['trainable']:,}")
    if "filters" in figure:
        theirs, ours = (
            report_filters()[figure["filters"]],
            load_arrays(results.folder / run, found[0])[figure["filters"]],
        )
        apart = f"{100 * smoothness(theirs).mean():.1f} / {100 * smoothness(ours).mean():.1f} %"
        parts.append(f"smoothness {apart}" + f" (seed {found[0]['seed']})" * (len(found) > 1))
    return "; ".join(parts)


def bars_distance(figure: dict, results: Results) -> str:
    """Mean absolute difference of the best validation accuracies, over the rates there are."""
    ours = {rate: results.get(f"dropout_{rate}") for rate in figure["bars"]}
    apart = [
        abs(statistics.mean(map(best_validation, found)) - figure["bars"][rate])
        for rate, found in ours.items()
        if found
    ]
    return f"accuracy {statistics.mean(apart):.1f} points over {len(apart)} of {len(ours)} rates (read within 0.2)"


# -------------------------------------------------------------------------------------------------------------- page


def link(text: str, path: str) -> str:
    """In Markdown; the path as a browser needs it."""
    return f"[{text}]({quote(path)})"


def picture(text: str, path: str) -> str:
    return "!" + link(text, path)


def markdown_table(table: Table) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return [head, "|" + " --- |" * len(table[0]), *body, ""]


def prose(doc: str) -> list[str]:
    """The paragraphs of a script's docstring without its first line, its commands, and the pointer to this page."""
    paragraphs = [" ".join(text.split()) for text in doc.split("\n\n")[1:] if not text.startswith(" ")]
    return [text.replace("What we found: results/README.md", "").strip() for text in paragraphs]


def linked(name: str, links: dict[str, str]) -> str:
    run, comma, rest = name.partition(",")
    return links.get(run, run) + comma + rest


def question_section(
    question: str, doc: str, results: Results, tables: Sequence[Table], verdicts: list[dict], figures: Iterable[str]
) -> str:
    """A question's part of the page, as Markdown: tables, claims, figures, and every run's own figures folded away. A
    row of a table that begins with a run's name, or with that and a comma, is linked to the run.
    """
    links = {}  # to the JSON, or to the folder of all seeds'
    for run, found in results.items():
        file = f"seed{found[0]['seed']}.json" if len(found) == 1 else ""
        links[run] = link(run, f"{question}/{run}/{file}")
    sample = any(is_sample(found[0]) for found in results.values())
    heading = doc.splitlines()[0].rstrip(".")
    lines = [f"## {heading}", "", *(paragraph + "\n" for paragraph in prose(doc) if not sample)]
    for head, *rows in tables:
        cells = [[linked(row[0], links), *row[1:]] for row in rows]
        if head[-1] == "command":
            cells = [[*row[:-1], f"`{row[-1]}`"] for row in cells]
        lines += markdown_table([head, *cells])
    if verdicts:
        judged = [[v["claim"], v["report"], f"**{v['verdict']}**", "<br>".join(evidence(v)) or "-"] for v in verdicts]
        lines += markdown_table([["claim", "the report says", "verdict", "measured"], *judged])
    lines += [picture(name, f"{question}/{name}") + "\n" for name in figures]
    for run in results:
        lines += [f"<details><summary>{run}: curves, filters, confusion matrix</summary>", ""]
        lines += [picture(f"{run} {kind}", f"{question}/{run}/{kind}.png") for kind in RUN_FIGURES]
        lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def general_practices(root: Path) -> list[list[str]]:
    """What the report did in every question, and what it changes: over all trainings there are, each read at the number
    of epochs that the report trained it for; without early stopping, whose rules have rows of their own.
    """
    trainings: dict[str, dict] = {}
    for question, numbers in the_report()["numbers"].items():
        for path in sorted(root.glob(f"{question}/*/")):
            for result in load_results(path):
                if path.name in numbers and not result["settings"]["patience"]:
                    trainings[json.dumps(metrics(result))] = result  # question 2 has one of question 1's again
    if not trainings:
        return []
    restored = [test_accuracy(r, "best") - test_accuracy(r, "last") for r in trainings.values()]
    fewer = [test_accuracy(r, "last", "report_images") - test_accuracy(r, "last") for r in trainings.values()]
    text_and_plot = ", ".join(f"{run} {apart:+.1f} (Figure {number})" for number, run, apart in contradicted())
    noise = "the 95 % interval of one accuracy near 80 % on 1,000 images is ±2.5 points"
    return [
        [
            "tests the last weights, not the best on validation",
            f"best − last, all test images: {median_and_range(restored)}",
        ],
        ["tests on the first 1,000 of 10,000 images", f"first 1,000 − all: {median_and_range(fewer)}; {noise}"],
        ["prints best validation accuracies that its own plots contradict", f"text − plot: {text_and_plot}"],
    ]


def median_and_range(values: Sequence[float]) -> str:
    low, first, middle, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    half = f"half of them {first:+.2f} to {third:+.2f}, all {low:+.2f} to {high:+.2f}"
    return f"{middle:+.2f} points, the median of {len(values)} trainings ({half})"


def write_page(root: Path, sample: bool) -> None:
    """README.md under `root`, from the summaries of all questions there are."""
    summaries = [load_summary(path) for path in sorted(root.glob("q*/summary.json"))]
    lines = [SAMPLE_HEAD]
    if not sample:
        lines = [PAGE_HEAD.format(**progress(summaries), machines=machines(summaries))]
        lines += [*verdict_table(summaries), READING_HEAD, noise_of_training(root)]
        rows = [row for summary in summaries for row in summary["figures"]]
        head = ["Figure", "shows", "ours", "mean distance of our curves; single numbers: report / ours", "command"]
        lines += ["## The report's figures, in order", "", figures_head(root), *markdown_table([head, *rows])]
        rows = [[*row, judging("q1")] for row in general_practices(root)]
        for summary in summaries:
            rows += [[*row, judging(summary["question"])] for row in summary["practices"]]
        lines += ["## What the report did, and what it changes", "", PRACTICES_HEAD]
        lines += markdown_table([["the report", "what it is worth, from our runs", "command"], *rows])
    for summary in summaries:
        lines += [*outdated(root, summary), summary["section"]]
    write_atomic(root / "README.md", "\n".join(lines).encode())


def progress(summaries: Sequence[dict]) -> dict[str, int]:
    """How many of the report's runs there are."""
    numbers = the_report()["numbers"]
    done = [
        run for summary in summaries for run in summary["trained_on"] if run in numbers.get(summary["question"], {})
    ]
    return {"done": len(done), "total": sum(map(len, numbers.values()))}


def machines(summaries: Sequence[dict]) -> str:
    """Where the runs were trained, in a sentence."""
    places = sorted({place for summary in summaries for found in summary["trained_on"].values() for place in found})
    return f"Trained on {' and on '.join(places)}." if places else ""


def outdated(root: Path, summary: dict) -> list[str]:
    """A line where other questions' results have changed since this question's part was written; else none."""
    before = summary["rests_on"]
    changed = [run for run, digest in digests(root, before).items() if digest != before[run]]
    if not changed:
        return []
    again = script(summary["question"])
    return [f"**{', '.join(changed)} changed since the next part was written: `python {again} --replot`.**\n"]


def load_summary(path: Path) -> dict:
    """What `write_report` wrote of a question. Raises UserError where it is damaged."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not all(type(v["claim"]) is str and v["verdict"] and v["parts"] for v in summary["verdicts"]):
            raise ValueError("its claims are none")
        summary["figures"] + summary["practices"] + [], summary["question"] + summary["section"]
        dict(summary["rests_on"]), dict(summary["trained_on"]), [in_short(v) for v in summary["verdicts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): delete it, and run that question with --replot") from error
    return summary


def figures_head(root: Path) -> str:
    """With a measure of the distances: those between trainings of question 1's network, the report's and ours."""
    theirs = {f["figure"]: f["validation_accuracy"] for f in the_report()["figures"] if f["figure"] in ("1b", "5", "9")}
    apart = ", ".join(
        f"{mean_distance(theirs[one], theirs[other]):.1f} (Figures {one} and {other})"
        for one, other in combinations(theirs, 2)
    )
    ours = [[h["validation_accuracy"] for h in r["history"]] for r in load_results(root / "q1" / "convnet")]
    if len(ours) > 1:
        pairs = [mean_distance(*pair) for pair in combinations(ours, 2)]
        apart += f"; our seeds are {min(pairs):.1f} to {max(pairs):.1f} apart"
    return FIGURES_HEAD.format(apart=apart)


def noise_of_training(root: Path) -> str:
    """Where the intervals have it from, in words."""
    measured, groups = [], []
    for question, run in REPEATED:
        accuracies = np.array([*map(test_accuracy, load_results(root / question / run))])
        if len(accuracies) > 1:
            groups.append(accuracies)
            measured.append(f"{run} ({question}) {accuracies.std(ddof=1):.2f} over {len(accuracies)} seeds")
    if spread := pooled_variance(groups):
        pooled = f"{math.sqrt(spread.value):.2f} points of test accuracy with {spread.df} degrees of freedom"
        borrowed = (
            f"is taken from settings of questions 1 to 3 that were repeated for it: {', '.join(measured)}; {pooled}"
        )
    else:
        runs = ", ".join(f"{run} ({question})" for question, run in REPEATED)
        borrowed = f"is to be measured by further seeds of {runs}; until then their intervals lack it, and say so"
    return NOISE.format(borrowed=borrowed, unsteady=UNSTEADY)


def verdict_table(summaries: Sequence[dict]) -> list[str]:
    """The report's claims and what became of them; the evidence stands with each question."""
    rows = [
        [v["claim"], v["report"], in_short(v), judging(summary["question"])]
        for summary in summaries
        for v in summary["verdicts"]
    ]
    return markdown_table([["claim", "the report says", "here", "command"], *rows])


def judging(question: str) -> str:
    """The command that draws and judges anew what there is of a question."""
    return f"`python {script(question)} --replot`"


SAMPLE_HEAD = """# SAMPLE: trained on the small bundled excerpt, not on CIFAR-10

A trial of the scripts, not a reproduction: 1,500 training images, small batches, 500 test images.
"""
PAGE_HEAD = """# A report on convolutional networks for CIFAR-10, reproduced

Written by the question scripts from the JSON files beside it; do not edit.

**Scope.** The report's runs, {done} of {total} so far, trained with the settings of its published code on the official
CIFAR-10, one seed each unless the table says more; some runs of ours beside them, and question 5 beyond it.
Accuracies are in percent. "-" has not been run, is not in the report, or does not apply.
{machines}

What became of the report's ten claims. "Without the noise of training": judged on one seed; another might change this,
and nothing here says yet by how much.
"""
READING_HEAD = """Below: the report's figures in order, what its way of measuring is worth, and every question with all its runs.

**How to read it.** The report tests the weights of the last epoch on the first 1,000 test images (for question 4 its code
does not tell which weights); so does the column beside its numbers. It validates on augmented images in questions 3.1 and
4; so does "validation: report / ours", with the best epoch on those. Where its figure shows a number that its text prints
otherwise, or a validation accuracy that its text lacks, the figure's follows in brackets; a test accuracy that stands in
the figure alone is given as if printed. What we would report is next: "best epoch" and its weights,
chosen on validation images as they are, on all 10,000 test images, with the 95 % Wilson interval of one seed, or mean ±
standard deviation of several. "time" is that of all epochs a run is read from, summed over seeds; it is longer where the
machine did other work or other trainings meanwhile. Runs of one seed have the same first weights, data order and
augmentation on every machine; another kind of machine rounds differently, and draws other units for dropout.

**Verdicts.** A claim about a difference *holds* or *does not hold* where the 95 % interval of the difference excludes
zero; else it is *within noise*. A verdict is on the direction of a claim, not on the size of the numbers in it; but claim
1 asks for a validation loss that ends more than 5 % above its lowest, and claim 7 for a difference within ±2 points.
Claim 2 is judged by smoothness alone: edges and colours are for the eye. A claim of several parts holds where all of them
do, does not where one is reversed in an interval widened for as many comparisons (Bonferroni), and else is *not run* as
long as one of them has not been. Accuracies are those of the best weights, over the seeds that all runs compared have: on
the 10,000 test images one by one, on the validation images as if every run had its own, which is cautious. The loss gaps
of claims 6 and 9 are the last epoch's. The interval holds the noise of the images and that of training.
"""
NOISE = """**The noise of training.** Where two runs share three seeds or more, the scatter of their differences measures it. For
runs that share fewer it {borrowed}. Where one
of the two runs has several seeds, they are pooled with these. If their standard deviation is more than {unsteady:g} times
the pooled one, that run's noise is taken from its own seeds alone; from two seeds this gives a very wide interval. An
unsteady run of one seed cannot be told from a steady one: with much dropout, the intervals of one seed are too narrow.
Question 5 uses its own seeds alone. Two patiences read the same training, so the scatter of other trainings says nothing
about their difference: of one seed, these intervals hold the noise of the images alone.
"""
FIGURES_HEAD = """Ours carry the report's curves in the same axes, thin and grey. The report's loss axes are divided by the batch size,
200; both are cross entropy here. The distance is the mean absolute difference over the epochs both have. As a measure of
it: the report's own trainings of question 1's network are so many points of accuracy apart: {apart}.
"read ±" is the standard error of reading the curve off the report's figure (`report.json` says how); smoothness is that
of claim 2.
"""
PRACTICES_HEAD = """The authors published their code, which is why we can know. None of this is unusual in a course's homework, and each is
worth knowing when numbers are compared.
"""


def write_report(
    question: str,
    doc: str,
    runs: Sequence[Run],
    args: argparse.Namespace,
    claims: Sequence[Claim] = (),
    figures: Callable[[Results], dict[str, Figure]] | None = None,
    tables: Callable[[Results], list[Table]] | None = None,
    practices: Callable[[Results], list[list[str]]] | None = None,
    beside: dict[str, str] | None = None,
    changed: Collection[str] = (),
    show: bool = False,
) -> None:
    """Figures, summary.json and the page, from what is in `results/` alone.

    doc: the script's docstring: its first line is the heading, its prose the introduction. figures: of all results, by
    file name. tables: further ones. practices: what the report did, and what it changes. beside: other questions' runs
    that these functions want (run: question). changed: the runs with a new result; the figures of the others are drawn
    where they are missing, or with --replot. show: print tables and verdicts.
    """

    def write() -> None:
        folder = question_folder(question, args)
        with file_lock(folder.parent / ".page.lock"), plain_style():
            results = read_question(folder, [run.name for run in runs], beside or {})
            own = {run: found for run, found in results.items() if run not in (beside or {})}
            own = Results(own, results.repeated, folder)
            draw_runs(own, own if args.replot else changed)
            drawings = figures(results) if figures else {}
            for name, figure in drawings.items():
                save_figure(figure, folder / name)
            names = [run.name for run in runs]
            found_tables = [run_table(question, names, own, args.sample), *(tables(results) if tables else [])]
            verdicts = [claim.judge(results) for claim in claims]
            summary = {
                "question": question,
                "trained_on": {run: trained_on(found) for run, found in own.items()},
                "verdicts": verdicts,
                "figures": [] if args.sample else figure_rows(question, own),
                "practices": practices(results) if practices else [],
                "rests_on": digests(folder.parent, others_results(question, beside or {})),
                "section": question_section(question, doc, own, found_tables, verdicts, drawings),
            }
            text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
            write_atomic(folder / "summary.json", text.encode())
            write_page(folder.parent, args.sample)
        if show:
            print_report(folder, found_tables, verdicts, args.sample)

    on_first(write)


def read_question(folder: Path, runs: Sequence[str], beside: dict[str, str]) -> Results:
    """All results of a question: of its runs, in order, then of whatever else is there, then of other questions'.

    The noise of the report's kind of training is that of its repeated settings; question 5 has its own seeds.
    """
    others = sorted(path.name for path in folder.glob("*/") if path.name not in runs)
    found = {run: load_results(folder / run) for run in [*runs, *others]}
    found |= {run: load_results(folder.parent / question / run) for run, question in beside.items()}
    found = {run: seeds for run, seeds in found.items() if seeds}
    return Results(found, repeated_results(folder.parent) if folder.name in the_report()["numbers"] else (), folder)


def trained_on(found: Sequence[dict]) -> list[str]:
    """The machines of a run's seeds, and with what they computed."""
    environments = [e for result in found for e in (*result["earlier_environments"], result["environment"])]
    return sorted({f"{e['device']} (convolutions in {e['precision']}, torch {e['torch']})" for e in environments})


def repeated_results(root: Path) -> list[list[dict]]:
    found = [load_results(root / question / run) for question, run in REPEATED]
    return [seeds for seeds in found if len(seeds) > 1]


def others_results(question: str, beside: dict[str, str]) -> list[str]:
    """The folders of other questions' runs that a question's numbers rest on."""
    repeated = REPEATED if question in the_report()["numbers"] else ()
    runs = [*repeated, *((other, run) for run, other in beside.items())]
    return [f"{other}/{run}" for other, run in runs if other != question]


def digests(root: Path, run_folders: Iterable[str]) -> dict[str, str]:
    """Of the results in each folder, all seeds'."""
    found = {}
    for folder in run_folders:
        content = b"".join(path.read_bytes() for path in sorted((root / folder).glob("seed*.json")))
        found[folder] = hashlib.sha256(content).hexdigest()[:16]
    return found


def print_report(folder: Path, tables: Sequence[Table], verdicts: Sequence[dict], sample: bool) -> None:
    """The tables without their commands, and the verdicts, on the screen."""
    print(SAMPLE_HEAD.splitlines()[0] if sample else "")
    for table in tables:
        rows = [row[:-1] for row in table] if table[0][-1] == "command" else table
        widths = [max(map(len, column)) for column in zip(*rows)]
        print("".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows))
    for found in verdicts:
        print(f"claim {found['claim']}: {found['report']}\n  {found['verdict']}")
        print("".join(f"    {line}\n" for line in evidence(found)), end="")
    print(f"\nfigures and numbers: {folder}/, page: {folder.parent / 'README.md'}")
