"""Question 2: batch normalisation and early stopping.

    python q2_batchnorm_earlystop.py                      # both networks, 50 epochs each
    python q2_batchnorm_earlystop.py --sample             # minutes, the bundled images
    python q2_batchnorm_earlystop.py --patience 3 10      # more stopping rules, read from the same epochs

The report: batch norm lifts test accuracy from 80.7 to 82.2 %; with early stopping, patience 7 reaches 85.8 %
validation accuracy where patience 5 reaches 82.8, and both 80.9 % on the first 1,000 test images.

Here, one seed: at 20 epochs batch norm lifts accuracy on all 10,000 test images from 78.7 to 80.6 %. With batch norm
patience 5 ends training after epoch 20, patience 7 after 22, and both restore epoch 15: 82.9 % on validation, 80.1 % of
the first 1,000. Both stop too soon: the same training reaches 84.7 % in epoch 33, which is 82.6 % of the 10,000, and the
shortest patience that goes on until then is 16. Without batch norm no epoch of the 50 beats epoch 15 on validation; its
validation loss is lowest in epoch 11 and then rises, as in the report. Under every rule the best and the last weights
differ within noise on the test images.

These runs are two trajectories, one per network: each is trained once, to 50 epochs, and every epoch budget and
stopping rule is read from it. Question 1's checkpoint is the first 20 epochs of one of them.
"""

import math
import re
import statistics
from dataclasses import replace

from matplotlib.figure import Figure

from common import (
    VALIDATION_IMAGES,
    Claim,
    Question,
    Run,
    Settings,
    best_validation,
    difference_cell,
    duration,
    new_panels,
    overfitting_claim,
    paired_difference,
    plot_curve,
    points,
    positive,
    run_question,
    stopping_epoch,
    title,
    with_seed_noise,
)

PANELS = ("cross entropy", "validation accuracy (%)")
NETWORKS = {"convnet": Settings(epochs=50), "batchnorm": Settings(epochs=50, batch_norm=True)}
COLORS = {"convnet": "tab:blue", "batchnorm": "tab:orange"}
REPORTED = {  # percent
    ("convnet", 5): {"validation": 80.7, "test": 78.7},  # the test accuracy is printed in Figure 9
    ("batchnorm", 5): {"validation": 82.8, "test": 80.9},
    ("batchnorm", 7): {"validation": 85.8, "test": 80.9},
}


def stopped(network: str, patience: int) -> Run:
    settings = replace(NETWORKS[network], patience=patience)
    return Run(f"{network}_patience{patience}", settings, REPORTED.get((network, patience), {}))


RUNS = [
    Run("convnet", Settings(epochs=20), {"test": 80.7}),
    Run("batchnorm", Settings(epochs=20, batch_norm=True), {"test": 82.2}),
    *(stopped(network, patience) for network, patience in REPORTED),
    Run("convnet_full", NETWORKS["convnet"]),
    Run("batchnorm_full", NETWORKS["batchnorm"]),
]


def better_on_validation(better: str, worse: str, results: dict[str, list[dict]]) -> dict | None:
    """Criterion of claims 3 and 4 on validation: the best validation accuracy is higher, by more than the noise (95 %) of
    two accuracies on so many images, as if the runs were independent, and of several seeds (`with_seed_noise`).

    The 1,000 images also chose the weights; of two patiences on one trajectory the longer can only be equal or better.
    Whether it is better on other images too, the test images say.
    """
    by_seed = [{r["seed"]: best_validation(r) for r in results.get(name, [])} for name in (better, worse)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return None
    a, b = (statistics.mean(values[seed] for seed in seeds) for values in by_seed)
    images = VALIDATION_IMAGES[results[better][0]["settings"]["data"]]
    noise = 1.96 * math.sqrt((a * (100 - a) + b * (100 - b)) / images)
    noise = with_seed_noise(noise, [by_seed[0][seed] - by_seed[1][seed] for seed in seeds])
    return {
        "verdict": "within noise" if abs(a - b) <= noise else "holds" if a > b else "does not hold",
        "evidence": f"validation {a:.1f} against {b:.1f} %, noise ±{noise:.1f} (as of independent runs)",
        "seeds": len(seeds),
    }


def patience_pays(results: dict[str, list[dict]]) -> dict | None:
    """Criterion of claim 4, which is about validation; the paired difference on the test images stands beside it."""
    longer, shorter = "batchnorm_patience7", "batchnorm_patience5"
    if not (found := better_on_validation(longer, shorter, results)):
        return None
    best = [{r["seed"]: r["history"][: r["best_epoch"]] for r in results[name]} for name in (longer, shorter)]
    if all(best[0][seed] == best[1][seed] for seed in best[0].keys() & best[1].keys()):
        found["evidence"] += "; both restore the same weights"
    test = paired_difference(results[longer], results[shorter])
    return found | {
        "evidence": f"{found['evidence']}; on test images {longer} − {shorter}: {points(test)}",
        "test": test,
    }


CLAIMS = [
    overfitting_claim("convnet_full"),
    Claim(
        3,
        "BatchNorm raises validation and test accuracy by about 2 points.",
        (("batchnorm", "convnet"),),
        criterion=lambda results, folder: better_on_validation("batchnorm", "convnet", results),
    ),
    Claim(
        4,
        "Early stopping with BN: patience 7 beats patience 5 on validation (85.8 against 82.8).",
        criterion=lambda results, folder: patience_pays(results),
    ),
]


def more_patience(runs: list[Run], args) -> list[Run]:
    """The report's runs, and one per network for every other patience asked for."""
    names = {run.name for run in runs}
    asked = [stopped(network, patience) for patience in args.patience for network in NETWORKS]
    return [*runs, *(run for run in asked if run.name not in names)]


def figures(results: dict[str, list[dict]]) -> dict[str, Figure]:
    """Both networks in the same axes, at 20 epochs, and at 50 with every rule's stop."""
    drawn = {}
    if pair := [name for name in ("convnet", "batchnorm") if name in results]:
        heading = title(results[pair[0]][0], "with and without batch norm")
        drawn["batchnorm.png"], (losses, accuracies) = new_panels(heading, PANELS)
        for name in pair:
            color = COLORS[name]
            plot_curve(losses, results[name], "train_loss", f"{name}: training", color=color, linestyle="--")
            plot_curve(losses, results[name], "validation_loss", f"{name}: validation", color=color)
            plot_curve(accuracies, results[name], "validation_accuracy", name, color=color)
        losses.legend()
        accuracies.legend()
    if full := {name: results[f"{name}_full"][0] for name in NETWORKS if f"{name}_full" in results}:
        drawn["early_stopping.png"] = plot_stops(full, results)
    return drawn


def full_run(network: str, result: dict, results: dict[str, list[dict]]) -> dict | None:
    """The training to the end that this result was read from; None where it is not there, or was another training."""
    seed, history = result["seed"], result["history"]
    full = next((f for f in results.get(f"{network}_full", []) if f["seed"] == seed), None)
    return full if full and full["history"][: len(history)] == history else None


def has_stopped(result: dict) -> bool:
    """Did its patience end it, before its epochs did?"""
    accuracies = [h["validation_accuracy"] for h in result["history"]]
    return stopping_epoch(accuracies, len(accuracies) + 1, result["settings"]["patience"]) is not None


def plot_stops(full: dict[str, dict], results: dict[str, list[dict]]) -> Figure:
    """The full curves of every network (its first seed), where each patience stops, which weights it restores, and the
    best ones of all epochs, which a stop can miss.
    """
    first = next(iter(full.values()))
    heading = (
        f"seed {first['seed']}: where each patience stops (dotted, numbered), "
        "the weights it restores (dot), the best of all epochs (ring)"
    )
    figure, panels = new_panels(title(first, heading), ("validation loss (cross entropy)", PANELS[1]))
    for axes, entry in zip(panels, ("validation_loss", "validation_accuracy")):
        for row, (network, whole) in enumerate(full.items()):
            color, stops = COLORS[network], {}
            plot_curve(axes, [whole], entry, network, color=color)
            best = whole["best_epoch"]
            axes.plot(best, whole["history"][best - 1][entry], "o", color=color, fillstyle="none", markersize=11)
            rules = [found for name, found in results.items() if re.fullmatch(rf"{network}_patience\d+", name)]
            for result in (r for found in rules for r in found if full_run(network, r, results) is whole):
                best = result["best_epoch"]
                axes.plot(best, result["history"][best - 1][entry], "o", color=color)
                if has_stopped(result):
                    stops.setdefault(len(result["history"]), set()).add(result["settings"]["patience"])
            for stop, patiences in stops.items():
                axes.axvline(stop, color=color, linestyle=":")
                text, place = ", ".join(map(str, sorted(patiences))), axes.get_xaxis_transform()
                axes.text(stop, 1.01 + 0.04 * row, text, color=color, ha="center", fontsize=8, transform=place)
        axes.legend()
    return figure


def stopping_table(results: dict[str, list[dict]]) -> list[list[str]]:
    """For every stopping rule, and none: where training ends, the accuracies of the best and of the last weights, what
    the rule saves, and what it costs against no early stopping. Differences are paired, on all test images, in points.
    One row per seed.
    """
    head = [
        "rule",
        "ends after",
        "best epoch",
        "best: validation / test",
        "last: validation / test",
        "best − last, test [95 %]",
        "epochs and time saved",
        "full − rule, best, test [95 %]",
    ]
    rows = {}
    for name, found in results.items():
        if not (rule := re.fullmatch(rf"({'|'.join(NETWORKS)})_(?:full|patience\d+)", name)):
            continue
        network = rule[1]
        for result in found:
            patience, history, best = result["settings"]["patience"], result["history"], result["best_epoch"]
            pairs = [
                f"{history[epoch - 1]['validation_accuracy']:.1f} / {result['test'][which]['all_10000']['accuracy']:.2f}"
                for which, epoch in (("best", best), ("last", len(history)))
            ]
            full = full_run(network, result, results)
            rest = full["history"][len(history) :] if full else []
            rows[list(NETWORKS).index(network), patience or math.inf, result["seed"]] = [
                f"{network}, {f'patience {patience}' if patience else 'no early stopping'}"
                + (f", seed {result['seed']}" if len(found) > 1 else ""),
                f"{len(history)}" + (" (did not stop)" if patience and not has_stopped(result) else ""),
                f"{best}",
                *pairs,
                difference_cell([result], [result], ("best", "last")),
                f"{len(rest)}, {duration(sum(h['seconds'] for h in rest))}" if full else "-",
                difference_cell([full] if full else [], [result]),
            ]
    return [head, *(rows[place] for place in sorted(rows))] if rows else []


QUESTION = Question(
    "q2",
    "Question 2: batch normalisation and early stopping",
    __doc__,
    RUNS,
    CLAIMS,
    figures,
    stopping_table,
    options={
        "--patience": {
            "type": positive,
            "nargs": "+",
            "default": [],
            "metavar": "N",
            "help": "also stop each network after N epochs without a better validation accuracy; read from checkpoints",
        }
    },
    configure=more_patience,
)

if __name__ == "__main__":
    run_question(QUESTION)
