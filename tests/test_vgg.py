import dataclasses
import functools
import hashlib
import re
import socket
from pathlib import Path

import pytest
import torch
from torchvision.models import vgg11_bn

import common
import q4_vgg_transfer
from common import Run, build, count_parameters, make_parser, select_runs, train
from machine import UserError
from q4_vgg_transfer import VGG, VGG11, build_vgg, frozen_features, load_weights, with_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights as torchvision's, of a random vgg11_bn, half precision."""
    torch.manual_seed(3)
    features = vgg11_bn().features
    for name, buffer in features.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    state = {f"features.{k}": v.half() if v.is_floating_point() else v for k, v in features.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


def frozen(weights, **changes):
    settings = dataclasses.replace(VGG, backbone="frozen", data="cifar10-sample", precision="fp32", epochs=2)
    settings = dataclasses.replace(settings, batch_size=50)
    prepare = {"prepare": frozen_features} if changes.get("backbone", "frozen") == "frozen" else {}
    settings = dataclasses.replace(settings, **changes)
    return Run("frozen", settings, functools.partial(build_vgg, source=str(weights)), **prepare)


def plain(run):
    """The same run, but for running the backbone in every epoch."""
    return Run(run.name, run.settings, run.build)


def trained(run, data, path):
    return train(run, build(run, CPU), data, CPU, path)


def test_parameters_of_backbone_and_head():
    head = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10
    for backbone in ("frozen", "frozen, training mode"):
        assert count_parameters(VGG11(backbone)) == head
    assert count_parameters(VGG11()) == head + 9_225_984  # the features of torchvision's vgg11_bn
    assert VGG11()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_frozen_means_that_nothing_in_the_backbone_moves(weights, small, tmp_path):
    run = frozen(weights, epochs=1)
    state = trained(plain(run), small, tmp_path / "plain.pt")["model"]
    for name, tensor in load_weights(str(weights)).items():
        assert torch.equal(state[f"features.{name}"], tensor), name
    fresh = build(run, CPU).state_dict()
    assert not torch.equal(state["head.0.weight"], fresh["head.0.weight"])
    assert not torch.equal(state["head.1.running_mean"], fresh["head.1.running_mean"])


def test_frozen_in_training_mode_moves_the_statistics_alone(weights, small, tmp_path):
    """As the report's code: no gradients in the backbone, but batch norm by the batch, whose statistics move."""
    run = frozen(weights, backbone="frozen, training mode", epochs=1)
    state = trained(run, small, tmp_path / "moving.pt")["model"]
    loaded = load_weights(str(weights))
    moved = {name for name, tensor in loaded.items() if not torch.equal(state[f"features.{name}"], tensor)}
    assert moved == {n for n in loaded if n.rsplit(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    model = build(run, CPU)
    images, _ = small["train"].batch(torch.arange(50), run.settings)
    with torch.no_grad():
        by_batch, by_statistics = (model.train(mode).features(images) for mode in (True, False))
    assert (by_batch - by_statistics).norm() / by_statistics.norm() > 0.05


def test_the_head_starts_as_the_reports(weights):
    """From scratch N(0, 1e-3), as the exercise says; with pretrained features as PyTorch starts a Linear."""
    heads = [build(run, CPU).head for run in (frozen(weights), q4_vgg_transfer.SCRATCH)]
    deviations = [(head[0].weight.std().item(), head[3].weight.std().item()) for head in heads]
    assert deviations[0] == pytest.approx((1 / (3 * 512) ** 0.5, 1 / (3 * 256) ** 0.5), rel=0.05)
    assert deviations[1] == pytest.approx((1e-3, 1e-3), rel=0.05)
    assert heads[0][0].bias.count_nonzero() > 0 and heads[1][0].bias.count_nonzero() == 0


def test_cached_features_train_as_running_the_backbone_every_epoch_does(weights, small, tmp_path):
    run = frozen(weights)
    every_epoch = trained(plain(run), small, tmp_path / "plain.pt")
    cached = trained(run, small, tmp_path / "cached.pt")
    for a, b in zip(every_epoch["history"], cached["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(every_epoch["predictions"], cached["predictions"], strict=True))


def test_cached_batches_choose_the_mirror_images_that_plain_ones_do(weights, small):
    run = frozen(weights)
    model = build(run, CPU)
    model.eval()
    cached = run.prepare(model, small, run.settings)["train"]
    index = torch.randperm(120)[:64]
    images, labels = small["train"].batch(index, run.settings, common.generator(0, 1, "augment"))
    features, same_labels = cached.batch(index, run.settings, common.generator(0, 1, "augment"))
    with torch.no_grad():
        torch.testing.assert_close(features, model.features(images).flatten(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(labels, same_labels)
    assert (cached.features[:, 0] - cached.features[:, 1]).abs().amax(
        1
    ).min() > 1e-3  # a mirror image has other features


def test_weights_are_loaded_and_finetuned(weights, small, tmp_path):
    run = frozen(weights, backbone="trained", epochs=1)
    model = build(run, CPU)
    loaded = load_weights(str(weights))
    assert all(torch.equal(v, loaded[k]) for k, v in model.features.state_dict().items())
    state = trained(run, small, tmp_path / "finetune.pt")["model"]
    assert not torch.equal(state["features.0.weight"], loaded["0.weight"])


def test_runs_of_other_weights_are_named_by_them(weights):
    runs = select_runs(with_weights(str(weights)), make_parser("").parse_args(["--sample"]), CPU)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    label = f"random_{digest[:8]}"
    assert [r.name for r in runs] == [f"frozen_train_mode_{label}", f"frozen_{label}", f"finetune_{label}", "scratch"]
    assert all(digest in run.settings.weights for run in runs[:3]) and runs[3].settings.weights == "none"
    assert len({run.settings.key() for run in runs}) == 4


def test_without_weights_there_is_nothing_to_transfer():
    assert [run.name for run in with_weights("none")] == ["scratch"]


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "truncated",
        "not a state dict",
        "missing key",
        "wrong shape",
        "pickle",
        "no dict under state_dict",
        "a web page",
    ],
)
def test_bad_weight_files(weights, tmp_path, capsys, damage):
    path = tmp_path / "bad.pth"
    state = torch.load(weights, weights_only=True)
    if damage == "truncated":
        path.write_bytes(weights.read_bytes()[:1_000_000])
    elif damage == "not a state dict":
        torch.save(["a", "list"], path)
    elif damage == "missing key":
        del state["features.4.weight"]
        torch.save(state, path)
    elif damage == "wrong shape":
        torch.save(state | {"features.4.weight": torch.zeros(3)}, path)
    elif damage == "no dict under state_dict":
        torch.save({"state_dict": None}, path)
    elif damage == "a web page":
        path.write_text("<html>")
    elif damage == "pickle":
        torch.save({"features": print}, path)  # code, which weights_only refuses
    options = ["--sample", "--weights", str(path), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        q4_vgg_transfer.main([*options, "--checkpoint-dir", str(tmp_path / "checkpoints")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and str(path) in err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ["other weights", "truncated"])
def test_another_file_in_torchs_cache_does_not_pass_for_imagenets(weights, monkeypatch, tmp_path, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / Path(q4_vgg_transfer.IMAGENET.url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights.read_bytes()[: 1000 if content == "truncated" else None])
    with pytest.raises(UserError, match=f"{cached} is damaged.*delete it"):
        load_weights("imagenet")


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded .*--weights another file, or none"):
        load_weights("imagenet")


def save_as(state: dict, form: str, path: Path) -> None:
    """The weights in one of the forms people save them in."""
    if form == "under state_dict":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "of DataParallel":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif form == "of the features alone":
        torch.save({n.removeprefix("features."): t for n, t in state.items() if n.startswith("features.")}, path)
    elif form == "both":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)


@pytest.mark.parametrize("form", ["under state_dict", "of DataParallel", "of the features alone", "both"])
def test_weights_saved_in_the_usual_forms(weights, tmp_path, form):
    save_as(torch.load(weights, weights_only=True), form, tmp_path / "other.pth")
    expected = load_weights(str(weights))
    found = load_weights(str(tmp_path / "other.pth"))
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path):
    torch.save(vgg11_bn().features, tmp_path / "module.pth")
    with pytest.raises(
        UserError, match=r"could run any code; save its weights alone: torch.save\(model.state_dict\(\)"
    ):
        load_weights(str(tmp_path / "module.pth"))


def test_a_name_with_blanks_and_brackets_gives_a_plain_label(weights, tmp_path):
    odd = tmp_path / "my weights (v2) [best].pth"
    odd.write_bytes(weights.read_bytes())
    assert re.fullmatch(r"frozen_my_weights__v2___best__[0-9a-f]{8}", with_weights(str(odd))[1].name)
