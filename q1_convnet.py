"""Question 1: a convolutional network for CIFAR-10.

    python q1_convnet.py            # 20 epochs on the full CIFAR-10, downloaded into data/
    python q1_convnet.py --sample   # about a minute, the bundled images

The report: validation loss is lowest near epoch 11 and then rises while the training loss falls (overfitting); the
network has 7,678,474 parameters; its first-layer filters look like white noise before training and show edges and
colour patches after; 80.7 % of the first 1,000 test images are right.
"""

from common import Run, Settings, run_question

RUNS = [Run("convnet", Settings(epochs=20), reported={"test": 80.7})]

if __name__ == "__main__":
    run_question("q1", __doc__, RUNS)
