"""The layers that a CPU computes faster, against PyTorch's own."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import machine
from common import ConvNet
from machine import (
    Conv2d,
    ConvolutionAsProduct,
    Directions,
    Dropout,
    ProductRule,
    choose_device,
    fast_convolutions,
    image_patches,
)
from q4_vgg_transfer import VGG11

BATCH = 2
ODD = [(3, 5, 7, 5, 3), (4, 2, 1, 1, 3), (2, 3, 3, 6, 5), (2, 4, 5, 5, 1)]  # C_in, C_out, height, width, kernel size
EVERY = [Directions(*chosen) for chosen in itertools.product((False, True), repeat=3)]


def test_a_cpu_counts_subnormal_numbers_as_zero():
    torch.set_flush_denormal(False)
    small = torch.full((8,), 1e-39)
    assert (small * 1.0 > 0).all()
    choose_device("cpu")
    assert (small * 1.0 == 0).all() and (torch.full((8,), 2e-38) * 1.0 > 0).all()


def shapes_of(model: nn.Module) -> set[tuple[int, int, int, int, int]]:
    """C_in, C_out, height, width and kernel size of all its convolutions, for images of 32 x 32."""
    shapes = set()

    def record(module, inputs, _output):
        shapes.add((module.in_channels, module.out_channels, *inputs[0].shape[2:], module.kernel_size[0]))

    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return shapes


SHAPES = sorted(shapes_of(ConvNet()) | shapes_of(VGG11())) + ODD


def make_inputs(shape, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Images, weight, bias and the gradient of the output, channels_last, of the usual sizes."""
    c_in, c_out, height, width, size = shape
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(batch, c_in, height, width, generator=rng)
    weight = torch.randn(c_out, c_in, size, size, generator=rng) / math.sqrt(c_in * size * size)
    gradient = torch.randn(batch, c_out, height, width, generator=rng)
    tensors = [t.to(dtype, memory_format=torch.channels_last) for t in (images, weight, gradient)]
    return [tensors[0], tensors[1], torch.randn(c_out, generator=rng).to(dtype), tensors[2]]


def step(function, images, weight, bias, gradient) -> list[torch.Tensor]:
    """Output and all three gradients, float64."""
    leaves = [t.detach().clone().requires_grad_() for t in (images, weight, bias)]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, gradient)
    return [t.detach().double() for t in (output, *gradients)]


def exact_step(images, weight, bias, gradient) -> list[torch.Tensor]:
    """What PyTorch's convolution gives in float64."""
    return step(
        lambda x, w, b: F.conv2d(x, w, b, padding=w.shape[-1] // 2),
        *(t.double() for t in (images, weight, bias, gradient)),
    )


def errors(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Relative to each tensor's norm."""
    assert [a.shape for a in ours] == [b.shape for b in exact]
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_products_are_the_convolution(shape, dtype, tolerance):
    """Values and gradients, for every shape of the networks and for odd ones."""
    inputs = make_inputs(shape, dtype=dtype)
    exact = exact_step(*inputs)
    ours = step(lambda *t: ConvolutionAsProduct.apply(*t, Directions(True, True, True)), *inputs)
    assert max(errors(ours, exact)) < tolerance


@pytest.mark.parametrize("directions", EVERY, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_choice_of_directions_is_the_convolution(directions, batch):
    inputs = make_inputs((4, 6, 5, 3, 3), batch)
    ours = step(lambda *t: ConvolutionAsProduct.apply(*t, directions), *inputs)
    assert max(errors(ours, exact_step(*inputs))) < 1e-5


@pytest.mark.parametrize("directions", [Directions(True, True, True), Directions(False, False, True)], ids=str)
def test_gradients_by_finite_differences(directions):
    images, weight, bias, _ = make_inputs((2, 3, 3, 4, 3), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (images, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: ConvolutionAsProduct.apply(*t, directions), leaves)


def test_products_repeat_themselves():
    inputs = make_inputs((512, 512, 4, 4, 3), batch=8, dtype=torch.bfloat16)
    once, again = (step(lambda *t: ConvolutionAsProduct.apply(*t, Directions(True, True, True)), *inputs) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_frozen_weights_get_no_gradient_and_images_need_none():
    images, weight, bias, gradient = make_inputs((4, 6, 4, 4, 3))
    for directions in (Directions(True, True, True), Directions()):
        images.grad = None
        ConvolutionAsProduct.apply(images.requires_grad_(), weight, bias, directions).backward(gradient)
        assert weight.grad is None and images.grad is not None
    weight.requires_grad_()
    ConvolutionAsProduct.apply(images.detach(), weight, bias, Directions(True, True, True)).backward(gradient)
    assert weight.grad is not None


def test_patches_are_unfolds():
    images = torch.randn(2, 3, 4, 5)
    expected = F.unfold(images, 3, padding=1).view(2, 3, 9, 20).permute(0, 3, 2, 1).reshape(40, 27)
    assert torch.equal(image_patches(images, 3), expected)


@pytest.fixture
def rule(monkeypatch):
    """Set the rule, whatever the CPU."""
    return lambda *limits: monkeypatch.setattr(machine, "product_rule", lambda *_: ProductRule(*limits))


@pytest.mark.parametrize("model", [lambda: ConvNet(batch_norm=True), VGG11], ids=["ConvNet", "VGG11"])
def test_a_network_with_products_is_the_network(model, rule):
    """Whatever the rule: the same outputs and gradients to rounding, the same names, the same printed network."""
    torch.manual_seed(0)
    ours, images = model(), torch.randn(4, 3, 32, 32)
    found = []
    for limits in ((0, 0, 0), (64, 64, 64), (16, 16, 64)):
        rule(*limits)
        ours.zero_grad()
        output = ours(images)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in ours.parameters())])
    for other in found[1:]:
        for (name, _), ours_, theirs in zip([("output", 0), *ours.named_parameters()], other, found[0], strict=True):
            if not (name.endswith(".bias") and theirs.norm() < 1e-4):  # before batch norm a bias has no gradient
                assert ((ours_ - theirs).norm() / theirs.norm()).item() < 1e-3, name
    assert "Conv2d(" in str(ours) and "Product" not in str(ours)


def test_a_ready_made_model_keeps_its_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    before, printed = model.state_dict(), str(model)
    assert [type(m) for m in fast_convolutions(model)] == [Conv2d, nn.ReLU, Conv2d]
    assert str(model) == printed and model.state_dict().keys() == before.keys()
    assert all(model.state_dict()[k].data_ptr() == before[k].data_ptr() for k in before)


@pytest.mark.parametrize(
    ("device", "dtype", "capabilities", "limits"),
    [
        ("cpu", torch.bfloat16, {"amx_bf16": True, "avx512_bf16": True}, (16, 16, 64)),
        ("cpu", torch.bfloat16, {"avx512_bf16": True}, (16, 16, 16)),
        ("cpu", torch.bfloat16, {"bf16": True}, (0, 0, 0)),
        ("cpu", torch.float32, {"amx_bf16": True}, (0, 0, 0)),
        ("cuda", torch.bfloat16, {"amx_bf16": True}, (0, 0, 0)),
        ("mps", torch.float32, {}, (0, 0, 0)),
    ],
)
def test_the_rule_follows_from_the_cpu(monkeypatch, device, dtype, capabilities, limits):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.product_rule.__wrapped__(device, dtype) == ProductRule(*limits)


def test_the_rule_in_words_and_per_layer():
    assert str(ProductRule()) == "PyTorch's own"
    assert str(ProductRule(16, 16, 64)).endswith("weight gradient up to 64 pixels")
    rule = ProductRule(16, 16, 64)
    assert rule.directions(256) == (False, False, False) and rule.directions(16) == (True, True, True)
    assert rule.directions(64) == (False, False, True)


# ---------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_keeps_its_share_and_scales_it(p, memory_format):
    torch.manual_seed(0)
    inputs = torch.ones(50, 16, 20, 21).to(memory_format=memory_format).requires_grad_()
    n = inputs.numel()  # 336,000
    output = Dropout(p)(inputs)
    kept = output != 0
    assert abs(kept.sum().item() - n * (1 - p)) < 4 * math.sqrt(n * p * (1 - p))
    torch.testing.assert_close(output[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-4, atol=0)
    assert output.is_contiguous(memory_format=memory_format)
    output.sum().backward()
    assert torch.equal(inputs.grad, output.detach())  # the same mask and scale backwards


def test_dropped_units_are_independent():
    """No correlation between neighbours: in memory (units cut from one integer), channels, rows, images, calls."""
    torch.manual_seed(1)
    dropout, inputs = Dropout(0.5), torch.ones(64, 32, 16, 16).to(memory_format=torch.channels_last)
    first, second = ((dropout(inputs) != 0).float() - 0.5 for _ in "ab")
    flat = first.permute(0, 2, 3, 1).flatten()
    pairs = [(flat[:-lag], flat[lag:]) for lag in (1, 2, 3, 4)]
    pairs += [(first.narrow(d, 1, first.shape[d] - 1), first.narrow(d, 0, first.shape[d] - 1)) for d in range(4)]
    for a, b in [*pairs, (first, second)]:
        assert abs((a * b).mean().item() / 0.25) < 4 / math.sqrt(a.numel())


def test_dropout_is_drawn_from_the_global_generator_and_off_in_evaluation():
    dropout, inputs = Dropout(0.3), torch.randn(3, 5, 7)  # 105 units: the last integer is cut
    torch.manual_seed(2)
    once = dropout(inputs)
    torch.manual_seed(2)
    assert torch.equal(dropout(inputs), once) and not torch.equal(dropout(inputs), once)
    assert torch.equal(dropout.eval()(inputs), inputs)


@pytest.mark.parametrize("p", [0.0, 1e-7, 1 - 1e-7, 1.0])
def test_dropout_at_its_ends_is_pytorchs(p):
    inputs = torch.ones(1000)
    torch.manual_seed(3)
    ours = Dropout(p)(inputs)
    torch.manual_seed(3)
    assert torch.equal(ours, nn.Dropout(p)(inputs))
    assert str(Dropout(p)) == str(nn.Dropout(p))
