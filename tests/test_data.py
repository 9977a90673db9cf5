import json
import subprocess
import sys

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from common import CLASSES, ROOT, SAMPLE_DIR, Settings, find_data_dir


def test_the_official_split(official):
    assert {part: len(split) for part, split in official.items()} == {
        "train": 49_000,
        "validation": 1_000,
        "test": 10_000,
    }
    assert official["train"].labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert official["validation"].labels[-5:].tolist() == [2, 6, 9, 1, 1]  # the end of data_batch_5
    assert official["test"].labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for split in official.values():
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32)


def test_the_sample_is_cut_from_the_official_parts(official, sample):
    index = json.loads((SAMPLE_DIR / "index.json").read_text())
    for part, split in sample.items():
        chosen = index[part]["official_index"]
        assert torch.equal(split.images, official[part].images[chosen])
        assert torch.equal(split.labels, official[part].labels[chosen])


def test_cutting_the_sample_again_gives_the_same_files(official, tmp_path):
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); from cut_sample import cut_sample;"
        "cut_sample(*map(pathlib.Path, sys.argv[2:]))"
    )
    command = [sys.executable, "-c", script, str(ROOT / "sample"), str(find_data_dir()), str(tmp_path)]
    subprocess.run(command, check=True)
    for name in ("train.png", "validation.png", "test.png", "index.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLE_DIR / name).read_bytes()


def test_the_sample_is_small_and_balanced(sample):
    assert sum(path.stat().st_size for path in SAMPLE_DIR.iterdir() if path.is_file()) <= 5_000_000
    assert {part: len(split) for part, split in sample.items()} == {"train": 1_500, "validation": 200, "test": 500}
    for split in sample.values():
        assert torch.bincount(split.labels).tolist() == [len(split) // len(CLASSES)] * len(CLASSES)


def test_a_batch_is_normalised_as_torchvision_does_it(sample):
    split, index = sample["validation"], torch.tensor([5, 0, 199])
    settings = Settings(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images, labels = split.batch(index, settings)
    expected = functional.normalize(
        functional.to_dtype(split.images[index], torch.float32, scale=True), settings.mean, settings.std
    )
    torch.testing.assert_close(images, expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, split.labels[index])
    half, _ = split.batch(index, Settings())  # the report's 0.5 and 0.5: [0, 255] becomes [-1, 1]
    np.testing.assert_allclose(half.numpy(), split.images[index].numpy() / 127.5 - 1, atol=1e-6)


def test_a_batch_leaves_the_stored_images_alone(sample):
    split = sample["validation"]
    before = split.images.clone()
    split.batch(torch.arange(200), Settings())
    assert torch.equal(split.images, before)


class AddDrawn:
    """An augmentation that shows what it drew: it sets every image to its own random number."""

    def draw(self, n, rng):
        return (torch.rand(n, generator=rng),)

    def apply(self, images, value):
        return torch.zeros_like(images) + value.view(-1, 1, 1, 1)


def test_augmentation_draws_per_image_and_for_the_whole_batch(sample):
    split, index, settings = (
        sample["train"],
        torch.arange(10),
        Settings(augment=(AddDrawn(),), mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    images, _ = split.batch(index, settings, torch.Generator().manual_seed(3))
    assert len(images[:, 0, 0, 0].unique()) == 10
    half, _ = split.batch(index, settings, torch.Generator().manual_seed(3), part=slice(5, 10))
    assert torch.equal(half, images[5:])
    plain, _ = split.batch(index, settings)  # no generator: evaluation
    assert torch.equal(plain, split.images[:10].float() / 255)
