"""The layers that a CPU computes faster, against PyTorch's own. In float64, where rounding hides nothing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ConvNet
from parts import layers
from parts.layers import Conv2d, ConvolutionAsProduct, Directions, Dropout, ProductRule

SHAPES = [(3, 5, 7, 5, 3), (4, 2, 1, 1, 3), (2, 3, 3, 6, 5), (2, 4, 5, 5, 1), (8, 6, 4, 4, 3)]  # C_in, C_out, H, W, K
EVERY = [Directions(*chosen) for chosen in itertools.product((False, True), repeat=3)]


def make_inputs(shape, batch: int = 2) -> list[Tensor]:
    """Images, weight, bias and the gradient of the output; float64, channels_last."""
    c_in, c_out, height, width, size = shape
    rng = torch.Generator().manual_seed(0)
    shapes = (batch, c_in, height, width), (c_out, c_in, size, size), (c_out,), (batch, c_out, height, width)
    drawn = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in drawn]


def step(function, images, weight, bias, gradient) -> list[Tensor]:
    """Output and all three gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (images, weight, bias)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def assert_all_close(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("directions", EVERY, ids=lambda directions: "".join("01"[chosen] for chosen in directions))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_choice_of_directions_is_the_convolution(shape, directions):
    for batch in (1, 3):
        inputs = make_inputs(shape, batch)
        ours = step(lambda *t: ConvolutionAsProduct.apply(*t, directions), *inputs)
        assert_all_close(ours, step(lambda x, w, b: F.conv2d(x, w, b, padding=w.shape[-1] // 2), *inputs))
        assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("directions", [Directions(), Directions(True, True, True)], ids=["kernels", "products"])
def test_frozen_parameters_get_no_gradient(directions):
    *leaves, gradient = make_inputs((4, 6, 4, 4, 3))
    for wanted in list(itertools.product((False, True), repeat=3))[1:]:
        tensors = [leaf.detach().requires_grad_(want) for leaf, want in zip(leaves, wanted)]
        ConvolutionAsProduct.apply(*tensors, directions).backward(gradient)
        assert tuple(t.grad is not None for t in tensors) == wanted


@pytest.fixture
def rule(monkeypatch):
    """Set the rule, whatever the CPU."""
    return lambda *limits: monkeypatch.setattr(layers, "product_rule", lambda *_: ProductRule(*limits))


def test_a_network_with_products_is_the_network(narrow, monkeypatch, rule):
    torch.manual_seed(0)
    model, images = ConvNet(batch_norm=True).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    used, apply = [], ConvolutionAsProduct.apply
    monkeypatch.setattr(ConvolutionAsProduct, "apply", lambda *inputs: used.append(inputs) or apply(*inputs))
    found, products = [], []
    for limits in ((0, 0, 0), (64, 64, 64), (16, 16, 64)):
        rule(*limits)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        products.append(sum(map(sum, (inputs[-1] for inputs in used))))
    assert products == [0, 9, 9 + 7]  # layers with outputs of 8 x 8, 4 x 4 and 2 x 2 pixels
    for other in found[1:]:
        assert_all_close(other, found[0])


def test_autocast_computes_in_bfloat16_and_keeps_float32(rule):
    rule(64, 64, 64)
    layer, images = Conv2d(16, 8, 3, padding=1), torch.randn(4, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    exact = F.conv2d(images.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert (output - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "options",
    [
        *({"stride": 2}, {"padding": 0}, {"padding": (1, 0)}, {"padding": "same"}, {"padding_mode": "reflect"}),
        *({"dilation": 2}, {"groups": 2}, {"bias": False}, {"kernel_size": 2}, {"kernel_size": (3, 1)}),
    ],
    ids=str,
)
def test_other_convolutions_are_pytorchs(options, rule):
    rule(64, 64, 64)
    options = {"kernel_size": 3, "padding": 1} | options
    theirs, ours = nn.Conv2d(4, 6, **options).double(), Conv2d(4, 6, **options).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_all_close([ours(images)], [theirs(images)])


def test_like_another_layer():
    theirs = nn.Conv2d(3, 4, 5, padding=2)
    before = torch.get_rng_state()
    ours = Conv2d.like(theirs)
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.weight is theirs.weight and ours.bias is theirs.bias
    assert isinstance(ours, Conv2d) and str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("device", "dtype", "instructions", "limits"),
    [
        ("cpu", torch.bfloat16, ["amx_bf16", "avx512_bf16"], (16, 16, 64)),
        ("cpu", torch.bfloat16, ["avx512_bf16"], (16, 16, 16)),
        ("cpu", torch.bfloat16, ["bf16"], (0, 0, 0)),
        ("cpu", torch.float32, ["amx_bf16", "avx512_bf16"], (0, 0, 0)),
        ("cuda", torch.bfloat16, ["amx_bf16", "avx512_bf16"], (0, 0, 0)),
    ],
)
def test_the_rule_follows_from_the_cpu(monkeypatch, device, dtype, instructions, limits):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert layers.product_rule.__wrapped__(device, dtype) == ProductRule(*limits)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(p):
    torch.manual_seed(0)
    inputs = torch.ones(25, 16, 20, 21).to(memory_format=torch.channels_last).requires_grad_()
    output, n = Dropout(p)(inputs), inputs.numel()
    kept = output != 0
    assert abs(kept.sum().item() - n * (1 - p)) < 4 * math.sqrt(n * p * (1 - p))
    torch.testing.assert_close(output[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-4, atol=0)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert torch.equal(inputs.grad, output.detach())  # the same mask and scale backwards


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
    assert torch.equal(ours, nn.Dropout(p)(inputs)) and str(Dropout(p)) == str(nn.Dropout(p))
