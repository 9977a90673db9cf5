"""The training loop, its checkpoints, and what is read from them."""

import dataclasses
import itertools
import json
import math
import signal
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import NARROW, folders, start
from torch import nn

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
from common import (
    ROOT,
    Run,
    Settings,
    Split,
    best_epoch,
    build,
    evaluate,
    first_logits,
    load_checkpoint,
    read_run,
    score,
    stopping_epoch,
    train,
    write_result,
)
from parts.augment import HorizontalFlip, RandomCrop
from parts.machine import UserError, choose_device, choose_precision, file_lock
from q3_augment_dropout import AUGMENTATIONS, MIXTURE

pytestmark = pytest.mark.usefixtures("narrow")
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
MODERN = {"optimizer": "muon", "learning_rate": 0.05, "filter_learning_rate": 0.1, "schedule": "linear"}
PARAMETERS = {"trainable": 0, "layers": []}


def follow(data, folder, **changes):
    return trained(Run("test", dataclasses.replace(SETTINGS, **changes)), data, folder)


def trained(run, data, folder, device=CPU):
    return train(run, build(run, device), data, device, folder / f"{run.settings.key()}.pt")


def fresh(data, **changes):
    """A network as its seed makes it, and what it puts out first."""
    settings = dataclasses.replace(SETTINGS, **changes)
    model = build(Run("test", settings), CPU)
    return model, first_logits(model, data["train"], settings)


def numbers(state):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["history"]]


def assert_same_training(a, b):
    """Bit for bit: metrics, predictions, and the weights of the last and of the best epoch."""
    assert numbers(a) == numbers(b)
    assert all(torch.equal(x, y) for x, y in zip(a["predictions"], b["predictions"], strict=True))
    for name in ("model", "best"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])


@pytest.fixture(scope="module")
def two_epochs(small, tmp_path_factory):
    """Two epochs in one go: the path of the checkpoint, and the checkpoint."""
    path = tmp_path_factory.mktemp("two") / f"{SETTINGS.key()}.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "CHANNELS", NARROW)
        follow(small, path.parent)
        return path, load_checkpoint(path, SETTINGS, *fresh(small))


# ---------------------------------------------------------------------------------------------------------- repeating


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


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["adam", "muon"])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(small, tmp_path, monkeypatch, changes):
    """Optimiser's state, and a linear schedule's learning rates, go on."""
    whole = follow(small, tmp_path / "whole", **changes)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "print_epoch", interrupt)  # when the first epoch is saved
    with pytest.raises(KeyboardInterrupt):
        follow(small, tmp_path / "halves", **changes)
    monkeypatch.undo()
    monkeypatch.setattr(common, "CHANNELS", NARROW)
    assert_same_training(follow(small, tmp_path / "halves", **changes), whole)


def test_killed_runs_go_on_to_the_same_end(finished, tmp_path):
    """SIGTERM in the middle of the second epoch, SIGKILL in the third: the third process ends where one run does."""
    options = ["--epochs=3", *folders(tmp_path)]
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
    assert_same_training(*(torch.load(path, weights_only=True) for path in (uninterrupted, resumed)))


def test_order_and_dropout_differ_from_epoch_to_epoch(small, tmp_path, monkeypatch):
    orders, masks, real = [], [], Split.batch

    def batch(split, index, *args):
        if len(split) == 120:
            orders.append(index)
        return real(split, index, *args)

    monkeypatch.setattr(Split, "batch", batch)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: masks.append(output == 0) if isinstance(module, nn.Dropout) else None
    )
    with hook:
        follow(small, tmp_path, batch_size=120, learning_rate=0.0)  # one batch an epoch, the same weights
    first_run, one, other = orders  # the first one is that of the first logits
    assert torch.equal(first_run, one) and not torch.equal(one, other)
    training = [mask for mask in masks if len(mask) == 120]
    layers = len(training) // 2
    assert not torch.equal(training[layers - 1], training[2 * layers - 1])


# ------------------------------------------------------------------------------------------------------- augmentation


def test_training_is_augmented_anew_every_epoch_and_the_validation_that_counts_never(small, tmp_path, monkeypatch):
    drawn, real = [], Split.batch

    def batch(split, index, settings, rng=None, part=slice(None)):
        drawn.append((len(split), None if rng is None else rng.initial_seed()))
        return real(split, index, settings, rng, part)

    monkeypatch.setattr(Split, "batch", batch)
    data = small | {"test": Split(small["test"].images[:40], small["test"].labels[:40])}
    history = follow(data, tmp_path)["history"]
    training, validation, test = ([seed for images, seed in drawn if images == n] for n in (120, 50, 40))
    _, *training = training  # the first logits
    assert len(training) == 4 and training[0] == training[1] != training[2] == training[3]  # two batches an epoch
    assert None not in training and set(test) == {None}
    plain, augmented, later_plain, later = validation  # once as they are, once as the report measures them
    assert plain is later_plain is None and len({augmented, later, *training}) == 4
    assert all(h["augmented_validation_loss"] != h["validation_loss"] for h in history)


def test_without_augmentation_nothing_is_measured_augmented(small, tmp_path):
    (entry,) = follow(small, tmp_path, augment=(), epochs=1)["history"]
    assert not [name for name in entry if "augmented" in name]


# ---------------------------------------------------------------------------------------------------- loss, optimiser


def test_the_optimiser_is_the_exercises(small, two_epochs):
    """torch.optim.Adam, its L2 and not AdamW's decay: one step of it by hand, from the same gradients."""
    (group,) = two_epochs[1]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(2e-3 * 0.95) and group["weight_decay"] == 1e-3  # in the second epoch
    assert [entry["lr"] for entry in two_epochs[1]["history"]] == pytest.approx([2e-3, 2e-3 * 0.95])
    model = nn.Linear(4, 3)
    optimizer = common.make_optimizer(model, dataclasses.replace(SETTINGS, weight_decay=0.5), CPU)
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((3, 4), 0.01), torch.zeros(3)
    optimizer.step()
    gradient = 0.01 + 0.5 * before  # Adam's first step is the sign of this, times the learning rate
    torch.testing.assert_close(model.weight.detach(), before - 2e-3 * gradient.sign(), rtol=0, atol=1e-6)


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


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(small, tmp_path):
    follow(small, tmp_path, epochs=1)
    path = tmp_path / f"{SETTINGS.key()}.pt"
    state = load_checkpoint(path, SETTINGS, *fresh(small))
    state["model"]["classifier.bias"].fill_(float("nan"))
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="nan in epoch 2"):
        follow(small, tmp_path, epochs=2)
    assert path.read_bytes() == before


def test_no_loss_that_is_not_finite_reaches_the_history(small, monkeypatch):
    """Neither on the validation images as they are nor on augmented ones."""
    model, losses = fresh(small)[0], []
    monkeypatch.setattr(common, "evaluate", lambda *_: (losses.pop(0), torch.zeros(50)))
    for which, found in (("validation", [math.inf]), ("augmented validation", [1.0, math.inf])):
        losses[:] = found
        with pytest.raises(UserError, match=f"the {which} loss became inf"):
            common.validate(model, small["validation"], SETTINGS, 1)


def test_a_last_batch_of_few_images_joins_the_one_before():
    def sizes(images, size):
        batches = common.cut_batches(torch.arange(images), size)
        assert torch.equal(torch.cat(batches), torch.arange(images))
        return [len(batch) for batch in batches]

    assert sizes(41, 20) == [20, 21] and sizes(56, 20) == [20, 20, 16]
    assert sizes(1, 20) == [1] and sizes(10, 4) == [4, 6] and sizes(8, 4) == [4, 4]


# -------------------------------------------------------------------------------------------------- epochs, patience


def test_one_epoch_extended_to_two_is_two_in_one_go(small, two_epochs, tmp_path):
    assert len(follow(small, tmp_path, epochs=1)["history"]) == 1
    assert_same_training(follow(small, tmp_path, epochs=2), two_epochs[1])


def test_no_epoch_is_trained_twice(small, two_epochs):
    path, state = two_epochs
    written = path.stat().st_mtime_ns
    for changes in ({"epochs": 1}, {"epochs": 2}, {"epochs": 2, "patience": 5}):
        assert follow(small, path.parent, **changes)["history"] == state["history"]
    assert path.stat().st_mtime_ns == written


def test_reading_fewer_epochs_is_having_trained_fewer(small, two_epochs, tmp_path):
    one = Run("one", dataclasses.replace(SETTINGS, epochs=1))
    states = follow(small, tmp_path, epochs=1), two_epochs[1]
    results = [read_run("q1", one, PARAMETERS, state, small["test"].labels) for state in states]
    assert numbers(results[0]) == numbers(results[1]) and results[0]["test"] == results[1]["test"]


def test_reading_a_stopping_rule_is_having_stopped_there(small, tmp_path, monkeypatch):
    values = [30.0, 40.0, 39.0], [30.0, 40.0, 39.0, 50.0]  # three epochs and stop; then four
    measured = iter([v for run in values for value in run for v in (value, 0.0)])  # the second: augmented, never used
    monkeypatch.setattr(common, "accuracy", lambda *_: next(measured))
    rule = Run("rule", dataclasses.replace(SETTINGS, epochs=4, patience=1))
    stopped = trained(rule, small, tmp_path / "stopped")
    full = trained(Run("full", dataclasses.replace(SETTINGS, epochs=4)), small, tmp_path / "full")
    assert (len(stopped["history"]), len(full["history"])) == (3, 4)
    results = [read_run("q2", rule, PARAMETERS, state, small["test"].labels) for state in (stopped, full)]
    assert numbers(results[0]) == numbers(results[1]) and results[0]["test"] == results[1]["test"]


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
        ([50, 60, 59, 58, 70], 3, 2, 3),  # a longer training, read to its third epoch
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


def test_best_weights_are_a_copy(small, tmp_path, monkeypatch):
    falling = itertools.count(50, -1)
    monkeypatch.setattr(common, "accuracy", lambda *_: float(next(falling)))
    state = follow(small, tmp_path, epochs=2)  # the first epoch is the best, and training went on
    first = follow(small, tmp_path / "one", epochs=1)["model"]
    assert all(torch.equal(state["best"][k], first[k]) for k in first)
    assert not torch.equal(state["best"]["classifier.weight"], state["model"]["classifier.weight"])


def test_the_best_weights_give_the_recorded_predictions(small, two_epochs):
    state, model = two_epochs[1], fresh(small)[0]
    model.load_state_dict(state["best"])
    _, predictions = evaluate(model, small["test"], SETTINGS)
    assert torch.equal(predictions, state["predictions"][best_epoch(state["history"]) - 1])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_alone(small, training):
    model = fresh(small, dropout=0.5)[0].train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (evaluate(model, small["validation"], SETTINGS) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])  # dropout is off
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_the_key_is_what_shapes_the_weights():
    settings = Settings()
    assert dataclasses.replace(settings, epochs=50, patience=5).key() == settings.key()
    linear = dataclasses.replace(settings, schedule="linear")  # it ends with the last epoch
    assert dataclasses.replace(linear, patience=5).key() == linear.key()
    assert dataclasses.replace(linear, epochs=50).key() != linear.key()
    for field in dataclasses.fields(Settings):
        if field.name not in ("epochs", "patience"):
            other = {"augment": ("x",), "mean": (0.0,), "std": (1.0,)}.get(field.name, 7)
            assert dataclasses.replace(settings, **{field.name: other}).key() != settings.key()


def test_the_keys_of_trained_networks_never_change():
    """A key that changes orphans a checkpoint that took hours: rename settings as you like, but not these."""
    weights = (
        "vgg11_bn_features_tinyimagenet.pth sha256:69a37b9ff57d64bd078533d62d0737af89f8fea165386682cbca99c4dd5ba730"
    )
    questions = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)
    runs = [run for question in questions for run in question.RUNS]
    runs += q4_vgg_transfer.transfer_runs("stand_in", weights)
    trainings = {}
    for run in runs:
        names = trainings.setdefault(dataclasses.replace(run.settings, precision="bf16").key(), [])
        names += [run.name] if run.name not in names else []
    pinned = json.loads((ROOT / "tests/keys.json").read_text())
    assert {key: trainings.get(key) for key in pinned} == pinned
    seed1 = dataclasses.replace(q1_convnet.RUNS[0].settings, precision="bf16", seed=1)
    assert seed1.key() == "ConvNet-seed1-1bd545fbe6"


@pytest.mark.parametrize("edit", ["another layer", "another size", "other settings"])
def test_a_checkpoint_of_another_network_is_refused(small, two_epochs, edit):
    model, first = fresh(small)
    settings, reason = SETTINGS, "is of another network than the code builds now"
    if edit == "another layer":
        model.features[2] = nn.Dropout(0.4)
    elif edit == "another size":
        model.classifier.weight = nn.Parameter(torch.zeros(10, 17))  # not printed
    else:
        settings = dataclasses.replace(SETTINGS, learning_rate=1.0)
        reason = r"was trained with other settings \(learning_rate\)"
    with pytest.raises(UserError, match=f"{reason}; .*--fresh"):
        load_checkpoint(two_epochs[0], settings, model, first)


@pytest.mark.parametrize("edit", ["forward", "initialisation", "order", "augmentation"])
def test_edited_code_is_noticed(small, two_epochs, monkeypatch, edit):
    """Each prints the same network. Students of this exercise edit just these."""
    if edit == "forward":
        forward = common.ConvNet.forward
        monkeypatch.setattr(common.ConvNet, "forward", lambda self, images: forward(self, images.flip(2)))
    elif edit == "initialisation":
        monkeypatch.setattr(common, "init_linear", lambda model: nn.init.normal_(model.classifier.weight, std=2e-3))
    elif edit == "order":
        monkeypatch.setattr(common, "generator", lambda *_: torch.Generator().manual_seed(0))
    else:
        monkeypatch.setattr(HorizontalFlip, "apply", lambda self, images, applied: images)
    with pytest.raises(UserError, match="was trained by other code"):
        load_checkpoint(two_epochs[0], SETTINGS, *fresh(small))


def test_a_checkpoint_without_first_logits_gets_them_when_it_goes_on(small, two_epochs, tmp_path):
    path = tmp_path / two_epochs[0].name
    torch.save({name: value for name, value in two_epochs[1].items() if name != "first_logits"}, path)
    follow(small, tmp_path, epochs=3)
    assert torch.equal(torch.load(path, weights_only=True)["first_logits"], fresh(small)[1])


@pytest.mark.parametrize("damage", ["truncated", "bit flipped in a weight", "empty", "not a checkpoint"])
def test_a_damaged_checkpoint_is_named_and_kept(small, two_epochs, tmp_path, damage):
    content = bytearray(two_epochs[0].read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "bit flipped in a weight":
        content[len(content) // 2] ^= 16
    else:
        content = b"" if damage == "empty" else b"hello"
    path = tmp_path / two_epochs[0].name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"the checkpoint {path} is damaged .*--fresh"):
        follow(small, tmp_path, epochs=4)
    assert path.read_bytes() == content


def test_a_network_of_another_name_is_refused():
    with pytest.raises(ValueError, match="network='VGG11' in its settings, but it is ConvNet"):
        build(Run("test", dataclasses.replace(SETTINGS, network="VGG11")), CPU)


# ------------------------------------------------------------------------------------------------ results, sweeps


def test_a_score_counts_the_report_s_images_and_all():
    labels = torch.arange(1200) % 10
    predictions = labels.clone().to(torch.uint8)
    predictions[:100] = (labels[:100] + 1) % 10  # wrong, all among the first 1,000
    scored = score(predictions, labels, 3)
    assert scored["report_images"] == {"images": 1000, "accuracy": 90.0}
    assert scored["all_images"] == {"images": 1200, "accuracy": round(100 * 1100 / 1200, 4)}
    confusion = np.array(scored["confusion"])
    assert confusion.trace() == 1100 and confusion[3, 4] == 10 and confusion.sum() == 1200


def test_a_result_is_written_once_and_never_half(small, two_epochs, tmp_path, monkeypatch):
    state, run = two_epochs[1], Run("test", SETTINGS)
    result = read_run("q1", run, PARAMETERS, state, small["test"].labels)
    assert write_result(tmp_path, result, state) and not write_result(tmp_path, result, state)
    assert json.loads((tmp_path / "seed0.json").read_text()) == json.loads(json.dumps(result))
    with np.load(tmp_path / "seed0.npz") as arrays:
        assert arrays["step_losses"].shape == (2, 2) and arrays["last"].shape == (8, 3, 3, 3)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "write_atomic", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_result(tmp_path, result | {"best_epoch": 1, "seed": 0, "run": "other"}, state)
    assert not (tmp_path / "seed0.json").exists()  # rather none than one beside another training's arrays


def test_a_sweep_waits_for_another_process_and_fresh_keeps_the_old_checkpoint(small, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_sample", lambda: small)
    options = ["--sample", "--epochs=1", "--precision=fp32", "--device=cpu", *folders(tmp_path)]
    q1_convnet.main(options)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    before, leftover = path.read_bytes(), path.with_name(f".{path.name}.host.1.tmp")
    leftover.touch()  # of a process killed while it wrote the checkpoint
    lock, told = ExitStack(), []
    lock.enter_context(file_lock(path.with_suffix(".lock")))

    def tell(line):
        told.append(line)
        lock.close()  # the other process has ended

    monkeypatch.setattr("parts.machine.tell", tell)
    q1_convnet.main([*options, "--fresh"])
    assert any(f"waiting until another process lets go of {path.with_suffix('.lock')}" in line for line in told)
    assert path.with_suffix(".old").read_bytes() == before and not leftover.exists()
    assert len(torch.load(path, weights_only=True)["history"]) == 1


def test_everything_is_checked_before_anything_is_trained(small, tmp_path, monkeypatch, capsys):
    """The checkpoint of a sweep's second run is damaged."""
    monkeypatch.setattr(common, "load_sample", lambda: small)
    monkeypatch.setattr(common, "train", lambda *_: pytest.fail("trained"))
    run = q2_batchnorm_earlystop.RUNS[1]
    settings = dataclasses.replace(common.on_sample(run.settings), precision="fp32")
    path = tmp_path / "checkpoints" / f"{settings.key()}.pt"
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    options = ["--sample", "--precision=fp32", "--device=cpu", *folders(tmp_path)]
    with pytest.raises(SystemExit) as end:
        q2_batchnorm_earlystop.main(options)
    assert end.value.code == 2 and f"the checkpoint {path} is damaged" in capsys.readouterr().err
