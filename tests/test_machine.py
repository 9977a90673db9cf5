"""Device and precision, files, and errors for people."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from common import make_parser
from parts import machine
from parts.machine import UserError, choose_device, choose_precision, expand, file_lock, session, write_atomic

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:2", "tpu", "meta", ""])
def test_a_device_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"--device {device} is not there; on this machine: cuda, .*cpu"):
        choose_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_torchrun_gives_out_the_gpus(monkeypatch, device):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torchrun"):
        choose_device(device)


def test_a_cpu_counts_subnormal_numbers_as_zero():
    torch.set_flush_denormal(False)
    small = torch.full((8,), 1e-39)
    assert (small * 1.0 > 0).all()
    choose_device("cpu")
    assert (small * 1.0 == 0).all() and (torch.full((8,), 2e-38) * 1.0 > 0).all()


def test_auto_is_bf16_where_it_pays(monkeypatch):
    for cpu, instructions, auto in (
        ("AMD EPYC", {"avx512_bf16": True}, "bf16"),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ("", {"bf16": True}, "bf16"),
        ("Intel Xeon", {}, "fp32"),
    ):
        capabilities = {"cpu_name": cpu} | instructions
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_precision("auto", CPU) == auto and choose_precision("fp32", CPU) == "fp32"
        assert not instructions or choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="use fp32 or auto"):  # the last one computes no bfloat16
        choose_precision("bf16", CPU)


def test_a_checkpoint_can_hold_the_environment():
    file = io.BytesIO()
    torch.save(machine.environment(CPU, "fp32"), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["torch"] == torch.__version__


@pytest.mark.parametrize(("cuda", "there", "hint"), [(None, True, True), (None, False, False), ("13.0", True, False)])
def test_a_build_for_cpus_beside_a_gpu_gets_a_hint(monkeypatch, capsys, cuda, there, hint):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if there else None)
    machine.announce("convnet seed 0", CPU, "bf16")
    first, *hints = capsys.readouterr().err.splitlines()
    assert first.startswith("convnet seed 0 trains on ") and "bf16" in first and len(hints) == hint


def test_the_home_folder_is_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/out") == tmp_path / "out"
    for wrong, named in {"": "empty", "~nobody-of-this-name/x": "~nobody-of-this-name/x"}.items():
        with pytest.raises(UserError, match=named):
            make_parser("").parse_args([f"--output-dir={wrong}"])


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "new" / "file"
    for content in (b"one, longer", b"two"):
        write_atomic(target, content)
        assert target.read_bytes() == content and os.listdir(target.parent) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for it: the operating system fails the write half way."""
    resource = pytest.importorskip("resource")
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write {target}"):
            write_atomic(target, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.delattr(os, "replace")  # without these two, writing ends as if the process ended there
        killed.delattr(Path, "unlink")
        for name in ("a.pt", "b.pt"):
            with pytest.raises(AttributeError):
                write_atomic(tmp_path / name, b"half")
    both = set(tmp_path.iterdir())
    machine.remove_leftovers(tmp_path / "a.pt")
    assert len(both) == 2 and [path.name[:6] for path in tmp_path.iterdir()] == [".b.pt."]


def test_a_lock_waits_until_another_process_is_killed_and_says_so(tmp_path, monkeypatch):
    path, told = tmp_path / "lock", []
    script = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print(flush=True), sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(line):
        told.append(line)
        other.kill()

    monkeypatch.setattr(machine, "tell", tell)
    with other:
        other.stdout.readline()
        with file_lock(path):
            assert len(told) == 1 and str(path) in told[0]


def test_locks_in_a_shared_folder(tmp_path):
    with file_lock(tmp_path / "new" / "lock"):
        mode = (tmp_path / "new" / "lock").stat().st_mode
    assert os.name != "posix" or mode & 0o666 == 0o666  # whoever shares the folder can take it
    with pytest.raises(UserError, match="cannot lock"), file_lock(tmp_path / "new" / "lock" / "inside"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has a device that is full")
def test_a_reader_that_goes_away_and_a_full_disk_end_the_printing_alone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for target in (writer, "/dev/full"):
        with open(target, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            machine.say("nobody hears this", error=True)
            machine.say("nor this", error=True)


def test_options_are_written_out():
    hints = {
        "--sedes": "did you mean --seeds?",
        "--dev=cpu": "did you mean --device?",
        "--xyzzy": "--xyzzy (see --help)",
    }
    for option, hint in hints.items():
        with pytest.raises(UserError, match=re.escape(hint)):
            make_parser("a manual,\n    as it stands").parse_args([option])
    assert "a manual,\n    as it stands" in make_parser("a manual,\n    as it stands").format_help()


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("no such run"), "no such run", 2),
        (KeyboardInterrupt(), "interrupted", 130),
        (MemoryError(), "not enough memory", 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nframe 0"), "not enough memory", 2),
        (RuntimeError("could not create a primitive"), "not enough memory", 2),
        (RuntimeError("std::bad_alloc"), "not enough memory", 2),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "the GPU's memory is full", 2),
        (PermissionError(13, "Permission denied", "results/a.json"), "results/a.json: Permission denied", 2),
    ],
    ids=repr,
)
def test_what_users_can_mend_is_one_line(error, line, code, capsys):
    with pytest.raises(SystemExit) as end, session(make_parser(""), ["--device=cpu"]):
        raise error
    err = capsys.readouterr().err
    assert end.value.code == code and line in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("x"), KeyError(1)]
)
def test_our_own_faults_keep_their_traceback(error):
    with pytest.raises(type(error)), session(make_parser(""), ["--device=cpu"]):
        raise error


def test_a_termination_is_an_interrupt_within_a_session_alone():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as end, session(make_parser(""), ["--device=cpu"]):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 130 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_session_in_a_thread_on_a_terminal_that_lacks_characters(monkeypatch):
    """As in a notebook's cell that runs in the background, where signals are not ours to set."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)

    def cell():
        with session(make_parser(""), ["--device=cpu"]):
            machine.say("±1")

    thread = threading.Thread(target=cell)
    thread.start()
    thread.join()
    assert terminal.buffer.getvalue() == b"?1\n"
