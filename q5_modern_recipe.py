"""Question 5, beyond the report: the same network at its best.

    python q5_modern_recipe.py                        # fast, strong, and fast without each of its ingredients
    python q5_modern_recipe.py --only fast --seeds 3  # minutes, with the noise of training
    python q5_modern_recipe.py --sample --only fast   # the bundled images
    python q5_modern_recipe.py --tune                 # every setting that was tried, on held-out training images

The report's best accuracy with this network is 84.6 %, after 30 epochs. How far do its 7,682,826 parameters, unchanged,
get with what has been learnt since, and how fast? `fast` is for minutes, `strong` for most of an hour. What we found:
results/README.md

The recipe follows airbench (K. Jordan, https://github.com/KellerJordan/cifar10-airbench): Muon for the convolutions and
SGD for the rest, their learning rates linear to zero over all steps, label smoothing, flips and small shifts. Its numbers
were chosen by --tune: trained on the first 45,000 training images, measured on the last 5,000, never on test images. A
linear schedule ends with the last epoch, so with another number of --epochs the training starts anew.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import (
    Run,
    Settings,
    Split,
    build,
    duration,
    list_runs,
    load_data,
    locked_runs,
    make_parser,
    question_folder,
    select_runs,
    train,
    train_runs,
)

# isort: split
# common stands first: it answers Ctrl-C while torch loads

import numpy as np
import torch
from torch import nn

from augment import Cutout, HorizontalFlip, RandomCrop
from machine import UserError, on_first, session, write_atomic
from report import (
    Figure,
    Results,
    Table,
    command,
    mean_test_accuracy,
    new_axes,
    paired_difference,
    reported,
    test_interval,
    title,
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
STRONG = replace(FAST, augment=(RandomCrop(padding=4), HorizontalFlip(), Cutout(8)), label_smoothing=0.1, epochs=24)
ADAM = {"optimizer": "adam", "learning_rate": 2e-3, "filter_learning_rate": None}
LEFT_OUT = {  # run: what fast is without, and what stands in its place
    "fast_adam": ("Muon and SGD (the exercise's Adam)", replace(FAST, **ADAM)),
    "fast_no_smoothing": ("label smoothing", replace(FAST, label_smoothing=0.0)),
    "fast_no_batchnorm": ("batch norm", replace(FAST, batch_norm=False)),
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
TUNING = replace(FAST, data="cifar10-tuning")  # a name of its own: fewer training images make another trajectory
TRIED = [  # changes to `fast`
    {},
    {"filter_learning_rate": 0.06},
    {"filter_learning_rate": 0.24},
    {"learning_rate": 0.1},
    {"label_smoothing": 0.1},
    {"batch_size": 250},
    {"batch_size": 1000},
    {"augment": (RandomCrop(padding=4), HorizontalFlip())},
    {**ADAM, "learning_rate": 1e-3},
    ADAM,
]


def hold_out(model: nn.Module, data: dict[str, Split], settings: Settings) -> dict[str, Split]:
    """All training images but the last 5,000 to train on, those to measure with; no test images."""
    images, labels = (
        torch.cat([getattr(data[part], name) for part in ("train", "validation")]) for name in ("images", "labels")
    )
    held_out = Split(images[-HELD_OUT:], labels[-HELD_OUT:])
    return {"train": Split(images[:-HELD_OUT], labels[:-HELD_OUT]), "validation": held_out, "test": held_out}


def in_words(changes: dict) -> str:
    """As the page shows them."""
    return ", ".join(f"{name}={value!r}" for name, value in changes.items()) or "fast"


def tune(args: argparse.Namespace, device: torch.device) -> None:
    """Train every setting of TRIED, from its checkpoint where there is one; tuning.json holds what each came to."""
    if args.sample:
        raise UserError("--tune needs all training images: run it without --sample")
    precision = select_runs(RUNS[:1], args, device)[0].settings.precision
    data, rows = load_data(args, device), {}
    runs = [
        Run(in_words(changes), replace(TUNING, precision=precision, **changes), prepare=hold_out) for changes in TRIED
    ]
    for run, path in locked_runs(runs, args.checkpoint_dir):
        history = train(run, build(run, device), data, device, path)["history"]
        accuracy, seconds = history[-1]["validation_accuracy"], sum(h["seconds"] for h in history)
        rows[run.name] = {"tried": run.name, "epochs": len(history), "accuracy": accuracy, "seconds": seconds}
    text = json.dumps([rows[run.name] for run in runs], indent=1) + "\n"
    on_first(lambda: write_atomic(tuning_file(question_folder("q5", args)), text.encode()))


def tuning_file(folder: Path) -> Path:
    return folder / "tuning.json"


# ------------------------------------------------------------------------------------------------- figures and tables


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy over minutes: both recipes, the exercise's settings (question 2), and the report's best."""
    timed = [run for run in ("fast", "strong", "batchnorm") if run in results]
    if not {"fast", "strong"} & set(timed):
        return {}
    first = results[timed[0]][0]
    figure, axes = new_axes(title(first, f"accuracy over time, on {first['environment']['device']}"), "accuracy (%)")
    for run in timed:
        plot_over_minutes(axes, run, results[run])
    if first["settings"]["data"] == "cifar10":
        best = reported("q3", "crop_flip")["test"]
        axes.axhline(
            best, color="gray", linestyle="--", label=f"report's best: {best} % of 1,000 test images, 30 epochs"
        )
    axes.set(xlabel="minutes of training, evaluation included", xlim=(0, None))
    axes.legend(fontsize=8)
    return {"time.png": figure}


def plot_over_minutes(axes, run: str, found: Sequence[dict]) -> None:
    """Validation accuracy, the mean of all seeds, and at the end the accuracy on all test images."""
    seconds = np.array([[h["seconds"] for h in r["history"]] for r in found])  # [seeds, epochs]
    accuracies = np.array([[h["validation_accuracy"] for h in r["history"]] for r in found])
    minutes, mean = seconds.mean(0).cumsum() / 60, mean_test_accuracy(found)
    name = "question 2's batchnorm, the exercise's settings" if run == "batchnorm" else run
    (line,) = axes.plot(minutes, accuracies.mean(0), ".-", label=f"{name}: validation")
    low, high = test_interval(found)
    error, label = [[mean - low], [high - mean]], f"{name}: {mean:.2f} % of all test images"
    axes.errorbar(minutes[-1:], [mean], error, fmt="s", capsize=4, color=line.get_color(), label=label)


def tables(results: Results) -> list[Table]:
    """What every ingredient of `fast` is worth: paired differences on all test images, in points. Settings tried."""
    drawn = []
    if "fast" in results and any(run in results for run in LEFT_OUT):
        head = ["run", "fast without", "best weights, test [95 %]", "fast − this, test [95 %]", "command"]
        drawn.append([head, *(left_out_row(run, results) for run in LEFT_OUT)])
    if results.folder and tuning_file(results.folder).exists():
        tried = json.loads(tuning_file(results.folder).read_text())
        head = [f"{len(tried)} settings tried", "epochs", f"accuracy on {HELD_OUT:,} held-out training images", "time"]
        rows = [[row["tried"], str(row["epochs"]), f"{row['accuracy']:.2f}", duration(row["seconds"])] for row in tried]
        drawn.append([head, *rows])
    return drawn


def left_out_row(run: str, results: Results) -> list[str]:
    found, what = results.get(run, []), LEFT_OUT[run][0]
    if not found:
        return [run, what, "-", "-", command("q5", run)]
    worth = str(paired_difference(results, "fast", run) or "-")
    return [run, what, with_interval(found), worth, command("q5", run, found)]


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    more = "train every setting that was tried, measured on training images held out for it"
    parser.add_argument("--tune", action="store_true", help=more)
    with session(parser, argv) as (args, device):
        runs = select_runs(RUNS, args, device)
        if args.list:
            return list_runs("q5", runs, args)
        if args.tune:
            tune(args, device)
        write = partial(write_report, "q5", __doc__, RUNS, args, (), figures, tables, beside={"batchnorm": "q2"})
        for run in () if args.tune else train_runs("q5", runs, args, device):
            write(changed=[run.name])
        write(show=True)


if __name__ == "__main__":
    main()
