"""From the detector's predictions to scored boxes in pixels of the original images."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy
from msdetr.structures import Detections, Predictions

NMS_CANDIDATES = 10_000
"""Suppression looks at this many of an image's best scores (published)."""


def postprocess(
    predictions: Predictions,
    original_sizes: Tensor,
    *,
    max_detections: int,
    nms_iou_threshold: float | None,
) -> Detections:
    """Take the best (query, class) pairs of the last layer, best first.

    A query may appear once per class: every pair has the sigmoid of its logit as score and the
    query's box. Equal scores come in no particular order. Pairs with a NaN logit, and all pairs of
    a query whose box is not finite, count as score 0.

    Args:
        predictions: logits [N, B, Q, K] and boxes [N, B, Q, 4]; half precision becomes float32.
        original_sizes: [B, 2] (height, width) of the stored images, any device and number type.
        max_detections: D; where an image has fewer pairs, D is Q * K.
        nms_iou_threshold: suppress a pair that overlaps a better one of its class by more than
            this. The places that this leaves empty have score, label and box 0. None keeps all.

    Returns:
        [B, D] detections on the predictions' device.

    Raises:
        ValueError: `original_sizes` does not have one (height, width) per image, or
            `max_detections` is below 1.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    logits = at_least_float32(predictions.logits[-1])  # [B, Q, K]
    if original_sizes.shape != (len(logits), 2):
        raise ValueError(
            f"original_sizes must be [{len(logits)}, 2], one (height, width) per image, "
            f"got {list(original_sizes.shape)}"
        )
    boxes = _to_pixels(at_least_float32(predictions.boxes[-1]), original_sizes)
    usable = boxes.isfinite().all(dim=-1, keepdim=True)  # [B, Q, 1]
    scores = torch.where(usable, logits.sigmoid().nan_to_num(nan=0.0), 0.0)
    boxes = torch.where(usable, boxes, 0.0)
    if nms_iou_threshold is None:
        return _best_pairs(scores, boxes, max_detections)
    num_pairs = scores.shape[1] * scores.shape[2]
    candidates = _best_pairs(scores, boxes, NMS_CANDIDATES)
    return _suppress(candidates, min(max_detections, num_pairs), nms_iou_threshold)


def _to_pixels(boxes: Tensor, original_sizes: Tensor) -> Tensor:
    """Fractions cxcywh [B, Q, 4] to pixel corners."""
    height, width = original_sizes.to(boxes).unbind(-1)
    return cxcywh_to_xyxy(boxes) * torch.stack((width, height, width, height), dim=-1)[:, None]


def _best_pairs(scores: Tensor, boxes: Tensor, limit: int) -> Detections:
    """The best of the pairs [B, Q, K], `limit` at most, with boxes [B, Q, 4]."""
    num_classes = scores.shape[-1]
    pairs = scores.flatten(1)  # [B, Q * K]
    best, index = pairs.topk(min(limit, pairs.shape[1]), dim=1)
    query = (index // num_classes)[..., None].expand(-1, -1, 4)
    return Detections(scores=best, labels=index % num_classes, boxes=boxes.gather(1, query))


def _suppress(candidates: Detections, limit: int, iou_threshold: float) -> Detections:
    """Per class and image, keep candidates that no better one overlaps, `limit` at most."""
    num_images = len(candidates.scores)
    kept = Detections(
        scores=candidates.scores.new_zeros(num_images, limit),
        labels=candidates.labels.new_zeros(num_images, limit),
        boxes=candidates.boxes.new_zeros(num_images, limit, 4),
    )
    for image in range(num_images):
        scores, labels, boxes = (column[image] for column in candidates)
        keep = batched_nms(boxes, scores, labels, iou_threshold)[:limit]
        for place, column in zip(kept, (scores, labels, boxes), strict=True):
            place[image, : len(keep)] = column[keep]
    return kept
