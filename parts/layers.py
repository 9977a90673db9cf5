"""Layers that a CPU computes faster than PyTorch's own: the same parameters, printed and saved as PyTorch's.

CUDA and MPS keep PyTorch's kernels.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvolutionRule(NamedTuple):
    """Which convolutions are computed otherwise than by PyTorch's kernels; 0 is none.

    A fixed rule of the CPU, not a timing at start: a run must repeat. `bench.py` prints what it rests on.
    """

    winograd: int = 0  # from so many input channels on: see `winograd`
    product: int = 0  # else, up to so many pixels of output per image, as matrix products
    weight_product: int = 0  # up to so many, at least as many, only the gradient of the weights

    def __str__(self) -> str:
        """As `environment` in the results records it."""
        if self.winograd:
            return f"Winograd from {self.winograd} input channels on"
        limits = {"output": self.product, "input gradient": self.product, "weight gradient": self.weight_product}
        words = [f"{result} up to {limit} pixels" for result, limit in limits.items()]
        return f"products: {', '.join(words)}" if any(self) else "PyTorch's own"


def cpu_capabilities() -> dict:
    """Name and instructions, as torch tells them: from 2.11 on, so a notebook's may not."""
    return getattr(torch.cpu, "get_capabilities", dict)()


@functools.cache
def convolution_rule(device_type: str, dtype: torch.dtype) -> ConvolutionRule:
    """Why these limits: docs/speed.md. In AMX oneDNN's kernel for the gradient of the weights works row by row, and
    rows of 8 pixels fill a quarter of a tile.
    """
    if device_type == "cpu" and dtype == torch.float32:
        return ConvolutionRule(winograd=128)
    cpu = cpu_capabilities()
    if device_type == "cpu" and dtype == torch.bfloat16 and cpu.get("amx_bf16"):
        return ConvolutionRule(product=16, weight_product=64)
    if device_type == "cpu" and dtype == torch.bfloat16 and cpu.get("avx512_bf16"):
        return ConvolutionRule(product=16, weight_product=16)
    return ConvolutionRule()


# Of F(4 x 4, 3 x 3): Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015), section 4.3.
TO_TILES = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
TO_KERNELS = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # times 24
TO_OUTPUTS = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def both_ways(matrix: list[list[int]], like: Tensor) -> Tensor:
    """[m, n], for one axis -> [m * m, n * n], for both axes of an image at once."""
    matrix = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(matrix, matrix)


def winograd(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d with padding 1 for kernels of 3 x 3: 16 outputs from 36 products in place of 144, and so backwards.

    images [N, C_in, H, W], weight [C_out, C_in, 3, 3], bias [C_out] -> [N, C_out, H, W], channels_last. In float32 the
    results differ from the exact ones by about 1e-5 of the largest.
    """
    n, c_in, height, width = images.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1 + -width % 4, 1, 1 + -height % 4))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # [6, 6, N, down, across, C_in]
    *_, down, across, _ = tiles.shape
    tiles = (both_ways(TO_TILES, images) @ tiles.reshape(36, -1)).view(36, n * down * across, c_in)
    kernels = both_ways(TO_KERNELS, weight) / 24**2 @ weight.permute(2, 3, 1, 0).reshape(9, -1)
    outputs = tiles @ kernels.view(36, *weight.shape[1::-1])  # [36, N * down * across, C_out]
    outputs = (both_ways(TO_OUTPUTS, images) @ outputs.view(36, -1)).view(4, 4, n, down, across, len(weight))
    outputs = outputs.permute(2, 3, 0, 4, 1, 5).reshape(n, 4 * down, 4 * across, len(weight))[:, :height, :width]
    return (outputs.contiguous() + bias).permute(0, 3, 1, 2)  # in memory [N, H, W, C_out]


def image_patches(images: Tensor) -> Tensor:
    """Every pixel's 3 x 3 surroundings, zeros outside the image: [N, C, H, W] -> [N * H * W, 9 * C]."""
    n, channels, height, width = images.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [N, H + 2, W + 2, C]
    patches = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [N, H, W, C, 3, 3]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(n * height * width, 9 * channels)


def as_images(pixels: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W], channels_last, with N, H and W of `like`."""
    n, _, height, width = like.shape
    return pixels.view(n, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


class ConvolutionAsProduct(torch.autograd.Function):
    """F.conv2d with padding 1 for kernels of 3 x 3, with the gradient of the weights as one matrix product, and with
    `everything` the output and the gradient of the input too.

    apply(images [N, C_in, H, W], weight [C_out, C_in, 3, 3], bias [C_out], everything) -> [N, C_out, H, W].
    """

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor, everything: bool) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.everything = everything
        if not everything:
            return F.conv2d(images, weight, bias, padding=1)
        kernels = weight.permute(0, 2, 3, 1).flatten(1)  # [C_out, 9 * C_in]
        return as_images(F.linear(image_patches(images), kernels, bias), images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        channels = weight.shape[1]
        by_input = by_weight = None
        pixels = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # [N * H * W, C_out]
        if ctx.needs_input_grad[0] and ctx.everything:
            kernels = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)  # [9 * C_out, C_in]
            by_input = as_images(image_patches(gradient) @ kernels, images)
        elif ctx.needs_input_grad[0]:  # by PyTorch's kernel
            by_input, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            kernels = pixels.T @ image_patches(images)  # [C_out, 9 * C_in]
            by_weight = kernels.view(-1, 3, 3, channels).permute(0, 3, 1, 2)
        by_bias = pixels.sum(0) if ctx.needs_input_grad[2] else None
        return by_input, by_weight, by_bias, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on CPUs, those that are as the convolutions of ConvNet and of VGG11_bn, 3 x 3 with a bias, are
    computed as `convolution_rule` says.
    """

    def forward(self, images: Tensor) -> Tensor:
        shape = (self.kernel_size, self.padding, self.stride, self.dilation, self.groups, self.padding_mode)
        if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") or self.bias is None:
            return super().forward(images)
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        rule = convolution_rule(device, dtype)
        if 0 < rule.winograd <= self.in_channels:
            return winograd(images, self.weight, self.bias)
        pixels = images.shape[2] * images.shape[3]
        if pixels > rule.weight_product:
            return super().forward(images)
        tensors = (tensor.to(dtype) for tensor in (images, self.weight, self.bias))
        return ConvolutionAsProduct.apply(*tensors, pixels <= rule.product)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU its mask is cut from 64-bit integers, four units from each, instead of one draw a unit.

    A step of ConvNet with dropout takes 1.3 to 1.5 times as long with nn.Dropout (AMD EPYC, Zen 3, float32). The
    dropped share is p rounded to 1 / 65,536, and the rest is scaled by what that share asks for.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or inputs.device.type != "cpu" or dropped in (0, 2**16):
            return super().forward(inputs)
        drawn = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # every 64-bit integer
        kept = drawn.view(torch.int16)[: inputs.numel()] >= dropped - 2**15
        strides = torch.empty_like(inputs, device="meta").stride()  # the mask lies in memory as the inputs do
        mask = kept.to(inputs.dtype).as_strided(inputs.shape, strides)
        return (inputs * mask).mul_(2**16 / (2**16 - dropped))
