"""Greedy non-maximum suppression of many problems at once, as a mask instead of a list."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor

from msdetr.boxes import at_least_float32
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.registration import register_op


def nms_mask(boxes: Tensor, *, iou_threshold: float, impl: Impl = "auto") -> Tensor:
    """Which boxes greedy non-maximum suppression keeps.

    Best first, a box is kept unless its IoU with a box kept before is above the threshold. The
    result is that of `torchvision.ops.nms` on a CPU. Two boxes without area do not overlap, and
    neither do boxes with NaN.

    The kernel reads nothing on the host. The reference does, on a GPU.

    Args:
        boxes: [P, n, 4] corners (x0, y0, x1, y1) of P independent problems, best first. Half
            precision is computed in float32.
        iou_threshold: in [0, 1].
        impl: see `msdetr.ops.dispatch`. The reference is torchvision's, one problem after another.

    Returns:
        [P, n] bool, without a gradient.

    Raises:
        ValueError: the shape or dtype of the boxes or the threshold is wrong.
        NotImplementedError: `impl` is "triton" and the boxes are float64.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [P, n, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating point, got {boxes.dtype}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    keep: Tensor
    if resolve_impl("nms_mask", impl, boxes.device, unsupported) == "triton":
        keep = torch.ops.msdetr.nms_mask(boxes.detach(), iou_threshold)
    else:
        keep = torch.ops.msdetr.nms_mask_torchvision(boxes.detach(), iou_threshold)
    return keep


def _kernel(boxes: Tensor, iou_threshold: float) -> Tensor:
    from msdetr.kernels import nms as kernel

    return kernel.nms_mask(boxes.contiguous(), iou_threshold)


def _torchvision(boxes: Tensor, iou_threshold: float) -> Tensor:
    boxes = at_least_float32(boxes)
    num_boxes = boxes.shape[1]
    scores = torch.arange(num_boxes, 0, -1, dtype=boxes.dtype, device=boxes.device)
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for of_problem, in_problem in zip(keep, boxes, strict=True):
        of_problem[torchvision.ops.nms(in_problem, scores, iou_threshold)] = True
    return keep


def _fake(boxes: Tensor, *rest: Any) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


_ARGUMENTS = "(Tensor boxes, float iou_threshold) -> Tensor"
register_op(f"nms_mask{_ARGUMENTS}", _kernel, fake=_fake)
# torchvision's returns a list, whose length compiled code would have to read.
register_op(f"nms_mask_torchvision{_ARGUMENTS}", _torchvision, fake=_fake)
