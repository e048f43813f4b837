"""Running a detector over a data set, on all processes, each image once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from msdetr.config import EvalConfig
from msdetr.engine.device import autocast, to_device
from msdetr.engine.distributed import Worker, gather_objects
from msdetr.engine.metrics.progress import progress
from msdetr.evaluation.coco_eval import CocoEvaluator
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.evaluation.postprocess import postprocess
from msdetr.structures import Batch


@torch.no_grad()
def evaluate_detector(
    model: nn.Module,
    loader: Iterable[Batch],
    evaluator: CocoEvaluator,
    config: EvalConfig,
    worker: Worker,
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> CocoResult | None:
    """Detect on this rank's images and score the detections of all ranks.

    Args:
        model: the detector, not wrapped for distributed training: ranks may have different numbers
            of batches. It runs in evaluation mode and returns to its mode afterwards.
        loader: this rank's share of the images.
        evaluator: an empty one, of the same annotations on every rank. Rank 0's holds the
            detections of all ranks afterwards.
        config: how predictions become detections.
        worker: this process.
        precision: of the detector's matrix products.

    Returns:
        The scores on rank 0, None elsewhere.
    """
    was_training = model.training
    model.eval()
    for batch in progress(loader, "evaluate", worker):
        on_device = to_device(batch, worker.device)
        with autocast(worker.device, precision):
            output = model(on_device.images)
        detections = postprocess(
            output.one_to_one,
            on_device.original_sizes,
            max_detections=config.max_detections,
            nms_iou_threshold=config.nms_iou_threshold,
        )
        evaluator.add(batch.image_ids, detections)
    model.train(was_training)
    states = gather_objects(evaluator.state(), worker)
    if states is None:
        return None
    for state in states[1:]:
        evaluator.merge(state)
    return evaluator.summarize()
