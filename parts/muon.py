"""Muon for the weights of convolutions. torch.optim.Muon computes in bfloat16 always: where a CPU has to emulate that,
it takes most of a step.
"""

import math

import torch
from torch import Tensor, nn

SGD_MOMENTUM = 0.85  # Nesterov, both
MUON_MOMENTUM = 0.6


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to this one, [m, n] of any dtype, by five Newton-Schulz iterations of fifth
    order (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/): singular values end near 1.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315  # torch.optim.Muon's
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix


class MuonAndSGD(torch.optim.Optimizer):
    """Muon for the weights of convolutions; SGD with Nesterov momentum for batch norm, biases and linear layers.

    Muon replaces the update of a matrix by the orthogonal matrix nearest to it, computed in `dtype`. A convolution's
    weight is such a matrix, [C_out, K * K * C_in]. Before every update its Frobenius norm is set to sqrt(C_out), as in
    https://github.com/KellerJordan/cifar10-airbench: with a batch norm behind it its length means nothing, and so the
    learning rate is relative to it.

    A param group's "initial_lr" is its learning rate at the start.
    """

    def __init__(self, model: nn.Module, learning_rate: float, filter_learning_rate: float, weight_decay: float, dtype):
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        taken = set(map(id, weights))
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        groups = [{"params": weights, "lr": filter_learning_rate}, {"params": others, "lr": learning_rate}]
        super().__init__(groups, {})
        self.sgd = torch.optim.SGD(others, learning_rate, SGD_MOMENTUM, weight_decay=weight_decay, nesterov=True)
        self.momenta, self.dtype = [torch.zeros_like(as_matrix(weight)) for weight in weights], dtype
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self) -> None:
        filters, others = self.param_groups
        for weight, momentum in zip(filters["params"], self.momenta):
            matrix = as_matrix(weight)
            matrix.mul_(math.sqrt(len(matrix)) / matrix.norm())
            gradient = as_matrix(weight.grad.contiguous(memory_format=torch.channels_last))
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, MUON_MOMENTUM).to(self.dtype))
            matrix.add_(update, alpha=-filters["lr"] * math.sqrt(max(1, len(matrix) / matrix.shape[1])))
        self.sgd.param_groups[0]["lr"] = others["lr"]
        self.sgd.step()

    def state_dict(self) -> dict:
        """The momenta, named as torch.optim.Muon names its state."""
        muon = {number: {"momentum_buffer": momentum} for number, momentum in enumerate(self.momenta)}
        return {"muon": {"state": muon}, "sgd": self.sgd.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for number, momentum in enumerate(self.momenta):
            momentum.copy_(state["muon"]["state"][number]["momentum_buffer"])
        self.sgd.load_state_dict(state["sgd"])


def as_matrix(weight: Tensor) -> Tensor:
    """[C_out, C_in, K, K], channels_last -> a view, [C_out, K * K * C_in]. RuntimeError where it lies otherwise."""
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)
