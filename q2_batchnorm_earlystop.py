"""Question 2: batch normalisation and early stopping.

    python q2_batchnorm_earlystop.py                      # both networks, 50 epochs each
    python q2_batchnorm_earlystop.py --sample             # minutes, the bundled images
    python q2_batchnorm_earlystop.py --patience 3 10      # more stopping rules, read from the same epochs

The report: batch norm lifts test accuracy from 80.7 to 82.2 %; with early stopping, patience 7 reaches 85.8 %
validation accuracy where patience 5 reaches 82.8. It prints 80.9 % on the first 1,000 test images for both, but its two
figures are one picture, of patience 5: what patience 7 reached on test is unknown. What we found: results/README.md

These runs are two trajectories, one per network: each is trained once per seed, to 50 epochs, and every epoch budget
and stopping rule is read from it (batch norm's seeds 1 and 2 have 20 epochs so far). Question 1's checkpoint is the
first 20 epochs of one of them.

With batch norm the training loss follows the report's to the width of the line, but validation accuracy jumps by points
from one epoch to the next; in ours more than without batch norm, in the report's curves with and without. So where a
patience ends is luck: the report's patience 7 lasted until epoch 50; with seed 0, ours stopped two epochs after
patience 5 and restored the same weights. What the last epoch's weights are worth is luck too: the best ones are safer.

With seed 0 batch norm has its best weights long after both patiences have ended its training, and they are clearly
better on test: early stopping does not only save time here, it costs accuracy. Without batch norm the best weights are
those that patience 5 finds, or not measurably better on test, with each of three seeds. By epoch 50 weight decay has
pulled nearly half of batch norm's first-layer filters to zero, the grey squares in the picture of batchnorm_full. The
report's Figure 13 shows the same; without batch norm hardly a filter vanishes.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from common import Run, Settings, duration, list_runs, make_parser, positive, select_runs, stopping_epoch, train_runs

# isort: split
# common stands first: it answers Ctrl-C while torch loads

from machine import session
from report import (
    NOT_RUN,
    Claim,
    Figure,
    Finding,
    Results,
    Table,
    beats,
    best_validation,
    command,
    figures_of,
    layer_table,
    new_panels,
    paired_difference,
    plot_curve,
    reported,
    same_training,
    same_weights,
    test_accuracy,
    time_taken,
    title,
    validation_difference,
    write_report,
)

PANELS = ("cross entropy", "validation accuracy (%)")
CONVNET, BATCHNORM = Settings(epochs=50), Settings(epochs=50, batch_norm=True)
COLORS = {"convnet": "tab:blue", "batchnorm": "tab:orange"}


def stopped(network: str, patience: int) -> Run:
    settings = {"convnet": CONVNET, "batchnorm": BATCHNORM}[network]
    return Run(f"{network}_patience{patience}", replace(settings, patience=patience))


RUNS = [
    Run("convnet", replace(CONVNET, epochs=20)),
    Run("batchnorm", replace(BATCHNORM, epochs=20)),
    stopped("convnet", 5),
    stopped("batchnorm", 5),
    stopped("batchnorm", 7),
    Run("convnet_full", CONVNET),
    Run("batchnorm_full", BATCHNORM),
]


def restores_others(results: Results, comparisons: int = 1) -> Finding:
    """A check that patience 7 restores other weights than patience 5, and what the test images say of both."""
    longer, shorter = "batchnorm_patience7", "batchnorm_patience5"
    if (found := paired_difference(results, longer, shorter)) is None:
        return NOT_RUN
    same = [same_weights(*pair) for pair in results.pairs_of(longer, shorter)]
    if all(same):
        return Finding("within noise", "both restore the same weights")
    verdict = "within noise" if any(same) else "holds"
    evidence = f"they restore different weights for {same.count(False)} of {len(same)} seeds"
    return Finding(verdict, f"{evidence}; on test images: {found.in_words()}")


CLAIMS = [
    Claim(
        "3",
        "BatchNorm raises validation and test accuracy by about 2 points.",
        (beats("batchnorm", "convnet"), beats("batchnorm", "convnet", on="validation")),
    ),
    Claim(
        "4",
        "Early stopping with BN: patience 7 beats patience 5 on validation (85.8 against 82.8).",
        (beats("batchnorm_patience7", "batchnorm_patience5", on="validation"), restores_others),
    ),
]


# ----------------------------------------------------------------------------------------------------------- figures


def figures(results: Results) -> dict[str, Figure]:
    """Both networks in the same axes, at 20 epochs, and at 50 with every rule's stop."""
    drawn = {}
    if pair := [name for name in COLORS if name in results]:
        drawn["batchnorm.png"] = plot_pair(results, pair)
    if any(f"{network}_full" in results for network in COLORS):
        drawn["early_stopping.png"] = plot_stops(results)
    return drawn


def plot_pair(results: Results, names: Sequence[str]) -> Figure:
    heading = title(results[names[0]][0], "with and without batch norm")
    figure, (losses, accuracies) = new_panels(heading, PANELS)
    for name in names:
        color = COLORS[name]
        plot_curve(losses, results[name], "train_loss", f"{name}: training", color=color, linestyle="--")
        plot_curve(losses, results[name], "validation_loss", f"{name}: validation", color=color)
        plot_curve(accuracies, results[name], "validation_accuracy", name, color=color)
    losses.legend()
    accuracies.legend()
    return figure


def rules_of(network: str, results: Results) -> list[dict]:
    """All results of stopping rules for this network at the report's 50 epochs, no rule last; in order of seeds."""
    names = [
        name for name in results if name.startswith(f"{network}_patience") and name.split("patience")[1].isdecimal()
    ]
    found = [result for name in [*names, f"{network}_full"] for result in results.get(name, ())]
    return sorted(found, key=lambda r: (r["settings"]["patience"] or math.inf, r["seed"]))


def full_run(network: str, result: dict, results: Results) -> dict | None:
    """The training to the end that this result was read from; None where it is not there, or was another training."""
    for full in results.get(f"{network}_full", ()):
        if full["seed"] == result["seed"] and same_training(full, result):
            return full
    return None


def has_stopped(result: dict) -> bool:
    """Did its patience end it, before its epochs did?"""
    accuracies = [h["validation_accuracy"] for h in result["history"]]
    return stopping_epoch(accuracies, len(accuracies) + 1, result["settings"]["patience"]) is not None


def plot_stops(results: Results) -> Figure:
    """The full curves of every network (its first seed), where each patience stops, which weights it restores, and the
    best ones of all epochs, which a stop can miss.
    """
    full = {network: results[f"{network}_full"][0] for network in COLORS if f"{network}_full" in results}
    first = next(iter(full.values()))
    heading = (
        f"seed {first['seed']}: where each patience stops (dotted, numbered), "
        "the weights it restores (dot), the best validation accuracy of all epochs (ring)"
    )
    figure, panels = new_panels(title(first, heading), ("validation loss (cross entropy)", PANELS[1]))
    for axes, entry in zip(panels, ("validation_loss", "validation_accuracy")):
        for row, (network, whole) in enumerate(full.items()):
            plot_curve(axes, [whole], entry, network, color=COLORS[network])
            mark_best(axes, whole, entry, COLORS[network], fillstyle="none", markersize=11)
            rules = [r for r in rules_of(network, results) if r["settings"]["patience"]]
            rules = [r for r in rules if full_run(network, r, results) is whole]
            for result in rules:
                mark_best(axes, result, entry, COLORS[network])
            mark_stops(axes, [r for r in rules if has_stopped(r)], COLORS[network], row)
        axes.legend()
    return figure


def mark_best(axes, result: dict, entry: str, color: str, **style) -> None:
    epoch = result["best_epoch"]
    axes.plot(epoch, result["history"][epoch - 1][entry], "o", color=color, **style)


def mark_stops(axes, rules: Sequence[dict], color: str, row: int) -> None:
    """A dotted line where rules stop, with their patience above it; `row` keeps two networks' dots and numbers apart."""
    stops: dict[int, set[int]] = {}
    for result in rules:
        stops.setdefault(len(result["history"]), set()).add(result["settings"]["patience"])
    for stop, patiences in stops.items():
        axes.axvline(stop, color=color, linestyle=(3 * row, (1.5, 4.5)))
        text, place = ", ".join(map(str, sorted(patiences))), axes.get_xaxis_transform()
        axes.text(stop, 1.01 + 0.04 * row, text, color=color, ha="center", fontsize=8, transform=place)


# ------------------------------------------------------------------------------------------------------------ tables


def tables(results: Results) -> list[Table]:
    """Batch norm's parameters; and for every stopping rule, and none: where training ends, the accuracies of the best
    and of the last weights, what the rule saves, and what it costs against no early stopping. Differences are paired,
    on all test images, in points.
    """
    head = ["run", "ends after", "best epoch", "best: validation / test", "last: validation / test"]
    head += ["best − last, test [95 %, noise of the images alone]", "epochs and time saved"]
    head += ["full − rule, best, test [95 %, noise of the images alone]", "command"]
    rows = [stopping_row(network, r, results) for network in COLORS for r in rules_of(network, results)]
    parameters = [layer_table("q2", "batchnorm", results["batchnorm"])] if "batchnorm" in results else []
    return [*parameters, [head, *rows]] if rows else parameters


def stopping_row(network: str, result: dict, results: Results) -> list[str]:
    name, history, best, last = result["run"], result["history"], result["best_epoch"], len(result["history"])
    patience = result["settings"]["patience"]
    seed = f", seed {result['seed']}" if len(results[name]) > 1 else ""
    alone = Results({"rule": [result]})
    saved, cost = "-", "-"
    full = full_run(network, result, results)
    if patience and full:
        saved = f"{len(full['history']) - last}, {time_taken([full], after=last) or duration(0)}"
        cost = str(paired_difference(Results({"rule": [result], "full": [full]}), "full", "rule"))
    return [
        f"{name}{seed}",
        f"{last}" + (" (did not stop)" if patience and not has_stopped(result) else ""),
        f"{best}",
        f"{best_validation(result):.1f} / {test_accuracy(result):.2f}",
        f"{history[-1]['validation_accuracy']:.1f} / {test_accuracy(result, 'last'):.2f}",
        str(paired_difference(alone, "rule", "rule", ("best", "last"))),
        saved,
        cost,
        command("q2", name, results[name], declared=name in [run.name for run in RUNS]),
    ]


def practices(results: Results) -> list[list[str]]:
    """What the report's early stopping does, and what it is worth."""
    rows = []
    for name in ("convnet_patience5", "batchnorm_patience5", "batchnorm_patience7"):
        if name in results:
            found = paired_difference(results, name, name, ("best", "last"))
            rows.append([f"stops without restoring the best weights ({name})", f"best − last: {found.in_words()}"])
    longer, shorter = "batchnorm_patience7", "batchnorm_patience5"
    if (found := validation_difference(results, longer, shorter)) is not None:
        theirs = reported("q2", longer)["validation"] - reported("q2", shorter)["validation"]
        worth = f"patience 7 − 5, best validation: {found.in_words()} (the report: {theirs:+.1f})"
        test = paired_difference(results, longer, shorter, ("last", "last"))
        worth += f"; last weights, test: {test.in_words()} (the report does not show it)"
        rows.append(
            ["shows Figure 12, of patience 5, with its test accuracy, again as Figure 14, of patience 7", worth]
        )
    if (found := paired_difference(results, "batchnorm", "convnet", ("last", "last"))) is not None:
        best = paired_difference(results, "batchnorm", "convnet")
        worth = f"{last_epoch(results)}, test {found.in_words()}; our best weights: test {best.in_words()}"
        rows.append(["judges batch norm by the last epoch", worth])
    for network in COLORS:
        if f"{network}_full" in results:
            rows.append(["lets an epoch equal to the best neither count nor reset", ties(network, results)])
    return rows


def last_epoch(results: Results) -> str:
    """What batch norm adds by the last epoch's validation: the report's Figures 5 and 7, beside their best epochs; ours."""
    without, with_it = (
        next(f for f in figures_of(run) if "test" in f.get("printed", {})) for run in ("convnet", "batchnorm")
    )
    one, other = without["validation_accuracy"], with_it["validation_accuracy"]
    test = with_it["printed"]["test"] - without["printed"]["test"]
    theirs = f"last validation {other[-1] - one[-1]:+.1f}, test {test:+.1f}, but best validation {max(other) - max(one):+.1f}"
    pairs = results.pairs_of("batchnorm", "convnet")
    ours = statistics.mean(
        a["history"][-1]["validation_accuracy"] - b["history"][-1]["validation_accuracy"] for a, b in pairs
    )
    return f"batchnorm − convnet in the report: {theirs}; our last weights: validation {ours:+.1f}"


def ties(network: str, results: Results) -> str:
    """Where patience 5 stops, and where it would if a tie counted."""
    first = results[f"{network}_full"][0]
    accuracies = [h["validation_accuracy"] for h in first["history"]]
    ends, counted = (stopping_epoch(accuracies, len(accuracies), 5, ties_count) for ties_count in (False, True))
    return (
        f"{network}, patience 5, seed {first['seed']}: ends after epoch {ends}; if a tie counted, after epoch {counted}"
    )


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    more = "also stop each network after N epochs below the best validation accuracy; read from checkpoints"
    parser.add_argument("--patience", type=positive, nargs="+", default=[], metavar="N", help=more)
    with session(parser, argv) as (args, device):
        further = [stopped(network, patience) for patience in args.patience for network in COLORS]
        runs = select_runs([*RUNS, *(run for run in further if run not in RUNS)], args, device)
        if args.list:
            return list_runs("q2", runs, args)
        write = partial(write_report, "q2", __doc__, RUNS, args, CLAIMS, figures, tables, practices)
        for run in train_runs("q2", runs, args, device):
            write(changed=[run.name])
        write(show=True)


if __name__ == "__main__":
    main()
