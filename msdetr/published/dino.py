"""Conversion of DINO's options and of the keys of its configuration file.

Where the published code and its keys disagree:

- `dn_number` counts pairs of copies from 50 on, and half the groups below. `--use_dn` with
  `dn_number` 0 adds queries that are then matched with targets, and is refused.
- Without `use_dn` its model has a label embedding all the same, which is set aside when a
  checkpoint is loaded.
- `focal_alpha` is that of the matching cost too, which has 0.25 here. Other values are refused.
- `nms_iou_threshold` suppresses detections of other classes too, and is refused. Its default,
  -1, is no suppression.
- `amp` (float16 with a scaled loss) becomes `bfloat16`, with a warning.
- `use_ema` averages with the same decay from the first step on: `ema_warmup_steps` is 0.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, Literal

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
)
from msdetr.published.shared import (
    GIOU_EPS,
    LOGIT_EPS,
    Recipe,
    data_config,
    encoder_and_decoder,
    optimizer_config,
    other_values,
    unsupported_everywhere,
    unsupported_groups,
    warn_of_shared_changes,
)

_ONLY: dict[str, tuple[object, str]] = {
    "modelname": ("dino", "only dino is supported"),
    "two_stage_type": ("standard", "queries start from proposals"),
    "two_stage_pat_embed": (0, "proposals have no pattern embeddings"),
    "two_stage_add_query_num": (0, "all queries start from proposals"),
    "two_stage_learn_wh": (False, "the size of anchors is not learned"),
    "two_stage_keep_all_tokens": (False, "only selected proposals are supervised"),
    "embed_init_tgt": (True, "with box-coded positions, content is learned"),
    "query_dim": (4, "reference points are boxes"),
    "dec_layer_number": (None, "all decoder layers have the same queries"),
    "decoder_layer_noise": (False, "reference boxes are not disturbed between layers"),
    "decoder_sa_type": ("sa", "decoder layers attend to their queries"),
    "decoder_module_seq": (["sa", "ca", "ffn"], "it is the order of a decoder layer"),
    "use_deformable_box_attn": (False, "there is no box attention"),
    "add_channel_attention": (False, "there is no channel attention"),
    "pre_norm": (False, "layers normalise their output"),
    "transformer_activation": ("relu", "feed-forward networks have ReLU"),
    "return_interm_indices": ([1, 2, 3], "levels start at stage 2 of the backbone"),
    "matcher_type": ("HungarianMatcher", "only HungarianMatcher is supported"),
    "focal_alpha": (0.25, "it is that of the matching cost too, which has 0.25 here"),
    "onecyclelr": (False, "the learning rate drops every lr_drop epochs"),
    "multi_step_lr": (False, "the learning rate drops every lr_drop epochs"),
    "fix_size": (False, "it is for debugging, training images have random sizes here"),
    "strong_aug": (False, "there is no augmentation of colours"),
}

_HeadSharing = Literal["none", "decoder", "all"]


def unsupported(values: argparse.Namespace) -> list[str]:
    """Reasons against values of this command line that are not supported."""
    reasons = unsupported_everywhere(values) + other_values(values, _ONLY)
    if values.num_feature_levels < 3:
        reasons.append(
            f"num_feature_levels {values.num_feature_levels}: the published model needs 3"
        )
    if values.pe_temperatureH != values.pe_temperatureW:
        reasons.append("pe_temperatureH and pe_temperatureW: they must be equal")
    if _head_sharing(values) is None:
        reasons.append(
            "dec_pred_bbox_embed_share, dec_pred_class_embed_share, two_stage_bbox_embed_share, "
            "two_stage_class_embed_share: class and box heads are shared alike, and the encoder's "
            "only with one pair for all decoder layers"
        )
    if values.use_dn and values.dn_number < 1:
        reasons.append(f"dn_number {values.dn_number}: set use_dn False to have no denoising")
    if values.nms_iou_threshold > 0:
        reasons.append(
            f"nms_iou_threshold {values.nms_iou_threshold}: it suppresses detections of other "
            "classes there, and of the same class here"
        )
    if values.use_ema and values.ema_epoch > 0:
        reasons.append(f"ema_epoch {values.ema_epoch}: the average starts with the first step")
    if values.param_dict_type == "ddetr_in_mmdet":
        reasons += unsupported_groups(values)
    elif values.param_dict_type != "default":
        reasons.append(
            f"param_dict_type {values.param_dict_type}: only default and ddetr_in_mmdet are "
            "supported"
        )
    return reasons


def recipe(values: argparse.Namespace, batch_size: int) -> Recipe:
    """The recipe of these values. Warns of values that change or go."""
    warn_of_shared_changes(values)
    by_module = values.param_dict_type == "ddetr_in_mmdet"
    return Recipe(
        model=_model_config(values),
        assignment=AssignmentConfig(
            cost_class=values.set_cost_class,
            cost_bbox=values.set_cost_bbox,
            cost_giou=values.set_cost_giou,
            giou_eps=GIOU_EPS,
        ),
        loss=_loss_config(values),
        data=_data_config(values),
        optimizer=optimizer_config(
            values, reference_lr_factor=values.lr_linear_proj_mult if by_module else 1.0
        ),
        train=TrainConfig(
            epochs=values.epochs,
            batch_size=batch_size,
            ema_decay=values.ema_decay if values.use_ema else None,
            ema_warmup_steps=0 if values.use_ema else TrainConfig.ema_warmup_steps,
            precision="bfloat16" if values.amp else "float32",
        ),
        eval=EvalConfig(max_detections=values.num_select),
    )


def _model_config(values: argparse.Namespace) -> ModelConfig:
    sharing = _head_sharing(values)
    assert sharing is not None  # `unsupported` refuses it
    labels = values.dn_labelbook_size
    model = replace(
        encoder_and_decoder(values),
        num_classes=values.num_classes,
        num_queries=values.num_queries,
        query_position="box",
        position_temperature=float(values.pe_temperatureH),
        position_offset=1.0,
        proposal_score="best_class",
        mixed_selection=True,
        look_forward_twice=not values.use_detached_boxes_dec_out,
        head_sharing=sharing,
        decoder_norm=True,
        logit_eps=LOGIT_EPS,
        denoising_label_rows=None if labels == values.num_classes else labels + 1,
    )
    return replace(model, **_denoising(values)) if values.use_dn else model


def _denoising(values: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ModelConfig` that describe the denoising queries."""
    number = values.dn_number
    few = 2 * number < 100  # then their number is that of the groups
    return {
        "denoising": "contrastive",
        "denoising_queries": ModelConfig.denoising_queries if few else number,
        "denoising_groups": 2 * number if few else None,
        "denoising_label_noise": values.dn_label_noise_ratio / 2,
        "denoising_box_noise": values.dn_box_noise_scale,
    }


def _head_sharing(values: argparse.Namespace) -> _HeadSharing | None:
    """How heads are shared, None where that cannot be expressed."""
    decoder = {values.dec_pred_bbox_embed_share, values.dec_pred_class_embed_share}
    encoder = {values.two_stage_bbox_embed_share, values.two_stage_class_embed_share}
    if decoder == {True}:
        if encoder == {True}:
            return "all"
        return "decoder" if encoder == {False} else None
    return "none" if decoder == {False} and encoder == {False} else None


def _loss_config(values: argparse.Namespace) -> LossConfig:
    of_class, of_bbox, of_giou = (
        values.cls_loss_coef,
        values.bbox_loss_coef,
        values.giou_loss_coef,
    )
    of_encoder = values.interm_loss_coef
    of_encoder_boxes = 0.0 if values.no_interm_box_loss else of_encoder
    return LossConfig(
        class_weight=of_class,
        bbox_weight=of_bbox,
        giou_weight=of_giou,
        denoising_class_weight=of_class,
        denoising_bbox_weight=of_bbox,
        denoising_giou_weight=of_giou,
        encoder_class_weight=of_encoder * of_class,
        encoder_bbox_weight=of_encoder_boxes * of_bbox,
        encoder_giou_weight=of_encoder_boxes * of_giou,
        giou_eps=GIOU_EPS,
        focal_alpha=values.focal_alpha,
        auxiliary=values.aux_loss,
    )


def _data_config(values: argparse.Namespace) -> DataConfig:
    factor = values.data_aug_scale_overlap or 0.0

    def scaled(size: int) -> int:
        return int(size * factor) if factor > 0 else size

    sizes = tuple(scaled(size) for size in values.data_aug_scales)
    crop_min_size, crop_max_size = (scaled(size) for size in values.data_aug_scales2_crop)
    return replace(
        data_config(values),
        train_sizes=sizes,
        test_size=max(sizes),
        max_size=scaled(values.data_aug_max_size),
        crop_resize_sizes=tuple(scaled(size) for size in values.data_aug_scales2_resize),
        crop_min_size=crop_min_size,
        crop_max_size=crop_max_size,
    )
