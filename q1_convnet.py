"""Question 1: a convolutional network for CIFAR-10.

    python q1_convnet.py            # 20 epochs on the full CIFAR-10, downloaded into data/
    python q1_convnet.py --sample   # minutes, the bundled images

The report: validation loss is lowest near epoch 11 and then rises while the training loss falls (overfitting); the
network has 7,678,474 parameters; its first-layer filters look like white noise before training and show edges and
colour patches after; 80.7 % of the first 1,000 test images are right. What we found: results/q1/README.md
"""

from collections.abc import Sequence

from common import Run, Settings, make_parser, select_runs, train_runs
from parts.machine import session
from report.claims import Claim, by_eye, overfits
from report.page import Question, check_pages, finish_pages, update_pages

RUNS = [Run("convnet", Settings(epochs=20))]

CLAIMS = [
    Claim(
        1,
        "Without batch norm, augmentation or dropout the network overfits: validation loss bottoms out near epoch 11 "
        "and then rises while training loss falls.",
        (overfits("convnet"),),
    ),
    Claim(
        2,
        "First-layer filters look like white noise before training and show edges and colour patches after.",
        (by_eye("look at q1/convnet/filters.png; question 1's table of figures has their smoothness"),),
    ),
]

QUESTION = Question("q1", "q1_convnet.py", __doc__, RUNS, CLAIMS)


def main(argv: Sequence[str] | None = None) -> None:
    with session(make_parser(__doc__), argv) as (args, device):
        runs = select_runs(RUNS, args, device)
        check_pages(QUESTION, runs, args)
        for run in train_runs(QUESTION.name, runs, args, device):
            update_pages(QUESTION, args, run)
        finish_pages(QUESTION, args)


if __name__ == "__main__":
    main()
