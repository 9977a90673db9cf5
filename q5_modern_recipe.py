"""Question 5, beyond the report: the same network at its best.

    python q5_modern_recipe.py                        # fast, strong, and fast without each of its ingredients
    python q5_modern_recipe.py --only fast --seeds 3  # minutes, with the noise of training
    python q5_modern_recipe.py --sample --only fast   # the bundled images
    python q5_modern_recipe.py --tune                 # every setting that was tried, on held-out training images

The report's best ConvNet reaches 84.6 % after 30 epochs (crop and flip, without batch norm). How far does the same
network with batch norm get, its 7,682,826 parameters unchanged, with what has been learnt since, and how fast? `fast`
is for minutes, `strong` for about an hour on two cores. What we found: results/README.md

The recipe follows airbench (K. Jordan, https://github.com/KellerJordan/cifar10-airbench): Muon for the convolutions and
SGD for the rest, their learning rates linear to zero over all steps, label smoothing, flips and small shifts. Its
numbers were a prototype's, which had been measured on the test images, so the test accuracies of `fast` and `strong`
may be a little too high. --tune looks for better ones without them: trained on the first 45,000 training images,
measured on the last 5,000. Of the changes to `fast` in the last table here none was better, so it stays as it was. For
`strong` the prototype had a heavier augmentation (`heavy`, with a square of 8 x 8 pixels cut out); at a third of the
length both lighter ones did slightly better, within noise. They did equally well, and `strong` takes the larger shifts,
for it is trained three times as long. A linear schedule ends with the last epoch, so with another number of --epochs
the training starts anew.

In two epochs, at the learning rates of `fast`, a schedule that ends at zero and Muon are worth most, then batch norm.
Label smoothing, crop and flip show no effect that three seeds can tell. `strong` is about eight points beyond the
report's best ConvNet with each of three seeds; its training loss ends at half of its validation loss, so it overfits a
little.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import (
    Run,
    Settings,
    Split,
    duration,
    list_runs,
    make_parser,
    question_folder,
    select_runs,
    train_all,
    train_runs,
)

# isort: split
# common stands first: it answers Ctrl-C while torch loads

import numpy as np
import torch
from torch import nn

from augment import Cutout, HorizontalFlip, RandomCrop
from machine import UserError, file_lock, on_first, session, write_atomic
from report import (
    Figure,
    Results,
    Table,
    command,
    is_sample,
    mean_and_deviation,
    new_axes,
    paired_difference,
    reported,
    test_accuracy,
    title,
    wilson_interval,
    with_interval,
    write_report,
)

FAST = Settings(
    batch_norm=True,
    augment=(RandomCrop(padding=2), HorizontalFlip()),
    batch_size=500,
    optimizer="muon",
    learning_rate=0.05,
    filter_learning_rate=0.12,
    weight_decay=0.0,
    schedule="linear",
    label_smoothing=0.2,
    epochs=2,
)
HEAVY = replace(FAST, augment=(RandomCrop(padding=4), HorizontalFlip(), Cutout(8)), label_smoothing=0.1, epochs=24)
STRONG = replace(HEAVY, augment=(RandomCrop(padding=4), HorizontalFlip()))
ADAM = {"optimizer": "adam", "learning_rate": 2e-3, "filter_learning_rate": None, "weight_decay": 1e-3}
LEFT_OUT = {  # run: what fast is without, and what stands in its place
    "fast_adam": ("Muon and SGD (the exercise's Adam)", replace(FAST, **ADAM)),
    "fast_no_smoothing": ("label smoothing", replace(FAST, label_smoothing=0.0)),
    "fast_no_batchnorm": ("batch norm (Muon's weights still at their norm)", replace(FAST, batch_norm=False)),
    "fast_no_augment": ("crop and flip", replace(FAST, augment=())),
    "fast_exponential": ("the linear schedule (the exercise's, 0.95 an epoch)", replace(FAST, schedule="exponential")),
}
RUNS = [
    Run("fast", FAST),
    Run("strong", STRONG),
    *(Run(name, settings) for name, (_, settings) in LEFT_OUT.items()),
]


# ------------------------------------------------------------------------------------------------------------ tuning

HELD_OUT = 5000  # the last training images
ADAM_BELOW = {**ADAM, "learning_rate": 1e-3}
TUNED = {"fast": FAST, "heavy": HEAVY}  # what the changes are made to: the prototype's
TRIED = [  # which of them, and the changes
    ("fast", {}),
    ("fast", {"filter_learning_rate": 0.06}),
    ("fast", {"filter_learning_rate": 0.24}),
    ("fast", {"learning_rate": 0.1}),
    ("fast", {"label_smoothing": 0.1}),
    ("fast", {"batch_size": 250}),
    ("fast", {"batch_size": 1000}),
    ("fast", {"augment": (RandomCrop(padding=4), HorizontalFlip())}),
    ("fast", ADAM_BELOW),
    ("fast", ADAM),
    ("heavy", {"epochs": 8}),
    ("heavy", {"epochs": 8, "label_smoothing": 0.2}),
    ("heavy", {"epochs": 8, "augment": FAST.augment}),
    ("heavy", {"epochs": 8, "augment": (RandomCrop(padding=4), HorizontalFlip())}),
]


def hold_out(model: nn.Module, data: dict[str, Split], settings: Settings) -> dict[str, Split]:
    """All training images but the last 5,000 to train on, those to measure with; no test images."""
    images, labels = (
        torch.cat([getattr(data[part], name) for part in ("train", "validation")]) for name in ("images", "labels")
    )
    held_out = Split(images[-HELD_OUT:], labels[-HELD_OUT:])
    return {"train": Split(images[:-HELD_OUT], labels[:-HELD_OUT]), "validation": held_out, "test": held_out}


def tuning_run(recipe: str, changes: dict) -> Run:
    """A recipe with these changes, and named by them, on other images."""
    name = ",".join([f"tune_{recipe}", *(f"{name}={value!r}".replace(" ", "") for name, value in changes.items())])
    return Run(name, replace(TUNED[recipe], data="cifar10-tuning", **changes), prepare=hold_out)


TUNING = [tuning_run(recipe, changes) for recipe, changes in TRIED]


def tune(runs: Sequence[Run], args: argparse.Namespace, device: torch.device) -> None:
    """Train these, and note in tuning.json what they came to, by name and seed."""
    for run, _, state, _ in train_all(runs, args, device):
        history = state["history"]
        accuracy, seconds = history[-1]["validation_accuracy"], sum(h["seconds"] for h in history)
        found = {"epochs": len(history), "accuracy": accuracy, "seconds": seconds}
        on_first(partial(note_tuning, question_folder("q5", args), run, found))


def note_tuning(folder: Path, run: Run, found: dict) -> None:
    with file_lock(folder / ".tuning.lock"):
        tried = load_tuning(folder)
        tried.setdefault(run.name, {})[str(run.settings.seed)] = found
        write_atomic(folder / "tuning.json", (json.dumps(tried, indent=1) + "\n").encode())


def is_noted(folder: Path, run: Run) -> bool:
    return str(run.settings.seed) in load_tuning(folder).get(run.name, {})


def load_tuning(folder: Path) -> dict[str, dict[str, dict]]:
    """What every setting came to that was ever tried: by its name, by seed. Raises UserError where it is damaged."""
    path = folder / "tuning.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or delete it and run --tune again") from error


# ------------------------------------------------------------------------------------------------- figures and tables


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy over minutes: both recipes, the exercise's settings (question 2), and the report's best ConvNet."""
    timed = [run for run in ("fast", "strong", "batchnorm") if run in results]
    if not {"fast", "strong"} & set(timed):
        return {}
    first = results[timed[0]][0]
    machine = first["environment"]["device"]
    figure, axes = new_axes(title(first, f"accuracy over time, on {machine}"), "accuracy (%)")
    for run in timed:
        if found := [r for r in results[run] if machines_of(r) == {machine}]:
            plot_over_minutes(axes, run, found)
    if not is_sample(first):
        best = reported("q3", "crop_flip")["test"]
        label = f"report's best ConvNet, 30 epochs: {best} % of 1,000 test images"
        axes.axhline(best, color="gray", linestyle="--", label=label)
    axes.set(xlabel="minutes of training, evaluation included", xlim=(0, None))
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return {"time.png": figure}


def machines_of(result: dict) -> set[str]:
    """The devices of all parts of a training: another's minutes are not comparable."""
    return {part["device"] for part in (*result["earlier_environments"], result["environment"])}


def plot_over_minutes(axes, run: str, found: Sequence[dict]) -> None:
    """Validation accuracy of every seed, a dot an epoch; a square for the best epoch's accuracy on all test images."""
    name = "question 2's batchnorm, the exercise's settings" if run == "batchnorm" else run
    color, label = None, f"{name}: validation; square: test, {with_interval(found)} %"
    for result in found:
        minutes = np.cumsum([h["seconds"] for h in result["history"]]) / 60
        accuracies = [h["validation_accuracy"] for h in result["history"]]
        (line,) = axes.plot(minutes, accuracies, ".-", color=color, label=label, linewidth=1)
        color, label = line.get_color(), None
        axes.plot(minutes[result["best_epoch"] - 1], test_accuracy(result), "s", color=color)


def tables(results: Results) -> list[Table]:
    """What every ingredient of `fast` is worth: paired differences on all test images, in points. Settings tried."""
    drawn = []
    if "fast" in results and any(run in results for run in LEFT_OUT):
        head = ["run", "fast without", "best weights, test [95 %]", "fast − this, test", "command"]
        drawn.append([head, *(left_out_row(run, results) for run in LEFT_OUT)])
    if results.folder and (tried := load_tuning(results.folder)):
        head = [f"{len(tried)} settings tried", "epochs", "accuracy on held-out training images", "time", "command"]
        drawn.append([head, *(tuning_row(name, list(by_seed.values())) for name, by_seed in tried.items())])
    return drawn


def left_out_row(run: str, results: Results) -> list[str]:
    found, what = results.get(run, []), LEFT_OUT[run][0]
    if not found:
        return [run, what, "-", "-", command("q5", run, sample=is_sample(results["fast"][0]))]
    worth = paired_difference(results, "fast", run)
    return [run, what, with_interval(found), worth.in_words() if worth else "-", command("q5", run, found)]


def tuning_row(name: str, found: list[dict]) -> list[str]:
    """With the interval of one seed; several have their standard deviation."""
    accuracies = [f["accuracy"] for f in found]
    text = mean_and_deviation(accuracies, 2)
    if len(found) == 1:
        text += " [{:.1f}, {:.1f}]".format(*wilson_interval(round(accuracies[0] * HELD_OUT / 100), HELD_OUT))
    seconds = sum(f["seconds"] for f in found)
    again = f"python q5_modern_recipe.py --tune --only {shlex.quote(name)}"
    if len(found) > 1:
        again += f" --seeds {len(found)}"
    return [name, str(found[0]["epochs"]), text, duration(seconds), again]


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    more = "the settings that were tried in place of the runs, measured on training images held out for it"
    parser.add_argument("--tune", action="store_true", help=more)
    with session(parser, argv) as (args, device):
        if args.tune and args.sample:
            raise UserError("--tune needs all training images: run it without --sample")
        runs = select_runs(TUNING if args.tune else RUNS, args, device)
        if args.list:
            return list_runs("q5", runs, args, partial(is_noted, question_folder("q5", args)) if args.tune else None)
        if args.tune and not args.replot:
            tune(runs, args, device)
        write = partial(write_report, "q5", __doc__, RUNS, args, (), figures, tables, beside={"batchnorm": "q2"})
        for run in () if args.tune else train_runs("q5", runs, args, device):
            write(changed=[run.name])
        write(show=True)


if __name__ == "__main__":
    main()
