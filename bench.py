"""How fast, against the plain loop everyone writes.

    python bench.py                          # on CIFAR-10, downloaded into data/ where it is missing
    python bench.py --sample                 # the same on the bundled images: no download
    python bench.py --rounds 20 --steps 100  # for a GPU, where a step takes milliseconds

The plain loop, written out in `plain_loop`, is the one of the tutorials: torchvision's CIFAR10 through a DataLoader,
PIL images, float32, NCHW, the default Adam, `loss.item()` at every step. Ours is `common.train_epoch`, set up as the
question scripts do. Each has a process of its own and starts from the same weights; after a warm-up they take turns.

Printed: the machine, and three tables.
- Training question 1's network (plain, with batch norm, with dropout) and fine-tuning VGG11_bn: ms per step (median over
  rounds) and images/s of both; how many times faster ours is (median, least and greatest of the rounds' ratios); the
  peak memory of each process (on CUDA: of its tensors; else all of it, Python and libraries included, the DataLoader's
  workers left out); the share of our step that is spent outside the network, on data and logging.
  The last row is question 4's frozen VGG11_bn, 30 epochs with their share of validation and test images: the plain loop
  runs the backbone in every epoch (one is timed, all cost the same), ours once per image and mirror image.
- On a CPU, every convolution of the networks in our precision, direction by direction: ms of PyTorch's kernel and of the
  product of matrices (`machine.ConvolutionAsProduct`); a star marks what the rule for this CPU chooses.
- Augmentation: ms per batch of 200, torchvision's on PIL images one by one in one process, and ours; the share of our
  training step that ours would take.

Two CPU cores need about ten minutes, a GPU a minute or two. Let the machine do nothing else meanwhile.
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # on Windows
    resource = None

from common import (
    Run,
    Settings,
    Split,
    build,
    evaluate,
    find_data_dir,
    generator,
    load_cifar10,
    load_sample,
    make_optimizer,
    positive,
    stream_seed,
    train_epoch,
)

# isort: split
# common stands first: it answers Ctrl-C while torch loads

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from augment import HorizontalFlip, augment
from machine import (
    Conv2d,
    ConvolutionAsProduct,
    Directions,
    Dropout,
    Parser,
    UserError,
    choose_device,
    choose_precision,
    computing_dtype,
    environment,
    expand,
    keep_large_blocks,
    product_rule,
    session,
    tell,
)
from q3_augment_dropout import BLUR, CROP, FLIP, GRAY, JITTER
from q4_vgg_transfer import VGG, build_vgg, compute_features

LOADER_WORKERS = 2  # of the plain loop. A batch takes 20 ms of CPU to load: nothing beside a CPU step, much for a GPU
SETTLE_SECONDS = 1  # after a turn the DataLoader works ahead, by up to 4 batches, which the plain loop gets for free
WARM_UP_STEPS = 3
EVALUATED = 11 / 49  # validation and test images for every training image
PIL_CROP_FLIP = [T.RandomCrop(32, CROP.padding, padding_mode="reflect"), T.RandomHorizontalFlip(FLIP.p)]
PIL_MIXTURE = [
    *PIL_CROP_FLIP,
    T.RandomApply([T.ColorJitter(JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)], JITTER.p),
    T.RandomGrayscale(GRAY.p),
    T.RandomApply([T.GaussianBlur(BLUR.kernel_size, BLUR.sigma)], BLUR.p),
]
AUGMENTATIONS = [  # name, ours, torchvision's
    ("crop + flip", (CROP, FLIP), PIL_CROP_FLIP),
    ("crop, flip, jitter, gray, blur", (CROP, FLIP, JITTER, GRAY, BLUR), PIL_MIXTURE),
]


def timed(function: Callable, device: torch.device, spent: list[float]) -> Callable:
    """`function`, adding the seconds of every call to the list `spent`."""

    def read_clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def wrapper(*args, **kwargs):
        start = read_clock()
        result = function(*args, **kwargs)
        spent.append(read_clock() - start)
        return result

    return wrapper


def peak_memory(device: torch.device) -> float:
    """MiB: of this process; on CUDA, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------------------------------------------------- two loops


class SampleImages(Dataset):
    """The bundled training images as torchvision's CIFAR10 would give them."""

    def __init__(self, transform: Callable):
        split = load_sample()["train"]
        self.images, self.labels = [to_pil_image(image) for image in split.images], split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def plain_loader(settings: Settings, data_dir: Path | None, transforms: Sequence[Callable] = ()) -> Iterator:
    """The training batches of a DataLoader, epoch after epoch."""
    transform = T.Compose([*transforms, T.ToTensor(), T.Normalize(settings.mean, settings.std)])
    sample = settings.data == "cifar10-sample"
    dataset = SampleImages(transform) if sample else CIFAR10(find_data_dir(data_dir), transform=transform)
    loader = DataLoader(
        dataset, batch_size=200, shuffle=True, num_workers=LOADER_WORKERS, persistent_workers=True, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_epoch(model, optimizer, batches: Iterator, steps: int, device: torch.device) -> None:
    """The baseline: what everyone writes."""
    running_loss = 0.0
    for images, labels in itertools.islice(batches, steps):
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()


def evaluation_batches(steps: int) -> int:
    """How many batches are evaluated after an epoch of so many steps."""
    return max(1, round(steps * EVALUATED))


def plain_setup(run: Run, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The run's network of PyTorch's own layers, and the default Adam."""
    torch.manual_seed(stream_seed(run.settings.seed, 0, "init"))
    model = run.build(run.settings).to(device)
    for module in model.modules():
        module.__class__ = {Conv2d: nn.Conv2d, Dropout: nn.Dropout}.get(type(module), type(module))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.Adam(trained, run.settings.learning_rate, weight_decay=run.settings.weight_decay)


def plain_loop(run: Run, device: torch.device, data_dir: Path | None) -> Callable:
    """Returns train(steps)."""
    flips = [T.RandomHorizontalFlip(a.p) for a in run.settings.augment if isinstance(a, HorizontalFlip)]
    batches = plain_loader(run.settings, data_dir, flips)
    model, optimizer = plain_setup(run, device)

    def train(steps: int) -> int:
        model.train()
        plain_epoch(model, optimizer, batches, steps, device)
        return steps

    return train


def plain_frozen_loop(run: Run, device: torch.device, data_dir: Path | None) -> Callable:
    """The frozen backbone in every step. Returns train(steps), one epoch of so many, evaluation included."""
    batches = plain_loader(run.settings, data_dir, [T.RandomHorizontalFlip()])
    model, optimizer = plain_setup(run, device)

    def train(steps: int) -> int:
        model.train()  # the backbone stays in evaluation mode
        plain_epoch(model, optimizer, batches, steps, device)
        model.eval()
        with torch.no_grad():
            for images, labels in itertools.islice(batches, evaluation_batches(steps)):
                (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        return steps

    return train


def our_data(settings: Settings, device: torch.device, data_dir: Path | None) -> Split:
    """The training images, set up as `common` does."""
    keep_large_blocks()
    choose_device(str(device))  # for what it sets in this process
    data = load_sample() if settings.data == "cifar10-sample" else load_cifar10(find_data_dir(data_dir))
    return data["train"].to(device)


def first_batches(split: Split, count: int, settings: Settings) -> Split:
    """So many batches; the sample's images come again."""
    index = torch.arange(count * settings.batch_size) % len(split)
    return Split(split.images[index], split.labels[index])


def measure_outside(bar: tqdm, split: Split, device: torch.device, outside: list[float]) -> None:
    """From now on, add the seconds of data and logging to `outside`."""
    for owner, name in ((bar, "update"), (bar, "set_postfix_str"), (split, "batch")):
        setattr(owner, name, timed(getattr(owner, name), device, outside))


def our_loop(run: Run, device: torch.device, data_dir: Path | None) -> Callable:
    """What `common.train` sets up. Returns train(steps, outside); `outside` gets the seconds of data and logging."""
    settings = run.settings
    images = our_data(settings, device, data_dir)
    model = build(run, device)
    optimizer = make_optimizer(model, settings, device)
    epochs = itertools.count(1)

    def train(steps: int, outside: list[float] | None = None) -> int:
        split = first_batches(images, steps, settings)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), tqdm() as bar:
            if outside is not None:
                measure_outside(bar, split, device, outside)
            train_epoch(model, optimizer, split, settings, next(epochs), bar)
        return steps

    return train


def our_frozen_loop(run: Run, device: torch.device, data_dir: Path | None) -> Callable:
    """Question 4's frozen run. Returns train(steps, outside), 30 epochs of so many steps, evaluation included."""
    settings = run.settings
    images = our_data(settings, device, data_dir)
    model = build(run, device)
    optimizer = make_optimizer(model, settings, device)

    def train(steps: int, outside: list[float] | None = None) -> int:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), tqdm() as bar:
            training, held_out = (first_batches(images, n, settings) for n in (steps, evaluation_batches(steps)))
            features = compute_features(model, training, settings, mirror=True, name="training")
            held_out = compute_features(model, held_out, settings, mirror=False, name="held-out")
            if outside is not None:
                measure_outside(bar, features, device, outside)
            for epoch in range(1, settings.epochs + 1):
                train_epoch(model, optimizer, features, settings, epoch, bar)
                evaluate(model, held_out, settings)
        return settings.epochs * steps

    return train


class Turn(NamedTuple):
    ms: float  # per training step
    outside: float  # share of the time
    memory: float  # peak, MiB


def serve(connection: Connection, make_loop: Callable, run: Run, device: torch.device, *args) -> None:
    """Main program of a loop's process. It says None when all is set up, then answers (steps, watched) with a Turn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    try:
        train = make_loop(run, device, *args)
        connection.send(None)
        while True:
            steps, watched = connection.recv()
            seconds, outside = [], []
            trained = timed(train, device, seconds)(steps, *([outside] if watched else []))
            time.sleep(SETTLE_SECONDS)
            connection.send(Turn(1000 * seconds[0] / trained, sum(outside) / seconds[0], peak_memory(device)))
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):  # the parent is done
        pass


@contextmanager
def process_of(make_loop: Callable, *args) -> Iterator[Callable]:
    """Start the loop's process; yields turn(steps, watched) -> Turn."""
    context = multiprocessing.get_context("spawn")
    connection, remote = context.Pipe()
    process = context.Process(target=serve, args=(remote, make_loop, *args))
    process.start()
    remote.close()

    def receive() -> Turn | None:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"the process of {make_loop.__name__} died; was there enough memory?") from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    def turn(steps: int, watched: bool = False) -> Turn:
        with suppress(OSError):  # a dead process shows below
            connection.send((steps, watched))
        return receive()

    try:
        receive()
        yield turn
    finally:
        connection.close()  # a process that waits for its turn ends by itself
        process.join(3)
        process.terminate()
        process.join()


# ------------------------------------------------------------------------------------------------------------ tables


def measure(name: str, plain_loop: Callable, our_loop: Callable, what: tuple, args, bar: tqdm) -> dict:
    """One row of the first table. Ours is set up first: it verifies the data, and downloads what is missing."""

    def take(turn: Callable, steps: int, watched: bool = False) -> Turn:
        answer = turn(steps, watched)
        bar.update(steps)
        return answer

    with process_of(our_loop, *what) as ours, process_of(plain_loop, *what) as plain:
        take(plain, WARM_UP_STEPS), take(ours, WARM_UP_STEPS)
        rounds = [(take(plain, args.steps), take(ours, args.steps)) for _ in range(args.rounds)]
        last = take(ours, args.steps, True)  # apart: on a GPU, reading the clock costs time
    ratios = [p.ms / o.ms for p, o in rounds]
    return {
        "network": name,
        "plain_ms": statistics.median(p.ms for p, _ in rounds),
        "our_ms": statistics.median(o.ms for _, o in rounds),
        "ratio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
        "plain_memory": rounds[-1][0].memory,
        "our_memory": last.memory,
        "outside": last.outside,
    }


def print_training(rows: Sequence[dict], batch_size: int) -> None:
    print(f"\n{'':<20}{'ms per step':>18}{'images/s':>16}{'times faster':>23}{'peak MiB':>16}{'outside':>10}")
    pair = f"{'plain':>8}{'ours':>8}"
    print(f"{'training':<20}  {pair}{pair}{'(min - max)':>23}{pair}{'network':>10}")
    for r in rows:
        speeds = [1000 * batch_size / r[k] for k in ("plain_ms", "our_ms")]
        print(
            f"{r['network']:<20}{r['plain_ms']:>10.1f}{r['our_ms']:>8.1f}{speeds[0]:>8.0f}{speeds[1]:>8.0f}"
            f"{r['ratio']:>23}{r['plain_memory']:>8.0f}{r['our_memory']:>8.0f}{r['outside']:>10.2%}"
        )


def convolution_shapes(runs: Sequence[Run]) -> list[tuple[int, int, int]]:
    """C_in, C_out and pixels per side of every 3x3 convolution of these networks, for images of 32 x 32."""
    shapes = set()

    def record(module: Conv2d, inputs: tuple[Tensor], _output: Tensor) -> None:
        shapes.add((module.in_channels, module.out_channels, inputs[0].shape[-1]))

    for run in runs:
        model = run.build(run.settings).eval()
        for module in model.modules():
            if isinstance(module, Conv2d):
                module.register_forward_hook(record)
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
    return sorted(shapes, key=lambda shape: (-shape[2], shape))


def time_convolution(
    shape: tuple[int, int, int], dtype: torch.dtype, directions: Directions, rounds: int
) -> list[float]:
    """Median ms of output, gradient of the input and gradient of the weights, for a batch of 200."""
    c_in, c_out, size = shape
    images = torch.randn(200, c_in, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, 3, 3).to(dtype, memory_format=torch.channels_last)
    bias, seconds = torch.zeros(c_out, dtype=dtype), [[], [], []]
    function = ConvolutionAsProduct.apply
    by_input, by_weight = images.clone().requires_grad_(), weight.clone().requires_grad_()
    gradient = torch.randn_like(function(images, weight, bias, directions))
    work = [
        lambda: function(images, weight, bias, directions),
        lambda: torch.autograd.grad(function(by_input, weight, bias, directions), by_input, gradient),
        lambda: torch.autograd.grad(function(images, by_weight, bias, directions), by_weight, gradient),
    ]
    for _ in range(WARM_UP_STEPS + rounds):
        for function_of, spent in zip(work, seconds):
            timed(function_of, images.device, spent)()
    output, with_input, with_weight = (1000 * statistics.median(s[WARM_UP_STEPS:]) for s in seconds)
    return [output, with_input - output, with_weight - output]


def print_convolutions(runs: Sequence[Run], precision: str, rounds: int) -> None:
    """The second table."""
    dtype = computing_dtype(precision)
    print(f"\n{'convolutions of 200 images':<28}{'output':>18}{'input gradient':>20}{'weight gradient':>20}")
    print(f"{f'in {precision}, ms':<28}{'PyTorch  product':>18}{'PyTorch  product':>20}{'PyTorch  product':>20}")
    for shape in convolution_shapes(runs):
        times = [time_convolution(shape, dtype, Directions(*[product] * 3), rounds) for product in (False, True)]
        chosen = product_rule("cpu", dtype).directions(shape[2] ** 2)
        cells = [
            f"{theirs:.1f}{'' if product else '*'}".rjust(10) + f"{ours:.1f}{'*' if product else ''}".rjust(9)
            for theirs, ours, product in zip(*times, chosen)
        ]
        print(f"{'{} -> {}, {} x {}'.format(*shape, shape[2]):<28}" + " ".join(cells))


def augment_pil(images: Sequence[Image.Image], transform: Callable) -> list[Image.Image]:
    """One by one, on one thread, as a DataLoader's worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = [transform(image) for image in images]
    torch.set_num_threads(threads)
    return images


def print_augmentation(rows: Sequence[tuple[str, tuple, list]], images: Tensor, rounds: int, step_ms: float) -> None:
    """The third table. rows: name, ours, torchvision's; images: one batch, uint8; step_ms: of training without any."""
    pil, rng = [to_pil_image(image) for image in images.cpu()], generator(0, 1, "augment")
    title = f"augmenting {len(images)} images"
    print(f"\n{title:<32}{'PIL ms':>9}{'ours ms':>9}{'times faster':>14}{'of our step':>13}")
    for name, ours, theirs in rows:
        seconds = ([], [])
        for _ in range(WARM_UP_STEPS + rounds):
            timed(augment_pil, images.device, seconds[0])(pil, T.Compose(theirs))
            timed(augment, images.device, seconds[1])(images.float().div_(255), ours, rng, len(images))
        pil_ms, our_ms = (1000 * statistics.median(s[WARM_UP_STEPS:]) for s in seconds)
        share = our_ms / (step_ms + our_ms)
        print(f"{name:<32}{pil_ms:>9.1f}{our_ms:>9.1f}{pil_ms / our_ms:>14.1f}{share:>13.2%}")


# ------------------------------------------------------------------------------------------------------ command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns of each loop; default 3")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="steps per turn; default 10")
    parser.add_argument("--sample", action="store_true", help="the bundled excerpt: no download")
    parser.add_argument(
        "--data-dir", type=expand, help="folder with cifar-10-batches-py; default $CIFAR10_DIR, else data/"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default auto")
    return parser


def run(args: argparse.Namespace, device: torch.device) -> None:
    data = "cifar10-sample" if args.sample else "cifar10"
    settings = Settings(data=data, precision=choose_precision("auto", device))
    here = environment(device, settings.precision)
    print(
        f"{here['device']}, {here['threads']} threads; torch {here['torch']}; plain fp32, ours {here['precision']}; "
        f"rounds x steps {args.rounds} x {args.steps}, batches of {settings.batch_size}, {data}"
    )
    vgg = dataclasses.replace(VGG, data=settings.data, precision=settings.precision)
    convnet, finetune = Run("bench", settings), Run("bench", vgg, build_vgg)
    batch_norm = Run("bench", dataclasses.replace(settings, batch_norm=True))
    dropout = Run("bench", dataclasses.replace(settings, dropout=0.5))
    frozen = Run("bench", dataclasses.replace(vgg, backbone="frozen"), build_vgg)
    loops = [
        ("ConvNet", plain_loop, our_loop, convnet),
        ("ConvNet, batch norm", plain_loop, our_loop, batch_norm),
        ("ConvNet, dropout 0.5", plain_loop, our_loop, dropout),
        ("VGG11_bn, fine-tuned", plain_loop, our_loop, finetune),
        ("VGG11_bn, frozen", plain_frozen_loop, our_frozen_loop, frozen),
    ]
    steps = len(loops) * (2 * WARM_UP_STEPS + (2 * args.rounds + 1) * args.steps)
    with tqdm(total=steps, desc="bench", unit="step", smoothing=0, dynamic_ncols=True, disable=None) as bar:
        rows = [measure(*loop, (run, device, args.data_dir), args, bar) for *loop, run in loops]
    print_training(rows, settings.batch_size)
    keep_large_blocks()
    if device.type == "cpu":
        print_convolutions([convnet, finetune], settings.precision, args.rounds)
    train = (load_sample() if args.sample else load_cifar10(find_data_dir(args.data_dir)))["train"]
    print_augmentation(AUGMENTATIONS, train.images[: settings.batch_size].to(device), args.rounds, rows[0]["our_ms"])


def main() -> None:
    with session(make_parser()) as (args, device):
        try:
            run(args, device)
        except KeyboardInterrupt:  # here no epochs are kept
            tell("bench.py: interrupted")
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
