import dataclasses
import itertools
import json
import signal
from contextlib import ExitStack

import pytest
import torch
from conftest import start

import common
import machine
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
from augment import HorizontalFlip, RandomCrop
from common import (
    ROOT,
    ConvNet,
    Run,
    Settings,
    Split,
    best_epoch,
    build,
    evaluate,
    load_checkpoint,
    on_sample,
    read_run,
    stopping_epoch,
    train,
)
from machine import UserError, choose_device, choose_precision
from q3_augment_dropout import AUGMENTATIONS, MIXTURE

CPU = torch.device("cpu")
SETTINGS = Settings(  # all that is random or has a state of its own; batches of 80 and 40
    data="cifar10-sample",
    precision="fp32",
    batch_norm=True,
    dropout=0.2,
    augment=(RandomCrop(), HorizontalFlip()),
    epochs=2,
    batch_size=80,
)

PARAMETERS = {"trainable": 0, "layers": []}
VGG_ONE_EPOCH = dataclasses.replace(q4_vgg_transfer.VGG, precision="fp32", epochs=1)


def follow(small, folder, **changes):
    return trained(Run("test", dataclasses.replace(SETTINGS, **changes)), small, folder)


def trained(run, data, folder, device=CPU):
    return train(run, build(run, device), data, device, folder / f"{run.settings.key()}.pt")


def network(**changes):
    return build(Run("test", dataclasses.replace(SETTINGS, **changes)), CPU)


def numbers(state):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["history"]]


def assert_same_training(a, b):
    """Bit for bit: metrics, predictions, and the weights of the last and of the best epoch."""
    assert numbers(a) == numbers(b)
    assert all(torch.equal(x, y) for x, y in zip(a["predictions"], b["predictions"], strict=True))
    for name in ("model", "best"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])


@pytest.fixture(scope="session")
def two_epochs(small, tmp_path_factory):
    """Two epochs in one go: the folder of the checkpoint, and the checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    follow(small, folder)
    return folder, load_checkpoint(folder / f"{SETTINGS.key()}.pt", SETTINGS, network())


def test_the_same_seed_repeats_and_another_does_not(small, two_epochs, tmp_path):
    torch.rand(7)  # the global generator's state must not matter
    assert_same_training(follow(small, tmp_path), two_epochs[1])
    other = follow(small, tmp_path, seed=1, epochs=1)
    assert numbers(other)[0]["train_loss"] != numbers(two_epochs[1])[0]["train_loss"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_gpu_repeats_itself_too(small, tmp_path):
    device = choose_device("cuda")
    settings = dataclasses.replace(SETTINGS, precision=choose_precision("auto", device), augment=AUGMENTATIONS[MIXTURE])
    run, data = Run("test", settings), {part: split.to(device) for part, split in small.items()}
    assert_same_training(*(trained(run, data, tmp_path / folder, device) for folder in ("one", "other")))


def test_training_is_augmented_anew_every_epoch_and_the_validation_that_counts_never(small, tmp_path, monkeypatch):
    drawn, real = [], Split.batch

    def batch(split, index, settings, rng=None, part=slice(None)):
        drawn.append((len(split), None if rng is None else rng.initial_seed()))
        return real(split, index, settings, rng, part)

    monkeypatch.setattr(Split, "batch", batch)
    data = small | {"test": Split(small["test"].images[:40], small["test"].labels[:40])}
    history = follow(data, tmp_path)["history"]
    training, validation, test = ([seed for images, seed in drawn if images == n] for n in (120, 50, 40))
    assert len(training) == 4 and training[0] == training[1] != training[2] == training[3]  # two batches an epoch
    assert None not in training and set(test) == {None}
    plain, augmented, later_plain, later = validation  # once as they are, once as the report measures them
    assert plain is later_plain is None and len({augmented, later, *training}) == 4
    assert all(h["augmented_validation_loss"] != h["validation_loss"] for h in history)


def test_without_augmentation_nothing_is_measured_augmented(small, tmp_path):
    (entry,) = follow(small, tmp_path, augment=(), epochs=1)["history"]
    assert not [name for name in entry if "augmented" in name]


def test_a_network_of_another_name_is_refused(small):
    run = Run("test", dataclasses.replace(SETTINGS, network="VGG11"))
    with pytest.raises(ValueError, match="network='VGG11' in its settings, but it is ConvNet"):
        build(run, CPU)


@pytest.mark.parametrize("edit", ["another layer", "another size"])
def test_a_checkpoint_of_another_network_is_refused(two_epochs, edit):
    """Somebody edits the network and runs the same command again."""
    folder, state = two_epochs
    edited = network()
    if edit == "another layer":
        edited.features[2] = torch.nn.Dropout(0.4)
    else:
        edited.classifier.weight = torch.nn.Parameter(torch.zeros(10, 513))  # not printed
    with pytest.raises(UserError, match="is of another network than the code builds now; .*--fresh"):
        load_checkpoint(folder / f"{SETTINGS.key()}.pt", SETTINGS, edited)


def test_the_optimiser_is_the_exercises(two_epochs):
    (group,) = two_epochs[1]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(2e-3 * 0.95) and group["weight_decay"] == 1e-3  # in the second epoch
    assert [entry["lr"] for entry in two_epochs[1]["history"]] == pytest.approx([2e-3, 2e-3 * 0.95])


MODERN = {"optimizer": "muon", "learning_rate": 0.05, "filter_learning_rate": 0.1, "schedule": "linear"}


def test_an_interrupted_linear_schedule_ends_where_an_uninterrupted_one_does(small, tmp_path, monkeypatch):
    """Muon's momentum, SGD's, and the learning rates of every step go on."""
    whole = follow(small, tmp_path / "whole", **MODERN)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "print_epoch", interrupt)  # when the first epoch is saved
    with pytest.raises(KeyboardInterrupt):
        follow(small, tmp_path / "halves", **MODERN)
    monkeypatch.undo()
    assert_same_training(follow(small, tmp_path / "halves", **MODERN), whole)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("linear", [0.05, 0.0375, 0.025, 0.0125]), ("exponential", [0.05, 0.05, 0.0475, 0.0475])],
)
def test_the_learning_rates_of_every_step(small, tmp_path, monkeypatch, schedule, rates):
    """Two epochs of two steps. Muon's follows the same schedule."""
    met, real = [], common.MuonAndSGD.step

    def step(optimizer):
        met.append([group["lr"] for group in optimizer.param_groups])
        real(optimizer)

    monkeypatch.setattr(common.MuonAndSGD, "step", step)
    history = follow(small, tmp_path, **MODERN | {"schedule": schedule})["history"]
    assert [lr for _, lr in met] == pytest.approx(rates)
    assert [lr for lr, _ in met] == pytest.approx([2 * rate for rate in rates])
    assert [h["lr"] for h in history] == pytest.approx(rates[::2])


def test_smoothed_labels_are_trained_on_and_the_plain_loss_is_recorded(small, tmp_path):
    plain, smoothed = (
        follow(small, tmp_path / str(share), label_smoothing=share, epochs=1)["step_losses"][0] for share in (0.0, 0.5)
    )
    assert plain[0] == smoothed[0]  # before the first update
    assert plain[1] != smoothed[1]


def test_one_epoch_extended_to_two_is_two_in_one_go(small, two_epochs, tmp_path):
    one = follow(small, tmp_path, epochs=1)
    assert len(one["history"]) == 1
    assert_same_training(follow(small, tmp_path, epochs=2), two_epochs[1])


def test_no_epoch_is_trained_twice(small, two_epochs):
    folder, state = two_epochs
    path = folder / f"{SETTINGS.key()}.pt"
    written = path.stat().st_mtime_ns
    for changes in ({"epochs": 1}, {"epochs": 2}, {"epochs": 2, "patience": 5}):
        again = follow(small, folder, **changes)
        assert again["history"] == state["history"]
    assert path.stat().st_mtime_ns == written


def test_reading_fewer_epochs_is_having_trained_fewer(small, two_epochs, tmp_path):
    one = Run("one", dataclasses.replace(SETTINGS, epochs=1))
    fewer = read_run("q1", one, PARAMETERS, follow(small, tmp_path, epochs=1), small["test"].labels)
    read = read_run("q1", one, PARAMETERS, two_epochs[1], small["test"].labels)
    for result in (fewer, read):
        result["history"][0].pop("seconds", None)
    assert fewer == read


def test_reading_a_stopping_rule_is_having_stopped_there(small, tmp_path, monkeypatch):
    values = [30.0, 40.0, 39.0], [30.0, 40.0, 39.0, 50.0]  # three epochs and stop; then four
    measured = iter([v for run in values for value in run for v in (value, 0.0)])  # the second: augmented, never used
    monkeypatch.setattr(common, "accuracy", lambda *_: next(measured))
    rule = Run("rule", dataclasses.replace(SETTINGS, epochs=4, patience=1))
    stopped = trained(rule, small, tmp_path / "stopped")
    full = trained(Run("full", dataclasses.replace(SETTINGS, epochs=4)), small, tmp_path / "full")
    assert (len(stopped["history"]), len(full["history"])) == (3, 4)
    results = [read_run("q2", rule, PARAMETERS, state, small["test"].labels) for state in (stopped, full)]
    for result in results:
        for entry in result["history"]:
            entry.pop("seconds", None)
    assert results[0] == results[1]


def test_patience_needs_validation_images(small, tmp_path):
    data = small | {"validation": Split(small["validation"].images[:0], small["validation"].labels[:0])}
    with pytest.raises(UserError, match="patience needs validation images"):
        trained(Run("rule", dataclasses.replace(SETTINGS, patience=5)), data, tmp_path)


def test_the_key_is_what_shapes_the_weights():
    settings = Settings()
    assert dataclasses.replace(settings, epochs=50, patience=5).key() == settings.key()
    linear = dataclasses.replace(settings, schedule="linear")  # it ends with the last epoch
    assert dataclasses.replace(linear, patience=5).key() == linear.key()
    assert dataclasses.replace(linear, epochs=50).key() != linear.key()
    for change in (
        {"seed": 1},
        {"precision": "fp32"},
        {"batch_norm": True},
        {"dropout": 0.1},
        {"learning_rate": 1e-3},
        {"augment": ("x",)},
        {"data": "x"},
        {"dropout_after_pool": True},
        {"backbone": "frozen"},
        {"optimizer": "muon"},
        {"filter_learning_rate": 0.1},
        {"schedule": "linear"},
        {"label_smoothing": 0.1},
    ):
        assert dataclasses.replace(settings, **change).key() != settings.key()


def test_the_keys_of_trained_trajectories_never_change():
    """A key that changes orphans a checkpoint that took hours: rename settings as you like, but not these."""
    weights = (
        "vgg11_bn_features_tinyimagenet.pth sha256:69a37b9ff57d64bd078533d62d0737af89f8fea165386682cbca99c4dd5ba730"
    )
    vgg = q4_vgg_transfer.transfer_runs("unused", "stand_in", weights)
    questions = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)
    runs = [*(run for question in questions for run in question.RUNS), *vgg]
    keys = {run.name: dataclasses.replace(run.settings, precision="bf16").key() for run in runs}
    trajectories = {}
    for name, key in keys.items():
        trajectories.setdefault(key, []).append(name)
    pinned = json.loads((ROOT / "tests/keys.json").read_text())
    assert {key: trajectories.get(key) for key in pinned} == pinned
    seed1 = dataclasses.replace(q1_convnet.RUNS[0].settings, precision="bf16", seed=1)
    assert seed1.key() == "ConvNet-seed1-1bd545fbe6"
    fp32 = dataclasses.replace(q1_convnet.RUNS[0].settings, precision="fp32")
    assert fp32.key() == "ConvNet-seed0-dd15c90375"


@pytest.fixture
def worse_every_epoch(monkeypatch):
    """Validation accuracy falls from epoch to epoch, whatever the network does."""
    falling = itertools.count(50, -1)
    monkeypatch.setattr(common, "accuracy", lambda *_: float(next(falling)))


def test_best_weights_are_a_copy(small, two_epochs, tmp_path, worse_every_epoch):
    state = follow(small, tmp_path, epochs=2)  # the first epoch is the best, and training went on
    first = follow(small, tmp_path / "one", epochs=1)["model"]
    assert all(torch.equal(state["best"][k], first[k]) for k in first)
    assert not torch.equal(state["best"]["classifier.weight"], state["model"]["classifier.weight"])


def test_the_best_weights_give_the_recorded_predictions(small, two_epochs):
    state = two_epochs[1]
    model = ConvNet(batch_norm=True, dropout=0.2).to(memory_format=torch.channels_last)
    model.load_state_dict(state["best"])
    _, predictions = evaluate(model, small["test"], SETTINGS)
    epoch = best_epoch(state["history"])
    assert torch.equal(predictions, state["predictions"][epoch - 1])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_alone(small, training):
    model = ConvNet(batch_norm=True, dropout=0.5).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (evaluate(model, small["validation"], SETTINGS) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])  # dropout is off
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(small, tmp_path):
    follow(small, tmp_path, epochs=1)
    path = tmp_path / f"{SETTINGS.key()}.pt"
    state = load_checkpoint(path, SETTINGS, network())
    state["model"]["classifier.bias"].fill_(float("nan"))
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="nan in epoch 2"):
        follow(small, tmp_path, epochs=2)
    assert path.read_bytes() == before


def test_parts_of_a_batch_cover_it_once(monkeypatch):
    for n, world in ((200, 2), (101, 3), (2, 4)):
        monkeypatch.setattr(machine, "world_size", lambda: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(machine, "rank", lambda: rank)
            parts += list(range(n))[machine.my_part(n)]
        assert parts == list(range(n))


@pytest.mark.parametrize(
    ("accuracies", "epochs", "patience", "stop"),
    [
        ([50, 60, 70], 3, 1, 3),  # improves to the end
        ([50, 60, 70], 5, 1, None),  # still improving
        ([50, 60, 60, 60, 59], 9, 2, None),  # a tie with the best does not count
        ([50, 60, 59, 60, 59, 70], 9, 2, 5),  # and does not start the count again
        ([50, 60, 59, 59], 9, 2, 4),  # a tie below the best counts
        ([50, 40, 30, 20], 9, 3, 4),  # never improves
        ([50, 40, 60, 55, 54], 9, 2, 5),  # an improvement starts the count again
        ([50, 60, 59, 58], 4, 2, 4),  # stops exactly at the end
        ([50, 60, 59, 58, 70], 3, 2, 3),  # a longer trajectory, read to its third epoch
        ([50, 60, 59, 58, 70], 9, 2, 4),  # what comes after the stop is not seen
        ([50, 40, 30], 9, None, None),  # no rule
        ([], 1, 1, None),
    ],
)
def test_stopping_rule(accuracies, epochs, patience, stop):
    assert stopping_epoch(accuracies, epochs, patience) == stop


def test_best_epoch_is_the_first_of_equals():
    accuracies = [10.0, 30.0, 20.0, 30.0]
    assert best_epoch([{"epoch": e, "validation_accuracy": a} for e, a in enumerate(accuracies, 1)]) == 2


def test_a_last_batch_of_one_image_joins_the_one_before(small, tmp_path, monkeypatch):
    """Batch norm in the head cannot normalise by one image: 41 images in batches of 20."""
    assert [len(b) for b in common.cut_batches(torch.arange(41), 20)] == [20, 21]
    assert [len(b) for b in common.cut_batches(torch.arange(42), 20)] == [20, 20, 2]
    assert [len(b) for b in common.cut_batches(torch.arange(1), 20)] == [1]
    assert torch.equal(torch.cat(common.cut_batches(torch.arange(41), 20)), torch.arange(41))
    monkeypatch.setattr(common, "world_size", lambda: 2)  # a part of one image each
    assert [len(b) for b in common.cut_batches(torch.arange(43), 20)] == [20, 23]
    monkeypatch.undo()
    data = small | {"train": Split(small["train"].images[:41], small["train"].labels[:41])}
    run = dataclasses.replace(q4_vgg_transfer.SCRATCH, settings=dataclasses.replace(VGG_ONE_EPOCH, batch_size=20))
    assert trained(run, data, tmp_path)["step_losses"][0].shape == (2,)


def test_a_trajectory_that_another_process_trains_comes_later(small, tmp_path, monkeypatch, capsys):
    """The lock of seed 0 is taken; the other process lets go of it while seed 1 is trained."""
    settings = on_sample(Settings(precision="fp32"))
    taken = ExitStack()
    assert taken.enter_context(common.file_lock(tmp_path / f"{settings.key()}.lock"))
    leftover = tmp_path / f".{settings.key()}.pt.host.1.tmp"  # of a process killed while it wrote the checkpoint
    leftover.touch()
    seeds, real = [], common.train

    def train_and_let_go(run, *args):
        seeds.append(run.settings.seed)
        taken.close()
        return real(run, *args)

    monkeypatch.setattr(common, "train", train_and_let_go)
    monkeypatch.setattr(common, "load_sample", lambda: small)
    options = ["--sample", "--epochs=1", "--seeds=2", "--precision=fp32", "--device=cpu"]
    q1_convnet.main([*options, f"--checkpoint-dir={tmp_path}", f"--output-dir={tmp_path}"])
    assert seeds == [1, 0] and not leftover.exists()
    assert "seed 0 is being trained by another process; coming back to it" in capsys.readouterr().err


def test_where_nothing_else_is_left_it_waits_for_another_process(small, tmp_path, monkeypatch):
    """The lock of the only run is taken until somebody waits for it."""
    settings = on_sample(Settings(precision="fp32"))
    path = tmp_path / f"{settings.key()}.lock"
    taken, waits, real = ExitStack(), [], common.file_lock
    assert taken.enter_context(real(path))

    def lock(asked, wait=True):
        if asked == path:
            waits.append(wait)
            if wait:
                taken.close()
        return real(asked, wait)

    monkeypatch.setattr(common, "file_lock", lock)
    monkeypatch.setattr(common, "load_sample", lambda: small)
    options = ["--sample", "--epochs=1", "--precision=fp32", "--device=cpu", f"--checkpoint-dir={tmp_path}"]
    q1_convnet.main([*options, f"--output-dir={tmp_path}"])
    assert waits == [False, True]


def test_killed_runs_go_on_to_the_same_end(finished, tmp_path):
    """SIGTERM in the middle of the second epoch, SIGKILL in the third: the third process ends where one run does."""
    options = (
        "--epochs",
        "3",
        "--output-dir",
        str(tmp_path / "out"),
        "--checkpoint-dir",
        str(tmp_path / "checkpoints"),
    )
    for epoch, kill in ((1, signal.SIGTERM), (2, signal.SIGKILL)):
        process = start(*options)
        while f"epoch {epoch}/3" not in (line := process.stderr.readline()):  # written when the epoch is over
            assert line, "the process ended early"
        process.send_signal(kill)
        _, err = process.communicate()
        if kill == signal.SIGTERM:
            assert process.returncode == 130 and len(err.splitlines()) == 1 and "the same command" in err
        else:
            assert process.returncode == -signal.SIGKILL
        assert not list((tmp_path / "out").rglob("*.json"))  # nothing that looks like a result
    process = start(*options)
    _, err = process.communicate()
    assert process.returncode == 0 and "epoch 3/3" in err and "epoch 2/3" not in err
    uninterrupted, resumed = (next((f / "checkpoints").glob("*.pt")) for f in (finished[0], tmp_path))
    a, b = (torch.load(path, weights_only=True) for path in (uninterrupted, resumed))
    assert_same_training(a, b)
    assert uninterrupted.name == resumed.name
