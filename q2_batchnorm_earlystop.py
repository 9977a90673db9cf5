"""Question 2: batch normalisation and early stopping.

    python q2_batchnorm_earlystop.py                   # both networks, up to 50 epochs
    python q2_batchnorm_earlystop.py --patience 3 10   # further stopping rules, read from the same trainings
    python q2_batchnorm_earlystop.py --sample          # minutes, the bundled images

The report: batch norm lifts test accuracy from 80.7 to 82.2 %; with it, patience 7 reaches 85.8 % validation accuracy
where patience 5 reaches 82.8. It prints 80.9 % on the first 1,000 test images for both, but its two figures are one
picture, of patience 5: what patience 7 reached on test is unknown.

Each network is trained once per seed, to 50 epochs, and every epoch budget and stopping rule is read from that
training; question 1's is the first 20 epochs of one of them. What we found: results/q2/README.md
"""

from collections.abc import Sequence

import report.figures as fig
from common import Run, Settings, make_parser, positive, select_runs, stopping_epoch, train_runs
from parts.machine import session
from report.claims import Claim, better
from report.numbers import Result, Results, name_of
from report.page import Question, check_pages, finish_pages, update_pages


def stopped(network: str, patience: int) -> Run:
    settings = Settings(epochs=50, batch_norm=network == "batchnorm", patience=patience)
    return Run(f"{network}_patience{patience}", settings)


RUNS = [
    Run("convnet", Settings(epochs=20)),
    Run("batchnorm", Settings(epochs=20, batch_norm=True)),
    stopped("convnet", 5),
    stopped("batchnorm", 5),
    stopped("batchnorm", 7),
    Run("convnet_full", Settings(epochs=50)),
    Run("batchnorm_full", Settings(epochs=50, batch_norm=True)),
]

CLAIMS = [
    Claim(
        3,
        "BatchNorm raises validation and test accuracy by about 2 points.",
        (better("batchnorm", "convnet"), better("batchnorm", "convnet", on="validation")),
    ),
    Claim(
        4,
        "Early stopping: with BN patience 7 beats patience 5 on validation (85.8 against 82.8), "
        "and that beats patience 5 without BN (80.7).",
        (
            better("batchnorm_patience7", "batchnorm_patience5", on="validation"),
            better("batchnorm_patience5", "convnet_patience5", on="validation"),
        ),
    ),
]

COLORS = {"convnet": "tab:blue", "batchnorm": "tab:orange"}


def figures(results: Results) -> dict[str, fig.Figure]:
    """Both networks in the same axes, at 20 epochs, and at 50 with every rule's stop."""
    drawn = {}
    if pair := [name for name in COLORS if name in results]:
        drawn["batchnorm.png"] = plot_pair(results, pair)
    if full := {name: results[f"{name}_full"][0] for name in COLORS if f"{name}_full" in results}:
        drawn["early_stopping.png"] = plot_stops(full, results)
    return drawn


def plot_pair(results: Results, names: Sequence[str]) -> fig.Figure:
    first, ylabels = results[names[0]][0], ("cross entropy", "validation accuracy (%)")
    figure, (losses, accuracies) = fig.new_panels(first, "with and without batch norm", ylabels)
    for name in names:
        color = COLORS[name]
        fig.plot_curve(losses, results[name], "train_loss", f"{name_of(name)}: training", color=color, linestyle="--")
        fig.plot_curve(losses, results[name], "validation_loss", f"{name_of(name)}: validation", color=color)
        fig.plot_curve(accuracies, results[name], "validation_accuracy", name_of(name), color=color)
    losses.legend()
    accuracies.legend()
    return figure


def plot_stops(full: dict[str, Result], results: Results) -> fig.Figure:
    """The full curves of every network (its first seed), where each patience stops, which weights it restores, and the
    best ones of all epochs, which a stop can miss.
    """
    first = next(iter(full.values()))
    heading = (
        "where each patience stops (dotted, numbered), "
        "the weights it restores (dot), the best validation accuracy of all epochs (ring)"
    )
    ylabels = ("validation loss (cross entropy)", "validation accuracy (%)")
    figure, panels = fig.new_panels(first, heading, ylabels)
    for axes, curve in zip(panels, ("validation_loss", "validation_accuracy")):
        for row, (network, whole) in enumerate(full.items()):
            color, best = COLORS[network], whole.best_epoch
            same = [found[0].settings for found in results.values() if found[0].training() == whole.training()]
            patiences = {settings["patience"] for settings in same}
            fig.plot_curve(axes, [whole], curve, f"{name_of(network)}, seed {whole.seed}", color=color)
            axes.plot(best, whole.curves[curve][best - 1], "o", color=color, fillstyle="none", markersize=11)
            mark_stops(axes, whole, curve, sorted(patiences - {None}), color, row)
        axes.legend()
    return figure


def mark_stops(axes, whole: Result, curve: str, patiences: Sequence[int], color: str, row: int) -> None:
    """Read from the whole training: a dot for the weights that a patience restores, a dotted line where it stops, with
    the patience above it; `row` keeps two networks' lines and numbers apart.
    """
    accuracies, stops = whole.curves["validation_accuracy"], {}
    for patience in patiences:
        stop = stopping_epoch(accuracies, len(accuracies) + 1, patience)  # None: not within these epochs
        restored = accuracies[:stop].argmax()
        axes.plot(restored + 1, whole.curves[curve][restored], "o", color=color)
        if stop is not None:
            stops.setdefault(stop, []).append(str(patience))
    for stop, names in stops.items():
        axes.axvline(stop, color=color, linestyle=(3 * row, (1.5, 4.5)))
        place = axes.get_xaxis_transform()
        axes.text(stop, 1.01 + 0.04 * row, ", ".join(names), color=color, ha="center", fontsize=8, transform=place)


QUESTION = Question("q2", "q2_batchnorm_earlystop.py", __doc__, RUNS, CLAIMS, figures, ("convnet", "convnet_full"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    more = "also stop each network after N epochs below the best validation accuracy; read from checkpoints"
    parser.add_argument("--patience", type=positive, nargs="+", action="extend", default=[], metavar="N", help=more)
    with session(parser, argv) as (args, device):
        asked = [stopped(network, patience) for patience in args.patience for network in COLORS]
        runs = select_runs([*RUNS, *asked], args, device)
        check_pages(QUESTION, runs, args)
        for run in train_runs(QUESTION.name, runs, args, device):
            update_pages(QUESTION, args, run)
        finish_pages(QUESTION, args)


if __name__ == "__main__":
    main()
