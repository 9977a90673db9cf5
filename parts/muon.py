"""Muon for a network of convolutions: torch.optim.Muon takes matrices only, and leaves the rest to another one."""

import math

import torch
from torch import Tensor, nn

SGD_MOMENTUM = 0.85  # Nesterov
MUON_MOMENTUM = 0.6


class MuonAndSGD(torch.optim.Optimizer):
    """Muon for the weights of convolutions; SGD with Nesterov momentum for batch norm, biases and linear layers.

    Muon (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) replaces the update of a matrix by the
    orthogonal matrix nearest to it, which torch.optim.Muon computes in bfloat16 whatever the run's precision: on CPUs
    without it that takes long. A convolution's weight is such a matrix, [C_out, K * K * C_in]. Before every update its
    Frobenius norm is set to sqrt(C_out), as in https://github.com/KellerJordan/cifar10-airbench: with a batch norm
    behind it its length means nothing, and so the learning rate is relative to it.

    A param group's "initial_lr" is its learning rate at the start.
    """

    def __init__(self, model: nn.Module, learning_rate: float, filter_learning_rate: float, weight_decay: float):
        self.weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        taken = set(map(id, self.weights))
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        self.matrices = [as_matrix(weight.detach()) for weight in self.weights]
        self.muon = torch.optim.Muon(self.matrices, filter_learning_rate, weight_decay=0.0, momentum=MUON_MOMENTUM)
        self.sgd = torch.optim.SGD(others, learning_rate, SGD_MOMENTUM, weight_decay=weight_decay, nesterov=True)
        rates = {"lr": filter_learning_rate}, {"lr": learning_rate}
        super().__init__([{"params": p} | rate for p, rate in zip((self.weights, others), rates)], {})
        for group in [*self.param_groups, *self.inner_groups()]:
            group["initial_lr"] = group["lr"]

    def inner_groups(self) -> list[dict]:
        return [*self.muon.param_groups, *self.sgd.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        for inner, group in zip(self.inner_groups(), self.param_groups):
            inner["lr"] = group["lr"]
        for matrix, weight in zip(self.matrices, self.weights):
            matrix.grad = as_matrix(weight.grad.contiguous(memory_format=torch.channels_last))
            matrix.mul_(math.sqrt(len(matrix)) / matrix.norm())
        self.muon.step()
        self.sgd.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "sgd": self.sgd.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.sgd.load_state_dict(state["sgd"])


def as_matrix(weight: Tensor) -> Tensor:
    """[C_out, C_in, K, K], channels_last -> a view, [C_out, K * K * C_in]. RuntimeError where it lies otherwise."""
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)
