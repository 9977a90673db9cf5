"""Muon for convolutions, SGD for the rest, each against torch's own on the very same parameters."""

import copy
import math

import pytest
import torch
from torch import nn

from common import ConvNet
from parts.muon import MuonAndSGD, as_matrix, orthogonalize

RATES = {"learning_rate": 0.05, "filter_learning_rate": 0.1, "weight_decay": 0.01, "dtype": torch.bfloat16}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    torch.manual_seed(seed)
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_orthogonalizing_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonalize(matrix), u @ values.diag() @ vh)


def test_three_steps_are_torchs_muon_and_sgd(model):
    """In bfloat16, at falling learning rates, bit for bit."""
    optimizer = MuonAndSGD(model, **RATES)
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    others = [p for p in model.parameters() if not any(p is weight for weight in filters)]
    matrices = [nn.Parameter(as_matrix(weight.detach()).clone()) for weight in filters]
    copies = [copy.deepcopy(p) for p in others]
    muon = torch.optim.Muon(matrices, 0.1, weight_decay=0.0, momentum=0.6)
    sgd = torch.optim.SGD(copies, 0.05, 0.85, weight_decay=0.01, nesterov=True)
    for seed in range(3):
        backward(model, seed)
        for matrix, weight in zip(matrices, filters):
            matrix.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)
            weight.grad = weight.grad.contiguous()  # however a kernel lays it
            matrix.data *= math.sqrt(len(matrix)) / matrix.norm()
        for p, own in zip(copies, others):
            p.grad = own.grad.clone()
        for each in (optimizer, muon, sgd):
            each.step()
        for group in (*optimizer.param_groups, *muon.param_groups, *sgd.param_groups):
            group["lr"] *= 0.5
    for matrix, weight in zip(matrices, filters):
        assert torch.equal(as_matrix(weight), matrix)
    for p, own in zip(copies, others, strict=True):
        assert torch.equal(own, p)


def test_in_float32_nothing_is_rounded_to_bfloat16(model):
    optimizer = MuonAndSGD(model, **RATES | {"dtype": torch.float32})
    weight = model[2].weight
    backward(model, 0)
    before = as_matrix(weight.detach()).clone()
    optimizer.step()
    before *= math.sqrt(len(before)) / before.norm()
    update = orthogonalize(as_matrix(weight.grad.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(as_matrix(weight), before - 0.1 * update, atol=1e-5, rtol=0)


def test_every_parameter_has_one_optimiser_and_frozen_ones_none(narrow):
    model = ConvNet(batch_norm=True).to(memory_format=torch.channels_last)
    first = next(model.parameters()).requires_grad_(False)
    filters, others = (group["params"] for group in MuonAndSGD(model, **RATES).param_groups)
    assert [tuple(weight.shape) for weight in filters] == [(16, 8, 3, 3), *[(16, 16, 3, 3)] * 3]
    counted = sum(p.numel() for p in [*filters, *others])
    assert counted == sum(p.numel() for p in model.parameters()) - first.numel()
