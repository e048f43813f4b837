"""Detectors and weights from files: our weights files, our checkpoints, published checkpoints."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from msdetr.annotations.labels import COCO_CATEGORIES, COCO_NUM_CLASSES, LabelMap
from msdetr.config import RunConfig, config_to_dict
from msdetr.engine.checkpoint import changed_fields, load_checkpoint
from msdetr.model.checkpoint_adapter import load_published_checkpoint, load_state
from msdetr.model.detector import Detector, build_detector
from msdetr.weights import Weights, load_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedDetector:
    """A detector with its weights, configuration and classes."""

    model: Detector
    """On the CPU, in evaluation mode."""
    config: RunConfig
    """Of the run that trained it; of published checkpoints, derived from their arguments."""
    label_map: LabelMap | None
    """Its classes; None for published checkpoints, which do not store them."""

    @property
    def known_label_map(self) -> LabelMap:
        """Its classes. Where they are unknown: COCO's if there are 91, else numbers."""
        if self.label_map is not None:
            return self.label_map
        num_classes = self.config.model.num_classes
        assert num_classes is not None
        if num_classes == COCO_NUM_CLASSES:
            return LabelMap.from_categories(COCO_CATEGORIES, "coco")
        labels = tuple(range(num_classes))
        return LabelMap(labels, labels, tuple(f"class {label}" for label in labels), num_classes)


def read_weights(path: Path, config: RunConfig | None = None, *, ema: bool = True) -> Weights:
    """Read weights from `.safetensors`, a checkpoint of a run, or a published `.pth`.

    Args:
        path: the file or folder; its content determines the format.
        config: of published weights; None derives it from the file.
        ema: take the EMA weights where the checkpoint of a run has them.

    Raises:
        ValueError: the file is none of these, or damaged. OSError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if path.is_dir():
            raise
        published = load_published_checkpoint(path, config=config)  # Not a checkpoint of a run.
        return Weights(published.state_dict, published.config, None)
    if ema and checkpoint.has_ema:
        logger.info("taking the EMA weights of %s", path)
    progress = checkpoint.progress
    return Weights(checkpoint.weights(ema=ema), progress.run_config, progress.label_map)


def load_detector(path: Path) -> LoadedDetector:
    """Build the detector of a file, with its weights.

    Raises:
        ValueError, OSError: see `read_weights`; or the weights do not fit their configuration.
    """
    weights = read_weights(path)
    model = build_detector(weights.config.model, initialize_backbone=False)
    load_state(model, weights.state_dict)
    return LoadedDetector(
        model=model.eval(),
        config=weights.config,
        label_map=None if weights.label_map is None else LabelMap.from_dict(weights.label_map),
    )


def start_from_weights(model: Detector, path: Path, config: RunConfig) -> list[str]:
    """Load the weights of a file into a new model.

    Class heads and label embeddings for another number of classes keep their initialisation, with a
    warning. All other weights must fit.

    Returns:
        The names of the parameters that keep their initialisation.

    Raises:
        ValueError, OSError: see `read_weights`; or the weights do not fit. The message then names
            the fields of the model that differ from the run of the weights.
    """
    weights = read_weights(path, config)
    state_dict = dict(weights.state_dict)
    own = model.state_dict()
    fresh = [
        name
        for name in _names_with_classes(model)
        if name in state_dict
        and len(state_dict[name]) != len(own[name])
        and state_dict[name].shape[1:] == own[name].shape[1:]
    ]
    if fresh:
        logger.warning(
            "%s has %d classes, this run %s: these keep their random initialisation: %s",
            path,
            len(state_dict[fresh[0]]),
            config.model.num_classes,
            ", ".join(fresh),
        )
    try:
        load_state(model, state_dict | {name: own[name] for name in fresh})
    except ValueError as error:
        raise ValueError(f"{path}: {error}{_differences(weights.config, config)}") from error
    return fresh


def _differences(weights: RunConfig, run: RunConfig) -> str:
    """A line about the fields of the model that differ; empty if there are none."""
    fields = [
        f"model.{name} {run_value!r} (weights: {value!r})"
        for name, value, run_value in changed_fields(
            *(config_to_dict(config)["model"] for config in (weights, run))
        )
        if name not in ("num_classes", "backbone_weights")
    ]
    return f"\nthis run differs from that of the weights in {', '.join(fields)}" if fields else ""


def _names_with_classes(model: Detector) -> list[str]:
    """Parameters with a row per class, those of class heads first."""
    heads = model.heads
    modules = (
        heads.class_embed,
        heads.group_class_embed,
        heads.one_to_many_class_embed,
        model.denoising,
    )
    found = {id(p) for module in modules if module is not None for p in module.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in found]
    return sorted(names, key=lambda name: not name.startswith("heads."))
