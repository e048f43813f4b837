"""What the conversions of all command lines have in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Literal, NamedTuple

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from msdetr.published.deformable_flags import BACKBONE_NAMES, REFERENCE_NAMES

logger = logging.getLogger(__name__)

STARTING_POINTS = ("resume", "pretrain_model_path", "finetune")
"""Options that name the file from which a published run started, the first that is set wins."""

GIOU_EPS = 1e-6
"""DN-DETR and DINO add it to the denominators of the GIoU."""
LOGIT_EPS = 1e-3
"""Smallest distance of a coordinate from 0 and 1 where DN-DETR and DINO take its logit."""

_POSITION_EMBEDDINGS: dict[str, Literal["sine", "learned"]] = {
    "sine": "sine",
    "v2": "sine",
    "learned": "learned",
    "v3": "learned",
}


class Recipe(NamedTuple):
    """The sections of a `RunConfig` that depend on the command line."""

    model: ModelConfig
    assignment: AssignmentConfig
    loss: LossConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig


def unsupported_everywhere(values: argparse.Namespace) -> list[str]:
    """Reasons against values that no command line's conversion supports."""
    reasons = []
    if values.masks:
        reasons.append("masks: segmentation is not part of this project")
    if values.frozen_weights is not None:
        reasons.append("frozen_weights: it trains a mask head on a frozen detector")
    if values.dataset_file == "coco_panoptic":
        reasons.append("dataset_file coco_panoptic: panoptic segmentation is not supported")
    if values.backbone not in ("resnet50", "resnet101"):
        reasons.append(
            f"backbone {values.backbone}: only resnet50 and resnet101 are supported, no Swin and "
            "no ConvNeXt"
        )
    if values.position_embedding not in _POSITION_EMBEDDINGS:
        reasons.append(
            f"position_embedding {values.position_embedding}: one of "
            f"{', '.join(_POSITION_EMBEDDINGS)} is needed"
        )
    for name in STARTING_POINTS:
        value = getattr(values, name, None) or ""
        if value.startswith(("http://", "https://")):
            reasons.append(f"{name} {value}: download the file first")
    return reasons


def unsupported_groups(values: argparse.Namespace) -> list[str]:
    """Reasons against parameter groups other than those of Deformable-DETR."""
    reasons = []
    if values.lr_backbone_names != BACKBONE_NAMES:
        reasons.append(
            f"lr_backbone_names {values.lr_backbone_names}: lr_backbone is that of the backbone"
        )
    if sorted(values.lr_linear_proj_names) != REFERENCE_NAMES:
        reasons.append(
            f"lr_linear_proj_names {values.lr_linear_proj_names}: "
            f"lr_linear_proj_mult is that of {' and '.join(REFERENCE_NAMES)}"
        )
    return reasons


def other_values(values: argparse.Namespace, only: dict[str, tuple[object, str]]) -> list[str]:
    """Reasons against values other than the only supported one.

    Args:
        only: the supported value and the reason, by attribute name.
    """
    return [
        f"{name} {getattr(values, name)}: {reason}"
        for name, (supported, reason) in only.items()
        if getattr(values, name) != supported
    ]


def encoder_and_decoder(values: argparse.Namespace) -> ModelConfig:
    """The parts of the model that all command lines describe by the same names."""
    return ModelConfig(
        backbone=values.backbone,
        train_backbone=values.lr_backbone > 0,
        dilation=values.dilation,
        num_classes=91 if values.dataset_file == "coco" else 20,
        hidden_dim=values.hidden_dim,
        num_heads=values.nheads,
        num_levels=values.num_feature_levels,
        num_encoder_layers=values.enc_layers,
        num_decoder_layers=values.dec_layers,
        num_encoder_points=values.enc_n_points,
        num_decoder_points=values.dec_n_points,
        feedforward_dim=values.dim_feedforward,
        dropout=values.dropout,
        position_embedding=_POSITION_EMBEDDINGS[values.position_embedding],
        decoder_order="self_cross",
        one_to_many="none",
        one_to_many_ffn=False,
    )


def optimizer_config(
    values: argparse.Namespace, *, reference_lr_factor: float, sgd: bool = False
) -> OptimizerConfig:
    """The optimizer. `reference_lr_factor` is 1 where offsets have no factor of their own."""
    return OptimizerConfig(
        name="sgd" if sgd else "adamw",
        lr=values.lr,
        # The published code freezes the backbone at 0 or below, and clips above 0 only.
        backbone_lr=max(values.lr_backbone, 0.0),
        reference_lr_factor=reference_lr_factor,
        weight_decay=values.weight_decay,
        clip_grad_norm=max(values.clip_max_norm, 0.0),
        lr_drop_epoch=values.lr_drop,
    )


def data_config(values: argparse.Namespace) -> DataConfig:
    """Where images are and how many processes read them."""
    root = Path(values.coco_path) if values.coco_path else None
    return DataConfig(root=root, num_workers=values.num_workers)


def starting_weights(values: argparse.Namespace) -> Path | None:
    """The file from which the run started."""
    for name in STARTING_POINTS:
        value = getattr(values, name, None)
        if value:
            return Path(value)
    return None


def effective(values: argparse.Namespace, name: str, *, needs: str) -> bool:
    """Whether a flag is set and has an effect. Warns where it has none."""
    if getattr(values, name) and not getattr(values, needs):
        logger.warning("%s: dropped, it has no effect without %s", name, needs)
    return bool(getattr(values, name) and getattr(values, needs))


def warn_of_shared_changes(values: argparse.Namespace) -> None:
    """Warn of options of DN-DETR and DINO that mean something else here."""
    if values.amp:
        logger.warning("amp: becomes train.precision bfloat16; the published code uses float16")
    if values.finetune_ignore:
        logger.warning(
            "finetune_ignore: dropped; class heads with another number of classes keep their "
            "initialisation here, and everything else must fit"
        )
    if _POSITION_EMBEDDINGS[values.position_embedding] == "learned":
        logger.warning(
            "position_embedding learned: trained with lr; the published code uses lr_backbone, "
            "because it is part of what it calls the backbone"
        )
