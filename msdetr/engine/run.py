"""Construction of a trainer from a configuration."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from msdetr.annotations.labels import LabelMap
from msdetr.config import RunConfig, config_to_dict
from msdetr.data.dataset import build_datasets
from msdetr.engine.checkpoint import (
    Checkpoint,
    check_resumable,
    find_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
)
from msdetr.engine.compile import is_compiled
from msdetr.engine.distributed import Worker, broadcast_model, broadcast_object
from msdetr.engine.pretrained import start_from_weights
from msdetr.engine.seeding import seed_initialization
from msdetr.engine.trainer import Trainer
from msdetr.model.detector import Detector, build_detector

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
COMPILED_IMAGE_BUCKETS = 16
"""Default number of padded shapes of a compiled run. More of them save padding, and each takes time
to compile (`python -m benchmarks.loader buckets`)."""


def build_trainer(config: RunConfig, worker: Worker) -> Trainer:
    """Read the data, build the model, and load the weights or the checkpoint of the start.

    The run starts at step 0 with new weights or those of `config.weights`, or at the step of the
    checkpoint that `config.resume` names. Writes the resolved configuration to the run folder.

    Raises:
        ValueError, OSError: the data, the checkpoint or the weights are missing, damaged or do not
            fit the configuration; or a new run would mix with an earlier one in its folder.
    """
    # Read together, so that annotation errors of both are reported at once.
    datasets = build_datasets(
        config.data, ("train", "val") if config.train.eval_every else ("train",)
    )
    train_data, val_data = datasets["train"], datasets.get("val")
    label_map = train_data.annotations.label_map
    config = resolve_image_buckets(resolve_num_classes(config, label_map), worker)
    source = find_resume_source(config, worker)
    model = build_model(config, worker, initialize=source is None)
    trainer = Trainer(config, model, train_data, val_data, worker)
    if source is not None:
        check_resumable(
            source,
            config,
            steps_per_epoch=trainer.steps_per_epoch,
            label_map=label_map.to_dict(),
        )
        trainer.load(source)
        logger.info("resuming after step %d from %s", trainer.step, source.path)
    if worker.is_main:
        _write_config(config)
    _log_start(trainer)
    return trainer


def resolve_num_classes(config: RunConfig, label_map: LabelMap) -> RunConfig:
    """The configuration with `model.num_classes` set.

    Raises:
        ValueError: it is set already, to less than the annotation file needs.
    """
    given, needed = config.model.num_classes, label_map.num_classes
    if given is not None and given < needed:
        raise ValueError(
            f"model.num_classes is {given}, but the annotation file needs {needed}: leave it out "
            "to take the number from the file"
        )
    model = dataclasses.replace(config.model, num_classes=given or needed)
    return dataclasses.replace(config, model=model)


def resolve_image_buckets(config: RunConfig, worker: Worker) -> RunConfig:
    """The configuration with `data.num_image_buckets` set."""
    if config.data.num_image_buckets is not None:
        return config
    number = COMPILED_IMAGE_BUCKETS if is_compiled(config.compile, worker.device) else 0
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, num_image_buckets=number)
    )


def find_resume_source(config: RunConfig, worker: Worker) -> Checkpoint | None:
    """The checkpoint that the run continues, the same on every rank; None for a new run.

    Raises:
        ValueError: the named checkpoint cannot be read, or the run folder holds checkpoints that
            the run would mix with its own.
    """
    output = config.output
    if config.resume == "auto":
        newest = load_newest_checkpoint(output) if worker.is_main else None
        path = broadcast_object(newest.path if newest else None, worker)
        if path is None:
            logger.info("no checkpoint in %s: starting a new run", output)
            return None
        return newest or load_checkpoint(path)
    existing = find_checkpoints(output)
    if config.resume is None:
        if existing:
            raise ValueError(
                f"{output} holds checkpoints of an earlier run, up to step {existing[-1][0]}: "
                "continue it with --resume auto, or choose another --output"
            )
        return None
    checkpoint = load_checkpoint(Path(config.resume))
    if existing and existing[-1][0] > checkpoint.progress.step:
        raise ValueError(
            f"{output} holds checkpoints up to step {existing[-1][0]}, and {config.resume} is of "
            f"step {checkpoint.progress.step}: choose another --output, or remove the later ones"
        )
    return checkpoint


def build_model(config: RunConfig, worker: Worker, *, initialize: bool) -> Detector:
    """The detector on the worker's device, with the same weights on every rank.

    Args:
        config: with `model.num_classes` set.
        worker: this process.
        initialize: set its initial weights; False where a checkpoint is loaded next.
    """
    seed_initialization(config.seed)
    from_file = initialize and config.weights is not None
    model = build_detector(config.model, initialize_backbone=initialize and not from_file)
    if config.weights is not None and initialize:
        start_from_weights(model, config.weights, config)
        logger.info("starting from the weights of %s", config.weights)
    model.to(worker.device)
    broadcast_model(model, worker)
    return model


def _write_config(config: RunConfig) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_to_dict(config), indent=2)
    (config.output / CONFIG_FILE).write_text(text + "\n")


def _log_start(trainer: Trainer) -> None:
    num_parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(
        "%d training images, %d classes, %.1f M trainable parameters, %s, %d process(es), "
        "%d steps per epoch, step %d of %d",
        len(trainer.train_data),
        trainer.label_map.num_classes,
        num_parameters / 1e6,
        trainer.worker.device,
        trainer.worker.world_size,
        trainer.steps_per_epoch,
        trainer.step,
        trainer.last_step,
    )
