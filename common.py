"""What the question scripts share, top to bottom in the order a run needs it:

    settings -> data -> network -> training -> checkpoints -> results -> command line

A script enters at the bottom: `select_runs`, then `train_runs`.

The protocol of questions 1 to 3 (splits, optimiser, initialisation) is that of the report's published code and of the
course exercise it answers, Max Planck HLCV exercise 3.
"""

import base64
import hashlib
import io
import json
import math
import os
import statistics
import time
import zipfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

from parts import machine
from parts.augment import augment
from parts.layers import Conv2d, Dropout
from parts.machine import UserError, barrier, file_lock, my_part, rank, say, sum_over_ranks, world_size, write_atomic
from parts.muon import MuonAndSGD

ROOT = Path(__file__).resolve().parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = 1000  # the last of the training images
REPORT_TEST_IMAGES = 1000  # the report tests on the first 1,000 images
SAMPLE_DIR, SAMPLE_EPOCHS = ROOT / "sample", 18
CHANNELS = (128, 512, 512, 512, 512)  # of the report's network


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything one training is made of; the defaults are question 1's.

    All fields but `epochs` and `patience` shape the weights; those two are only a way of reading a training. (A linear
    schedule ends with the last epoch, so there `epochs` shapes the weights too.)
    """

    network: str = "ConvNet"  # the name of its class
    batch_norm: bool = False
    dropout: float = 0.0
    dropout_after_pool: bool = False  # the report's code drops units before the pooling
    weights: str = "none"  # what the network starts from: "none" is a random initialisation
    backbone: Literal["trained", "frozen", "frozen, training mode"] = "trained"  # frozen: in evaluation mode
    augment: tuple = ()  # augmentations, applied in this order
    data: str = "cifar10"  # says what --sample ("cifar10-sample") and question 5's --tune ("cifar10-tuning") load
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    batch_size: int = 200
    learning_rate: float = 2e-3
    lr_decay: float = 0.95  # the learning rate is multiplied by this after every epoch
    weight_decay: float = 1e-3  # L2, as torch.optim.Adam adds it to the gradient
    optimizer: Literal["adam", "muon"] = "adam"  # Muon for the convolutions, and SGD at learning_rate for the rest
    filter_learning_rate: float | None = None  # Muon's
    schedule: Literal["exponential", "linear"] = "exponential"  # of the rates: by lr_decay; to zero over all steps
    label_smoothing: float = 0.0  # of the loss that is trained on; what is recorded is the plain cross entropy
    precision: str = "auto"  # becomes fp32, bf16 or fp16: see `choose_precision`
    seed: int = 0
    epochs: int = 20
    patience: int | None = None  # stop after this many epochs below the best validation accuracy

    def __post_init__(self) -> None:
        if not isinstance(self.augment, tuple):
            raise TypeError(f"augment {self.augment!r}: make it a tuple, with a comma: (HorizontalFlip(),)")
        for augmentation in self.augment:
            if not is_dataclass(type(augmentation)) or augmentation.__hash__ is None:
                raise ValueError(f"{augmentation}: make it a frozen dataclass; its repr names the checkpoint")
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name} {value!r}: there are {', '.join(get_args(field.type))}")

    def as_dict(self) -> dict:
        """The settings as JSON can hold them; an augmentation is its repr."""
        return vars(self) | {"augment": [repr(a) for a in self.augment], "mean": [*self.mean], "std": [*self.std]}

    def key(self) -> str:
        """Name of the checkpoint, from what is not at its default: a new field renames none."""
        defaults = Settings().as_dict()
        named = {k: v for k, v in shaping(self.as_dict()).items() if v != defaults[k]}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        return f"{self.network}-seed{self.seed}-{digest[:10]}"


def shaping(settings: dict) -> dict:
    """Those of `Settings.as_dict` that shape the weights."""
    reading = {"patience"} if settings["schedule"] == "linear" else {"patience", "epochs"}
    return {name: value for name, value in settings.items() if name not in reading}


@dataclass(frozen=True)
class Run:
    """A row of a question's table, with one seed; seed and precision are the command line's. Its name is that of its
    folder in results/.
    """

    name: str
    settings: Settings


def stream_seed(seed: int, epoch: int, stream: str) -> int:
    """A 64-bit seed for one purpose in one epoch: all randomness is a function of (seed, epoch); none is ever saved."""
    streams = ("init", "order", "augment", "dropout", "validation")
    return int(np.random.SeedSequence([seed, epoch, streams.index(stream)]).generate_state(1, np.uint64)[0])


def generator(seed: int, epoch: int, stream: str) -> torch.Generator:
    """A CPU generator, whatever the device: the same draws everywhere."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, stream))


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(eq=False)
class Split:
    """Images held whole on the device, uint8 [N, 3, 32, 32], with labels int64 [N]; batches are made of them."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, index: Tensor, settings: Settings, rng: torch.Generator | None = None, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Select, augment and normalise a batch: float32 images [b, 3, 32, 32], channels_last, and labels [b].

        index: numbers of the batch's images, [B] on the CPU. rng: draws the augmentations, none without. part: which of
        the B images to return; drawn is always for all B, so that processes sharing a batch draw what one would.
        """
        mine = index[part].to(self.images.device)
        images = self.images[mine].float().div_(255)
        if rng is not None:
            images = augment(images, settings.augment, rng, len(index), part)
        images = TF.normalize(images, settings.mean, settings.std)
        return images.contiguous(memory_format=torch.channels_last), self.labels[mine]


def find_data_dir(option: Path | None = None) -> Path:
    """--data-dir, else $CIFAR10_DIR, else data/; they may name cifar-10-batches-py itself."""
    path = option or machine.expand(os.environ.get("CIFAR10_DIR") or str(ROOT / "data"))
    for place in (path, Path(os.path.realpath(path))):  # "." is inside too
        if place.name == CIFAR10.base_folder and place.is_dir():
            return place.parent
    return path


def open_cifar10(data_dir: Path) -> list[CIFAR10]:
    """Training and test part; torchvision verifies the files, and downloads them where there are none."""
    try:
        return [CIFAR10(data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # missing or damaged
        with file_lock(data_dir / ".download.lock"):  # another process may be downloading it
            here = data_dir / CIFAR10.base_folder
            missing = not here.is_dir() or not any(here.iterdir())
            missing |= (data_dir / CIFAR10.filename).exists()  # the archive, to extract them anew
            return [CIFAR10(data_dir, train=train, download=missing) for train in (True, False)]


def load_cifar10(data_dir: Path) -> dict[str, Split]:
    """The official CIFAR-10. train: the first 49,000 training images; validation: the last 1,000; test: 10,000.

    Raises UserError where the files are damaged, or missing and not to be had.
    """
    try:
        parts = open_cifar10(data_dir)
    except Exception as error:  # the network, or damaged files
        advice = f"put {CIFAR10.base_folder}/ there (delete it where it is damaged: it is downloaded anew)"
        raise UserError(
            f"no CIFAR-10 in {str(data_dir)!r} ({machine.first_line(error)}): {advice}, "
            "point --data-dir or CIFAR10_DIR to its parent folder, or use --sample"
        ) from error
    images, test_images = (torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts)
    labels, test_labels = (torch.tensor(p.targets) for p in parts)
    return {
        "train": Split(images[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES]),
        "validation": Split(images[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:]),
        "test": Split(test_images, test_labels),
    }


def load_sample() -> dict[str, Split]:
    """The bundled, class-balanced excerpt, by sample/cut_sample.py: 1,500 training, 200 validation, 500 test images."""
    splits = {}
    for part, entry in json.loads((SAMPLE_DIR / "index.json").read_text()).items():
        sheet = TF.pil_to_tensor(Image.open(SAMPLE_DIR / f"{part}.png"))  # [3, 32 * rows, 32 * columns]
        images = sheet.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        splits[part] = Split(images.contiguous(), torch.tensor(entry["labels"]))
    return splits


def load_data(sample: bool, data_dir: Path | None, device: torch.device) -> dict[str, Split]:
    data = load_sample() if sample else load_cifar10(find_data_dir(data_dir))
    return {part: Split(split.images.to(device), split.labels.to(device)) for part, split in data.items()}


# ----------------------------------------------------------------------------------------------------------- network


class ConvNet(nn.Module):
    """The report's network; its Figure 10 prints it with batch norm.

    Five blocks of Conv2d 3x3, [Dropout], [BatchNorm2d], MaxPool2d, ReLU, then Linear: [B, 3, 32, 32] -> logits [B, 10].
    7,678,474 parameters, 7,682,826 with batch norm. Dropout stands before the pooling, where the report's code has it;
    `dropout_after_pool` puts it at its usual place, after the ReLU.
    """

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0, dropout_after_pool: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *CHANNELS), CHANNELS):
            layers.append(Conv2d(c_in, c_out, kernel_size=3, padding=1))
            if dropout and not dropout_after_pool:
                layers.append(Dropout(dropout))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers += [nn.MaxPool2d(2), nn.ReLU()]
            if dropout and dropout_after_pool:
                layers.append(Dropout(dropout))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(CHANNELS[-1], 10)
        nn.init.normal_(self.classifier.weight, std=1e-3)  # the exercise's; the rest starts as PyTorch's layers do
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))  # [B, 512, 1, 1] -> [B, 512] -> [B, 10]


def convnet(settings: Settings) -> ConvNet:
    """The network of questions 1, 2, 3 and 5, freshly drawn from PyTorch's global generator."""
    return ConvNet(settings.batch_norm, settings.dropout, settings.dropout_after_pool)


def build(run: Run, device: torch.device, network: Callable[[Settings], nn.Module] = convnet) -> nn.Module:
    """The run's network as its seed initialises it. ValueError where the settings name another one."""
    torch.manual_seed(stream_seed(run.settings.seed, 0, "init"))
    model = network(run.settings)
    name = type(model).__name__
    if name != run.settings.network:
        raise ValueError(f"{run.name}: network='{run.settings.network}' in its settings, but it is {name}")
    return model.to(device, memory_format=torch.channels_last)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def all_parameters(model: nn.Module) -> dict:
    """As the results hold them: the trainable ones, and per layer PyTorch's count beside the report's formula."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            formula = (math.prod(module.kernel_size) * module.in_channels + 1) * module.out_channels  # the report's (1)
        elif isinstance(module, nn.Linear):
            formula = module.out_features * (module.in_features + 1)  # (2)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            formula = 2 * module.num_features  # the report has none: a scale and a shift per channel
        else:
            continue
        counted = sum(p.numel() for p in module.parameters())
        layers.append({"layer": name, "type": type(module).__name__, "parameters": counted, "formula": formula})
    return {"trainable": count_parameters(model), "layers": layers}


def describe(model: nn.Module) -> str:
    """The printed network (the report's Figure 10) and its parameters, layer by layer."""
    parameters = all_parameters(model)
    lines = [str(model), "", f"{'layer':<16}{'type':<14}{'PyTorch':>12}{'formula':>12}"]
    lines += ["{layer:<16}{type:<14}{parameters:>12,}{formula:>12,}".format(**row) for row in parameters["layers"]]
    return "\n".join([*lines, f"{'trainable parameters':<30}{parameters['trainable']:>12,}", ""])


def first_filters(model: nn.Module) -> Tensor:
    """A copy of the first convolution's weights, [C_out, 3, K, K] float32 on the CPU."""
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    return weight.detach().float().cpu().clone(memory_format=torch.contiguous_format)


def visualize_filters(weights: dict[str, np.ndarray], heading: str, scale: float) -> Figure:
    """First-layer filters [C_out, 3, K, K] as numbered grids, two panels a row; grey is 0, a full colour +-`scale`."""
    columns, gap = 16, 2  # a filter's number stands in the gap above it
    rows = math.ceil(max(map(len, weights.values())) / columns)
    down, across = math.ceil(len(weights) / 2), min(2, len(weights))
    figure = Figure(figsize=(9 * across, (0.8 + 0.54 * rows) * down))
    for axes, (name, weight) in zip(figure.subplots(down, across, squeeze=False).flat, weights.items()):
        colours = (0.5 + torch.from_numpy(weight) / (2 * scale)).clamp(0, 1)
        grid = make_grid(colours, columns, gap, pad_value=1)  # [3, height, width], a pixel per weight
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        for i in range(len(weight)):
            top, left = (gap + place * (weight.shape[-1] + gap) for place in divmod(i, columns))
            axes.text(left - 0.5, top - 0.7, str(i + 1), fontsize=6.5, va="bottom", color="0.25")
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    figure.suptitle(heading)
    figure.tight_layout(w_pad=4)
    return figure


# ---------------------------------------------------------------------------------------------------------- training


def train(run: Run, model: nn.Module, data: dict[str, Split], device: torch.device, path: Path, prepare=None) -> dict:
    """Train a fresh `model` on from the checkpoint at `path`, or from the start, until its epochs or patience end.

    Returns the checkpoint (see `new_checkpoint`), which is replaced after every epoch and holds what any stopping rule
    needs for its result. prepare(model, data, settings) returns the data to train on in their place.
    """
    settings = run.settings
    first = first_logits(model, data["train"], settings)
    state = load_checkpoint(path, settings, model, first) if path.exists() else new_checkpoint(settings, model, first)
    history = state["history"]
    if stops_after(history, settings):
        return state
    doing = f"goes on after epoch {len(history)}" if history else "trains"
    machine.announce(f"{run.name} seed {settings.seed} {doing}", device, settings.precision)
    optimizer, scaler = make_optimizer(model, settings, device), make_scaler(settings, device)
    if history:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state.get("scaler", {}))  # older checkpoints lack it
    start = time.perf_counter()
    data = prepare(model, data, settings) if prepare else data
    network = machine.distribute(model, device)
    with make_progress(run, len(data["train"]), len(history)) as progress:
        while not stops_after(history, settings):
            epoch = len(history) + 1
            progress.set_description_str(f"{run.name} seed {settings.seed}: epoch {epoch}/{settings.epochs}")
            train_loss, step_losses = train_epoch(network, optimizer, scaler, data["train"], settings, epoch, progress)
            lr = settings.learning_rate * learning_rate_factor(settings, epoch - 1)
            measured = validate(network, data["validation"], settings, epoch)
            history.append({"epoch": epoch, "train_loss": train_loss, "lr": lr, **measured})
            state["step_losses"].append(step_losses)
            state["predictions"].append(evaluate(network, data["test"], settings)[1])
            state["filters"].append(first_filters(model))
            if best_epoch(history) == epoch:
                state["best"] = {k: v.detach().clone() for k, v in model.state_dict().items()}
            note_environment(state, model, device, settings.precision)
            history[-1]["seconds"] = round(time.perf_counter() - start, 2)
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save_checkpoint(path, state)
            print_epoch(progress, run, history)
            start = time.perf_counter()
    return state


def train_epoch(
    model, optimizer, scaler, split, settings: Settings, epoch: int, progress: tqdm
) -> tuple[float, Tensor]:
    """One pass over `split`; returns the mean of the training loss (cross entropy) as it was met on the way, and that
    of every step's batch, float32 [steps] on the CPU. Raises UserError when the loss is not finite.
    """
    device = split.labels.device
    model.train()
    order = torch.randperm(len(split), generator=generator(settings.seed, epoch, "order"))
    rng = generator(settings.seed, epoch, "augment")
    torch.manual_seed(stream_seed(settings.seed, epoch, "dropout") + rank())
    total, seen = torch.zeros((), device=device), 0
    step_losses = []
    batches = order.split(settings.batch_size)
    for step, index in enumerate(batches, 1):
        factor = learning_rate_factor(settings, epoch - 1 + (step - 1) / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", settings.learning_rate) * factor  # Muon's groups have their own
        images, labels = split.batch(index, settings, rng, my_part(len(index)))
        with autocast(settings, device):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=settings.label_smoothing) / len(index)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss * world_size()).backward()  # DistributedDataParallel averages the gradients over processes
        scaler.step(optimizer)
        scaler.update()
        step_losses.append(F.cross_entropy(logits.detach(), labels, reduction="sum") / len(index))
        total += step_losses[-1] * len(index)
        seen += len(index)
        progress.update(len(index))
        if step % 20 == 0 or seen == len(split):  # reading the loss makes a GPU wait: not at every step
            mean = sum_over_ranks(total.clone()).item() / seen
            require_finite(mean, "training", epoch)
            progress.set_postfix_str(f"train {mean:.3f}", refresh=False)
    return mean, sum_over_ranks(torch.stack(step_losses)).cpu()


def validate(model: nn.Module, validation: Split, settings: Settings, epoch: int) -> dict:
    """Loss and accuracy on the validation images; with augmentation also on augmented ones, as the report measures it.
    Those are drawn anew in every epoch, and choose no weights.
    """
    measured, streams = {}, {"": None}
    if settings.augment:
        streams["augmented_"] = generator(settings.seed, epoch, "validation")
    for name, rng in streams.items():
        loss, predictions = evaluate(model, validation, settings, rng)
        require_finite(loss, f"{name.replace('_', ' ')}validation", epoch)
        measured[f"{name}validation_loss"] = loss
        measured[f"{name}validation_accuracy"] = accuracy(predictions, validation.labels)
    return measured


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, settings: Settings, rng=None) -> tuple[float, Tensor]:
    """Mean cross entropy over `split`, and the predicted classes, uint8 [N] on the CPU. rng: as in `Split.batch`."""
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
    return sum_over_ranks(total).item() / len(split), sum_over_ranks(predictions).cpu()


def stopping_epoch(accuracies: Sequence[float], epochs: int, patience: int | None) -> int | None:
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


def stops_after(history: Sequence[dict], settings: Settings) -> int | None:
    """The epoch after which the settings' rule ends this training; None while it goes on."""
    return stopping_epoch([h["validation_accuracy"] for h in history], settings.epochs, settings.patience)


def best_epoch(history: Sequence[dict]) -> int:
    """The epoch (from 1) of the highest validation accuracy; the first of equals."""
    return max(history, key=lambda h: h["validation_accuracy"])["epoch"]


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels.cpu()).sum().item() / len(labels)


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in the run's precision, weights and optimiser in float32."""
    dtype = machine.computing_dtype(settings.precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_scaler(settings: Settings, device: torch.device) -> torch.amp.GradScaler:
    """In fp16: scales losses, so that small gradients do not vanish, and leaves out steps that overflow."""
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")


def make_optimizer(model: nn.Module, settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    if settings.optimizer == "muon":
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        return MuonAndSGD(model, settings.learning_rate, settings.filter_learning_rate, settings.weight_decay, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(trained, settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def learning_rate_factor(settings: Settings, epochs_done: float) -> float:
    """What the learning rates are multiplied by when this much of the training is done, by the settings' schedule."""
    if settings.schedule == "linear":
        return 1 - epochs_done / settings.epochs
    return settings.lr_decay ** int(epochs_done)


def require_finite(loss: float, name: str, epoch: int) -> None:
    if not math.isfinite(loss):
        advice = "the same command repeats it; train anew with a lower learning rate or --precision fp32"
        raise UserError(f"the {name} loss became {loss} in epoch {epoch}: {advice}")


def make_progress(run: Run, images: int, epochs_done: int) -> tqdm:
    """A bar over all images of all epochs, at their average speed; of the first process, on a terminal."""
    total, done = run.settings.epochs * images, epochs_done * images
    hide = rank() or None  # None: without a terminal
    return tqdm(total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0, disable=hide)


def print_epoch(progress: tqdm, run: Run, history: list[dict]) -> None:
    """When an epoch is over: the bar on a terminal; on anything else one line."""
    numbers = "train {train_loss:.3f} val {validation_loss:.3f} acc {validation_accuracy:.1f} %".format(**history[-1])
    progress.set_postfix_str(numbers)
    if progress.disable:
        left = (run.settings.epochs - len(history)) * statistics.median(h["seconds"] for h in history)
        epoch = f"{run.name} seed {run.settings.seed} epoch {len(history)}/{run.settings.epochs}"
        machine.tell(f"{epoch}: {numbers}, at most {tqdm.format_interval(round(left))} left")


# ------------------------------------------------------------------------------------------------------- checkpoints


def new_checkpoint(settings: Settings, model: nn.Module, first: Tensor) -> dict:
    """What a checkpoint holds before the first epoch, and then all of this:

    settings, network         `shaping`; the printed network
    first_logits              what the fresh network puts out: see the function of that name
    environments              where the epochs were trained
    history                   one dict per epoch
    step_losses               per epoch the training loss of every step, float32 [steps]
    predictions, filters      per epoch uint8 [N] on the test images; float32 [C, 3, K, K], before training first
    model, best               state dicts: the last weights, those of the best validation accuracy of all its epochs
    optimizer, scaler         state dicts: the optimiser's, the loss scale's (fp16)
    """
    state = {"settings": shaping(settings.as_dict()), "network": str(model), "first_logits": first}
    state |= {"environments": [], "history": [], "step_losses": [], "predictions": []}
    return state | {"filters": [first_filters(model)]}


@torch.no_grad()
def first_logits(model: nn.Module, split: Split, settings: Settings) -> Tensor:
    """What a fresh network puts out, without dropout, for the first images of its first batch: float32 [n, 10].
    Initialisation, order, augmentation and forward pass are all in it: where it differs, other code trained.
    """
    order = torch.randperm(len(split), generator=generator(settings.seed, 1, "order"))
    index, rng = order[: settings.batch_size], generator(settings.seed, 1, "augment")
    images, _ = split.batch(index, settings, rng, slice(32))
    model.eval()
    return model(images).float().cpu()


def note_environment(state: dict, model: nn.Module, device: torch.device, precision: str) -> None:
    """Where this epoch was trained, if it is not where the one before was."""
    here, environments = machine.environment(device, precision), state["environments"]
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if batch_norm and world_size() > 1 and device.type != "cuda":  # there it is synchronised
        here["batch_norm"] = "over each process's part of the batch"
    if not environments or here.items() - environments[-1].items():
        environments.append({**here, "from_epoch": len(state["history"])})


def save_checkpoint(path: Path, state: dict) -> None:
    """By the first process; the others wait."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getbuffer())
    barrier()


def other_settings(state: dict, settings: Settings) -> list[str]:
    """What a checkpoint was trained with in place of these settings: since then a default has been edited."""
    old, asked = state["settings"], shaping(settings.as_dict()).items()
    return [f"{name} {old[name]!r}, now {new!r}" for name, new in asked if old.get(name, new) != new]


def load_checkpoint(path: Path, settings: Settings, model: nn.Module, first: Tensor) -> dict:
    """The checkpoint at `path`. Raises UserError where it is damaged, of other settings, of another network than
    `model`, or of other code than puts out `first` (see `first_logits`).
    """
    advice = "it is left as it is; --fresh starts over and keeps it beside the new one, as .old"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if bad := archive.testzip():
                raise zipfile.BadZipFile(bad)
        state = {"first_logits": first} | torch.load(path, weights_only=True, map_location="cpu")
        state["settings"] = shaping(settings.as_dict()) | state["settings"]  # older ones may lack these
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch
        if machine.out_of_memory(error):
            raise
        raise UserError(f"the checkpoint {path} is damaged ({type(error).__name__}); {advice}") from error
    if different := other_settings(state, settings):
        raise UserError(f"the checkpoint {path} was trained with other settings ({', '.join(different)}); {advice}")
    shapes = {name: tensor.shape for name, tensor in state["model"].items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if state["network"] != str(model) or shapes != expected:
        raise UserError(f"the checkpoint {path} is of another network than the code builds now; {advice}")
    apart, spread = (state["first_logits"] - first).norm(), (first - first.mean(0)).norm()
    if apart > 0.005 * spread:  # rounding: 0.0001
        what = "the network's forward pass or initialisation, the order of images, or an augmentation"
        raise UserError(f"the checkpoint {path} was trained by other code ({what} has changed since); {advice}")
    return state


# ----------------------------------------------------------------------------------------------------------- results


def score(predictions: Tensor, labels: Tensor, epoch: int) -> dict:
    """The test numbers of one set of weights. `correct` holds one bit per image, packed and in base 64."""
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


def make_result(question: str, run: Run, parameters: dict, state: dict, labels: Tensor) -> dict:
    """A run's result: its checkpoint as far as the run's epochs or patience go. parameters: `all_parameters`."""
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


def seed_files(run_folder: Path) -> list[Path]:
    """A run's results, one per seed; not what a user has put beside them."""
    return [path for path in run_folder.glob("seed*.json") if path.stem.removeprefix("seed").isdecimal()]


def require_same_network(run_folder: Path, parameters: dict, replaced: set[Path]) -> None:
    """Raises UserError where a run's other seeds, but for results that are about to be replaced, have other layers."""
    for path in seed_files(run_folder):
        if path not in replaced and json.loads(path.read_text())["parameters"]["layers"] != parameters["layers"]:
            raise UserError(f"{path} is of another network than the code builds now: move it away, or rename the run")


def as_lines(value) -> str:
    """JSON, of a list with a line per entry (a history's epochs): for people, and for git."""
    if isinstance(value, list):
        return "[\n  " + ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n ]"
    return json.dumps(value, allow_nan=False)


def write_result(path: Path, result: dict, state: dict) -> bool:
    """At `path`, seed<N>.json, and beside it seed<N>.npz: the first layer's filters before training and at the last
    epoch, and the training loss of every step, [epochs, steps]. Returns whether the result is new.
    """
    text = "{\n " + ",\n ".join(f"{json.dumps(name)}: {as_lines(value)}" for name, value in result.items()) + "\n}\n"
    if path.exists() and path.with_suffix(".npz").exists() and json.loads(path.read_text()) == json.loads(text):
        return False
    last = len(result["history"])
    losses = torch.stack(state["step_losses"][:last]).numpy()
    before, after = (state["filters"][epoch].numpy() for epoch in (0, last))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, step_losses=losses, before=before, last=after)
    write_atomic(path.with_suffix(".npz"), buffer.getbuffer())
    write_atomic(path, text.encode())
    return True


# ------------------------------------------------------------------------------------------------------ command line


def whole_number(text: str, least: int = 0) -> int:
    """Type of options."""
    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"must be a whole number from {least} up, not '{text}'")
    return int(text)


positive = partial(whole_number, least=1)


def make_parser(doc: str | None) -> machine.Parser:
    """The options all question scripts share; `doc` is the script's docstring, its manual."""
    parser = machine.Parser(doc)
    add = parser.add_argument
    seeds = parser.add_mutually_exclusive_group()
    add("--list", action="store_true", help="show every run and its state, and exit")
    add("--only", nargs="+", action="extend", metavar="RUN", help="only these runs, named as in --list")
    seeds.add_argument("--seeds", type=positive, default=1, metavar="N", help="train seeds 0 to N-1; default 1")
    seeds.add_argument("--seed", type=whole_number, metavar="N", help="train seed N alone")
    add("--epochs", type=positive, metavar="N", help="in place of a run's own; the overview leaves such a run out")
    add("--sample", action="store_true", help=f"bundled images, up to {SAMPLE_EPOCHS} epochs; into results/sample/")
    add("--data-dir", type=machine.expand, help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    fastest = "auto, the default: the fastest here; the overview leaves out the others"
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=fastest)
    add("--fresh", action="store_true", help="start over; a checkpoint that is there is kept as *.old")
    add("--replot", action="store_true", help="rebuild figures and pages from the results, train nothing")
    add("--figures", choices=("pdf", "svg"), help="write every figure in this format too")
    add("--output-dir", type=machine.expand, default=ROOT / "results", help="default results/")
    add("--checkpoint-dir", type=machine.expand, default=ROOT / "checkpoints", help="default checkpoints/")
    return parser


def output_folder(args: Namespace) -> Path:
    """Where the questions' folders are: those of the sample never stand among the real ones."""
    return args.output_dir / "sample" if args.sample else args.output_dir


def result_path(args: Namespace, question: str, run: Run) -> Path:
    """Where a run's result is written."""
    return output_folder(args) / question / run.name / f"seed{run.settings.seed}.json"


def results_lock(args: Namespace) -> AbstractContextManager:
    """Hold while pages are made, and while results are replaced: other processes do so too."""
    return file_lock(output_folder(args) / ".page.lock")


def on_sample(settings: Settings) -> Settings:
    """These settings as they suit the bundled images: so few need smaller batches, at half the learning rate (but for
    Muon's), and no more than SAMPLE_EPOCHS. Those that are of the sample already stay as they are.
    """
    if settings.data == "cifar10-sample":
        return settings
    epochs, rate = min(settings.epochs, SAMPLE_EPOCHS), settings.learning_rate / 2
    return replace(settings, data="cifar10-sample", batch_size=25, learning_rate=rate, epochs=epochs)


def asked_for(run: Run, args: Namespace, precision: str) -> Run:
    """The run with the command line's settings. With other epochs, or a precision that was asked for, it has a name of
    its own, and does not overwrite the run in the report's setting.
    """
    name = run.name
    settings = replace(run.settings, precision=precision)
    if args.sample:
        settings = on_sample(settings)
    if args.epochs and args.epochs != settings.epochs:
        settings = replace(settings, epochs=args.epochs)
        name += f"_{args.epochs}epochs"
    if args.precision != "auto":
        name += f"_{precision}"
    return Run(name, settings)


def select_runs(runs: Sequence[Run], args: Namespace, device: torch.device) -> list[Run]:
    """The runs of --only, in its order, with the command line's settings; all of them without. Every seed is a run."""
    precision = args.precision
    if precision == "auto" or not (args.list or args.replot):  # these may name another machine's
        precision = machine.choose_precision(precision, device)
    asked = {run.name: asked_for(run, args, precision) for run in runs}
    if len(asked) < len(set(runs)):
        raise UserError("two of the script's runs have one name: rename one")
    by_name = asked | {run.name: run for run in asked.values()}  # --only may name them as --list does
    for name in args.only or ():
        if name not in by_name:
            hint = machine.did_you_mean(name, asked)
            raise UserError(f"--only {name}: no such run; there are {', '.join(asked)}{hint}")
    chosen = dict.fromkeys(by_name[name] for name in args.only or asked)
    seeds = range(args.seeds) if args.seed is None else [args.seed]
    return [Run(run.name, replace(run.settings, seed=seed)) for run in chosen for seed in seeds]


def train_runs(
    question: str, runs: Sequence[Run], args: Namespace, device: torch.device, network=convnet, prepare=None, split=None
) -> Iterator[Run]:
    """Train what is missing of these runs, as `select_runs` gives them; yields each run whose result is new, when it is
    written.

    network, prepare: see `build` and `train`. split: makes other splits of the data. --list only names the runs, and
    with --replot there is nothing to train.
    """
    if args.list and rank() == 0:
        list_runs(question, runs, args)
    if args.list or args.replot:
        return
    machine.require_writable(args.checkpoint_dir)
    data = load_data(args.sample, args.data_dir, device)
    data = split(data) if split else data
    paths = {run: args.checkpoint_dir / f"{run.settings.key()}.pt" for run in runs}
    check_runs(question, paths, args, data["train"], device, network)
    if args.fresh:
        put_aside(paths.values())
    shown = set()
    for run, path in paths.items():
        with file_lock(path.with_suffix(".lock")) if rank() == 0 else nullcontext():  # the others wait at the barrier
            barrier()
            model = build(run, device, network)
            if (description := describe(model)) not in shown and rank() == 0:
                say(description)
            shown.add(description)
            parameters = all_parameters(model)  # before `distribute` exchanges layers
            state = train(run, model, data, device, path, prepare)
            new = False
            if rank() == 0:
                result = make_result(question, run, parameters, state, data["test"].labels)
                with results_lock(args):
                    new = write_result(result_path(args, question, run), result, state)
        if new:
            yield run


def check_runs(
    question: str, paths: dict[Run, Path], args: Namespace, images: Split, device: torch.device, network: Callable
) -> None:
    """What would end a sweep at one of its runs: results of another network, a checkpoint that cannot go on, an
    augmentation that fails (with its own exception). paths: of the checkpoints. images: to train on. Raises UserError.
    """
    replaced = {result_path(args, question, run) for run in paths}
    unread = set() if args.fresh else {path for path in paths.values() if path.exists()}
    for run, path in tqdm(paths.items(), "checking runs", leave=False, delay=2, disable=rank() or None):
        model = build(run, device, network)
        require_same_network(result_path(args, question, run).parent, all_parameters(model), replaced)
        first = first_logits(model, images, run.settings)
        if path in unread:  # several runs may read one training
            load_checkpoint(path, run.settings, model, first)
            unread.remove(path)


def put_aside(paths: Iterable[Path]) -> None:
    """--fresh: keep the checkpoints as .old. All of them at the start: then the same command without it goes on. Raises
    UserError where one was kept before.
    """
    kept = {path: path.with_suffix(".old") for path in paths if path.exists() and rank() == 0}
    for old in kept.values():
        if old.exists():
            raise UserError(f"{old}, kept by an earlier --fresh, would be lost: delete it or move it away")
    for path, old in kept.items():
        with file_lock(path.with_suffix(".lock")):
            if path.exists() and not old.exists():  # else another process has put it aside since
                os.replace(path, old)


def list_runs(question: str, runs: Sequence[Run], args: Namespace) -> None:
    """--list: every run, its checkpoint and its state."""
    width = max(len(run.name) for run in runs)
    for run in runs:
        result = result_path(args, question, run)
        path = args.checkpoint_dir / f"{run.settings.key()}.pt"
        state = run_state(path, run.settings, result.exists())
        say(f"{run.name:<{width}}  seed {run.settings.seed}  {run.settings.epochs:>3} epochs  {path.name}  {state}")


def run_state(path: Path, settings: Settings, has_result: bool) -> str:
    """In words, from the checkpoint at `path`, read without its tensors."""
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        history, other = state["history"], other_settings(state, settings)
    except FileNotFoundError:
        history, other = [], []
    except OSError as error:
        return f"a checkpoint that cannot be read ({error.strerror})"
    except Exception:  # noqa: BLE001 - a damaged file fails anywhere in zipfile, pickle or torch
        return "damaged checkpoint"
    if other:
        return f"a checkpoint of other settings ({', '.join(other)})"
    if stops_after(history, settings):
        return "done" if has_result else "trained, no result yet"
    state = f"epoch {len(history)}" if history else "not started"
    return f"{state} (has a result)" if has_result else state  # of another machine, or of before --fresh
