"""A model, data and configurations small enough to train in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

TINY_MODEL = ModelConfig(
    backbone="convnet",
    backbone_weights="none",
    num_classes=4,
    hidden_dim=16,
    num_heads=2,
    num_levels=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_encoder_points=2,
    num_decoder_points=2,
    feedforward_dim=32,
    dropout=0.1,
    num_queries=8,
    mixed_selection=True,
    look_forward_twice=True,
)


def tiny_config(data_root: Path, output: Path, **changes: object) -> RunConfig:
    """A run of a few steps; `changes` replace top-level fields."""
    config = RunConfig(
        model=dataclasses.replace(TINY_MODEL, num_classes=None),
        assignment=AssignmentConfig(),
        data=DataConfig(
            root=data_root,
            augmentation="flip",
            train_sizes=(48, 64),
            test_size=64,
            max_size=64,
            pad_multiple=32,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=1e-3, backbone_lr=1e-3, warmup_steps=2),
        train=TrainConfig(epochs=2, batch_size=4, log_every=2, eval_every=0),
        eval=EvalConfig(batch_size=4, max_detections=20),
        output=output,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
