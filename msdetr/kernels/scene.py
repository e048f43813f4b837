"""Predictions and targets, as the kernels of assignment take them: a program loads the boxes of a
block of queries once, and loops over the targets of their image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.box_overlap import Box, load_box


class Scene(NamedTuple):
    """Predictions of N layers and the targets of their B images; an argument of kernels."""

    logits: Any  # [N, B, Q, K]
    logits_n: Any  # strides
    logits_b: Any
    logits_q: Any
    logits_k: Any
    boxes: Any  # [N, B, Q, 4]
    boxes_n: Any
    boxes_b: Any
    boxes_q: Any
    boxes_c: Any
    labels: Any  # [B, T], or None: all targets have class 0
    target_boxes: Any  # [B, T, 4]
    count: Any  # [B]
    batch: Any
    num_queries: Any
    num_targets: Any
    num_classes: Any


def scene_of(
    logits: Tensor, boxes: Tensor, labels: Tensor | None, target_boxes: Tensor, count: Tensor
) -> Scene:
    """Tensors of targets are contiguous."""
    targets = (labels, target_boxes, count)
    sizes = (*boxes.shape[1:3], target_boxes.shape[1], logits.shape[3])
    return Scene._make((logits, *logits.stride(), boxes, *boxes.stride(), *targets, *sizes))


class Queries(NamedTuple):
    """A block of queries of a layer and image."""

    layer_image: Any
    first_slot: Any  # of the image's targets
    count: Any  # of the image's targets
    index: Any  # [BLOCK]
    exists: Any  # [BLOCK]
    logits: Any  # [BLOCK] pointers
    box: Box  # [BLOCK]


@triton.jit
def load_queries(scene, BLOCK: tl.constexpr):
    """The queries of this program; the grid is (blocks, N * B)."""
    layer_image = tl.program_id(1).to(tl.int64)
    layer = layer_image // scene.batch
    image = layer_image % scene.batch
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < scene.num_queries
    wide = index.to(tl.int64)
    logits = layer * scene.logits_n + image * scene.logits_b + wide * scene.logits_q
    boxes = layer * scene.boxes_n + image * scene.boxes_b + wide * scene.boxes_q
    return Queries(
        layer_image,
        image * scene.num_targets,
        tl.minimum(tl.load(scene.count + image).to(tl.int32), scene.num_targets),
        index,
        exists,
        scene.logits + logits,
        load_box(scene.boxes + boxes, scene.boxes_c, exists),
    )


@triton.jit
def load_logit(scene, queries, target):
    """The logits of a target's class, in float32. Classes out of range count as the nearest one."""
    label = tl.zeros((), tl.int64)
    if scene.labels is not None:
        label = tl.load(scene.labels + queries.first_slot + target)
        label = tl.minimum(tl.maximum(label, 0), scene.num_classes - 1)
    pointer = queries.logits + label * scene.logits_k
    return tl.load(pointer, mask=queries.exists, other=0.0).to(tl.float32)
