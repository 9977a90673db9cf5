"""The layers that a CPU computes faster, against PyTorch's own; mostly in float64, where rounding hides nothing."""

import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ConvNet
from parts import layers
from parts.layers import Conv2d, ConvolutionAsProduct, ConvolutionRule, Dropout, winograd

SHAPES = [(3, 5, 7, 5), (4, 2, 1, 1), (2, 4, 5, 5), (2, 3, 3, 6), (3, 5, 8, 4), (2, 1, 1, 9)]  # C_in, C_out, H, W
ALGORITHMS = {
    "Winograd": winograd,
    "products": lambda *tensors: ConvolutionAsProduct.apply(*tensors, True),
    "weight product": lambda *tensors: ConvolutionAsProduct.apply(*tensors, False),
}
assert_all_close = partial(torch.testing.assert_close, atol=1e-9, rtol=0)


def step(function, shape, batch: int) -> list[Tensor]:
    """Output and all three gradients of a convolution of drawn images; float64, channels_last."""
    c_in, c_out, height, width = shape
    rng = torch.Generator().manual_seed(0)
    shapes = (batch, c_in, height, width), (c_out, c_in, 3, 3), (c_out,), (batch, c_out, height, width)
    drawn = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    drawn = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in drawn]
    *leaves, gradient = (t.requires_grad_() for t in drawn)
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_algorithm_is_the_convolution(shape, algorithm):
    for batch in (0, 1, 3):
        ours = step(ALGORITHMS[algorithm], shape, batch)
        assert_all_close(ours, step(lambda x, w, b: F.conv2d(x, w, b, padding=1), shape, batch))
        assert not batch or ours[0].is_contiguous(memory_format=torch.channels_last)


def test_winograds_algorithm_is_exact_enough_in_float32():
    rng = torch.Generator().manual_seed(0)
    images, weight = torch.randn(4, 512, 8, 8, generator=rng), torch.randn(16, 512, 3, 3, generator=rng)
    exact = F.conv2d(images.double(), weight.double(), padding=1)
    ours = winograd(images, weight, torch.zeros(16))
    assert (ours - exact).norm() < 1e-5 * exact.norm()  # bfloat16's is 2e-3


@pytest.fixture
def rule(monkeypatch):
    """Its return_value is the rule, whatever the CPU."""
    asked = Mock()
    monkeypatch.setattr(layers, "convolution_rule", asked)
    return asked


def test_a_network_is_the_same_by_every_rule(narrow, monkeypatch, rule):
    torch.manual_seed(0)
    model, images = ConvNet(batch_norm=True).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    used, apply, tiled = [], ConvolutionAsProduct.apply, []
    monkeypatch.setattr(ConvolutionAsProduct, "apply", lambda *inputs: used.append(inputs) or apply(*inputs))
    monkeypatch.setattr(layers, "winograd", lambda *inputs: tiled.append(inputs) or winograd(*inputs))
    found, products = [], []
    for limits in ((0, 0, 0), (0, 64, 64), (0, 16, 64), (8, 0, 0)):
        rule.return_value = ConvolutionRule(*limits)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        products.append([inputs[-1] for inputs in used])
        used.clear()
    # layers with outputs of 8 x 8, 4 x 4 and 2 x 2 pixels
    assert products == [[], [True] * 3, [False, True, True], []]
    assert len(tiled) == 4  # all but the first, of 3 channels; the next has 8
    for other in found[1:]:
        assert_all_close(other, found[0])


def test_autocast_computes_in_bfloat16(rule):
    rule.return_value = ConvolutionRule(0, 64, 64)
    layer, images = Conv2d(16, 8, 3, padding=1), torch.randn(4, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    rule.assert_called_once_with("cpu", torch.bfloat16)
    assert output.dtype == torch.bfloat16
    exact = F.conv2d(images.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert (output - exact).norm() < 0.02 * exact.norm()


OPTIONS = [{"stride": 2}, {"padding": (1, 0)}, {"padding_mode": "reflect"}, {"groups": 2}, {"bias": False}]


@pytest.mark.parametrize("limits", [(1, 0, 0), (0, 64, 64)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_convolutions_are_pytorchs(options, limits, rule):
    rule.return_value = ConvolutionRule(*limits)
    options = {"kernel_size": 3, "padding": 1} | options
    theirs, ours = nn.Conv2d(4, 6, **options).double(), Conv2d(4, 6, **options).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_all_close([ours(images)], [theirs(images)])


def test_the_rule_follows_from_the_cpu(monkeypatch):
    make_rule = layers.convolution_rule.__wrapped__
    for instruction, limits in {"amx_bf16": (16, 64), "avx512_bf16": (16, 16), "bf16": (0, 0)}.items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=instruction: {name: True})
        assert make_rule("cpu", torch.bfloat16) == ConvolutionRule(0, *limits)
        assert make_rule("cpu", torch.float32) == ConvolutionRule(winograd=128)
        assert make_rule("cuda", torch.bfloat16) == make_rule("cuda", torch.float32) == ConvolutionRule()


def test_dropout_drops_its_share_and_scales_the_rest():
    torch.manual_seed(0)
    inputs = torch.ones(25, 15, 21, 21).to(memory_format=torch.channels_last).requires_grad_()
    for p in (0.1, 0.5, 0.9):  # the last of the integers is cut
        output, n = Dropout(p)(inputs), inputs.numel()
        kept = output != 0
        assert abs(kept.sum().item() - n * (1 - p)) < 4 * math.sqrt(n * p * (1 - p))
        torch.testing.assert_close(output[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-4, atol=0)
        assert output.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(output.sum(), inputs)
        assert torch.equal(gradient, output.detach())  # the same mask and scale backwards


def test_dropped_units_are_independent():
    """No correlation between neighbours: in memory (units cut from one integer), channels, rows, images, calls."""
    torch.manual_seed(1)
    dropout, inputs = Dropout(0.5), torch.ones(32, 32, 16, 16).to(memory_format=torch.channels_last)
    first, second = ((dropout(inputs) != 0).float() - 0.5 for _ in "ab")
    flat = first.permute(0, 2, 3, 1).flatten()
    pairs = [(flat[:-lag], flat[lag:]) for lag in (1, 2, 3, 4)]
    pairs += [(first.narrow(d, 1, first.shape[d] - 1), first.narrow(d, 0, first.shape[d] - 1)) for d in range(4)]
    for a, b in [*pairs, (first, second)]:
        assert abs((a * b).mean().item() / 0.25) < 4 / math.sqrt(a.numel())
