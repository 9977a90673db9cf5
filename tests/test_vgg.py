"""Question 4: the network (narrow where its width does not matter), cached features, weights as people save them."""

import dataclasses
import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import vgg11_bn

import common
import q4_vgg_transfer
from common import Run, count_parameters
from conftest import folders, make_narrow
from parts.machine import UserError
from q4_vgg_transfer import SCRATCH, VGG, VGG11, feature_tensors, features_if_frozen, find_weights, imagenet_weights

CPU = torch.device("cpu")
HEAD = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10


@pytest.fixture(scope="module")
def state():
    """The state dict of a narrow vgg11_bn, drawn, its features in half precision."""
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        make_narrow(patch)
        features = q4_vgg_transfer.vgg11_bn().features
    for name, buffer in features.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    tensors = {f"features.{k}": v.half() if v.is_floating_point() else v for k, v in features.state_dict().items()}
    return tensors | {"classifier.6.bias": torch.zeros(1000)}


@pytest.fixture
def weights(state, narrow):
    return feature_tensors(state, "here")


def run_of(backbone, **changes):
    settings = {"weights": "random", "backbone": backbone, "data": "cifar10-sample", "precision": "fp32"}
    return Run("run", dataclasses.replace(VGG, **settings, epochs=1, batch_size=30, **changes))


def build(run, weights):
    return common.build(run, CPU, partial(q4_vgg_transfer.vgg, weights=weights))


def trained(run, weights, data, path, prepare=None):
    return common.train(run, build(run, weights), data, CPU, path / "checkpoint.pt", prepare)


def test_the_network_from_scratch_is_torchvisions_and_a_frozen_one_trains_its_head():
    torch.manual_seed(5)
    model = VGG11()
    torch.manual_seed(5)
    ours, theirs = model.features.state_dict(), feature_tensors(vgg11_bn().state_dict(), "torchvision")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10) and count_parameters(model) == HEAD + 9_225_984
    with torch.device("meta"):
        assert count_parameters(VGG11("frozen")) == count_parameters(VGG11("frozen, training mode")) == HEAD


def test_the_head_starts_as_pytorchs_layers(weights):
    for run in (run_of("frozen"), SCRATCH):
        first, _, _, last = build(run, weights).head
        for layer in (first, last):  # uniform, up to 1 / sqrt(inputs)
            assert layer.weight.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.05)
            assert layer.bias.count_nonzero() > 0


@pytest.mark.parametrize("backbone", ["frozen", "frozen, training mode", "trained"])
def test_what_moves_in_the_backbone(weights, small, tmp_path, backbone):
    """Frozen: nothing; frozen in training mode, as the report's code: batch norm's statistics; fine-tuned: all."""
    run = run_of(backbone)
    model = build(run, weights)
    fresh = model.features.state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in weights.items())
    prepare = None if backbone == "frozen" else features_if_frozen
    after = trained(run, weights, small, tmp_path, prepare)["model"]
    moved = {name for name in fresh if not torch.equal(after[f"features.{name}"], fresh[name])}
    statistics = {name for name in fresh if "running" in name or "num_batches" in name}
    assert moved == {"frozen": set(), "frozen, training mode": statistics, "trained": set(fresh)}[backbone]
    assert after["head.1.running_mean"].any() and not torch.equal(after["head.0.weight"], model.head[0].weight)
    images, _ = small["train"].batch(torch.arange(50), run.settings)
    with torch.no_grad():
        first, second = (model.train(mode).features(images) for mode in (True, False))
    assert torch.equal(first, second) == (backbone == "frozen")  # by the batch, by the statistics


def test_cached_features_train_as_running_the_backbone_every_epoch_does(weights, small, tmp_path):
    run = run_of("frozen")
    every_epoch = trained(run, weights, small, tmp_path / "plain")
    cached = trained(run, weights, small, tmp_path / "cached", features_if_frozen)
    for a, b in zip(every_epoch["history"], cached["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["augmented_validation_loss"] == pytest.approx(b["augmented_validation_loss"], abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(every_epoch["predictions"], cached["predictions"], strict=True))


def test_a_file_of_weights_is_what_frozen_runs_compute_features_with(state, quick, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "weights.pth")
    run, computed, compute = find_weights(str(tmp_path / "weights.pth"))[0][1], [], q4_vgg_transfer.compute_features
    monkeypatch.setattr(q4_vgg_transfer, "compute_features", lambda *a: computed.append(a[-1]) or compute(*a))
    options = [f"--weights={tmp_path / 'weights.pth'}", "--sample", "--epochs=2", "--device=cpu", "--only", run.name]
    q4_vgg_transfer.main([*options, *folders(tmp_path)])
    assert computed == ["train", "validation", "test"]  # once, not in every epoch
    assert (tmp_path / f"out/sample/q4/{run.name}_2epochs/seed0.json").exists()


FORMS = {  # as people save them
    "of the features alone": lambda s: {name.removeprefix("features."): tensor for name, tensor in s.items()},
    "under net, prefixed": lambda s: {"net": {f"_orig_mod.module.{name}": t for name, t in s.items()}, "epoch": 9},
    "under model, with an optimiser": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "without counters, as torchvision's file": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "with numbers of NumPy": lambda s: {"state_dict": s, "best": np.float64(0.9), "n": np.int64(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_saved_in_the_usual_forms(state, weights, tmp_path, form):
    torch.save(FORMS[form](state), tmp_path / "other.pth")
    _, found = find_weights(str(tmp_path / "other.pth"))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


DAMAGES = {
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[:10_000]), "is not a state dict"),
    "another shape": (
        lambda path, state: torch.save(state | {"features.4.weight": torch.zeros(3)}, path),
        r"of their shapes, are not among features.0.weight, .* \(3\d tensors\)",
    ),
    "code": (lambda path, state: torch.save({"features": print}, path), "could run any code"),
    "missing": (lambda path, state: path.unlink(), "cannot read --weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_weight_files(state, narrow, tmp_path, damage):
    path = tmp_path / "bad.pth"
    torch.save(state, path)
    change, message = DAMAGES[damage]
    change(path, state)
    with pytest.raises(UserError, match=message) as error:
        find_weights(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_are_known_by_their_content(state, narrow, tmp_path, monkeypatch):
    """In a notebook: the file is overwritten, and loaded again. Any name gives a plain label."""
    path = tmp_path / b"my caf\xe9 (v2) [best].pth".decode(errors="surrogateescape")
    torch.save(state, tmp_path / "plain.pth")
    (tmp_path / "plain.pth").rename(path)
    runs, before = find_weights(str(path))
    torch.save(state | {"features.0.bias": torch.ones(8)}, tmp_path / "plain.pth")
    (tmp_path / "plain.pth").rename(path)
    others, after = find_weights(str(path))
    assert not torch.equal(before["0.bias"], after["0.bias"]) and (after["0.bias"] == 1).all()
    for found in (runs, others):
        assert re.fullmatch(r"finetune_[A-Za-z0-9._-]{1,60}_[0-9a-f]{8}", found[2].name)
        found[2].settings.weights.encode()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in others[0].settings.weights
    monkeypatch.setattr(q4_vgg_transfer, "IMAGENET_HASH", digest[:8])
    assert find_weights(str(path))[0] == q4_vgg_transfer.RUNS  # torchvision's own file, fetched by hand
    assert len({run.settings.key() for run in [*runs, *others]}) == 7 and runs[3] is others[3] is SCRATCH
    assert find_weights("none") == ([SCRATCH], None)


def test_imagenet_weights_that_are_others_or_cannot_be_downloaded(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded .*--weights another file, or none"):
        imagenet_weights()
    cached = tmp_path / "hub/checkpoints" / Path(q4_vgg_transfer.IMAGENET.url).name
    torch.save({"other": torch.zeros(1)}, cached)
    with pytest.raises(UserError, match=f"its SHA-256 is another.*delete {cached}"):
        imagenet_weights()
