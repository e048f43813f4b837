"""Named tensors in files: a folder that all ranks write and read, or the file of older versions.

`torch.distributed.checkpoint` writes a folder in its safetensors format. Each rank writes one file
with its shards and its share of the replicated tensors, and the header of each file lists the
chunks of tensors in it. The other formats of that library keep a pickled index; this one has no
pickle. Any number of ranks can read the folder, each only the chunks it needs, into whole tensors
or shards.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from msdetr.engine.distributed import Worker


class TensorSource(Protocol):
    """Tensors that can be read by name."""

    @property
    def index(self) -> Mapping[str, Tensor]:
        """The available tensors, without content (on the device `meta`)."""

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors with those of the same names and shapes, which must exist."""


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, worker: Worker) -> None:
    """Write tensors, sharded (DTensor) or the same on every rank, into a folder. All ranks call it.

    Raises:
        OSError: on every rank, where one of them failed.
    """
    # The format has no strides.
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _without_group_warnings():
            save(contiguous, storage_writer=writer, no_dist=worker.world_size == 1)
    except CheckpointException as error:  # A BaseException.
        raise OSError(f"could not write {folder}: {_reasons(error)}") from error


class TensorFolder:
    """The tensors of a folder of `write_tensors`.

    Raises:
        ValueError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index of the tensors."""
        self._folder = folder
        try:
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except Exception as error:  # From the file system, safetensors or JSON.
            raise ValueError(f"{folder} has a file that is not readable: {error}") from error
        self.index: dict[str, Tensor] = {}
        """The available tensors, without content (on the device `meta`)."""
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise ValueError(f"{folder} lacks a chunk of {name}: the file of a rank is missing")
            dtype = tensor.properties.dtype
            self.index[name] = torch.empty(tensor.size, dtype=dtype, device="meta")

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors with those of the same names and shapes, which must exist.

        Raises:
            OSError: a file cannot be read any more.
        """
        reader = HuggingFaceStorageReader(str(self._folder))
        try:
            with _without_group_warnings():
                load({**targets}, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise OSError(f"could not read {self._folder}: {_reasons(error)}") from error


class TensorsInMemory:
    """Whole tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.index = {name: tensor.to("meta") for name, tensor in tensors.items()}
        """The available tensors, without content (on the device `meta`)."""

    @torch.no_grad()
    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors with those of the same names and shapes, which must exist."""
        for name, target in targets.items():
            source = self._tensors[name]
            if isinstance(target, DTensor):
                # Every rank has the whole tensor, so that nothing is sent.
                source = distribute_tensor(
                    source.to(target.device),
                    target.device_mesh,
                    target.placements,
                    src_data_rank=None,
                )
            target.copy_(source)


def read_tensors(source: TensorSource, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names start with `prefix`, without it, on the CPU."""
    targets = {
        name: torch.empty_like(tensor, device="cpu")
        for name, tensor in source.index.items()
        if name.startswith(prefix)
    }
    source.load(targets)
    return {name.removeprefix(prefix): tensor for name, tensor in targets.items()}


def _reasons(error: CheckpointException) -> str:
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in failures)


@contextlib.contextmanager
def _without_group_warnings() -> Iterator[None]:
    """Suppress the warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
