"""Floating-point operations of a detector, and peak rates of GPUs.

Operations are counted by `torch.utils.flop_counter` on tensors without data: matrix products,
convolutions and attention, a multiply-add as two. Not counted are element-wise work, criterion and
optimizer, and the sampling of deformable attention, which is gathers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.detector.cases import Case, random_batch
from msdetr.engine.device import to_device
from msdetr.model.detector import build_detector

_PEAKS = (
    ("H200", 989.5e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
)
"""Dense bfloat16 operations per second by a substring of the device's name (the first match), from
NVIDIA's data sheets. TF32 has half the rate on all of them."""


def detector_flops(case: Case, *, training: bool) -> int:
    """Operations of a forward pass, and in training of the backward pass too, on the case's batch.

    Precision does not matter.
    """
    with torch.device("meta"):
        model = build_detector(case.config.model, initialize_backbone=False).train(training)
    batch = to_device(random_batch(case), torch.device("meta"))
    counter = FlopCounterMode(display=False)
    with counter, torch.enable_grad():
        outputs = [
            leaf
            for leaf in tree_leaves(model(batch.images, batch.targets))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if training:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return int(counter.get_total_flops())


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak operations per second of a device, or None if it is unknown.

    For float32 it is the rate of TF32, which torch allows in convolutions by default.
    """
    for name, bfloat16 in _PEAKS:
        if name in device:
            return bfloat16 if dtype == "bfloat16" else bfloat16 / 2
    return None
