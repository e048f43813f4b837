"""Cases of the assignment benchmark: sizes, and random predictions and targets."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.detector.cases import NUM_CLASSES
from msdetr.config import AssignmentConfig
from msdetr.structures import Targets

Task = Literal["one_to_many", "one_to_one", "hybrid", "encoder"]

DECODER_LAYERS = 6
CONFIG = AssignmentConfig()
"""Configuration of all assignments."""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    task: Task
    batch: int
    queries: int
    """Predictions per image and layer; of the encoder, its anchors."""
    targets: int
    """Per image."""

    @property
    def layers(self) -> int:
        """Layers that are assigned at once."""
        return 1 if self.task == "encoder" else DECODER_LAYERS

    @property
    def copies(self) -> int:
        """Queries per target in a linear assignment."""
        return CONFIG.hybrid_k if self.task == "hybrid" else 1

    def small(self) -> Case:
        """The same with two images, for comparisons."""
        return Case(self.task, min(self.batch, 2), self.queries, self.targets)


class Inputs(NamedTuple):
    """Predictions and targets of a case."""

    task: Task
    logits: Tensor
    """[N, B, Q, K]"""
    boxes: Tensor
    """[N, B, Q, 4]"""
    targets: Targets
    image_targets: tuple[tuple[Tensor, Tensor], ...]
    """Labels [T'] and boxes [T', 4] of each image, as in the published code."""
    priority: Tensor
    """[N, B, Q]"""
    copies: int = 1
    """Queries per target in a linear assignment."""

    @property
    def cost_class(self) -> float:
        """Weight of the class in one-to-one costs."""
        return CONFIG.encoder_cost_class if self.task == "encoder" else CONFIG.cost_class

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        moved: Inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self)
        return moved


def image_targets(targets: Targets) -> tuple[tuple[Tensor, Tensor], ...]:
    """Labels and boxes of each image, without empty slots."""
    return tuple(
        (labels[:count], boxes[:count])
        for labels, boxes, count in zip(
            targets.labels, targets.boxes, targets.count.tolist(), strict=True
        )
    )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs on the CPU. Half of the predictions are near a target, with a likely class."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.layers, case.batch, case.queries)
    rand = functools.partial(torch.rand, generator=generator)

    def random_boxes(*leading: int) -> Tensor:
        sides = rand(*leading, 2) * 0.45 + 0.05
        return torch.cat((sides / 2 + rand(*leading, 2) * (1.0 - sides), sides), dim=-1)

    labels = torch.zeros(case.batch, case.targets, dtype=torch.int64)
    if case.task != "encoder":
        labels = torch.randint(NUM_CLASSES, labels.shape, generator=generator)
    target_boxes = random_boxes(case.batch, case.targets)
    boxes = random_boxes(*shape)
    logits = torch.randn((*shape, NUM_CLASSES), generator=generator) - 4.0
    if case.targets:
        image = torch.arange(case.batch)[:, None]
        chosen = torch.randint(case.targets, shape, generator=generator)
        near = target_boxes[image, chosen]
        noise = torch.randn(near.shape, generator=generator)
        near = near + 0.15 * noise * near[..., 2:].repeat(1, 1, 1, 2)
        near[..., 2:].clamp_(min=0.01)
        is_near = rand(*shape, 1) < 0.5
        boxes = torch.where(is_near, near, boxes)
        logits.scatter_add_(3, labels[image, chosen][..., None], 4.0 * is_near)
    targets = Targets(labels, target_boxes, torch.full((case.batch,), case.targets))
    priority = rand(*shape)
    return Inputs(case.task, logits, boxes, targets, image_targets(targets), priority, case.copies)
