"""Configuration classes and presets: documented, immutable, checked, and the same after JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from msdetr.config import (
    AssignmentConfig,
    CompileConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    parsing,
)
from msdetr.model.detector import Detector
from msdetr.presets import PRESETS

CLASSES = (
    ModelConfig,
    AssignmentConfig,
    LossConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    EvalConfig,
    RunConfig,
)
PUBLISHED_MAP = {
    "ms-detr-r50-300": 47.6,
    "ms-detr-pp-r50-300": 48.8,
    "ms-detr-pp-r50-900": 50.0,
    "ms-detr-a-r50-300": None,
    "deformable-detr-r50": 44.5,
    "deformable-detr-r50-refine": 46.2,
    "deformable-detr-r50-two-stage": 46.9,
    "deformable-detr-pp-r50-300": None,
    "h-deformable-detr-r50": 48.7,
    "group-deformable-detr-r50": None,
    "ms-h-deformable-detr-r50": None,
    "ms-group-deformable-detr-r50": None,
    "dn-deformable-detr-r50": 49.5,
    "dino-r50-4scale": 49.0,
    "deta-r50": 50.1,
    "ms-dn-deformable-detr-r50": None,
    "ms-cdn-deformable-detr-r50": None,
    "tiny": None,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_are_documented_keyword_only_and_frozen(cls):
    body = ast.parse(inspect.getsource(cls)).body[0].body
    documented = {
        statement.target.id
        for statement, following in pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    fields = dataclasses.fields(cls)
    assert documented == {field.name for field in fields}
    assert all(field.kw_only for field in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), fields[0].name, None)


def through_json(config):
    return config_from_dict(type(config), json.loads(json.dumps(config_to_dict(config))))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    assert through_json(PRESETS[name].config) == PRESETS[name].config


def test_every_kind_of_value_survives_json():
    config = RunConfig(
        model=ModelConfig(num_classes=7, dropout=0.0, backbone_weights="none"),
        data=DataConfig(root=Path("/data/coco"), train_sizes=(64, 96), target_buckets=(4,)),
        train=TrainConfig(max_steps=3, checkpoint_every=None),
        eval=EvalConfig(nms_iou_threshold=0.7),
        output=Path("some/folder"),
        resume="auto",
    )
    copy = through_json(config)
    assert copy == config
    assert isinstance(copy.data.root, Path)
    assert isinstance(copy.data.train_sizes, tuple)


def test_absent_fields_keep_their_defaults_and_integers_become_floats():
    config = config_from_dict(RunConfig, {"eval": {"nms_iou_threshold": 1}, "seed": 1})
    assert config == RunConfig(eval=EvalConfig(nms_iou_threshold=1.0), seed=1)
    assert isinstance(config.eval.nms_iou_threshold, float)


def test_renamed_fields_are_accepted_with_one_warning(caplog):
    parsing._warn_renamed.cache_clear()
    values = {"one_to_many_cost_box": 0.9, "one_to_many_cost_class": 0.1}
    for _ in range(2):
        config = config_from_dict(RunConfig, {"assignment": values})
        assert config.assignment == AssignmentConfig(
            one_to_many_iou_weight=0.9, one_to_many_class_score_weight=0.1
        )
    assert [record.getMessage() for record in caplog.records] == [
        "the field one_to_many_cost_box is now called one_to_many_iou_weight",
        "the field one_to_many_cost_class is now called one_to_many_class_score_weight",
    ]
    with pytest.raises(ValueError, match="former and its present name"):
        config_from_dict(AssignmentConfig, values | {"one_to_many_iou_weight": 0.9})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "RunConfig has no field modle"),
        ({"model": {"width": 3, "depth": 1}}, "ModelConfig has no field depth, width"),
        ({"model": {"num_levels": 9}}, "num_levels must be 1 to 5, got 9"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "num_queries", "many"),
        ("model", "two_stage", "yes"),
        ("optimizer", "lr", "fast"),
        ("data", "train_sizes", 5),
        ("train", "epochs", 1.5),
    ],
)
def test_from_dict_refuses_values_of_another_type(section, field, value):
    with pytest.raises(ValueError, match=field):
        config_from_dict(RunConfig, {section: {field: value}})


CHOICES = [
    pytest.param(cls, field.name, id=f"{cls.__name__}.{field.name}")
    for cls in CLASSES
    for field in dataclasses.fields(cls)
    if "Literal" in str(field.type)
]


@pytest.mark.parametrize(("cls", "field"), CHOICES)
def test_values_outside_a_field_s_choices_are_refused(cls, field):
    with pytest.raises(ValueError, match=field):
        cls(**{field: "no such choice"})


REFUSED = [
    *[
        (ModelConfig, {name: 0}, f"{name} must be at least 1 and finite, got 0")
        for name in (
            "hidden_dim",
            "num_heads",
            "num_encoder_points",
            "num_decoder_points",
            "num_decoder_layers",
            "feedforward_dim",
            "num_queries",
            "num_hybrid_queries",
            "num_groups",
            "num_classes",
            "denoising_queries",
            "denoising_groups",
            "denoising_label_rows",
        )
    ],
    (ModelConfig, {"num_encoder_layers": -1}, "num_encoder_layers must be at least"),
    (ModelConfig, {"num_levels": 0}, "num_levels must be 1 to 5"),
    (ModelConfig, {"num_levels": 6}, "num_levels must be 1 to 5"),
    (ModelConfig, {"num_heads": 7}, r"hidden_dim \(256\) must be divisible by num_heads \(7\)"),
    (ModelConfig, {"hidden_dim": 30, "num_heads": 5}, "divisible by 4"),
    (ModelConfig, {"dropout": 1.0}, "dropout must be in"),
    (ModelConfig, {"dropout": -0.1}, "dropout must be in"),
    (ModelConfig, {"dropout": float("nan")}, "dropout must be in"),
    (ModelConfig, {"mixed_selection": True, "two_stage": False}, "needs two_stage"),
    (ModelConfig, {"proposal_score": "best_class", "two_stage": False}, "needs two_stage"),
    (
        ModelConfig,
        {"extra_queries": "group", "two_stage": True},
        "extra_queries=.group. with two_stage needs proposal_score=.best_class.",
    ),
    (ModelConfig, {"look_forward_twice": True, "box_refine": False}, "needs box_refine"),
    (ModelConfig, {"one_to_many": "output"}, "one_to_many_ffn belongs to"),
    (ModelConfig, {"one_to_many": "none"}, "one_to_many_ffn belongs to"),
    (ModelConfig, {"backbone": "convnet", "dilation": True}, "dilation is for the ResNet"),
    *[
        (ModelConfig, {name: -0.1}, f"{name} must be at least 0 and finite")
        for name in ("denoising_box_noise", "position_offset")
    ],
    *[
        (ModelConfig, {name: value}, f"{name} must be in")
        for name in ("denoising_label_noise", "proposal_nms_iou_threshold")
        for value in (-0.1, 1.1)
    ],
    *[
        (ModelConfig, {"position_temperature": value}, "position_temperature must be positive")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ],
    *[
        (ModelConfig, {"logit_eps": value}, r"logit_eps must be in \(0, 0.5\)")
        for value in (0.0, 0.5, float("nan"))
    ],
    (ModelConfig, {"proposal_content": True, "two_stage": False}, "needs two_stage"),
    (ModelConfig, {"proposal_nms_iou_threshold": 0.9, "two_stage": False}, "needs two_stage and"),
    (
        ModelConfig,
        {"proposal_nms_iou_threshold": 0.9, "proposal_score": "best_class"},
        "proposal_score='first_class'",
    ),
    *[
        (
            ModelConfig,
            {"proposal_nms_iou_threshold": 0.9, "extra_queries": extra, "two_stage": True},
            message,
        )
        for extra, message in (("hybrid", "for one set of queries"), ("group", "extra_queries"))
    ],
    *[
        (ModelConfig, {"query_position": value}, "with two_stage needs mixed_selection")
        for value in ("box", "box_content")
    ],
    (
        ModelConfig,
        {"query_position": "box_content", "two_stage": False, "num_decoder_layers": 1},
        "needs num_decoder_layers of at least 2, got 1",
    ),
    *[
        (
            ModelConfig,
            {"denoising": value, "two_stage": False},
            f"denoising='{value}' makes queries of boxes: it needs two_stage, or query_position",
        )
        for value in ("dn", "contrastive")
    ],
    *[
        (AssignmentConfig, {name: 0}, f"{name} must be at least 1")
        for name in ("iou_k", "encoder_max_positives")
    ],
    *[
        (AssignmentConfig, {name: 1.5}, f"{name} must be in")
        for name in ("iou_threshold", "encoder_iou_threshold")
    ],
    *[
        (cls, {"giou_eps": -1e-6}, "giou_eps must be at least 0")
        for cls in (AssignmentConfig, LossConfig)
    ],
    *[
        (LossConfig, {f"denoising_{term}_weight": -1.0}, f"denoising_{term}_weight must be at")
        for term in ("class", "bbox", "giou")
    ],
    (
        AssignmentConfig,
        {"indices_merge": True, "decoder_match": "iou"},
        "indices_merge adds one-to-one pairs",
    ),
    (AssignmentConfig, {"hybrid_k": 0}, "hybrid_k must be at least 1"),
    (AssignmentConfig, {"one_to_many_k": 0}, "one_to_many_k must be at least 1"),
    (AssignmentConfig, {"positive_fraction": 1.5}, "positive_fraction must be in"),
    (AssignmentConfig, {"positive_fraction": -0.1}, "positive_fraction must be in"),
    *[
        (AssignmentConfig, {name: -1.0}, f"{name} must be at least 0 and finite")
        for name in ("cost_class", "cost_bbox", "cost_giou", "encoder_cost_class")
    ],
    (AssignmentConfig, {"cost_bbox": 0.0, "cost_giou": 0.0}, "boxes would not matter"),
    (LossConfig, {"focal_alpha": 1.1}, "focal_alpha must be in"),
    (LossConfig, {"focal_alpha": -0.1}, "focal_alpha must be in"),
    *[
        (DataConfig, {name: 0}, f"{name} must be at least 1")
        for name in ("crop_min_size", "crop_max_size", "test_size", "max_size", "pad_multiple")
    ],
    *[
        (DataConfig, {name: value}, f"{name} must be positive numbers, at least one")
        for name in ("train_sizes", "crop_resize_sizes", "target_buckets")
        for value in ((), (0, 8))
    ],
    (DataConfig, {"target_buckets": (8, 8)}, "target_buckets must ascend"),
    (DataConfig, {"target_buckets": (16, 8)}, "target_buckets must ascend"),
    (DataConfig, {"crop_min_size": 700}, r"crop_min_size \(700\) exceeds crop_max_size \(600\)"),
    (DataConfig, {"num_workers": -1}, "num_workers must be at least 0"),
    (
        DataConfig,
        {"num_image_buckets": -1},
        "num_image_buckets must be at least 0 and finite, got -1",
    ),
    (DataConfig, {"cache": "disk"}, "cache must be"),
    *[
        (OptimizerConfig, {name: -1.0}, f"{name} must be at least 0 and finite, got -1.0")
        for name in ("lr", "backbone_lr", "weight_decay", "clip_grad_norm", "reference_lr_factor")
    ],
    (OptimizerConfig, {"lr_drop_epoch": 0}, "lr_drop_epoch must be at least 1"),
    (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps must be at least 0"),
    (TrainConfig, {"accumulation_steps": 0}, "accumulation_steps must be at least 1"),
    (TrainConfig, {"accumulation_steps": 3}, r"batch_size \(16\).*accumulation_steps \(3\)"),
    *[
        (TrainConfig, {"ema_decay": decay}, r"ema_decay must be in \(0, 1\)")
        for decay in (0.0, 1.0, -0.1, float("nan"))
    ],
    (TrainConfig, {"ema_warmup_steps": -1}, "ema_warmup_steps must be at least 0"),
    (
        RunConfig,
        {
            "compile": CompileConfig(cuda_graphs=True),
            "train": TrainConfig(activation_checkpointing="encoder"),
        },
        r"needs model\.dropout 0",
    ),
    (
        RunConfig,
        {"parallel": "fsdp", "optimizer": OptimizerConfig(name="sgd")},
        "needs optimizer.name adamw",
    ),
    *[
        (TrainConfig, {name: 0}, f"{name} must be at least 1")
        for name in (
            "epochs",
            "batch_size",
            "log_every",
            "keep_checkpoints",
            "max_steps",
            "checkpoint_every",
        )
    ],
    (TrainConfig, {"eval_every": -1}, "eval_every must be at least 0"),
    (EvalConfig, {"batch_size": 0}, "batch_size must be at least 1"),
    (EvalConfig, {"max_detections": 0}, "max_detections must be at least 1"),
    (EvalConfig, {"nms_iou_threshold": 1.2}, "nms_iou_threshold must be in"),
    (EvalConfig, {"nms_iou_threshold": -0.2}, "nms_iou_threshold must be in"),
    (RunConfig, {"resume": "auto", "weights": Path("w")}, "give one of them"),
    (
        RunConfig,
        {
            "model": PRESETS["deformable-detr-r50"].config.model,
            "assignment": AssignmentConfig(decoder_match="iou"),
        },
        "reads the boxes from which queries start: it needs model.two_stage",
    ),
]


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED)
def test_refuses(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (ModelConfig, {"dropout": 0.0, "num_levels": 5, "num_classes": None}),
        (ModelConfig, {"one_to_many": "none", "one_to_many_ffn": False, "two_stage": False}),
        (ModelConfig, {"denoising_box_noise": 0.0, "denoising_label_noise": 1.0}),
        (ModelConfig, {"query_position": "box", "two_stage": False, "denoising": "dn"}),
        (ModelConfig, {"denoising": "contrastive", "denoising_groups": 1}),
        (AssignmentConfig, {"giou_eps": 0.0, "iou_threshold": 0.0, "encoder_iou_threshold": 1.0}),
        (AssignmentConfig, {"positive_fraction": 0.0, "cost_class": 0.0, "cost_giou": 0.0}),
        (OptimizerConfig, {"clip_grad_norm": 0.0, "backbone_lr": 0.0}),
        (DataConfig, {"num_workers": 0, "pad_multiple": 1, "num_image_buckets": 1}),
        (TrainConfig, {"eval_every": 0}),
        (EvalConfig, {"nms_iou_threshold": 0.0}),
    ],
)
def test_values_at_the_bounds_are_accepted(cls, values):
    assert config_to_dict(cls(**values)).items() >= values.items()


def test_presets_are_those_of_the_design():
    assert {name: preset.published_map for name, preset in PRESETS.items()} == PUBLISHED_MAP
    assert all(preset.description for preset in PRESETS.values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    config = dataclasses.replace(PRESETS[name].config.model, num_classes=91)
    with torch.device("meta"):  # shapes only
        detector = Detector(config)
    assert detector.heads.class_embed[0].out_features == 91
    starts_at_points = not config.two_stage and config.query_position == "initial"
    assert (detector.query_selection.reference_points is not None) == starts_at_points


def test_presets_differ_where_the_papers_do():
    ms_detr = PRESETS["ms-detr-r50-300"].config
    assert ms_detr == RunConfig()
    plus = PRESETS["ms-detr-pp-r50-300"].config.model
    assert (plus.mixed_selection, plus.look_forward_twice, plus.dropout) == (True, True, 0.0)
    large = PRESETS["ms-detr-pp-r50-900"].config
    assert (large.model.num_queries, large.eval.max_detections) == (900, 300)
    a = PRESETS["ms-detr-a-r50-300"].config.model
    assert (a.decoder_order, a.one_to_many) == ("self_cross", "output")
    for name, preset in PRESETS.items():
        if name.startswith("deformable"):
            assert preset.config.model.one_to_many == "none"
            assert preset.config.model.decoder_order == "self_cross"
            assert preset.config.assignment.encoder_match == "predictions"


@pytest.mark.parametrize("extra", ["hybrid", "group"])
def test_presets_with_extra_queries_differ_in_them_alone(extra):
    family = {"hybrid": "h", "group": "group"}[extra]
    for prefix, base in (("", "deformable-detr-pp-r50-300"), ("ms-", "ms-detr-pp-r50-300")):
        config = PRESETS[f"{prefix}{family}-deformable-detr-r50"].config
        model, loss = config.model, config.loss
        assert (model.extra_queries, model.num_queries, model.dropout) == (extra, 300, 0.0)
        assert (model.num_hybrid_queries, model.num_groups) == (1500, 11)
        assert config.assignment.hybrid_k == 6
        weights = (loss.hybrid_class_weight, loss.hybrid_bbox_weight, loss.hybrid_giou_weight)
        assert weights == (2.0, 5.0, 2.0)
        assert model.proposal_score == ("best_class" if extra == "group" else "first_class")
        without = dataclasses.replace(model, extra_queries="none", proposal_score="first_class")
        assert dataclasses.replace(config, model=without) == PRESETS[base].config


@pytest.mark.parametrize("denoising", ["dn", "contrastive"])
def test_presets_with_denoising_differ_in_it_alone(denoising):
    family = {"dn": "dn", "contrastive": "cdn"}[denoising]
    config = PRESETS[f"ms-{family}-deformable-detr-r50"].config
    model = config.model
    assert model.denoising == denoising
    assert model.denoising_groups == (5 if denoising == "dn" else None)
    assert model.denoising_label_noise == (0.2 if denoising == "dn" else 0.25)
    assert (model.denoising_queries, model.denoising_box_noise) == (100, 0.4)
    without = dataclasses.replace(
        model, denoising="none", denoising_groups=None, denoising_label_noise=0.25
    )
    base = PRESETS["ms-detr-pp-r50-300"].config
    assert dataclasses.replace(config, model=without) == base


def test_the_readme_lists_the_presets():
    table = (Path(__file__).parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \| (\S+) \|$", table, re.MULTILINE)
    assert rows == [
        (name, str(preset.config.train.epochs), str(preset.published_map or "\N{EN DASH}"))
        for name, preset in PRESETS.items()
    ]
