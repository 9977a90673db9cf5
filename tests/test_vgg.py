"""Question 4: the network, cached features, and weights as people save them."""

import dataclasses
import hashlib
import re
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import vgg11_bn

import common
import q4_vgg_transfer
from common import Run, build, count_parameters, train
from parts.machine import UserError
from q4_vgg_transfer import (
    SCRATCH,
    VGG,
    VGG11,
    feature_tensors,
    features_if_frozen,
    find_weights,
    imagenet_weights,
    vgg,
)

CPU = torch.device("cpu")
HEAD = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10


@pytest.fixture(scope="module")
def state():
    """A random vgg11_bn's state dict, its features in half precision."""
    torch.manual_seed(3)
    features = vgg11_bn().features
    for name, buffer in features.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    tensors = {f"features.{k}": v.half() if v.is_floating_point() else v for k, v in features.state_dict().items()}
    return tensors | {"classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def weights(state):
    return feature_tensors(state, "here")


@pytest.fixture(scope="module")
def few(small):
    """60 images to train, 20 to validate, 20 to test."""
    sizes = {"train": 60, "validation": 20, "test": 20}
    return {part: common.Split(s.images[: sizes[part]], s.labels[: sizes[part]]) for part, s in small.items()}


def run_of(backbone="frozen", **changes):
    settings = dataclasses.replace(VGG, weights="random", backbone=backbone, data="cifar10-sample", precision="fp32")
    return Run("frozen", dataclasses.replace(settings, epochs=1, batch_size=30, **changes))


def trained(run, weights, data, path, prepare=None):
    return train(run, build(run, CPU, partial(vgg, weights=weights)), data, CPU, path, prepare)


def test_parameters_of_backbone_and_head():
    for backbone in ("frozen", "frozen, training mode"):
        assert count_parameters(VGG11(backbone)) == HEAD
    assert count_parameters(VGG11()) == HEAD + 9_225_984  # the features of torchvision's vgg11_bn
    assert VGG11()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_network_from_scratch_is_torchvisions():
    torch.manual_seed(5)
    ours = VGG11().features.state_dict()
    torch.manual_seed(5)
    theirs = vgg11_bn().features.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_frozen_means_that_nothing_in_the_backbone_moves(weights, few, tmp_path):
    run = run_of()
    after = trained(run, weights, few, tmp_path / "plain.pt")["model"]
    assert all(torch.equal(after[f"features.{name}"], tensor) for name, tensor in weights.items())
    fresh = build(run, CPU, partial(vgg, weights=weights)).state_dict()
    assert not torch.equal(after["head.0.weight"], fresh["head.0.weight"])
    assert not torch.equal(after["head.1.running_mean"], fresh["head.1.running_mean"])


def test_frozen_in_training_mode_moves_the_statistics_alone(weights, few, tmp_path):
    """As the report's code: no gradients in the backbone, but batch norm by the batch, whose statistics move."""
    run = run_of("frozen, training mode")
    after = trained(run, weights, few, tmp_path / "moving.pt")["model"]
    moved = {name for name, tensor in weights.items() if not torch.equal(after[f"features.{name}"], tensor)}
    assert moved == {n for n in weights if n.rsplit(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    model = build(run, CPU, partial(vgg, weights=weights))
    images, _ = few["train"].batch(torch.arange(50), run.settings)
    with torch.no_grad():
        by_batch, by_statistics = (model.train(mode).features(images) for mode in (True, False))
    assert (by_batch - by_statistics).norm() / by_statistics.norm() > 0.05


def test_finetuning_starts_from_the_weights_and_moves_them(weights, few, tmp_path):
    run = run_of("trained")
    model = build(run, CPU, partial(vgg, weights=weights))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.features.state_dict().items())
    after = trained(run, weights, few, tmp_path / "finetune.pt")["model"]
    assert not torch.equal(after["features.0.weight"], weights["0.weight"])


def test_the_head_starts_as_the_reports(weights):
    """From scratch N(0, 1e-3), as the exercise says; with pretrained features as PyTorch starts a Linear."""
    heads = [build(run, CPU, partial(vgg, weights=weights)).head for run in (run_of(), SCRATCH)]
    deviations = [(head[0].weight.std().item(), head[3].weight.std().item()) for head in heads]
    assert deviations[0] == pytest.approx((1 / (3 * 512) ** 0.5, 1 / (3 * 256) ** 0.5), rel=0.05)
    assert deviations[1] == pytest.approx((1e-3, 1e-3), rel=0.05)
    assert heads[0][0].bias.count_nonzero() > 0 and heads[1][0].bias.count_nonzero() == 0


def test_cached_features_train_as_running_the_backbone_every_epoch_does(weights, few, tmp_path):
    every_epoch = trained(run_of(), weights, few, tmp_path / "plain.pt")
    cached = trained(run_of(), weights, few, tmp_path / "cached.pt", features_if_frozen)
    for a, b in zip(every_epoch["history"], cached["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["augmented_validation_loss"] == pytest.approx(b["augmented_validation_loss"], abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(every_epoch["predictions"], cached["predictions"], strict=True))


def test_cached_batches_choose_the_mirror_images_that_plain_ones_do(weights, few):
    run = run_of()
    model = build(run, CPU, partial(vgg, weights=weights)).eval()
    cached = features_if_frozen(model, few, run.settings)["train"]
    index = torch.randperm(60)[:40]
    images, labels = few["train"].batch(index, run.settings, common.generator(0, 1, "augment"))
    features, same_labels = cached.batch(index, run.settings, common.generator(0, 1, "augment"))
    with torch.no_grad():
        torch.testing.assert_close(features, model.features(images).flatten(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(labels, same_labels)
    apart = (cached.features[:, 0] - cached.features[:, 1]).abs().amax(1)
    assert apart.min() > 1e-3  # a mirror image has other features
    assert features_if_frozen(model, few, run_of("trained").settings) is few


# ----------------------------------------------------------------------------------------------------------- weights


def strip(state):
    return {name.removeprefix("features."): tensor for name, tensor in state.items() if name.startswith("features.")}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


FORMS = {  # as people save them
    "torchvision's": lambda state: state,
    "of the features alone": strip,
    "under state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "under net, with numbers": lambda state: {"net": prefixed(state, "module."), "acc": 93.1, "epoch": 9},
    "under model, with an optimiser": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "under model_state_dict": lambda state: {"model_state_dict": state},
    "compiled, of DataParallel": lambda state: prefixed(state, "_orig_mod.module."),
    "of a backbone": lambda state: prefixed(strip(state), "model.backbone."),
    "with numbers of NumPy": lambda state: {"state_dict": state, "best": np.float64(0.9), "n": np.int64(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_saved_in_the_usual_forms(state, weights, tmp_path, form):
    torch.save(FORMS[form](state), tmp_path / "other.pth")
    _, found = find_weights(str(tmp_path / "other.pth"))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


DAMAGES = {
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[:1_000_000]), "is not a state dict"),
    "a web page": (lambda path, state: path.write_text("<html>"), "is not a state dict"),
    "a list": (lambda path, state: torch.save(["a"], path), "not among no tensors"),
    "no dict": (lambda path, state: torch.save({"state_dict": None}, path), "not among no tensors"),
    "a missing tensor": (
        lambda path, state: torch.save({k: v for k, v in state.items() if k != "features.4.weight"}, path),
        r"not among features.0.weight, .* \(5\d tensors\)",
    ),
    "another shape": (
        lambda path, state: torch.save(state | {"features.4.weight": torch.zeros(3)}, path),
        "of their shapes, are not",
    ),
    "another network": (
        lambda path, state: torch.save({"conv1.weight": torch.zeros(3)}, path),
        r"not among conv1.weight, ... \(1 tensors\)",
    ),
    "code": (lambda path, state: torch.save({"features": print}, path), "could run any code"),
    "a whole module": (lambda path, state: torch.save(vgg11_bn().features, path), r"torch.save\(model.state_dict\(\)"),
    "missing": (lambda path, state: path.unlink(), "cannot read --weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_weight_files(state, tmp_path, damage):
    path = tmp_path / "bad.pth"
    torch.save(state, path)
    change, message = DAMAGES[damage]
    change(path, state)
    with pytest.raises(UserError, match=message) as error:
        find_weights(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_are_known_by_their_content(state, tmp_path):
    """In a notebook: the file is overwritten, and loaded again."""
    path = tmp_path / "features.pth"
    torch.save(state, path)
    runs, before = find_weights(str(path))
    torch.save(state | {"features.0.bias": torch.ones(64)}, path)
    others, after = find_weights(str(path))
    assert runs[0].settings.weights != others[0].settings.weights and runs[0].name != others[0].name
    assert not torch.equal(before["0.bias"], after["0.bias"]) and (after["0.bias"] == 1).all()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in others[0].settings.weights


@pytest.mark.parametrize("name", ["my weights (v2) [best].pth", "x" * 240 + ".pth", b"caf\xe9.pth"])
def test_any_file_name_gives_a_plain_label(state, tmp_path, name):
    path = tmp_path / (name if isinstance(name, str) else name.decode(errors="surrogateescape"))
    torch.save(state, tmp_path / "plain.pth")
    (tmp_path / "plain.pth").rename(path)
    runs, _ = find_weights(str(path))
    assert re.fullmatch(r"finetune_[A-Za-z0-9._-]{1,60}_[0-9a-f]{8}", runs[2].name)
    runs[2].settings.weights.encode()
    assert [run.name for run in runs[3:]] == ["scratch"] and len({run.settings.key() for run in runs}) == 4


def test_without_weights_there_is_nothing_to_transfer():
    assert find_weights("none") == ([SCRATCH], None)


@pytest.mark.parametrize("content", [b"other weights", b""])
def test_another_file_in_torchs_cache_does_not_pass_for_imagenets(monkeypatch, tmp_path, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / Path(q4_vgg_transfer.IMAGENET.url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    with pytest.raises(UserError, match=f"{cached} is damaged.*delete it"):
        imagenet_weights()


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded .*--weights another file, or none"):
        imagenet_weights()
