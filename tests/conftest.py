import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
from common import Split, find_data_dir, load_cifar10, load_sample

NARROW = (8, 16, 16, 16, 16)  # channels: where the network's width does not matter


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(common, "CHANNELS", NARROW)


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


def start(*args: str, script: str = "q1_convnet", processes: int = 1) -> subprocess.Popen:
    """A real process of a narrow network on the sample, under torchrun where there are several; its standard error can
    be read line by line.
    """
    code = f"import common; common.CHANNELS = {NARROW}; import {script}; {script}.main()"
    command = ["-c", code]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
        command = [*torchrun, sys.executable, *command]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command, "--sample", "--device=cpu", "--precision=fp32", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def folders(path: Path) -> list[str]:
    """The options that keep a run's files in one folder."""
    return [f"--output-dir={path / 'out'}", f"--checkpoint-dir={path / 'checkpoints'}"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Question 1, narrow, on the sample, three epochs, from the command line: its folder, its output and its errors."""
    folder = tmp_path_factory.mktemp("finished")
    process = start("--epochs=3", *folders(folder))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return folder, out, err
