"""The launches whose machine code is inspected: each case calls launchers as a model would.

Tensors are on the device "meta": they have shapes, types and strides, but no storage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention.cases import SHAPES


@dataclass(frozen=True, kw_only=True)
class Case:
    """A use of kernels. Cases of new kernels belong in `CASES`."""

    name: str
    dtype: str
    """Name of the type of the computation."""
    launch: Callable[[], None]
    """Calls launchers, with tensors on the device "meta"."""

    @property
    def title(self) -> str:
        """Name and type, by which `--cases` selects."""
        return f"{self.name} {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Arguments of deformable attention."""

    shape: str
    """Name in `SHAPES`."""
    dtype: torch.dtype
    batch: int = 2
    reference_dim: int
    """Coordinates of a reference point; 0: the standard op, with float32 locations and weights."""
    need_reference: bool = False
    """Whether reference points have a gradient."""
    deterministic: bool = False
    launchers: tuple[str, ...] = ("forward", "points", "value")


def launch_attention(call: AttentionCall) -> None:
    """Launch the kernels of deformable attention, forward and backward."""
    from msdetr.kernels.ms_deform_attn import launch as kernels

    shape = SHAPES[call.shape]
    num_levels, num_points = len(shape.levels), shape.num_points
    samples = shape.num_heads * num_levels * num_points
    rows = (call.batch, shape.num_tokens if shape.num_queries is None else shape.num_queries)
    empty = functools.partial(torch.empty, device="meta")
    value = empty(call.batch, shape.num_tokens, shape.num_heads, shape.head_dim, dtype=call.dtype)
    if call.reference_dim:
        # Offsets and logits are slices of one projection, and so are their gradients.
        projection = empty(*rows, 3 * samples, dtype=call.dtype)
        offsets, logits = projection.split((2 * samples, samples), dim=2)
        reference = empty(*rows, num_levels, call.reference_dim)
        points = kernels.Points(offsets, logits, reference, num_points)
        valid_sizes = empty(call.batch, num_levels, 2, dtype=torch.int64)
    else:
        locations, weights = empty(*rows, 2 * samples), empty(*rows, samples)
        points = kernels.Points(locations, weights, None, num_points)
        valid_sizes = None
    if "forward" in call.launchers:
        kernels.forward(value, shape.levels, points, valid_sizes)
    backward = (
        empty(*rows, shape.num_heads * shape.head_dim, dtype=call.dtype),
        value,
        shape.levels,
        points,
        valid_sizes,
    )
    if "points" in call.launchers:
        # Gradients have the strides of their tensors.
        gradients = (points.points, points.weights)
        kernels.backward_points(*backward, *gradients, need_reference=call.need_reference)
    if "value" in call.launchers:
        kernels.backward_value(*backward, deterministic=call.deterministic)


def _attention_case(name: str, dtype: str, **call: Any) -> Case:
    arguments = AttentionCall(dtype=getattr(torch, dtype), **call)
    return Case(name=name, dtype=dtype, launch=functools.partial(launch_attention, arguments))


def _attention_cases() -> Iterator[Case]:
    encoder = {"shape": "encoder", "reference_dim": 2}
    decoder = {"shape": "decoder-300", "reference_dim": 4}
    standard = {"shape": "encoder", "reference_dim": 0}
    for dtype in ("bfloat16", "float32"):
        # The slowest to compile come first.
        yield _attention_case("encoder", dtype, **encoder)
        yield _attention_case(
            "encoder-deterministic", dtype, **encoder, deterministic=True, launchers=("value",)
        )
        yield _attention_case("decoder-300", dtype, **decoder)
        yield _attention_case("decoder-900", dtype, shape="decoder-900", batch=16, reference_dim=4)
        # Its reference points are learned, so they have a gradient.
        yield _attention_case(
            "decoder-one-stage",
            dtype,
            shape="decoder-300",
            reference_dim=2,
            need_reference=True,
            launchers=("points",),
        )
        yield _attention_case("standard-op", dtype, **standard)
    for name, call in (("encoder", encoder), ("decoder-300", decoder), ("standard-op", standard)):
        yield _attention_case(name, "float16", **call, launchers=("forward",))


def launch_assignment(
    layers: int, queries: int, slots: int, dtype: torch.dtype, *, copies: int = 1
) -> None:
    """Both assignments of decoder layers; of a single layer (the encoder), and of targets with
    copies (Hybrid DETR), linear assignment alone.
    """
    from msdetr.kernels import linear_assignment, matching_cost, one_to_many

    batch = 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    predictions = (
        empty(layers, batch, queries, 91, dtype=dtype),
        empty(layers, batch, queries, 4),
    )
    labels, boxes = empty(batch, slots, dtype=torch.int64), empty(batch, slots, 4)
    count = empty(batch, dtype=torch.int64)
    is_encoder = layers == 1
    match_labels = None if is_encoder else labels
    cost = matching_cost.matching_cost(
        *predictions,
        match_labels,
        boxes,
        count,
        cost_class=0.0 if is_encoder else 2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        giou_eps=0.0,
        alpha=0.25,
        worst=1e6,
    )
    linear_assignment.linear_assignment(cost.transpose(2, 3), count, match_labels, copies)
    if is_encoder or copies > 1:
        return
    one_to_many.one_to_many(
        *predictions,
        labels,
        boxes,
        count,
        empty(layers, batch, queries),
        k=6,
        threshold=0.4,
        limit=queries // 4,
        iou_weight=0.7,
        class_weight=0.3,
        worst=-1.0,
    )


def launch_focal_loss(queries: int, dtype: torch.dtype) -> None:
    """Forward and backward of six layers."""
    from msdetr.kernels import focal_loss

    logits = torch.empty(6, 2, queries, 91, dtype=dtype, device="meta")
    target_class = torch.empty(6, 2, queries, dtype=torch.int64, device="meta")
    grad = torch.empty(6, dtype=torch.float32, device="meta")
    focal_loss.forward(logits, target_class, 0.25, 2.0)
    focal_loss.backward(grad, logits, target_class, 0.25, 2.0)


def launch_nms() -> None:
    """Two images with five levels of 1,000 boxes."""
    from msdetr.kernels import nms

    nms.nms_mask(torch.empty(10, 1000, 4, device="meta"), 0.9)


def _training_cases() -> Iterator[Case]:
    assignments = (
        ("assignment-300", 6, 300, 20, 1),
        ("assignment-900", 6, 900, 100, 1),
        ("assignment-crowd", 6, 300, 512, 1),  # more targets than queries
        ("assignment-encoder", 1, 22223, 100, 1),
        ("assignment-copies", 6, 1500, 100, 6),
    )
    for name, layers, queries, slots, copies in assignments:
        launch = functools.partial(
            launch_assignment, layers, queries, slots, torch.bfloat16, copies=copies
        )
        yield Case(name=name, dtype="bfloat16", launch=launch)
    for dtype in ("bfloat16", "float32"):
        focal = functools.partial(launch_focal_loss, 300, getattr(torch, dtype))
        yield Case(name="focal-loss", dtype=dtype, launch=focal)
    yield Case(name="nms-1000", dtype="float32", launch=launch_nms)


CASES: tuple[Case, ...] = (*_attention_cases(), *_training_cases())
