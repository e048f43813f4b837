"""How the processes of a run share a model: as whole copies (DDP) or as shards (FSDP2).

Both compute the gradient of the mean of the ranks' losses, in the same precision: parameters and
gradients are float32, and autocast chooses the operations that run in bfloat16.

With shards (`fully_shard`, the second stage of ZeRO, Rajbhandari et al., arXiv:1910.02054),
parameters, gradients and optimizer state are divided over the ranks. Parameters are gathered for
the forward pass and kept for the backward pass, so that a step moves as many bytes as DDP's
all-reduce. Gathering them a second time would save little: all parameters take less memory than
the activations of one encoder layer.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from msdetr.engine.distributed import Worker
from msdetr.model.detector import Detector

logger = logging.getLogger(__name__)


def distribute(model: Detector, worker: Worker, parallel: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to call in training. Its backward pass averages the gradients over ranks.

    Args:
        model: with the same weights on every rank. `fsdp` replaces its parameters by shards, so
            that the optimizer must be built afterwards.
        worker: this process. A single process gets the model itself.
        parallel: whole copies or shards.
    """
    if worker.world_size == 1:
        if parallel == "fsdp":
            logger.warning("parallel fsdp changes nothing: there is one process")
        return model
    return _replicate(model, worker) if parallel == "ddp" else _shard(model, worker)


def _replicate(model: Detector, worker: Worker) -> nn.Module:
    options: dict[str, Any] = {}
    if worker.device.type == "cuda":
        options["device_ids"] = [worker.device.index]
    # Buffers never change (BatchNorm is frozen). Newer versions of torch renamed the option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"
    options[name if name in parameters else "broadcast_buffers"] = False
    # No `find_unused_parameters`: every parameter has a gradient in every step.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def _shard(model: Detector, worker: Worker) -> nn.Module:
    # The warning is about in-place changes of the outputs. The criterion makes none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    # FSDP2 needs contiguous parameters. Activations stay channels-last.
    model.to(memory_format=torch.contiguous_format)
    # Each module is gathered while the one before it computes. Modules that contain sharded ones do
    # not compile into one graph, so that these have none inside, except the model itself.
    for module in (model.backbone, *model.encoder.layers, *model.decoder.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    return model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """A context for forward and backward of the module of `distribute`.

    Where not `enabled`, gradients are only accumulated on each rank: more micro-batches follow, and
    the backward pass of the last one averages the sum.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled)
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which every rank holds all parameters of a sharded model.

    Forward passes then need no communication, so that ranks may run different numbers of them. All
    ranks enter it together.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of one that may be sharded. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
