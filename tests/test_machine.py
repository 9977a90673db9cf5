"""Device and precision, files, and errors for people."""

import os
import re
import sys

import pytest
import torch

from common import make_parser
from parts import machine
from parts.machine import UserError, choose_device, choose_precision, session, write_atomic

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:2", "tpu", ""])
def test_a_device_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"--device {device} is not there; on this machine: cuda, .*cpu"):
        choose_device(device)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cuda:2 is not there"):  # torchrun: a GPU for each process
        choose_device("cuda")


def test_auto_takes_an_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, device in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert choose_device("auto").type == device
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert choose_device("auto").type == "cpu"  # of torchrun's processes


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
        ("Intel Xeon", {}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found={"cpu_name": cpu, **instructions}: found)
        assert choose_precision("auto", CPU) == auto and choose_precision("fp32", CPU) == "fp32"
    with pytest.raises(UserError, match="use fp32 or auto"):  # the last one computes no bfloat16
        choose_precision("bf16", CPU)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.11
    assert choose_precision("auto", CPU) == "fp32" and machine.environment(CPU, "fp32")["device"]


def test_fp16_is_for_gpus_that_have_tensor_cores_for_nothing_wider(monkeypatch):
    for name, capability, auto in (
        ("NVIDIA GeForce GTX 1080", (6, 1), "fp32"),
        ("Tesla V100-SXM2-16GB", (7, 0), "fp16"),
        ("Tesla T4", (7, 5), "fp16"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), "fp32"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, found=name: found)
        assert choose_precision("auto", torch.device("cuda")) == auto, name
    with pytest.raises(UserError, match="fp16 is for GPUs"):
        choose_precision("fp16", CPU)


def test_a_file_is_replaced_whole(tmp_path):
    """What a killed process left is written over."""
    target = tmp_path / "new" / "file"
    for content in (b"one, longer", b"two"):
        write_atomic(target, content)
        assert target.read_bytes() == content and os.listdir(target.parent) == ["file"]
        target.with_name(".file.tmp").write_bytes(b"half of something longer")


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


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has a device that is full")
def test_a_reader_that_goes_away_and_a_full_disk_end_the_printing_alone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for target in (writer, "/dev/full"):
        with open(target, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            machine.say("nobody hears this", error=True)
            machine.say("nor this", error=True)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("no such run"), "no such run", 2),
        (KeyboardInterrupt(), "interrupted; .* the same command", 130),
        (RuntimeError("could not create a primitive"), "not enough memory", 2),
        (RuntimeError("CUDA error: no kernel image is available"), "no kernels for this GPU: use --device cpu", 2),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "the GPU's memory is full", 2),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU's memory is full", 2),
        (PermissionError(13, "Permission denied", "results/a.json"), "results/a.json: Permission denied", 2),
    ],
    ids=repr,
)
def test_what_users_can_mend_is_one_line(error, line, code, capsys):
    with pytest.raises(SystemExit) as end, session(make_parser(""), ["--device=cpu"]):
        raise error
    err = capsys.readouterr().err
    assert end.value.code == code and re.search(line, err) and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), OSError("x"), KeyError(1)])
def test_our_own_faults_keep_their_traceback(error):
    with pytest.raises(type(error)), session(make_parser(""), ["--device=cpu"]):
        raise error
