"""What depends on the machine: its device and precision, layers that its CPU computes faster than PyTorch's own,
processes, files, and errors a person can act on.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can mend: `session` prints it as one line on standard error and exits with code 2.

    in_all: every process raises it, so the first one alone says it.
    """

    in_all = False


# ------------------------------------------------------------------------------------------------- device, precision


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there.

    Also sets up this process for it; call before torch starts its threads, which take over how they treat subnormals.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if launched() and (name == "mps" or name.startswith("cuda:")):
        raise UserError(f"torchrun gives every process a GPU of its own or none: --device cuda or cpu, not {name}")
    if name == "cuda" and launched():  # one process per GPU
        processes_here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes_here > gpus:
            raise UserError(f"torchrun: {processes_here} processes for {gpus} GPUs")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        there = available.get(device.type, False)
        there = there and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        there = False
    if not there:
        kinds = ", ".join(kind for kind, here in available.items() if here)
        raise UserError(f"--device {name} is not there; on this machine: {kinds}")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu":  # weight decay lets most of ConvNet's weights sink below 1e-38, where CPUs become slow
        torch.set_flush_denormal(True)
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
    if name != "auto":
        return name
    cpu = torch.cpu.get_capabilities()
    slow = device.type == "cpu" and "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_bf16")
    return "bf16" if native and not slow else "fp32"


def computing_dtype(precision: str) -> torch.dtype:
    """What convolutions and matrix products are computed in; weights stay float32, and what optimisers keep."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def environment(device: torch.device, precision: str) -> dict:
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
        "precision": precision,
        "convolutions": str(product_rule(device.type, computing_dtype(precision))),
    }


def announce(what: str, device: torch.device, precision: str) -> None:
    """One line: what is trained, and on what. And a hint where torch cannot see the machine's GPU."""
    here = environment(device, precision)
    processes = f", {here['processes']} processes" if here["processes"] > 1 else ""
    tell(f"{what} trains on {here['device']}, {here['threads']} threads{processes}, {precision}, torch {here['torch']}")
    if device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        tell("this machine has an NVIDIA GPU, but this torch is a build for CPUs: see pytorch.org for one with CUDA")


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


# ------------------------------------------------------------------------------------------------------ convolutions
#
# Layers that a CPU computes faster than PyTorch's own, with the same parameters. They print as PyTorch's do and share
# their state dicts. CUDA and MPS keep PyTorch's own kernels.


class Directions(NamedTuple):
    """The three results of a convolution's step: which of them are computed as one matrix product."""

    output: bool = False
    input_gradient: bool = False
    weight_gradient: bool = False


class ProductRule(NamedTuple):
    """The largest output, in pixels per image, for which each direction is computed as a product; 0 is never.

    A fixed rule of the CPU, not a timing at start: a run must repeat. `bench.py` prints what it rests on.
    """

    output: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    def directions(self, pixels: int) -> Directions:
        return Directions(*(pixels <= limit for limit in self))

    def __str__(self) -> str:
        """As `environment` in the results records it."""
        limits = ", ".join(f"{name.replace('_', ' ')} up to {limit} pixels" for name, limit in self._asdict().items())
        return f"products: {limits}" if any(self) else "PyTorch's own"


@functools.cache
def product_rule(device_type: str, dtype: torch.dtype) -> ProductRule:
    """oneDNN's convolutions leave matrix units idle where the output is small, for bfloat16 alone.

    Its backward-weights kernel for AMX works row by row, and rows of 8 pixels fill a quarter of a tile.
    """
    if device_type != "cpu" or dtype != torch.bfloat16:
        return ProductRule()
    cpu = torch.cpu.get_capabilities()
    if cpu.get("amx_bf16"):
        return ProductRule(output=16, input_gradient=16, weight_gradient=64)
    if cpu.get("avx512_bf16"):
        return ProductRule(output=16, input_gradient=16, weight_gradient=16)
    return ProductRule()


def image_patches(images: Tensor, size: int) -> Tensor:
    """Every pixel's surroundings, zeros outside the image: [N, C, H, W] -> [N * H * W, size * size * C]."""
    n, channels, height, width = images.shape
    edge = size // 2
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, edge, edge, edge, edge))  # [N, H + 2 edge, W + 2 edge, C]
    patches = padded.unfold(1, size, 1).unfold(2, size, 1)  # [N, H, W, C, size, size]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(n * height * width, size * size * channels)


class ConvolutionAsProduct(torch.autograd.Function):
    """F.conv2d with stride 1 and padding K // 2 for an odd kernel size K, some directions as one matrix product each.

    apply(images [N, C_in, H, W], weight [C_out, C_in, K, K], bias [C_out], directions) -> [N, C_out, H, W].
    """

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor, directions: Directions) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.directions = directions
        size = weight.shape[-1]
        if not directions.output:
            return F.conv2d(images, weight, bias, padding=size // 2)
        kernels = weight.permute(0, 2, 3, 1).flatten(1)  # [C_out, K * K * C_in]
        output = F.linear(image_patches(images, size), kernels, bias)  # [N * H * W, C_out]
        return as_images(output, images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        size, channels = weight.shape[-1], weight.shape[1]
        wanted = [need and not product for need, product in zip(ctx.needs_input_grad, ctx.directions[1:])]
        by_input, by_weight, _ = (
            torch.ops.aten.convolution_backward(
                gradient, images, weight, None, [1, 1], [size // 2] * 2, [1, 1], False, [0, 0], 1, [*wanted, False]
            )
            if any(wanted)
            else (None, None, None)
        )
        pixels = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # [N * H * W, C_out]
        if ctx.needs_input_grad[0] and ctx.directions.input_gradient:
            kernels = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)  # [K * K * C_out, C_in]
            by_input = as_images(image_patches(gradient, size) @ kernels, images)
        if ctx.needs_input_grad[1] and ctx.directions.weight_gradient:
            kernels = pixels.T @ image_patches(images, size)  # [C_out, K * K * C_in]
            by_weight = kernels.view(-1, size, size, channels).permute(0, 3, 1, 2)
        by_bias = pixels.sum(0) if ctx.needs_input_grad[2] else None
        return by_input, by_weight, by_bias, None


def as_images(pixels: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W], channels_last, with N, H and W of `like`."""
    n, _, height, width = like.shape
    return pixels.view(n, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on CPUs where it pays, some directions of small layers are computed as products of matrices.

    Those with stride 1, padding K // 2, odd K and a bias: the convolutions of ConvNet and of VGG11_bn.
    """

    def keeps_size(self) -> bool:
        size = self.kernel_size[0]
        simple = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        same = size % 2 == 1 and self.kernel_size == (size, size) and self.padding == (size // 2, size // 2)
        return simple and same and self.bias is not None

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        directions = product_rule(device, dtype).directions(images.shape[2] * images.shape[3])
        if not any(directions) or not self.keeps_size():
            return super().forward(images)
        return ConvolutionAsProduct.apply(images.to(dtype), self.weight.to(dtype), self.bias.to(dtype), directions)


def fast_convolutions(model: nn.Module) -> nn.Module:
    """Make every nn.Conv2d of a ready-made model a Conv2d of this module, in place: the parameters stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    return model


# ---------------------------------------------------------------------------------------------------------- dropout


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU its mask is cut from 64-bit integers, four units from each, instead of one draw a unit.

    The dropped share is p rounded to 1 / 65,536, and the rest is scaled by what that share asks for.
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


# --------------------------------------------------------------------------------------------------------- processes
#
# Several processes, under torchrun. Alone, rank is 0 and the world 1, and these functions do nothing.


def launched() -> bool:
    """By torchrun?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


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
        shared = UserError(error)
        shared.in_all = True
        raise shared
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


# ------------------------------------------------------------------------------------------------------------- files


def expand(text: str) -> Path:
    """Type of options that name a file or a folder: ~ is the home folder, which a shell leaves alone after "=".

    Raises UserError for the home of somebody who is not there.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error


def require_writable(path: Path) -> None:
    """Make the folder where it is missing. Raises UserError where nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; choose another with --output-dir or --checkpoint-dir"
        ) from error


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
        with suppress(OSError):  # another user's
            temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields True, or False where another process has it. A killed process lets go of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=-1 if wait else 0, mode=0o666)  # folders may be shared by several users
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; is the folder yours to write?") from error
    try:
        yield True
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------- errors for people


def tell(message: str) -> None:
    """A line on standard error, from one process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors; its help shows the script's docstring as it stands."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


class PatientStream:
    """A text stream to which writing never fails: not for a character the terminal lacks, nor when terminal, reader or
    disk space are gone. A training of hours must not end with its last line, in a traceback.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed from the start

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.translate({ord("−"): "-", ord("±"): "+-"}).encode(encoding, "replace").decode(encoding)
        self._unless_closed(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._unless_closed(self.stream.flush)

    def _unless_closed(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except OSError:  # from now on it goes nowhere, and Python's own flush at the end does too
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


OUT_OF_MEMORY = r"not enough memory|can't allocate memory|could not (create|execute) a (primitive|memory)|bad_alloc"


def explain(error: BaseException) -> tuple[str, int] | None:
    """One line that says what to do, and the exit code; None for what is our own fault, which deserves a traceback."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; finished epochs are kept, the same command (without --fresh) goes on after the last of them",
            130,
        )
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: end what else runs there, or choose another --device", 2
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error))):
        return "there is not enough memory: a training needs about 3 GB; end what else runs on this machine", 2
    if not isinstance(error, RuntimeError):
        return None
    if "no kernel image" in str(error):
        return "this GPU is too old for the installed CUDA build of torch: use --device cpu, or an older torch", 2
    if launched() and re.search("[Cc]onnection|peer|NCCL|gloo", str(error)):
        reason = str(error).splitlines()[0]
        return f"lost another process of this run ({reason}); finished epochs are kept, run the same again", 2
    return None


@contextmanager
def session(parser: Parser, argv: Sequence[str] | None = None) -> Iterator[tuple[argparse.Namespace, torch.device]]:
    """Around a script's main: yields the parsed command line and the device, with all processes joined.

    What `explain` knows ends in one line on standard error and SystemExit. Also from a thread or a notebook's cell,
    where signals are not ours to set.
    """
    own_signals = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        out, err, joined = PatientStream(sys.stdout), PatientStream(sys.stderr), False
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.callback(out.flush)
        stack.callback(err.flush)
        if own_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        try:
            args = parser.parse_args(argv)
            device = choose_device(args.device)
            with processes(device):
                joined = world_size() > 1
                yield args, device
        except (Exception, KeyboardInterrupt) as error:
            if (explained := explain(error)) is None:
                raise
            message, code = explained
            alone = joined and not isinstance(error, KeyboardInterrupt) and not getattr(error, "in_all", False)
            if alone:  # the others do not know
                print(f"{parser.prog}: {message}", file=sys.stderr, flush=True)
            else:
                tell(f"{parser.prog}: {message}")
            raise SystemExit(code) from None
