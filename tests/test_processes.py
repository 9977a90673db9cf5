"""Several processes on one training, under torchrun: the same losses and weights as one process, up to rounding."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from common import ROOT

# The sums over a batch are split in two, so they round differently, and Adam makes whole steps of the rounding of tiny
# gradients: two trainings part slowly. One step's gradients must agree, and the losses of the first steps.
FIRST_STEPS, STEP_TOLERANCE, EPOCH_TOLERANCE = 10, 2e-3, 0.05


def launch(folder, epochs, processes):
    """Question 1 on the sample, under torchrun or, with one process, without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "q1_convnet.py")]
    options = ["--sample", "--device=cpu", "--precision=fp32", f"--epochs={epochs}"]
    folders = [f"--output-dir={folder / 'out'}", f"--checkpoint-dir={folder / 'checkpoints'}"]
    return subprocess.Popen(command + options + folders, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for the process, which must succeed; returns its standard error."""
    _, err = process.communicate()
    assert process.returncode == 0, err
    return err


def checkpoint(folder):
    (path,) = (folder / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The checkpoints of one process after one epoch and after two."""
    folder, states = tmp_path_factory.mktemp("alone"), []
    for epochs in (1, 2):
        finish(launch(folder, epochs, processes=1))
        states.append(checkpoint(folder))
    return states


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the process to kill in /proc")
def test_two_processes_agree_with_one_and_one_goes_on_after_a_kill(alone, tmp_path):
    process = launch(tmp_path, 2, processes=2)
    for line in process.stderr:
        if "epoch 1/2" in line:  # written when the epoch is over
            break
    else:
        pytest.fail("ended before the second epoch")
    kill_rank_one(process.pid)
    process.communicate()
    assert process.returncode != 0
    two = checkpoint(tmp_path)
    assert len(two["history"]) == 1 and two["environments"][0]["processes"] == 2
    losses = [state["step_losses"][0][:FIRST_STEPS] for state in (two, alone[0])]
    torch.testing.assert_close(*losses, atol=STEP_TOLERANCE, rtol=0)

    err = finish(launch(tmp_path, 2, processes=1))
    assert "epoch 2/2" in err and "epoch 1/2" not in err
    resumed = checkpoint(tmp_path)
    assert [e["processes"] for e in resumed["environments"]] == [2, 1]
    for ours, theirs in zip(resumed["history"], alone[1]["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=EPOCH_TOLERANCE)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=EPOCH_TOLERANCE)


ONE_STEP = """
import torch
from tqdm import tqdm
from augment import HorizontalFlip
from common import Run, Settings, Split, build, load_sample, make_optimizer, train_epoch
from machine import distribute, processes, rank

cpu = torch.device("cpu")
changes = {"optimizer": "muon", "filter_learning_rate": 0.1} if sys.argv[2] == "muon" else {}
settings = Settings(augment=(HorizontalFlip(),), precision="fp32", batch_size=101, **changes)  # 50 and 51 images
sample = load_sample()["train"]
with processes(cpu):
    model = build(Run("step", settings), cpu)
    optimizer = make_optimizer(model, settings, cpu)
    split = Split(sample.images[:101], sample.labels[:101])
    loss, _ = train_epoch(distribute(model, cpu), optimizer, split, settings, 1, tqdm(disable=True))
    if rank() == 0:
        gradients, weights = ({n: f(p) for n, p in model.named_parameters()} for f in (lambda p: p.grad, lambda p: p.data))
        torch.save({"loss": loss, "gradients": gradients, "weights": weights}, sys.argv[1])
"""


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_one_step_of_two_processes_has_the_gradients_of_one(tmp_path, optimizer):
    (tmp_path / "one_step.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ONE_STEP}")
    found = []
    for processes in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(tmp_path / "one_step.py")]
        subprocess.run([*command, str(tmp_path / "found.pt"), optimizer], check=True, capture_output=True)
        found.append(torch.load(tmp_path / "found.pt", weights_only=True))
    one, two = found
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, gradient in one["gradients"].items():
        assert ((two["gradients"][name] - gradient).norm() / gradient.norm()).item() < 1e-3, name
    if optimizer == "muon":  # Adam makes whole steps of the rounding of tiny gradients
        for name, weight in one["weights"].items():
            assert ((two["weights"][name] - weight).norm() / weight.norm()).item() < 1e-2, name


def kill_rank_one(launcher: int) -> None:
    """SIGKILL the process of rank 1 among the launcher's children."""
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"RANK=1" in environment:
            return os.kill(pid, signal.SIGKILL)
    pytest.fail("there is no process of rank 1")


def test_an_error_is_said_once(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way of the folder")
    process = launch(tmp_path, 1, processes=2)
    _, err = process.communicate()
    assert process.returncode != 0
    assert err.count("cannot write to") == 1 and "q1_convnet.py: cannot write to" in err
