"""Question 1: a convolutional network for CIFAR-10.

    python q1_convnet.py            # 20 epochs on the full CIFAR-10, downloaded into data/
    python q1_convnet.py --sample   # about a minute, the bundled images

The report: validation loss is lowest near epoch 11 and then rises while the training loss falls (overfitting); the
network has 7,678,474 parameters; its first-layer filters look like white noise before training and show edges and
colour patches after; 80.7 % of the first 1,000 test images are right.
"""

from common import Claim, Question, Run, Settings, filters_become_smooth, overfits, run_question

RUNS = [Run("convnet", Settings(epochs=20), reported={"test": 80.7})]

CLAIMS = [
    Claim(
        1,
        "Without regularisation the network overfits: validation loss bottoms out near epoch 11 and then rises "
        "while training loss falls.",
        criterion=lambda results, folder: overfits(results.get("convnet", [])),
    ),
    Claim(
        2,
        "First-layer filters look like white noise before training and show edges and colour patches after.",
        criterion=lambda results, folder: filters_become_smooth(results.get("convnet", []), folder / "convnet"),
    ),
]

QUESTION = Question("q1", "Question 1: the convolutional network", __doc__, RUNS, CLAIMS)

if __name__ == "__main__":
    run_question(QUESTION)
