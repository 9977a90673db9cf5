"""Several processes on one training, under torchrun: the same losses and weights as one process, up to rounding.

The sums over a batch are split in two, so they round differently, and Adam makes whole steps of the rounding of tiny
gradients: two trainings part slowly. One step's gradients must agree, and the losses of the first steps.
"""

import os
import signal

import pytest
import torch
from conftest import NARROW, folders, start

import common
from common import Run, Settings, build, load_sample, make_optimizer, train_epoch
from parts import machine

FIRST_STEPS, STEP_TOLERANCE = 10, 2e-3
CPU = torch.device("cpu")


def checkpoint(folder):
    (path,) = (folder / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)


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


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the process to kill in /proc")
def test_two_processes_agree_with_one_and_one_goes_on_after_a_kill(finished, tmp_path):
    process = start("--epochs=3", *folders(tmp_path), processes=2)
    for line in process.stderr:
        if "epoch 1/3" in line:  # written when the epoch is over
            break
    else:
        pytest.fail("ended before the second epoch")
    kill_rank_one(process.pid)
    process.communicate()
    assert process.returncode != 0
    two = checkpoint(tmp_path)
    epochs = len(two["history"])
    assert 1 <= epochs < 3 and two["environments"][0]["processes"] == 2
    losses = [state["step_losses"][0][:FIRST_STEPS] for state in (two, checkpoint(finished[0]))]
    torch.testing.assert_close(*losses, atol=STEP_TOLERANCE, rtol=0)

    process = start("--epochs=3", *folders(tmp_path))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert f"epoch {epochs + 1}/3" in err and f"epoch {epochs}/3" not in err
    resumed = checkpoint(tmp_path)
    assert [e["processes"] for e in resumed["environments"]] == [2, 1]
    assert [len(losses) for losses in resumed["step_losses"]] == [len(resumed["step_losses"][0])] * 3


CHANGES = {"adam": {}, "muon": {"optimizer": "muon", "filter_learning_rate": 0.1}, "batch norm": {"batch_norm": True}}


def one_step(changes: dict) -> dict:
    """Of 101 images, 50 and 51 where there are two processes; what this process has afterwards."""
    settings = Settings(precision="fp32", batch_size=101, **changes)
    sample = load_sample()["train"]
    split = common.Split(sample.images[:101], sample.labels[:101])
    model = build(Run("step", settings), CPU)
    optimizer = make_optimizer(model, settings, CPU)
    bar = common.make_progress(Run("step", settings), 101, 0)
    loss, _ = train_epoch(machine.distribute(model, CPU), optimizer, split, settings, 1, bar)
    common.share_buffers(model)
    found = {"gradients": [p.grad for p in model.parameters()], "weights": [p.data for p in model.parameters()]}
    return found | {"loss": loss, "buffers": dict(model.named_buffers())}


def work(rank: int, path: str, port: int) -> None:
    """Main program of one of two processes."""
    common.CHANNELS = NARROW
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    with machine.processes(CPU):
        torch.save({name: one_step(changes) for name, changes in CHANGES.items()}, f"{path}.{rank}")


def test_one_step_of_two_processes_has_the_gradients_of_one(tmp_path, narrow):
    torch.multiprocessing.spawn(work, (str(tmp_path / "step"), 29500 + os.getpid() % 1000), nprocs=2)
    of_first, of_second = (torch.load(tmp_path / f"step.{rank}", weights_only=True) for rank in range(2))
    for name in ("adam", "muon"):
        one, two = one_step(CHANGES[name]), of_first[name]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-3
    for ours, theirs in zip(two["weights"], one["weights"], strict=True):  # Muon's: see above of Adam's
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-2
    buffers, same = of_first["batch norm"]["buffers"], of_second["batch norm"]["buffers"]
    assert buffers and all(torch.equal(buffers[name], same[name]) for name in buffers)  # the first process's, for all
    alone = one_step(CHANGES["batch norm"])["buffers"]  # each process normalises its own part of the batch
    assert not torch.allclose(buffers["features.1.running_mean"], alone["features.1.running_mean"], rtol=1e-4, atol=0)


def test_parts_of_a_batch_cover_it_once(monkeypatch):
    for n, world in ((200, 2), (101, 3), (2, 4)):
        monkeypatch.setattr(machine, "world_size", lambda world=world: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(machine, "rank", lambda rank=rank: rank)
            parts += list(range(n))[machine.my_part(n)]
        assert parts == list(range(n))


def test_batch_norm_over_parts_of_a_batch_is_recorded(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    for batch_norm, device, recorded in ((True, "cpu", True), (False, "cpu", False), (True, "cuda", False)):
        state = {"history": [{}], "environments": []}
        monkeypatch.setattr(machine, "environment", lambda *_: {"device": "x"})
        common.note_environment(state, common.ConvNet(batch_norm), torch.device(device), "fp32")
        assert ("batch_norm" in state["environments"][0]) == recorded
