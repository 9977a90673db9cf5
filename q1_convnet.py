"""Question 1: a convolutional network for CIFAR-10.

    python q1_convnet.py            # 20 epochs on the full CIFAR-10, downloaded into data/
    python q1_convnet.py --sample   # minutes, the bundled images

The report: validation loss is lowest near epoch 11 and then rises while the training loss falls (overfitting); the
network has 7,678,474 parameters; its first-layer filters look like white noise before training and show edges and
colour patches after; 80.7 % of the first 1,000 test images are right. What we found: results/README.md
"""

from collections.abc import Sequence
from functools import partial

from common import Run, Settings, list_runs, make_parser, select_runs, train_runs

# isort: split
# common stands first: it answers Ctrl-C while torch loads

import numpy as np

from machine import session
from report import (
    NOT_RUN,
    Check,
    Claim,
    Finding,
    Results,
    Table,
    layer_table,
    load_arrays,
    overfits,
    report_filters,
    smoothness,
    verdict,
    write_report,
)

RUNS = [Run("convnet", Settings(epochs=20))]


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(4000, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def filters_become_smooth(run: str) -> Check:
    """A check, for every seed, that `smoothness` is 1/3 before training, within its interval over filters, and higher at
    the last epoch, beyond the interval of the difference.
    """

    def check(results: Results, comparisons: int = 1) -> Finding:
        rises, white, evidence = [], [], ["energy in the three smoothest of nine patterns (white noise 33.3 %)"]
        for result in results.get(run, ()):
            arrays = load_arrays(results.folder / run, result)
            before, after = (100 * smoothness(arrays[name]) for name in ("before", "last"))
            noise, rise = mean_interval(before), mean_interval(after - before)
            rises.append(rise)
            white.append(noise[0] <= 100 / 3 <= noise[1])
            evidence.append(
                f"seed {result['seed']}: before {before.mean():.1f} % [{noise[0]:.1f}, {noise[1]:.1f}], "
                f"after {after.mean():.1f} %, a rise of [{rise[0]:.1f}, {rise[1]:.1f}]"
            )
        if not rises:
            return NOT_RUN
        found = verdict((min(low for low, _ in rises), max(high for _, high in rises)))
        if found == "holds" and not all(white):
            found = "within noise"
        theirs = [100 * smoothness(filters).mean() for filters in report_filters().values()]
        evidence.append(f"the report's own filters: before {theirs[0]:.1f} %, after {theirs[1]:.1f} %")
        return Finding(found, "; ".join(evidence), lacks_training=len(rises) == 1)

    return check


CLAIMS = [
    Claim(
        "1",
        "Without regularisation the network overfits: validation loss bottoms out near epoch 11 and then rises "
        "while training loss falls.",
        (overfits("convnet"),),
    ),
    Claim(
        "2",
        "First-layer filters look like white noise before training and show edges and colour patches after.",
        (filters_become_smooth("convnet"),),
    ),
]


def tables(results: Results) -> list[Table]:
    """Parameters of every layer, as PyTorch counts them and by the report's formulas."""
    return [layer_table("q1", "convnet", results["convnet"])] if "convnet" in results else []


def main(argv: Sequence[str] | None = None) -> None:
    with session(make_parser(__doc__), argv) as (args, device):
        runs = select_runs(RUNS, args, device)
        if args.list:
            return list_runs("q1", runs, args)
        write = partial(write_report, "q1", __doc__, RUNS, args, CLAIMS, tables=tables)
        for run in train_runs("q1", runs, args, device):
            write(changed=[run.name])
        write(show=True)


if __name__ == "__main__":
    main()
