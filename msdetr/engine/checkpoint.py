"""Checkpoints of a run: atomic writes, a bounded number of files, safe reads.

A checkpoint is a folder, `<run folder>/checkpoints/step-00001234`. It holds the tensors, as written
by `msdetr.engine.tensor_files`, and everything else in `checkpoint.json`. Its content does not
depend on the number of processes or on sharding, so that any run can continue from it. All ranks
write it under a temporary name. Rank 0 renames it when all files are on the disk, so that a folder
with the final name is always complete. It holds no executable content.

Earlier versions wrote one file, `step-00001234.pt`. It is read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdetr.config import ModelConfig, RunConfig, config_from_dict, config_to_dict
from msdetr.engine.distributed import Worker, barrier
from msdetr.engine.tensor_files import (
    TensorFolder,
    TensorsInMemory,
    TensorSource,
    read_tensors,
    write_tensors,
)
from msdetr.weights import sync_folder, write_and_sync

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
METADATA_FILE = "checkpoint.json"
_FORMAT = "msdetr checkpoint 2"
_NAME = re.compile(r"step-(\d{8,})(\.pt)?")
_PARTIAL = ".partial"

# Prefixes of the tensors' names: `model.NAME`, `average.NAME`, `optimizer.NAME.KEY`.
MODEL, EMA, OPTIMIZER = "model.", "average.", "optimizer."


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Everything in a checkpoint apart from the tensors."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    steps_per_epoch: int
    """Steps of one epoch. With `step`, this determines the next images."""
    config: dict[str, Any]
    """The resolved `RunConfig` as plain types."""
    label_map: dict[str, Any]
    """The `LabelMap` as plain types."""
    world_size: int
    """Number of processes that wrote it."""

    @property
    def run_config(self) -> RunConfig:
        """The configuration of the run."""
        return config_from_dict(RunConfig, self.config)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Its tensors are read on demand."""

    path: Path
    """The folder, or the file of an earlier version."""
    progress: Progress
    """Everything apart from the tensors."""
    tensors: TensorSource
    """Weights, EMA weights where the run kept them, and optimizer state."""

    @property
    def has_ema(self) -> bool:
        """Whether the run kept EMA weights."""
        return any(name.startswith(EMA) for name in self.tensors.index)

    def weights(self, *, ema: bool = True) -> dict[str, Tensor]:
        """The model's state dict on the CPU; with `ema`, the EMA weights where there are any."""
        weights = read_tensors(self.tensors, MODEL)
        return weights | read_tensors(self.tensors, EMA) if ema else weights


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run_folder / FOLDER / f"step-{step:08d}"


def find_checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the run's checkpoints, oldest first."""
    paths = (run_folder / FOLDER).glob("step-*")
    matches = ((_NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    progress: Progress,
    run_folder: Path,
    worker: Worker,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all but the `keep` newest up to its step.

    All ranks call it; they share the run folder.

    Args:
        tensors: sharded, or the same on every rank; named with the prefixes above.
        progress: the same on every rank.
        run_folder: its `checkpoints` folder is created.
        worker: this process.
        keep: at least 1.

    Raises:
        OSError: writing failed, or the ranks write to different disks. Older checkpoints remain
            unchanged.
    """
    path = checkpoint_path(run_folder, progress.step)
    partial = path.with_name(path.name + _PARTIAL)
    if worker.is_main:
        for leftover in path.parent.glob(f"*{_PARTIAL}"):  # of a run that was killed
            _delete(leftover)
        partial.mkdir(parents=True)
    barrier(worker)
    write_tensors(tensors, partial, worker)
    if worker.is_main:
        _finish(tensors, progress, partial)
        if path.exists():  # One that could not be read.
            _delete(path)
        partial.replace(path)
        sync_folder(path.parent)
        # Later steps are unreadable checkpoints that a resumed run has skipped. They stay.
        own = [p for step, p in find_checkpoints(run_folder) if step <= progress.step]
        for old in own[:-keep]:
            _delete(old)
    return path


def _finish(tensors: Mapping[str, Tensor], progress: Progress, folder: Path) -> None:
    """Check that the files of all ranks are present, and list them."""
    written = _open_folder(folder).index
    if {name: x.shape for name, x in tensors.items()} != {n: x.shape for n, x in written.items()}:
        raise OSError(
            f"{folder} lacks the files of other processes: the run folder (output) must be on a "
            "disk that all machines share"
        )
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    content = {"format": _FORMAT, **vars(progress), "files": files}
    write_and_sync(folder / METADATA_FILE, json.dumps(content, indent=2).encode())
    sync_folder(folder)


def _open_folder(folder: Path) -> TensorFolder:
    try:
        return TensorFolder(folder)
    except ValueError as error:
        raise OSError(f"the checkpoint just written cannot be read: {error}") from error


def _delete(path: Path) -> None:
    """Delete a checkpoint. An interruption leaves no incomplete one under its name."""
    if path.is_file():
        path.unlink()
        return
    if not path.name.endswith(_PARTIAL):
        path = path.replace(path.with_name(f"{path.name}.old{_PARTIAL}"))
    shutil.rmtree(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is incomplete, damaged or not a checkpoint of this project.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        return _load_file(path)
    raise FileNotFoundError(f"there is no checkpoint {path}")


def _load_folder(path: Path) -> Checkpoint:
    try:
        content = json.loads((path / METADATA_FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not a checkpoint: it has no {METADATA_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path / METADATA_FILE} is damaged: {error}") from error
    names = {field.name for field in dataclasses.fields(Progress)}
    if not isinstance(content, dict) or set(content) != {*names, "format", "files"}:
        raise ValueError(f"{path / METADATA_FILE} is not of a training checkpoint of msdetr")
    if content["format"] != _FORMAT:
        raise ValueError(f"{path} has the format {content['format']!r}, and {_FORMAT!r} is known")
    for name, size in content["files"].items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{path} is incomplete: {name} is missing or has another size")
    progress = Progress(**{name: content[name] for name in names})
    return Checkpoint(path, progress, TensorFolder(path))


def _load_file(path: Path) -> Checkpoint:
    """A checkpoint of an earlier version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The unpickler raises exceptions of many kinds.
        # Its message is left out: it recommends to read the file unsafely.
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, or holds more than tensors and "
            "plain values"
        ) from error
    names = {field.name for field in dataclasses.fields(Progress)}
    if not isinstance(content, dict) or set(content) != {*names, "model", "optimizer"}:
        raise ValueError(f"{path} is not a training checkpoint of msdetr: its keys differ")
    tensors = {
        **{MODEL + name: tensor for name, tensor in content["model"].items()},
        **optimizer_tensors(content["optimizer"]),
    }
    progress = Progress(**{name: content[name] for name in names})
    return Checkpoint(path, progress, TensorsInMemory(tensors))


def optimizer_tensors(states: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Optimizer state by parameter name, as tensors of a checkpoint."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of a run. Unreadable ones are skipped with a warning.

    None where the run has no checkpoint.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    checkpoints = find_checkpoints(run_folder)
    for step, path in reversed(checkpoints):
        try:
            return load_checkpoint(path)
        except (ValueError, OSError) as error:
            logger.warning("SKIPPING THE CHECKPOINT OF STEP %d: %s", step, error)
    if checkpoints:
        raise ValueError(
            f"none of the {len(checkpoints)} checkpoints under {run_folder} can be read"
        )
    return None


def check_resumable(
    checkpoint: Checkpoint, config: RunConfig, *, steps_per_epoch: int, label_map: dict[str, Any]
) -> None:
    """Compare a checkpoint with the run that continues it. Harmless changes are logged.

    Raises:
        ValueError: the model, the classes, or the number of steps per epoch differ.
    """
    progress = checkpoint.progress
    # Fields that are newer than the checkpoint have their defaults.
    before, now = config_to_dict(progress.run_config), config_to_dict(config)
    # The source of the initial weights no longer matters.
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"backbone_weights"}
    changed = [
        f"model.{name} was {before['model'][name]!r}, is {now['model'][name]!r}"
        for name in sorted(model_fields)
        if before["model"][name] != now["model"][name]
    ]
    if changed:
        raise ValueError(f"cannot resume with another model: {'; '.join(changed)}")
    if progress.label_map != label_map:
        raise ValueError(
            "cannot resume with other classes: the annotation file's categories differ"
        )
    if progress.steps_per_epoch != steps_per_epoch:
        raise ValueError(
            f"cannot resume: an epoch was {progress.steps_per_epoch} steps and is now "
            f"{steps_per_epoch} (other images or another train.batch_size); "
            "--weights starts a new run from these weights"
        )
    for name, old, new in changed_fields(before, now):
        if name not in ("resume", "weights", "output", "model.backbone_weights"):
            logger.info("resuming with %s = %r (was %r)", name, new, old)


def changed_fields(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every field that differs between two nested configurations."""
    changes: list[tuple[str, Any, Any]] = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes.extend(changed_fields(old, new, f"{prefix}{name}."))
        elif old != new:
            changes.append((prefix + name, old, new))
    return changes
