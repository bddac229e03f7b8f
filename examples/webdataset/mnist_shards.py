"""MNIST as WebDataset shards: what train.py trains on if it is given none."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "mnist"))

from digits import load_mnist


def write_shards(
    folder: Path, num_samples: int, *, samples_per_shard: int, seed: int = 0, sorted_by_label: bool = False
) -> list[str]:
    """Write the first of MNIST's 60,000 training images as tar shards of PNGs (.png) and digits (.cls).

    Returns:
        The paths of the shards, in their order.
    """
    train_set, _ = load_mnist(num_samples, 0)
    images = (255 * (train_set.images[:, 0].numpy() * 0.3081 + 0.1307)).round().clip(0, 255).astype(np.uint8)
    digits = train_set.digits.numpy()
    order = (
        np.argsort(digits, kind="stable") if sorted_by_label else np.random.default_rng(seed).permutation(num_samples)
    )
    pattern = f"{folder}/mnist-%03d.tar"
    with webdataset.ShardWriter(pattern, maxcount=samples_per_shard, verbose=0) as writer:
        for row in order.tolist():
            Image.fromarray(images[row]).save(png := io.BytesIO(), "png")
            writer.write({"__key__": f"{row:05d}", "png": png.getvalue(), "cls": str(digits[row]).encode()})
    return [pattern % shard for shard in range(-(-num_samples // samples_per_shard))]
