"""Several processes on one training, under torchrun: the same losses and weights as one process, up to rounding.

The sums over a batch are split in three, so they round differently, and Adam makes whole steps of the rounding of tiny
gradients: two trainings part slowly. One step's gradients must agree, and the losses of the first steps.
"""

import os
import signal

import pytest
import torch

import common
import q1_convnet
from common import Run, Settings, build, load_sample
from conftest import checkpoint, run_script, three_epochs
from parts import machine

FIRST_STEPS, STEP_TOLERANCE = 10, 2e-3
CPU = torch.device("cpu")
CHANGES = {"adam": {}, "muon": {"optimizer": "muon", "filter_learning_rate": 0.1}, "batch norm": {"batch_norm": True}}


def train_steps(folder, changes: dict, stops: tuple[int, ...] = (1,)) -> dict:
    """A training up to each of these epochs in turn, going on from its checkpoint; an epoch is a step of 101 images, 33
    or 34 for each of three processes. What this process has afterwards.
    """
    sample = load_sample()["train"]
    data = dict.fromkeys(("train", "validation", "test"), common.Split(sample.images[:101], sample.labels[:101]))
    for epochs in stops:
        run = Run("steps", Settings(precision="fp32", batch_size=101, epochs=epochs, **changes))
        model, path = build(run, CPU), folder / f"{run.settings.key()}-{len(stops)}-of-{max(stops)}.step"
        state = common.train(run, model, data, CPU, path)
    found = {"gradients": [p.grad for p in model.parameters()], "weights": [p.data for p in model.parameters()]}
    found |= {"loss": state["history"][0]["train_loss"], "buffers": dict(model.named_buffers())}
    return found | {"environment": state["environments"][0]}


def main() -> None:
    """Of every process: a step of each kind, two in one go and with a stop between them, and then question 1."""
    check_pages = q1_convnet.check_pages

    def steps_first(question, runs, args):  # the processes have joined
        folder = args.output_dir.parent
        steps = {name: train_steps(folder, changes) for name, changes in CHANGES.items()}
        steps |= {"whole": train_steps(folder, {}, (2,)), "resumed": train_steps(folder, {}, (1, 2))}
        torch.save(steps, folder / f"step.{machine.rank()}")
        if machine.rank() == 1:
            common.print_epoch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # when the first epoch is saved
        check_pages(question, runs, args)

    q1_convnet.check_pages = steps_first
    q1_convnet.main()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of three processes, the second of which was killed after the first epoch."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_script(folder, script="test_processes", processes=3)
    assert done.returncode != 0 and list((folder / "checkpoints").glob("*.pt")), done.stderr
    return folder


def test_three_processes_agree_with_one_and_one_goes_on_after_a_kill(finished, killed, narrow, capsys):
    three, one = checkpoint(killed), checkpoint(finished[0])
    assert len(three["history"]) == 1 and three["environments"][0]["processes"] == 3
    losses = [state["step_losses"][0][:FIRST_STEPS] for state in (three, one)]
    torch.testing.assert_close(*losses, atol=STEP_TOLERANCE, rtol=0)
    assert three["history"][0]["validation_loss"] == pytest.approx(one["history"][0]["validation_loss"], rel=0.1)
    assert three["predictions"][0].count_nonzero() >= 0.6 * one["predictions"][0].count_nonzero()  # of every process
    q1_convnet.main(three_epochs(killed))
    err = capsys.readouterr().err
    assert "epoch 2/3" in err and "epoch 1/3" not in err
    resumed = checkpoint(killed)
    assert [e["processes"] for e in resumed["environments"]] == [3, 1]
    assert [len(losses) for losses in resumed["step_losses"]] == [len(resumed["step_losses"][0])] * 3


def test_one_step_of_three_processes_has_the_gradients_of_one(killed, narrow, tmp_path):
    of_first, of_second = (torch.load(killed / f"step.{rank}", weights_only=True) for rank in range(2))
    for name in ("adam", "muon"):
        one, three = train_steps(tmp_path, CHANGES[name]), of_first[name]
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for ours, theirs in zip(three["gradients"], one["gradients"], strict=True):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-3
    for ours, theirs in zip(three["weights"], one["weights"], strict=True):  # Muon's: see above of Adam's
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-2
    buffers, same = of_first["batch norm"]["buffers"], of_second["batch norm"]["buffers"]
    assert buffers and all(torch.equal(buffers[name], same[name]) for name in buffers)  # the first process's, for all
    alone = train_steps(tmp_path, CHANGES["batch norm"])["buffers"]  # each process normalises its own part of the batch
    assert not torch.allclose(buffers["features.1.running_mean"], alone["features.1.running_mean"], rtol=1e-4, atol=0)
    recorded = {name: "batch_norm" in of_first[name]["environment"] for name in CHANGES}
    assert recorded == {"adam": False, "muon": False, "batch norm": True}


def test_three_processes_go_on_to_the_very_same_weights(killed):
    steps = torch.load(killed / "step.0", weights_only=True)
    torch.testing.assert_close(steps["resumed"]["weights"], steps["whole"]["weights"], rtol=0, atol=0)
