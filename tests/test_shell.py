"""What users' shells, notebooks and machines do to a script."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from conftest import start
from torchvision.datasets import CIFAR10

import common
import machine
import q1_convnet
from common import ROOT, fetch_cifar10, find_data_dir
from machine import UserError, expand, explain

SCRIPTS = sorted(path.name for path in ROOT.glob("q*_*.py"))


def run_script(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_notebooks_backend_does_not_matter(script, tmp_path):
    """Colab and Jupyter set this for every command that a cell runs."""
    folders = [f"--checkpoint-dir={tmp_path}", f"--output-dir={tmp_path}"]
    ended = run_script(script, "--list", *folders, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert ended.returncode == 0 and "not started" in ended.stdout, ended.stderr


def test_figures_do_not_follow_the_users_matplotlibrc(finished, tmp_path):
    ours = finished[0] / "out/sample/q1/convnet_3epochs"
    target = tmp_path / "out/sample/q1/convnet_3epochs"
    target.mkdir(parents=True)
    for name in ("seed0.json", "seed0.npz"):
        (target / name).write_bytes((ours / name).read_bytes())
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.family: serif\nlines.linewidth: 7\naxes.facecolor: red\n"
    )
    ended = run_script(
        "q1_convnet.py", "--sample", "--replot", f"--output-dir={tmp_path / 'out'}", MATPLOTLIBRC=str(tmp_path)
    )
    assert ended.returncode == 0, ended.stderr
    for name in ("losses.png", "accuracy.png", "filters.png", "confusion.png"):
        assert (target / name).read_bytes() == (ours / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------------- paths


def test_the_home_folder_is_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/out") == tmp_path / "out"
    options = ["--output-dir=~/out", "--checkpoint-dir=~/kept", "--data-dir=~/data"]
    args = common.make_parser("").parse_args(options)
    assert [args.output_dir, args.checkpoint_dir, args.data_dir] == [tmp_path / n for n in ("out", "kept", "data")]
    monkeypatch.setenv("CIFAR10_DIR", "~/cifar")
    assert find_data_dir() == tmp_path / "cifar"
    with pytest.raises(UserError, match="~nobody-of-this-name/x"):
        expand("~nobody-of-this-name/x")


def test_a_data_folder_one_level_too_deep_is_understood(monkeypatch, tmp_path):
    inside = tmp_path / CIFAR10.base_folder
    assert find_data_dir(inside) == inside  # it may be meant to be made
    inside.mkdir()
    assert find_data_dir(inside) == tmp_path
    monkeypatch.setenv("CIFAR10_DIR", str(inside))
    assert find_data_dir() == tmp_path


def test_an_archive_that_was_being_unpacked_is_unpacked_again(official, tmp_path, monkeypatch):
    """Killed half way: some batch files there, one cut, and the verified archive beside them."""
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(find_data_dir() / CIFAR10.base_folder, CIFAR10.base_folder)
    inside = tmp_path / CIFAR10.base_folder
    inside.mkdir()
    whole = (find_data_dir() / CIFAR10.base_folder / "data_batch_1").read_bytes()
    (inside / "data_batch_1").write_bytes(whole[:1_000_000])
    real = common.check_integrity
    monkeypatch.setattr(common, "check_integrity", lambda path, md5: path == str(archive) or real(path, md5))
    fetch_cifar10(tmp_path, advice="")
    assert (inside / "data_batch_1").read_bytes() == whole and common.cifar10_problem(tmp_path) is None


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), "memory"),
        (RuntimeError("could not create a memory object"), "memory"),
        (RuntimeError("could not create a primitive"), "memory"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's memory is full"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "too old"),
    ],
)
def test_errors_of_machines_are_one_line(error, line):
    message, code = explain(error)
    assert line in message and "\n" not in message and code == 2


def test_our_own_faults_keep_their_traceback():
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(KeyError("a")) is None
    with pytest.raises(ZeroDivisionError):
        with machine.session(common.make_parser(""), []):
            1 / 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_too_little_memory_ends_in_one_line(tmp_path):
    script = (
        "import resource, sys, torch, common, q1_convnet\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)\n"
        "q1_convnet.main(sys.argv[1:])"
    )
    options = ["--sample", "--epochs=1", f"--output-dir={tmp_path}", f"--checkpoint-dir={tmp_path}"]
    command, environment = [sys.executable, "-c", script, *options], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "there is not enough memory" in last and "Traceback" not in ended.stderr


# --------------------------------------------------------------------------------------------- terminals, interrupts


def test_a_terminal_that_cannot_show_a_minus_sign_gets_another():
    wrapped = "import sys, machine; out = machine.PatientStream(sys.stdout); print('±1 − 2 ✓', file=out)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run([sys.executable, "-c", wrapped], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "+-1 - 2 ?\n", ended.stderr
    ended = run_script("q1_convnet.py", "--only", "−", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ended.returncode == 2 and "--only -: no such run" in ended.stderr, ended.stderr


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    """`| head -1`, standard error included: the results are written all the same."""
    options = ["--epochs", "1", "--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    process = start(*options)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "sample/q1/convnet_1epochs/seed0.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="the shell's redirections")
@pytest.mark.parametrize("redirection", ["| true", ">&-", ">/dev/full", "2>&- >&-"])
def test_a_stream_that_takes_nothing_changes_no_exit_code(redirection, tmp_path):
    command = f"'{sys.executable}' '{ROOT / 'q1_convnet.py'}' --replot --output-dir '{tmp_path}' {redirection}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    script = f"set -o pipefail; {command}"
    ended = subprocess.run(["bash", "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and ended.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_while_modules_load_is_one_line(script):
    """Python tells what it imports (-v): the signal comes when it begins with torch, which takes seconds."""
    command = [sys.executable, "-v", str(ROOT / script), "--list"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if "/torch/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.endswith("interrupted\n") and "Traceback" not in err


def test_main_runs_in_a_thread(tmp_path, capsys):
    """As in a notebook's cell that is run in the background, where signals are not ours."""
    ended = []
    options = ["--list", f"--output-dir={tmp_path}", f"--checkpoint-dir={tmp_path}"]
    thread = threading.Thread(target=lambda: ended.append(q1_convnet.main(options)))
    thread.start()
    thread.join()
    assert ended == [None] and "not started" in capsys.readouterr().out


def test_main_leaves_signals_and_streams_as_they_were(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr
    q1_convnet.main(["--list", f"--output-dir={tmp_path}", f"--checkpoint-dir={tmp_path}"])
    assert (signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr) == before


# ------------------------------------------------------------------------------------------------- the first line


def test_the_first_line_says_on_what_it_trains(finished):
    first = finished[2].splitlines()[0]
    assert first.startswith("convnet_3epochs seed 0 trains on ") and f"{torch.get_num_threads()} threads" in first
    assert "bf16" in first or "fp32" in first


@pytest.mark.parametrize(("cuda", "there", "hint"), [(None, True, True), (None, False, False), ("13.0", True, False)])
def test_a_build_for_cpus_beside_a_gpu_gets_a_hint(monkeypatch, capsys, cuda, there, hint):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if there else None)
    machine.announce("convnet seed 0", torch.device("cpu"), "fp32")
    assert ("this torch is a build for CPUs" in capsys.readouterr().err) == hint


def test_locks_of_other_users_can_be_taken(tmp_path):
    path = Path(tmp_path / "shared.lock")
    with machine.file_lock(path) as held, machine.file_lock(path, wait=False) as again:
        assert held and not again
    if os.name == "posix":
        assert path.stat().st_mode & 0o666 == 0o666
    with machine.file_lock(path, wait=False) as held:
        assert held
    with pytest.raises(UserError, match="cannot lock"), machine.file_lock(tmp_path / "shared.lock" / "inside"):
        pass
