"""The processes of a run and their communication.

A single process needs no process group. Several are started by `torchrun`, which sets `RANK`,
`LOCAL_RANK` and `WORLD_SIZE`, and ends all of them when one fails. Exceptions are therefore never
caught here, and the process group is shut down only after a clean run: a shutdown would wait for
ranks that are blocked in a collective.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdetr.engine.device import resolve_device

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The rank and device of this process."""

    device: torch.device
    """The device of this process."""
    rank: int = 0
    """Number of this process, 0 to `world_size - 1`."""
    world_size: int = 1
    """Number of processes of the run."""

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0


@contextlib.contextmanager
def worker_from_environment(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Worker]:
    """This process's `Worker`, from torchrun's environment; a single process without torchrun.

    Several processes communicate by gloo on the CPU and by NCCL on CUDA, there with gloo for
    objects on the host, so that long evaluations do not exceed the timeout of NCCL's watchdog.

    Raises:
        ValueError: `device` is `cuda` and there is none (or none for this rank), or torchrun's
            variables are incomplete.
    """
    world_size = _environment_int("WORLD_SIZE", 1)
    if world_size == 1:
        yield Worker(device=resolve_device(device))
        return
    rank = _environment_int("RANK")
    local_device = resolve_device(device, _environment_int("LOCAL_RANK"))
    if local_device.type == "cuda":
        torch.cuda.set_device(local_device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo")
    yield Worker(device=local_device, rank=rank, world_size=world_size)
    dist.destroy_process_group()


def broadcast_model(model: nn.Module, worker: Worker) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if worker.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def barrier(worker: Worker) -> None:
    """Wait until all ranks have called it."""
    all_gather_objects(None, worker)  # On the host, without NCCL's timeout.


def broadcast_object(value: T, worker: Worker) -> T:
    """Rank 0's `value`, on every rank. Any picklable object; for control, not for tensors."""
    if worker.world_size == 1:
        return value
    values: list[object] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def gather_objects(value: T, worker: Worker) -> list[T] | None:
    """The `value` of every rank, in rank order, on rank 0; None elsewhere."""
    if worker.world_size == 1:
        return [value]
    values: list[T] | None = [value] * worker.world_size if worker.is_main else None
    dist.gather_object(value, values, dst=0)
    return values


def all_gather_objects(value: T, worker: Worker) -> list[T]:
    """The `value` of every rank, in rank order, on every rank."""
    if worker.world_size == 1:
        return [value]
    values: list[T] = [value] * worker.world_size
    dist.all_gather_object(values, value)
    return values


class MeanOverRanks:
    """The mean of a tensor over ranks, computed asynchronously."""

    def __init__(self, value: Tensor, worker: Worker) -> None:
        self._sum = value.clone()
        self._world_size = worker.world_size
        self._pending = dist.all_reduce(self._sum, async_op=True) if worker.world_size > 1 else None

    def wait(self) -> Tensor:
        """The mean. On CUDA the stream waits, not the host."""
        if self._pending is not None:
            self._pending.wait()
        return self._sum / self._world_size


def _environment_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise ValueError(
                f"WORLD_SIZE is set but {name} is not: start several processes with torchrun"
            )
        return default
    return int(text)
