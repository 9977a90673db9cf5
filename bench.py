"""How fast, against the plain loop everyone writes.

    python bench.py                          # on CIFAR-10, downloaded into data/ where it is missing
    python bench.py --sample                 # the same on the bundled images: no download
    python bench.py --rounds 20 --steps 100  # for a GPU, where a step takes milliseconds

The plain loop is the one of the tutorials (`plain_epoch`): torchvision's CIFAR10 through a DataLoader, PIL images,
PyTorch's own layers, float32 (convolutions on newer GPUs in TF32, PyTorch's default), NCHW, the default Adam,
`loss.item()` at every step. Ours is `common.train_epoch`, set up as the question scripts do. Each has a process of its
own and starts from the same weights; they take turns.

Printed: the machine, and three tables.
- Training question 1's network (as it is, with batch norm, with dropout) and VGG11_bn, all of it: ms per step (median
  over rounds) and images/s of both; how many times faster ours is (median, least and greatest of the rounds' ratios);
  the peak memory of each process (on CUDA: of its tensors; else all of it, without the DataLoader's workers).
- On a CPU, every convolution of the networks in our precision, direction by direction: ms of PyTorch's kernel and of
  ours (parts/layers.py; in float32 Winograd's algorithm, else the matrix product); a star marks what the rule chooses.
- Augmentation: ms per batch of 200, torchvision's on PIL images one by one, as in a DataLoader's worker, and ours.

Two CPU cores need about ten minutes in bfloat16 and several times that without. Let the machine do nothing else
meanwhile.
"""

import argparse
import functools
import itertools
import multiprocessing
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import common
from common import Run, Settings, Split, build, convnet, positive
from parts import machine
from parts.augment import augment
from parts.layers import Conv2d, ConvolutionAsProduct, Dropout, convolution_rule, winograd
from q3_augment_dropout import BLUR, CROP, FLIP, GRAY, JITTER
from q4_vgg_transfer import VGG, vgg

WARM_UP = 3  # steps, or calls
CPU = torch.device("cpu")
LOADER_WORKERS = 2  # of the plain loop. A batch takes 20 ms of CPU to load: nothing beside a CPU step, much for a GPU
SETTLE_SECONDS = 1  # after a turn the DataLoader works ahead, by up to 4 batches, which the plain loop gets for free
PIL_CROP_FLIP = [T.RandomCrop(32, CROP.padding, padding_mode="reflect"), T.RandomHorizontalFlip(FLIP.p)]
PIL_MIXTURE = [
    *PIL_CROP_FLIP,
    T.RandomApply([T.ColorJitter(JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)], JITTER.p),
    T.RandomGrayscale(GRAY.p),
    T.RandomApply([T.GaussianBlur(BLUR.kernel_size, BLUR.sigma)], BLUR.p),
]
AUGMENTATIONS = {  # ours, torchvision's
    "crop + flip": ((CROP, FLIP), PIL_CROP_FLIP),
    "crop, flip, jitter, gray, blur": ((CROP, FLIP, JITTER, GRAY, BLUR), PIL_MIXTURE),
}


class SampleImages(CIFAR10):
    """The bundled training images as torchvision's CIFAR10 gives them."""

    def __init__(self, transform: Callable):
        split = common.load_sample()["train"]
        self.data, self.targets = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.transform, self.target_transform = transform, None


def plain_batches(settings: Settings, data_dir: Path | None) -> Iterator:
    """The batches of a DataLoader, epoch after epoch."""
    flip = [T.RandomHorizontalFlip()] if settings.augment else []
    transform = T.Compose([*flip, T.ToTensor(), T.Normalize(settings.mean, settings.std)])
    sample, folder = settings.data == "cifar10-sample", common.find_data_dir(data_dir)
    data = SampleImages(transform) if sample else CIFAR10(folder, transform=transform)
    workers = {"num_workers": LOADER_WORKERS, "persistent_workers": True}
    loader = DataLoader(data, settings.batch_size, shuffle=True, drop_last=True, **workers)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_setup(run: Run, network: Callable, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The run's network with PyTorch's own layers in place of ours, NCHW, and the default Adam."""
    model = build(run, device, network).to(memory_format=torch.contiguous_format)
    for layer in model.modules():
        if isinstance(layer, (Conv2d, Dropout)):
            layer.__class__ = type(layer).__base__
    adam = torch.optim.Adam(model.parameters(), run.settings.learning_rate, weight_decay=run.settings.weight_decay)
    return model, adam


def plain_epoch(model, optimizer, batches: Iterator, steps: int, device: torch.device) -> None:
    """The baseline: what everyone writes."""
    model.train()
    running_loss = 0.0
    for images, labels in itertools.islice(batches, steps):
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()


@functools.cache  # set up once in a process
def plain_loop(run: Run, network: Callable, data_dir: Path | None, device: torch.device) -> Callable[[int], None]:
    """Returns train(steps): an epoch of so many."""
    batches = plain_batches(run.settings, data_dir)
    model, optimizer = plain_setup(run, network, device)
    return lambda steps: plain_epoch(model, optimizer, batches, steps, device)


@functools.cache
def our_loop(run: Run, network: Callable, data_dir: Path | None, device: torch.device) -> Callable[[int], None]:
    """Returns train(steps): an epoch of so many."""
    machine.choose_device(str(device))  # for what it sets in this process
    images = common.load_data(run.settings.data == "cifar10-sample", data_dir, device)["train"]
    model = build(run, device, network)
    optimizer = common.make_optimizer(model, run.settings, device)
    scaler = common.make_scaler(run.settings, device)

    def train(steps: int) -> None:
        index = torch.arange(steps * run.settings.batch_size) % len(images)  # the sample's come again
        split = Split(images.images[index], images.labels[index])
        common.train_epoch(model, optimizer, scaler, split, run.settings, 1, tqdm(disable=True))

    return train


def peak_memory(device: torch.device) -> float:
    """MiB: of this process; on CUDA, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read_clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def take_turn(make_loop: Callable, what: tuple, steps: int) -> tuple[float, float]:
    """In a process of its own: train for so many steps; returns ms per step, and the peak memory."""
    train = make_loop(*what)
    device = what[-1]
    start = read_clock(device)
    train(steps)
    ms = 1000 * (read_clock(device) - start) / steps
    time.sleep(SETTLE_SECONDS)
    return ms, peak_memory(device)


def print_training(run: Run, network: Callable, args: argparse.Namespace, device: torch.device) -> None:
    """A row of the first table."""
    process = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    silent = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    what = run, network, args.data_dir, device
    rounds = []
    with process(*silent) as plain, process(*silent) as ours:
        for steps in (WARM_UP, *[args.steps] * args.rounds):
            loops = (plain, plain_loop), (ours, our_loop)
            rounds.append([worker.submit(take_turn, loop, what, steps).result() for worker, loop in loops])
    ms = [[turn[0] for turn in turns] for turns in rounds[1:]]
    ratios = [plain_ms / our_ms for plain_ms, our_ms in ms]
    medians = [statistics.median(column) for column in zip(*ms)]
    speeds = [1000 * run.settings.batch_size / median for median in medians]
    cells = "{:>10.1f}{:>8.1f}{:>8.0f}{:>8.0f}".format(*medians, *speeds)
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
    print(f"{run.name:<20}{cells}{ratio:>23}" + "".join(f"{memory:>8.0f}" for _, memory in rounds[-1]))


def measure_ms(device: torch.device, function: Callable, *args) -> float:
    """The median of several calls, after those that warm up."""
    seconds = []
    for _ in range(2 * WARM_UP):
        start = read_clock(device)
        function(*args)
        seconds.append(read_clock(device) - start)
    return 1000 * statistics.median(seconds[WARM_UP:])


def convolution_shapes() -> list[tuple[int, int, int]]:
    """C_in, C_out and pixels per side of every convolution of the networks, for images of 32 x 32."""
    shapes = set()
    for model in (convnet(Settings()), vgg(VGG)):
        size = 32
        for layer in model.features:
            if isinstance(layer, Conv2d):
                shapes.add((layer.in_channels, layer.out_channels, size))
            elif isinstance(layer, nn.MaxPool2d):
                size //= 2
    return sorted(shapes, key=lambda shape: (-shape[2], shape))


def as_product(*tensors: Tensor) -> Tensor:
    return ConvolutionAsProduct.apply(*tensors, True)


def time_convolution(shape: tuple[int, int, int], dtype: torch.dtype, convolve: Callable) -> list[float]:
    """ms of the output, of the gradient of the input and of that of the weights, for a batch of 200."""
    c_in, c_out, size = shape
    images = torch.randn(200, c_in, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, 3, 3).to(dtype, memory_format=torch.channels_last)
    bias = torch.zeros(c_out, dtype=dtype)
    times = [measure_ms(CPU, convolve, images, weight, bias)]
    for wanted in (images, weight):
        wanted.requires_grad_()
        output = convolve(images, weight, bias)
        backward = functools.partial(torch.autograd.grad, output, wanted, torch.randn_like(output), retain_graph=True)
        times.append(measure_ms(CPU, backward))
        wanted.requires_grad_(False)
    return times


def print_convolutions(precision: str) -> None:
    """The second table."""
    dtype = machine.computing_dtype(precision)
    rule = convolution_rule("cpu", dtype)
    name, ours = ("Winograd", winograd) if rule.winograd else ("product", as_product)
    both = functools.partial(F.conv2d, padding=1), ours
    pair = f"PyTorch {name:>8}"
    print(f"\n{'convolutions of 200 images':<28}{'output':>18}{'input gradient':>20}{'weight gradient':>20}")
    print(f"{f'in {precision}, ms':<28}{pair:>18}{pair:>20}{pair:>20}")
    for shape in convolution_shapes():
        everything = shape[2] ** 2 <= rule.product or 0 < rule.winograd <= shape[0]
        cells, chosen = [], (everything, everything, everything or shape[2] ** 2 <= rule.weight_product)
        for their_ms, our_ms, star in zip(*(time_convolution(shape, dtype, f) for f in both), chosen):
            stars = ("", "*") if star else ("*", "")
            cells.append(f"{f'{their_ms:.1f}{stars[0]}':>10}{f'{our_ms:.1f}{stars[1]}':>9}")
        print(f"{'{} -> {}, {} x {}'.format(*shape, shape[2]):<28}{' '.join(cells)}")


def augment_pil(images: list, transform: Callable) -> list:
    return [transform(image) for image in images]


def print_augmentation(images: Tensor) -> None:
    """The third table. images: one batch, uint8 [B, 3, 32, 32]."""
    pil, floats, rng = [to_pil_image(image) for image in images.cpu()], images / 255, torch.Generator()
    print(f"\n{f'augmenting {len(images)} images':<32}{'PIL ms':>9}{'ours ms':>9}{'times faster':>14}")
    for name, (ours, theirs) in AUGMENTATIONS.items():
        pil_ms = measure_ms(CPU, augment_pil, pil, T.Compose(theirs))
        our_ms = measure_ms(images.device, augment, floats, ours, rng, len(images))
        print(f"{name:<32}{pil_ms:>9.1f}{our_ms:>9.1f}{pil_ms / our_ms:>14.1f}")


def main() -> None:
    parser = machine.Parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=positive, default=3, metavar="N", help="turns of each loop; default 3")
    add("--steps", type=positive, default=10, metavar="N", help="steps per turn; default 10")
    add("--sample", action="store_true", help="the bundled excerpt: no download")
    add("--data-dir", type=machine.expand, help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    with machine.session(parser) as (args, device):
        data, precision = "cifar10-sample" if args.sample else "cifar10", machine.choose_precision("auto", device)
        settings, finetune = (replace(base, data=data, precision=precision) for base in (Settings(), VGG))
        train = common.load_data(args.sample, args.data_dir, device)["train"]  # downloads what is missing
        here = machine.environment(device, precision)
        print(
            f"{here['device']}, {here['threads']} threads; torch {here['torch']}; plain fp32, ours {precision}; "
            f"rounds x steps {args.rounds} x {args.steps}, batches of {settings.batch_size}, {data}"
        )
        pair = f"{'plain':>8}{'ours':>8}"
        print(f"\n{'':<20}{'ms per step':>18}{'images/s':>16}{'times faster':>23}{'peak MiB':>16}")
        print(f"{'training':<20}  {pair}{pair}{'(min - max)':>23}{pair}")
        print_training(Run("ConvNet", settings), convnet, args, device)
        print_training(Run("ConvNet, batch norm", replace(settings, batch_norm=True)), convnet, args, device)
        print_training(Run("ConvNet, dropout 0.5", replace(settings, dropout=0.5)), convnet, args, device)
        print_training(Run("VGG11_bn, fine-tuned", finetune), vgg, args, device)
        if device.type == "cpu":
            print_convolutions(precision)
        print_augmentation(train.images[: settings.batch_size])


if __name__ == "__main__":
    main()
