"""Cuts the bundled sample out of the official CIFAR-10, which lies in $CIFAR10_DIR, else in data/.

    python sample/cut_sample.py

Each part is class-balanced and drawn from the respective official part (training from the first 49,000 training
images, validation from the last 1,000, test from the test images), and written as one lossless PNG contact sheet,
COLUMNS images to a row. `index.json` keeps, for every image of a sheet in reading order, its label and its
number in the official part.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import find_data_dir, load_cifar10

COLUMNS = 50
PER_CLASS = {"train": 150, "validation": 20, "test": 50}  # 2,200 images, 4.8 MB


def cut_sample(data_dir: Path, folder: Path = HERE) -> None:
    """Write train.png, validation.png, test.png and index.json into `folder`; the same bytes every time."""
    rng = np.random.default_rng(0)
    index = {}
    for part, split in load_cifar10(data_dir).items():
        labels = split.labels.numpy()
        chosen = np.sort(
            np.concatenate([rng.choice(np.flatnonzero(labels == c), PER_CLASS[part], replace=False) for c in range(10)])
        )
        images = split.images[chosen]  # [n, 3, 32, 32]
        sheet = images.view(-1, COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(-1, COLUMNS * 32, 3)
        Image.fromarray(sheet.numpy()).save(folder / f"{part}.png", optimize=True)
        index[part] = {"labels": labels[chosen].tolist(), "official_index": chosen.tolist()}
    (folder / "index.json").write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    cut_sample(find_data_dir())
