"""Small data sets in COCO layout, made in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msdetr.annotations.labels import LabelMap
from msdetr.data.annotated_images import AnnotatedImages, load_annotated_images

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


@dataclass(frozen=True)
class CocoFolder:
    images: Path
    annotations: Path

    def load(self, label_map: LabelMap | None = None) -> AnnotatedImages:
        (images,) = load_annotated_images([(self.images, self.annotations)], label_map=label_map)
        return images


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., CocoFolder]:
    """Writes an annotation file and an empty image folder; lists as in the file."""

    def write(
        images: Sequence[Any],
        annotations: Sequence[Any] = (),
        categories: Sequence[Any] = CATEGORIES,
        name: str = "instances.json",
    ) -> CocoFolder:
        folder = CocoFolder(tmp_path / "images", tmp_path / name)
        folder.images.mkdir(exist_ok=True)
        content = {
            "images": list(images),
            "annotations": list(annotations),
            "categories": list(categories),
        }
        folder.annotations.write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture
def noise_coco(write_coco: Callable[..., CocoFolder]) -> Callable[..., CocoFolder]:
    """Writes `count` images of noise, of different sizes, with 0 to 4 boxes each."""

    def write(count: int) -> CocoFolder:
        rng = np.random.default_rng(0)
        images, annotations, pixels = [], [], {}
        for i in range(count):
            width, height = rng.integers(30, 60, 2).tolist()
            name = f"{i}.png"
            images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
            pixels[name] = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            for _ in range(i % 5):
                x, y = rng.integers(0, 15, 2).tolist()
                annotation = {"image_id": 100 + i, "category_id": 3, "bbox": [x, y, 12, 14]}
                annotations.append({"id": len(annotations), **annotation})
        folder = write_coco(images, annotations)
        for name, array in pixels.items():
            Image.fromarray(array).save(folder.images / name)
        return folder

    return write
