"""Question 5, beyond the report: the same network at its best.

    python q5_modern_recipe.py                        # fast, strong, and fast without each of its ingredients
    python q5_modern_recipe.py --only fast --seeds 3  # minutes, with the noise of training
    python q5_modern_recipe.py --sample --only fast   # the bundled images
    python q5_modern_recipe.py --tune                 # settings that were tried, on held-out training images

The report's best ConvNet reaches 84.6 % after 30 epochs (crop and flip, without batch norm). How far does the same
network with batch norm get, its 7,682,826 parameters unchanged, with what has been learnt since, and how fast? `fast`
is for minutes, `strong` for about an hour on two cores.

The recipe follows airbench (K. Jordan, https://github.com/KellerJordan/cifar10-airbench): Muon for the convolutions and
SGD for the rest, their learning rates linear to zero over all steps, label smoothing, flips and small shifts. A linear
schedule ends with the last epoch: with another number of --epochs the training starts anew, and its last weights are
the result. What we found: results/q5/README.md
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import report.figures as fig
from common import Run, Settings, Split, make_parser, select_runs, train_runs
from parts.augment import Cutout, HorizontalFlip, RandomCrop
from parts.machine import UserError, session
from report.numbers import Result, Results, measure, reported
from report.page import Question, check_pages, finish_pages, update_pages

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
SHIFTS = (RandomCrop(padding=4), HorizontalFlip())
STRONG = replace(FAST, augment=SHIFTS, label_smoothing=0.1, epochs=24)
ADAM = {"optimizer": "adam", "learning_rate": 2e-3, "filter_learning_rate": None, "weight_decay": 1e-3}
RUNS = [
    Run("fast", FAST),
    Run("strong", STRONG),
    Run("fast_adam", replace(FAST, **ADAM)),  # the report's Adam in place of Muon and SGD
    Run("fast_no_smoothing", replace(FAST, label_smoothing=0.0)),
    Run("fast_no_batchnorm", replace(FAST, batch_norm=False)),  # Muon's weights still at their norm
    Run("fast_no_augment", replace(FAST, augment=())),
    Run("fast_exponential", replace(FAST, schedule="exponential")),  # the report's, 0.95 an epoch
]


HELD_OUT = 5000  # the last training images
TRY_FAST = replace(FAST, data="cifar10-tuning")
TRY_HEAVY = replace(TRY_FAST, augment=(*SHIFTS, Cutout(8)), label_smoothing=0.1, epochs=8)
TUNING = [
    Run("fast", TRY_FAST),
    Run("fast_filters_0.06", replace(TRY_FAST, filter_learning_rate=0.06)),
    Run("fast_filters_0.24", replace(TRY_FAST, filter_learning_rate=0.24)),
    Run("fast_rate_0.1", replace(TRY_FAST, learning_rate=0.1)),
    Run("fast_smoothing_0.1", replace(TRY_FAST, label_smoothing=0.1)),
    Run("fast_batch_250", replace(TRY_FAST, batch_size=250)),
    Run("fast_batch_1000", replace(TRY_FAST, batch_size=1000)),
    Run("fast_shifts_4", replace(TRY_FAST, augment=SHIFTS)),
    Run("fast_adam_0.001", replace(TRY_FAST, **ADAM | {"learning_rate": 1e-3})),
    Run("fast_adam_0.002", replace(TRY_FAST, **ADAM)),
    Run("heavy", TRY_HEAVY),
    Run("heavy_smoothing_0.2", replace(TRY_HEAVY, label_smoothing=0.2)),
    Run("heavy_shifts_2_no_cutout", replace(TRY_HEAVY, augment=FAST.augment)),
    Run("heavy_no_cutout", replace(TRY_HEAVY, augment=SHIFTS)),
]


def hold_out(data: dict[str, Split]) -> dict[str, Split]:
    """All training images but the last 5,000 to train on, the rest to measure with; no test images."""
    images = torch.cat([data["train"].images, data["validation"].images])
    labels = torch.cat([data["train"].labels, data["validation"].labels])
    held_out = Split(images[-HELD_OUT:], labels[-HELD_OUT:])
    return {"train": Split(images[:-HELD_OUT], labels[:-HELD_OUT]), "validation": held_out, "test": held_out}


def figures(results: Results) -> dict[str, fig.Figure]:
    """Accuracy over minutes: both recipes, the report's settings (question 2), and the report's best ConvNet."""
    timed = [run for run in ("fast", "strong", "batchnorm") if run in results]
    if not {"fast", "strong"} & set(timed):
        return {}
    first = results[timed[0]][0]
    here = places(first)
    figure, axes = fig.new_axes(first, f"accuracy over time on {' and '.join(sorted(here))}", "accuracy (%)")
    for run in timed:  # another machine's minutes are not comparable
        if found := [result for result in results[run] if places(result) == here]:
            plot_over_minutes(axes, run, found)
    if not first.is_sample:
        best = reported("q3", "crop_flip")["test"]
        label = f"report's best ConvNet, 30 epochs: {best} % of 1,000 test images"
        axes.axhline(best, color="gray", linestyle="--", label=label)
    axes.set(xlabel="minutes of training, evaluation included", xlim=(0, None))
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return {"time.png": figure}


def places(result: Result) -> set[str]:
    """Where it was trained, and in which precision."""
    return {f"{here['device']} ({here['precision']})" for here in result.environments}


def plot_over_minutes(axes, run: str, found: Sequence[Result]) -> None:
    """Validation accuracy of every seed, a dot an epoch; a square for the accuracy on all test images."""
    name = "question 2's batch norm, the report's settings" if run == "batchnorm" else run
    seeds = "one seed" if len(found) == 1 else f"{len(found)} seeds"
    color, label = None, f"{name}, {seeds}: validation; square: test, {found[0].chosen_weights} weights"
    for result in found:
        minutes = np.cumsum(result.curves["seconds"]) / 60
        (line,) = axes.plot(minutes, result.curves["validation_accuracy"], ".-", color=color, label=label, linewidth=1)
        color, label = line.get_color(), None
        epoch = result.best_epoch if result.chosen_weights == "best" else result.epochs
        axes.plot(minutes[epoch - 1], measure(result, "test"), "s", color=color)


QUESTION = Question(
    "q5", "q5_modern_recipe.py", __doc__, RUNS, figures=figures, baselines=("fast",), beside=("q2/batchnorm",)
)
TUNING_TITLE = "Question 5: settings tried on held-out training images"
TUNING_QUESTION = Question("q5_tuning", "q5_modern_recipe.py --tune", TUNING_TITLE, TUNING, baselines=("fast", "heavy"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    more = "settings tried in place of the runs, measured on training images held out for it"
    parser.add_argument("--tune", action="store_true", help=more)
    with session(parser, argv) as (args, device):
        if args.tune and args.sample:
            raise UserError("--tune needs all training images: run it without --sample")
        question = TUNING_QUESTION if args.tune else QUESTION
        runs = select_runs(question.runs, args, device)
        check_pages(question, runs, args)
        split = hold_out if args.tune else None
        for run in train_runs(question.name, runs, args, device, split=split):
            update_pages(question, args, run)
        finish_pages(question, args)


if __name__ == "__main__":
    main()
