"""Selection of proposals level by level, without duplicates (DETA, arXiv:2212.06137, section 3.3).

All shapes are those of the feature levels, and nothing is read from the device: suppression gives a
mask of the candidates and not a list, and both outcomes of the selection are computed.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy
from msdetr.ops.dispatch import Impl
from msdetr.ops.nms import nms_mask
from msdetr.structures import SpatialShapes

CANDIDATES_PER_LEVEL = 1000
"""Proposals of each level that suppression looks at, the best ones (published)."""


def select_by_level(
    scores: Tensor,
    boxes: Tensor,
    spatial_shapes: SpatialShapes,
    num_selected: int,
    *,
    iou_threshold: float,
    impl: Impl = "auto",
) -> Tensor:
    """The best proposals of each level, of those that overlap no better one of their level.

    Every level gets `num_selected // L` places. Places that are left go to the best of all other
    proposals that suppression keeps. Where it keeps fewer than `num_selected` in all, the selection
    is that of the best scores, duplicates included.

    Args:
        scores: [B, S]
        boxes: [B, S, 4] cxcywh, fractions of the valid image, which clips them.
        spatial_shapes: L pairs (height, width).
        num_selected: Q, S at most.
        iou_threshold: a proposal is dropped if it overlaps a better one by more.
        impl: of the suppression, see `msdetr.ops.dispatch`.

    Returns:
        [B, Q] int64 indices of proposals, best first.
    """
    scores = at_least_float32(scores)
    best = scores.topk(num_selected, dim=1).indices
    index, exists = _candidates(scores, spatial_shapes)
    num_levels, num_candidates = exists.shape
    if exists.numel() < num_selected:
        return best
    flat = index.flatten(1)  # [B, L * n]
    corners = cxcywh_to_xyxy(boxes.float()).clamp(0.0, 1.0)
    corners = corners.gather(1, flat[..., None].expand(-1, -1, 4))
    # Places without a candidate are the last of their level, so they suppress none.
    kept = nms_mask(
        corners.view(-1, num_candidates, 4), iou_threshold=iou_threshold, impl=impl
    ).view(flat.shape)
    kept = kept & exists.flatten()

    ranked = torch.where(kept, scores.gather(1, flat), -math.inf).argsort(
        dim=1, descending=True, stable=True
    )
    kept = kept.gather(1, ranked)
    level = ranked // num_candidates
    levels = torch.arange(num_levels, device=scores.device)[:, None]
    of_level = (level[:, None] == levels) & kept[:, None]  # [B, L, L * n]
    in_share = of_level.cumsum(-1) <= num_selected // num_levels
    chosen = (of_level & in_share).any(1)
    spare = kept & ~chosen
    num_spare = num_selected - chosen.sum(-1, keepdim=True)
    chosen = chosen | (spare & (spare.cumsum(-1) <= num_spare))
    # The chosen ones first, in their order.
    place = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_selected]
    selected = flat.gather(1, ranked.gather(1, place))
    is_enough = kept.sum(-1, keepdim=True) >= num_selected
    return torch.where(is_enough, selected, best)


def _candidates(scores: Tensor, spatial_shapes: SpatialShapes) -> tuple[Tensor, Tensor]:
    """Best proposals of each level, best first: indices [B, L, n], and whether a level has so many
    [L, n]. Places beyond hold index 0."""
    sizes = [height * width for height, width in spatial_shapes]
    width = min(CANDIDATES_PER_LEVEL, max(sizes))
    begins = accumulate(sizes, initial=0)
    indices = []
    for size, begin in zip(sizes, begins, strict=False):
        top = scores[:, begin : begin + size].topk(min(size, width), dim=1).indices + begin
        indices.append(torch.nn.functional.pad(top, (0, width - top.shape[1])))
    counts = torch.cat(
        [torch.full((1, 1), min(size, width), device=scores.device) for size in sizes]
    )
    return torch.stack(indices, dim=1), torch.arange(width, device=scores.device) < counts
