"""Muon for convolutions, SGD for the rest."""

import copy
import math

import pytest
import torch
from torch import nn

from common import ConvNet
from muon import MuonAndSGD

RATES = {"learning_rate": 0.05, "filter_learning_rate": 0.1, "weight_decay": 0.0}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def convolutions(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()


def test_a_convolutions_update_is_muons_of_a_matrix():
    """torch's own Muon on the same matrices, [C_out, C_in * K * K]: the order of the columns does not matter."""
    model = small_network()
    optimizer = MuonAndSGD(model, **RATES)
    expected = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in convolutions(model)]
    reference = torch.optim.Muon(expected, 0.1, weight_decay=0.0, momentum=0.6)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        for matrix, weight in zip(expected, convolutions(model)):
            matrix.grad = weight.grad.flatten(1).clone()
            matrix.data *= math.sqrt(len(matrix)) / matrix.norm()
        optimizer.step()
        reference.step()
    for matrix, weight in zip(expected, convolutions(model)):
        torch.testing.assert_close(weight.flatten(1), matrix, atol=2e-3, rtol=0)  # bfloat16


def test_the_rest_is_nesterovs_sgd():
    model = small_network()
    optimizer = MuonAndSGD(model, **RATES | {"weight_decay": 0.01})
    filters = set(map(id, convolutions(model)))
    others = [p for p in model.parameters() if id(p) not in filters]
    expected = [copy.deepcopy(p) for p in others]
    reference = torch.optim.SGD(expected, 0.05, 0.85, weight_decay=0.01, nesterov=True)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        for p, own in zip(expected, others):
            p.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    assert len(others) == 6 and all(torch.equal(p, own) for p, own in zip(expected, others))


def test_every_parameter_has_one_optimiser_and_frozen_ones_none():
    model = ConvNet(batch_norm=True).to(memory_format=torch.channels_last)
    first = next(model.parameters()).requires_grad_(False)
    groups = MuonAndSGD(model, **RATES).param_groups
    matrices, others = (group["params"] for group in groups)
    assert [tuple(m.shape) for m in matrices] == [(512, 9 * c) for c in (128, 512, 512, 512)]
    counted = sum(p.numel() for p in [*matrices, *others])
    assert counted == sum(p.numel() for p in model.parameters()) - first.numel()
    assert [group["initial_lr"] for group in groups] == [0.1, 0.05]


def test_a_weight_in_another_memory_layout_is_refused():
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        MuonAndSGD(nn.Sequential(nn.Conv2d(3, 8, 3)), **RATES)
