"""Results as read from JSON, the report's own numbers, and differences between runs with their intervals.

A run's results are one `Result` per seed. All intervals are 95 %, over trainings, on the same images.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.fft import dctn
from scipy.stats import t, ttest_ind

from common import Run, Settings, on_sample, seed_files, shaping
from parts.machine import UserError, tell

HERE = Path(__file__).resolve().parent
WIDE = 10  # points to either side: an interval so wide says little
UNSTEADY_DROPOUT = 0.4  # from this rate on seeds lie further apart than elsewhere: before the pooling by many points

tell_once = functools.cache(tell)  # results are read several times


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
    def is_trial(self) -> bool:
        """Did --epochs or --precision name it? The overview and the pooled noise leave it out."""
        return len(split_name(self.run)) > 1

    @property
    def chosen_weights(self) -> str:
        """Which weights are the result: the best ones, but the last ones of a schedule that ends at zero."""
        return "last" if self.settings["schedule"] == "linear" else "best"

    @property
    def is_steady(self) -> bool:
        return self.settings["dropout"] < UNSTEADY_DROPOUT

    def as_the_report(self, curve: str) -> np.ndarray:
        """A curve; of validation on augmented images where training images are augmented, as in the report."""
        return self.curves.get(f"augmented_{curve}", self.curves[curve])

    def training(self) -> str:
        """The same for all seeds, and for all readings of one training."""
        return json.dumps({k: v for k, v in shaping(self.settings).items() if k not in ("seed", "precision")})

    def identity(self) -> tuple:
        """The same for all readings of one training with one seed, on one machine in one precision."""
        return self.training(), self.seed, self.curves["train_loss"][0]


Results = dict[str, list[Result]]  # by run, one per seed, in order of seeds


def read_result(path: Path) -> Result:
    """Raises UserError where it cannot be read, lacks a part, or where a number is no number."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        history, tests = found["history"], found["test"]
        readings = [(weights, images) for weights in ("best", "last") for images in ("report_images", "all_images")]
        result = Result(
            path=path,
            question=found["question"],
            run=found["run"],
            seed=found["seed"],
            settings=Settings().as_dict() | found["settings"],  # newer ones were at their default
            environments=[*found["earlier_environments"], found["environment"]],
            parameters={name: found["parameters"][name] for name in ("trainable", "layers")},
            best_epoch=found["best_epoch"],
            curves={name: np.array([epoch[name] for epoch in history]) for name in history[0]},
            tests={(weights, images): float(tests[weights][images]["accuracy"]) for weights, images in readings},
            confusion={weights: np.array(tests[weights]["confusion"]).reshape(10, 10) for weights in ("best", "last")},
            digest=hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16],
        )
        lacking = any({"device", "precision", "torch", "from_epoch"} - here.keys() for here in result.environments)
        finite = all(np.isfinite(numbers).all() for numbers in [*result.curves.values(), *result.tests.values()])
        impossible = path.stem != f"seed{result.seed}" or not 0 < result.best_epoch <= result.epochs
        if lacking or not finite or impossible:
            raise ValueError("a part is missing, or a number in it is impossible")
        return result
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): restore it, or delete it and run again") from error


def read_run(folder: Path, sample: bool = False, replaced: Collection[Path] = ()) -> list[Result]:
    """A run's results, one per seed, but for those that are about to be replaced; none where the folder is a copy of
    another run's.

    Raises UserError where one is damaged, where they disagree in a setting, or where not all are of the sample
    (`sample`) or of CIFAR-10 (else).
    """
    found = [result for result in map(read_result, seed_files(folder)) if result.path not in replaced]
    found.sort(key=lambda result: result.seed)
    for result in found:
        if (result.question, result.run) != (folder.parent.name, folder.name):
            tell_once(f"{folder} holds results of {result.question}'s {result.run}, a copy: not counted")
            return []
        if result.is_sample != sample:
            where, data = "the sample's" if sample else "CIFAR-10's", result.settings["data"]
            raise UserError(f"{result.path} has data {data!r}, and stands among {where} results: move it away")
        require_same_settings(result, found[0].settings, found[0].path)
        if result.parameters != found[0].parameters:
            raise UserError(f"{result.path} is of another network than {found[0].path}: move one of them away")
    return found


def require_same_settings(result: Result, settings: dict, of: object) -> None:
    """But for the seed, and the precision, which tables name where it differs. Raises UserError."""
    for name, value in settings.items():
        if name not in ("seed", "precision") and result.settings.get(name) != value:
            raise UserError(
                f"{result.path} has {name} {result.settings.get(name)!r}, but {of} has {value!r}: "
                "a run's results must have the same settings; move this one away, or rename the run"
            )


def read_question(folder: Path, declared: Sequence[Run], sample: bool, replaced: Collection[Path] = ()) -> Results:
    """The results of a question's declared runs, in order, then of others in its folder (options name some); but for
    those that are about to be replaced. Raises UserError where results cannot be read, or where their settings are not
    those that their run is declared with.
    """
    settings = {run.name: on_sample(run.settings) if sample else run.settings for run in declared}
    results = {}
    for name in [*settings, *sorted({path.name for path in folder.glob("*/")} - settings.keys())]:
        found = read_run(folder / name, sample, replaced)
        if found:
            results[name] = found
        if found and name in settings:  # they have the same settings among themselves
            require_same_settings(found[0], settings[name].as_dict(), f"the run {name} of {folder.name}")
    return results


def read_questions(root: Path, replaced: Collection[Path] = ()) -> dict[str, Results]:
    """Of all the report's questions, but for runs that --epochs or --precision named."""
    questions = {}
    for name in the_report()["numbers"]:
        results = read_question(root / name, [], sample=False, replaced=replaced)
        questions[name] = {run: found for run, found in results.items() if not found[0].is_trial}
    return questions


def read_beside(root: Path, paths: Sequence[str], sample: bool) -> Results:
    """Runs of other questions: "q1/convnet"."""
    found = {path.split("/")[1]: read_run(root / path, sample) for path in paths}
    return {run: results for run, results in found.items() if results}


def read_arrays(result: Result) -> dict[str, np.ndarray]:
    """Beside a result: the first layer's filters `before` training and at the `last` epoch, [C_out, 3, K, K], and
    `step_losses` [epochs, steps]. Raises UserError where it is missing, damaged, or of another training.
    """
    path = result.path.with_suffix(".npz")
    advice = f"restore it, or delete it and {result.path.name} and run again"
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in ("before", "last", "step_losses")}
    except Exception as error:  # a damaged file fails anywhere in zipfile, zlib or numpy
        raise UserError(f"{path} is missing or damaged ({error}): {advice}") from error
    losses, steps = result.curves["train_loss"], arrays["step_losses"]
    means = np.sort([steps.mean(1), steps[:, : max(1, steps.shape[1] - 1)].mean(1)], 0)  # a last batch may be smaller
    if len(steps) != len(losses) or not np.allclose(np.clip(losses, *means), losses, rtol=1e-3, atol=0):
        raise UserError(f"{path} is of another training than {result.path.name} beside it: {advice}")
    return arrays


# -------------------------------------------------------------------------------------------------------- the report


@functools.cache
def the_report() -> dict:
    """Its "numbers", which it prints; its "figures", read as "about" says; the "filters" of its Figures 2
    ("before") and 3 ("last"), [128, 3, 3, 3], up to a factor. Their zero is not printed: before training it is the
    middle of the range, as PyTorch draws them; after it, it is taken to be the mean.
    """
    found = json.loads((HERE / "report.json").read_text(encoding="utf-8"))
    with np.load(HERE / "filters.npz") as saved:
        before, after = saved["before"], saved["after"]
    return found | {"filters": {"before": before - 127.5, "last": after - after.mean()}}


def reported(question: str, run: str) -> dict:
    """The percentages the report prints for a run: `validation`, of the best epoch (or a range), and `test`."""
    return the_report()["numbers"].get(question, {}).get(run, {})


def figures_of(run: str) -> list[dict]:
    """The report's figures that show this run, in whichever question."""
    return [figure for figure in the_report()["figures"] if figure["run"] == run]


def smoothness(filters: np.ndarray) -> tuple[float, int]:
    """Percent of a filter's energy in three of the cosine transform's nine patterns, the constant and both ramps; mean
    over filters [C_out, 3, 3, 3], and over how many: those that are zero have none. White noise has a third.
    """
    energy = (dctn(filters.astype(float), axes=(2, 3), norm="ortho") ** 2).sum(1)  # [C_out, 3, 3]
    total = energy.sum((1, 2))
    smooth = (energy[:, 0, 0] + energy[:, 0, 1] + energy[:, 1, 0])[total > 0]
    if not smooth.size:
        return 0.0, 0
    return float(100 * np.mean(smooth / total[total > 0])), int(smooth.size)


def curve_distance(figure: dict, results: Sequence[Result], curve: str) -> float:
    """Mean absolute difference of a curve from the report's, over the epochs both have; mean over seeds."""
    apart = []
    for result in results:
        epochs = min(result.epochs, len(figure[curve]))
        apart.append(np.abs(result.as_the_report(curve)[:epochs] - figure[curve][:epochs]).mean())
    return float(np.mean(apart))


# ---------------------------------------------------------------------------------------------------------- measures


def gap(result: Result) -> float:
    """Validation loss - training loss in the last epoch, augmented alike."""
    return result.as_the_report("validation_loss")[-1] - result.curves["train_loss"][-1]


MEASURES = {  # numbers of one training
    "test": lambda result: result.tests[result.chosen_weights, "all_images"],
    "alike": lambda result: result.tests["last", "report_images"],  # as the report tests
    "validation": lambda result: result.curves["validation_accuracy"][result.best_epoch - 1],
    "alike_validation": lambda result: result.as_the_report("validation_accuracy").max(),
    "restored": lambda result: result.tests["best", "all_images"] - result.tests["last", "all_images"],
    "easier": lambda result: result.tests["last", "report_images"] - result.tests["last", "all_images"],
    # points of validation accuracy, mean over epochs: on augmented images - on plain ones
    "augmentation_adds": lambda r: (r.as_the_report("validation_accuracy") - r.curves["validation_accuracy"]).mean(),
    "gap": gap,
    "narrowness": lambda result: -abs(gap(result)),  # how near to zero the gap is
    # percent by which the validation loss ends above its lowest value
    "rise": lambda r: 100 * (r.as_the_report("validation_loss")[-1] / r.as_the_report("validation_loss").min() - 1),
}
DIGITS = {"gap": 3, "narrowness": 3}  # that tables print; 2 of all others
UNITS = {"gap": "in loss", "narrowness": "in loss", "rise": "%"}  # points of accuracy of all others


def measure(result: Result, what: str) -> float:
    return float(MEASURES[what](result))


def values(results: Sequence[Result], what: str) -> np.ndarray:
    """Of every seed, [seeds]."""
    return np.array([measure(result, what) for result in results])


def mean(results: Sequence[Result], what: str) -> float:
    """As tables print it. Differences are those of these numbers, so that a reader can subtract."""
    return round(float(values(results, what).mean()), DIGITS.get(what, 2)) + 0.0  # no negative zero


# ------------------------------------------------------------------------------------------------------------- noise


class Noise(NamedTuple):
    """How far seeds lie apart: a standard deviation and its degrees of freedom."""

    deviation: float
    df: int

    def half(self, factor: float) -> float:
        """Half of the 95 % interval of what has `factor` times the variance of one seed (Student's t)."""
        return float(t.ppf(0.975, self.df)) * self.deviation * math.sqrt(factor)


def pooled(groups: Iterable[np.ndarray]) -> Noise | None:
    """Over groups of equal variance, [seeds] or [readings, seeds] each; of readings of the same seeds the mean
    variance. None where no group has several seeds, or all seeds agree, by chance.
    """
    groups = [np.atleast_2d(group) for group in groups]
    df = sum(group.shape[1] - 1 for group in groups)
    squares = sum(group.shape[1] * group.var(axis=1).mean() for group in groups)
    return Noise(math.sqrt(squares / df), df) if squares > 1e-9 else None


def steady_noise(runs: Iterable[Sequence[Result]], what: str) -> Noise | None:
    """Pooled over the steady runs but for trials. Runs that read one training, so of the same seeds, count as one."""
    trainings: dict[str, list[np.ndarray]] = {}
    for results in runs:
        if results and results[0].is_steady and not results[0].is_trial:
            trainings.setdefault(results[0].training(), []).append(values(results, what))
    groups = []
    for readings in trainings.values():
        most = max(map(len, readings))  # a reading of fewer seeds than another says nothing new
        groups.append([reading for reading in readings if len(reading) == most])
    return pooled(groups)


class Difference(NamedTuple):
    """Between two runs, and half of its 95 % interval; None where nothing tells how far seeds lie apart."""

    value: float
    half: float | None


def difference(one: Sequence[Result], other: Sequence[Result], what: str, noise: Noise | None) -> Difference:
    """one - other. noise: of the question's steady runs. Two readings of the same trainings are compared seed by seed,
    unsteady runs by Welch's test, which needs several seeds of both.
    """
    value = round(mean(one, what) - mean(other, what), DIGITS.get(what, 2))
    ours, theirs = values(one, what), values(other, what)
    factor = 1 / len(ours) + 1 / len(theirs)
    if [result.identity() for result in one] == [result.identity() for result in other]:
        noise, factor = pooled([ours - theirs]), 1 / len(ours)
    elif not (one[0].is_steady and other[0].is_steady):
        if min(len(ours), len(theirs)) == 1 or not np.ptp(ours) + np.ptp(theirs):
            return Difference(value, None)
        low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        return Difference(value, float(high - low) / 2)
    return Difference(value, noise.half(factor) if noise else None)


def one_more(results: Sequence[Result], noise: Noise | None) -> float | None:
    """How far from the mean one more seed of a run would fall, tested as the report does: half of the 95 % prediction
    interval; of an unsteady run by its own seeds. None where fewer than two degrees of freedom tell how far seeds lie
    apart.
    """
    own = values(results, "alike")
    if not results[0].is_steady:
        noise = pooled([own])
    if noise is None or noise.df < 2:
        return None
    return noise.half(1 + 1 / len(own))


@dataclass(frozen=True)
class ReportRow:
    """A test accuracy that the report prints, beside our trainings of the same run."""

    question: str
    run: str
    reported: float
    results: list[Result]
    half: float | None  # how far from our mean one more seed would fall; None where nothing tells

    @property
    def verdict(self) -> str:
        """Could the report's number be one more seed of ours? A wide interval says little."""
        if self.half is None:
            return "too few seeds" if self.results else "not trained"
        inside = abs(self.reported - values(self.results, "alike").mean()) <= self.half
        return ("inside" if inside else "outside") + (", but wide" if self.half > WIDE else "")


def noise_alike(runs: Iterable[Sequence[Result]], network: str) -> Noise | None:
    """Over all steady runs of a network, of the accuracy as the report tests."""
    of_it = [results for results in runs if results and results[0].settings["network"] == network]
    return steady_noise(of_it, "alike")


def report_rows(questions: dict[str, Results]) -> list[ReportRow]:
    """In the report's order, without question 2's first row, which is question 1's training again."""
    found = {}
    for question, runs in the_report()["numbers"].items():
        for run, printed in runs.items():
            if "test" in printed and (question, run) != ("q2", "convnet"):
                found[question, run] = questions[question].get(run, [])
    found["q1", "convnet"] = found["q1", "convnet"] or questions["q2"].get("convnet", [])  # the same training
    rows = []
    for (question, run), results in found.items():
        noise = noise_alike(found.values(), results[0].settings["network"]) if results else None
        half = one_more(results, noise) if results else None
        rows.append(ReportRow(question, run, reported(question, run)["test"], results, half))
    return rows


# ------------------------------------------------------------------------------------------------------------- names

NAMES = {  # what stands in a run's name -> what people read, one after the other
    "^convnet": "ConvNet",
    "^batchnorm": "batch norm",
    r"_patience(\d+)$": r" (patience \1)",
    "_full$": " (50 epochs)",
    "^baseline$": "baseline (30 epochs)",
    "^baseline_20$": "baseline (20 epochs)",
    "^flip_p": "flip ",
    "^color_jitter$": "colour jitter",
    "^dropout_after_pool_(.*)": r"dropout \1 after the pooling",
    "^frozen_train_mode_": "frozen in training mode on ",
    "^frozen_": "frozen on ",
    "^finetune_": "fine-tuned on ",
    " on imagenet$": " on ImageNet's features",
    " on vgg11_bn_features_tinyimagenet_69a37b9f$": " on Tiny-ImageNet's features (a stand-in)",  # the committed one
    r" on (\S+)$": r" on \1 (a stand-in)",
    "_no_": " without ",
}


def split_name(run: str) -> list[str]:
    """The name of a declared run, and what --epochs and --precision appended to it."""
    return re.split(r"_(?=(?:\d+epochs(?:_(?:fp32|bf16|fp16))?|fp32|bf16|fp16)$)", run)


def name_of(run: str) -> str:
    """A run's name for people."""
    name, *options = split_name(run)
    text = name
    for pattern, words in NAMES.items():
        text = re.sub(pattern, words, text)
    if any(option.endswith("epochs") for option in options):
        text = re.sub(r" \(\d+ epochs\)", "", text)
    text = text.replace("_", " + " if name.startswith("crop_") else " ")
    return ", ".join(["VGG11_bn from scratch" if name == "scratch" else text, *options])
