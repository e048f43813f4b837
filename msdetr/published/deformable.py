"""Conversion of Deformable-DETR's command line, and of those made from it: MS-DETR and H-DETR.

Flags that all of them share have the same defaults, except `--dim_feedforward`. Where the published
code and its flags disagree:

- `--o2m_matcher_threshold`, `--o2m_matcher_k` and `--use_indices_merge` never reach the published
  criterion, which always uses 0.4, 6 and no merging. The configuration has these values too, with
  a warning, because the published run did. `AssignmentConfig` has working fields for all three.
- `--mixed_selection` without `--two_stage`, and `--use_aux_ffn` without `--use_ms_detr`, have
  no effect there; `--look_forward_twice` without `--with_box_refine` crashes there. They are
  dropped with a warning.
- One-stage MS-DETR and `--two_stage` without `--with_box_refine` crash there and work here.
- `--focal_alpha` changes the loss only; the matching cost keeps 0.25.
- `--no_aux_loss` also removes the encoder's loss in `deformable-detr`, `h-deformable-detr` and
  `deta`, not in the others.
- `h-deformable-detr` raises an exception with `--num_queries_one2many 0` unless `--k_one2many 0`
  is given too, and with `--no_aux_loss` unless `--k_one2many 0`. Both work here. With
  `--k_one2many 0` its extra queries get no loss: the weights are 0 here.
- `--lambda_one2many` multiplies the reported losses there, and the three `hybrid_*_weight` here.
- `--use_checkpoint` recomputes all layers of encoder and decoder. It becomes
  `activation_checkpointing = "all"`, which recomputes the backbone too; `encoder` would keep more
  than the published run.
- `--use_fp16` (float16 with a scaled loss, but float32 in encoder and decoder) becomes `bfloat16`,
  with a warning.
- `--eval_in_training_set` selects the images of the evaluation. It is dropped with a warning;
  `data.val_images` and `data.val_annotations` select them here.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Literal

from msdetr.config import AssignmentConfig, EvalConfig, LossConfig, ModelConfig, TrainConfig
from msdetr.published.command_lines import Implementation
from msdetr.published.deformable_flags import DEAD_FLAGS, FAMILY_DEFAULTS, ONE_TO_MANY_FLAGS
from msdetr.published.shared import (
    Recipe,
    data_config,
    effective,
    encoder_and_decoder,
    optimizer_config,
    unsupported_everywhere,
    unsupported_groups,
)

logger = logging.getLogger(__name__)

_WITH_PREDICTIONS: tuple[Implementation, ...] = ("deformable-detr", "h-deformable-detr", "deta")
"""They match the encoder's proposals by predictions, and copy the main weights to its losses."""


def unsupported(values: argparse.Namespace) -> list[str]:
    """Reasons against values of these command lines that are not supported."""
    return unsupported_everywhere(values) + unsupported_groups(values)


def recipe(values: argparse.Namespace, batch_size: int, implementation: Implementation) -> Recipe:
    """The recipe of these values. Warns of values that change or go."""
    values = argparse.Namespace(**FAMILY_DEFAULTS | vars(values))
    _warn_dead_flags(values)
    _warn_changed_flags(values)
    return Recipe(
        model=_model_config(values, implementation),
        assignment=_assignment_config(values, implementation),
        loss=_loss_config(values, implementation),
        data=data_config(values),
        optimizer=optimizer_config(
            values, reference_lr_factor=values.lr_linear_proj_mult, sgd=values.sgd
        ),
        train=TrainConfig(
            epochs=values.epochs,
            batch_size=batch_size,
            activation_checkpointing="all" if values.use_checkpoint else "none",
            precision="bfloat16" if values.use_fp16 else "float32",
        ),
        eval=EvalConfig(
            max_detections=values.topk if _is_hybrid(implementation) else values.topk_eval,
            nms_iou_threshold=values.nms_iou_threshold,
        ),
    )


def _is_hybrid(implementation: Implementation) -> bool:
    return implementation == "h-deformable-detr"


def _warn_dead_flags(values: argparse.Namespace) -> None:
    for name, field in DEAD_FLAGS.items():
        if getattr(values, name) != ONE_TO_MANY_FLAGS[name].default:
            logger.warning(
                "%s: dropped, as the published code ignores it; set assignment.%s to use it",
                name,
                field,
            )


def _warn_changed_flags(values: argparse.Namespace) -> None:
    if values.use_fp16:
        logger.warning(
            "use_fp16: becomes train.precision bfloat16; the published code computes the backbone "
            "in float16, encoder and decoder in float32"
        )
    if values.eval_in_training_set:
        logger.warning(
            "eval_in_training_set: dropped; set data.val_images and data.val_annotations instead"
        )
    if values.num_queries_one2many and values.k_one2many <= 0:
        logger.warning(
            "k_one2many %d: the %d extra queries get no loss, as in the published code",
            values.k_one2many,
            values.num_queries_one2many,
        )


def _model_config(values: argparse.Namespace, implementation: Implementation) -> ModelConfig:
    internal = values.use_ms_detr and implementation == "ms-detr"
    one_to_many: Literal["none", "internal", "output"] = "none"
    if values.use_ms_detr:
        one_to_many = "internal" if internal else "output"
    return replace(
        encoder_and_decoder(values),
        num_queries=(
            values.num_queries_one2one if _is_hybrid(implementation) else values.num_queries
        ),
        extra_queries="hybrid" if values.num_queries_one2many else "none",
        num_hybrid_queries=values.num_queries_one2many or ModelConfig.num_hybrid_queries,
        decoder_order="cross_self" if internal else "self_cross",
        one_to_many=one_to_many,
        one_to_many_ffn=effective(values, "use_aux_ffn", needs="use_ms_detr"),
        two_stage=values.two_stage,
        box_refine=values.with_box_refine,
        mixed_selection=effective(values, "mixed_selection", needs="two_stage"),
        look_forward_twice=effective(values, "look_forward_twice", needs="with_box_refine"),
    )


def _assignment_config(
    values: argparse.Namespace, implementation: Implementation
) -> AssignmentConfig:
    by_predictions = implementation in _WITH_PREDICTIONS
    hybrid = values.num_queries_one2many and values.k_one2many > 0
    return AssignmentConfig(
        cost_class=values.set_cost_class,
        cost_bbox=values.set_cost_bbox,
        cost_giou=values.set_cost_giou,
        encoder_match="predictions" if by_predictions else "anchors",
        encoder_cost_class=values.set_cost_class if by_predictions else 0.0,
        hybrid_k=values.k_one2many if hybrid else AssignmentConfig.hybrid_k,
    )


def _loss_config(values: argparse.Namespace, implementation: Implementation) -> LossConfig:
    main = (values.cls_loss_coef, values.bbox_loss_coef, values.giou_loss_coef)
    encoder = (values.enc_cls_loss_coef, values.enc_bbox_loss_coef, values.enc_giou_loss_coef)
    if implementation in _WITH_PREDICTIONS:
        # Its encoder weights are copies of the main ones, made together with those of the auxiliary
        # losses. Without these, the encoder's losses have no weight.
        encoder = main if values.aux_loss else (0.0, 0.0, 0.0)
    hybrid = (
        LossConfig.hybrid_class_weight,
        LossConfig.hybrid_bbox_weight,
        LossConfig.hybrid_giou_weight,
    )
    if values.num_queries_one2many:
        factor = values.lambda_one2many if values.k_one2many > 0 else 0.0
        hybrid = (factor * main[0], factor * main[1], factor * main[2])
    return LossConfig(
        class_weight=main[0],
        bbox_weight=main[1],
        giou_weight=main[2],
        one_to_many_class_weight=values.o2m_cls_loss_coef,
        one_to_many_bbox_weight=values.o2m_bbox_loss_coef,
        one_to_many_giou_weight=values.o2m_giou_loss_coef,
        hybrid_class_weight=hybrid[0],
        hybrid_bbox_weight=hybrid[1],
        hybrid_giou_weight=hybrid[2],
        encoder_class_weight=encoder[0],
        encoder_bbox_weight=encoder[1],
        encoder_giou_weight=encoder[2],
        focal_alpha=values.focal_alpha,
        auxiliary=values.aux_loss,
    )
