"""Detection in single images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.data.images import DecodedImage
from msdetr.data.transforms import evaluation_transform, transform_pixels
from msdetr.engine.device import to_device
from msdetr.engine.pretrained import LoadedDetector
from msdetr.evaluation.postprocess import postprocess
from msdetr.structures import Detections


@torch.no_grad()
def detect(detector: LoadedDetector, image: Image.Image, device: torch.device) -> Detections:
    """Detect in one image, prepared as for the detector's evaluation.

    Args:
        detector: its model is on `device`.
        image: RGB.
        device: where to compute.

    Returns:
        Scores [D], labels [D] and boxes [D, 4] in pixels of `image`, best first, on the CPU.
    """
    config = detector.config
    size = (image.height, image.width)
    geometry = evaluation_transform(config.data)(size, np.random.default_rng(0))
    pixels = transform_pixels(DecodedImage(image, 1), geometry)
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    collate = Collate(config.data.pad_multiple, config.data.target_buckets)
    batch = to_device(collate([Sample(pixels, no_labels, no_boxes, 0, size)]), device)
    detections = postprocess(
        detector.model(batch.images).one_to_one,
        batch.original_sizes,
        max_detections=config.eval.max_detections,
        nms_iou_threshold=config.eval.nms_iou_threshold,
    )
    return Detections(*(column[0].cpu() for column in detections))
