"""How fast, against the plain loop everyone writes.

    python bench.py                          # on CIFAR-10, downloaded into data/ where it is missing
    python bench.py --sample                 # the same on the bundled images: no download
    python bench.py --rounds 20 --steps 100  # for a GPU, where a step takes milliseconds

The plain loop, written out in `plain_loop`, is the one of the tutorials: torchvision's CIFAR10 through a DataLoader,
PIL images, PyTorch's own layers, float32, NCHW, the default Adam, `loss.item()` at every step. Ours is
`common.train_epoch`, set up as the question scripts do. Each has a process of its own and starts from the same weights;
after a warm-up they take turns.

Printed: the machine, and three tables.
- Training question 1's network (plain, with batch norm, with dropout) and fine-tuning VGG11_bn: ms per step (median
  over rounds) and images/s of both; how many times faster ours is (median, least and greatest of the rounds' ratios);
  the peak memory of each process (on CUDA: of its tensors; else all of it, Python and libraries included, the
  DataLoader's workers left out); the share of our step that is spent outside the network, on data and logging.
  The last row is question 4's frozen VGG11_bn, 30 epochs with their share of validation and test images: the plain loop
  runs the backbone in every epoch (one is timed, all cost the same), ours once per image and mirror image.
- On a CPU, every convolution of the networks in our precision, direction by direction: ms of PyTorch's kernel and of
  the matrix product (parts/layers.py); a star marks what the rule for this CPU chooses.
- Augmentation: ms per batch of 200, torchvision's on PIL images one by one on one thread, and ours; the share of our
  training step that ours would take.

Two CPU cores need about ten minutes, a GPU a minute or two. Let the machine do nothing else meanwhile.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import common
from common import Run, Settings, Split, build, convnet, load_data, positive
from parts import machine
from parts.augment import augment
from parts.layers import Conv2d, ConvolutionAsProduct, Directions, Dropout, product_rule
from q3_augment_dropout import BLUR, CROP, FLIP, GRAY, JITTER
from q4_vgg_transfer import VGG, features_if_frozen, vgg

CPU = torch.device("cpu")
WARM_UP = 3  # steps, or calls
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


def read_clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def timed(function: Callable, device: torch.device, seconds: list[float]) -> Callable:
    """`function`, adding the seconds of every call to the list `seconds`."""

    def wrapper(*args, **kwargs):
        start = read_clock(device)
        result = function(*args, **kwargs)
        seconds.append(read_clock(device) - start)
        return result

    return wrapper


def median_ms(rounds: int, device: torch.device, function: Callable, *args, **kwargs) -> float:
    seconds: list[float] = []
    for _ in range(WARM_UP + rounds):
        timed(function, device, seconds)(*args, **kwargs)
    return 1000 * statistics.median(seconds[WARM_UP:])


def peak_memory(device: torch.device) -> float:
    """MiB: of this process; on CUDA, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------------------------------------------------- two loops


def held_out_batches(steps: int) -> int:
    """Batches of validation and test images that go with an epoch of so many steps: 11,000 images for 49,000."""
    return max(1, round(steps * 11 / 49))


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


def as_plain(module: nn.Module) -> nn.Module:
    """PyTorch's own layer in place of ours, with its very parameters; of a network, the network with every layer so."""
    if isinstance(module, Dropout):
        return nn.Dropout(module.p)
    if isinstance(module, Conv2d):
        size, padding = module.kernel_size, module.padding
        layer = nn.Conv2d(module.in_channels, module.out_channels, size, padding=padding, device="meta")
        layer.weight, layer.bias = module.weight, module.bias
        return layer
    for name, child in module.named_children():
        setattr(module, name, as_plain(child))
    return module


def plain_setup(run: Run, network: Callable, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The run's network of PyTorch's own layers, NCHW, and the default Adam."""
    model = as_plain(build(run, device, network)).to(memory_format=torch.contiguous_format)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.Adam(trained, run.settings.learning_rate, weight_decay=run.settings.weight_decay)


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
def plain_loop(run: Run, network: Callable, data_dir: Path | None, device: torch.device) -> Callable:
    """Returns train(steps): an epoch of so many. It returns how many it took."""
    batches = plain_batches(run.settings, data_dir)
    model, optimizer = plain_setup(run, network, device)

    def train(steps: int) -> int:
        plain_epoch(model, optimizer, batches, steps, device)
        if run.settings.backbone == "frozen":
            model.eval()
            with torch.no_grad():
                for images, labels in itertools.islice(batches, held_out_batches(steps)):
                    (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        return steps

    return train


@functools.cache
def our_loop(run: Run, network: Callable, data_dir: Path | None, device: torch.device) -> Callable:
    """Returns train(steps, outside): the run's epochs, of so many each. It returns how many it took in all, and adds
    the seconds of data and logging to the list `outside`.
    """
    machine.choose_device(str(device))  # for what it sets in this process
    settings = run.settings
    options = argparse.Namespace(sample=settings.data == "cifar10-sample", data_dir=data_dir)
    images, model = load_data(options, device), build(run, device, network)
    optimizer = common.make_optimizer(model, settings, device)

    def train(steps: int, outside: list[float] | None = None) -> int:
        data = {}
        for name, batches in (("train", steps), ("test", held_out_batches(steps))):
            index = torch.arange(batches * settings.batch_size) % len(images[name])  # the sample's come again
            data[name] = Split(images[name].images[index], images[name].labels[index])
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), tqdm() as bar:
            data = features_if_frozen(model, data, settings)
            if outside is not None:
                for owner, name in ((bar, "update"), (bar, "set_postfix_str"), (data["train"], "batch")):
                    setattr(owner, name, timed(getattr(owner, name), device, outside))
            for epoch in range(1, settings.epochs + 1):
                common.train_epoch(model, optimizer, data["train"], settings, epoch, bar)
                if settings.backbone == "frozen":
                    common.evaluate(model, data["test"], settings)
        return settings.epochs * steps

    return train


# ------------------------------------------------------------------------------------------------------ three tables


class Turn(NamedTuple):
    ms: float  # per training step
    outside: float  # share of the time
    memory: float  # peak, MiB


def take_turn(make_loop: Callable, what: tuple, steps: int, *outside: list[float]) -> Turn:
    """In a process of its own: train for so many steps. what: as `plain_loop` and `our_loop` take."""
    train, device = make_loop(*what), what[-1]
    start = read_clock(device)
    taken = train(steps, *outside)
    seconds = read_clock(device) - start
    time.sleep(SETTLE_SECONDS)
    return Turn(1000 * seconds / taken, sum(map(sum, outside)) / seconds, peak_memory(device))


def start_process() -> ProcessPoolExecutor:
    """One, which Ctrl-C ends in silence."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))


def time_training(run: Run, network: Callable, args: argparse.Namespace, device: torch.device) -> float:
    """Prints a row of the first table; returns the ms of our step."""
    what = run, network, args.data_dir, device
    with start_process() as ours, start_process() as plain:

        def take_turns(steps: int) -> list[Turn]:
            loops = (plain, plain_loop), (ours, our_loop)
            return [worker.submit(take_turn, loop, what, steps).result() for worker, loop in loops]

        try:
            take_turns(WARM_UP)
            rounds = [take_turns(args.steps) for _ in range(args.rounds)]
            # apart: on a GPU, reading the clock costs time
            watched = ours.submit(take_turn, our_loop, what, args.steps, []).result()
        except BrokenProcessPool as error:
            raise machine.UserError("a loop's process died; was there enough memory?") from error
    plain_ms, our_ms = (statistics.median(turn.ms for turn in turns) for turns in zip(*rounds))
    plain_speed, our_speed = (1000 * run.settings.batch_size / ms for ms in (plain_ms, our_ms))
    ratios = [p.ms / o.ms for p, o in rounds]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
    speed = f"{plain_ms:>10.1f}{our_ms:>8.1f}{plain_speed:>8.0f}{our_speed:>8.0f}{ratio:>23}"
    print(f"{run.name:<20}{speed}{rounds[-1][0].memory:>8.0f}{watched.memory:>8.0f}{watched.outside:>10.2%}")
    return our_ms


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


def time_convolution(shape: tuple[int, int, int], dtype: torch.dtype, product: bool, rounds: int) -> list[float]:
    """ms of the output, of the gradient of the input and of that of the weights, for a batch of 200."""
    c_in, c_out, size = shape
    images = torch.randn(200, c_in, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, 3, 3).to(dtype, memory_format=torch.channels_last)
    others = torch.zeros(c_out, dtype=dtype), Directions(product, product, product)
    times = [median_ms(rounds, CPU, ConvolutionAsProduct.apply, images, weight, *others)]
    for wanted in (images, weight):
        wanted.requires_grad_()
        output = ConvolutionAsProduct.apply(images, weight, *others)
        gradient = torch.randn_like(output)
        times.append(median_ms(rounds, CPU, torch.autograd.grad, output, wanted, gradient, retain_graph=True))
        wanted.requires_grad_(False)
    return times


def print_convolutions(precision: str, rounds: int) -> None:
    """The second table."""
    dtype, pair = machine.computing_dtype(precision), "PyTorch  product"
    print(f"\n{'convolutions of 200 images':<28}{'output':>18}{'input gradient':>20}{'weight gradient':>20}")
    print(f"{f'in {precision}, ms':<28}{pair:>18}{pair:>20}{pair:>20}")
    for shape in convolution_shapes():
        theirs, ours = (time_convolution(shape, dtype, product, rounds) for product in (False, True))
        cells = []
        for their_ms, our_ms, product in zip(theirs, ours, product_rule("cpu", dtype).directions(shape[2] ** 2)):
            stars = ("", "*") if product else ("*", "")
            cells.append(f"{f'{their_ms:.1f}{stars[0]}':>10}{f'{our_ms:.1f}{stars[1]}':>9}")
        print(f"{'{} -> {}, {} x {}'.format(*shape, shape[2]):<28}{' '.join(cells)}")


def augment_pil(images: list, transform: Callable) -> list:
    return [transform(image) for image in images]


def print_augmentation(images: Tensor, rounds: int, step_ms: float) -> None:
    """The third table. images: one batch, uint8 [B, 3, 32, 32]; step_ms: of training without any."""
    n, rng, threads = len(images), torch.Generator(), torch.get_num_threads()
    pil, floats = [to_pil_image(image) for image in images.cpu()], images / 255
    print(f"\n{f'augmenting {n} images':<32}{'PIL ms':>9}{'ours ms':>9}{'times faster':>14}{'of our step':>13}")
    for name, (ours, theirs) in AUGMENTATIONS.items():
        torch.set_num_threads(1)  # as in a DataLoader's worker
        pil_ms = median_ms(rounds, CPU, augment_pil, pil, T.Compose(theirs))
        torch.set_num_threads(threads)
        our_ms = median_ms(rounds, images.device, augment, floats, ours, rng, n)
        share = our_ms / (step_ms + our_ms)
        print(f"{name:<32}{pil_ms:>9.1f}{our_ms:>9.1f}{pil_ms / our_ms:>14.1f}{share:>13.2%}")


# -------------------------------------------------------------------------------------------------------------- main


def bench(args: argparse.Namespace, device: torch.device) -> None:
    data = "cifar10-sample" if args.sample else "cifar10"
    settings = Settings(data=data, precision=machine.choose_precision("auto", device), epochs=1)
    finetune = replace(VGG, data=data, precision=settings.precision, epochs=1)
    rows = [
        ("ConvNet", settings, convnet),
        ("ConvNet, batch norm", replace(settings, batch_norm=True), convnet),
        ("ConvNet, dropout 0.5", replace(settings, dropout=0.5), convnet),
        ("VGG11_bn, fine-tuned", finetune, vgg),
        ("VGG11_bn, frozen", replace(finetune, backbone="frozen", epochs=VGG.epochs), vgg),
    ]
    images = load_data(args, device)["train"].images[: settings.batch_size]  # downloads what is missing
    here = machine.environment(device, settings.precision)
    print(
        f"{here['device']}, {here['threads']} threads; torch {here['torch']}; plain fp32, ours {here['precision']}; "
        f"rounds x steps {args.rounds} x {args.steps}, batches of {settings.batch_size}, {data}"
    )
    pair = f"{'plain':>8}{'ours':>8}"
    print(f"\n{'':<20}{'ms per step':>18}{'images/s':>16}{'times faster':>23}{'peak MiB':>16}{'outside':>10}")
    print(f"{'training':<20}  {pair}{pair}{'(min - max)':>23}{pair}{'network':>10}")
    steps_ms = [time_training(Run(name, changed), network, args, device) for name, changed, network in rows]
    if device.type == "cpu":
        print_convolutions(settings.precision, args.rounds)
    print_augmentation(images, args.rounds, steps_ms[0])


def main() -> None:
    parser = machine.Parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=positive, default=3, metavar="N", help="turns of each loop; default 3")
    add("--steps", type=positive, default=10, metavar="N", help="steps per turn; default 10")
    add("--sample", action="store_true", help="the bundled excerpt: no download")
    add("--data-dir", type=machine.expand, help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    with machine.session(parser) as (args, device):
        try:
            bench(args, device)
        except KeyboardInterrupt:  # here no epochs are kept
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
