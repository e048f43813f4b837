"""Where the images and the annotations of a split are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msdetr.config import DataConfig

Split = Literal["train", "val"]


def resolve_split(config: DataConfig, split: Split) -> tuple[Path, Path]:
    """Image folder and annotation file of a split.

    `config.<split>_images` and `config.<split>_annotations` take precedence; what they leave open
    is looked up under `config.root` in the layout of the COCO download.

    Raises:
        ValueError: neither is given, or a path does not exist; says which and what to do.
    """
    root = config.root
    images = config.train_images if split == "train" else config.val_images
    annotations = config.train_annotations if split == "train" else config.val_annotations
    if root is None and (images is None or annotations is None):
        raise ValueError(
            f"no {split} data: give --data.root FOLDER (COCO layout), or both "
            f"--data.{split}-images FOLDER and --data.{split}-annotations FILE"
        )
    if images is None and root is not None:
        images = root / f"{split}2017"
    if annotations is None and root is not None:
        annotations = root / "annotations" / f"instances_{split}2017.json"
    assert images is not None
    assert annotations is not None
    if not images.is_dir():
        raise ValueError(
            f"{images}: the folder of the {split} images does not exist; check --data.root (a "
            f"folder in COCO layout) or give --data.{split}-images"
        )
    if not annotations.is_file():
        raise ValueError(
            f"{annotations}: the file of the {split} annotations does not exist; check --data.root "
            f"(a folder in COCO layout) or give --data.{split}-annotations"
        )
    return images, annotations
