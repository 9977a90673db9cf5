import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.vgg import make_layers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import q4_vgg_transfer
from common import Split, load_sample

torch.set_flush_denormal(True)  # as the scripts do, before torch starts its threads
NARROW = (8, 16, 16, 16, 16)  # channels: where the network's width does not matter


def make_narrow(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(common, "CHANNELS", NARROW)
    layers = [8, "M", 16, "M", 16, "M", 16, "M", 512, "M"]
    patch.setattr(q4_vgg_transfer, "vgg11_bn", lambda: SimpleNamespace(features=make_layers(layers, batch_norm=True)))


@pytest.fixture
def narrow(monkeypatch):
    make_narrow(monkeypatch)


@pytest.fixture(scope="session")
def sample():
    return load_sample()


@pytest.fixture(scope="session")
def small(sample):
    """A few real images: 120 to train, 50 to validate, 50 to test."""
    found = {}
    for part, images in {"train": 120, "validation": 50, "test": 50}.items():
        chosen = torch.randperm(len(sample[part]), generator=torch.Generator().manual_seed(1))[:images]
        found[part] = Split(sample[part].images[chosen], sample[part].labels[chosen])
    return found


@pytest.fixture
def quick(narrow, small, monkeypatch):
    """A narrow network, and a few images in place of the sample and of CIFAR-10."""
    monkeypatch.setattr(common, "load_sample", lambda: small)
    monkeypatch.setattr(common, "load_cifar10", lambda _: small)


@pytest.fixture
def q1(tmp_path):
    """A copy of question 1's committed results, of three seeds, without pictures and pages."""
    others = shutil.ignore_patterns("*.png", "*.md", "claims.json", "seed[!0-2]*")
    shutil.copytree(ROOT / "results/q1", tmp_path / "q1", ignore=others)
    return tmp_path / "q1"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def folders(path: Path) -> list[str]:
    """The options that keep a run's files in one folder."""
    return [f"--output-dir={path / 'out'}", f"--checkpoint-dir={path / 'checkpoints'}"]


def three_epochs(path: Path) -> list[str]:
    return ["--sample", "--epochs=3", "--device=cpu", "--precision=fp32", *folders(path)]


def run_script(path: Path, script: str = "q1_convnet", processes: int = 1, before: str = "pass"):
    """Three epochs of a narrow network in a real process, under torchrun where there are several, after `before`."""
    code = f"import common; common.CHANNELS = {NARROW}; {before}; import {script}; {script}.main()"
    command = ["-c", code, *three_epochs(path)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
        command = [*torchrun, sys.executable, *command]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    options = {"capture_output": True, "text": True, "env": environment}
    return subprocess.run([sys.executable, *command], check=False, **options)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Question 1, narrow, on the sample, three epochs, from the command line: its folder, its output and its errors."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_script(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def checkpoint(folder: Path) -> dict:
    """The only one in the folder of `folders`."""
    (path,) = (folder / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)
