"""The device of a step, its precision, and the transfer of batches to it."""

from __future__ import annotations

from typing import Literal

import torch

from msdetr.structures import Batch, ImageBatch, Targets


def resolve_device(device: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The torch device of process `local_rank` of this machine.

    Raises:
        ValueError: CUDA is requested, and this machine has too few devices.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ValueError(
            f"process {local_rank} of this machine needs a CUDA device of its own, and the machine "
            f"has {num_devices}: start fewer processes, or set device to cpu"
        )
    return torch.device("cuda", local_rank)


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"]) -> torch.autocast:
    """The context in which the detector's matrix products run in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; image ids stay on the host. Does not wait for pinned memory."""
    if device.type == "cpu":
        return batch
    pixels, sizes = (x.to(device, non_blocking=True) for x in batch.images)
    labels, boxes, count = (x.to(device, non_blocking=True) for x in batch.targets)
    return Batch(
        images=ImageBatch(pixels, sizes),
        targets=Targets(labels, boxes, count),
        image_ids=batch.image_ids,
        original_sizes=batch.original_sizes.to(device, non_blocking=True),
    )
