"""The published command lines become configurations with the same meaning."""

from __future__ import annotations

import itertools
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from msdetr.config import AssignmentConfig, RunConfig
from msdetr.presets import PRESETS
from msdetr.published import (
    DEAD_FLAGS,
    PUBLISHED_FLAGS,
    Implementation,
    config_from_published_args,
    infer_implementation,
)
from parity.golden import golden_models

# The command lines of Deformable-DETR and of the code made from it.
DEFORMABLE: tuple[Implementation, ...] = (
    "ms-detr",
    "ms-detr-impl-a",
    "deformable-detr",
    "h-deformable-detr",
    "deta",
)
MODEL_FLAGS = (
    "with_box_refine",
    "two_stage",
    "mixed_selection",
    "look_forward_twice",
    "use_ms_detr",
    "use_aux_ffn",
    "dilation",
)


UNREAD = "the published code never reads it"
MASKS = "belongs to masks, which are refused"
INVOCATION = "state of one invocation, not of the recipe"
LOGGING = "what is logged or stored does not change what is learned"
SWIN = "belongs to the Swin backbones, which are refused"
ONE_STAGE = "belongs to two_stage_type no, which is refused"
PROCESSES = "how processes find each other does not change what is learned"
OTHER_MODEL = "belongs to another model, which is refused"

IGNORED_FLAGS = {
    "lr_drop_epochs": UNREAD,
    "position_embedding_scale": UNREAD,
    "remove_difficult": UNREAD,
    "mask_loss_coef": MASKS,
    "dice_loss_coef": MASKS,
    "coco_panoptic_path": "belongs to dataset_file coco_panoptic, which is refused",
    "cache_mode": "where images are read from does not change what is learned",
    "start_epoch": INVOCATION,
    "eval": INVOCATION,
    "eval_in_training_set": INVOCATION,
    "use_wandb": LOGGING,
    "pretrained_backbone_path": SWIN,
    "drop_path_rate": SWIN,
    # DN-DETR and DINO
    "note": LOGGING,
    "save_checkpoint_interval": LOGGING,
    "save_results": LOGGING,
    "save_log": LOGGING,
    "debug": INVOCATION,
    "find_unused_params": "a check of the gradients' exchange",
    "finetune_ignore": "everything but class heads must fit here; a warning says so",
    "backbone_freeze_keywords": SWIN,
    "batch_norm_type": UNREAD,
    "dist_url": PROCESSES,
    "rank": PROCESSES,
    "local_rank": PROCESSES,
}
"""Published flags without a counterpart, and why that loses nothing."""

IGNORED_FLAGS_OF: dict[Implementation, dict[str, str]] = {
    "dn-dab-deformable-detr": {
        "override_resumed_lr_drop": INVOCATION,
        "drop_lr_now": INVOCATION,
        "use_mqs": OTHER_MODEL,
        "use_lft": OTHER_MODEL,
        "pe_temperatureH": OTHER_MODEL,
        "pe_temperatureW": OTHER_MODEL,
        "pre_norm": OTHER_MODEL,
        "transformer_activation": OTHER_MODEL,
        "num_select": OTHER_MODEL,
        "num_results": UNREAD,
        "return_interm_layers": UNREAD,
        "eos_coef": UNREAD,
        "random_refpoints_xy": "concerns the initial anchors only; a warning says so",
    },
    "dino": {
        "config_file": "names the file whose keys are the other arguments",
        "dataset_file": "the number of classes is num_classes",
        "test": INVOCATION,
        "use_checkpoint": SWIN,
        "backbone_dir": SWIN,
        "num_patterns": ONE_STAGE,
        "random_refpoints_xy": ONE_STAGE,
        "fix_refpoints_hw": ONE_STAGE,
        "box_attn_type": "belongs to use_deformable_box_attn, which is refused",
        "dln_xy_noise": "belongs to decoder_layer_noise, which is refused",
        "dln_hw_noise": "belongs to decoder_layer_noise, which is refused",
        "lr_drop_list": "belongs to multi_step_lr, which is refused",
    }
    | dict.fromkeys(
        (
            "add_pos_value",
            "dabdetr_deformable_decoder",
            "dabdetr_deformable_encoder",
            "dabdetr_yolo_like_anchor_update",
            "ddetr_lr_param",
            "dn_bbox_coef",
            "dn_label_coef",
            "dn_scalar",
            "enc_loss_coef",
            "match_unstable_error",
            "pdetr3_bbox_embed_diff_each_layer",
            "pdetr3_refHW",
            "two_stage_default_hw",
            "unic_layers",
        ),
        UNREAD,
    ),
}
"""The same, for flags that mean something in other command lines."""

GOLDEN_MODELS = golden_models()

MS_DETR_SCRIPT = (
    "--output_dir exps/ms_detr_300 --with_box_refine --two_stage --dim_feedforward 2048 "
    "--epochs 12 --lr_drop 11 --coco_path=../data/coco2017 --num_queries 300 --use_ms_detr "
    "--use_aux_ffn --cls_loss_coef 1 --o2m_cls_loss_coef 2 --enc_cls_loss_coef 2 "
    "--enc_bbox_loss_coef 5 --enc_giou_loss_coef 2"
)
PLUS = " --dropout 0.0 --mixed_selection --look_forward_twice"

# Preset -> implementation, and the flags of the published training script.
RECIPES: dict[str, tuple[Implementation, str]] = {
    "ms-detr-r50-300": ("ms-detr", MS_DETR_SCRIPT),
    "ms-detr-pp-r50-300": ("ms-detr", MS_DETR_SCRIPT + PLUS),
    "ms-detr-pp-r50-900": (
        "ms-detr",
        MS_DETR_SCRIPT + PLUS + " --num_queries 900 --topk_eval 300",
    ),
    "ms-detr-a-r50-300": (
        "ms-detr-impl-a",
        "--with_box_refine --two_stage --dim_feedforward 2048 --epochs 12 --lr_drop 11 "
        "--num_queries 300 --use_ms_detr --cls_loss_coef 1 --o2m_cls_loss_coef 2",
    ),
    "deformable-detr-r50": ("deformable-detr", ""),
    "deformable-detr-r50-refine": ("deformable-detr", "--with_box_refine"),
    "deformable-detr-r50-two-stage": ("deformable-detr", "--with_box_refine --two_stage"),
    "h-deformable-detr-r50": (
        "h-deformable-detr",
        "--with_box_refine --two_stage --dim_feedforward 2048 --epochs 12 --lr_drop 11 "
        "--num_queries_one2one 300 --num_queries_one2many 1500 --k_one2many 6 "
        "--lambda_one2many 1.0 --dropout 0.0 --mixed_selection --look_forward_twice",
    ),
    "dn-deformable-detr-r50": (
        "dn-dab-deformable-detr",
        "-m dn_dab_deformable_detr --batch_size 2 --epochs 50 --lr_drop 40 --use_dn "
        "--transformer_activation relu --output_dir logs/R50 --coco_path data",
    ),
    "dino-r50-4scale": (
        "dino",
        "--output_dir logs/R50 -c config/DINO/DINO_4scale.py --coco_path data --options "
        "dn_scalar=100 embed_init_tgt=TRUE dn_label_coef=1.0 dn_bbox_coef=1.0 use_ema=False",
    ),
    "deta-r50": (
        "deta",
        "--with_box_refine --two_stage --num_feature_levels 5 --num_queries 900 "
        "--dim_feedforward 2048 --dropout 0.0 --cls_loss_coef 1.0 --assign_first_stage "
        "--assign_second_stage --epochs 12 --lr_drop 10",
    ),
}


@pytest.mark.parametrize("preset", RECIPES)
def test_published_script_is_our_preset(preset):
    implementation, script = RECIPES[preset]
    config = config_from_published_args(script.split(), implementation=implementation)
    expected = PRESETS[preset].config
    assert config.assignment == expected.assignment
    assert config.loss == expected.loss
    assert config.optimizer == expected.optimizer
    assert config.train == expected.train
    assert config.eval == expected.eval
    assert config.seed == expected.seed
    # A preset reads the number of classes from the data, the published code fixes COCO's.
    assert config.model == replace(expected.model, num_classes=91)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_case_builds_its_configuration(name):
    case = GOLDEN_MODELS[name]
    config = config_from_published_args(
        case["flags"], implementation=case["implementation"], overrides=case["overrides"]
    )
    weights = case["weights"]
    loss = config.loss
    assert (loss.class_weight, loss.bbox_weight, loss.giou_weight) == (
        weights["loss_ce"],
        weights["loss_bbox"],
        weights["loss_giou"],
    )
    assert (config.model.one_to_many != "none") == ("loss_ce_o2m" in weights)
    assert (config.model.extra_queries == "hybrid") == ("loss_ce_one2many" in weights)
    of_encoder = "interm" if case["implementation"] == "dino" else "enc"
    assert config.model.two_stage == (f"loss_ce_{of_encoder}" in weights)
    if config.model.two_stage:
        assert loss.encoder_class_weight == weights[f"loss_ce_{of_encoder}"]
        assert loss.encoder_bbox_weight == weights[f"loss_bbox_{of_encoder}"]
        assert loss.encoder_giou_weight == weights[f"loss_giou_{of_encoder}"]
    denoising = {"none": None, "dn": "tgt_loss_{}", "contrastive": "loss_{}_dn"}
    name = denoising[config.model.denoising]
    assert (name is not None) == ("tgt_loss_ce" in weights or "loss_ce_dn" in weights)
    if name is not None:
        assert loss.denoising_class_weight == weights[name.format("ce")]
        assert loss.denoising_bbox_weight == weights[name.format("bbox")]
        assert loss.denoising_giou_weight == weights[name.format("giou")]
    if config.model.one_to_many != "none":
        assert loss.one_to_many_class_weight == weights["loss_ce_o2m"]
        assert loss.one_to_many_bbox_weight == weights["loss_bbox_o2m"]
        assert loss.one_to_many_giou_weight == weights["loss_giou_o2m"]
    if config.model.extra_queries == "hybrid":
        factor = float(case["flags"][case["flags"].index("--lambda_one2many") + 1])
        assert loss.hybrid_class_weight == factor * weights["loss_ce_one2many"]
        assert loss.hybrid_bbox_weight == factor * weights["loss_bbox_one2many"]
        assert loss.hybrid_giou_weight == factor * weights["loss_giou_one2many"]
    for override, field in (
        ("topk_eval", config.eval.max_detections),
        ("num_select", config.eval.max_detections),
        ("nms_iou_threshold", config.eval.nms_iou_threshold),
    ):
        if override in case["overrides"]:
            assert field == case["overrides"][override]


@pytest.mark.parametrize("implementation", DEFORMABLE)
def test_every_combination_of_model_flags_builds(implementation):
    names = [name for name in MODEL_FLAGS if name in PUBLISHED_FLAGS[implementation]]
    for chosen in itertools.product((False, True), repeat=len(names)):
        given = dict(zip(names, chosen, strict=True))
        flags = [f"--{name}" for name, value in given.items() if value]
        model = config_from_published_args(flags, implementation=implementation).model
        one_to_many = given.get("use_ms_detr", False)
        internal = one_to_many and implementation == "ms-detr"
        assert model.box_refine == given["with_box_refine"]
        assert model.two_stage == given["two_stage"]
        assert model.dilation == given["dilation"]
        assert model.decoder_order == ("cross_self" if internal else "self_cross")
        assert (model.one_to_many == "internal") == internal
        assert (model.one_to_many == "output") == (one_to_many and not internal)
        assert model.one_to_many_ffn == (internal and given["use_aux_ffn"])
        mixed = given.get("mixed_selection", False) and given["two_stage"]
        twice = given.get("look_forward_twice", False) and given["with_box_refine"]
        assert (model.mixed_selection, model.look_forward_twice) == (mixed, twice)


# Accepted values other than the default, where the type does not suggest one.
OTHER_VALUES = {
    "position_embedding": "learned",
    "backbone": "resnet101",
    "dataset_file": "voc",
    "num_feature_levels": 3,
    "hidden_dim": 128,
    "nheads": 4,
    "device": "cpu",
    "lr_backbone": 0.0,
    "nms_iou_threshold": 0.7,
    "lr_drop_epochs": [3],
    "dn_number": 12,
    "param_dict_type": "ddetr_in_mmdet",
    "data_aug_scales": [480, 640],
    "data_aug_scales2_resize": [300],
    "data_aug_scales2_crop": [200, 300],
    "data_aug_scale_overlap": 1.5,
    "dec_layer_number": [900] * 6,
    "local_rank": 1,
    "dn_scalar": 100,
    "dn_label_coef": 1.0,
    "dn_bbox_coef": 1.0,
}
REFUSED = {"masks", "frozen_weights", "lr_backbone_names", "lr_linear_proj_names", "fix_size"}
REFUSED_OF: dict[Implementation, set[str]] = {
    "dn-dab-deformable-detr": {"modelname", "contrastive", "two_stage", "num_patterns"},
    "dino": {
        *("modelname", "return_interm_indices", "pre_norm", "transformer_activation"),
        *("use_deformable_box_attn", "add_channel_attention", "decoder_sa_type"),
        *("decoder_module_seq", "query_dim", "dec_layer_number", "decoder_layer_noise"),
        *("two_stage_type", "two_stage_pat_embed", "two_stage_add_query_num"),
        *("two_stage_learn_wh", "two_stage_keep_all_tokens", "embed_init_tgt"),
        *("dec_pred_bbox_embed_share", "dec_pred_class_embed_share"),
        *("two_stage_bbox_embed_share", "two_stage_class_embed_share"),
        *("matcher_type", "focal_alpha", "nms_iou_threshold", "onecyclelr", "multi_step_lr"),
        *("pe_temperatureH", "pe_temperatureW", "ema_epoch", "strong_aug"),
    },
}
NEEDS = {
    "use_aux_ffn": {"use_ms_detr": True},
    "mixed_selection": {"two_stage": True},
    "look_forward_twice": {"with_box_refine": True},
    "k_one2many": {"num_queries_one2many": 3},
    "lambda_one2many": {"num_queries_one2many": 3},
    "assign_first_stage": {"two_stage": True},
    "assign_second_stage": {"two_stage": True},
    "lr_backbone_names": {"param_dict_type": "ddetr_in_mmdet"},
    "lr_linear_proj_names": {"param_dict_type": "ddetr_in_mmdet"},
    "lr_linear_proj_mult": {"param_dict_type": "ddetr_in_mmdet"},
    "ema_decay": {"use_ema": True},
    "ema_epoch": {"use_ema": True},
}
ALWAYS: dict[Implementation, dict[str, object]] = {"dn-dab-deformable-detr": {"use_dn": True}}
"""Values without which nothing is converted: tested below."""


def other_value(name, flag):
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if flag.type is bool:
        return not flag.default
    if flag.type is str:
        return ["elsewhere"] if flag.many else "elsewhere"
    if flag.many:
        return [value + 1 for value in flag.default]
    return flag.default + 1 if flag.type is int else flag.default / 2 or 0.125


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        (owner, name)
        for owner, flags in PUBLISHED_FLAGS.items()
        for name in flags
        if name not in ALWAYS.get(owner, {})
    ],
)
def test_every_flag_is_mapped_refused_or_ignored_for_a_reason(implementation, name):
    flags = PUBLISHED_FLAGS[implementation]
    needs = {key: value for key, value in NEEDS.get(name, {}).items() if key in flags}
    base = ALWAYS.get(implementation, {}) | needs

    def build(overrides):
        return config_from_published_args(
            [], implementation=implementation, overrides=base | overrides
        )

    changed = {name: other_value(name, flags[name])}
    if name in REFUSED | REFUSED_OF.get(implementation, set()):
        with pytest.raises(ValueError, match=name):
            build(changed)
    elif name in IGNORED_FLAGS | IGNORED_FLAGS_OF.get(implementation, {}) or name in DEAD_FLAGS:
        assert build(changed) == build({})
    else:
        assert build(changed) != build({})


def test_flag_list_and_namespace_agree():
    flags = ["--two_stage", "--lr", "1e-4", "--no_aux_loss", "--lr_drop_epochs", "3", "5"]
    namespace = Namespace(two_stage=True, lr=1e-4, aux_loss=False, use_aux_ffn=False)
    assert config_from_published_args(flags) == config_from_published_args(namespace)


def test_values_reach_their_fields():
    flags = (
        "--num_queries 7 --enc_layers 2 --dec_layers 3 --enc_n_points 5 --dec_n_points 1 "
        "--nheads 4 --hidden_dim 64 --dim_feedforward 96 --num_feature_levels 5 --seed 3 "
        "--set_cost_class 1 --set_cost_bbox 3 --set_cost_giou 4 --lr_linear_proj_mult 0.5 "
        "--clip_max_norm -1 --sgd --coco_path /data --resume old.pth --backbone resnet101"
    )
    config = config_from_published_args(flags.split())
    model = config.model
    assert (model.num_queries, model.num_encoder_layers, model.num_decoder_layers) == (7, 2, 3)
    assert (model.num_encoder_points, model.num_decoder_points) == (5, 1)
    assert (model.num_heads, model.hidden_dim, model.feedforward_dim) == (4, 64, 96)
    assert (model.num_levels, model.backbone) == (5, "resnet101")
    assert config.assignment == AssignmentConfig(cost_class=1.0, cost_bbox=3.0, cost_giou=4.0)
    assert config.optimizer.reference_lr_factor == 0.5
    assert config.optimizer.clip_grad_norm == 0.0
    assert config.optimizer.name == "sgd"
    assert (config.data.root, config.weights) == (Path("/data"), Path("old.pth"))
    assert (config.seed, config.output) == (3, RunConfig().output)


def h_detr(*flags):
    return config_from_published_args(flags, implementation="h-deformable-detr")


def test_hybrid_queries():
    flags = (
        "--num_queries_one2one 7 --num_queries_one2many 9 --k_one2many 3 --lambda_one2many 0.5 "
        "--cls_loss_coef 1 --topk 20 --with_box_refine --look_forward_twice --use_checkpoint"
    )
    config = h_detr(*flags.split())
    model, loss = config.model, config.loss
    assert (model.num_queries, model.extra_queries, model.num_hybrid_queries) == (7, "hybrid", 9)
    assert (model.decoder_order, model.one_to_many) == ("self_cross", "none")
    assert (model.feedforward_dim, model.look_forward_twice) == (2048, True)
    assert config.assignment.hybrid_k == 3
    assert (loss.hybrid_class_weight, loss.hybrid_bbox_weight, loss.hybrid_giou_weight) == (
        *(0.5, 2.5, 1.0),
    )
    assert config.eval.max_detections == 20
    assert config.train.activation_checkpointing == "all"
    assert config.train.batch_size == 16
    # All of it is stored in a checkpoint.
    namespace = Namespace(num_queries_one2one=7, num_queries_one2many=9, k_one2many=3)
    loaded = config_from_published_args(namespace)
    assert loaded.model.num_hybrid_queries == 9
    assert loaded.assignment.hybrid_k == 3


def test_without_hybrid_queries_their_options_are_moot():
    expected = h_detr()
    assert expected.model.extra_queries == "none"
    assert h_detr("--k_one2many", "0", "--lambda_one2many", "3") == expected
    baseline = h_detr("--dim_feedforward", "1024")
    deformable = config_from_published_args(["--lr", "2e-4"], implementation="deformable-detr")
    assert (baseline.model, baseline.loss) == (deformable.model, deformable.loss)


def test_no_copies_of_the_targets_is_no_loss_of_the_hybrid_queries(caplog):
    with caplog.at_level(logging.WARNING, logger="msdetr.published"):
        config = h_detr("--num_queries_one2many", "9", "--k_one2many", "0")
    assert "the 9 extra queries get no loss" in caplog.text
    assert config.model.num_hybrid_queries == 9
    loss = config.loss
    weights = (loss.hybrid_class_weight, loss.hybrid_bbox_weight, loss.hybrid_giou_weight)
    assert weights == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--use_fp16", "train.precision bfloat16"), ("--eval_in_training_set", "data.val_images")],
)
def test_flags_of_h_detr_that_change_or_go_are_reported(flag, words, caplog):
    with caplog.at_level(logging.WARNING, logger="msdetr.published"):
        config = h_detr(flag)
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert (config.train.precision == "bfloat16") == (flag == "--use_fp16")


def test_frozen_backbone():
    config = config_from_published_args(["--lr_backbone", "-1"])
    assert not config.model.train_backbone
    assert config.optimizer.backbone_lr == 0.0


@pytest.mark.parametrize("implementation", ["deformable-detr", "h-deformable-detr"])
def test_encoder_follows_the_main_weights(implementation):
    flags = ["--two_stage", "--with_box_refine", "--cls_loss_coef", "3", "--set_cost_class", "4"]
    config = config_from_published_args(flags, implementation=implementation)
    assert config.loss.encoder_class_weight == 3.0
    assert config.assignment.encoder_match == "predictions"
    assert config.assignment.encoder_cost_class == 4.0
    silent = config_from_published_args(
        [*flags, "--no_aux_loss"], implementation=implementation
    ).loss
    assert not silent.auxiliary
    assert silent.encoder_class_weight == silent.encoder_bbox_weight == 0.0
    assert silent.encoder_giou_weight == 0.0


def dn_detr(*flags):
    return config_from_published_args(["--use_dn", *flags], implementation="dn-dab-deformable-detr")


def test_denoising_of_dn_detr():
    config = dn_detr(
        *("--scalar", "7", "--label_noise_scale", "0.5", "--box_noise_scale", "0.3"),
        *("--cls_loss_coef", "3", "--num_select", "20", "--no_aux_loss"),
    )
    model, loss = config.model, config.loss
    assert (model.denoising, model.denoising_groups) == ("dn", 7)
    assert (model.denoising_label_noise, model.denoising_box_noise) == (0.5, 0.3)
    assert (loss.class_weight, loss.denoising_class_weight) == (3.0, 3.0)
    assert not loss.auxiliary
    assert config.eval.max_detections == 100  # --num_select is for its other models
    assert config.data.root is None


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-m", "dn_dab_detr"], "modelname dn_dab_detr: only dn_dab_deformable_detr"),
        (["--contrastive"], "contrastive True: the published model fails"),
        (["--two_stage"], "two_stage True"),
        (["--num_patterns", "3"], "num_patterns 3"),
        (["--scalar", "0"], "scalar 0"),
        (["--pretrain_model_path", "https://x.org/a.pth"], "pretrain_model_path .*download"),
    ],
)
def test_options_of_dn_detr_that_cannot_work_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        dn_detr(*flags)


def test_dn_detr_needs_denoising():
    with pytest.raises(ValueError, match="use_dn False: the published model fails without it"):
        config_from_published_args([], implementation="dn-dab-deformable-detr")


def dino(**keys):
    return config_from_published_args([], implementation="dino", overrides=keys)


@pytest.mark.parametrize(
    ("number", "queries", "groups"),
    [(100, 100, None), (50, 50, None), (49, 100, 98), (1, 100, 2)],
)
def test_denoising_of_dino(number, queries, groups):
    model = dino(dn_number=number, dn_label_noise_ratio=0.25, dn_box_noise_scale=1.0).model
    assert model.denoising == "contrastive"
    assert (model.denoising_queries, model.denoising_groups) == (queries, groups)
    assert (model.denoising_label_noise, model.denoising_box_noise) == (0.125, 1.0)
    assert model.denoising_label_rows is None
    assert dino(dn_labelbook_size=95).model.denoising_label_rows == 96


def test_dino_without_denoising():
    assert dino(use_dn=False, dn_number=0) == dino(use_dn=False)
    assert dino(use_dn=False).model == replace(dino().model, denoising="none")
    with pytest.raises(ValueError, match="dn_number 0: set use_dn False"):
        dino(dn_number=0)


@pytest.mark.parametrize(
    ("decoder", "encoder", "expected"),
    [
        ((True, True), (False, False), "decoder"),
        ((True, True), (True, True), "all"),
        ((False, False), (False, False), "none"),
        ((True, False), (False, False), None),
        ((True, True), (True, False), None),
        ((False, False), (True, True), None),
    ],
)
def test_heads_of_dino(decoder, encoder, expected):
    keys = dict(
        zip(("dec_pred_bbox_embed_share", "dec_pred_class_embed_share"), decoder, strict=True)
    )
    keys |= dict(
        zip(("two_stage_bbox_embed_share", "two_stage_class_embed_share"), encoder, strict=True)
    )
    if expected is None:
        with pytest.raises(ValueError, match="class and box heads are shared alike"):
            dino(**keys)
    else:
        assert dino(**keys).model.head_sharing == expected


def test_loss_average_and_data_of_dino():
    config = dino(
        interm_loss_coef=0.5,
        bbox_loss_coef=4.0,
        use_ema=True,
        ema_decay=0.99,
        use_detached_boxes_dec_out=True,
        data_aug_scale_overlap=0.5,
        param_dict_type="ddetr_in_mmdet",
        num_classes=20,
        num_select=70,
    )
    loss = config.loss
    assert (loss.encoder_class_weight, loss.encoder_bbox_weight) == (0.5, 2.0)
    assert loss.encoder_giou_weight == 1.0
    assert (config.train.ema_decay, config.train.ema_warmup_steps) == (0.99, 0)
    assert not config.model.look_forward_twice
    assert (config.data.train_sizes[0], config.data.train_sizes[-1]) == (240, 400)
    assert (config.data.test_size, config.data.max_size) == (400, 666)
    assert config.data.crop_resize_sizes == (200, 250, 300)
    assert (config.data.crop_min_size, config.data.crop_max_size) == (192, 300)
    assert config.optimizer.reference_lr_factor == 0.1
    assert (config.model.num_classes, config.eval.max_detections) == (20, 70)
    boxless = dino(no_interm_box_loss=True).loss
    assert (boxless.encoder_class_weight, boxless.encoder_bbox_weight) == (1.0, 0.0)
    assert boxless.encoder_giou_weight == 0.0


def test_keys_of_dino_from_a_mapping_a_file_and_options():
    expected = dino(num_queries=30, lr=2e-4, data_aug_scales=[480, 512])
    keys = {"num_queries": 30, "lr": 2e-4, "data_aug_scales": [480, 512], "dn_number": 100}
    assert config_from_published_args(keys) == expected
    options = ["num_queries=30", "lr=2e-4", "data_aug_scales=480,512", "frozen_weights=None"]
    flags = ["--config_file", "config/DINO/DINO_4scale.py", "--options", *options]
    assert config_from_published_args(flags, implementation="dino") == expected
    # A Namespace holds the keys of its file, whatever its name.
    stored = Namespace(**keys, config_file="mine.py", options={"lr": 2e-4}, local_rank=0)
    assert config_from_published_args(stored) == expected


def test_options_of_dino_come_before_its_file():
    four_scales = ["num_feature_levels=4", "return_interm_indices=1,2,3"]
    flags = ["-c", "config/DINO/DINO_5scale.py", "--options", *four_scales]
    converted = config_from_published_args(flags, implementation="dino")
    assert converted == dino(batch_size=1)
    assert converted != dino()


@pytest.mark.parametrize("use_dn", [False, True])
def test_rows_of_dino_s_label_embedding(use_dn):
    model = dino(use_dn=use_dn, num_classes=20, dn_labelbook_size=30).model
    assert model.denoising_label_rows == 31
    assert dino(use_dn=use_dn).model.denoising_label_rows is None


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-c", "DINO_4scale_swin.py"], "backbone swin_L_384_22k: .* no Swin"),
        (["-c", "DINO_4scale_convnext.py"], "backbone convnext_xlarge_22k: .* no ConvNeXt"),
        (["-c", "DINO_5scale.py"], r"return_interm_indices \[0, 1, 2, 3\]: levels start"),
        (["-c", "mine.py"], "config_file mine.py: known are DINO_4scale.py.* mapping"),
        (["--lr", "1e-4"], "keys of the configuration file, not flags: lr"),
        (["--scalar", "5"], r"scalar \(a flag of dn-dab-deformable-detr\)"),
        (["--options", "lr"], "option 'lr' is not KEY=VALUE"),
        (["--options", "colour=3"], "not arguments of the published dino: colour"),
        (["--options", "dn_number=many"], "dn_number: expected int"),
        (["--options", "lr_drop_list=1,x"], "lr_drop_list: expected int"),
        (["--options", "param_dict_type=large_wd"], "param_dict_type large_wd"),
        (["--options", "num_feature_levels=2"], "num_feature_levels 2"),
    ],
)
def test_options_of_dino_that_cannot_work_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        config_from_published_args(flags, implementation="dino")


@pytest.mark.parametrize(
    ("implementation", "keys", "words"),
    [
        ("dino", {"amp": True}, "train.precision bfloat16"),
        ("dino", {"position_embedding": "learned"}, "lr_backbone"),
        ("dino", {"finetune_ignore": ["class_embed"]}, "finetune_ignore: dropped"),
        ("dn-dab-deformable-detr", {"use_dn": True, "amp": True}, "train.precision bfloat16"),
        ("dn-dab-deformable-detr", {"use_dn": True, "random_refpoints_xy": True}, "anchors only"),
        ("deta", {"finetune": "a.pth"}, "class heads"),
        ("deta", {"assign_first_stage": True}, "no effect without two_stage"),
    ],
)
def test_options_of_later_detectors_that_change_or_go_are_reported(
    implementation, keys, words, caplog
):
    with caplog.at_level(logging.WARNING, logger="msdetr.published"):
        config = config_from_published_args(keys, implementation=implementation)
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert (config.train.precision == "bfloat16") == ("amp" in keys)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_stages_of_deta(first, second):
    values = {"two_stage": True, "assign_first_stage": first, "assign_second_stage": second}
    config = config_from_published_args(values)
    assert config.model.proposal_content
    assert config.model.proposal_nms_iou_threshold == (0.9 if first else None)
    matches = (config.assignment.encoder_match, config.assignment.decoder_match)
    assert matches == ("iou" if first else "predictions", "iou" if second else "hungarian")
    assert config.eval.nms_iou_threshold == (0.7 if second else None)


def test_options_of_deta():
    config = config_from_published_args({"bigger": True, "finetune": "start.pth"})
    assert not config.model.proposal_content  # without proposals
    assert (config.data.train_sizes[0], config.data.train_sizes[-1]) == (720, 1200)
    assert (config.data.test_size, config.data.max_size) == (1200, 2000)
    assert config.weights == Path("start.pth")
    resumed = config_from_published_args({"finetune": "start.pth", "resume": "last.pth"})
    assert resumed.weights == Path("last.pth")
    with pytest.raises(ValueError, match=r"assign_second_stage: .*needs two_stage"):
        config_from_published_args({"assign_second_stage": True})


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("mixed_selection", "ms-detr"),
        ("use_aux_ffn", "ms-detr"),
        ("use_ms_detr", "ms-detr-impl-a"),
        ("two_stage", "deformable-detr"),
        ("num_queries_one2one", "h-deformable-detr"),
        ("use_wandb", "h-deformable-detr"),
        ("use_mqs", "dn-dab-deformable-detr"),
        ("dn_number", "dino"),
        ("config_file", "dino"),
        ("bigger", "deta"),
        # Set at run time by all of them, and an option of DN-DETR.
        ("override_resumed_lr_drop", "deformable-detr"),
    ],
)
def test_implementation_is_told_by_its_own_flags(attribute, expected):
    assert infer_implementation(Namespace(lr=1e-4, **{attribute: False})) == expected


@pytest.mark.parametrize("implementation", PUBLISHED_FLAGS)
def test_implementation_is_told_by_all_stored_arguments(implementation):
    flags = PUBLISHED_FLAGS[implementation]
    values = {name: flag.default for name, flag in flags.items()}
    stored = Namespace(**values | {"local_rank": 0, "override_resumed_lr_drop": True})
    assert infer_implementation(stored) == implementation


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"world_size": 4, "distributed": True}, 12),
        ({"distributed": False}, 3),
        ({}, 48),
    ],
)
def test_batch_size_counts_all_processes(attributes, expected):
    namespace = Namespace(batch_size=3, **attributes)
    assert config_from_published_args(namespace).train.batch_size == expected


def test_runtime_attributes_of_a_namespace_are_accepted():
    namespace = Namespace(
        rank=0, gpu=0, dist_url="env://", dist_backend="nccl", override_resumed_lr_drop=True
    )
    assert config_from_published_args(namespace).model.num_classes == 91


@pytest.mark.parametrize("value", ["v3", "learned"])
def test_learned_position_embedding(value):
    namespace = Namespace(position_embedding=value)
    assert config_from_published_args(namespace).model.position_embedding == "learned"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--masks"], "masks: segmentation"),
        (["--frozen_weights", "x.pth"], "frozen_weights"),
        (["--dataset_file", "coco_panoptic"], "panoptic"),
        (["--backbone", "resnet152"], "backbone resnet152"),
        (["--backbone", "swin_tiny"], "backbone swin_tiny: .* no Swin"),
        (["--position_embedding", "v9"], "position_embedding v9"),
        (["--lr_backbone_names", "backbone.0", "input_proj"], "lr_backbone_names"),
        (["--resume", "https://example.org/x.pth"], "download"),
        (["--nonsense", "3"], "ms-detr: nonsense$"),
        (["--num_queries", "many"], "num_queries"),
        (["--num_queries"], "num_queries"),
        (["--num_q", "3"], "num_q"),
        (["--hidden_dim", "30"], "hidden_dim"),
        (["--num_feature_levels", "6"], "num_levels"),
    ],
)
def test_unknown_and_unsupported_flags_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        config_from_published_args(flags)


def test_a_flag_of_another_command_line_is_named_as_such():
    with pytest.raises(ValueError, match=r"use_aux_ffn \(a flag of ms-detr\)"):
        config_from_published_args(["--use_aux_ffn"], implementation="ms-detr-impl-a")
    with pytest.raises(ValueError, match=r"num_queries \(a flag of ms-detr, .*deta\)"):
        config_from_published_args(Namespace(num_queries_one2one=300, num_queries=300))
    with pytest.raises(ValueError, match=r"topk \(a flag of h-deformable-detr\)"):
        config_from_published_args(["--topk", "100"])


@pytest.mark.parametrize(
    "overrides",
    [{"two_stage": 1}, {"num_queries": 3.5}, {"lr": "1e-4"}, {"epochs": True}, {"seed": None}],
)
def test_values_of_the_wrong_type_are_refused(overrides):
    (name,) = overrides
    with pytest.raises(ValueError, match=name):
        config_from_published_args([], overrides=overrides)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--mixed_selection", "dropped"),
        ("--look_forward_twice", "dropped"),
        ("--use_aux_ffn", "dropped"),
        ("--use_indices_merge", "assignment.indices_merge"),
    ],
)
def test_flags_that_do_something_else_there_are_reported(flag, words, caplog):
    with caplog.at_level(logging.WARNING, logger="msdetr.published"):
        config_from_published_args([flag])
    assert len(caplog.records) == 1
    assert flag.removeprefix("--") in caplog.text
    assert words in caplog.text
