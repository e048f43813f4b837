"""How the processes of a run share the gradients."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msdetr.engine.distributed import Worker


def distribute(model: nn.Module, worker: Worker) -> nn.Module:
    """What to call in training: its backward pass averages the gradients over ranks.

    Args:
        model: with the same weights on every rank.
        worker: this process; a single one needs nothing.
    """
    if worker.world_size == 1:
        return model
    options: dict[str, Any] = {}
    if worker.device.type == "cuda":
        options["device_ids"] = [worker.device.index]
    # Buffers never change (BatchNorm is frozen). Newer versions of torch renamed the option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"
    options[name if name in parameters else "broadcast_buffers"] = False
    # Every parameter gets a gradient in every step, whatever the targets: nothing to look for.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def gradient_sync(model: nn.Module, *, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """A context for forward and backward of what `distribute` gave.

    Where not `enabled`, gradients stay each rank's own: more micro-batches follow, and the last
    one's backward pass averages the sum.
    """
    if not enabled and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
