"""Typed containers for batches, predictions and assignments.

Letters in shape comments: B images, S tokens of all levels, Q queries, L levels, N decoder layers,
T target slots (padded), K classes. Boxes are (centre x, centre y, width, height) as fractions of
the valid image unless a name says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND = -1
"""`Assignment.target_class` of a query that learns to be background."""
IGNORED = -2
"""`Assignment.target_class` of a query without any loss, for instance in an empty target slot."""

SpatialShapes = tuple[tuple[int, int], ...]
"""(height, width) of each feature level, as Python integers: fixed per image bucket."""


def spatial_shapes_tensor(
    spatial_shapes: SpatialShapes, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[L, 2] (height, width), filled on the device: a copy from the host would synchronise."""
    sides = [
        torch.full((1,), side, dtype=dtype, device=device)
        for shape in spatial_shapes
        for side in shape
    ]
    return torch.cat(sides).view(-1, 2)


class ImageBatch(NamedTuple):
    """Images of one padded size. Padding is always right and bottom."""

    pixels: Tensor
    """[B, 3, H, W], RGB: uint8 as decoded, or floating point and then already normalised."""
    sizes: Tensor
    """[B, 2] int64, valid (height, width) in pixels."""


class Targets(NamedTuple):
    """Ground truth, padded to T slots per image."""

    labels: Tensor
    """[B, T] int64, 0 in empty slots."""
    boxes: Tensor
    """[B, T, 4] float, 0 in empty slots."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """[B] int64, filled slots; they come first."""

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True where a slot holds a target."""
        slots = torch.arange(self.labels.shape[1], device=self.labels.device)
        return slots < self.count[:, None]

    def repeated(self, times: int) -> Targets:
        """Targets of B * times images: those of each image, `times` times in a row."""
        if times == 1:
            return self
        return Targets(*(x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1) for x in self))


class TargetCount(NamedTuple):
    """Number of targets of a step, over all its micro-batches."""

    mean: Tensor
    """0-dim, mean over the processes."""
    local: Tensor
    """0-dim, of this process."""


class Batch(NamedTuple):
    """One step's input."""

    images: ImageBatch
    targets: Targets
    image_ids: Tensor
    """[B] int64, ids of the annotation file; on the host."""
    original_sizes: Tensor
    """[B, 2] int64, (height, width) of the stored images."""


class FeaturePyramid(NamedTuple):
    """Feature levels flattened into one token sequence."""

    tokens: Tensor
    """[B, S, C]"""
    spatial_shapes: SpatialShapes
    """L pairs, S = sum of height * width."""
    valid_sizes: Tensor
    """[B, L, 2] int64, valid (height, width) of each level."""


class Predictions(NamedTuple):
    """Class logits and boxes of N layers."""

    logits: Tensor
    """[N, B, Q, K]"""
    boxes: Tensor
    """[N, B, Q, 4] in [0, 1]"""


def split_groups(x: Tensor, num_groups: int, *, dim: int) -> Tensor:
    """[..., B, groups * Q, ...] to [..., B * groups, Q, ...]; `dim` is that of the queries."""
    return torch.flatten(x.unflatten(dim, (num_groups, -1)), dim - 1, dim)


class Branch(NamedTuple):
    """Predictions that are supervised together, of queries of their own or shared with others."""

    predictions: Predictions
    """N layers, Q queries of all groups."""
    anchors: Tensor | None = None
    """[B, Q, 4] boxes (cxcywh) that the predictions start from, where a matcher may read them."""
    num_groups: int = 1
    """Groups of equal size, one after the other in Q. Each is matched with all targets."""

    def groups_as_images(self) -> Branch:
        """The same predictions as those of B * groups images with one group each, image-major."""
        if self.num_groups == 1:
            return self
        logits, boxes = (split_groups(x, self.num_groups, dim=2) for x in self.predictions)
        anchors = self.anchors
        if anchors is not None:
            anchors = split_groups(anchors, self.num_groups, dim=1)
        return Branch(Predictions(logits, boxes), anchors)


class DetectorOutput(NamedTuple):
    """Output of the detector: branches by name, the same names for every batch.

    - `one_to_one`: the decoder layers, always there. Group DETR trains several groups.
    - `one_to_many`: the same queries under one-to-many supervision, in training where configured.
    - `hybrid`: the decoder layers for the extra queries of H-DETR, in training.
    - `denoising`: the decoder layers for noised targets (DN-DETR), in training. A group has a query
      per target slot.
    - `contrastive`: the same with negatives (DINO). A group has a query per target slot, and
      negatives of all of them after those.
    - `encoder`: two-stage proposals with their anchors, in training; N = 1, Q = S.
    - `encoder_selected`: the selected proposals instead, where they are selected by best class.
    """

    branches: dict[str, Branch]

    @property
    def one_to_one(self) -> Predictions:
        """Predictions of the decoder layers for the queries that infer: those of the first group.
        The last layer's are the detector's result."""
        (logits, boxes), _, num_groups = self.branches["one_to_one"]
        group_size = logits.shape[2] // num_groups
        return Predictions(logits[:, :, :group_size], boxes[:, :, :group_size])


class Assignment(NamedTuple):
    """Pairs of queries and targets, for all layers and images at once.

    A target has k places for queries. A query may fill places of several targets.
    """

    query_index: Tensor
    """[N, B, T, k] int64; 0 where `mask` is False."""
    mask: Tensor
    """[N, B, T, k] bool"""
    target_class: Tensor
    """[N, B, Q] int64, the class that each query learns, or `BACKGROUND`, or `IGNORED`."""


class Detections(NamedTuple):
    """Scored boxes, best first, D per image."""

    scores: Tensor
    """[B, D]; 0 in places that non-maximum suppression left empty."""
    labels: Tensor
    """[B, D] int64"""
    boxes: Tensor
    """[B, D, 4] (x0, y0, x1, y1) in pixels of the original image."""
