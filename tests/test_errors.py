"""Bad input: one line on standard error that says what to do, exit code 2, no traceback, nothing lost."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import q1_convnet
import q2_batchnorm_earlystop
import q3_augment_dropout
from common import CIFAR10, ROOT, Settings, find_data_dir, load_checkpoint, on_sample, set_aside
from machine import UserError, choose_precision, file_lock, write_atomic


@pytest.fixture
def fails(tmp_path, capsys):
    """Run question 1 with the given options; it must fail as promised; returns the line it printed."""

    def run(*options, sample=True):
        folders = ["--output-dir", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "checkpoints")]
        with pytest.raises(SystemExit) as end:
            q1_convnet.main([*(["--sample"] if sample else []), *folders, *options])
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert len(captured.err.splitlines()) == 1 and "Traceback" not in captured.err
        assert not list(tmp_path.rglob("*.json"))
        return captured.err

    return run


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "many", "١0x"])
@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_nonsense_numbers(fails, option, number):
    assert f"{option}: must be a whole number from 1 up" in fails(f"{option}={number}")


@pytest.mark.parametrize(
    ("question", "option", "values"),
    [
        (q2_batchnorm_earlystop, "--patience", ["0", "-1", "3.5"]),
        (q3_augment_dropout, "--dropout", ["0", "1", "-0.1", "0.00004", "0.99996", "nan", "half"]),
    ],
)
def test_nonsense_numbers_of_a_question(question, option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as end:
            question.main(["--list", f"{option}={value}"])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and f"{option}: must be a" in err


def test_unknown_run_lists_the_known(fails):
    assert "no such run; there are convnet" in fails("--only", "resnet")


def test_unknown_option(fails):
    assert "--help" in fails("--epoch-count", "3")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "gpu7", "meta"])
def test_device_that_is_not_there(fails, device):
    assert f"--device {device} is not there; on this machine:" in fails("--device", device)


def test_bf16_where_it_is_not_native(fails, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "use --precision fp32 or auto" in fails("--precision", "bf16", "--device", "cpu")
    assert choose_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    "capabilities, auto",
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon"}, "fp32"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_auto_is_bf16_where_it_pays(monkeypatch, capabilities, auto):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device("cpu")) == auto


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_no_data_and_no_network(fails, no_network, tmp_path):
    line = fails("--data-dir", str(tmp_path / "nothing"), sample=False)
    assert "could not be downloaded" in line and "--data-dir" in line and "--sample" in line


def test_read_only_data_folder_that_lacks_the_data(fails, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    line = fails("--data-dir", str(tmp_path), sample=False)
    assert "lacks data_batch_1" in line and f"{tmp_path} is read-only" in line and "--data-dir" in line
    assert not list(tmp_path.glob(".*"))


def test_data_dir_comes_from_option_then_environment_then_default(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    assert find_data_dir(Path("elsewhere")).name == "elsewhere" and find_data_dir() == tmp_path
    monkeypatch.delenv("CIFAR10_DIR")
    assert find_data_dir() == ROOT / "data"


@pytest.mark.parametrize("damage", ["truncated", "altered", "another file"])
def test_damaged_batch_file(fails, no_network, tmp_path, damage):
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    file = folder / "data_batch_3"
    real = find_data_dir() / CIFAR10.base_folder / "data_batch_3"
    content = bytearray(real.read_bytes() if real.exists() else os.urandom(31_035_999))
    if damage == "truncated":
        del content[-1000:]
    elif damage == "altered":
        content[20_000_000] ^= 1
    else:
        content = b"not a batch"
    file.write_bytes(content)
    line = fails("--data-dir", str(tmp_path / "data"), sample=False)
    assert str(file) in line and "delete the folder and run again" in line
    assert file.read_bytes() == content


def test_missing_batch_file_is_named(fails, no_network, official, tmp_path):
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for path in (find_data_dir() / CIFAR10.base_folder).iterdir():
        if path.name != "batches.meta":
            (folder / path.name).symlink_to(path.resolve())
    line = fails("--data-dir", str(tmp_path / "data"), sample=False)
    assert f"{folder} lacks batches.meta" in line and "delete the folder" in line


@pytest.mark.parametrize("option", ["--output-dir", "--checkpoint-dir"])
def test_folder_that_cannot_be_written(fails, tmp_path, option):
    (tmp_path / "file").write_text("in the way")
    assert f"cannot write to {tmp_path / 'file' / 'out'}" in fails(option, str(tmp_path / "file" / "out"))


def test_full_disk_keeps_the_old_file(tmp_path):
    """The file size limit stands in for the full disk: the write fails half way, from the operating system."""
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old" * 1000)
    script = (
        "import resource, sys, pathlib, machine\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: machine.write_atomic(pathlib.Path(sys.argv[1]), bytes(1_000_000))\n"
        "except machine.UserError as error: sys.exit(str(error))"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(target)], cwd=ROOT, capture_output=True, text=True)
    assert (
        ended.returncode == 1
        and ended.stderr.startswith(f"cannot write {target}")
        and len(ended.stderr.splitlines()) == 1
    )
    assert target.read_bytes() == b"old" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    for content in (b"one", b"two, longer"):
        write_atomic(tmp_path / "new" / "file", content)
        assert (tmp_path / "new" / "file").read_bytes() == content
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A real checkpoint, copied to where a run in `tmp_path` looks for it."""
    (real,) = (finished[0] / "checkpoints").glob("*.pt")
    (tmp_path / "checkpoints").mkdir()
    return shutil.copy(real, tmp_path / "checkpoints" / real.name)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped in a weight", "empty", "not a checkpoint"])
def test_damaged_checkpoint_is_named_and_kept(fails, checkpoint, damage):
    content = bytearray(checkpoint.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "bit flipped in a weight":
        content[len(content) // 2] ^= 16
    else:
        content = b"" if damage == "empty" else b"hello"
    checkpoint.write_bytes(content)
    line = fails("--epochs", "4")
    assert f"the checkpoint {checkpoint} is damaged" in line and "--fresh" in line
    assert checkpoint.read_bytes() == content


def test_fresh_starts_over_and_keeps_the_old_checkpoint(checkpoint, tmp_path, capsys):
    checkpoint.write_bytes(b"damaged")
    options = [
        "--sample",
        "--epochs",
        "1",
        "--fresh",
        "--output-dir",
        str(tmp_path / "out"),
        "--checkpoint-dir",
        str(checkpoint.parent),
    ]
    q1_convnet.main(options)
    assert checkpoint.with_suffix(".old1").read_bytes() == b"damaged"
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1
    one_epoch = checkpoint.read_bytes()
    set_aside([checkpoint])  # a second --fresh does not overwrite what the first kept
    assert checkpoint.with_suffix(".old1").read_bytes() == b"damaged"
    assert checkpoint.with_suffix(".old2").read_bytes() == one_epoch


def test_fresh_leaves_what_another_process_trains(checkpoint):
    other = checkpoint.with_name("other.pt")
    other.write_bytes(b"")
    with file_lock(checkpoint.with_suffix(".lock")):
        with pytest.raises(UserError, match=f"--fresh: another process is training {checkpoint}"):
            set_aside([other, checkpoint])
    assert checkpoint.exists() and other.exists()


def test_checkpoint_of_other_settings(checkpoint):
    precision = torch.load(checkpoint, weights_only=True)["settings"]["precision"]
    settings = dataclasses.replace(on_sample(Settings(precision=precision)), learning_rate=1.0)
    with pytest.raises(UserError, match=r"trained with other settings \(learning_rate\).*--fresh"):
        load_checkpoint(checkpoint, settings, common.ConvNet())


DAMAGES = {  # a pattern in the file, and what stands there instead
    "text for a number": (r'"train_loss": ([\d.]+)', r'"train_loss": "\1"'),
    "not a number": (r'"validation_loss": [\d.]+', '"validation_loss": NaN'),
    "another accuracy": (r'("all_images": {[^}]*"accuracy": )[\d.]+', r"\g<1>99.0"),
    "another accuracy of the report's images": (r'("report_images": {[^}]*"accuracy": )[\d.]+', r"\g<1>99.0"),
    "its question is missing": (r'"question": "q1",', ""),
    "its machine is missing": (r'"device": "[^"]*",', ""),
    "fewer images": (r'"correct": ".{20}', '"correct": "'),
    "another best epoch": (r'"best_epoch": \d+', '"best_epoch": 7'),
    "another confusion": (r'("confusion": \[\s*\[ )\d+', r"\g<1>777"),
    "cut": (r"(?s)(.{2000}).*", r"\1"),
    "a list": (r"(?s).*", "[]"),
    "other JSON": (r"(?s).*", '{"run": "convnet"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_results_damaged_by_hand(finished, tmp_path, capsys, damage):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    file = tmp_path / "out/sample/q1/convnet_3epochs/seed0.json"
    whole = file.read_text()
    content = re.sub(*DAMAGES[damage], whole, count=1)
    assert content != whole
    file.write_text(content)
    with pytest.raises(SystemExit) as end:
        q1_convnet.main(["--sample", "--replot", "--output-dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and f"{file} is damaged" in err
    assert file.read_text() == content


def test_a_damaged_result_is_found_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "train", lambda *_: pytest.fail("trained"))
    file = tmp_path / "sample/q1/of_another_day/seed0.json"
    file.parent.mkdir(parents=True)
    file.write_text("<<<<<<< HEAD")
    with pytest.raises(SystemExit):
        q1_convnet.main(["--sample", f"--output-dir={tmp_path}", f"--checkpoint-dir={tmp_path}"])
    assert f"{file} is damaged" in capsys.readouterr().err
