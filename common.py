"""What the four question scripts share, top to bottom in the order a run needs it:

    settings -> data -> network -> training -> evaluation -> results -> figures -> command line

A question script declares its runs as data and calls `run_question`; every mechanism is here. The protocol (splits,
optimiser, initialisation) is that of the report and of the course exercise it answers, Max Planck HLCV exercise 3.
"""

import argparse
import base64
import contextlib
import ctypes
import dataclasses
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
import time
import urllib.error
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REPORT_TEST_IMAGES = 1000  # the report's test accuracies are "on the 1000 test images": the first ones
SAMPLE_DIR, SAMPLE_COLUMNS, SAMPLE_EPOCHS = ROOT / "sample", 50, 15


class UserError(Exception):
    """Something the user can mend: `main` prints it as one line on standard error and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything one training run is made of. The values are the exercise's where the report gives none.

    All fields but `epochs` and `patience` shape the weights: together they name a trajectory (see `key`). How far a
    trajectory is followed, and which rule stops it, is only a way of reading it. Fields with `help` are options of
    the command line.
    """

    network: str = "ConvNet"
    batch_norm: bool = False
    dropout: float = 0.0
    weights: str = "none"  # what the network starts from: "none" is a random initialisation
    freeze: bool = False  # True: only the new head is trained
    augment: tuple = ()  # batch-wise augmentations, applied in this order
    data: str = "cifar10"  # or "cifar10-sample", the excerpt in sample/
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    batch_size: int = 200
    learning_rate: float = 2e-3
    lr_decay: float = 0.95  # the learning rate is multiplied by this after every epoch
    weight_decay: float = 1e-3  # L2, as torch.optim.Adam adds it to the gradient
    precision: str = field(
        default="auto", metadata={"help": "fp32, bf16, or auto: bf16 where the device computes it natively"}
    )
    seed: int = 0
    epochs: int = field(default=20, metadata={"help": "train this many epochs instead of the report's number"})
    patience: int | None = None  # stop after this many epochs without a better validation accuracy

    def as_dict(self) -> dict:
        """The settings as JSON can hold them; an augmentation is its repr."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            k: [v if isinstance(v, float) else repr(v) for v in value] if isinstance(value, tuple) else value
            for k, value in values.items()
        }

    def trajectory(self) -> dict:
        """The settings that shape the weights."""
        return {k: v for k, v in self.as_dict().items() if k not in ("epochs", "patience")}

    def key(self) -> str:
        """Name of the trajectory's checkpoint, the same for every process, machine and question."""
        digest = hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True).encode()).hexdigest()
        return f"{self.network}-seed{self.seed}-{digest[:10]}"


@dataclass(frozen=True)
class Run:
    """One row of a question: a name, its settings, and what the report printed for it (percent)."""

    name: str
    settings: Settings = Settings()
    reported: dict = field(default_factory=dict)
    build: Callable[[Settings], nn.Module] | None = None  # None: `ConvNet`


def stream_seed(seed: int, epoch: int, stream: str) -> int:
    """A 64-bit seed for one purpose in one epoch: all randomness is a function of (seed, epoch), so none is ever saved."""
    streams = ("init", "order", "augment", "dropout")
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
        image; None leaves the images as they are. part: which of the B images to return; the draws are always made for all B, so that
        several processes sharing a batch draw what one process would.
        Returns float32 images [b, 3, 32, 32], channels_last, and labels [b].
        """
        mine = index[part].to(self.images.device)
        images = self.images[mine].float().div_(255)
        if rng is not None:
            for augmentation in settings.augment:
                drawn = augmentation.draw(len(index), rng)
                images = augmentation.apply(images, *(d[part].to(images.device) for d in drawn))
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (settings.mean, settings.std))
        images = images.sub_(mean).div_(std)
        return images.contiguous(memory_format=torch.channels_last), self.labels[mine]


def find_data_dir(option: str | None = None) -> Path:
    """--data-dir, else the environment variable CIFAR10_DIR, else data/."""
    return Path(option or os.environ.get("CIFAR10_DIR") or ROOT / "data")


def load_cifar10(data_dir: Path) -> dict[str, Split]:
    """The official CIFAR-10, downloaded and verified by torchvision: train (first 49,000), validation (last 1,000), test (10,000).

    Raises UserError where the files are damaged, or missing and not to be had.
    """
    folder = data_dir / CIFAR10.base_folder
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    for name, md5 in files:
        if (folder / name).exists() and not check_integrity(str(folder / name), md5):
            raise UserError(
                f"{folder / name} is not the official file (its MD5 differs): delete it and run again to download CIFAR-10 anew"
            )
    try:
        parts = [
            CIFAR10(data_dir, train=train, download=not all((folder / name).exists() for name, _ in files))
            for train in (True, False)
        ]
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}): put {CIFAR10.base_folder}/ there, point --data-dir or CIFAR10_DIR to it, or use --sample"
        ) from error
    images, labels = zip(
        *((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts)
    )
    return {
        "train": Split(images[0][:49_000], labels[0][:49_000]),
        "validation": Split(images[0][49_000:], labels[0][49_000:]),
        "test": Split(images[1], labels[1]),
    }


def load_sample() -> dict[str, Split]:
    """The bundled, class-balanced excerpt (see sample/cut_sample.py): 1,500 training, 200 validation and 500 test images."""
    splits = {}
    for part, entry in json.loads((SAMPLE_DIR / "index.json").read_text()).items():
        sheet = torchvision.io.decode_image(str(SAMPLE_DIR / f"{part}.png"))  # [3, 32 rows, 32 columns]
        images = sheet.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        splits[part] = Split(images.contiguous(), torch.tensor(entry["labels"]))
    return splits


# ----------------------------------------------------------------------------------------------------------- network


class ConvNet(nn.Module):
    """The report's network (its Figure 10): five blocks of Conv2d 3x3, [BatchNorm2d], MaxPool2d, ReLU, [Dropout], then Linear.

    [B, 3, 32, 32] -> logits [B, 10]. 7,678,474 parameters, 7,682,826 with batch norm.
    """

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 128), (128, 512), (512, 512), (512, 512), (512, 512)):
            layers.append(nn.Conv2d(c_in, c_out, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers += [nn.MaxPool2d(2), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 10)
        init_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))  # [B, 512, 1, 1] -> [B, 512] -> [B, 10]


def init_linear(model: nn.Module) -> None:
    """The exercise's initialisation: the weights of every nn.Linear ~ N(0, 1e-3), its bias 0; the rest stays PyTorch's."""
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
    BatchNorm2d: 2 * C, a scale and a shift per channel.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            formula = (module.kernel_size[0] * module.kernel_size[1] * module.in_channels + 1) * module.out_channels
        elif isinstance(module, nn.Linear):
            formula = module.out_features * (module.in_features + 1)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            formula = 2 * module.num_features
        else:
            continue
        count = sum(p.numel() for p in module.parameters())
        rows.append({"layer": name, "type": type(module).__name__, "parameters": count, "formula": formula})
    return rows


def first_filters(model: nn.Module) -> Tensor | None:
    """A copy of the first convolution's weights, [C_out, 3, K, K] float32 on the CPU; None where nothing convolves."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (
        None
        if convolution is None
        else convolution.weight.detach().float().cpu().clone(memory_format=torch.contiguous_format)
    )


# ---------------------------------------------------------------------------------------------------------- training


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed blocks: else every step returns its activations to the kernel and faults them in again.

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
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (
        device is None
        or not available.get(device.type)
        or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
    ):
        raise UserError(
            f"--device {name} is not there; on this machine: {', '.join(kind for kind, there in available.items() if there)}"
        )
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
    """`auto` is bf16 where it is native, else fp32. Raises UserError for bf16 where it would be emulated."""
    if name == "bf16" and not native_bf16(device):
        raise UserError(
            f"--precision bf16: {device.type} here does not compute bfloat16 natively; use --precision fp32 or auto"
        )
    return ("bf16" if native_bf16(device) else "fp32") if name == "auto" else name


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in bfloat16, weights and optimiser in float32; with fp32, nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def stopping_epoch(accuracies: Sequence[float], epochs: int, patience: int | None = None) -> int | None:
    """The epoch (from 1) after which training ends; None while it goes on.

    It ends after `epochs`, or after `patience` epochs in a row without a validation accuracy above the best so far
    (a tie is no improvement).
    """
    best, best_epoch = -math.inf, 0
    for epoch, accuracy in enumerate(accuracies[:epochs], 1):
        if accuracy > best:
            best, best_epoch = accuracy, epoch
        elif patience is not None and epoch - best_epoch >= patience:
            return epoch
    return epochs if len(accuracies) >= epochs else None


def best_epoch(accuracies: Sequence[float]) -> int:
    """The epoch (from 1) of the highest validation accuracy; the first of equals."""
    return 1 + max(range(len(accuracies)), key=accuracies.__getitem__)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, settings: Settings, epoch: int, progress: tqdm
) -> float:
    """One pass over `split`; returns the mean of the training loss as it was met on the way. Raises UserError when it is not finite."""
    device = split.labels.device
    model.train()
    order = torch.randperm(len(split), generator=generator(settings.seed, epoch, "order"))
    rng = generator(settings.seed, epoch, "augment")
    torch.manual_seed(stream_seed(settings.seed, epoch, "dropout"))
    total = torch.zeros((), device=device)
    for step, index in enumerate(order.split(settings.batch_size)):
        images, labels = split.batch(index, settings, rng)
        with autocast(settings, device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
        progress.update(len(index))
        if step % 20 == 19:  # reading the loss makes a GPU wait: not at every step
            progress.set_postfix_str(
                f"train {require_finite(total, epoch) / ((step + 1) * settings.batch_size):.3f}", refresh=False
            )
    return require_finite(total, epoch) / len(split)


def require_finite(loss: Tensor, epoch: int) -> float:
    if not math.isfinite(value := loss.item()):
        raise UserError(
            f"the training loss became {value} in epoch {epoch}; the checkpoint of epoch {epoch - 1} is kept: lower the learning rate or try --precision fp32"
        )
    return value


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, settings: Settings) -> tuple[float, Tensor]:
    """Mean cross entropy over `split`, and the predicted classes, uint8 [N] on the CPU. Leaves the model as it was."""
    was_training = model.training
    model.eval()
    device = split.labels.device
    total, predictions = torch.zeros((), device=device), []
    for index in torch.arange(len(split)).split(settings.batch_size):
        images, labels = split.batch(index, settings)
        with autocast(settings, device):
            logits = model(images)
        total += F.cross_entropy(logits.float(), labels, reduction="sum")
        predictions.append(logits.argmax(1))
    model.train(was_training)
    return total.item() / len(split), torch.cat(predictions).to(torch.uint8).cpu()


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels.cpu()).sum().item() / len(labels)


def train(run: Run, data: dict[str, Split], device: torch.device, path: Path) -> dict:
    """Follow the run's trajectory from its checkpoint at `path`, if there is one, until the run's rule ends it.

    After every epoch the checkpoint is replaced, so an interrupted run loses at most the epoch it was in, and no epoch is ever trained twice.
    What the run's rule could ask for later is recorded when the epoch passes: the test predictions and the first layer's filters.
    Returns the checkpoint: settings, environment, history (one dict per epoch), predictions [E, N] uint8, filters
    [E + 1, C, 3, K, K] (the first are those before training), model, best (the weights of the best validation accuracy), optimizer.
    """
    settings = run.settings
    torch.manual_seed(stream_seed(settings.seed, 0, "init"))
    model = (run.build or build_convnet)(settings).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    here = environment(device, settings)
    if path.exists():
        state = load_checkpoint(path, settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        filters = first_filters(model)
        state = {
            "settings": settings.trajectory(),
            "environments": [],
            "history": [],
            "predictions": [],
            "filters": [] if filters is None else [filters],
            "best": None,
        }
    history = state["history"]

    images = len(data["train"])
    progress = tqdm(
        total=settings.epochs * images,
        initial=len(history) * images,
        desc=f"{run.name} seed {settings.seed}",
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.02,
        disable=None,
    )
    with progress:
        while stopping_epoch([h["validation_accuracy"] for h in history], settings.epochs, settings.patience) is None:
            start, epoch = time.perf_counter(), len(history) + 1
            progress.set_description_str(f"{run.name} seed {settings.seed} epoch {epoch}/{settings.epochs}")
            lr = settings.learning_rate * settings.lr_decay ** (epoch - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loss = train_epoch(model, optimizer, data["train"], settings, epoch, progress)
            trained = time.perf_counter()
            validation_loss, predictions = evaluate(model, data["validation"], settings)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "validation_loss": validation_loss,
                    "validation_accuracy": accuracy(predictions, data["validation"].labels),
                    "lr": lr,
                }
            )
            state["predictions"].append(evaluate(model, data["test"], settings)[1])
            if state["filters"]:
                state["filters"].append(first_filters(model))
            if best_epoch([h["validation_accuracy"] for h in history]) == epoch:
                state["best"] = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if not state["environments"] or {**state["environments"][-1], "from_epoch": 0} != {**here, "from_epoch": 0}:
                state["environments"].append({**here, "from_epoch": epoch})
            history[-1]["seconds"] = round(time.perf_counter() - start, 2)
            save_checkpoint(path, {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
            report_epoch(progress, run.name, settings, history, images / (trained - start))
    return state


def report_epoch(progress: tqdm, name: str, settings: Settings, history: list[dict], speed: float) -> None:
    """The bar on a terminal; on anything else one line per epoch."""
    last = history[-1]
    numbers = (
        f"train {last['train_loss']:.3f} val {last['validation_loss']:.3f} acc {last['validation_accuracy']:.1f} %"
    )
    progress.set_postfix_str(numbers)
    if progress.disable:
        left = (settings.epochs - last["epoch"]) * statistics.median(h["seconds"] for h in history)
        print(
            f"{name} seed {settings.seed} epoch {last['epoch']}/{settings.epochs}: {numbers}, {speed:.0f} img/s, at most {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def duration(seconds: float) -> str:
    """1:02:03"""
    return tqdm.format_interval(round(seconds))


def build_convnet(settings: Settings) -> nn.Module:
    return ConvNet(settings.batch_norm, settings.dropout)


def environment(device: torch.device, settings: Settings) -> dict:
    """What the numbers may depend on beyond the settings."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu}, {os.cpu_count()} cores"
        if device.type == "cpu"
        else device.type,
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
    }


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target and rename: whatever happens, `path` holds the old content or the new, whole. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path, settings: Settings) -> dict:
    """The checkpoint at `path`. Raises UserError where it is damaged or belongs to other settings; it is left in place."""
    advice = "it is left as it is; start over with --fresh, which keeps it beside the new one as .old"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{bad} has a wrong checksum")
        state = torch.load(path, weights_only=True, map_location="cpu")
        different = [k for k, v in settings.trajectory().items() if state["settings"].get(k) != v]
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch
        raise UserError(f"the checkpoint {path} is damaged ({type(error).__name__}); {advice}") from error
    if different:
        raise UserError(f"the checkpoint {path} was trained with other settings ({', '.join(different)}); {advice}")
    return state


@contextmanager
def trajectory_lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the trajectory's lock file; yields whether it was to be had. The lock of a killed process is free again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# ----------------------------------------------------------------------------------------------------------- results


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion, in percent (Wilson 1927; formula as in Brown, Cai and DasGupta 2001)."""
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def score(predictions: Tensor, labels: Tensor, epoch: int) -> dict:
    """The test numbers of one set of weights. On the sample `first_1000` and `all_10000` hold fewer images: see `images`."""

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
    model = (run.build or build_convnet)(settings)
    environments = [e for e in state["environments"] if e["from_epoch"] <= last]
    return {
        "run": run.name,
        "question": question,
        "seed": settings.seed,
        "settings": settings.as_dict(),
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


def write_result(folder: Path, result: dict, state: dict) -> None:
    """seed<N>.json, and seed<N>_filters.npz with the first layer's filters before training, at the best and at the last epoch."""
    text = json.dumps(result, indent=2)
    text = re.sub(
        r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\s*\n\s*", " ", m[0]), text
    )  # innermost lists on one line
    if state["filters"]:
        epochs = {"before": 0, "best": result["best_epoch"], "last": len(result["history"])}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: state["filters"][epoch].numpy() for name, epoch in epochs.items()})
        write_atomic(folder / f"seed{result['seed']}_filters.npz", buffer.getbuffer())
    write_atomic(folder / f"seed{result['seed']}.json", (text + "\n").encode())


def load_result(path: Path) -> dict:
    """A result as written by `write_result`, checked to hold what figures and tables need. Raises UserError."""
    try:
        result = json.loads(path.read_text())
        for entry in result["history"]:
            for name in ("epoch", "train_loss", "validation_loss", "validation_accuracy", "lr", "seconds"):
                float(entry[name])
        result["history"][result["best_epoch"] - 1]
        for name in ("best", "last"):
            scored = result["test"][name]
            float(scored["first_1000"]["accuracy"]), correct_images(scored)
            low, high = scored["all_10000"]["ci95"]
            float(scored["all_10000"]["accuracy"]), float(low), float(high)
            np.array(scored["confusion"], dtype=int).reshape(10, 10)
        result["run"], result["seed"], result["settings"]["data"], result["reported"], result["parameters"]["trainable"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or delete it and run again"
        ) from error
    return result


# ----------------------------------------------------------------------------------------------------------- figures


def save_figure(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomic(path, buffer.getbuffer())


def title(result: dict, text: str) -> str:
    """Figures of the sample say so."""
    sample = "SAMPLE (not CIFAR-10's full size): " if result["settings"]["data"] != "cifar10" else ""
    return f"{sample}{result['question']} {result['run']}: {text}"


def plot_curve(axes, results: list[dict], name: str, label: str, **style) -> None:
    """One history entry over epochs: the mean over seeds, with a band of one standard deviation where there are several."""
    epochs = min(len(r["history"]) for r in results)
    values = np.array([[h[name] for h in r["history"][:epochs]] for r in results])  # [seeds, epochs]
    x, mean = np.arange(1, epochs + 1), values.mean(0)
    (line,) = axes.plot(x, mean, label=label, **style)
    if len(results) > 1:
        deviation = values.std(0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)


def new_axes(heading: str, ylabel: str, xlabel: str = "epoch"):
    """A figure with one set of axes in the house style; returns both."""
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot(title=heading, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def plot_losses(results: list[dict]) -> Figure:
    """Training and validation loss over epochs, all seeds of one run."""
    figure, axes = new_axes(title(results[0], "loss"), "cross entropy")
    plot_curve(axes, results, "train_loss", "training", color="tab:blue")
    plot_curve(axes, results, "validation_loss", "validation", color="tab:orange")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_accuracy(results: list[dict]) -> Figure:
    """Validation accuracy over epochs, the best epoch of every seed marked, and the report's number where it prints one."""
    figure, axes = new_axes(title(results[0], "validation accuracy"), "accuracy (%)")
    plot_curve(axes, results, "validation_accuracy", "validation", color="tab:orange")
    for i, result in enumerate(results):
        best, value = result["best_epoch"], result["history"][result["best_epoch"] - 1]["validation_accuracy"]
        axes.plot(best, value, "o", color="tab:red", label=None if i else "best epoch")
        if len(results) == 1:
            axes.annotate(
                f"{value:.1f} % at epoch {best}", (best, value), (0, 8), textcoords="offset points", ha="center"
            )
    if isinstance(reported := results[0]["reported"].get("validation"), float):
        axes.axhline(reported, color="gray", linestyle=":", label=f"report: {reported:.1f} %")
    axes.margins(y=0.12)
    axes.legend(loc="lower right")
    return figure


def plot_confusion(results: list[dict]) -> Figure:
    """Confusion matrix of the best weights on all test images, summed over seeds; each row in percent of its true class."""
    counts = sum(np.array(r["test"]["best"]["confusion"]) for r in results)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(7, 6))
    axes = figure.add_subplot(
        title=title(results[0], "test confusion (% of the true class)"), xlabel="predicted", ylabel="true"
    )
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    for (row, column), value in np.ndenumerate(percent):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    return figure


FILTER_PIXEL, FILTER_GAP, FILTER_LABEL = (
    8,
    5,
    13,
)  # in pixels of the grid image: a weight's edge, the gap, the number's line


def filter_tile(number: int, size: int = 3, columns: int = 16) -> tuple[int, int]:
    """Top left pixel (y, x) of filter `number` (from 1, row by row, as the report numbers them) in `filter_grid`."""
    row, column = divmod(number - 1, columns)
    edge = size * FILTER_PIXEL + FILTER_GAP
    return row * (edge + FILTER_LABEL) + FILTER_LABEL, column * edge


def filter_grid(weight: np.ndarray, scale: float, columns: int = 16) -> np.ndarray:
    """Filters [C_out, 3, K, K] as one RGB image in [0, 1] on white: grey is 0, a full colour +-`scale`."""
    size = weight.shape[-1]
    y, x = filter_tile(columns * math.ceil(len(weight) / columns), size, columns)
    grid = np.ones((y + size * FILTER_PIXEL, x + size * FILTER_PIXEL, 3))
    for number, kernel in enumerate(np.clip(0.5 + weight / (2 * scale), 0, 1), 1):
        y, x = filter_tile(number, size, columns)
        tile = kernel.transpose(1, 2, 0).repeat(FILTER_PIXEL, 0).repeat(FILTER_PIXEL, 1)
        grid[y : y + len(tile), x : x + len(tile)] = tile
    return grid


def visualize_filters(weights: dict[str, np.ndarray], heading: str = "") -> Figure:
    """First-layer filters [C_out, 3, K, K] as numbered grids of 16 columns, one panel per entry of `weights`, side by side.

    All panels share one scale: grey is 0 and a full colour the 99.8th percentile of the absolute weights of all panels.
    """
    scale = float(np.quantile(np.abs(np.concatenate([w.ravel() for w in weights.values()])), 0.998))
    figure = Figure(figsize=(7.5 * len(weights), 6))
    for axes, (name, weight) in zip(figure.subplots(1, len(weights), squeeze=False)[0], weights.items()):
        axes.imshow(filter_grid(weight, scale), interpolation="nearest")
        for number in range(1, len(weight) + 1):
            y, x = filter_tile(number, weight.shape[-1])
            axes.text(x, y - 2, str(number), fontsize=6.5, va="bottom", color="0.25")
        axes.set_title(f"{name} (grey = 0, full colour = ±{scale:.2f})", fontsize=10)
        axes.axis("off")
    figure.suptitle(heading, y=0.97)
    figure.tight_layout()
    return figure


def plot_run(results: list[dict], folder: Path) -> None:
    """Every figure of one run, from its results (all seeds) and saved filters alone."""
    save_figure(plot_losses(results), folder / "losses.png")
    save_figure(plot_accuracy(results), folder / "accuracy.png")
    save_figure(plot_confusion(results), folder / "confusion.png")
    path = folder / f"seed{results[0]['seed']}_filters.npz"
    if path.exists():
        try:
            saved = np.load(path, allow_pickle=False)
            before, after = saved["before"], saved["best"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): restore it, or delete it and run again") from error
        both = {"before training": before, f"after, epoch {results[0]['best_epoch']}": after}
        save_figure(visualize_filters(both, title(results[0], "first-layer filters")), folder / "filters.png")


# ------------------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def positive(text: str) -> int:
    """Type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not '{text}'")
    return int(text)


def make_parser(doc: str) -> Parser:
    """The options all four scripts share; those that are settings take their help from `Settings`."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = {f.name: f.metadata.get("help") for f in dataclasses.fields(Settings)}
    parser.add_argument("--list", action="store_true", help="show every run, its state and the time left, and exit")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these runs (names as in --list)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="train seeds 0 to N-1; default 1")
    parser.add_argument("--epochs", type=positive, metavar="N", help=settings["epochs"])
    parser.add_argument("--sample", action="store_true", help="the bundled excerpt: no download, output under sample/")
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=settings["precision"])
    parser.add_argument("--fresh", action="store_true", help="start over; old checkpoints stay as *.old")
    parser.add_argument("--replot", action="store_true", help="rebuild every figure from the results, train nothing")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "results", help="default results/")
    parser.add_argument("--checkpoint-dir", type=Path, default=ROOT / "checkpoints", help="default checkpoints/")
    return parser


def select_runs(runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """The runs asked for, with the command line's settings. A run at another number of epochs has another name."""
    if unknown := set(args.only or ()) - {run.name for run in runs}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such run; there are {', '.join(r.name for r in runs)}")
    selected = []
    for run in runs:
        if args.only and run.name not in args.only:
            continue
        epochs = min(run.settings.epochs, SAMPLE_EPOCHS) if args.sample else run.settings.epochs
        name = run.name if args.epochs in (None, epochs) else f"{run.name}_{args.epochs}epochs"
        data = "cifar10-sample" if args.sample else "cifar10"
        settings = dataclasses.replace(run.settings, epochs=args.epochs or epochs, precision=args.precision, data=data)
        selected.append(dataclasses.replace(run, name=name, settings=settings))
    return selected


def require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another with --output-dir or --checkpoint-dir"
        ) from error


def load_results(folder: Path, run: Run) -> list[dict]:
    """The results of a run, one per seed, in order of seeds; empty where it has none yet."""
    paths = [p for p in (folder / run.name).glob("seed*.json") if re.fullmatch(r"seed\d+\.json", p.name)]
    return sorted((load_result(path) for path in paths), key=lambda r: r["seed"])


def print_parameters(model: nn.Module) -> None:
    print(f"{'layer':<16}{'type':<14}{'PyTorch':>12}{'formula':>12}")
    for row in parameter_table(model):
        print(f"{row['layer']:<16}{row['type']:<14}{row['parameters']:>12,}{row['formula']:>12,}")
    print(f"{'trainable parameters':<30}{count_parameters(model):>12,}")


def print_results(folder: Path, runs: Sequence[Run]) -> None:
    """The runs' numbers beside the report's, in percent."""
    print(
        f"\n{'run':<28}{'seed':>4}{'epochs':>7}{'best':>5}{'val':>7}{'test 1000':>10}{'test all':>9}  {'95 %':<13}report"
    )
    for run in runs:
        for r in load_results(folder, run):
            test, best = r["test"]["best"], r["best_epoch"]
            low, high = test["all_10000"]["ci95"]
            reported = ", ".join(f"{k} {v}" for k, v in r["reported"].items()) or "-"
            print(
                f"{run.name:<28}{r['seed']:>4}{len(r['history']):>7}{best:>5}{r['history'][best - 1]['validation_accuracy']:>7.1f}"
                f"{test['first_1000']['accuracy']:>10.1f}{test['all_10000']['accuracy']:>9.2f}  {low:.1f} - {high:<6.1f}{reported}"
            )


def list_runs(runs: Sequence[Run], args: argparse.Namespace, folder: Path) -> None:
    """--list: every run's state, and an estimate of the time left from the epochs trained so far."""
    rows, seconds = [], []
    for run in runs:
        for seed in range(args.seeds):
            settings = dataclasses.replace(run.settings, seed=seed)
            path = args.checkpoint_dir / f"{settings.key()}.pt"
            try:
                history = torch.load(path, weights_only=True, mmap=True)["history"] if path.exists() else []
                result = (folder / run.name / f"seed{seed}.json").exists()
                last = stopping_epoch([h["validation_accuracy"] for h in history], settings.epochs, settings.patience)
                state = (
                    "done"
                    if result
                    else "trained, not written"
                    if last
                    else f"epoch {len(history)}"
                    if history
                    else "not started"
                )
                rows.append(
                    (run.name, seed, settings.epochs, state, 0 if result or last else settings.epochs - len(history))
                )
                seconds += [h["seconds"] for h in history]
            except Exception as error:  # as in load_checkpoint
                rows.append((run.name, seed, settings.epochs, f"damaged checkpoint ({type(error).__name__})", 0))
    epoch_seconds = statistics.median(seconds) if seconds else math.nan
    for name, seed, epochs, state, left in rows:
        time_left = (
            f"at most {duration(left * epoch_seconds)} left"
            if left and seconds
            else f"{left} epochs left"
            if left
            else ""
        )
        print(f"{name:<28} seed {seed}  {epochs:>3} epochs  {state:<22}{time_left}")


def train_runs(question: str, runs: Sequence[Run], args: argparse.Namespace, folder: Path) -> None:
    """Train what is missing of every run and seed, and write its result as soon as it is there."""
    keep_large_blocks()
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    require_writable(args.output_dir)
    require_writable(args.checkpoint_dir)
    data = load_sample() if args.sample else load_cifar10(find_data_dir(args.data_dir))
    data = {part: split.to(device) for part, split in data.items()}
    shown = set()
    queue = [
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, seed=seed, precision=precision))
        for run in runs
        for seed in range(args.seeds)
    ]
    renewed, busy = set(), 0
    while queue:
        run = queue.pop(0)
        settings = run.settings
        path = args.checkpoint_dir / f"{settings.key()}.pt"
        with trajectory_lock(path, wait=busy > len(queue)) as mine:
            if not mine:  # another process trains it: do the others first, then wait for it
                print(
                    f"{run.name} seed {settings.seed} is being trained by another process; coming back to it",
                    file=sys.stderr,
                )
                queue.append(run)
                busy += 1
                continue
            busy = 0
            if args.fresh and path not in renewed and path.exists():
                os.replace(path, path.with_suffix(".old"))
            renewed.add(path)
            model = (run.build or build_convnet)(settings)
            if (table := str(parameter_table(model))) not in shown:
                print_parameters(model)
                shown.add(table)
            state = train(run, data, device, path)
        write_result(folder / run.name, read_run(question, run, state, data["test"].labels), state)
        plot_run(load_results(folder, run), folder / run.name)


def run_question(question: str, doc: str, runs: Sequence[Run], argv: Sequence[str] | None = None) -> None:
    """The main program of a question script: parse the command line, train, write results and figures."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        args = make_parser(doc).parse_args(argv)
        selected = select_runs(runs, args)
        folder = args.output_dir / ("sample" if args.sample else "") / question
        if args.list:
            return list_runs(selected, args, folder)
        if args.replot:
            require_writable(args.output_dir)
            for run in selected:
                if results := load_results(folder, run):
                    plot_run(results, folder / run.name)
        else:
            train_runs(question, selected, args, folder)
        print_results(folder, selected)
        print(f"\nfigures and numbers: {folder}/")
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; finished epochs are kept, the same command goes on after the last of them", 130))


def fail(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code
