"""Results made by hand, for tests of what is read from them."""

from pathlib import Path

import numpy as np

from common import Settings
from report.numbers import Result


def make(run="convnet", seed=0, test=80.0, alike=None, question="q1", curves=None, **settings) -> Result:
    """A result with these accuracies, of two epochs unless `curves` says more."""
    alike = test if alike is None else alike
    losses = {"train_loss": [1.0, 0.5], "validation_loss": [1.1, 0.9]}
    accuracies = {"validation_accuracy": [test - 1, test], "seconds": [1.0, 1.0]}
    curves = losses | accuracies | (curves or {})
    curves = {name: np.array(values, float) for name, values in curves.items()}
    tests = {(w, i): v for w in ("best", "last") for i, v in (("all_images", test), ("report_images", alike))}
    return Result(
        path=Path(f"results/{question}/{run}/seed{seed}.json"),
        question=question,
        run=run,
        seed=seed,
        settings=Settings(seed=seed, precision="fp32").as_dict() | settings,
        environments=[{"device": "a machine", "precision": "fp32", "torch": "2", "from_epoch": 1}],
        parameters={"trainable": 1, "layers": []},
        best_epoch=int(curves["validation_accuracy"].argmax()) + 1,
        curves=curves,
        tests=tests,
        confusion={weights: np.eye(10) for weights in ("best", "last")},
        digest=f"{run}{seed}",
    )


def seeds(run: str, tests: list[float], **settings) -> list[Result]:
    return [make(run, seed, test, **settings) for seed, test in enumerate(tests)]
