"""Results as read from JSON, the report's own numbers, and differences between runs with their intervals.

A run's results are one `Result` per seed. All intervals are 95 %, over trainings, on CIFAR-10's fixed test set.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.fft import dctn
from scipy.stats import t, ttest_ind

from common import Run, Settings, on_sample
from parts.machine import UserError, tell

HERE = Path(__file__).resolve().parent
UNSTEADY_DROPOUT = 0.4  # from this rate on seeds lie further apart than elsewhere: before the pooling by many points


# ----------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """One training, as its seed<N>.json tells it. Accuracies are in percent, losses are cross entropy."""

    path: Path
    question: str
    run: str
    seed: int
    settings: dict
    environments: list[dict]  # where its epochs were trained, in order
    parameters: dict
    best_epoch: int
    curves: dict[str, np.ndarray]  # train_loss, validation_loss, validation_accuracy, seconds, ...: [epochs]
    tests: dict[tuple[str, str], float]  # ("best" or "last" weights, "report_images" or "all_images") -> accuracy
    confusion: dict[str, np.ndarray]  # "best" or "last" weights -> [true, predicted]
    digest: str  # of all it says

    @property
    def epochs(self) -> int:
        return len(self.curves["train_loss"])

    @property
    def is_sample(self) -> bool:
        return self.settings["data"] == "cifar10-sample"

    @property
    def weights(self) -> str:
        """Which weights are the result: the best ones, but the last ones of a schedule that ends at zero."""
        return "last" if self.settings["schedule"] == "linear" else "best"

    @property
    def is_steady(self) -> bool:
        return self.settings["dropout"] < UNSTEADY_DROPOUT

    def as_the_report_validates(self, curve: str) -> np.ndarray:
        """A validation curve; on augmented images where training images are augmented, as in the report."""
        return self.curves.get(f"augmented_{curve}", self.curves[curve])

    def training(self) -> str:
        """The same for all seeds, and for all readings of one training."""
        reading = {"seed", "precision", "patience"} | ({"epochs"} if self.settings["schedule"] != "linear" else set())
        return json.dumps({k: v for k, v in self.settings.items() if k not in reading})


Results = dict[str, list[Result]]  # by run, one per seed, in order of seeds


def read_result(path: Path) -> Result:
    """Raises UserError where it cannot be read, lacks a part, or where a number is no number."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.stem != f"seed{found['seed']}":
            raise ValueError(f"it is of seed {found['seed']}")
        history, tests = found["history"], found["test"]
        curves = {name: np.array([h[name] for h in history]) for name in history[0]}
        values = np.concatenate([curve.astype(float, casting="safe") for curve in curves.values()])
        accuracies = {
            (weights, images): float(tests[weights][images]["accuracy"])
            for weights in ("best", "last")
            for images in ("report_images", "all_images")
        }
        if not np.isfinite([*values, *accuracies.values()]).all():
            raise ValueError("a number in it is not finite")
        layers = [(row["layer"], row["type"], int(row["parameters"])) for row in found["parameters"]["layers"]]
        environments = [*found["earlier_environments"], found["environment"]]
        if not layers or not all({"device", "precision", "torch", "from_epoch"} <= e.keys() for e in environments):
            raise ValueError("it does not say where it was trained")
        return Result(
            path=path,
            question=found["question"],
            run=found["run"],
            seed=found["seed"],
            settings=Settings().as_dict() | found["settings"],  # newer ones were at their default
            environments=environments,
            parameters={"trainable": int(found["parameters"]["trainable"]), "layers": found["parameters"]["layers"]},
            best_epoch=range(1, len(history) + 1)[found["best_epoch"] - 1],
            curves=curves,
            tests=accuracies,
            confusion={weights: np.array(tests[weights]["confusion"]).reshape(10, 10) for weights in ("best", "last")},
            digest=hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16],
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): restore it, or delete it and run again") from error


def read_run(folder: Path) -> list[Result]:
    """A run's results, one per seed. Raises UserError where one is damaged or they disagree in a setting."""
    paths = [path for path in folder.glob("seed*.json") if path.stem.removeprefix("seed").isdecimal()]
    found = sorted((read_result(path) for path in paths), key=lambda result: result.seed)
    for other in found[1:]:
        require_same_settings(other, found[0].settings, found[0].path)
    return found


def require_same_settings(result: Result, settings: dict, of: object) -> None:
    """But for the seed, and the precision, which tables name where it differs. Raises UserError."""
    for name, value in settings.items():
        if name not in ("seed", "precision") and result.settings[name] != value:
            raise UserError(
                f"{result.path} has {name} {result.settings[name]!r}, but {of} has {value!r}: "
                "a run's results must have the same settings; move this one away, or rename the run"
            )


def read_question(folder: Path, declared: Sequence[Run], sample: bool, replaced: Iterable[str] = ()) -> Results:
    """The results of a question's declared runs, in order, then of runs whose names its options made.

    replaced: names of files that are about to be. Raises UserError where results cannot be read, or where their
    settings are not those of their run.
    """
    question, names, results = folder.name, [run.name for run in declared], {}
    others = sorted(path.name for path in folder.glob("*/") if path.name not in names)
    for name in [*names, *others]:
        found = [] if (folder / name).is_symlink() and not (folder / name).exists() else read_run(folder / name)
        if found and (found[0].run, found[0].question) != (name, question):
            tell(f"{folder / name} holds results of {found[0].question}'s {found[0].run}, a copy: not counted")
            continue
        if found:
            results[name] = found
    for run in declared:
        settings = on_sample(run.settings) if sample else run.settings
        for result in results.get(run.name, ()):
            if result.path.name not in replaced:
                require_same_settings(result, settings.as_dict(), f"the run {run.name} in {question}'s script")
    for result in (result for found in results.values() for result in found):
        if result.is_sample != sample:
            where = "the sample's" if sample else "CIFAR-10's"
            data = result.settings["data"]
            raise UserError(f"{result.path} has data {data!r}, and stands among {where} results: move it away")
    return results


def read_arrays(result: Result) -> dict[str, np.ndarray]:
    """Beside a result: the first layer's filters `before` training and at the `last` epoch, [C_out, 3, K, K], and
    `step_losses` [epochs, steps]. Raises UserError where it is missing, damaged, or of another training.
    """
    path = result.path.with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in ("before", "last", "step_losses")}
    except Exception as error:  # a damaged file fails anywhere in zipfile, zlib or numpy
        raise UserError(f"{path} is missing or damaged ({error}): restore it, or run again") from error
    means = arrays["step_losses"].mean(1)  # of the epochs; a last batch may be smaller
    if means.shape != result.curves["train_loss"].shape or not np.allclose(means, result.curves["train_loss"], 2e-3):
        raise UserError(f"{path} is of another training than {result.path.name} beside it: restore it, or run again")
    return arrays


# -------------------------------------------------------------------------------------------------------- the report


@functools.cache
def the_report() -> dict:
    """What the report prints and what its figures show; it says in it how it was read. Raises UserError."""
    path = HERE / "report.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["numbers"]["q1"], found["figures"][0]["figure"]
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}, a part of this repository, is missing or damaged: restore it with git") from error


@functools.cache
def report_filters() -> dict[str, np.ndarray]:
    """First-layer filters of the report's Figures 2 ("before") and 3 ("last"), [128, 3, 3, 3], up to a factor. Their zero
    is not printed: before training it is the middle of the range, as PyTorch draws them; after training it is taken to be
    the mean. Raises UserError.
    """
    path = HERE / "filters.npz"
    try:
        with np.load(path) as saved:
            return {"before": saved["before"] - 127.5, "last": saved["after"] - saved["after"].mean()}
    except Exception as error:  # a damaged file fails anywhere in zipfile, zlib or numpy
        raise UserError(f"{path}, a part of this repository, is missing or damaged: restore it with git") from error


def reported(question: str, run: str) -> dict:
    """The percentages the report prints for a run: `validation`, of the best epoch, and `test`; empty where it has none."""
    return the_report()["numbers"].get(question, {}).get(run, {})


def figures_of(run: str) -> list[dict]:
    """The report's figures that show this run, in whichever question."""
    return [figure for figure in the_report()["figures"] if figure["run"] == run]


def smoothness(filters: np.ndarray) -> tuple[float, int]:
    """Percent of a filter's energy in its three smoothest patterns, the mean over filters; and over how many that is:
    filters that are zero have none. White noise has a third.

    filters: [C_out, 3, 3, 3]. The patterns are those of the two-dimensional cosine transform: constant, horizontal ramp,
    vertical ramp; of nine.
    """
    energy = (dctn(filters.astype(float), axes=(2, 3), norm="ortho") ** 2).sum(1)  # [C_out, 3, 3]
    total = energy.sum((1, 2))
    smooth = (energy[:, 0, 0] + energy[:, 0, 1] + energy[:, 1, 0])[total > 0]
    return float(100 * np.mean(smooth / total[total > 0])) if smooth.size else 0.0, int(smooth.size)


def curve_distance(figure: dict, results: Sequence[Result], curve: str) -> float | None:
    """Mean absolute difference of a curve from the report's, over the epochs both have; mean over seeds."""
    if curve not in figure:
        return None
    theirs = np.array(figure[curve])
    apart = []
    for result in results:
        ours = result.as_the_report_validates(curve) if curve.startswith("validation") else result.curves[curve]
        epochs = min(len(ours), len(theirs))
        apart.append(np.abs(ours[:epochs] - theirs[:epochs]).mean())
    return float(np.mean(apart))


# ---------------------------------------------------------------------------------------------------------- measures

DIGITS = {"gap": 3, "narrowness": 3}  # that tables print; 2 of all others
UNITS = {"gap": "in loss", "narrowness": "in loss", "rise": "%"}  # points of accuracy of all others


def measure(result: Result, what: str) -> float:
    """One number of a training:

    test         accuracy of the result's weights on all test images
    alike        that of the last weights on the first 1,000, as the report tests
    validation   best validation accuracy
    alike_validation  on augmented images where training images are augmented, as the report validates
    gap          validation loss - training loss in the last epoch, augmented alike
    narrowness   how near to zero that is: -|gap|
    rise         percent by which the validation loss ends above its lowest value
    """
    if what == "test":
        return result.tests[result.weights, "all_images"]
    if what == "alike":
        return result.tests["last", "report_images"]
    if what == "validation":
        return float(result.curves["validation_accuracy"][result.best_epoch - 1])
    if what == "alike_validation":
        return float(result.as_the_report_validates("validation_accuracy").max())
    loss = result.as_the_report_validates("validation_loss")
    gap = float(loss[-1] - result.curves["train_loss"][-1])
    return {"gap": gap, "narrowness": -abs(gap), "rise": 100 * float(loss[-1] / loss.min() - 1)}[what]


def values(results: Sequence[Result], what: str) -> np.ndarray:
    """Of every seed, [seeds]."""
    return np.array([measure(result, what) for result in results])


def mean(results: Sequence[Result], what: str) -> float:
    """As tables print it. Differences are those of these numbers, so that a reader can subtract."""
    return round(float(values(results, what).mean()), DIGITS.get(what, 2))


# ------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class Noise:
    """How far seeds lie apart: a standard deviation and its degrees of freedom."""

    deviation: float
    df: int

    def half(self, factor: float) -> float:
        """Half of the 95 % interval of something whose standard error is `factor` deviations (Student's t)."""
        return float(t.ppf(0.975, self.df)) * self.deviation * math.sqrt(factor)


def pooled(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Over groups of equal variance; None where none has several values."""
    groups = [np.asarray(group, float) for group in groups]
    df = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return Noise(math.sqrt(squares / df), df) if df else None


def steady_noise(runs: Iterable[Sequence[Result]], what: str, by_epochs: bool = True) -> Noise | None:
    """Pooled over the steady runs. A training counts once, however many runs read it; with `by_epochs` once for every
    number of epochs.
    """
    trainings: dict[tuple, Sequence[Result]] = {}
    for results in runs:
        if results and results[0].is_steady:
            key = (results[0].training(), results[0].settings["epochs"] if by_epochs else None)
            trainings[key] = max(trainings.get(key, ()), results, key=len)
    return pooled(values(results, what) for results in trainings.values())


@dataclass(frozen=True)
class Difference:
    """Between two runs, and half of its 95 % interval; None where nothing tells how far seeds lie apart."""

    value: float
    half: float | None


def difference(one: Sequence[Result], other: Sequence[Result], what: str, noise: Noise | None) -> Difference:
    """one - other. noise: of the question's steady runs. Two readings of the same trainings are compared seed by seed,
    unsteady runs by Welch's test, which needs several seeds of both.
    """
    value = round(mean(one, what) - mean(other, what), DIGITS.get(what, 2))
    ours, theirs = values(one, what), values(other, what)
    half = None
    if one[0].training() == other[0].training() and [r.seed for r in one] == [r.seed for r in other]:
        own = pooled([ours - theirs])
        half = own.half(1 / len(ours)) if own else None
    elif not (one[0].is_steady and other[0].is_steady):
        if min(len(ours), len(theirs)) > 1:
            low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
            half = float(high - low) / 2
    elif noise:
        half = noise.half(1 / len(ours) + 1 / len(theirs))
    return Difference(value, half)


def one_more(results: Sequence[Result], what: str, noise: Noise | None) -> tuple[float, float] | None:
    """Where one more seed of a run would fall: the 95 % prediction interval. Of an unsteady run by its own seeds, if
    there are three. None where nothing tells.
    """
    own = values(results, what)
    if not results[0].is_steady:
        noise = pooled([own]) if len(own) > 2 else None
    half = noise.half(1 + 1 / len(own)) if noise else None
    return None if half is None else (float(own.mean()) - half, float(own.mean()) + half)


@dataclass(frozen=True)
class ReportRow:
    """A test accuracy that the report prints, beside our trainings of the same run."""

    question: str
    run: str
    reported: float
    results: list[Result]
    interval: tuple[float, float] | None

    @property
    def inside(self) -> bool | None:
        """Could the report's number be one more seed of ours? None where nothing tells."""
        return None if self.interval is None else self.interval[0] <= self.reported <= self.interval[1]


def report_rows(root: Path) -> list[ReportRow]:
    """In the report's order, every training once: question 2 prints question 1's again."""
    numbers = {
        (q, run): row["test"]
        for q, rows in the_report()["numbers"].items()
        for run, row in rows.items()
        if "test" in row
    }
    del numbers["q2", "convnet"]
    found = {(q, run): read_run(root / q / run) for q, run in numbers}
    noise = {}
    for network in {results[0].settings["network"] for results in found.values() if results}:
        of_it = [results for results in found.values() if results and results[0].settings["network"] == network]
        noise[network] = steady_noise(of_it, "alike", by_epochs=False)
    rows = []
    for (question, run), results in found.items():
        interval = one_more(results, "alike", noise[results[0].settings["network"]]) if results else None
        rows.append(ReportRow(question, run, numbers[question, run], results, interval))
    return rows


# ------------------------------------------------------------------------------------------------------------- names

NAMES = {
    "convnet": "ConvNet",
    "baseline": "baseline (30 epochs)",
    "baseline_20": "baseline (20 epochs)",
    "batchnorm": "batch norm",
    "convnet_patience5": "ConvNet (patience 5)",
    "batchnorm_patience5": "batch norm (patience 5)",
    "batchnorm_patience7": "batch norm (patience 7)",
    "convnet_full": "ConvNet (50 epochs)",
    "batchnorm_full": "batch norm (50 epochs)",
    "color_jitter": "colour jitter",
    "scratch": "VGG11_bn from scratch",
}
PARTS = {"frozen_train_mode": "frozen in training mode", "finetune": "fine-tuned", "frozen": "frozen"}


def name_of(run: str) -> str:
    """A run's name for people. Weights that are named by file and hash are a stand-in; a page's footnote says which."""
    if run in NAMES:
        return NAMES[run]
    for part, name in PARTS.items():
        if run.startswith(f"{part}_"):
            source = run.removeprefix(f"{part}_")
            if source == "imagenet":
                return f"{name} on ImageNet's features"
            known = "Tiny-ImageNet's" if "tinyimagenet" in source else "other"
            return f"{name} on {known} features (a stand-in)"
    if run.startswith("dropout_after_pool_"):
        return f"dropout {run.removeprefix('dropout_after_pool_')} after the pooling"
    name = run.replace("flip_p", "flip ").replace("_no_", " without ")
    if run.startswith("crop_"):
        return name.replace("_", " + ")
    return name.replace("_", " ")
