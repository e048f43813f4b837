"""Conversion of DN-DETR's command line, for its model `dn_dab_deformable_detr`.

Where the published code and its flags disagree:

- Without `--use_dn`, with `--scalar 0`, `--contrastive`, `--two_stage` or `--num_patterns`, this
  model raises an exception there. Its checkpoints therefore have denoising.
- It refines boxes always, uses ReLU whatever `--transformer_activation` says, and keeps the 100
  best detections whatever `--num_select` says.
- `--random_refpoints_xy` draws the centres of the initial anchors evenly, but does not freeze
  them. It is dropped with a warning.
- `--amp` (float16 with a scaled loss) becomes `bfloat16`, with a warning.
- `--focal_alpha` changes the losses only; the matching cost keeps 0.25.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from msdetr.config import AssignmentConfig, EvalConfig, LossConfig, ModelConfig, TrainConfig
from msdetr.published.dn_detr_flags import MODEL_NAME
from msdetr.published.shared import (
    GIOU_EPS,
    LOGIT_EPS,
    Recipe,
    data_config,
    encoder_and_decoder,
    optimizer_config,
    other_values,
    unsupported_everywhere,
    warn_of_shared_changes,
)

logger = logging.getLogger(__name__)

_ONLY: dict[str, tuple[object, str]] = {
    "modelname": (MODEL_NAME, f"only {MODEL_NAME} is supported"),
    "use_dn": (True, "the published model fails without it, in training and in evaluation"),
    "contrastive": (False, "the published model fails with it"),
    "two_stage": (False, "the published model fails with it"),
    "num_patterns": (0, "the published model fails with patterns"),
    "fix_size": (False, "it is for debugging, training images have random sizes here"),
}


def unsupported(values: argparse.Namespace) -> list[str]:
    """Reasons against values of this command line that are not supported."""
    reasons = unsupported_everywhere(values) + other_values(values, _ONLY)
    if values.scalar < 1:
        reasons.append(f"scalar {values.scalar}: the published model fails without a group")
    return reasons


def recipe(values: argparse.Namespace, batch_size: int) -> Recipe:
    """The recipe of these values. Warns of values that change or go."""
    warn_of_shared_changes(values)
    if values.random_refpoints_xy:
        logger.warning("random_refpoints_xy: dropped, it concerns the initial anchors only")
    return Recipe(
        model=_model_config(values),
        assignment=AssignmentConfig(
            cost_class=values.set_cost_class,
            cost_bbox=values.set_cost_bbox,
            cost_giou=values.set_cost_giou,
            giou_eps=GIOU_EPS,
        ),
        loss=LossConfig(
            class_weight=values.cls_loss_coef,
            bbox_weight=values.bbox_loss_coef,
            giou_weight=values.giou_loss_coef,
            denoising_class_weight=values.cls_loss_coef,
            denoising_bbox_weight=values.bbox_loss_coef,
            denoising_giou_weight=values.giou_loss_coef,
            giou_eps=GIOU_EPS,
            focal_alpha=values.focal_alpha,
            auxiliary=values.aux_loss,
        ),
        data=data_config(values),
        optimizer=optimizer_config(values, reference_lr_factor=1.0),
        train=TrainConfig(
            epochs=values.epochs,
            batch_size=batch_size,
            precision="bfloat16" if values.amp else "float32",
        ),
        eval=EvalConfig(),
    )


def _model_config(values: argparse.Namespace) -> ModelConfig:
    return replace(
        encoder_and_decoder(values),
        num_queries=values.num_queries,
        two_stage=False,
        query_position="box_content",
        denoising="dn",
        denoising_groups=values.scalar,
        denoising_label_noise=values.label_noise_scale,
        denoising_box_noise=values.box_noise_scale,
        logit_eps=LOGIT_EPS,
    )
