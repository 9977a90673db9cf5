"""What the question scripts share, top to bottom in the order a run needs it:

    settings -> data -> network -> filters -> training -> checkpoints -> results -> command line

The protocol (splits, optimiser, initialisation) is that of the report's published code and of the course exercise it
answers, Max Planck HLCV exercise 3.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def end_quietly(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


started = getattr(sys.modules["__main__"], "__file__", None)
if started and Path(started).resolve().parent == ROOT:  # a script of ours, no notebook
    signal.signal(signal.SIGINT, end_quietly)  # Ctrl-C while the modules below load; from then on `session` answers it

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import math
import re
import statistics
import time
import zipfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

NOTEBOOK_BACKEND = os.environ.pop("MPLBACKEND", None)  # matplotlib does not load with that of another environment


import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from augment import augment
from machine import (
    Conv2d,
    Dropout,
    Parser,
    UserError,
    announce,
    choose_precision,
    computing_dtype,
    distribute,
    environment,
    expand,
    file_lock,
    keep_large_blocks,
    my_part,
    on_all,
    on_first,
    rank,
    remove_leftovers,
    require_writable,
    sum_over_ranks,
    tell,
    world_size,
    write_atomic,
)
from muon import MuonAndSGD

if NOTEBOOK_BACKEND is not None:
    os.environ["MPLBACKEND"] = NOTEBOOK_BACKEND

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = {"cifar10": 1000, "cifar10-sample": 200}
REPORT_TEST_IMAGES = 1000  # the report tests on the first 1,000 images
SAMPLE_DIR, SAMPLE_EPOCHS = ROOT / "sample", 18


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything one training run is made of; the defaults are question 1's.

    All fields but `epochs` and `patience` shape the weights: together they name a trajectory (see `key`). How far a
    trajectory is followed, and which rule stops it, is only a way of reading it. (A linear schedule ends with the last
    epoch, so there `epochs` shapes the weights too.)

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
    optimizer: str = "adam"  # or "muon": Muon for the convolutions, and SGD at learning_rate for the rest
    filter_learning_rate: float | None = None  # Muon's
    schedule: str = "exponential"  # of the learning rates, by lr_decay; or "linear": to zero over all steps
    label_smoothing: float = 0.0  # of the loss that is trained on; what is recorded is the plain cross entropy
    precision: str = "auto"  # becomes fp32 or bf16: see `choose_precision`
    seed: int = 0
    epochs: int = 20
    patience: int | None = None  # stop after this many epochs below the best validation accuracy

    def as_dict(self) -> dict:
        """The settings as JSON can hold them; an augmentation is its repr."""
        values = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = [v if isinstance(v, float) else repr(v) for v in value]
            values[f.name] = value
        return values

    def trajectory(self) -> dict:
        """The settings that shape the weights, without those at their default: a new field renames no checkpoint."""
        values, defaults = self.as_dict(), Settings().as_dict()
        reading = {"patience"} if self.schedule == "linear" else {"patience", "epochs"}
        return {k: v for k, v in values.items() if k not in reading and v != defaults[k]}

    def key(self) -> str:
        """Name of the trajectory's checkpoint, the same in every process and question."""
        digest = hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True).encode()).hexdigest()
        return f"{self.network}-seed{self.seed}-{digest[:10]}"


def on_sample(settings: Settings) -> Settings:
    """These settings as they suit the bundled excerpt: so few images need smaller batches, at half the learning rate."""
    epochs, rate = min(settings.epochs, SAMPLE_EPOCHS), settings.learning_rate / 2
    return dataclasses.replace(settings, data="cifar10-sample", batch_size=25, learning_rate=rate, epochs=epochs)


def build_convnet(settings: Settings) -> nn.Module:
    return ConvNet(settings.batch_norm, settings.dropout, settings.dropout_after_pool)


def the_images(model: nn.Module, data: dict[str, "Split"], settings: Settings) -> dict[str, "Split"]:
    return data


@dataclass(frozen=True)
class Run:
    """One row of a question: a name, its settings, and the two things it is made of."""

    name: str
    settings: Settings = Settings()
    build: Callable[[Settings], nn.Module] = build_convnet  # its network, fresh from PyTorch's global generator
    prepare: Callable[[nn.Module, dict, Settings], dict] = the_images  # what the loop is fed, from model and images


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


def find_data_dir(option: Path | None = None) -> Path:
    """--data-dir, else the environment variable CIFAR10_DIR, else data/; also where it names the folder inside."""
    path = option or expand(os.environ.get("CIFAR10_DIR") or str(ROOT / "data"))
    return path.parent if path.name == CIFAR10.base_folder and path.is_dir() else path


def cifar10_problem(data_dir: Path) -> str | None:
    """What is missing or damaged of the official files; torchvision does not look for batches.meta."""
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    here = data_dir / CIFAR10.base_folder
    missing = [name for name in files if not (here / name).exists()]
    for name, md5 in files.items():
        if name not in missing and not check_integrity(str(here / name), md5):
            return f"{here / name} is not the official file (its MD5 differs)"
    return f"{here} lacks {', '.join(missing)}" if missing else None


def fetch_cifar10(data_dir: Path, advice: str) -> None:
    """Download and unpack the official CIFAR-10 where it is missing. An archive that is whole is unpacked again.

    Raises UserError where there are files that are not ours to overwrite.
    """
    if (problem := cifar10_problem(data_dir)) is None:
        return
    if data_dir.is_dir() and not os.access(data_dir, os.W_OK):
        raise UserError(f"{problem}, and {data_dir} is read-only: {advice}")
    with file_lock(data_dir / ".download.lock"):
        problem = cifar10_problem(data_dir)  # another process may have downloaded it meanwhile
        archive, here = data_dir / CIFAR10.filename, data_dir / CIFAR10.base_folder
        if problem and check_integrity(str(archive), CIFAR10.tgz_md5):
            extract_archive(str(archive), str(data_dir))
        elif problem and here.is_dir() and any(here.iterdir()):
            raise UserError(f"{problem}: delete the folder and run again to download CIFAR-10 anew")
        elif problem:
            CIFAR10(data_dir, download=True)


def load_cifar10(data_dir: Path) -> dict[str, Split]:
    """The official CIFAR-10, downloaded and verified by torchvision.

    train: the first 49,000 training images; validation: the last 1,000; test: 10,000.
    Raises UserError where the files are damaged, or missing and not to be had.
    """
    advice = f"put {CIFAR10.base_folder}/ there, point --data-dir or CIFAR10_DIR to its parent folder, or use --sample"
    try:
        fetch_cifar10(data_dir, advice)
        parts = [CIFAR10(data_dir, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not readable in {data_dir} and could not be downloaded ({error}): {advice}"
        ) from error
    train, test = (
        Split(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
    )
    held_out = VALIDATION_IMAGES["cifar10"]
    return {
        "train": Split(train.images[:-held_out], train.labels[:-held_out]),
        "validation": Split(train.images[-held_out:], train.labels[-held_out:]),
        "test": test,
    }


def load_sample() -> dict[str, Split]:
    """The bundled, class-balanced excerpt, cut by sample/cut_sample.py: 1,500 training, 200 validation, 500 test."""
    splits = {}
    for part, entry in json.loads((SAMPLE_DIR / "index.json").read_text()).items():
        sheet = TF.pil_to_tensor(Image.open(SAMPLE_DIR / f"{part}.png"))  # [3, 32 rows, 32 columns]
        images = sheet.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        splits[part] = Split(images.contiguous(), torch.tensor(entry["labels"]))
    return splits


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


def formula_parameters(module: nn.Module) -> int | None:
    """The report's formulas (1) and (2); for batch norm, where it has none, a scale and a shift per channel."""
    if isinstance(module, nn.Conv2d):
        return (module.kernel_size[0] * module.kernel_size[1] * module.in_channels + 1) * module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features * (module.in_features + 1)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 2 * module.num_features
    return None


def parameter_table(model: nn.Module) -> list[dict]:
    """One row per layer with parameters: PyTorch's count beside the report's formula."""
    rows = []
    for name, module in model.named_modules():
        if (formula := formula_parameters(module)) is not None:
            counted = sum(p.numel() for p in module.parameters())
            rows.append({"layer": name, "type": type(module).__name__, "parameters": counted, "formula": formula})
    return rows


def all_parameters(model: nn.Module) -> dict:
    """As the results hold them. Several processes change a model to train it: call before."""
    return {"trainable": count_parameters(model), "layers": parameter_table(model)}


def describe(model: nn.Module) -> str:
    """The printed network (the report's Figure 10) and its parameters, layer by layer."""
    lines = [str(model), "", f"{'layer':<16}{'type':<14}{'PyTorch':>12}{'formula':>12}"]
    lines += ["{layer:<16}{type:<14}{parameters:>12,}{formula:>12,}".format(**row) for row in parameter_table(model)]
    return "\n".join([*lines, f"{'trainable parameters':<30}{count_parameters(model):>12,}", ""])


# ----------------------------------------------------------------------------------------------------------- filters

FILTER_COLUMNS = 16
FILTER_PIXEL, FILTER_GAP, FILTER_LABEL = 8, 5, 13  # pixels of the grid image: a weight's edge, a gap, a number's line


def first_filters(model: nn.Module) -> Tensor:
    """A copy of the first convolution's weights, [C_out, 3, K, K] float32 on the CPU."""
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    return weight.detach().float().cpu().clone(memory_format=torch.contiguous_format)


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


# ---------------------------------------------------------------------------------------------------------- training


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in bfloat16, weights and optimiser in float32; with fp32, nothing changes."""
    dtype = computing_dtype(settings.precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def stopping_epoch(
    accuracies: Sequence[float], epochs: int, patience: int | None = None, ties_count: bool = False
) -> int | None:
    """The epoch (from 1) after which training ends; None while it goes on.

    It ends after `epochs`, or when `patience` epochs since the best one had a validation accuracy below it. As in the
    report's code, an epoch that equals the best neither counts nor starts the count again; with `ties_count` it counts.
    """
    best, below = -math.inf, 0
    for epoch, accuracy in enumerate(accuracies[:epochs], 1):
        if accuracy > best:
            best, below = accuracy, 0
        elif accuracy < best or ties_count:
            below += 1
            if below == patience:
                return epoch
    return epochs if len(accuracies) >= epochs else None


def stops_after(history: Sequence[dict], settings: Settings) -> int | None:
    """The epoch after which the settings' rule ends this training; None while it goes on."""
    return stopping_epoch([h["validation_accuracy"] for h in history], settings.epochs, settings.patience)


def best_epoch(history: Sequence[dict]) -> int:
    """The epoch (from 1) of the highest validation accuracy; the first of equals."""
    return max(history, key=lambda h: h["validation_accuracy"])["epoch"]


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels.cpu()).sum().item() / len(labels)


def build(run: Run, device: torch.device) -> nn.Module:
    """The run's network as its seed initialises it.

    Raises ValueError where the settings call it something else: its checkpoint would bear another network's name.
    """
    torch.manual_seed(stream_seed(run.settings.seed, 0, "init"))
    model = run.build(run.settings)
    name = type(model).__name__
    if name != run.settings.network:
        raise ValueError(f"{run.name}: network='{run.settings.network}' in its settings, but it is {name}")
    return model.to(device, memory_format=torch.channels_last)


Optimizer = torch.optim.Optimizer | MuonAndSGD


def make_optimizer(model: nn.Module, settings: Settings, device: torch.device) -> Optimizer:
    if settings.optimizer == "muon":
        return MuonAndSGD(model, settings.learning_rate, settings.filter_learning_rate, settings.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(trained, settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def learning_rate_factor(settings: Settings, epochs_done: float) -> float:
    """What the learning rates are multiplied by when this much of the training is done, by the settings' schedule."""
    if settings.schedule == "linear":
        return 1 - epochs_done / settings.epochs
    return settings.lr_decay ** int(epochs_done)


def set_learning_rates(optimizer: Optimizer, settings: Settings, epochs_done: float) -> None:
    factor = learning_rate_factor(settings, epochs_done)
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", settings.learning_rate) * factor


def cut_batches(order: Tensor, size: int) -> list[Tensor]:
    """Numbers of images [N] -> batches of `size`. A last batch of a single image per process is merged into the one
    before it: batch norm cannot normalise one image.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) < 2 * world_size():
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    return batches


def train_epoch(
    model: nn.Module, optimizer: Optimizer, split: Split, settings: Settings, epoch: int, progress: tqdm
) -> tuple[float, Tensor]:
    """One pass over `split`; returns the mean of the training loss (cross entropy) as it was met on the way, and that of
    every step's batch, float32 [steps] on the CPU.

    Raises UserError when the loss is not finite.
    """
    device = split.labels.device
    model.train()
    order = torch.randperm(len(split), generator=generator(settings.seed, epoch, "order"))
    rng = generator(settings.seed, epoch, "augment")
    torch.manual_seed(stream_seed(settings.seed, epoch, "dropout") + rank())
    total, seen, step_losses = torch.zeros((), device=device), 0, []
    batches = cut_batches(order, settings.batch_size)
    for step, index in enumerate(batches, 1):
        set_learning_rates(optimizer, settings, epoch - 1 + (step - 1) / len(batches))
        images, labels = split.batch(index, settings, rng, my_part(len(index)))
        with autocast(settings, device):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=settings.label_smoothing) / len(index)
        optimizer.zero_grad(set_to_none=True)
        (loss * world_size()).backward()  # DistributedDataParallel averages the gradients over the processes
        optimizer.step()
        step_losses.append(F.cross_entropy(logits.detach(), labels, reduction="sum") / len(index))
        total += step_losses[-1] * len(index)
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


def validate(model: nn.Module, validation: Split, settings: Settings, epoch: int) -> dict:
    """Loss and accuracy on the validation images; with augmentation also on augmented ones, as the report measures it.

    Those are drawn anew in every epoch, from a random stream of their own. They choose no weights.
    """
    loss, predictions = evaluate(model, validation, settings)
    require_finite(loss, "validation", epoch)
    measured = {"validation_loss": loss, "validation_accuracy": accuracy(predictions, validation.labels)}
    if settings.augment:
        rng = generator(settings.seed, epoch, "validation")
        loss, predictions = evaluate(model, validation, settings, rng)
        measured["augmented_validation_loss"] = loss
        measured["augmented_validation_accuracy"] = accuracy(predictions, validation.labels)
    return measured


def train(run: Run, model: nn.Module, data: dict[str, Split], device: torch.device, path: Path) -> dict:
    """Follow the run's trajectory from its checkpoint at `path`, if there is one, until the run's rule ends it.

    After every epoch the checkpoint is replaced, so an interrupted run loses at most the epoch it was in. What any rule
    could ask for later, the test predictions and the first layer's filters, is recorded when the epoch passes, so that
    every rule can be read from the trajectory. Returns the checkpoint:
      settings, network         what shaped the weights: see `Settings.trajectory`; the printed network
      environments              where the epochs were trained
      history                   one dict per epoch
      step_losses               per epoch the training loss of every step, float32 [steps]
      predictions, filters      per epoch uint8 [N] on the test images; float32 [C, 3, K, K], before training first
      model, best, optimizer    state dicts: the last weights, those of the best validation accuracy, the optimiser's
    """
    if run.settings.patience is not None and not len(data["validation"]):
        raise UserError(f"{run.name}: patience needs validation images, and there are none")
    state = on_first(lambda: load_checkpoint(path, run.settings, model) if path.exists() else None)
    if state is None:
        state = {"settings": run.settings.trajectory(), "network": str(model), "environments": [], "history": []}
        state |= {"step_losses": [], "predictions": [], "filters": [first_filters(model)]}
    if not stops_after(state["history"], run.settings):
        train_on(run, model, data, device, path, state)
    return state


def train_on(run: Run, model: nn.Module, data: dict[str, Split], device: torch.device, path: Path, state: dict) -> None:
    """Train from the state on to the end, in place; the checkpoint at `path` is replaced after every epoch."""
    settings, history = run.settings, state["history"]
    announce(label(run), device, settings.precision)
    optimizer = make_optimizer(model, settings, device)
    if history:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.perf_counter()
    data = run.prepare(model, data, settings)
    preparing = time.perf_counter() - start
    network = distribute(model, device)
    with progress_bar(run, len(data["train"]), len(history)) as progress:
        while not stops_after(history, settings):
            start, epoch = time.perf_counter(), len(history) + 1
            show_epoch(progress, run, history)
            lr = settings.learning_rate * learning_rate_factor(settings, epoch - 1)
            train_loss, step_losses = train_epoch(network, optimizer, data["train"], settings, epoch, progress)
            speed = len(data["train"]) / (time.perf_counter() - start)
            share_buffers(model)
            history.append({"epoch": epoch, "train_loss": train_loss, "lr": lr})
            history[-1] |= validate(model, data["validation"], settings, epoch)
            record_epoch(state, model, data["test"], settings, step_losses)
            record_environment(state, environment(device, settings.precision))
            history[-1]["seconds"] = round(time.perf_counter() - start + preparing, 2)
            preparing = 0.0
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            on_first(lambda: save_checkpoint(path, state))
            print_epoch(progress, run, history, speed)


def share_buffers(model: nn.Module) -> None:
    """The first process's running statistics, for all."""
    if world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def record_epoch(state: dict, model: nn.Module, test: Split, settings: Settings, step_losses: Tensor) -> None:
    """What any rule could ask for later of the epoch that has just passed."""
    state["step_losses"].append(step_losses)
    state["predictions"].append(evaluate(model, test, settings)[1])
    state["filters"].append(first_filters(model))
    if best_epoch(state["history"]) == len(state["history"]):
        state["best"] = {k: v.detach().clone() for k, v in model.state_dict().items()}


def record_environment(state: dict, here: dict) -> None:
    """Where this epoch was trained, if it is not where the one before was."""
    environments = state["environments"]
    if not environments or here.items() - environments[-1].items():
        environments.append({**here, "from_epoch": len(state["history"])})


def progress_bar(run: Run, images: int, epochs_done: int) -> tqdm:
    """Over all images of all epochs, with the time left; of the first process, on a terminal."""
    return tqdm(
        total=run.settings.epochs * images,
        initial=epochs_done * images,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0,  # the average speed, evaluation included
        disable=True if rank() else None,
    )


def label(run: Run) -> str:
    return f"{run.name} seed {run.settings.seed}"


def show_epoch(progress: tqdm, run: Run, history: list[dict]) -> None:
    """The bar's description when an epoch begins."""
    so_far = ""
    if history:
        so_far = "val {validation_loss:.3f} acc {validation_accuracy:.1f} %, ".format(**history[-1])
    progress.set_description_str(f"{label(run)}: {so_far}epoch {len(history) + 1}/{run.settings.epochs}")


def print_epoch(progress: tqdm, run: Run, history: list[dict], speed: float) -> None:
    """When an epoch is over: the bar on a terminal; on anything else one line."""
    numbers = "train {train_loss:.3f} val {validation_loss:.3f} acc {validation_accuracy:.1f} %".format(**history[-1])
    progress.set_postfix_str(numbers)
    if progress.disable:
        left = (run.settings.epochs - len(history)) * statistics.median(h["seconds"] for h in history)
        epoch = f"epoch {len(history)}/{run.settings.epochs}"
        tell(f"{label(run)} {epoch}: {numbers}, {speed:.0f} img/s, at most {duration(left)} left")


def duration(seconds: float) -> str:
    """1:02:03"""
    return tqdm.format_interval(round(seconds))


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(checkpoint_dir: Path, settings: Settings) -> Path:
    return checkpoint_dir / f"{settings.key()}.pt"


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
        state = read_checkpoint(path)
        asked, sizes = settings.trajectory(), {k: v.shape for k, v in state["model"].items()}
        different = [k for k in asked | state["settings"] if state["settings"].get(k) != asked.get(k)]
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch
        raise UserError(f"the checkpoint {path} is damaged ({type(error).__name__}); {advice}") from error
    if different:
        raise UserError(f"the checkpoint {path} was trained with other settings ({', '.join(different)}); {advice}")
    if state["network"] != str(model) or sizes != {k: v.shape for k, v in model.state_dict().items()}:
        raise UserError(f"the checkpoint {path} is of another network than the code builds now; {advice}")
    return state


def read_checkpoint(path: Path) -> dict:
    """Raises whatever a damaged file makes zipfile, pickle or torch raise; KeyError where a part is missing."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad} has a wrong checksum")
    state = torch.load(path, weights_only=True, map_location="cpu")
    parts = {"settings", "network", "environments", "history", "step_losses", "predictions", "filters"}
    if missing := (parts | {"model", "best", "optimizer"}) - state.keys():
        raise KeyError(*missing)
    return state


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


def locked_runs(runs: Sequence[Run], checkpoint_dir: Path) -> Iterator[tuple[Run, Path]]:
    """Every run and its checkpoint's path, while no other process can train it; those that one trains come last."""
    waiting, busy = deque(runs), 0
    while waiting:
        run = waiting.popleft()
        path = checkpoint_path(checkpoint_dir, run.settings)
        lock = file_lock(path.with_suffix(".lock"), wait=busy > len(waiting))
        with ExitStack() as stack:
            if on_first(lambda: stack.enter_context(lock)):
                busy = 0
                on_first(lambda: remove_leftovers(path))
                yield run, path
                continue
        tell(f"{label(run)} is being trained by another process; coming back to it")
        waiting.append(run)
        busy += 1


# ----------------------------------------------------------------------------------------------------------- results


def score(predictions: Tensor, labels: Tensor, epoch: int) -> dict:
    """The test numbers of one set of weights: on the first 1,000 images, as the report tests, and on all.

    `correct` holds one bit per image, packed and in base 64.
    """
    labels, predictions = labels.cpu(), predictions.long()
    correct = predictions == labels
    confusion = torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)  # [true, predicted]
    first = correct[:REPORT_TEST_IMAGES]
    return {
        "epoch": epoch,
        "report_images": {"images": len(first), "accuracy": round(100 * first.float().mean().item(), 4)},
        "all_images": {"images": len(correct), "accuracy": round(100 * correct.float().mean().item(), 4)},
        "confusion": confusion.tolist(),
        "correct": base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode(),
    }


def correct_images(scored: dict) -> np.ndarray:
    """Per test image, was it classified correctly: bool [N], unpacked from a `score`."""
    packed = np.frombuffer(base64.b64decode(scored["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=scored["all_images"]["images"]).astype(bool)


def read_run(question: str, run: Run, parameters: dict, state: dict, labels: Tensor) -> dict:
    """Read a run from its trajectory: follow its rule through the recorded epochs. Trains nothing.

    parameters: what `all_parameters` says of its network.
    """
    last = stops_after(state["history"], run.settings)
    history = state["history"][:last]
    best = best_epoch(history)
    environments = [e for e in state["environments"] if e["from_epoch"] <= last]
    tests = {"best": best, "last": last}
    return {
        "run": run.name,
        "question": question,
        "seed": run.settings.seed,
        "settings": run.settings.as_dict(),
        "environment": environments[-1],
        "earlier_environments": environments[:-1],
        "parameters": parameters,
        "history": history,
        "best_epoch": best,
        "test": {name: score(state["predictions"][epoch - 1], labels, epoch) for name, epoch in tests.items()},
    }


RUN_FIGURES = ("losses", "accuracy", "filters", "confusion")  # of every run: report.py draws them


def write_result(run_folder: Path, result: dict, state: dict) -> bool:
    """seed<N>.json, and seed<N>.npz: the first layer's filters before training and at the last epoch, and the training
    loss of every step, [epochs, steps].

    Returns whether the result is new; then figures of older ones are deleted, lest an interrupt leave them beside it.
    """
    text = json.dumps(result, indent=2)
    innermost = r"[\[{][^\[\]{}]*[\]}]"  # on one line each
    text = re.sub(innermost, lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    epochs = {"before": 0, "last": len(result["history"])}
    arrays = {name: state["filters"][epoch].numpy() for name, epoch in epochs.items()}
    arrays["step_losses"] = torch.stack(state["step_losses"][: epochs["last"]]).numpy()
    path, content = run_folder / f"seed{result['seed']}.json", (text + "\n").encode()
    new = not path.exists() or path.read_bytes() != content
    if new:
        for name in RUN_FIGURES:
            (run_folder / f"{name}.png").unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(run_folder / f"seed{result['seed']}.npz", buffer.getbuffer())
    write_atomic(path, content)
    return new


def load_results(run_folder: Path) -> list[dict]:
    """The results in a run's folder, one per seed, in order of seeds; empty where it has none. Raises UserError."""
    paths = [p for p in run_folder.glob("seed*.json") if re.fullmatch(r"seed\d+\.json", p.name)]
    return sorted((load_result(path) for path in paths), key=lambda r: r["seed"])


def load_result(path: Path) -> dict:
    """A result as `write_result` wrote it, checked. Raises UserError where it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["settings"] = Settings().as_dict() | result["settings"]  # newer ones were at their default
        check_result(result, path.stem)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): restore it, or delete it and run again") from error
    return result


def check_result(result: dict, stem: str) -> None:
    """Does it hold what figures and tables need, and do its numbers agree? Raises ValueError, or KeyError and the like."""
    names = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "lr", "seconds")
    numbers = [entry[name] for entry in result["history"] for name in names]
    numbers += [row["parameters"] for row in result["parameters"]["layers"]]
    for number in [*numbers, result["parameters"]["trainable"]]:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a number")
    if stem != f"seed{result['seed']}":
        raise ValueError(f"it is of seed {result['seed']}")
    if result["best_epoch"] != best_epoch(result["history"]):
        raise ValueError(f"its best epoch is {best_epoch(result['history'])}")
    for weights in ("best", "last"):
        scored = result["test"][weights]
        correct, confusion = correct_images(scored), np.array(scored["confusion"])
        first = correct[:REPORT_TEST_IMAGES]
        if not all(
            math.isclose(100 * part.mean(), scored[name]["accuracy"], abs_tol=1e-3)
            for name, part in (("report_images", first), ("all_images", correct))
        ):
            raise ValueError(f"its {weights} accuracy is not that of its images")
        if confusion.shape != (10, 10) or confusion.trace() != correct.sum() or confusion.sum() != len(correct):
            raise ValueError(f"its {weights} confusion matrix is not that of its images")
    if missing := {"run", "question"} - result.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for machine in (*result["earlier_environments"], result["environment"]):
        if missing := {"device", "precision", "torch", "from_epoch"} - machine.keys():
            raise ValueError(f"an environment lacks {', '.join(sorted(missing))}")


# ------------------------------------------------------------------------------------------------------ command line


def positive(text: str) -> int:
    """Type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not '{text}'")
    return int(text)


def make_parser(doc: str) -> Parser:
    """The options all question scripts share; `doc` is the script's docstring, its manual."""
    parser = Parser(doc)
    epochs = "instead of the report's number; such runs are named by it, and not compared"
    precision = "fp32, bf16, or auto: bf16 where it is native and faster"
    parser.add_argument("--list", action="store_true", help="show every run, its state and the time left, and exit")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these runs, named as in --list")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="train seeds 0 to N-1; default 1")
    parser.add_argument("--epochs", type=positive, metavar="N", help=epochs)
    sample = f"the bundled excerpt: no download, {SAMPLE_EPOCHS} epochs, output in results/sample/"
    parser.add_argument("--sample", action="store_true", help=sample)
    data = "folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/"
    parser.add_argument("--data-dir", type=expand, help=data)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    parser.add_argument("--fresh", action="store_true", help="start over; the old checkpoints stay as *.old1, *.old2")
    parser.add_argument("--replot", action="store_true", help="rebuild every figure from the results, train nothing")
    parser.add_argument("--output-dir", type=expand, default=ROOT / "results", help="default results/")
    parser.add_argument("--checkpoint-dir", type=expand, default=ROOT / "checkpoints", help="default checkpoints/")
    return parser


def question_folder(question: str, args: argparse.Namespace) -> Path:
    """Where the results of a question are: those of the sample never stand among the real ones."""
    return args.output_dir / "sample" / question if args.sample else args.output_dir / question


def asked_for(run: Run, args: argparse.Namespace, precision: str) -> Run:
    """The run with the command line's settings.

    At another number of epochs, or in a precision that was asked for, it has a name of its own: it stands beside the
    run in the report's setting, and must not overwrite it.
    """
    settings = dataclasses.replace(run.settings, precision=precision)
    if args.sample:
        settings = on_sample(settings)
    name = run.name
    if args.epochs and args.epochs != settings.epochs:
        settings = dataclasses.replace(settings, epochs=args.epochs)
        name += f"_{args.epochs}epochs"
    if args.precision != "auto":
        name += f"_{precision}"
    return dataclasses.replace(run, name=name, settings=settings)


def select_runs(runs: Sequence[Run], args: argparse.Namespace, device: torch.device) -> list[Run]:
    """The runs of --only, in its order, with the command line's settings; all of them without."""
    precision = on_all(lambda: choose_precision(args.precision, device))
    asked = {run.name: asked_for(run, args, precision) for run in runs}
    by_name = asked | {run.name: run for run in asked.values()}
    if unknown := set(args.only or ()) - by_name.keys():
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such run; there are {', '.join(asked)}")
    chosen = {by_name[name].name: by_name[name] for name in args.only or asked}
    return list(chosen.values())


def every_seed(runs: Sequence[Run], seeds: int) -> list[Run]:
    return [
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, seed=seed))
        for run in runs
        for seed in range(seeds)
    ]


def load_data(args: argparse.Namespace, device: torch.device) -> dict[str, Split]:
    keep_large_blocks()
    data = on_all(lambda: load_sample() if args.sample else load_cifar10(find_data_dir(args.data_dir)))
    return {part: split.to(device) for part, split in data.items()}


def train_runs(question: str, runs: Sequence[Run], args: argparse.Namespace, device: torch.device) -> Iterator[Run]:
    """Train what is missing of every run and seed; yields each run whose result is new, when it is written.

    With --replot there is nothing to train.
    """
    if args.replot:
        return
    here = question_folder(question, args)
    on_first(lambda: [load_results(path) for path in here.parent.glob("q*/*/")])  # damage is an error now, not in hours
    for run, parameters, state, data in train_all(runs, args, device):
        result = read_run(question, run, parameters, state, data["test"].labels)
        if on_first(lambda: write_result(here / run.name, result, state)):
            yield run


def train_all(
    runs: Sequence[Run], args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Run, dict, dict, dict[str, Split]]]:
    """Train what is missing of every run and seed; yields each run with its parameters, its checkpoint and the images."""
    on_first(lambda: [require_writable(path) for path in (args.output_dir, args.checkpoint_dir)])
    data = load_data(args, device)
    queue = every_seed(runs, args.seeds)
    if args.fresh:
        on_first(lambda: set_aside({checkpoint_path(args.checkpoint_dir, run.settings) for run in queue}))
    shown = set()
    for run, path in locked_runs(queue, args.checkpoint_dir):
        model = on_all(partial(build, run, device))
        parameters = all_parameters(model)
        if str(model) not in shown and rank() == 0:
            print(describe(model))
        shown.add(str(model))
        yield run, parameters, train(run, model, data, device, path), data


def list_runs(
    question: str, runs: Sequence[Run], args: argparse.Namespace, has_result: Callable[[Run], bool] | None = None
) -> None:
    """--list: every run's state, and an estimate of the time left from the epochs trained so far.

    An epoch is taken to last what those of the same network did in any checkpoint there is. Runs that share a
    trajectory share what is left. A run has a result where its file is there, unless `has_result` says otherwise.
    """
    folder = question_folder(question, args)
    has_result = has_result or (lambda run: (folder / run.name / f"seed{run.settings.seed}.json").exists())
    on_first(lambda: print_runs(every_seed(runs, args.seeds), args.checkpoint_dir, has_result))


def print_runs(runs: Sequence[Run], checkpoint_dir: Path, has_result: Callable[[Run], bool]) -> None:
    checkpoints = {path.stem: glance(path) for path in sorted(checkpoint_dir.glob("*.pt"))}
    seconds = epoch_seconds(checkpoints.values())
    width, left_of = max(len(run.name) for run in runs), {}
    for run in runs:
        settings, key = run.settings, run.settings.key()
        state, left = run_state(settings, checkpoints.get(key, ({}, [])), has_result(run))
        line = f"{run.name:<{width}}  seed {settings.seed}  {settings.epochs:>3} epochs  {state:<28}"
        if left:
            per_epoch = seconds.get(kind(settings.trajectory()))
            if left > left_of.get(key, (0, None))[0]:
                left_of[key] = (left, per_epoch)
            line += f"at most {duration(left * per_epoch)} left" if per_epoch else f"{left} epochs left"
        print(line.rstrip())
    if len(runs) > 1 and left_of:
        known = sum(epochs * per_epoch for epochs, per_epoch in left_of.values() if per_epoch)
        unknown = sum(epochs for epochs, per_epoch in left_of.values() if not per_epoch)
        parts = [f"at most {duration(known)}"] * bool(known) + [f"{unknown} epochs"] * bool(unknown)
        print("in all:", " and ".join(parts), "left")


def glance(path: Path) -> tuple[dict, list[dict]] | None:
    """Settings and history of a checkpoint, without its tensors; None where it is damaged."""
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        return state["settings"], state["history"]
    except Exception:  # a damaged file fails anywhere in zipfile, pickle or torch
        return None


def kind(trajectory: dict) -> tuple:
    """What an epoch's duration depends on most."""
    return tuple(trajectory.get(name) for name in ("network", "backbone", "data", "optimizer"))


def epoch_seconds(checkpoints: Iterable[tuple[dict, list[dict]] | None]) -> dict[tuple, float]:
    """Median seconds of an epoch, by `kind`."""
    seconds: dict[tuple, list[float]] = {}
    for settings, history in filter(None, checkpoints):
        seconds.setdefault(kind(settings), []).extend(h["seconds"] for h in history)
    return {of: statistics.median(found) for of, found in seconds.items() if found}


def run_state(settings: Settings, checkpoint: tuple[dict, list[dict]] | None, has_result: bool) -> tuple[str, int]:
    """In words, and how many epochs are left at most."""
    if checkpoint is None:
        return "damaged checkpoint", settings.epochs
    _, history = checkpoint
    if stops_after(history, settings):
        return ("done" if has_result else "trained, no result yet"), 0
    state = f"epoch {len(history)}" if history else "not started"
    if has_result:
        state += " (has a result)"  # of another machine, or of before --fresh
    return state, settings.epochs - len(history)
