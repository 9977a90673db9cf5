"""The official CIFAR-10, the bundled sample, batches; and data folders in which something is wrong."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF

import common
from common import ROOT, SAMPLE_DIR, Settings, UserError, find_data_dir, load_cifar10
from parts.augment import Cutout, RandomCrop


def test_images_and_labels_keep_their_places(monkeypatch, sample):
    """Without the official files: of images made up, and of the sample."""
    rng = np.random.default_rng(0)
    made_up = [rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (1003, 7)]
    parts = [SimpleNamespace(data=images, targets=rng.integers(0, 10, len(images)).tolist()) for images in made_up]
    monkeypatch.setattr(common, "open_cifar10", lambda _: parts)
    train, validation, test = load_cifar10(Path()).values()
    for split, part, chosen in ((train, 0, slice(3)), (validation, 0, slice(3, None)), (test, 1, slice(None))):
        assert np.array_equal(split.images.permute(0, 2, 3, 1), parts[part].data[chosen])
        assert split.labels.tolist() == parts[part].targets[chosen]
    digest = hashlib.sha256()
    for split in sample.values():
        digest.update(split.images.numpy().tobytes() + bytes(split.labels.tolist()))
    assert digest.hexdigest() == "148aa774c6633399c47c19f6db0399f083ecffe6d0c31f8f0145d4328dc6afbb"


def test_the_sample_is_cut_from_the_official_parts(sample, tmp_path, monkeypatch):
    if not (find_data_dir() / CIFAR10.base_folder).is_dir():
        pytest.skip("the official CIFAR-10 is not at hand (CIFAR10_DIR or data/)")
    official = load_cifar10(find_data_dir())
    monkeypatch.syspath_prepend(SAMPLE_DIR)
    import cut_sample

    cut_sample.cut_sample(find_data_dir(), tmp_path)
    index = (tmp_path / "index.json").read_text()
    assert index == (SAMPLE_DIR / "index.json").read_text()
    for part, split in sample.items():
        chosen = json.loads(index)[part]["official_index"]
        assert torch.equal(split.images, official[part].images[chosen])
        assert torch.equal(split.labels, official[part].labels[chosen])
        new, bundled = (Image.open(folder / f"{part}.png") for folder in (tmp_path, SAMPLE_DIR))
        assert new.tobytes() == bundled.tobytes()


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
    """Several processes draw what one would, one augmentation after the other; without a generator images stay."""
    split, index, crop, cutout = sample["train"], torch.arange(10), RandomCrop(), Cutout()
    settings = Settings(augment=(crop, cutout), mean=(0.0,) * 3, std=(1.0,) * 3)
    plain, _ = split.batch(index, settings)
    assert torch.equal(plain, split.images[:10].float() / 255)
    rng = torch.Generator().manual_seed(3)
    offsets, places = crop.draw(10, rng), cutout.draw(10, rng)
    whole = cutout.apply(crop.apply(plain, *offsets), *places)
    for part in (slice(0, 5), slice(5, 10), slice(None)):
        images, labels = split.batch(index, settings, torch.Generator().manual_seed(3), part)
        assert torch.equal(images, whole[part]) and torch.equal(labels, split.labels[index[part]])


def test_the_data_dir_is_the_options_or_the_environments_or_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR10_DIR", "~/cifar")
    assert find_data_dir(Path("elsewhere")) == Path("elsewhere") and find_data_dir() == tmp_path / "cifar"
    inside = tmp_path / CIFAR10.base_folder
    assert find_data_dir(inside) == inside  # it may be meant to be made
    inside.mkdir()
    monkeypatch.setenv("CIFAR10_DIR", str(inside))
    assert find_data_dir(inside) == find_data_dir() == tmp_path  # one level too deep
    monkeypatch.chdir(inside)
    assert find_data_dir(Path()) == tmp_path
    monkeypatch.setenv("CIFAR10_DIR", "")
    assert find_data_dir() == ROOT / "data"


@pytest.mark.parametrize("name", ["file", "empty"])
def test_the_environment_names_no_folder_with_cifar10(monkeypatch, no_network, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / name))
    with pytest.raises(UserError) as error:
        load_cifar10(find_data_dir())
    line = str(error.value)
    assert f"{tmp_path / name}" in line and "\n" not in line
    assert ("name resolution" in line) == (name == "empty")  # there it was to be downloaded


def test_damaged_files_are_left_and_said_to(no_network, tmp_path):
    """Nothing is downloaded over them."""
    damaged = tmp_path / CIFAR10.base_folder / "data_batch_3"
    damaged.parent.mkdir()
    damaged.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{tmp_path}.*corrupted.*delete it where it is damaged.*--sample"):
        load_cifar10(tmp_path)
    assert [*damaged.parent.iterdir()] == [damaged] and damaged.read_bytes() == b"damaged"
    (tmp_path / CIFAR10.filename).touch()  # the archive is still there: its extraction was interrupted
    with pytest.raises(UserError, match="name resolution"):
        load_cifar10(tmp_path)
