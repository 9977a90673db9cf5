"""What depends on the machine: device and precision, processes, files, and errors that a person can act on."""

import argparse
import ctypes
import datetime
import difflib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn

from parts.layers import convolution_rule, cpu_capabilities


class UserError(Exception):
    """Something the user can mend: `session` prints it as one line on standard error and exits with code 2."""


# ------------------------------------------------------------------------------------------------- device, precision


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there.

    Also sets up this process for it; call before the first large tensor, and before torch starts its threads: they
    inherit how subnormals are treated.
    """
    several = torch.distributed.is_torchelastic_launched()
    mps = torch.backends.mps.is_available() and not several  # torch connects no processes there
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    kinds = [kind for kind, there in available.items() if there]
    name = kinds[0] if name == "auto" else name
    if name == "cuda" and several:  # a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        there = device.type in kinds and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        there = False
    if not there:
        raise UserError(f"--device {name} is not there; on this machine: {', '.join(kinds)}")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean float32
    if device.type == "cpu":  # weight decay would let most of ConvNet's weights sink below 1e-38, where it is slow
        torch.set_flush_denormal(True)
        keep_large_blocks()
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where it pays; fp16 on NVIDIA GPUs whose tensor cores know nothing wider (compute capability 7.0,
    the V100, and 7.5, the T4 and the RTX 20; the GTX 16 has none), with scaled losses; else fp32. Raises UserError
    for bf16 where it would be emulated, and for fp16 on a CPU.

    Intel's CPUs multiply bfloat16 fast in AMX alone: with AVX-512 only, question 1's step took 1.5 times float32's.
    """
    native = slow = tensor_cores = False
    if device.type == "cpu":
        cpu = cpu_capabilities()
        native = any(cpu.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
        slow = "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_bf16")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        native = capability >= (8, 0)
        tensor_cores = capability in ((7, 0), (7, 5)) and "GTX 16" not in torch.cuda.get_device_name(device)
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 is for GPUs; use fp32 or auto")
    if name == "bf16" and not native:
        raise UserError(f"--precision bf16: this {device.type} does not compute bfloat16 natively; use fp32 or auto")
    if name != "auto":
        return name
    if native and not slow:
        return "bf16"
    return "fp16" if tensor_cores else "fp32"


def computing_dtype(precision: str) -> torch.dtype:
    """What convolutions and matrix products are computed in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def environment(device: torch.device, precision: str) -> dict:
    """What the numbers may depend on beyond the settings."""
    cpu = cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
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
        "convolutions": str(convolution_rule(device.type, computing_dtype(precision))),
    }


def announce(what: str, device: torch.device, precision: str) -> None:
    """One line: what happens, and on what. And a hint where torch cannot see the machine's GPU."""
    where = "{device}, {threads} threads, {processes} processes, {precision}, torch {torch}"
    where = where.format(**environment(device, precision)).replace(", 1 processes", "")
    tell(f"{what} on {where}")
    if device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        tell("this machine has an NVIDIA GPU, but this torch is a build for CPUs: see pytorch.org for one with CUDA")


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed blocks. Else every step returns its activations to the kernel and back, and
    takes 1.3 to 1.6 times as long (ConvNet, AMD EPYC, Zen 3, float32).
    """
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of <malloc.h>
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 256 * 2**20)  # M_TOP_PAD


# --------------------------------------------------------------------------------------------------------- processes
# Under torchrun: all read the same files, the first writes them, and when one fails torchrun ends them all.


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def my_part(n: int) -> slice:
    """This process's part of a batch of n."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model to train: itself, or wrapped in DistributedDataParallel where there are several processes.

    Looking for unused parameters keeps the gradients in the order of the first step. Else every start orders them anew,
    and a training that goes on rounds otherwise (from three processes on). Hence torch's warning that there are none.
    """
    if world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes when launched by torchrun: nccl on CUDA, else gloo; the cores are shared evenly."""
    if not torch.distributed.is_torchelastic_launched():
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The first process may wait for a lock while the others wait for it.
    patience = datetime.timedelta(days=2)
    gpu = device if device.type == "cuda" else None
    torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=patience, device_id=gpu)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- files


def expand(text: str) -> Path:
    """Type of options that name a path; a shell leaves ~ alone after "=". Raises UserError for what is none."""
    if not text or text != text.strip():
        raise UserError(f"{text!r} is no path: it is empty (an unset variable?), or begins or ends in a blank")
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
        line = f"cannot write to {path}: {error.strerror}; choose another with --output-dir or --checkpoint-dir"
        raise UserError(line) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target and rename: `path` holds the old content or the new, whole. Call with a lock held: what a
    killed process left beside it is written over. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name must survive a power cut too, where the file system can see to that
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):
                os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for another process that has it, and saying so. A killed process lets go of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o666)  # folders may be shared by several users
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            tell(f"waiting until another process lets go of {path}, as long as that takes; Ctrl-C ends the waiting")
            held = lock.acquire()
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; is the folder yours to write?") from error
    with held:
        yield


# ------------------------------------------------------------------------------------------------- errors for people


def say(text: str, error: bool = False) -> None:
    """Print a line. A reader that has gone away (`| head`), or a full disk, ends the printing and not the training."""
    stream = sys.stderr if error else sys.stdout
    try:
        if stream is not None:  # it was closed from the start
            print(text, file=stream, flush=True)
    except OSError:
        with suppress(OSError, ValueError):  # Python's own flush at the end goes nowhere either
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(message: str) -> None:
    """A line on standard error, from one process."""
    if rank() == 0:
        say(message, error=True)


def did_you_mean(word: str, among: Iterable[str]) -> str:
    """A hint, where one of these is close."""
    meant = difflib.get_close_matches(word, among, n=1)
    return f"; did you mean {meant[0]}?" if meant else ""


class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors; its help shows the script's docstring as it stands; no abbreviations."""

    def __init__(self, doc: str | None):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments:.*?(--[^\s=]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise UserError(f"{message}{hint} (see --help)")


def out_of_memory(error: BaseException) -> bool:
    """Of the machine itself, not of its GPU."""
    words = r"not enough memory|can't allocate memory|could not (create|execute) a (primitive|memory)|bad_alloc"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def explain(error: BaseException) -> str | None:
    """One line that says what to do; None for what is our own fault, which deserves a traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a question's script keeps its finished epochs: the same command (without --fresh) goes on"
    full = r"CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED"  # as the driver and the libraries say it
    if isinstance(error, torch.OutOfMemoryError) or re.search(full, str(error)):
        return f"the GPU's memory is full ({first_line(error)}): end what runs there, or choose another --device"
    if "no kernel image" in str(error):
        return "this torch has no kernels for this GPU: use --device cpu, or a torch built for it (see pytorch.org)"
    if out_of_memory(error):
        return f"there is not enough memory ({first_line(error)}): end what else runs on this machine"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def session(parser: Parser, argv: Sequence[str] | None = None) -> Iterator[tuple[argparse.Namespace, torch.device]]:
    """Around a script's main: yields the parsed command line and the device, with all processes joined.

    What `explain` knows ends in one line on standard error and SystemExit. Works in a thread or a notebook too.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        args = parser.parse_args(argv)
        device = choose_device(args.device)
        with processes(device):
            yield args, device
    except (Exception, KeyboardInterrupt) as error:
        if (line := explain(error)) is None:
            raise
        who = f"{parser.prog}, process {os.environ['RANK']}" if "RANK" in os.environ else parser.prog
        say(f"{who}: {line}", error=True)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
