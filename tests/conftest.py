import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import Split, find_data_dir, load_cifar10, load_sample  # noqa: E402


@pytest.fixture(scope="session")
def sample():
    return load_sample()


@pytest.fixture(scope="session")
def small(sample):
    """A few real images: 120 to train, 50 to validate, 50 to test."""
    spread = {
        part: torch.randperm(len(split), generator=torch.Generator().manual_seed(1)) for part, split in sample.items()
    }
    sizes = {"train": 120, "validation": 50, "test": 50}
    return {p: Split(s.images[spread[p][: sizes[p]]], s.labels[spread[p][: sizes[p]]]) for p, s in sample.items()}


@pytest.fixture(scope="session")
def official():
    if not (find_data_dir() / "cifar-10-batches-py").is_dir():
        pytest.skip("the official CIFAR-10 is not at hand (CIFAR10_DIR or data/)")
    return load_cifar10(find_data_dir())


def start(*args: str) -> subprocess.Popen:
    """A real process of question 1 on the sample, its standard error readable line by line."""
    command = [sys.executable, str(ROOT / "q1_convnet.py"), "--sample", "--device", "cpu", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Question 1 on the sample, three epochs, from the command line: its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("finished")
    process = start(
        "--epochs", "3", "--output-dir", str(folder / "out"), "--checkpoint-dir", str(folder / "checkpoints")
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    return folder, out, err
