"""Question 4: VGG11_bn, frozen, fine-tuned and from scratch.

    python q4_vgg_transfer.py                              # with torchvision's ImageNet weights, 30 epochs each
    python q4_vgg_transfer.py --weights features.pth       # with other weights; the results are named by them
    python q4_vgg_transfer.py --sample --weights none      # the bundled images, no weights to download

The report: with frozen ImageNet features and a new head, validation accuracy oscillates between 61 and 66 %; fine-tuned
it reaches 89.9 % (test 89.2), from scratch 87.7 % (test 87.3).

The report's frozen backbone has no gradients but stays in training mode: it normalises by every batch's statistics, and
its running statistics move. That is `frozen_train_mode`. Beside it, `frozen` keeps the backbone in evaluation mode: it
always makes the same features of an image, so they are computed once, for every image and its mirror image, and the
epochs train the head on those. What we found: results/q4/README.md
"""

import hashlib
import io
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VGG11_BN_Weights, vgg11_bn
from tqdm import tqdm

import report.figures as fig
from common import Run, Settings, Split, autocast, make_parser, select_runs, train_runs
from parts.augment import HorizontalFlip
from parts.layers import Conv2d
from parts.machine import UserError, expand, file_lock, first_line, rank, session
from report.claims import Claim, better
from report.numbers import Result, Results, figures_of, name_of, read_arrays
from report.page import Question, check_pages, finish_pages, update_pages

IMAGENET = VGG11_BN_Weights.IMAGENET1K_V1
IMAGENET_HASH = Path(IMAGENET.url).stem.split("-")[1]  # its SHA-256 begins with this
MIRROR = HorizontalFlip(p=0.5)
VGG = Settings(
    network="VGG11",
    augment=(MIRROR,),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    learning_rate=1e-3,
    lr_decay=0.99,
    weight_decay=0.0,
    epochs=30,
)


def transfer_runs(label: str, weights: str) -> list[Run]:
    """Frozen both ways and fine-tuned; `weights` is their name and hash, kept in results."""
    finetune = replace(VGG, weights=weights)
    return [
        Run(f"frozen_train_mode_{label}", replace(finetune, backbone="frozen, training mode")),
        Run(f"frozen_{label}", replace(finetune, backbone="frozen")),
        Run(f"finetune_{label}", finetune),
    ]


SCRATCH = Run("scratch", VGG)
RUNS = [*transfer_runs("imagenet", f"{IMAGENET} {Path(IMAGENET.url).name}"), SCRATCH]
STAND_IN = "vgg11_bn_features_tinyimagenet_69a37b9f"  # the weights behind the committed results


def transfer_claim(label: str, note: str = "") -> Claim:
    frozen, finetune = f"frozen_train_mode_{label}", f"finetune_{label}"
    return Claim(
        10,
        "A frozen ImageNet VGG11_bn is worse than ConvNet trained from scratch; fine-tuning it is best (89.2), "
        "above training the same network from scratch (87.3).",
        (better("convnet", frozen), better(finetune, "scratch"), better(finetune, "convnet")),
        note,
    )


CLAIMS = [
    transfer_claim("imagenet"),
    transfer_claim(STAND_IN, "Here with Tiny-ImageNet's weights, a stand-in: not the report's setting."),
]


class VGG11(nn.Module):
    """torchvision's vgg11_bn up to the last of its `features`, then the report's head.

    [B, 3, 32, 32], or the backbone's features [B, 512] -> logits [B, 10]. `backbone` is as in `Settings`. The head
    starts as PyTorch's layers do (why: results/q4/findings.md).
    """

    def __init__(self, backbone: str = "trained"):
        super().__init__()
        self.backbone = backbone
        self.features = vgg11_bn().features.requires_grad_(backbone == "trained")
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                layer.__class__ = Conv2d  # the same parameters, computed faster on CPUs
        self.head = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))

    def train(self, mode: bool = True) -> "VGG11":
        super().train(mode)
        if self.backbone == "frozen":
            self.features.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            inputs = self.features(inputs).flatten(1)  # [B, 512, 1, 1] -> [B, 512]
        return self.head(inputs)


def vgg(settings: Settings, weights: dict[str, Tensor] | None = None) -> VGG11:
    """The network, its backbone with these weights where the settings name some, or fresh."""
    model = VGG11(settings.backbone)
    if settings.weights != "none":
        model.features.load_state_dict(weights)
    return model


def find_weights(option: str) -> tuple[list[Run], dict[str, Tensor] | None]:
    """The runs that --weights asks for, and a file's backbone as a state dict; the file names its runs, with its hash.
    Raises UserError where it cannot be read, or is not of vgg11_bn. torchvision's own file is no stand-in.
    """
    if option in ("imagenet", "none"):
        return RUNS if option == "imagenet" else [SCRATCH], None
    path = expand(option)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --weights {path}: {error.strerror}") from error
    tensors = feature_tensors(read_weights(content, path), option)
    digest = hashlib.sha256(content).hexdigest()
    if digest.startswith(IMAGENET_HASH):
        return RUNS, tensors
    label = f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem)[:60]}_{digest[:8]}"
    name = path.name.encode(errors="replace").decode()  # a name that is not UTF-8
    return [*transfer_runs(label, f"{name} sha256:{digest}"), SCRATCH], tensors


def imagenet_weights() -> dict:
    """torchvision's, from where torch keeps what it has downloaded."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET.url).name)
    try:
        # one process downloads them; a folder that others fill may not be ours to write
        with nullcontext() if cached.exists() else file_lock(cached.with_suffix(".lock")):
            tensors = IMAGENET.get_state_dict(progress=rank() == 0, check_hash=True, weights_only=True)
        if not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(IMAGENET_HASH):
            raise ValueError("its SHA-256 is another")
        return tensors
    except Exception as error:  # the network, or a damaged file
        advice = f"delete {cached} where it is there, or give --weights another file, or none"
        raise UserError(f"torchvision's {IMAGENET} cannot be loaded ({first_line(error)}): {advice}") from error


def read_weights(content: bytes, path: Path):
    """What was saved, with torch's own safety: tensors, plain values and numbers of NumPy."""
    scalar, kinds = np._core.multiarray.scalar, [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
    try:
        with torch.serialization.safe_globals([scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]):
            return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file fails anywhere in zipfile, pickle or torch
        reason = f"is not a state dict ({first_line(error)})"
        if "Unsupported global" in str(error):
            reason = "holds more than tensors (a whole module?), which could run any code"
        advice = "save weights alone, torch.save(model.state_dict(), path), or give --weights another file, or none"
        raise UserError(f"--weights {path} {reason}; {advice}") from error


def feature_tensors(loaded, source: str) -> dict[str, Tensor]:
    """The tensors of vgg11_bn's features by their names there, wherever they are in what people save: as it is or
    under "state_dict", "net", "model", ...; behind any prefix ("module.", "features.", "_orig_mod.backbone."). Without
    how many batches batch norm has seen: nothing reads it.

    Raises UserError where they are not there.
    """
    with torch.device("meta"):  # only the shapes; torchvision's own file is older than batch norm's counters
        features = vgg11_bn().features.state_dict()
    expected = {name: tensor.shape for name, tensor in features.items() if "num_batches" not in name}
    start, found = next(iter(expected)), tensor_dicts(loaded)
    for tensors in found:
        for prefix in [name.removesuffix(start) for name in tensors if f".{name}".endswith(f".{start}")]:
            if all(getattr(tensors.get(prefix + name), "shape", None) == shape for name, shape in expected.items()):
                return {name: tensors[prefix + name] for name in expected}
    most = max(found, key=len, default={})
    there = f"{', '.join(list(most)[:3])}, ... ({len(most)} tensors)" if most else "no tensors"
    raise UserError(
        f"--weights {source}: vgg11_bn's {len(expected)} feature tensors (features.{start}, ...), of their shapes, are "
        f"not among {there}; give a state dict of torchvision's vgg11_bn or of its features"
    )


def tensor_dicts(loaded) -> list[dict[str, Tensor]]:
    """The tensors by name of a dict, and of every dict in it."""
    if not isinstance(loaded, dict):
        return []
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return [tensors, *(found for value in loaded.values() for found in tensor_dicts(value))]


class FeatureSplit(Split):
    """The backbone's features of every image and of its mirror image, float32 [N, 2, 512], in place of the images."""

    def batch(self, index, settings, rng=None, part=slice(None)):
        """As `Split.batch`, with the same draws: features [b, 512], of the mirror image where the draw says so."""
        chosen = index[part].to(self.labels.device)
        mirrored = torch.zeros(len(index), dtype=torch.bool)
        if rng is not None:
            (mirrored,) = MIRROR.draw(len(index), rng)
        return self.images[chosen, mirrored[part].long().to(self.labels.device)], self.labels[chosen]


@torch.no_grad()
def compute_features(model: VGG11, split: Split, settings: Settings, name: str) -> FeatureSplit:
    """Run the backbone once over `split` and over its mirror images."""
    model.eval()
    device = split.labels.device
    features = []
    batches = torch.arange(len(split)).split(settings.batch_size)
    for index in tqdm(batches, desc=f"features of the {name} images", disable=rank() or None):
        images, _ = split.batch(index, settings)
        with autocast(settings, device):
            both = [model.features(view).flatten(1).float() for view in (images, images.flip(3))]
        features.append(torch.stack(both, 1))  # [b, 2, 512]
    return FeatureSplit(torch.cat(features), split.labels)


def features_if_frozen(model: VGG11, data: dict[str, Split], settings: Settings) -> dict[str, Split]:
    """What the loop is fed: the images, or of a backbone frozen in evaluation mode its features, unless augmentations
    other than the mirror would make them too many.
    """
    if settings.backbone != "frozen" or settings.augment != (MIRROR,):
        return data
    return {name: compute_features(model, split, settings, name) for name, split in data.items()}


def figures(results: Results) -> dict[str, fig.Figure]:
    """The validation curves of all runs in the same axes, the report's and question 1's; training loss by step."""
    own = {run: found for run, found in results.items() if found[0].question == "q4"}
    first = next(iter(own.values()))[0]
    heading = "VGG11_bn and question 1's network, on images as they are"
    heading += "" if first.is_sample else "; the report's, on images flipped at random"
    figure, axes = fig.new_axes(first, heading, "validation accuracy (%)")
    for run, found in results.items():
        label, style = (name_of(run), "-") if run in own else (f"question 1's {name_of(run)}", "--")
        fig.plot_curve(axes, found, "validation_accuracy", label, linestyle=style)
    reports = [figure for run in RUNS for figure in figures_of(run.name) if "validation_accuracy" in figure]
    for theirs, style in zip([] if first.is_sample else reports, ("-.", "--", ":")):
        curve, label = theirs["validation_accuracy"], f"report, Figure {theirs['figure']}: {name_of(theirs['run'])}"
        axes.plot(range(1, len(curve) + 1), curve, style, color=fig.GREYS[0], linewidth=1, label=label)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    trained = [found[0] for found in own.values() if found[0].settings["backbone"] == "trained"]
    return {"transfer.png": figure} | ({"steps.png": plot_steps(trained)} if trained else {})


def plot_steps(trained: Sequence[Result]) -> fig.Figure:
    """The report's Figures 32a and 33a: training loss of every step; its epoch means in the middle of epochs."""
    figure, panels = fig.new_grid(1, len(trained), (7, 4.5), sharey=True)
    for axes, result in zip(panels, trained):
        losses = read_arrays(result)["step_losses"]  # [epochs, steps]
        fig.style_axes(axes, "training loss (cross entropy)", "step")
        axes.plot(range(1, losses.size + 1), losses.ravel(), color="lightsteelblue", linewidth=0.4, label="every step")
        middle = (np.arange(len(losses)) + 0.5) * losses.shape[1]
        axes.plot(middle, losses.mean(1), color="tab:orange", label="mean of every epoch")
        run = "scratch" if result.settings["weights"] == "none" else "finetune_imagenet"  # the report's
        for theirs in [] if result.is_sample else figures_of(run):
            if means := theirs.get("train_loss"):
                label = f"report, Figure {theirs['figure']}, mean of every epoch:\n{name_of(run)}"
                middle = (np.arange(len(means)) + 0.5) * losses.shape[1]
                axes.plot(middle, means, color=fig.GREYS[0], linewidth=1, linestyle="--", label=label)
        axes.set(title=f"{name_of(result.run)}, seed {result.seed}", ylim=(0, None))
        axes.legend()
    figure.suptitle(fig.title(trained[0], "training loss of every step"))
    return figure


QUESTION = Question(
    "q4", "q4_vgg_transfer.py", __doc__, RUNS, CLAIMS, figures, baselines=("scratch",), beside=("q1/convnet",)
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    what = "imagenet (default: torchvision's, 500 MB to download), a file with a state dict, or none"
    parser.add_argument("--weights", default="imagenet", metavar="WHAT", help=what)
    with session(parser, argv) as (args, device):
        runs, weights = find_weights(args.weights)
        runs = select_runs(runs, args, device)
        check_pages(QUESTION, runs, args)
        wanted = any(run.settings.weights != "none" for run in runs)
        if wanted and weights is None and not (args.list or args.replot):
            weights = feature_tensors(imagenet_weights(), "imagenet")
        for run in train_runs(QUESTION.name, runs, args, device, partial(vgg, weights=weights), features_if_frozen):
            update_pages(QUESTION, args, run)
        finish_pages(QUESTION, args)


if __name__ == "__main__":
    main()
