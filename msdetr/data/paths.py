"""Where the images and the annotations of a split are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msdetr.config import DataConfig

Split = Literal["train", "val"]


def resolve_split(config: DataConfig, split: Split) -> tuple[Path, Path]:
    """Image folder and annotation file of a split.

    `config.<split>_images` and `config.<split>_annotations` take precedence. A missing one is
    looked up under `config.root` in the layout of the COCO download.

    Raises:
        ValueError: neither is given, or a path does not exist; the message names the options.
    """
    images = config.train_images if split == "train" else config.val_images
    annotations = config.train_annotations if split == "train" else config.val_annotations
    if config.root is not None:
        images = images or config.root / f"{split}2017"
        annotations = annotations or config.root / "annotations" / f"instances_{split}2017.json"
    if images is None or annotations is None:
        raise ValueError(
            f"no {split} data: give --data.root FOLDER (COCO layout), or both "
            f"--data.{split}-images FOLDER and --data.{split}-annotations FILE"
        )
    for path, place, kind, exists in (
        (images, "folder", "images", images.is_dir()),
        (annotations, "file", "annotations", annotations.is_file()),
    ):
        if not exists:
            raise ValueError(
                f"{path}: the {place} of the {split} {kind} does not exist; check --data.root (a "
                f"folder in COCO layout) or give --data.{split}-{kind}"
            )
    return images, annotations
