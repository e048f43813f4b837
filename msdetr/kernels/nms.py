"""Greedy non-maximum suppression of many problems in one launch, one program per problem.

Boxes come best first. A program takes them in blocks. A tile of a block's boxes (rows) and
earlier boxes (columns) holds the overlaps of its pairs in registers; nothing but the result is
written to memory. Each thread holds boxes of the block and reads one earlier box per tile.

1. Tiles of all earlier blocks tell which boxes of the block overlap one that is kept.
2. Within the block, a bit mask per box names the earlier boxes that it overlaps, its rivals. The
   first set is all boxes that step 1 leaves. A round takes from these the boxes without a rival in
   the last set. Round r decides the first r boxes for good, so the sets become constant, at the
   greedy result. That takes as many rounds as the longest chain of rivals has boxes.

Why not plain PyTorch. Greedy suppression is a fixed point of the same rounds on the whole matrix of
overlaps. The number of rounds depends on the data, so the host would have to read whether another
is needed, or run as many as there are boxes. The matrix takes n^2 memory per problem (320 MB in
float32 for 80 problems of 1,000 boxes), which every round reads.

Arithmetic is that of torchvision on a CPU: float32 without fused multiply-add, quotients rounded
as IEEE requires. So the results are equal.

Work. n^2 / 2 overlaps on one multiprocessor; problems run side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.box_overlap import intersection_and_union

_BLOCK = 64  # a bit of an int64 for each


class _Problems(NamedTuple):
    """P problems; the argument of the kernel."""

    boxes: Any  # [P, n, 4]
    keep: Any  # [P, n]
    num_boxes: Any
    threshold: Any


class _Corners(NamedTuple):
    x0: Any
    y0: Any
    x1: Any
    y1: Any


@triton.jit
def _load_corners(boxes, index, exists):
    pointer = boxes + index * 4
    return _Corners(
        tl.load(pointer, mask=exists, other=0.0).to(tl.float32),
        tl.load(pointer + 1, mask=exists, other=0.0).to(tl.float32),
        tl.load(pointer + 2, mask=exists, other=0.0).to(tl.float32),
        tl.load(pointer + 3, mask=exists, other=0.0).to(tl.float32),
    )


@triton.jit
def _overlaps(a, b, threshold):
    """Whether the IoU is above the threshold. Without area it is NaN, which is not."""
    intersection, union = intersection_and_union(a, b)
    return tl.div_rn(intersection, union) > threshold


@triton.jit
def nms_kernel(problems, BLOCK: tl.constexpr):
    """Decide which boxes of a problem are kept."""
    problem = tl.program_id(0).to(tl.int64)
    boxes = problems.boxes + problem * problems.num_boxes * 4
    keep = problems.keep + problem * problems.num_boxes
    lane = tl.arange(0, BLOCK)
    bit = tl.full((BLOCK,), 1, tl.int64) << lane
    first = tl.zeros((), tl.int32)
    while first < problems.num_boxes:
        index = first + lane
        exists = index < problems.num_boxes
        block = _load_corners(boxes, index[:, None], exists[:, None])
        suppressed = tl.zeros((BLOCK, BLOCK), tl.int1)
        start = tl.zeros((), tl.int32)
        while start < first:
            earlier = (start + lane)[None, :]
            overlaps = _overlaps(block, _load_corners(boxes, earlier, True), problems.threshold)
            suppressed = suppressed | (overlaps & tl.load(keep + earlier))
            start += BLOCK
        left = exists & (tl.max(suppressed.to(tl.int32), 1) == 0)

        columns = _load_corners(boxes, index[None, :], exists[None, :])
        rivals = _overlaps(block, columns, problems.threshold) & (lane[None, :] < lane[:, None])
        rivals = tl.sum(tl.where(rivals, bit[None, :], 0), 1)
        kept = tl.sum(tl.where(left, bit, 0), 0)
        before = ~kept
        while kept != before:
            before = kept
            kept = tl.sum(tl.where(left & ((rivals & kept) == 0), bit, 0), 0)
        tl.store(keep + index, (kept & bit) != 0, mask=exists)
        tl.debug_barrier()
        first += BLOCK


def nms_mask(boxes: Tensor, iou_threshold: float) -> Tensor:
    """[P, n] bool, from contiguous boxes [P, n, 4]."""
    num_problems, num_boxes, _ = boxes.shape
    keep = boxes.new_empty((num_problems, num_boxes), dtype=torch.bool)
    if keep.numel():
        nms_kernel[(num_problems,)](
            _Problems(boxes, keep, num_boxes, _round_down(iou_threshold)),
            BLOCK=_BLOCK,
            num_warps=16,
            enable_fp_fusion=False,
        )
    return keep


def _round_down(x: float) -> float:
    """The highest float32 number that is not above `x`: the same float32 numbers are above it."""
    nearest = np.float32(x)
    return float(nearest if float(nearest) <= x else np.nextafter(nearest, np.float32(-1.0)))
