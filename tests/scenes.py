"""Random predictions and targets for the tests of supervision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.structures import Assignment, Branch, Predictions, Targets
from msdetr.supervision.matchers import MatchContext, Matcher


class Scene(NamedTuple):
    """Predictions of N layers and the targets of their images."""

    logits: Tensor
    """[N, B, Q, K]"""
    boxes: Tensor
    """[N, B, Q, 4] cxcywh"""
    targets: Targets


def match(matcher: Matcher, scene: Scene, **context: Any) -> Assignment:
    """The assignment of a scene; `context` holds fields of `MatchContext`."""
    branch = Branch(Predictions(scene.logits, scene.boxes))
    with torch.no_grad():
        return matcher(branch, scene.targets, MatchContext(**context))


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., 4] proper boxes (cxcywh) that often overlap."""
    center = 0.3 + 0.4 * torch.rand(*shape, 2, dtype=dtype)
    size = 0.1 + 0.4 * torch.rand(*shape, 2, dtype=dtype)
    return torch.cat((center, size), dim=-1)


def random_scene(
    counts: tuple[int, ...],
    *,
    layers: int = 2,
    queries: int = 12,
    classes: int = 3,
    empty_slots: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """One image per count. Every other query is close to a target, if there is one."""
    batch, slots = len(counts), max(counts) + empty_slots
    targets = padded_targets(
        [torch.randint(classes, (count,)) for count in counts],
        [random_boxes(count, dtype=dtype) for count in counts],
        slots=slots,
    )
    boxes = random_boxes(layers, batch, queries, dtype=dtype)
    for image, count in enumerate(counts):
        if count:
            near = targets.boxes[image, torch.randint(count, (layers, queries))]
            near = near * (0.9 + 0.2 * torch.rand_like(near))
            boxes[:, image, ::2] = near[:, ::2]
    logits = torch.randn(layers, batch, queries, classes, dtype=dtype)
    return Scene(logits, boxes, targets)


def padded_targets(labels: list[Tensor], boxes: list[Tensor], *, slots: int) -> Targets:
    """Targets of each image, padded to `slots` with zeros."""
    padded = Targets(
        torch.zeros(len(labels), slots, dtype=torch.int64),
        torch.zeros(len(labels), slots, 4, dtype=boxes[0].dtype),
        torch.tensor([len(image) for image in labels]),
    )
    for image, count in enumerate(padded.count.tolist()):
        padded.labels[image, :count] = labels[image]
        padded.boxes[image, :count] = boxes[image]
    return padded


def with_garbage_padding(targets: Targets, classes: int, value: float | None = None) -> Targets:
    """The same targets, with other (valid) labels and boxes in the empty slots."""
    labels = torch.randint_like(targets.labels, classes)
    boxes = torch.rand_like(targets.boxes)
    if value is not None:
        boxes.fill_(value)
    mask = targets.mask
    return Targets(
        torch.where(mask, targets.labels, labels),
        torch.where(mask[..., None], targets.boxes, boxes),
        targets.count,
    )
