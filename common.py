"""What the four question scripts share, top to bottom in the order a run needs it:

    settings -> data -> augmentation -> network -> training -> results -> figures -> claims -> gallery -> command line

A question script declares its runs as data and calls `run_question`; every mechanism is here. The protocol (splits,
optimiser, initialisation) is that of the report and of the course exercise it answers, Max Planck HLCV exercise 3.
"""

import argparse
import base64
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from machine import Conv2d, Dropout, product_rule

ROOT = Path(__file__).resolve().parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = {"cifar10": 1000, "cifar10-sample": 200}
REPORT_TEST_IMAGES = 1000  # the report's test accuracies are "on the 1000 test images": the first ones
SAMPLE_DIR, SAMPLE_EPOCHS = ROOT / "sample", 18
SAMPLE_SETTINGS = {"data": "cifar10-sample", "batch_size": 25, "learning_rate": 1e-3}  # eight times the steps of 200


class UserError(Exception):
    """Something the user can mend: `run_question` prints it as one line on standard error and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything one training run is made of. The values are the exercise's where the report gives none.

    All fields but `epochs` and `patience` shape the weights: together they name a trajectory (see `key`). How far a
    trajectory is followed, and which rule stops it, is only a way of reading it. Fields with `help` are options of
    the command line.

    A field's default never changes: a trajectory is named by what differs from the defaults.
    """

    network: str = "ConvNet"  # the name of its class
    batch_norm: bool = False
    dropout: float = 0.0
    dropout_after_pool: bool = False  # the report's code drops units before the pooling
    weights: str = "none"  # what the network starts from: "none" is a random initialisation
    backbone: str = "trained"  # or "frozen" (evaluation mode), or "frozen, training mode": batch norm as in training
    augment: tuple = ()  # batch-wise augmentations, applied in this order
    data: str = "cifar10"  # or "cifar10-sample", the excerpt in sample/
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    batch_size: int = 200
    learning_rate: float = 2e-3
    lr_decay: float = 0.95  # the learning rate is multiplied by this after every epoch
    weight_decay: float = 1e-3  # L2, as torch.optim.Adam adds it to the gradient
    precision: str = field(default="auto", metadata={"help": "fp32, bf16, or auto: bf16 where it is native and faster"})
    seed: int = 0
    epochs: int = field(
        default=20, metadata={"help": "instead of the report's number; such runs are named by it, and not compared"}
    )
    patience: int | None = None  # stop after this many epochs below the best validation accuracy

    def as_dict(self) -> dict:
        """The settings as JSON can hold them; an augmentation is its repr."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            k: [v if isinstance(v, float) else repr(v) for v in value] if isinstance(value, tuple) else value
            for k, value in values.items()
        }

    def trajectory(self) -> dict:
        """The settings that shape the weights, without those at their default: a new field renames no checkpoint."""
        return {
            f.name: self.as_dict()[f.name]
            for f in dataclasses.fields(self)
            if f.name not in ("epochs", "patience") and getattr(self, f.name) != f.default
        }

    def key(self) -> str:
        """Name of the trajectory's checkpoint, the same in every process and question."""
        digest = hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True).encode()).hexdigest()
        return f"{self.network}-seed{self.seed}-{digest[:10]}"


@dataclass(frozen=True)
class Run:
    """One row of a question: a name, its settings, and what the report printed for it (percent)."""

    name: str
    settings: Settings = Settings()
    reported: dict = field(default_factory=dict)

    def network(self) -> nn.Module:
        """The network with fresh weights, from PyTorch's global generator."""
        return ConvNet(self.settings.batch_norm, self.settings.dropout, self.settings.dropout_after_pool)

    def provenance(self) -> dict:
        """What else its result tells of where the numbers come from."""
        return {}

    def inputs(self, model: nn.Module, data: dict[str, "Split"]) -> dict[str, "Split"]:
        """What the training loop is fed: the images, or what a frozen part of the network makes of them."""
        return data


def stream_seed(seed: int, epoch: int, stream: str) -> int:
    """A 64-bit seed for one purpose in one epoch: all randomness is a function of (seed, epoch); none is ever saved."""
    streams = ("init", "order", "augment", "dropout", "validation")
    return int(np.random.SeedSequence([seed, epoch, streams.index(stream)]).generate_state(1, np.uint64)[0])


def generator(seed: int, epoch: int, stream: str) -> torch.Generator:
    """A CPU generator, whatever the device: the same draws everywhere."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, stream))


# -------------------------------------------------------------------------------------------------------------- data


class Split:
    """Images held whole on the device, uint8 [N, 3, 32, 32], with labels int64 [N]; batches are cut from them."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def batch(
        self, index: Tensor, settings: Settings, rng: torch.Generator | None = None, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Cut, augment and normalise one batch, whole.

        index: [B], numbers of the batch's images, on the CPU. rng: draws the augmentations, one parameter set per
        image; None leaves the images as they are. part: which of the B images to return; the draws are always made
        for all B, so that several processes sharing a batch draw what one process would.
        Returns float32 images [b, 3, 32, 32], channels_last, and labels [b].
        """
        mine = index[part].to(self.images.device)
        images = self.images[mine].float().div_(255)
        if rng is not None:
            images = augment(images, settings.augment, rng, len(index), part)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (settings.mean, settings.std))
        images = images.sub_(mean).div_(std)
        return images.contiguous(memory_format=torch.channels_last), self.labels[mine]


def find_data_dir(option: str | None = None) -> Path:
    """--data-dir, else the environment variable CIFAR10_DIR, else data/."""
    return Path(option or os.environ.get("CIFAR10_DIR") or ROOT / "data")


def load_cifar10(data_dir: Path) -> dict[str, Split]:
    """The official CIFAR-10, downloaded and verified by torchvision.

    train: the first 49,000 training images; validation: the last 1,000; test: 10,000.
    Raises UserError where the files are damaged, or missing and not to be had.
    """
    folder = data_dir / CIFAR10.base_folder
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])

    def problem() -> str | None:  # torchvision would not miss batches.meta
        missing = [name for name in files if not (folder / name).exists()]
        damaged = [n for n, md5 in files.items() if n not in missing and not check_integrity(str(folder / n), md5)]
        if damaged:
            return f"{folder / damaged[0]} is not the official file (its MD5 differs)"
        return f"{folder} lacks {', '.join(missing)}" if missing else None

    advice = f"put {CIFAR10.base_folder}/ there, point --data-dir or CIFAR10_DIR to its parent folder, or use --sample"
    try:
        if found := problem():
            if data_dir.is_dir() and not os.access(data_dir, os.W_OK):
                raise UserError(f"{found}, and {data_dir} is read-only: {advice}")
            with file_lock(data_dir / ".download.lock"):  # another process may be downloading just now
                found = problem()
                if found and any((folder / name).exists() for name in files):
                    raise UserError(f"{found}: delete the folder and run again to download CIFAR-10 anew")
                if found:
                    CIFAR10(data_dir, download=True)
        parts = [CIFAR10(data_dir, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not readable in {data_dir} and could not be downloaded ({error}): {advice}"
        ) from error
    images, labels = zip(
        *((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts)
    )
    held_out = VALIDATION_IMAGES["cifar10"]
    return {
        "train": Split(images[0][:-held_out], labels[0][:-held_out]),
        "validation": Split(images[0][-held_out:], labels[0][-held_out:]),
        "test": Split(images[1], labels[1]),
    }


def load_sample() -> dict[str, Split]:
    """The bundled, class-balanced excerpt, cut by sample/cut_sample.py: 1,500 training, 200 validation, 500 test."""
    splits = {}
    for part, entry in json.loads((SAMPLE_DIR / "index.json").read_text()).items():
        sheet = TF.pil_to_tensor(Image.open(SAMPLE_DIR / f"{part}.png"))  # [3, 32 rows, 32 columns]
        images = sheet.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        splits[part] = Split(images.contiguous(), torch.tensor(entry["labels"]))
    return splits


# ------------------------------------------------------------------------------------------------------ augmentation
#
# torchvision's random transforms draw one parameter set per call, hence one for a whole batch (torchvision issue 8484).
# These draw one per image, in two steps:
#   draw(n, rng) -> the parameters of n images, tensors [n, ...] on the CPU, from the generator `rng` alone
#   apply(images, *parameters) -> new images; deterministic, float32 [B, 3, H, W] in [0, 1] on any device
# Given its parameters, an image comes out as from the function of torchvision.transforms.v2.functional, to rounding.


def augment(images: Tensor, augmentations: tuple, rng: torch.Generator, n: int, part: slice = slice(None)) -> Tensor:
    """Draw for a batch of n images and apply to `images`, which are this part of it: float32 [b, 3, H, W] in [0, 1]."""
    for augmentation in augmentations:
        drawn = augmentation.draw(n, rng)
        images = augmentation.apply(images, *(values[part].to(images.device) for values in drawn))
    return images


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to broadcast over images."""
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class HorizontalFlip:
    """torchvision's RandomHorizontalFlip(p)."""

    p: float = 0.5

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(n, generator=rng) < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        return torch.where(per_image(applied), TF.horizontal_flip(images), images)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomCrop(size, padding, padding_mode="reflect") to the images' own size: the images are mirrored
    at their edges, then a window anywhere.
    """

    padding: int = 4

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        top, left = torch.randint(2 * self.padding + 1, (2, n), generator=rng)
        return top, left

    def apply(self, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, 3, top, left, H, W]
        return crops[torch.arange(len(images), device=images.device), :, top, left]


@dataclass(frozen=True)
class Grayscale:
    """torchvision's RandomGrayscale(p): three equal channels."""

    p: float = 0.1

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(n, generator=rng) < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        return torch.where(per_image(applied), TF.rgb_to_grayscale(images), images)


@dataclass(frozen=True)
class GaussianBlur:
    """torchvision's RandomApply([GaussianBlur(kernel_size, sigma)], p): sigma uniform between two bounds, in pixels.

    13 pixels hold a Gaussian of sigma 2 up to three sigma each way. Raises ValueError where kernel_size is even, as
    torchvision does.
    """

    kernel_size: int = 13
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.2

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return torch.rand(n, generator=rng) < self.p, torch.empty(n).uniform_(*self.sigma, generator=rng)

    def apply(self, images: Tensor, applied: Tensor, sigma: Tensor) -> Tensor:
        rows = applied.nonzero().squeeze(1)
        radius = self.kernel_size // 2
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.softmax(-((offsets / sigma[rows, None]) ** 2) / 2, dim=1)  # [b, kernel_size]
        blurred = F.pad(images[rows], [radius] * 4, mode="reflect")
        for dim in (2, 3):  # a Gaussian is separable: first along the columns, then along the rows
            size = images.shape[dim]
            blurred = sum(per_image(tap) * blurred.narrow(dim, i, size) for i, tap in enumerate(kernel.unbind(1)))
        return images.index_copy(0, rows, blurred)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = TF.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(TF.rgb_to_grayscale(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` of the full circle, through HSV, where a channel's value depends on the distance of the
    hue to the channel's own: it is the highest up to 60 degrees, the lowest from 120 on, and linear between.
    """
    r, g, b = images.split(1, dim=1)  # [B, 1, H, W] each
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1)  # grey has no hue; any will do
    hue = torch.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)  # in units of 60 degrees
    hue = torch.where(high == r, (g - b) / divisor, hue) + 6 * factor
    distance = hue - torch.tensor([0.0, 2.0, 4.0], device=images.device).view(1, 3, 1, 1)  # [B, 3, H, W]
    distance = (distance - 6 * (distance / 6).round_()).abs_()  # around the circle, in [0, 3]
    return high - chroma * (distance - 1).clamp_(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # numbered as in torchvision


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's RandomApply([ColorJitter(brightness, contrast, saturation, hue)], p), in random order per image."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def ranges(self) -> list[tuple[float, float]]:
        """Lowest and highest factor of each adjustment."""
        strengths = (self.brightness, self.contrast, self.saturation)
        return [*((max(0, 1 - s), 1 + s) for s in strengths), (-self.hue, self.hue)]

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """applied [n]; order [n, 4], the numbers of the adjustments from first to last; factors [n, 4], by number."""
        applied = torch.rand(n, generator=rng) < self.p
        order = torch.rand(n, 4, generator=rng).argsort(1)
        factors = [torch.empty(n).uniform_(low, high, generator=rng) for low, high in self.ranges()]
        return applied, order, torch.stack(factors, 1)

    def apply(self, images: Tensor, applied: Tensor, order: Tensor, factors: Tensor) -> Tensor:
        images = images.clone()
        for turn in order.unbind(1):
            for number, (adjust, (low, high)) in enumerate(zip(ADJUSTMENTS, self.ranges())):
                if low < high:  # as in torchvision, an adjustment of strength 0 is left out
                    rows = (applied & (turn == number)).nonzero().squeeze(1)
                    images[rows] = adjust(images[rows], per_image(factors[rows, number]))
        return images


# ----------------------------------------------------------------------------------------------------------- network


class ConvNet(nn.Module):
    """The report's network, its Figure 10.

    Five blocks of Conv2d 3x3, [Dropout], [BatchNorm2d], MaxPool2d, ReLU, then Linear: [B, 3, 32, 32] -> logits [B, 10].
    7,678,474 parameters, 7,682,826 with batch norm. Dropout stands before the pooling, where the report's code has it;
    `dropout_after_pool` puts it at its usual place, after the ReLU.
    """

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0, dropout_after_pool: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 128), (128, 512), (512, 512), (512, 512), (512, 512)):
            layers.append(Conv2d(c_in, c_out, kernel_size=3, padding=1))
            if dropout and not dropout_after_pool:
                layers.append(Dropout(dropout))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers += [nn.MaxPool2d(2), nn.ReLU()]
            if dropout and dropout_after_pool:
                layers.append(Dropout(dropout))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 10)
        init_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))  # [B, 512, 1, 1] -> [B, 512] -> [B, 10]


def init_linear(model: nn.Module) -> None:
    """The exercise's initialisation: every nn.Linear has weights ~ N(0, 1e-3) and bias 0; the rest stays PyTorch's."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1e-3)
            nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model: nn.Module) -> list[dict]:
    """One row per layer with parameters: PyTorch's count beside the report's formula.

    Conv2d: (K * K * C_in + 1) * C_out, formula (1); Linear: N_out * (N_in + 1), formula (2). The report has none for
    batch norm: 2 * C, a scale and a shift per channel.
    """
    formulas = {
        nn.Conv2d: lambda m: (m.kernel_size[0] * m.kernel_size[1] * m.in_channels + 1) * m.out_channels,
        nn.Linear: lambda m: m.out_features * (m.in_features + 1),
        nn.modules.batchnorm._BatchNorm: lambda m: 2 * m.num_features,
    }
    return [
        {
            "layer": name,
            "type": type(module).__name__,
            "parameters": sum(p.numel() for p in module.parameters()),
            "formula": formula(module),
        }
        for name, module in model.named_modules()
        for kind, formula in formulas.items()
        if isinstance(module, kind)
    ]


def describe(model: nn.Module) -> str:
    """The printed network (the report's Figure 10) and its parameters, layer by layer."""
    lines = [str(model), "", f"{'layer':<16}{'type':<14}{'PyTorch':>12}{'formula':>12}"]
    lines += ["{layer:<16}{type:<14}{parameters:>12,}{formula:>12,}".format(**row) for row in parameter_table(model)]
    return "\n".join([*lines, f"{'trainable parameters':<30}{count_parameters(model):>12,}", ""])


def first_filters(model: nn.Module) -> Tensor:
    """A copy of the first convolution's weights, [C_out, 3, K, K] float32 on the CPU."""
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    return weight.detach().float().cpu().clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------- training


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed blocks, else every step returns its activations to the kernel and back.

    Call before the first large allocation. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name == "cuda" and launched():  # one process per GPU
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(
                f"torchrun: {os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (
        device is None
        or not available.get(device.type)
        or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
    ):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {name} is not there; on this machine: {there}")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def native_bf16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 in hardware?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where it is native and pays, else fp32. Raises UserError for bf16 where it would be emulated.

    Intel's CPUs multiply bfloat16 fast in AMX alone: with AVX-512 only, question 1's step took 1.5 times float32's.
    """
    native = native_bf16(device)
    if name == "bf16" and not native:
        raise UserError(
            f"--precision bf16: {device.type} here does not compute bfloat16 natively; use --precision fp32 or auto"
        )
    cpu = torch.cpu.get_capabilities()
    slow = device.type == "cpu" and "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_bf16")
    return ("bf16" if native and not slow else "fp32") if name == "auto" else name


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in bfloat16, weights and optimiser in float32; with fp32, nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def stopping_epoch(accuracies: Sequence[float], epochs: int, patience: int | None = None) -> int | None:
    """The epoch (from 1) after which training ends; None while it goes on.

    It ends after `epochs`, or when `patience` epochs since the best one had a validation accuracy below it. As in the
    report's code, an epoch that equals the best neither counts nor starts the count again.
    """
    best, below = -math.inf, 0
    for epoch, accuracy in enumerate(accuracies[:epochs], 1):
        if accuracy > best:
            best, below = accuracy, 0
        elif accuracy < best:
            below += 1
            if below == patience:
                return epoch
    return epochs if len(accuracies) >= epochs else None


def best_epoch(accuracies: Sequence[float]) -> int:
    """The epoch (from 1) of the highest validation accuracy; the first of equals."""
    return 1 + max(range(len(accuracies)), key=accuracies.__getitem__)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, settings: Settings, epoch: int, progress: tqdm
) -> tuple[float, Tensor]:
    """One pass over `split`; returns the mean of the training loss as it was met on the way, and that of every step's
    batch, float32 [steps] on the CPU.

    Raises UserError when the loss is not finite.
    """
    device = split.labels.device
    model.train()
    order = torch.randperm(len(split), generator=generator(settings.seed, epoch, "order"))
    rng = generator(settings.seed, epoch, "augment")
    torch.manual_seed(stream_seed(settings.seed, epoch, "dropout") + rank())
    total, seen, step_losses = torch.zeros((), device=device), 0, []
    for step, index in enumerate(order.split(settings.batch_size), 1):
        images, labels = split.batch(index, settings, rng, my_part(len(index)))
        with autocast(settings, device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(index)
        optimizer.zero_grad(set_to_none=True)
        (loss * world_size()).backward()  # DistributedDataParallel averages the gradients over the processes
        optimizer.step()
        step_losses.append(loss.detach())
        total += loss.detach() * len(index)
        seen += len(index)
        progress.update(len(index))
        if step % 20 == 0 or seen == len(split):  # reading the loss makes a GPU wait: not at every step
            mean = sum_over_ranks(total.clone()).item() / seen
            require_finite(mean, "training", epoch)
            progress.set_postfix_str(f"train {mean:.3f}", refresh=False)
    return mean, sum_over_ranks(torch.stack(step_losses)).cpu()


def require_finite(loss: float, name: str, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the {name} loss became {loss} in epoch {epoch}; the checkpoint of the epoch before, if any, is kept: "
            "lower the learning rate or try --precision fp32"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, settings: Settings, rng: torch.Generator | None = None
) -> tuple[float, Tensor]:
    """Mean cross entropy over `split`, and the predicted classes, uint8 [N] on the CPU. Leaves the model as it was.

    rng: draws augmentations, as in `Split.batch`; None leaves the images as they are.
    """
    was_training = model.training
    model.eval()
    device = split.labels.device
    total, predictions = torch.zeros((), device=device), torch.zeros(len(split), dtype=torch.uint8, device=device)
    for index in torch.arange(len(split)).split(settings.batch_size):
        part = my_part(len(index))
        images, labels = split.batch(index, settings, rng, part)
        with autocast(settings, device):
            logits = model(images)
        total += F.cross_entropy(logits.float(), labels, reduction="sum")
        predictions[index[part].to(device)] = logits.argmax(1).to(torch.uint8)
    model.train(was_training)
    return sum_over_ranks(total).item() / len(split), sum_over_ranks(predictions).cpu()


def evaluate_augmented(model: nn.Module, validation: Split, settings: Settings, epoch: int) -> dict:
    """Loss and accuracy on the augmented validation images, as the report measures them. No weights are chosen by them.

    Drawn anew in every epoch, from a random stream of their own.
    """
    rng = generator(settings.seed, epoch, "validation")
    loss, predictions = evaluate(model, validation, settings, rng)
    return {
        "augmented_validation_loss": loss,
        "augmented_validation_accuracy": accuracy(predictions, validation.labels),
    }


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels.cpu()).sum().item() / len(labels)


def prepare(run: Run, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The run's network as its seed initialises it, and its optimiser.

    Raises ValueError where the settings call the network something else: its checkpoint would bear another's name.
    """
    torch.manual_seed(stream_seed(run.settings.seed, 0, "init"))
    model = run.network().to(device, memory_format=torch.channels_last)
    if type(model).__name__ != run.settings.network:
        raise ValueError(f"{run.name}: network='{run.settings.network}' in its settings, but it is {type(model).__name__}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")
    return model, torch.optim.Adam(
        parameters, run.settings.learning_rate, weight_decay=run.settings.weight_decay, fused=fused
    )


def train(run: Run, data: dict[str, Split], device: torch.device, path: Path) -> dict:
    """Follow the run's trajectory from its checkpoint at `path`, if there is one, until the run's rule ends it.

    After every epoch the checkpoint is replaced: an interrupted run loses at most the epoch it was in, and no epoch is
    ever trained twice. What any rule could ask for later is recorded when the epoch passes, the test predictions and
    the first layer's filters, so that every rule can be read from the trajectory. Returns the checkpoint:
      settings, network         what shaped the weights: see `Settings.trajectory`; the printed network
    environments              where the epochs were trained
      history                   one dict per epoch
      step_losses               per epoch the training loss of every step, float32 [steps]
      predictions, filters      per epoch uint8 [N] on the test images; float32 [C, 3, K, K], before training first
      model, best, optimizer    state dicts: the last weights, those of the best validation accuracy, Adam's
    """
    settings = run.settings
    if settings.patience is not None and not len(data["validation"]):
        raise UserError(f"{run.name}: patience needs validation images, and there are none")
    model, optimizer = prepare(run, device)
    state = on_first(lambda: load_checkpoint(path, settings, model) if path.exists() else None)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"settings": settings.trajectory(), "network": str(model), "environments": [], "history": []}
        state |= {"step_losses": [], "predictions": [], "filters": [first_filters(model)]}
    history, images = state["history"], len(data["train"])

    def ended() -> bool:
        accuracies = [entry["validation_accuracy"] for entry in history]
        return stopping_epoch(accuracies, settings.epochs, settings.patience) is not None

    if ended():
        return state
    start = time.perf_counter()
    data = run.inputs(model, data)
    preparing = time.perf_counter() - start
    here = environment(device, settings)
    network = distribute(model, device)
    progress = tqdm(
        total=settings.epochs * images,
        initial=len(history) * images,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0,  # the average speed, evaluation included
        disable=True if rank() else None,
    )
    with progress:
        while not ended():
            start, epoch = time.perf_counter(), len(history) + 1
            so_far = (
                "val {validation_loss:.3f} acc {validation_accuracy:.1f} %, ".format(**history[-1]) if history else ""
            )
            progress.set_description_str(f"{run.name} seed {settings.seed}: {so_far}epoch {epoch}/{settings.epochs}")
            lr = settings.learning_rate * settings.lr_decay ** (epoch - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loss, step_losses = train_epoch(network, optimizer, data["train"], settings, epoch, progress)
            speed = images / (time.perf_counter() - start)
            for buffer in model.buffers():  # the first process's running statistics, for all
                if world_size() > 1:
                    torch.distributed.broadcast(buffer, 0)
            validation_loss, predictions = evaluate(model, data["validation"], settings)
            require_finite(validation_loss, "validation", epoch)
            entry = {
                "epoch": epoch,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "validation_accuracy": accuracy(predictions, data["validation"].labels),
                "lr": lr,
            }
            if settings.augment:
                entry |= evaluate_augmented(model, data["validation"], settings, epoch)
            history.append(entry)
            state["step_losses"].append(step_losses)
            state["predictions"].append(evaluate(model, data["test"], settings)[1])
            state["filters"].append(first_filters(model))
            if best_epoch([h["validation_accuracy"] for h in history]) == epoch:
                state["best"] = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if not state["environments"] or here.items() - state["environments"][-1].items():
                state["environments"].append({**here, "from_epoch": epoch})
            entry["seconds"] = round(time.perf_counter() - start + preparing, 2)
            preparing = 0.0
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            on_first(lambda: save_checkpoint(path, state))
            report_epoch(progress, run.name, settings, history, speed)
    return state


def report_epoch(progress: tqdm, name: str, settings: Settings, history: list[dict], speed: float) -> None:
    """The bar on a terminal; on anything else one line per epoch."""
    last = history[-1]
    losses = f"train {last['train_loss']:.3f} val {last['validation_loss']:.3f}"
    numbers = f"{losses} acc {last['validation_accuracy']:.1f} %"
    progress.set_postfix_str(numbers)
    if progress.disable:
        left = (settings.epochs - last["epoch"]) * statistics.median(h["seconds"] for h in history)
        place = f"{name} seed {settings.seed} epoch {last['epoch']}/{settings.epochs}"
        tell(f"{place}: {numbers}, {speed:.0f} img/s, at most {duration(left)} left")


def duration(seconds: float) -> str:
    """1:02:03"""
    return tqdm.format_interval(round(seconds))


# Several processes, under torchrun. Alone, rank is 0 and the world 1, and the functions below do nothing.


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def my_part(n: int) -> slice:
    """This process's part of a batch of n."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def on_all(function: Callable):
    """What `function` returns in this process. A UserError in any process is raised in all."""
    value, error = None, None
    try:
        value = function()
    except UserError as raised:
        error = str(raised)
    if world_size() > 1:
        errors = [None] * world_size()
        torch.distributed.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise UserError(error)
    return value


def on_first(function: Callable):
    """What `function` returns in the first process, for all; the others do not call it."""
    values = [on_all(function if rank() == 0 else lambda: None)]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model to train: itself, or wrapped in DistributedDataParallel where there are several processes."""
    if world_size() == 1:
        return model
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if batch_norm and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif batch_norm:
        tell(
            "batch norm: every process normalises with its own part of the batch; the numbers differ from one process's"
        )
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def launched() -> bool:
    """By torchrun?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes when launched by torchrun: nccl on CUDA, else gloo; the cores are shared evenly."""
    if not launched():
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The first process may wait for a lock, or download, while the others wait for it.
    backend, patience = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(days=2)
    torch.distributed.init_process_group(backend, timeout=patience)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def environment(device: torch.device, settings: Settings) -> dict:
    """What the numbers may depend on beyond the settings."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    devices = {"cpu": f"{cpu}, {os.cpu_count()} cores"}
    if device.type == "cuda":
        devices["cuda"] = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string, else weights_only refuses the checkpoint
        "torchvision": torchvision.__version__,
        "device": devices.get(device.type, device.type),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
        "convolutions": str(
            product_rule(device.type, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        ),
    }


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target and rename: `path` holds the old content or the new, whole. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")  # folders may be shared
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """What processes that were killed while writing `path` left beside it. Call while no other process can write it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path, settings: Settings, model: nn.Module) -> dict:
    """The checkpoint at `path`. Raises UserError where it is damaged, of other settings or of another network than
    `model`; it is left in place.
    """
    advice = "it is left as it is; --fresh starts over and keeps it beside the new one, as .old1"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{bad} has a wrong checksum")
        state = torch.load(path, weights_only=True, map_location="cpu")
        asked = settings.trajectory()
        different = [k for k in asked | state["settings"] if state["settings"].get(k) != asked.get(k)]
        for part in ("network", "environments", "history", "step_losses", "predictions", "filters", "model", "best"):
            state[part]
        state["optimizer"]
        same_sizes = {k: v.shape for k, v in state["model"].items()} == {k: v.shape for k, v in model.state_dict().items()}
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch
        raise UserError(f"the checkpoint {path} is damaged ({type(error).__name__}); {advice}") from error
    if different:
        raise UserError(f"the checkpoint {path} was trained with other settings ({', '.join(different)}); {advice}")
    if state["network"] != str(model) or not same_sizes:
        raise UserError(f"the checkpoint {path} is of another network than the code builds now; {advice}")
    return state


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields whether it was to be had. The lock of a killed process is free again."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror}; is the folder yours to write?") from error
        yield held


# ----------------------------------------------------------------------------------------------------------- results


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion, in percent (Wilson 1927; formula as in Brown, Cai and DasGupta 2001)."""
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def score(predictions: Tensor, labels: Tensor, epoch: int) -> dict:
    """The test numbers of one set of weights. On the sample `first_1000` and `all_10000` are fewer: see `images`."""

    def proportion(correct: Tensor) -> dict:
        interval = wilson_interval(int(correct.sum()), len(correct))
        return {
            "images": len(correct),
            "accuracy": round(100 * correct.float().mean().item(), 4),
            "ci95": [round(v, 2) for v in interval],
        }

    labels, predictions = labels.cpu(), predictions.long()
    correct = predictions == labels
    confusion = torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)  # [true, predicted]
    return {
        "epoch": epoch,
        "first_1000": proportion(correct[:REPORT_TEST_IMAGES]),
        "all_10000": proportion(correct),
        "per_class": {c: round(100 * (confusion[i, i] / confusion[i].sum()).item(), 2) for i, c in enumerate(CLASSES)},
        "confusion": confusion.tolist(),
        "correct": base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode(),
    }


def mean_test_accuracy(results: list[dict]) -> float:
    """Percent of all test images, by the best weights; mean over seeds."""
    return statistics.mean(r["test"]["best"]["all_10000"]["accuracy"] for r in results)


def best_validation(result: dict) -> float:
    """Validation accuracy of the best epoch, percent."""
    return result["history"][result["best_epoch"] - 1]["validation_accuracy"]


def correct_images(scored: dict) -> np.ndarray:
    """Per test image, was it classified correctly: bool [N], unpacked from a `score`."""
    packed = np.frombuffer(base64.b64decode(scored["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=scored["all_10000"]["images"]).astype(bool)


def read_run(question: str, run: Run, state: dict, labels: Tensor) -> dict:
    """Read a run from its trajectory: follow its rule through the recorded epochs. Trains nothing."""
    settings = run.settings
    accuracies = [h["validation_accuracy"] for h in state["history"]]
    last = stopping_epoch(accuracies, settings.epochs, settings.patience)
    best = best_epoch(accuracies[:last])
    model = run.network()
    environments = [e for e in state["environments"] if e["from_epoch"] <= last]
    return {
        "run": run.name,
        "question": question,
        "seed": settings.seed,
        "settings": settings.as_dict(),
        **run.provenance(),
        "environment": environments[-1],
        "earlier_environments": environments[:-1],
        "parameters": {"trainable": count_parameters(model), "layers": parameter_table(model)},
        "history": state["history"][:last],
        "best_epoch": best,
        "test": {
            name: score(state["predictions"][epoch - 1], labels, epoch)
            for name, epoch in (("best", best), ("last", last))
        },
        "reported": run.reported,
    }


def write_result(folder: Path, result: dict, state: dict) -> bool:
    """seed<N>.json, and seed<N>.npz: the first layer's filters before training, at the best and at the last epoch, and
    the training loss of every step, [epochs, steps].

    Returns whether the result is new.
    """
    text = json.dumps(result, indent=2)
    innermost = r"[\[{][^\[\]{}]*[\]}]"  # on one line each
    text = re.sub(innermost, lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    epochs = {"before": 0, "best": result["best_epoch"], "last": len(result["history"])}
    buffer = io.BytesIO()
    arrays = {name: state["filters"][epoch].numpy() for name, epoch in epochs.items()}
    arrays["step_losses"] = torch.stack(state["step_losses"][: epochs["last"]]).numpy()
    np.savez_compressed(buffer, **arrays)
    write_atomic(folder / f"seed{result['seed']}.npz", buffer.getbuffer())
    path, content = folder / f"seed{result['seed']}.json", (text + "\n").encode()
    new = not path.exists() or path.read_bytes() != content
    write_atomic(path, content)
    return new


def load_result(path: Path) -> dict:
    """A result as written by `write_result`, checked to hold what figures and tables need. Raises UserError."""

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(problem)

    def numbers(*values) -> None:
        for value in values:
            require(type(value) in (int, float) and math.isfinite(value), f"{value!r} is not a number")

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        numbers(result["seed"], result["best_epoch"], result["parameters"]["trainable"])
        require(path.stem == f"seed{result['seed']}", f"it is of seed {result['seed']}")
        for entry in result["history"]:
            names = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "lr", "seconds")
            numbers(*(entry[name] for name in names))
        best = best_epoch([entry["validation_accuracy"] for entry in result["history"]])
        require(result["best_epoch"] == best, f"its best epoch is {best}")
        for name in ("best", "last"):
            scored = result["test"][name]
            for part in (scored["first_1000"], scored["all_10000"]):
                numbers(part["accuracy"], *part["ci95"])
            correct = correct_images(scored)
            percent, confusion = 100 * correct.mean(), np.array(scored["confusion"])
            same = math.isclose(percent, scored["all_10000"]["accuracy"], abs_tol=1e-3)
            same = same and confusion.shape == (10, 10) and confusion.trace() == correct.sum()
            require(same and confusion.sum() == len(correct), f"its {name} numbers are not those of its images")
        require(all(type(v) in (float, str) for v in result["reported"].values()), "its reported numbers are none")
        for row in result["parameters"]["layers"]:
            numbers(row["parameters"]), row["layer"].lower()
        result["run"], result["question"]
        [result["settings"][name] for name in ("data", "patience", "dropout", "precision", "weights")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or delete it and run again"
        ) from error
    return result


def load_filters(folder: Path, result: dict) -> dict[str, np.ndarray]:
    """The run's saved first-layer filters: before, best, last. Raises UserError."""
    path = folder / f"seed{result['seed']}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in ("before", "best", "last")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is missing or damaged ({error}): restore it, or run again") from error


# ----------------------------------------------------------------------------------------------------------- figures


def save_figure(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomic(path, buffer.getbuffer())


def title(result: dict, text: str, run: bool = False) -> str:
    """Heading of a figure of a question, or of one run. Figures of the sample say so."""
    sample = "SAMPLE (not CIFAR-10's full size): " if result["settings"]["data"] != "cifar10" else ""
    name = f"{result['question']} {result['run']}" if run else result["question"]
    return f"{sample}{name}: {text}"


def plot_curve(axes, results: list[dict], name: str, label: str, **style) -> None:
    """One history entry over epochs: the mean over seeds; of several, a band of one standard deviation too.

    Seeds that early stopping ended after different epochs have a line each.
    """
    if len({len(r["history"]) for r in results}) > 1:
        for result in results:
            plot_curve(axes, [result], name, label if result is results[0] else None, **style)
        return
    values = np.array([[h[name] for h in r["history"]] for r in results])  # [seeds, epochs]
    x, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
    (line,) = axes.plot(x, mean, label=label, **style)
    if len(results) > 1:
        deviation = values.std(0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)


def style_axes(axes, ylabel: str, xlabel: str = "epoch") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def new_axes(heading: str, ylabel: str):
    """A figure with one set of axes over epochs; returns both."""
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot(title=heading)
    style_axes(axes, ylabel)
    return figure, axes


def new_panels(heading: str, ylabels: tuple[str, str], xlabel: str = "epoch"):
    """A figure with two panels; returns it and both axes."""
    figure = Figure(figsize=(14, 4.8))
    panels = figure.subplots(1, 2)
    for axes, ylabel in zip(panels, ylabels):
        style_axes(axes, ylabel, xlabel)
    figure.suptitle(heading)
    return figure, panels


def plot_losses(results: list[dict]) -> Figure:
    """Training and validation loss over epochs, all seeds of one run."""
    figure, axes = new_axes(title(results[0], "loss", run=True), "cross entropy")
    plot_curve(axes, results, "train_loss", "training", color="tab:blue")
    plot_curve(axes, results, "validation_loss", "validation", color="tab:orange")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_accuracy(results: list[dict]) -> Figure:
    """Validation accuracy over epochs, every seed's best epoch marked, and the report's number where it prints one."""
    figure, axes = new_axes(title(results[0], "validation accuracy", run=True), "accuracy (%)")
    plot_curve(axes, results, "validation_accuracy", "validation", color="tab:orange")
    for result in results:
        best, value = result["best_epoch"], best_validation(result)
        axes.plot(best, value, "o", color="tab:red", label=f"seed {result['seed']}: best {value:.1f} %, epoch {best}")
    if isinstance(reported := results[0]["reported"].get("validation"), float):
        axes.axhline(reported, color="gray", linestyle=":", label=f"report: {reported:.1f} %")
    axes.legend(loc="lower right")
    return figure


def plot_confusion(results: list[dict]) -> Figure:
    """Confusion matrix of the best weights on all test images, summed over seeds; rows in percent of the true class."""
    counts = sum(np.array(r["test"]["best"]["confusion"]) for r in results)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(7, 6))
    axes = figure.add_subplot(
        title=title(results[0], "test confusion (% of the true class)", run=True), xlabel="predicted", ylabel="true"
    )
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    for (row, column), value in np.ndenumerate(percent):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    return figure


FILTER_COLUMNS = 16
FILTER_PIXEL, FILTER_GAP, FILTER_LABEL = 8, 5, 13  # pixels of the grid image: a weight's edge, a gap, a number's line


def filter_tile(number: int, size: int = 3) -> tuple[int, int]:
    """Top left pixel (y, x) of filter `number` (from 1, row by row, as the report numbers them) in `filter_grid`."""
    row, column = divmod(number - 1, FILTER_COLUMNS)
    edge = size * FILTER_PIXEL + FILTER_GAP
    return row * (edge + FILTER_LABEL) + FILTER_LABEL, column * edge


def filter_grid(weight: np.ndarray, scale: float) -> np.ndarray:
    """Filters [C_out, 3, K, K] as one RGB image in [0, 1] on white: grey is 0, a full colour +-`scale`."""
    size = weight.shape[-1]
    y, x = filter_tile(FILTER_COLUMNS * math.ceil(len(weight) / FILTER_COLUMNS), size)
    grid = np.ones((y + size * FILTER_PIXEL, x + size * FILTER_PIXEL, 3))
    for number, kernel in enumerate(np.clip(0.5 + weight / (2 * scale), 0, 1), 1):
        y, x = filter_tile(number, size)
        tile = kernel.transpose(1, 2, 0).repeat(FILTER_PIXEL, 0).repeat(FILTER_PIXEL, 1)
        grid[y : y + len(tile), x : x + len(tile)] = tile
    return grid


def visualize_filters(weights: dict[str, np.ndarray], heading: str, scale: float) -> Figure:
    """First-layer filters [C_out, 3, K, K] as numbered grids of 16 columns, one panel per entry of `weights`.

    All panels share one scale: grey is 0, a full colour a weight of +-`scale`.
    """
    rows = math.ceil(max(map(len, weights.values())) / FILTER_COLUMNS)
    figure = Figure(figsize=(7.5 * len(weights), 0.8 + 0.65 * rows))
    for axes, (name, weight) in zip(figure.subplots(1, len(weights), squeeze=False)[0], weights.items()):
        axes.imshow(filter_grid(weight, scale), interpolation="nearest")
        for number in range(1, len(weight) + 1):
            y, x = filter_tile(number, weight.shape[-1])
            axes.text(x, y - 2, str(number), fontsize=6.5, va="bottom", color="0.25")
        axes.set_title(f"{name} (grey = 0, full colour = ±{scale:.2f})", fontsize=10)
        axes.axis("off")
    figure.suptitle(heading)
    figure.tight_layout(w_pad=4)
    return figure


def preview(augmentations: tuple, images: Tensor, heading: str) -> Figure:
    """What an augmentation does: every row one image, uint8 [n, 3, 32, 32], the original and eight draws."""
    figure, rng = Figure(figsize=(11, 1.3 * len(images)), layout="constrained"), generator(0, 1, "augment")
    original = images.float() / 255
    for column, axes in enumerate(figure.subplots(len(images), 9).T):
        drawn = augment(original, augmentations, rng, len(images)) if column else original
        for ax, image in zip(axes, drawn.clamp(0, 1)):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.axis("off")
        axes[0].set_title(f"draw {column}" if column else "original", fontsize=9)
    figure.suptitle(textwrap.fill(heading, 110), fontsize=10)
    return figure


RUN_FIGURES = ("losses", "accuracy", "filters", "confusion")  # of every run, in the gallery


def plot_run(results: list[dict], folder: Path) -> None:
    """Every figure of one run, from its results (all seeds) and saved filters alone."""
    save_figure(plot_losses(results), folder / "losses.png")
    save_figure(plot_accuracy(results), folder / "accuracy.png")
    save_figure(plot_confusion(results), folder / "confusion.png")
    filters = load_filters(folder, results[0])
    scale = float(np.quantile(np.abs([filters["before"], filters["best"]]), 0.998))  # one for all
    before = {"before training": filters["before"]}
    after = {f"after training, epoch {results[0]['best_epoch']}": filters["best"]}
    heading = title(results[0], "first-layer filters", run=True)
    for name, panels in (("filters", before | after), ("filters_before", before), ("filters_after", after)):
        save_figure(visualize_filters(panels, heading, scale), folder / f"{name}.png")


# ------------------------------------------------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Claim:
    """One of the report's ten conclusions, and what decides it: comparisons of two runs, its own criterion, or both."""

    number: int
    text: str  # the report's sentence
    comparisons: tuple[tuple[str, str], ...] = ()  # (better, worse): run names
    criterion: Callable[[dict, Path], dict | None] | None = None  # of all results and their folder; None: not run


def paired_difference(
    better: list[dict], worse: list[dict], weights: tuple[str, str] = ("best", "best"), resamples: int = 2000
) -> dict:
    """Difference in test accuracy (percentage points) of two runs on the same images, with a 95 % bootstrap interval.

    `weights` says which of each run's weights are compared, "best" or "last".

    Every resample draws test images with replacement and, where there are several seeds, seeds too; the interval is
    that of the percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The images are
    taken as a sample of all images one could ask about. With one seed the interval does not hold the noise of training:
    another seed could move the difference outside it. With few seeds it is only a rough measure of that noise.
    """
    seeds = sorted({r["seed"] for r in better} & {r["seed"] for r in worse})
    if not seeds:
        return {"verdict": "not run"}
    by_seed = [
        {r["seed"]: correct_images(r["test"][which]).astype(np.int8) for r in runs}
        for runs, which in zip((better, worse), weights)
    ]
    difference = np.stack([by_seed[0][s] - by_seed[1][s] for s in seeds])  # [seeds, images], -1, 0 or 1
    rng = np.random.default_rng(0)
    count, images = difference.shape
    means = [
        difference[rng.integers(count, size=count)].mean(0)[rng.integers(images, size=images)].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "within noise"
    interval = [round(100 * float(v), 2) for v in (low, high)]
    precisions = sorted({r["settings"]["precision"] for r in [*better, *worse]})
    return {
        "difference": round(100 * float(difference.mean()), 2),
        "ci95": interval,
        "seeds": count,
        "precisions": precisions,
        "verdict": verdict,
    }


def points(found: dict) -> str:
    """A `paired_difference` in words."""
    low, high = found["ci95"]
    seeds = f", {found['seeds']} seeds" if found["seeds"] > 1 else ""
    precisions = f", trained in {' and '.join(found['precisions'])}" if len(found["precisions"]) > 1 else ""
    return f"{found['difference']:+.2f} points, 95 % [{low:+.2f}, {high:+.2f}]{seeds}{precisions}"


def with_seed_noise(noise: float, differences: Sequence[float]) -> float:
    """Half the width (95 %) of a difference of two runs, from the difference for every seed and the noise of the images.

    All seeds share the images: more seeds make the noise between them smaller, not that of the images.
    """
    if len(differences) == 1:
        return noise
    return math.hypot(noise, 1.96 * statistics.stdev(differences) / math.sqrt(len(differences)))


def difference_cell(better: list[dict], worse: list[dict], weights: tuple[str, str] = ("best", "best")) -> str:
    """A `paired_difference` in a table: "+1.86 [+1.07, +2.67]", or "-" where the runs share no seed."""
    found = paired_difference(better, worse, weights)
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["difference"], *found["ci95"]) if "difference" in found else "-"


def judge(claim: Claim, results: dict[str, list[dict]], folder: Path) -> dict:
    """The verdict on a claim: holds, does not hold, within noise, or not run, and the evidence for it.

    A claim of several parts holds where all do, and does not where one is reversed beyond noise.
    """
    parts = []
    for better, worse in claim.comparisons:
        found = paired_difference(results.get(better, []), results.get(worse, []))
        measured = points(found) if "difference" in found else "not run"
        parts.append({"better": better, "worse": worse, **found, "evidence": f"{better} − {worse}: {measured}"})
    if claim.criterion:
        parts.append(claim.criterion(results, folder) or {"verdict": "not run", "evidence": ""})
    verdicts = [part["verdict"] for part in parts]
    verdict = next((v for v in ("does not hold", "not run", "within noise") if v in verdicts), "holds")
    evidence = "; ".join(part["evidence"] for part in parts if part["evidence"])
    if any(part.get("seeds") == 1 for part in parts):
        evidence += ". One seed: the noise of training is not included"
    return {"claim": claim.number, "report": claim.text, "verdict": verdict, "evidence": evidence, "parts": parts}


def overfitting_claim(run: str) -> Claim:
    """Claim 1, of this run."""
    return Claim(
        1,
        "Without regularisation the network overfits: validation loss bottoms out near epoch 11 and then rises "
        "while training loss falls.",
        criterion=lambda results, folder: overfits(results.get(run, [])),
    )


def overfits(results: list[dict]) -> dict | None:
    """Criterion of "overfits", for every seed: at the end the validation loss is more than 5 % above its lowest value,
    while the training loss has fallen since.
    """
    if not results:
        return None
    holds, evidence = [], []
    for result in results:
        history = result["history"]
        low, last = min(history, key=lambda h: h["validation_loss"]), history[-1]
        holds.append(last["validation_loss"] > 1.05 * low["validation_loss"] and last["train_loss"] < low["train_loss"])
        evidence.append(
            f"seed {result['seed']}: validation loss lowest in epoch {low['epoch']} ({low['validation_loss']:.3f}), "
            f"{last['validation_loss']:.3f} in epoch {last['epoch']}; "
            f"training loss {low['train_loss']:.3f} to {last['train_loss']:.3f}"
        )
    verdict = "holds" if all(holds) else "does not hold"
    return {"verdict": verdict, "evidence": "; ".join(evidence), "seeds": len(results)}


# ----------------------------------------------------------------------------------------------------------- gallery


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """ "80.7", or with several seeds "80.7 ± 0.3" (standard deviation)."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table_row(name: str, results: list[dict], reported: dict | None) -> list[str]:
    """A run's line in the tables: the report's numbers beside ours; "-" stands for what is not there.

    The report tests the last weights on the first 1,000 images; beside them stand the best weights, on these and on all.
    """
    reported = results[0]["reported"] if reported is None else reported
    report = [str(reported.get(k, "-")) for k in ("validation", "test")]
    if not results:
        return [name, "-", "-", f"{report[0]} / -", f"{report[1]} / -", "-", "-", "-"]
    best, last = ([r["test"][which] for r in results] for which in ("best", "last"))
    interval = (
        f" [{best[0]['all_10000']['ci95'][0]:.1f}, {best[0]['all_10000']['ci95'][1]:.1f}]" if len(best) == 1 else ""
    )
    return [
        name,
        ", ".join(f"{r['best_epoch']} of {len(r['history'])}" for r in results),
        f"{len(results)}",
        f"{report[0]} / {mean_and_deviation([best_validation(r) for r in results])}",
        f"{report[1]} / {mean_and_deviation([scored['first_1000']['accuracy'] for scored in last])}",
        mean_and_deviation([scored["first_1000"]["accuracy"] for scored in best]),
        f"{mean_and_deviation([b['all_10000']['accuracy'] for b in best], 2)}{interval}",
        duration(sum(h["seconds"] for r in results for h in r["history"])),
    ]


def table_head(sample: bool) -> list[str]:
    test = ("500 test", "all 500") if sample else ("first 1,000 test", "all 10,000")
    head = ["run", "best epoch", "seeds", "validation: report / ours", f"{test[0]}, last weights: report / ours"]
    return [*head, f"{test[0]}, best weights", f"{test[1]}, best weights [95 %]", "time"]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *body]


def gallery_section(
    question: "Question",
    results: dict[str, list[dict]],
    tables: list[list],
    verdicts: list[dict],
    figures: Iterable[str],
) -> str:
    """A question's part of the gallery, as Markdown."""
    (head, *rows), *others = tables
    links = {}  # to the JSON, or to the folder of all seeds'
    for name, found in results.items():
        file = f"seed{found[0]['seed']}.json" if len(found) == 1 else ""
        links[name] = f"[{name}]({question.name}/{name}/{file})"
    lines = [f"## {question.title}", "", *markdown_table([head, *([links.get(r[0], r[0]), *r[1:]] for r in rows)]), ""]
    for table in others:
        lines += [*markdown_table(table), ""]
    if verdicts:
        judged = [[str(v["claim"]), v["report"], f"**{v['verdict']}**", v["evidence"] or "-"] for v in verdicts]
        lines += [*markdown_table([["claim", "the report says", "verdict", "measured"], *judged]), ""]
    lines += [f"![{name}]({question.name}/{name})\n" for name in figures]
    unfolded = () if figures else {run.name for run in question.runs}  # nothing else shows them
    for name in results:
        details = "<details open>" if name in unfolded else "<details>"
        lines += [f"{details}<summary>{name}: curves, filters, confusion matrix</summary>", ""]
        lines += [f"![{name} {kind}]({question.name}/{name}/{kind}.png)" for kind in RUN_FIGURES]
        lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_gallery(root: Path, name: str, section: str, sample: bool) -> None:
    """Put a question's section into README.md under `root`; the other questions' sections stay as they are."""
    path = root / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"<!-- (q\d) -->\n(.*?)<!-- end q\d -->", old, re.DOTALL)) | {name: section}
    body = "\n".join(f"<!-- {n} -->\n{text}<!-- end {n} -->\n" for n, text in sorted(sections.items()))
    write_atomic(path, ((SAMPLE_HEAD if sample else "") + GALLERY_HEAD + body).encode())


SAMPLE_HEAD = "# SAMPLE: trained on the small bundled excerpt, not on CIFAR-10\n\n"
GALLERY_HEAD = """# The report and ours, side by side

Written by the question scripts from the JSON files beside it; do not edit. Accuracies are in percent. The report tests
the weights of the last epoch on the first 1,000 test images, and so does the column beside its numbers; the weights of
the best validation epoch follow, on the same images and on all 10,000, the brackets their 95 % Wilson interval. With
several seeds: mean ± standard deviation. "-" has not been run, or the report prints no number. "time" is that of all
epochs a run is read from; runs that share epochs each count them.

A comparison of two runs *holds* or *does not hold* where the 95 % interval of the paired difference on the same test
images excludes zero; else it is *within noise*. Claims about validation, the gap between losses, filters or a ranking
have a criterion of their own, instead or as well, stated in the question's script. A claim of several parts holds where
all of them do. A verdict is on the direction of a claim, not on the size of the numbers in it.

"""


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Question:
    """What a question script declares."""

    name: str  # its folder in results/
    title: str
    doc: str  # the script's docstring: its manual, shown by --help
    runs: Sequence[Run]
    claims: Sequence[Claim] = ()
    figures: Callable[[dict[str, list[dict]]], dict[str, Figure]] | None = None  # of all results, by file name
    table: Callable[[dict[str, list[dict]]], list[list[str]]] | None = None  # of all results: a head and rows
    beside: dict[str, str] = field(default_factory=dict)  # other questions' runs, for figures and claims: run, question
    options: dict[str, dict] = field(default_factory=dict)  # its own options: arguments of add_argument
    configure: Callable[[Sequence[Run], argparse.Namespace], Sequence[Run]] | None = None  # the runs, as those ask


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def positive(text: str) -> int:
    """Type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not '{text}'")
    return int(text)


def make_parser(question: Question) -> Parser:
    """The options all four scripts share, and the question's own; the help of settings comes from `Settings`."""
    parser = Parser(description=question.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = {f.name: f.metadata.get("help") for f in dataclasses.fields(Settings)}
    parser.add_argument("--list", action="store_true", help="show every run, its state and the time left, and exit")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these runs, named as in --list")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="train seeds 0 to N-1; default 1")
    parser.add_argument("--epochs", type=positive, metavar="N", help=settings["epochs"])
    sample = f"the bundled excerpt: no download, {SAMPLE_EPOCHS} epochs, output in results/sample/"
    parser.add_argument("--sample", action="store_true", help=sample)
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=settings["precision"])
    parser.add_argument("--fresh", action="store_true", help="start over; the old checkpoints stay as *.old1, *.old2")
    parser.add_argument("--replot", action="store_true", help="rebuild every figure from the results, train nothing")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "results", help="default results/")
    parser.add_argument("--checkpoint-dir", type=Path, default=ROOT / "checkpoints", help="default checkpoints/")
    if any(run.settings.augment for run in question.runs):
        parser.add_argument("--preview", action="store_true", help="draw what each augmentation does, train nothing")
    for name, arguments in question.options.items():
        parser.add_argument(name, **arguments)
    return parser


def select_runs(question: Question, args: argparse.Namespace, device: torch.device) -> list[Run]:
    """The runs asked for, with the command line's settings.

    A run at another number of epochs, or in a precision that was asked for, has a name of its own: it stands beside
    the run in the report's setting, and must not overwrite it.
    """
    precision = choose_precision(args.precision, device)
    runs = {}
    for run in question.configure(question.runs, args) if question.configure else question.runs:
        epochs = min(run.settings.epochs, SAMPLE_EPOCHS) if args.sample else run.settings.epochs
        settings = dataclasses.replace(run.settings, epochs=args.epochs or epochs, precision=precision)
        if args.sample:
            settings = dataclasses.replace(settings, **SAMPLE_SETTINGS)
        name, reported = run.name, run.reported
        if settings.epochs != epochs:
            name, reported = f"{name}_{settings.epochs}epochs", {}
        if args.precision != "auto":
            name = f"{name}_{precision}"
        runs[run.name] = dataclasses.replace(run, name=name, settings=settings, reported=reported)
    by_name = runs | {run.name: run for run in runs.values()}
    if unknown := set(args.only or ()) - by_name.keys():
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such run; there are {', '.join(runs)}")
    return list({by_name[name].name: by_name[name] for name in args.only or runs}.values())  # in the order asked for


def require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another with --output-dir or --checkpoint-dir"
        ) from error


def load_results(folder: Path) -> list[dict]:
    """The results in a run's folder, one per seed, in order of seeds; empty where it has none yet."""
    paths = [p for p in folder.glob("seed*.json") if re.fullmatch(r"seed\d+\.json", p.name)]
    return sorted((load_result(path) for path in paths), key=lambda r: r["seed"])


def list_runs(runs: Sequence[Run], others: Sequence[Run], args: argparse.Namespace, folder: Path) -> None:
    """--list: every run's state, and an estimate of the time left from the epochs trained so far.

    An epoch is taken to last what those of the same network did, in `others` too. Runs that share a trajectory share
    what is left of it.
    """
    shown, rows, seconds = {run.name for run in runs}, [], {}
    width = max(map(len, shown))
    for run in [*runs, *(run for run in others if run.name not in shown)]:
        for seed in range(args.seeds):
            settings = dataclasses.replace(run.settings, seed=seed)
            path, history = args.checkpoint_dir / f"{settings.key()}.pt", []
            result = (folder / run.name / f"seed{seed}.json").exists()
            try:
                if path.exists():
                    history = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["history"]
                state = f"epoch {len(history)}" if history else "not started"
            except Exception:  # as in load_checkpoint
                state = "damaged checkpoint"
            left = settings.epochs - len(history)
            if stopping_epoch([h["validation_accuracy"] for h in history], settings.epochs, settings.patience):
                state, left = "done" if result else "trained, no result yet", 0
            elif result:
                state += " (has a result)"  # of another machine, or of before --fresh
            seconds.setdefault((settings.network, settings.backbone), []).extend(h["seconds"] for h in history)
            if run.name in shown:
                rows.append((run.name, settings, state, left))
    left_over = {}  # of every trajectory: epochs, and seconds per epoch where they are known
    for name, settings, state, left in rows:
        epoch_times, text = seconds[settings.network, settings.backbone], ""
        if left:
            per_epoch = statistics.median(epoch_times) if epoch_times else None
            left_over[settings.key()] = max(left_over.get(settings.key(), (0, None)), (left, per_epoch))
            text = f"at most {duration(left * per_epoch)} left" if per_epoch else f"{left} epochs left"
        print(f"{name:<{width}}  seed {settings.seed}  {settings.epochs:>3} epochs  {state:<28}{text}".rstrip())
    if len(rows) > 1 and left_over:
        known = sum(epochs * per_epoch for epochs, per_epoch in left_over.values() if per_epoch)
        unknown = sum(epochs for epochs, per_epoch in left_over.values() if not per_epoch)
        parts = [f"at most {duration(known)}"] * bool(known) + [f"{unknown} epochs"] * bool(unknown)
        print("in all:", " and ".join(parts), "left")


def set_aside(paths: Collection[Path]) -> None:
    """--fresh: rename the checkpoints among these paths to the first free of .old1, .old2, ...

    Raises UserError, and renames none, where another process trains one of them.
    """
    with ExitStack() as stack:
        for path in paths:
            if not stack.enter_context(file_lock(path.with_suffix(".lock"), wait=False)):
                raise UserError(f"--fresh: another process is training {path}; wait until it has ended")
        for path in filter(Path.exists, paths):
            number = 1
            while (old := path.with_suffix(f".old{number}")).exists():
                number += 1
            try:
                os.replace(path, old)
            except OSError as error:
                raise UserError(f"cannot rename {path} to {old}: {error.strerror}") from error


def train_runs(
    question: Question, runs: Sequence[Run], args: argparse.Namespace, folder: Path, device: torch.device
) -> None:
    """Train what is missing of every run and seed; write its result, figures and gallery as soon as it is there."""
    keep_large_blocks()
    on_first(lambda: require_writable(args.checkpoint_dir))
    on_first(lambda: [load_results(path) for path in folder.glob("*/")])  # a damaged one is an error now, not in hours
    data = on_all(lambda: load_sample() if args.sample else load_cifar10(find_data_dir(args.data_dir)))
    data = {part: split.to(device) for part, split in data.items()}
    queue = [
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, seed=seed))
        for run in runs
        for seed in range(args.seeds)
    ]
    if args.fresh:
        on_first(lambda: set_aside({args.checkpoint_dir / f"{run.settings.key()}.pt" for run in queue}))
    shown, busy = set(), 0
    while queue:
        run = queue.pop(0)
        path = args.checkpoint_dir / f"{run.settings.key()}.pt"
        with ExitStack() as stack:
            lock = file_lock(path.with_suffix(".lock"), wait=busy > len(queue))
            if not on_first(lambda: stack.enter_context(lock)):
                tell(f"{run.name} seed {run.settings.seed} is being trained by another process; coming back to it")
                queue.append(run)
                busy += 1
                continue
            busy = 0
            on_first(lambda: remove_leftovers(path))
            network = describe(run.network())
            if network not in shown and rank() == 0:
                print(network)
            shown.add(network)
            state = train(run, data, device, path)

        def write() -> None:
            write_atomic(folder / run.name / "network.txt", network.encode())
            result = read_run(question.name, run, state, data["test"].labels)
            if write_result(folder / run.name, result, state) and queue:  # after the last, the caller writes them all
                write_question(question, folder, args.sample, [run.name])

        on_first(write)


def preview_runs(runs: Sequence[Run], folder: Path) -> None:
    """--preview: one figure for every run with an augmentation, on bundled images."""
    images = load_sample()["train"].images[[3, 11, 25, 40]]
    for run in runs:
        if run.settings.augment:
            heading = f"{run.name}: {', '.join(map(repr, run.settings.augment))}"
            save_figure(preview(run.settings.augment, images, heading), folder / run.name / "preview.png")
            print(folder / run.name / "preview.png")
    if not any(run.settings.augment for run in runs):
        raise UserError("--preview: none of these runs has an augmentation")


def write_question(
    question: Question, folder: Path, sample: bool, drawn: Iterable[str] | None = None
) -> tuple[list, list]:
    """Figures, claims.json and the gallery's section, from the question's results alone; returns tables and verdicts.

    drawn: the runs whose own figures are drawn again, besides those that have none yet; None draws all.
    """
    with file_lock(folder.parent / ".gallery.lock"):
        reported = {run.name: run.reported for run in question.runs}
        others = sorted(p.name for p in folder.glob("*/") if p.name not in reported)
        results = {name: found for name in [*reported, *others] if (found := load_results(folder / name))}
        for name, found in results.items():
            if drawn is None or name in drawn or not all((folder / name / f"{f}.png").exists() for f in RUN_FIGURES):
                plot_run(found, folder / name)
        beside = {
            run: found for run, other in question.beside.items() if (found := load_results(folder.parent / other / run))
        }
        everything = results | beside
        figures = question.figures(everything) if question.figures else {}
        for name, figure in figures.items():
            save_figure(figure, folder / name)
        verdicts = [judge(claim, everything, folder) for claim in question.claims]
        write_atomic(folder / "claims.json", (json.dumps(verdicts, indent=2, ensure_ascii=False) + "\n").encode())
        rows = [table_row(name, results.get(name, []), reported.get(name)) for name in reported | results]
        tables = [[table_head(sample), *rows]]
        if question.table and (table := question.table(results)):
            tables.append(table)
        write_gallery(
            folder.parent, question.name, gallery_section(question, results, tables, verdicts, figures), sample
        )
    return tables, verdicts


def print_question(folder: Path, tables: list, verdicts: list[dict], sample: bool) -> None:
    """What `write_question` returns, on the screen."""
    print(SAMPLE_HEAD if sample else "")
    for table in tables:
        widths = [max(map(len, column)) for column in zip(*table)]
        print("".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in table))
    for verdict in verdicts:
        print(f"claim {verdict['claim']}: {verdict['report']}\n  {verdict['verdict']}. {verdict['evidence']}".rstrip())
    print(f"\nfigures and numbers: {folder}/, gallery: {folder.parent / 'README.md'}")


def run_question(question: Question, argv: Sequence[str] | None = None) -> None:
    """The main program of a question script: parse the command line, train, write results, figures and gallery."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = make_parser(question).parse_args(argv)
        device = choose_device(args.device)
        with processes(device):
            runs = on_all(lambda: select_runs(question, args, device))
            folder = args.output_dir / ("sample" if args.sample else "") / question.name
            if args.list:
                others = select_runs(question, argparse.Namespace(**vars(args) | {"only": None}), device)
                return on_first(lambda: list_runs(runs, others, args, folder))
            on_first(lambda: require_writable(args.output_dir))
            if "preview" in args and args.preview:
                return on_first(lambda: preview_runs(runs, folder))
            if not args.replot:
                train_runs(question, runs, args, folder, device)
            on_first(lambda: print_question(folder, *write_question(question, folder, args.sample), args.sample))
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except KeyboardInterrupt:
        hint = "the same command (without --fresh) goes on after the last of them"
        sys.exit(fail(f"interrupted; finished epochs are kept, {hint}", 130))
    except torch.OutOfMemoryError:
        sys.exit(fail("the GPU's memory is full: end what else runs there, or choose another --device", 2))
    except RuntimeError as error:
        if not launched() or not re.search("Connection|connection|peer|NCCL|gloo", str(error)):
            raise
        reason = str(error).splitlines()[0]
        sys.exit(fail(f"lost another process of this run ({reason}); finished epochs are kept, run the same again", 2))


def tell(message: str) -> None:
    """A line on standard error, from one process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def fail(message: str, code: int) -> int:
    tell(f"{Path(sys.argv[0]).name}: {message}")
    return code
