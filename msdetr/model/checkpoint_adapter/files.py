"""Safe loading of published checkpoint files."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdetr.config import RunConfig
from msdetr.model.checkpoint_adapter.names import published_to_ours, split_ignored
from msdetr.published import STARTING_POINTS, Implementation, config_from_published_args

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Content of a published `.pth` file, converted to our names."""

    config: RunConfig
    """Configuration from its `args`, or as given by the caller."""
    state_dict: dict[str, Tensor]
    """Weights under our names, on the CPU."""
    epoch: int | None
    """The last finished epoch, counted from 0; None where the file has none."""
    ignored: dict[str, Tensor]
    """Tensors that neither model uses, under their published names."""


def load_published_checkpoint(
    path: Path,
    *,
    config: RunConfig | None = None,
    implementation: Implementation | None = None,
) -> PublishedCheckpoint:
    """Load a published checkpoint without executing any code in it.

    Args:
        path: a file with `model`, `args` and perhaps `epoch`, or a bare state dict.
        config: configuration of the weights; None derives it from `args`. The class heads set
            `num_classes` where `config` leaves it open or is derived: the published arguments do
            not hold it for custom data.
        implementation: published code that wrote `args`, see `config_from_published_args`.

    Raises:
        ValueError: the file is no checkpoint, needs objects other than tensors, plain values and
            an `argparse.Namespace`, has no `args` while `config` is None, or its arguments or
            names are not those of the published code.
        OSError: the file cannot be read.
    """
    weights, args, epoch = _read_parts(path)
    try:
        if config is None:
            if args is None:
                raise ValueError("it has no `args` to tell its architecture: give a config")
            # The files that the published run itself started from are not needed.
            config = config_from_published_args(
                args,
                implementation=implementation,
                overrides={name: "" for name in STARTING_POINTS if hasattr(args, name)},
            )
            config = _with_num_classes(config, None)
        known, ignored = split_ignored(weights, config.model)
        if config.model.num_classes is None:
            config = _with_num_classes(config, _count_classes(known))
        state_dict = published_to_ours(known, config.model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if ignored:
        logger.info("%s: ignored %s", path, ", ".join(sorted(ignored)))
    return PublishedCheckpoint(config=config, state_dict=state_dict, epoch=epoch, ignored=ignored)


def _with_num_classes(config: RunConfig, num_classes: int | None) -> RunConfig:
    return replace(config, model=replace(config.model, num_classes=num_classes))


def _count_classes(published: Mapping[str, Tensor]) -> int:
    weight = published.get("class_embed.0.weight")
    if weight is None or weight.dim() != 2:
        raise ValueError("it has no class_embed.0.weight to tell the number of classes")
    return weight.shape[0]


def _read_parts(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace | None, int | None]:
    """The state dict, the arguments and the epoch of a checkpoint file."""
    content = _load_safely(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    weights, args, epoch = content, None, None
    if "model" in content:
        weights, args, epoch = content["model"], content.get("args"), content.get("epoch")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path}: holds no state dict")
    foreign = [
        str(key)
        for key, value in weights.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if foreign:
        raise ValueError(f"{path}: not tensors of a model: {', '.join(foreign)}")
    if args is not None and not isinstance(args, argparse.Namespace):
        raise ValueError(f"{path}: args is a {type(args).__name__}, not a Namespace")
    if epoch is not None and not isinstance(epoch, int):
        raise ValueError(f"{path}: epoch is {epoch!r}, not a number")
    return weights, args, epoch


def _load_safely(path: Path) -> Any:
    """`torch.load` that builds tensors, plain values and `argparse.Namespace`, nothing else."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a broken pickle fails in its own way each time
            refused = _refused_globals(path, error)
            if refused:
                raise ValueError(
                    f"{path}: refused, it needs {', '.join(refused)}: only tensors, plain values "
                    "and argparse.Namespace are read, because a checkpoint could run any code"
                ) from error
            raise ValueError(f"{path}: not a readable PyTorch checkpoint") from error


def _refused_globals(path: Path, error: Exception) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # files of the old format cannot be searched, the error names the first
        return re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
