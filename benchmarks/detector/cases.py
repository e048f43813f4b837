"""Cases of a whole detector: a recipe, and a batch of noise."""

from __future__ import annotations

import dataclasses
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

DENOISING = {"dn": "ms-dn-deformable-detr-r50", "cdn": "ms-cdn-deformable-detr-r50"}
"""Presets whose denoising queries a recipe gets as `PRESET+dn` and `PRESET+cdn`."""


def require_recipe(name: str) -> None:
    """Raise ValueError if a recipe is neither a preset nor a preset with denoising."""
    preset, plus, denoising = name.partition("+")
    require_known("preset", [preset], PRESETS)
    require_known("denoising", [denoising] if plus else [], DENOISING)


def recipe(name: str) -> RunConfig:
    """The configuration of a preset, perhaps with denoising queries."""
    preset, plus, denoising = name.partition("+")
    config = PRESETS[preset].config
    if not plus:
        return config
    source = PRESETS[DENOISING[denoising]].config.model
    names = [field.name for field in dataclasses.fields(source)]
    fields = {name: getattr(source, name) for name in names if name.startswith("denoising")}
    return replace(config, model=replace(config.model, **fields))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, independent of the implementation."""

    preset: str = "ms-detr-r50-300"
    """Recipe: a preset, or a preset with denoising queries (`PRESET+dn`, `PRESET+cdn`)."""
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
        require_recipe(self.preset)
        require_at_least(self, 1, "batch", "height", "width")
        require_at_least(self, 0, "num_targets")

    @property
    def config(self) -> RunConfig:
        """The recipe, for COCO's classes, with all images of a step in one process."""
        config = recipe(self.preset)
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
