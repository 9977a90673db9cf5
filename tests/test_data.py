"""The official CIFAR-10, the bundled sample, batches; and data folders in which something is wrong."""

import json
import os
import socket
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF

import common
from common import CLASSES, ROOT, SAMPLE_DIR, Settings, UserError, fetch_cifar10, find_data_dir, load_cifar10
from parts.augment import Cutout, RandomCrop, augment

FILES = [name for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]] + [CIFAR10.meta["filename"]]


def test_the_official_split(official):
    sizes = {part: len(split) for part, split in official.items()}
    assert sizes == {"train": 49_000, "validation": 1_000, "test": 10_000}
    assert official["train"].labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert official["validation"].labels[-5:].tolist() == [2, 6, 9, 1, 1]  # the end of data_batch_5
    assert official["test"].labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for split in official.values():
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32)


def test_the_sample_is_cut_from_the_official_parts(official, sample, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLE_DIR)
    import cut_sample

    monkeypatch.setattr(cut_sample, "load_cifar10", lambda _: official)
    cut_sample.cut_sample(find_data_dir(), tmp_path)
    index = (tmp_path / "index.json").read_text()
    assert index == (SAMPLE_DIR / "index.json").read_text()
    for part, split in sample.items():
        chosen = json.loads(index)[part]["official_index"]
        assert torch.equal(split.images, official[part].images[chosen])
        assert torch.equal(split.labels, official[part].labels[chosen])
        new, bundled = (Image.open(folder / f"{part}.png") for folder in (tmp_path, SAMPLE_DIR))
        assert new.tobytes() == bundled.tobytes()


def test_the_sample_is_small_and_balanced(sample):
    assert sum(path.stat().st_size for path in SAMPLE_DIR.iterdir() if path.is_file()) <= 5_000_000
    for part, per_class in {"train": 150, "validation": 20, "test": 50}.items():
        assert torch.bincount(sample[part].labels).tolist() == [per_class] * len(CLASSES)


def test_a_batch_is_normalised_as_torchvision_does_it(sample):
    split, index = sample["validation"], torch.tensor([5, 0, 199])
    before = split.images.clone()
    scaled = TF.to_dtype(split.images[index], torch.float32, scale=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images, labels = split.batch(index, Settings(mean=mean, std=std))
    torch.testing.assert_close(images, TF.normalize(scaled, mean, std))
    torch.testing.assert_close(split.batch(index, Settings())[0], scaled * 2 - 1)  # the report's: 0.5 and 0.5
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, split.labels[index]) and torch.equal(split.images, before)


def test_parts_of_a_batch_are_augmented_as_the_whole(sample):
    """Several processes draw what one would; without a generator the images stay as they are."""
    split, index = sample["train"], torch.arange(10)
    settings = Settings(augment=(RandomCrop(), Cutout()), mean=(0.0,) * 3, std=(1.0,) * 3)
    plain, _ = split.batch(index, settings)
    assert torch.equal(plain, split.images[:10].float() / 255)
    whole = augment(plain, settings.augment, torch.Generator().manual_seed(3), 10)
    for part in (slice(0, 5), slice(5, 10), slice(None)):
        images, labels = split.batch(index, settings, torch.Generator().manual_seed(3), part)
        assert torch.equal(images, whole[part]) and torch.equal(labels, split.labels[index[part]])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """All official files by name; those that hold anything but "whole" count as damaged."""
    inside = tmp_path / CIFAR10.base_folder
    inside.mkdir()
    for name in FILES:
        (inside / name).write_text("whole")

    def check(path, md5):
        return Path(path).exists() and Path(path).read_bytes() == b"whole"

    monkeypatch.setattr(common, "check_integrity", check)
    return inside


def test_the_data_dir_is_the_options_or_the_environments_or_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR10_DIR", "~/cifar")
    assert find_data_dir(Path("elsewhere")) == Path("elsewhere") and find_data_dir() == tmp_path / "cifar"
    inside = tmp_path / CIFAR10.base_folder
    monkeypatch.setenv("CIFAR10_DIR", str(inside))
    assert find_data_dir() == inside  # it may be meant to be made
    inside.mkdir()
    assert find_data_dir(inside) == find_data_dir() == tmp_path  # one level too deep
    monkeypatch.setenv("CIFAR10_DIR", "")
    assert find_data_dir() == ROOT / "data"
    monkeypatch.delenv("CIFAR10_DIR")
    assert find_data_dir() == ROOT / "data"


@pytest.mark.parametrize(
    ("name", "what"), [("file", "a file"), ("dangling", "a link"), ("loop", "a link"), ("data ", "in a blank")]
)
def test_the_environment_names_no_folder(monkeypatch, no_network, tmp_path, name, what):
    """The path is quoted, so that a blank at its end shows."""
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / name))
    with pytest.raises(UserError) as error:
        load_cifar10(find_data_dir())
    line = str(error.value)
    assert repr(str(tmp_path / name)) in line and what in line and "--sample" in line and "\n" not in line


@pytest.mark.parametrize("content", [None, "cut"])
@pytest.mark.parametrize(("writable", "advice"), [(True, "delete the folder"), (False, "read-only")])
def test_a_missing_or_damaged_file_is_named_and_left(folder, monkeypatch, content, writable, advice):
    file = folder / "batches.meta"
    file.unlink()
    if content:
        file.write_text(content)
    monkeypatch.setattr(os, "access", lambda *_: writable)  # root may write anywhere
    with pytest.raises(UserError, match=f"{folder}.*batches.meta.*{advice}"):
        load_cifar10(folder.parent)
    assert (file.read_text() if file.exists() else None) == content


def test_an_altered_file_is_not_the_official_one(official, tmp_path):
    (tmp_path / CIFAR10.base_folder).mkdir()
    content = bytearray((find_data_dir() / CIFAR10.base_folder / "data_batch_3").read_bytes())
    content[20_000_000] ^= 1
    (tmp_path / CIFAR10.base_folder / "data_batch_3").write_bytes(content)
    for name in set(FILES) - {"data_batch_3"}:
        (tmp_path / CIFAR10.base_folder / name).symlink_to(find_data_dir().resolve() / CIFAR10.base_folder / name)
    assert f"{CIFAR10.base_folder}: data_batch_3 missing or damaged" in common.cifar10_problem(tmp_path)
    assert common.cifar10_problem(find_data_dir()) is None


def test_an_archive_that_was_being_unpacked_is_unpacked_again(folder, no_network, monkeypatch):
    """Killed half way: a file is cut, another is missing, and the whole archive lies beside them."""
    archive = folder.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    (folder / "data_batch_1").write_text("who")
    (folder / "data_batch_2").unlink()
    check = common.check_integrity
    monkeypatch.setattr(common, "check_integrity", lambda path, md5: path == str(archive) or check(path, md5))
    fetch_cifar10(folder.parent)
    assert all((folder / name).read_text() == "whole" for name in FILES)
