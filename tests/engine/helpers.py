"""A model, data and configurations small enough to train in a second."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    config_to_dict,
)
from msdetr.engine.checkpoint import changed_fields
from msdetr.presets import PRESETS

BATCH_SIZE, SEED = 4, 42

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

_MS_HYBRID = dataclasses.replace(TINY_MODEL, extra_queries="hybrid", num_hybrid_queries=10)
_MS_GROUP = dataclasses.replace(
    TINY_MODEL, extra_queries="group", num_groups=3, proposal_score="best_class"
)
_ALONE: dict[str, Any] = {
    "decoder_order": "self_cross",
    "one_to_many": "none",
    "one_to_many_ffn": False,
}
_MS_CONTRASTIVE = dataclasses.replace(TINY_MODEL, denoising="contrastive", denoising_groups=2)
RELATIVES = {
    "hybrid": dataclasses.replace(_MS_HYBRID, **_ALONE),
    "group": dataclasses.replace(_MS_GROUP, **_ALONE),
    "ms-hybrid": _MS_HYBRID,
    "ms-group": _MS_GROUP,
    "ms-contrastive": _MS_CONTRASTIVE,
    "ms-dn": dataclasses.replace(TINY_MODEL, denoising="dn", denoising_groups=3),
    "ms-group-contrastive": dataclasses.replace(
        _MS_GROUP, denoising="contrastive", denoising_groups=2
    ),
    "dino": dataclasses.replace(
        _MS_CONTRASTIVE,
        query_position="box",
        proposal_score="best_class",
        head_sharing="decoder",
        decoder_norm=True,
        **_ALONE,
    ),
    "dn-one-stage": dataclasses.replace(
        TINY_MODEL,
        query_position="box_content",
        denoising="dn",
        denoising_groups=3,
        two_stage=False,
        mixed_selection=False,
        look_forward_twice=False,
        **_ALONE,
    ),
    "deta": dataclasses.replace(
        TINY_MODEL,
        mixed_selection=False,
        proposal_nms_iou_threshold=0.9,
        proposal_content=True,
        **_ALONE,
    ),
}
"""Small models of the relatives, with and without one-to-many supervision."""


def assignment_of(model: ModelConfig, **fields: Any) -> AssignmentConfig:
    """The assignment of a model's family."""
    if model.proposal_nms_iou_threshold is not None:
        fields |= {"decoder_match": "iou", "encoder_match": "iou"}
    return AssignmentConfig(**fields)


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


def deterministic_config(
    data: Path, output: Path, model: ModelConfig = TINY_MODEL, **train: Any
) -> RunConfig:
    """Four steps without random numbers per rank: no dropout, no augmentation, no noise, all
    positives kept. `train` replaces fields of the training loop."""
    return tiny_config(
        data,
        output,
        model=dataclasses.replace(
            model,
            num_classes=None,
            dropout=0.0,
            denoising_label_noise=0.0,
            denoising_box_noise=0.0,
        ),
        assignment=assignment_of(model, positive_fraction=1.0, encoder_max_positives=10**6),
        data=DataConfig(
            root=data,
            augmentation="none",
            test_size=64,
            max_size=64,
            pad_multiple=32,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=1e-3, backbone_lr=1e-3, clip_grad_norm=1.0),
        train=TrainConfig(
            **{"epochs": 2, "batch_size": BATCH_SIZE, "log_every": 1, "max_steps": 4} | train
        ),
        # Two processes then have different numbers of batches for 5 images.
        eval=EvalConfig(batch_size=2, max_detections=20),
        seed=SEED,
    )


def assert_same_within_rounding(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two reports of `processes.train_run` agree in losses, gradients, weights and scores."""
    for name, gradient in expected["gradients"].items():
        difference = (gradient - actual["gradients"][name]).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-6, name
    for name, tolerance in (("losses", 1e-5), ("grad_norms", 1e-4)):
        assert actual[name][:2] == pytest.approx(expected[name][:2], rel=tolerance)
        # Adam amplifies the rounding of gradients that are otherwise 0, so that runs diverge.
        assert actual[name] == pytest.approx(expected[name], rel=1e-2)
    moved = difference = 0.0
    for name, initial in expected["initial"].items():
        moved += float((expected["tensors"][name] - initial).abs().sum())
        difference += float((expected["tensors"][name] - actual["tensors"][name]).abs().sum())
    assert difference <= 3e-2 * moved
    assert actual["scores"].keys() == expected["scores"].keys()
    for image_id, scores in expected["scores"].items():
        assert actual["scores"][image_id] == pytest.approx(scores, rel=5e-2)


def write_shapes(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    size: int = 64,
    without_targets: Iterable[int] = (),
) -> Path:
    """Squares of three colours on grey, in COCO layout; `without_targets` are indices of training
    images that stay empty."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, num_images in (("train2017", num_train), ("val2017", num_val)):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(num_images):
            pixels = rng.integers(90, 120, (size, size, 3), dtype=np.uint8)
            empty = split == "train2017" and index in without_targets
            for _ in range(0 if empty else int(rng.integers(1, 4))):
                category, side = int(rng.integers(3)), int(rng.integers(size // 6, size // 2))
                x, y = (int(rng.integers(0, size - side)) for _ in range(2))
                pixels[y : y + side, x : x + side] = np.eye(3, dtype=np.uint8)[category] * 255
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 100,
                        "category_id": category + 5,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
            name = f"{index:04d}.png"
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": index + 100, "file_name": name, "width": size, "height": size})
        names = ("red", "green", "blue")
        categories = [{"id": i + 5, "name": name} for i, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def tiny_options(config: RunConfig) -> list[str]:
    """The command line of `train.py` for `config`: preset `tiny` and the fields that differ."""
    changes = changed_fields(config_to_dict(PRESETS["tiny"].config), config_to_dict(config))
    options = ["tiny"]
    for name, _, value in changes:
        option = name.replace("_", "-")
        if isinstance(value, bool):
            group, _, field = option.rpartition(".")
            options.append(f"--{group}.{'' if value else 'no-'}{field}")
        else:
            values = value if isinstance(value, list) else [value]
            options += [f"--{option}", *map(str, values)]
    return options
