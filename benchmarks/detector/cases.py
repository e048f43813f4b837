"""Cases of a whole detector: a recipe, and a batch of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.cli import require_at_least, require_known
from msdetr.config import RunConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.model.detector import PIXEL_MEAN, PIXEL_STD
from msdetr.presets import PRESETS
from msdetr.structures import Batch, ImageBatch

Dtype = Literal["float32", "bfloat16"]

NUM_CLASSES = 91
"""Number of COCO's classes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, independent of the implementation."""

    preset: str = "ms-detr-r50-300"
    """Recipe, by name."""
    batch: int = 2
    """Images at once."""
    dtype: Dtype = "float32"
    """`bfloat16`: matrix products under autocast."""
    height: int = 480
    """Image height in pixels."""
    width: int = 640
    """Image width in pixels."""
    num_targets: int = 7
    """Boxes per image (COCO has 7.3 on average)."""
    seed: int = 0
    """Seed of weights, images, targets and dropout."""

    def __post_init__(self) -> None:
        require_known("preset", [self.preset], PRESETS)
        require_at_least(self, 1, "batch", "height", "width")
        require_at_least(self, 0, "num_targets")

    @property
    def config(self) -> RunConfig:
        """The recipe, for COCO's classes, with all images of a step in one process."""
        config = PRESETS[self.preset].config
        return replace(
            config,
            seed=self.seed,
            model=replace(config.model, num_classes=NUM_CLASSES),
            train=replace(config.train, batch_size=self.batch, precision=self.dtype),
        )


def random_batch(case: Case) -> Batch:
    """Noise images of one size with random boxes, on the CPU; determined by the case alone."""
    generator = torch.Generator().manual_seed(case.seed)
    size = (case.height, case.width)
    samples = []
    for image_id in range(case.batch):
        sides = torch.rand(case.num_targets, 2, generator=generator) * 0.45 + 0.05
        centers = sides / 2 + torch.rand(sides.shape, generator=generator) * (1.0 - sides)
        samples.append(
            Sample(
                torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
                torch.randint(NUM_CLASSES, (case.num_targets,), generator=generator),
                torch.cat((centers, sides), dim=1),
                image_id,
                size,
            )
        )
    # Without padding, all implementations compute on the same images.
    return Collate(pad_multiple=1, target_buckets=case.config.data.target_buckets)(samples)


def normalized_pixels(images: ImageBatch) -> Tensor:
    """Pixels [B, 3, H, W] of unpadded images, normalised as the data loaders of others do it."""
    device = images.pixels.device
    mean, std = (
        torch.tensor(value, device=device)[:, None, None] for value in (PIXEL_MEAN, PIXEL_STD)
    )
    return (images.pixels / 255.0 - mean) / std
