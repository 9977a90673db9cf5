"""Question 1: a convolutional network for CIFAR-10.

    python q1_convnet.py            # 20 epochs on the full CIFAR-10, downloaded into data/
    python q1_convnet.py --sample   # a minute or two, the bundled images

The report: validation loss is lowest near epoch 11 and then rises while the training loss falls (overfitting); the
network has 7,678,474 parameters; its first-layer filters look like white noise before training and show edges and
colour patches after; 80.7 % of the first 1,000 test images are right.

Here: validation loss is lowest in epoch 11 too, and rises from 0.59 to 0.78 while the training loss falls to 0.09; the
filters' smooth share rises from 35 % (white noise: 33) to 44 %; 79.7 % of the first 1,000 test images are right, 78.7 %
[77.9, 79.5] of all 10,000.
"""

from pathlib import Path

import numpy as np

from common import Claim, Question, Run, Settings, load_filters, overfitting_claim, run_question

RUNS = [Run("convnet", Settings(epochs=20), reported={"test": 80.7})]


def smoothness(filters: np.ndarray) -> np.ndarray:
    """Share of every 3x3 filter's energy in its three smoothest patterns, [C_out] in [0, 1]; white noise has 1/3.

    The patterns are those of the two-dimensional cosine transform: constant, horizontal ramp, vertical ramp; of nine.
    """
    basis = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])  # orthonormal DCT-II of length 3
    energy = (np.einsum("ui,vj,ncij->ncuv", basis, basis, filters) ** 2).sum(1)  # [C_out, 3, 3]
    return (energy[:, 0, 0] + energy[:, 0, 1] + energy[:, 1, 0]) / energy.sum((1, 2))


def filters_become_smooth(results: list[dict], folder: Path) -> dict | None:
    """Criterion of "white noise before, patterns after": `smoothness` is 1/3 before training, within its 95 % interval
    over filters, and has risen after, beyond the interval of the difference. Seed 0's filters.
    """
    if not results:
        return None
    filters = load_filters(folder, results[0])
    shares = {name: smoothness(filters[name].astype(float)) for name in ("before", "best")}
    rng = np.random.default_rng(0)
    resampled = rng.integers(len(shares["best"]), size=(4000, len(shares["best"])))
    intervals = {name: np.percentile(100 * share[resampled].mean(1), [2.5, 97.5]) for name, share in shares.items()}
    rise = np.percentile((shares["best"] - shares["before"])[resampled].mean(1), [2.5, 97.5])
    noise = intervals["before"][0] <= 100 / 3 <= intervals["before"][1]
    verdict = "does not hold" if rise[1] < 0 else "holds" if noise and rise[0] > 0 else "within noise"
    text = [
        f"{100 * shares[n].mean():.1f} % [{intervals[n][0]:.1f}, {intervals[n][1]:.1f}]" for n in ("before", "best")
    ]
    evidence = f"energy in the three smoothest of nine patterns (white noise 33.3 %): before {text[0]}, after {text[1]}"
    return {"verdict": verdict, "evidence": evidence, "seeds": 1}


CLAIMS = [
    overfitting_claim("convnet"),
    Claim(
        2,
        "First-layer filters look like white noise before training and show edges and colour patches after.",
        criterion=lambda results, folder: filters_become_smooth(results.get("convnet", []), folder / "convnet"),
    ),
]

QUESTION = Question("q1", "Question 1: the convolutional network", __doc__, RUNS, CLAIMS)

if __name__ == "__main__":
    run_question(QUESTION)
