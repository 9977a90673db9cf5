"""Question 4: VGG11_bn, frozen, fine-tuned and from scratch.

    python q4_vgg_transfer.py                              # with torchvision's ImageNet weights, 30 epochs each
    python q4_vgg_transfer.py --weights features.pth       # with other weights; the results are named by them
    python q4_vgg_transfer.py --sample --weights none      # the bundled images, no weights to download

The report: with frozen ImageNet features and a new head, validation accuracy oscillates between 61 and 66 %; fine-tuned
it reaches 89.9 % (test 89.2), from scratch 87.7 % (test 87.3). Question 1's network stands beside them, where
q1_convnet.py has trained it.

Here, with Tiny-ImageNet features in place of ImageNet's (not the report's setting), of all 10,000 test
images: frozen 77.9 % [77.1, 78.7], within noise of question 1's network; fine-tuned 88.3 % [87.7, 89.0];
from scratch 85.2 % [84.5, 85.9].

The report's frozen backbone has no gradients but stays in training mode: it normalises by every batch's statistics, and
its running statistics move. That is `frozen_train_mode`. Beside it, `frozen` keeps the backbone in evaluation mode: it
always makes the same features of an image, so they are computed once, for every image and its mirror image, and the
epochs train the head on those.
"""

import argparse
import functools
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models import VGG11_BN_Weights, vgg11_bn
from tqdm import tqdm

from common import (
    Claim,
    HorizontalFlip,
    Question,
    Run,
    Settings,
    Split,
    UserError,
    autocast,
    init_linear,
    judge,
    new_axes,
    plot_curve,
    rank,
    run_question,
    title,
)
from machine import fast_convolutions

IMAGENET = VGG11_BN_Weights.IMAGENET1K_V1
VGG = Settings(
    network="VGG11",
    augment=(HorizontalFlip(p=0.5),),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    learning_rate=1e-3,
    lr_decay=0.99,
    weight_decay=0.0,
    epochs=30,
)


class VGG11(nn.Module):
    """torchvision's vgg11_bn without its average pooling and fully connected layers, and the report's head.

    [B, 3, 32, 32], or the backbone's features [B, 512] -> logits [B, 10]. `backbone` is as in `Settings`: a frozen one
    has no gradients and stays in evaluation mode, unless it is frozen in training mode, where batch norm normalises by
    the batch and its running statistics move. From scratch the head starts as the exercise says, with pretrained
    features as PyTorch does (the report's code).
    """

    def __init__(self, backbone: str = "trained", pretrained: bool = False):
        super().__init__()
        self.backbone = backbone
        self.features = fast_convolutions(vgg11_bn().features).requires_grad_(backbone == "trained")
        self.head = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))
        if not pretrained:
            init_linear(self.head)

    def train(self, mode: bool = True) -> "VGG11":
        super().train(mode)
        if self.backbone == "frozen":
            self.features.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            inputs = self.features(inputs).flatten(1)  # [B, 512, 1, 1] -> [B, 512]
        return self.head(inputs)


def weights_file(source: str) -> Path:
    """The file of `source`; torchvision's lies where torch keeps what it has downloaded, its hash begun in its name."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET.url).name) if source == "imagenet" else Path(source)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def load_weights(source: str) -> dict[str, Tensor]:
    """The backbone's state dict, float32: from torchvision ("imagenet", hash checked), or a file with its `features.*`.

    Raises UserError where they are not to be had, or are not those of vgg11_bn.
    """
    try:
        if source == "imagenet":
            cached = weights_file(source)
            if cached.exists() and not sha256(cached).startswith(
                cached.stem.split("-")[1]
            ):  # torch does not look again
                raise ValueError(f"{cached} is damaged: its SHA-256 is another; delete it")
            state = IMAGENET.get_state_dict(progress=rank() == 0, check_hash=True, weights_only=True)
        else:
            state = torch.load(source, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch; a download in the network
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        what = (
            f"torchvision's {IMAGENET} cannot be loaded"
            if source == "imagenet"
            else f"--weights {source} is not a state dict"
        )
        raise UserError(f"{what} ({reason}); give --weights another file, or none") from error
    with torch.device("meta"):  # only the shapes
        expected = {f"features.{name}": tensor.shape for name, tensor in vgg11_bn().features.state_dict().items()}
    shapes = {k: v.shape for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if wrong := [name for name, shape in expected.items() if shapes.get(name) != shape]:
        raise UserError(
            f"--weights {source}: {len(wrong)} of vgg11_bn's {len(expected)} feature tensors are missing or of another "
            f"shape ({wrong[0]}, ...); give a state dict of torchvision's vgg11_bn or of its features"
        )
    tensors = {name.removeprefix("features."): state[name] for name in expected}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


class FeatureSplit(Split):
    """The backbone's features of every image and of its mirror image, float32 [N, 2, 512], in place of the images."""

    def batch(self, index, settings, rng=None, part=slice(None)):
        """As `Split.batch`, with the same draws: features [b, 512], of the mirror image where the draw says so."""
        chosen = index[part].to(self.labels.device)
        mirrored = torch.zeros(len(index), dtype=torch.bool)
        if rng is not None:
            (mirrored,) = settings.augment[0].draw(len(index), rng)
        return self.images[chosen, mirrored[part].long().to(self.labels.device)], self.labels[chosen]


@torch.no_grad()
def compute_features(model: VGG11, split: Split, settings: Settings, mirror: bool, name: str) -> FeatureSplit:
    """Run the backbone once over `split` and, with `mirror`, over its mirror images."""
    model.eval()
    device, features = split.labels.device, []
    batches = torch.arange(len(split)).split(settings.batch_size)
    for index in tqdm(batches, desc=f"features of the {name} images", disable=True if rank() else None):
        images, _ = split.batch(index, settings)
        with autocast(settings, device):
            both = [model.features(x).flatten(1).float() for x in ([images, images.flip(3)] if mirror else [images])]
        features.append(torch.stack(both, 1))  # [b, 1 or 2, 512]
    return FeatureSplit(torch.cat(features), split.labels)


@dataclass(frozen=True)
class VGGRun(Run):
    """A run of VGG11_bn from the weights of `source`: "imagenet", a file, or "none"."""

    source: str = "none"

    def network(self) -> VGG11:
        model = VGG11(self.settings.backbone, pretrained=self.source != "none")
        if self.source != "none":
            model.features.load_state_dict(load_weights(self.source))
        return model

    def provenance(self) -> dict:
        return {} if self.source == "none" else {"weights_sha256": sha256(weights_file(self.source))}

    def inputs(self, model: VGG11, data: dict[str, Split]) -> dict[str, Split]:
        if self.settings.backbone != "frozen":
            return data
        return {n: compute_features(model, s, self.settings, n != "test", n) for n, s in data.items()}


def transfer_runs(source: str, label: str, weights: str, reported: bool = False) -> list[Run]:
    """Frozen both ways and fine-tuned from these weights; `weights` is their name and hash, kept in the results."""
    finetune = replace(VGG, weights=weights)
    train_mode = replace(finetune, backbone="frozen, training mode")
    numbers = [{"validation": "61-66"}, {"validation": 89.9, "test": 89.2}] if reported else [{}, {}]
    return [
        VGGRun(f"frozen_train_mode_{label}", train_mode, numbers[0], source),
        VGGRun(f"frozen_{label}", replace(finetune, backbone="frozen"), {}, source),
        VGGRun(f"finetune_{label}", finetune, numbers[1], source),
    ]


SCRATCH = VGGRun("scratch", VGG, {"validation": 87.7, "test": 87.3})
RUNS = [*transfer_runs("imagenet", "imagenet", f"{IMAGENET} {Path(IMAGENET.url).name}", reported=True), SCRATCH]


def with_weights(runs: list[Run], args: argparse.Namespace) -> list[Run]:
    """The runs, starting from the weights asked for; from others than torchvision's they are named by file and hash."""
    if args.weights == "imagenet":
        return runs
    if args.weights == "none":
        return [SCRATCH]
    path = Path(args.weights)
    try:
        digest = sha256(path)
    except OSError as error:
        raise UserError(f"cannot read --weights {path}: {error.strerror}") from error
    load_weights(str(path))  # before anything is trained
    return [*transfer_runs(str(path), f"{path.stem}_{digest[:8]}", f"{path.name} sha256:{digest}"), SCRATCH]


def transfer_pairs(label: str) -> tuple[tuple[str, str], ...]:
    """Claim 10's comparisons, with the weights of this label."""
    frozen, finetune = f"frozen_train_mode_{label}", f"finetune_{label}"
    return ("convnet", frozen), (finetune, "scratch"), (finetune, "convnet")


def stand_ins(results: dict[str, list[dict]], folder: Path) -> dict | None:
    """Claim 10 judged with every other set of weights there is (named by file and hash); not the report's setting."""
    names = [re.fullmatch(r"(?:frozen_train_mode|frozen|finetune)_(.+_[0-9a-f]{8})", name) for name in results]
    pairs = [pair for label in sorted({name[1] for name in names if name}) for pair in transfer_pairs(label)]
    return judge(Claim(10, "", tuple(pairs)), results, folder) if pairs else None


CLAIMS = [
    Claim(
        10,
        "A frozen ImageNet VGG11_bn is worse than the own network trained from scratch; fine-tuning it is best (89.2), "
        "above training the same network from scratch (87.3).",
        transfer_pairs("imagenet"),
    ),
    Claim(10, "The same with other weights than ImageNet's: not the report's setting.", criterion=stand_ins),
]


def figures(results: dict[str, list[dict]]) -> dict[str, Figure]:
    """The validation curves of all runs in the same axes, and question 1's network."""
    first = next(iter(results.values()), [{}])[0]
    if first.get("question") != "q4":
        return {}
    figure, axes = new_axes(title(first, "VGG11_bn and question 1's network"), "validation accuracy (%)")
    for name, found in results.items():
        own = found[0]["question"] == "q4"
        plot_curve(axes, found, "validation_accuracy", name if own else f"question 1's {name}", ls="-" if own else "--")
    axes.legend(fontsize=8)
    return {"transfer.png": figure}


def parameter_rows(results: dict[str, list[dict]]) -> list[list[str]]:
    """Parameters of backbone and head, and how many of them are trained."""
    rows = [["run", "backbone", "head", "trained", "starts from"]]
    for name, (result, *_) in results.items():
        backbone, head = (
            sum(r["parameters"] for r in result["parameters"]["layers"] if r["layer"].startswith("features") == first)
            for first in (True, False)
        )
        trained = result["parameters"]["trainable"]
        rows.append([name, f"{backbone:,}", f"{head:,}", f"{trained:,}", result["settings"]["weights"]])
    return rows if results else []


QUESTION = Question(
    "q4",
    "Question 4: VGG11_bn, frozen, fine-tuned and from scratch",
    __doc__,
    RUNS,
    CLAIMS,
    figures,
    parameter_rows,
    beside={"convnet": "q1"},
    options={
        "--weights": {
            "default": "imagenet",
            "metavar": "WHAT",
            "help": "imagenet (default: torchvision's, 500 MB to download), a file with a state dict, or none",
        }
    },
    configure=with_weights,
)

if __name__ == "__main__":
    run_question(QUESTION)
