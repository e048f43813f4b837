"""Weights files: tensors as safetensors, configuration and label map in the metadata.

A file contains everything that is needed to build the model, and no executable content. It appears
under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from msdetr.config import RunConfig, config_from_dict, config_to_dict

FORMAT = "msdetr"


@dataclass(frozen=True)
class Weights:
    """The content of a weights file."""

    state_dict: dict[str, Tensor]
    """Weights under the names of our `Detector`, on the CPU."""
    config: RunConfig
    """The run that made them."""
    label_map: dict[str, Any] | None
    """`LabelMap.to_dict()` of the training data, where it is known."""


def save_weights(
    path: Path,
    state_dict: Mapping[str, Tensor],
    config: RunConfig,
    label_map: Mapping[str, Any] | None = None,
) -> None:
    """Write a weights file; an existing one is replaced in one step.

    Args:
        path: the file, in an existing folder.
        state_dict: weights under the names of our `Detector`; on any device.
        config: the run that made them.
        label_map: `LabelMap.to_dict()` of the training data.
    """
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config_to_dict(config)),
        "label_map": json.dumps(None if label_map is None else dict(label_map)),
    }
    # Clones, because safetensors refuses views of a larger tensor and tensors that share memory.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in state_dict.items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # safetensors' own writer would let only the owner read.
        write_and_sync(partial, save(tensors, metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_and_sync(path: Path, content: bytes) -> None:
    """Write a file, and wait until its content is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(path: Path) -> Weights:
    """Read a weights file.

    Raises:
        ValueError: it is not a safetensors file, was not written by `save_weights`, or holds a
            configuration that this version does not know.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            state_dict: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ValueError(
            f"{path}: safetensors, but without the configuration that msdetr writes into its "
            "weights files"
        )
    try:
        config = config_from_dict(RunConfig, json.loads(metadata["config"]))
        label_map = json.loads(metadata.get("label_map", "null"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its configuration cannot be read: {error}") from error
    return Weights(state_dict=state_dict, config=config, label_map=label_map)
