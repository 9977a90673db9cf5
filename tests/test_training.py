"""The training loop, its checkpoints, and what is read from them."""

import dataclasses
import itertools
import json
import math
import signal
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from torch import nn

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
import q4_vgg_transfer
import q5_modern_recipe
import report.numbers
from common import Run, Settings, Split, evaluate, load_checkpoint, make_result, stopping_epoch
from conftest import checkpoint, folders, make_narrow, run_script, three_epochs
from parts.augment import HorizontalFlip, RandomCrop
from parts.machine import UserError, choose_device, choose_precision, file_lock

pytestmark = pytest.mark.usefixtures("narrow")
CPU = torch.device("cpu")
RANDOM = {"batch_norm": True, "dropout": 0.2, "augment": (RandomCrop(), HorizontalFlip())}  # or with a state of its own
SETTINGS = Settings(data="cifar10-sample", precision="fp32", epochs=2, batch_size=80, **RANDOM)  # batches of 80 and 40
MODERN = {"optimizer": "muon", "learning_rate": 0.05, "filter_learning_rate": 0.1, "schedule": "linear"}
PARAMETERS = {"trainable": 0, "layers": []}


def follow(data, folder, device=CPU, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    run = Run("test", settings)
    return common.train(run, common.build(run, device), data, device, folder / f"{settings.key()}.pt")


def fresh(data, **changes):
    """A network as its seed makes it, and what it puts out first."""
    settings = dataclasses.replace(SETTINGS, **changes)
    model = common.build(Run("test", settings), CPU)
    return model, common.first_logits(model, data["train"], settings)


def numbers(state):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["history"]]


def assert_same_training(a, b):
    """Bit for bit: metrics, predictions, and the weights of the last and of the best epoch."""
    assert numbers(a) == numbers(b)
    for name in ("predictions", "model", "best"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def two_epochs(small, tmp_path_factory):
    """Two epochs in one go: the path of the checkpoint, and the checkpoint."""
    path = tmp_path_factory.mktemp("two") / f"{SETTINGS.key()}.pt"
    with pytest.MonkeyPatch.context() as patch:
        make_narrow(patch)
        follow(small, path.parent)
        model, first = fresh(small)
        return path, load_checkpoint(path, SETTINGS, model, first + 1e-3 * (first - first.mean(0)))  # another machine's


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_gpu_repeats_itself_too(small, tmp_path):
    device, mixture = choose_device("cuda"), q3_augment_dropout.AUGMENTATIONS[q3_augment_dropout.MIXTURE]
    changes = {"precision": choose_precision("auto", device), "augment": mixture}
    data = {part: Split(s.images.to(device), s.labels.to(device)) for part, s in small.items()}
    assert_same_training(*(follow(data, tmp_path / folder, device, **changes) for folder in ("one", "other")))


@pytest.mark.parametrize("changes", [{}, MODERN, {"precision": "fp16"}, MODERN | {"precision": "fp16"}], ids=str)
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(small, tmp_path, changes):
    """Optimiser's state, the loss scale's, and a linear schedule's learning rates go on."""
    whole = follow(small, tmp_path / "whole", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "print_epoch", interrupt)  # when the first epoch is saved
        with pytest.raises(KeyboardInterrupt):
            follow(small, tmp_path / "halves", **changes)
    resumed = follow(small, tmp_path / "halves", **changes)
    assert_same_training(resumed, whole)
    assert resumed["scaler"] == whole["scaler"] and resumed["scaler"].get("_growth_tracker", 4) == 4  # steps


def test_losses_in_fp16_are_scaled_and_their_gradients_are_not(small):
    """One step of Muon and SGD on the same batch, in fp16 and fp32; a gradient that overflows is left out. Muon itself
    computes in bfloat16 where the run does.
    """
    updates = {}
    for precision, bias in (("bf16", 0.0), ("fp32", 0.0), ("fp16", 0.0), ("fp16", math.inf)):
        settings = dataclasses.replace(SETTINGS, precision=precision, dropout=0.0, augment=(), **MODERN)
        model = common.build(Run("test", settings), CPU)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer, scaler = common.make_optimizer(model, settings, CPU), common.make_scaler(settings, CPU)
        assert optimizer.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        images, labels = small["train"].batch(torch.arange(80), settings)
        with common.autocast(settings, CPU):
            logits = model(images).float()
        scaler.scale(nn.functional.cross_entropy(logits, labels)).backward()
        model.classifier.bias.grad += bias
        model.classifier.weight.grad += bias
        scaler.step(optimizer)
        scaler.update()
        updates[precision, bias] = [(a - b).norm().item() for a, b in zip(model.parameters(), before)]
    assert updates["fp16", 0.0] == pytest.approx(updates["fp32", 0.0], rel=0.05, abs=1e-4)
    assert scaler.get_scale() == 2**15 and updates["fp16", math.inf][-1] == 0.0


def test_a_killed_run_goes_on_to_the_same_end(finished, tmp_path, capsys):
    """SIGKILL when the first epoch is saved."""
    killed = run_script(tmp_path, before="import os; common.print_epoch = lambda *_: os.kill(os.getpid(), 9)")
    assert killed.returncode == -signal.SIGKILL and len(checkpoint(tmp_path)["history"]) == 1
    assert not list((tmp_path / "out").rglob("*.json"))  # nothing that looks like a result
    q1_convnet.main(three_epochs(tmp_path))
    err = capsys.readouterr().err
    assert "epoch 2/3" in err and "epoch 1/3" not in err
    assert_same_training(checkpoint(tmp_path), checkpoint(finished[0]))


def test_every_epoch_has_its_own_order_augmentation_and_dropout(small, tmp_path, monkeypatch):
    asked, real = [], common.stream_seed
    monkeypatch.setattr(common, "stream_seed", lambda *what: asked.append(what) or real(*what))
    follow(small, tmp_path, seed=3)
    streams = [*itertools.product([3], [1, 2], ["order", "augment", "dropout", "validation"]), (3, 0, "init")]
    assert len({real(*stream) for stream in streams if stream in asked}) == 9


def test_what_settings_name_is_what_is_trained(small, two_epochs, tmp_path, monkeypatch):
    """Each changes the loss of the first batch."""
    first = two_epochs[1]["step_losses"][0][0]
    others = {"batch_norm": False, "dropout": 0.4, "dropout_after_pool": True, "augment": (), "seed": 1}
    for name, value in others.items():
        assert follow(small, tmp_path, epochs=1, **{name: value})["step_losses"][0][0] != first, name
    monkeypatch.setattr(common, "rank", lambda: 1)  # every process drops units of its own
    assert follow(small, tmp_path, epochs=1)["step_losses"][0][0] != first


def test_the_optimiser_is_the_exercises(two_epochs):
    """torch.optim.Adam, its L2 and not AdamW's decay: one step of it by hand, from the same gradients."""
    (group,) = two_epochs[1]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(2e-3 * 0.95) and group["weight_decay"] == 1e-3  # in the second epoch
    model = nn.Linear(4, 3)
    optimizer = common.make_optimizer(model, dataclasses.replace(SETTINGS, weight_decay=0.5), CPU)
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((3, 4), 0.01), torch.zeros(3)
    optimizer.step()
    gradient = 0.01 + 0.5 * before  # Adam's first step is the sign of this, times the learning rate
    torch.testing.assert_close(model.weight.detach(), before - 2e-3 * gradient.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "schedule, last", [("linear", [0.0375, 0.025, 0.0125]), ("exponential", [0.05, 0.0475, 0.0475])]
)
def test_the_learning_rates_of_every_step(small, tmp_path, monkeypatch, schedule, last):
    """Two epochs of two steps. Muon's follows the same schedule."""
    met, rates, real = [], [0.05, *last], common.MuonAndSGD.step

    def step(optimizer):
        met.append([group["lr"] for group in optimizer.param_groups])
        real(optimizer)

    monkeypatch.setattr(common.MuonAndSGD, "step", step)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    history = follow(small, tmp_path, **MODERN | {"schedule": schedule})["history"]
    assert met == [pytest.approx([2 * rate, rate]) for rate in rates]
    assert [h["lr"] for h in history] == pytest.approx(rates[::2])
    assert [h["seconds"] for h in history] == [1, 1]  # each epoch's own


def test_smoothed_labels_are_trained_on_and_the_plain_loss_is_recorded(small, tmp_path):
    plain = follow(small, tmp_path, epochs=1)["step_losses"][0]
    smoothed = follow(small, tmp_path, label_smoothing=0.5, epochs=1)["step_losses"][0]
    assert plain[0] == smoothed[0] and plain[1] != smoothed[1]  # before the first update, and after it


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(small, tmp_path):
    state = follow(small, tmp_path, epochs=1)
    path = tmp_path / f"{SETTINGS.key()}.pt"
    state["model"]["classifier.bias"].fill_(float("nan"))
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="nan in epoch 2"):
        follow(small, tmp_path, epochs=2)
    assert path.read_bytes() == before


def test_an_older_checkpoint_gets_what_it_lacks_when_it_goes_on(small, tmp_path):
    """It held only the settings that were not at their default."""
    state = follow(small, tmp_path, epochs=1)
    path = tmp_path / f"{SETTINGS.key()}.pt"
    state["settings"] = {"batch_size": SETTINGS.batch_size}
    del state["scaler"], state["first_logits"]
    torch.save(state, path)
    state = follow(small, tmp_path, epochs=2)
    assert state["settings"] == common.shaping(SETTINGS.as_dict()) and {"scaler", "first_logits"} <= state.keys()


@pytest.mark.parametrize(("which", "losses"), [("validation", [math.inf]), ("augmented validation", [1.0, math.inf])])
def test_no_validation_loss_that_is_not_finite_reaches_the_history(small, monkeypatch, which, losses):
    measured = iter(losses)
    monkeypatch.setattr(common, "evaluate", lambda *_: (next(measured), torch.zeros(50)))
    with pytest.raises(UserError, match=f"the {which} loss became inf"):
        common.validate(fresh(small)[0], small["validation"], SETTINGS, 1)


def test_the_list_says_how_far_a_run_is(two_epochs, tmp_path):
    path, longer = two_epochs[0], dataclasses.replace(SETTINGS, epochs=3)
    assert common.run_state(tmp_path / "none", SETTINGS, False) == "not started"
    assert common.run_state(path, longer, False) == "epoch 2"
    assert common.run_state(path, longer, True) == "epoch 2 (has a result)"
    assert common.run_state(path, SETTINGS, False) == "trained, no result yet"
    assert common.run_state(path, SETTINGS, True) == "done"
    assert common.run_state(tmp_path, SETTINGS, True) == "a checkpoint that cannot be read (Is a directory)"


def test_no_epoch_is_trained_twice(small, two_epochs):
    path, state = two_epochs
    written = path.stat().st_mtime_ns
    for changes in ({"epochs": 1}, {"epochs": 2}, {"epochs": 2, "patience": 5}):
        assert follow(small, path.parent, **changes)["history"] == state["history"]
    assert path.stat().st_mtime_ns == written


def test_reading_a_stopping_rule_is_having_stopped_there(small, tmp_path, monkeypatch):
    values = [30.0, 40.0, 39.0], [30.0, 40.0, 39.0, 50.0]  # three epochs and stop; then four
    measured = iter([v for run in values for value in run for v in (value, 0.0)])  # the second: augmented, never used
    monkeypatch.setattr(common, "accuracy", lambda *_: next(measured))
    stopped = follow(small, tmp_path / "stopped", epochs=4, patience=1)
    full = follow(small, tmp_path / "full", epochs=4)
    assert (len(stopped["history"]), len(full["history"])) == (3, 4)
    rule = Run("rule", dataclasses.replace(SETTINGS, epochs=4, patience=1))
    labels = small["test"].labels
    full["predictions"][1:3] = guesses = [labels.to(torch.uint8), torch.zeros_like(labels, dtype=torch.uint8)]
    stopped["predictions"] = full["predictions"][:3]
    full["environments"].append({"from_epoch": 4})  # after the stop
    results = [make_result("q2", rule, PARAMETERS, state, labels) for state in (stopped, full)]
    assert numbers(results[0]) == numbers(results[1])
    best, last = (common.score(guess, labels, epoch) for epoch, guess in enumerate(guesses, 2))
    assert results[0]["test"] == results[1]["test"] == {"best": best, "last": last}
    assert [(result["best_epoch"], result["environment"]["from_epoch"]) for result in results] == [(2, 1)] * 2


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


def test_best_weights_are_a_copy_of_the_first_of_equals(small, tmp_path, monkeypatch):
    best = follow(small, tmp_path / "one", epochs=1)["model"]
    monkeypatch.setattr(common, "accuracy", lambda *_: 50.0)
    state = follow(small, tmp_path, epochs=2)  # training went on
    assert common.best_epoch(state["history"]) == 1
    assert all(torch.equal(state["best"][k], best[k]) for k in best)
    assert not torch.equal(state["best"]["classifier.weight"], state["model"]["classifier.weight"])


def test_evaluation_is_right_and_is_what_was_recorded(small, two_epochs):
    state, model = two_epochs[1], fresh(small)[0]
    model.load_state_dict(state["best"])
    best = common.best_epoch(state["history"])
    entry, predictions = state["history"][best - 1], state["predictions"][best - 1]
    assert torch.equal(evaluate(model.train(), small["test"], SETTINGS)[1], predictions)  # dropout is off
    assert evaluate(model, small["validation"], SETTINGS)[0] == entry["validation_loss"]  # as they are
    images, labels = small["validation"].batch(torch.arange(50), SETTINGS)
    logits = model(images).detach()  # of all images at once
    loss, guesses = evaluate(model, small["validation"], dataclasses.replace(SETTINGS, batch_size=20))
    torch.testing.assert_close(logits[range(50), guesses.long()], logits.amax(1))  # rounded otherwise
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    right = evaluate(model, small["validation"], SETTINGS)[1] == labels
    assert entry["validation_accuracy"] == 100 * right.sum().item() / 50
    assert entry["validation_loss"] != entry["augmented_validation_loss"]
    assert all(torch.equal(v, state["best"][k]) for k, v in model.state_dict().items())


def test_the_key_is_what_shapes_the_weights():
    assert Settings(epochs=50, patience=5).key() == Settings().key()
    linear = Settings(schedule="linear")  # it ends with the last epoch
    assert dataclasses.replace(linear, patience=5).key() == linear.key() != dataclasses.replace(linear, epochs=50).key()
    others = {"augment": (HorizontalFlip(),), "mean": (0.0,), "std": (1.0,)}
    others |= {"backbone": "frozen", "optimizer": "muon", "schedule": "linear"}
    for name in {field.name for field in dataclasses.fields(Settings)} - {"epochs", "patience"}:
        assert Settings(**{name: others.get(name, 7)}).key() != Settings().key()


def test_what_a_seed_draws_never_changes():
    streams = ("init", "order", "augment", "dropout", "validation")
    assert [common.stream_seed(1, 2, stream) % 1000 for stream in streams] == [899, 476, 482, 576, 488]


def test_settings_that_no_code_understands_are_refused():
    thawed = dataclasses.make_dataclass("Thawed", ["p"])(0.5)
    for augmentation in (object(), thawed, HorizontalFlip):  # else every start had another key, or sweeps would fail
        with pytest.raises(ValueError, match="make it a frozen dataclass"):
            Settings(augment=(augmentation,))
    with pytest.raises(TypeError, match="make it a tuple"):
        Settings(augment=HorizontalFlip())  # a comma forgotten
    with pytest.raises(ValueError, match="optimizer 'sgd': there are adam, muon"):  # else it would train with Adam
        Settings(optimizer="sgd")


def test_the_keys_of_trained_networks_never_change():
    """A key that changes orphans a checkpoint that took hours: rename settings as you like, but not these."""
    digest = "69a37b9ff57d64bd078533d62d0737af89f8fea165386682cbca99c4dd5ba730"
    questions = (q1_convnet, q2_batchnorm_earlystop, q3_augment_dropout, q4_vgg_transfer, q5_modern_recipe)
    runs = [run for question in questions for run in question.RUNS]
    runs += q4_vgg_transfer.transfer_runs("stand_in", f"vgg11_bn_features_tinyimagenet.pth sha256:{digest}")
    trainings = {}
    for run in runs:
        names = trainings.setdefault(dataclasses.replace(run.settings, precision="bf16").key(), [])
        names += [run.name] if run.name not in names else []
    pinned = json.loads((common.ROOT / "tests/keys.json").read_text())
    assert {key: trainings.get(key) for key in pinned} == pinned
    seed1 = dataclasses.replace(q1_convnet.RUNS[0].settings, precision="bf16", seed=1)
    assert seed1.key() == "ConvNet-seed1-1bd545fbe6"


def edited_forward(model, images):
    return model.classifier(model.features(images.flip(2)).flatten(1))


EDITS = {  # what students of this exercise edit; each prints the same network
    "forward": (common.ConvNet, "forward", edited_forward),
    "initialisation": (nn.init, "normal_", lambda weight, std: weight.data.normal_(std=2 * std)),
    "order": (common, "generator", lambda *_: torch.Generator().manual_seed(0)),
    "augmentation": (HorizontalFlip, "apply", lambda self, images, applied: images),
}


@pytest.mark.parametrize("edit", [*EDITS, "layer", "size", "settings"])
def test_a_checkpoint_of_other_code_network_or_settings_is_refused(small, two_epochs, monkeypatch, edit):
    settings, reason = SETTINGS, "is of another network than the code builds now"
    if edit in EDITS:
        monkeypatch.setattr(*EDITS[edit])
        reason = "was trained by other code .*"
    model, first = fresh(small)
    if edit == "layer":
        model.features[2] = nn.Dropout(0.4)
    if edit == "size":
        model.classifier.weight = nn.Parameter(torch.zeros(10, 17))  # not printed
    if edit == "settings":
        settings = dataclasses.replace(SETTINGS, learning_rate=1.0)
        reason = r"was trained with other settings \(learning_rate 0.002, now 1.0\)"
        assert "learning_rate 0.002, now 1.0" in common.run_state(two_epochs[0], settings, has_result=True)
    with pytest.raises(UserError, match=f"{reason}; .*--fresh"):
        load_checkpoint(two_epochs[0], settings, model, first)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped in a weight", "empty"])
def test_a_damaged_checkpoint_is_named_and_kept(small, two_epochs, tmp_path, damage):
    content = bytearray(two_epochs[0].read_bytes())
    if damage == "bit flipped in a weight":
        content[len(content) // 2] ^= 16
    else:
        del content[len(content) // 2 if damage == "truncated" else 0 :]
    path = tmp_path / two_epochs[0].name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"the checkpoint {path} is damaged .*--fresh"):
        follow(small, tmp_path, epochs=4)
    assert path.read_bytes() == content


def test_a_full_memory_is_not_taken_for_damage(small, two_epochs, monkeypatch):
    def load(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_checkpoint(two_epochs[0], SETTINGS, *fresh(small))


def test_a_score_counts_the_report_s_images_and_all():
    labels = torch.arange(1200) % 10
    predictions = labels.clone().to(torch.uint8)
    predictions[:100] = (labels[:100] + 1) % 10  # wrong, all among the first 1,000
    scored = common.score(predictions, labels, 3)
    assert scored["report_images"] == {"images": 1000, "accuracy": 90.0}
    assert scored["all_images"] == {"images": 1200, "accuracy": round(100 * 1100 / 1200, 4)}
    confusion = np.array(scored["confusion"])
    assert confusion.trace() == 1100 and confusion[3, 4] == 10 and confusion.sum() == 1200


def test_a_result_is_written_once(small, two_epochs, tmp_path):
    state, run = two_epochs[1], Run("test", dataclasses.replace(SETTINGS, epochs=1))  # its first epoch
    result = make_result("q1", run, PARAMETERS, state, small["test"].labels)
    path = tmp_path / "seed0.json"
    assert common.write_result(path, result, state) and not common.write_result(path, result, state)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    with np.load(tmp_path / "seed0.npz") as arrays:
        assert np.array_equal(arrays["step_losses"], torch.stack(state["step_losses"][:1]))
        assert np.array_equal(arrays["before"], fresh(small)[0].features[0].weight.detach())
        assert np.array_equal(arrays["last"], state["filters"][1])
    assert torch.equal(state["filters"][2], state["model"]["features.0.weight"])


def test_a_sweep_waits_for_another_process_and_fresh_keeps_the_old_checkpoint(quick, tmp_path, monkeypatch):
    options = ["--sample", "--epochs=1", "--precision=fp32", "--device=cpu", *folders(tmp_path)]
    q1_convnet.main(options)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    before, other, told, lock = path.read_bytes(), ExitStack(), [], path.with_suffix(".lock")
    monkeypatch.setattr("parts.machine.tell", lambda line: (told.append(line), other.close()))
    for more in ([], ["--fresh"]):
        told.clear()
        other.enter_context(file_lock(lock))
        q1_convnet.main([*options, *more])
        assert any(f"waiting until another process lets go of {lock}" in line for line in told), more
    assert path.with_suffix(".old").read_bytes() == before
    assert len(checkpoint(tmp_path)["history"]) == 1
    with pytest.raises(SystemExit):  # a second one would lose it
        q1_convnet.main([*options, "--fresh"])
    assert path.exists() and path.with_suffix(".old").read_bytes() == before


def test_results_are_read_and_replaced_under_one_lock(quick, tmp_path, monkeypatch):
    """Else a job that starts meets one training's numbers beside another's, or none."""

    def locked(function, *args):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "out/sample/.page.lock").acquire(timeout=0)
        return calls.append(function.__name__) or function(*args)

    calls = []
    monkeypatch.setattr(common, "write_result", partial(locked, common.write_result))
    monkeypatch.setattr(report.numbers, "read_question", partial(locked, report.numbers.read_question))
    q1_convnet.main(["--sample", "--epochs=1", "--device=cpu", *folders(tmp_path)])
    assert set(calls) == {"write_result", "read_question"}


def test_an_interrupted_fresh_sweep_takes_no_old_checkpoint_for_done(quick, tmp_path, monkeypatch):
    options = ["--sample", "--epochs=1", "--precision=fp32", "--device=cpu", "--seeds=2", *folders(tmp_path)]
    q1_convnet.main(options)
    monkeypatch.setattr(common, "train", interrupt)
    with pytest.raises(SystemExit):
        q1_convnet.main([*options, "--fresh"])
    assert sorted(path.suffix for path in (tmp_path / "checkpoints").glob("*.*")) == [".lock"] * 2 + [".old"] * 2


def test_nothing_is_trained_before_everything_is_checked(quick, tmp_path, monkeypatch, capsys):
    """A sweep's last run has a damaged checkpoint; or, with a seed more, results of another network."""
    options = ["--sample", "--epochs=1", "--precision=fp32", "--device=cpu", *folders(tmp_path)]
    q2_batchnorm_earlystop.main([*options, "--only", "batchnorm"])
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    path.write_bytes(b"damaged")
    monkeypatch.setattr(common, "train", lambda *_: pytest.fail("trained"))
    for seed, message in ((0, f"the checkpoint {path} is damaged"), (1, "seed0.json is of another network than")):
        with pytest.raises(SystemExit) as end:
            q2_batchnorm_earlystop.main([*options, "--only", "convnet", "batchnorm", f"--seed={seed}"])
        assert end.value.code == 2 and message in capsys.readouterr().err
        monkeypatch.setattr(common, "CHANNELS", (8, 8, 8, 8, 8))
