"""Checkpoints of a run: written whole or not at all, the newest few kept, read safely.

A checkpoint is one file, `<run folder>/checkpoints/step-00001234.pt`, with the keys of
`Checkpoint`. It is written under a temporary name in the same folder, synced to the disk and
renamed, so that a file of the final name is complete whatever happens meanwhile. Files are read
with `weights_only=True`: they hold tensors and plain values, never code.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdetr.config import ModelConfig, RunConfig, config_from_dict, config_to_dict

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_FILE_NAME = re.compile(r"step-(\d{8,})\.pt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run needs to go on."""

    model: dict[str, Tensor]
    """The model's state dict."""
    optimizer: dict[str, dict[str, Any]]
    """Optimizer state by parameter name."""
    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    steps_per_epoch: int
    """Steps of one epoch; with `step` it says which images come next."""
    config: dict[str, Any]
    """The resolved `RunConfig` as plain types."""
    label_map: dict[str, Any]
    """The `LabelMap` as plain types."""
    world_size: int
    """Processes that wrote it."""

    @property
    def run_config(self) -> RunConfig:
        """The configuration of the run that wrote it."""
        return config_from_dict(RunConfig, self.config)


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return run_folder / FOLDER / f"step-{step:08d}.pt"


def find_checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the run's checkpoints, oldest first."""
    files = (run_folder / FOLDER).glob("step-*.pt")
    matches = ((_FILE_NAME.fullmatch(file.name), file) for file in files)
    return sorted((int(match.group(1)), file) for match, file in matches if match)


def save_checkpoint(checkpoint: Checkpoint, run_folder: Path, *, keep: int) -> Path:
    """Write the checkpoint, then delete all but the `keep` newest up to its step.

    Call on rank 0 only. Raises OSError where the disk refuses; the older checkpoints are then
    untouched.
    """
    path = checkpoint_path(run_folder, checkpoint.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob("*.partial"):  # of a run that was killed while it wrote
        leftover.unlink()
    write_atomically(path, dict(vars(checkpoint)))
    # Files of later steps are unreadable ones that a resumed run has skipped: not this run's own.
    own = [file for step, file in find_checkpoints(run_folder) if step <= checkpoint.step]
    for file in own[:-keep]:
        file.unlink()
    return path


def write_atomically(path: Path, payload: Any) -> None:
    """`torch.save` such that `path` holds either its old content or all of `payload`."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    # The rename itself is durable once the folder is synced.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to host memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler stumbles over
        # Its message is not passed on: it recommends to read the file unsafely.
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, or holds more than tensors and "
            "plain values"
        ) from error
    names = {f.name for f in dataclasses.fields(Checkpoint)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"{path} is not a training checkpoint of msdetr: its keys differ")
    return Checkpoint(**content)


def load_newest_checkpoint(run_folder: Path) -> tuple[Path, Checkpoint] | None:
    """The newest readable checkpoint of a run; unreadable ones are warned about and passed over.

    None where the run has no checkpoint.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    found = find_checkpoints(run_folder)
    for step, path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except (ValueError, OSError) as error:
            logger.warning("PASSING OVER THE CHECKPOINT OF STEP %d: %s", step, error)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints under {run_folder} can be read")
    return None


def check_resumable(
    checkpoint: Checkpoint, config: RunConfig, *, steps_per_epoch: int, label_map: dict[str, Any]
) -> None:
    """Compare a checkpoint with the run that is to continue it; other changes are logged.

    Raises:
        ValueError: the model, the classes, or the number of steps per epoch differ.
    """
    before, now = checkpoint.config["model"], config_to_dict(config)["model"]
    # Where the first weights came from no longer matters.
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"backbone_weights"}
    changed = [
        f"model.{name} was {before.get(name)!r}, is {now[name]!r}"
        for name in sorted(model_fields)
        if before.get(name) != now[name]
    ]
    if changed:
        raise ValueError(f"cannot resume with another model: {'; '.join(changed)}")
    if checkpoint.label_map != label_map:
        raise ValueError(
            "cannot resume with other classes: the annotation file's categories differ"
        )
    if checkpoint.steps_per_epoch != steps_per_epoch:
        raise ValueError(
            f"cannot resume: an epoch was {checkpoint.steps_per_epoch} steps and is now "
            f"{steps_per_epoch} (other images or another train.batch_size); "
            "--weights starts a new run from these weights"
        )
    for name, old, new in changed_fields(checkpoint.config, config_to_dict(config)):
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
