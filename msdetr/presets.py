"""Named recipes. Each is a complete `RunConfig`; the command line overrides single fields."""

from __future__ import annotations

from dataclasses import dataclass, replace

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe, its description, and the result that its authors report."""

    description: str
    """One line for the help text and the README."""
    config: RunConfig
    """The recipe."""
    published_map: float | None = None
    """COCO val2017 mAP that its authors report, in percent; not a result of this code."""


_MS_DETR = RunConfig()

_MS_DETR_PP = replace(
    _MS_DETR,
    model=ModelConfig(dropout=0.0, mixed_selection=True, look_forward_twice=True),
)

_WITHOUT_ONE_TO_MANY = ModelConfig(
    decoder_order="self_cross", one_to_many="none", one_to_many_ffn=False
)
"""The decoder of the detectors besides MS-DETR."""

_DEFORMABLE = RunConfig(
    model=replace(
        _WITHOUT_ONE_TO_MANY,
        feedforward_dim=1024,
        two_stage=False,
        box_refine=False,
    ),
    assignment=AssignmentConfig(encoder_match="predictions", encoder_cost_class=2.0),
    loss=LossConfig(class_weight=2.0),
    optimizer=OptimizerConfig(lr_drop_epoch=40),
    train=TrainConfig(epochs=50, batch_size=32),
)

_DEFORMABLE_PP = replace(
    _MS_DETR_PP,
    model=replace(_WITHOUT_ONE_TO_MANY, dropout=0.0, mixed_selection=True, look_forward_twice=True),
    assignment=_DEFORMABLE.assignment,
    loss=LossConfig(class_weight=2.0),
)


def _with_hybrid_queries(recipe: RunConfig) -> RunConfig:
    """H-DETR's queries, whose sizes and weights are the defaults."""
    return replace(recipe, model=replace(recipe.model, extra_queries="hybrid"))


def _with_groups(recipe: RunConfig) -> RunConfig:
    """Group DETR's queries. The loss of the encoder is that of the proposals that they select."""
    model = replace(recipe.model, extra_queries="group", proposal_score="best_class")
    return replace(recipe, model=model)


def _with_denoising(recipe: RunConfig) -> RunConfig:
    """DN-DETR's queries, in its numbers."""
    return replace(
        recipe,
        model=replace(recipe.model, denoising="dn", denoising_groups=5, denoising_label_noise=0.2),
    )


def _with_contrastive_denoising(recipe: RunConfig) -> RunConfig:
    """DINO's queries, whose numbers are the defaults."""
    return replace(recipe, model=replace(recipe.model, denoising="contrastive"))


_DINO = _with_contrastive_denoising(
    RunConfig(
        model=replace(
            _WITHOUT_ONE_TO_MANY,
            dropout=0.0,
            num_queries=900,
            query_position="box",
            position_temperature=20.0,
            position_offset=1.0,
            proposal_score="best_class",
            mixed_selection=True,
            look_forward_twice=True,
            head_sharing="decoder",
            decoder_norm=True,
            logit_eps=1e-3,
        ),
        assignment=AssignmentConfig(giou_eps=1e-6),
        loss=LossConfig(encoder_class_weight=1.0, giou_eps=1e-6),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, reference_lr_factor=1.0),
        eval=EvalConfig(max_detections=300),
    )
)

_DN = _with_denoising(
    RunConfig(
        model=replace(
            _WITHOUT_ONE_TO_MANY,
            dropout=0.0,
            query_position="box_content",
            two_stage=False,
            logit_eps=1e-3,
        ),
        assignment=AssignmentConfig(giou_eps=1e-6),
        loss=LossConfig(giou_eps=1e-6),
        optimizer=OptimizerConfig(
            lr=1e-4, backbone_lr=1e-5, reference_lr_factor=1.0, lr_drop_epoch=40
        ),
        train=TrainConfig(epochs=50),
    )
)

_DETA = RunConfig(
    model=replace(
        _WITHOUT_ONE_TO_MANY,
        num_levels=5,
        dropout=0.0,
        num_queries=900,
        proposal_nms_iou_threshold=0.9,
        proposal_content=True,
    ),
    assignment=AssignmentConfig(decoder_match="iou", encoder_match="iou"),
    loss=LossConfig(encoder_class_weight=1.0),
    optimizer=OptimizerConfig(lr_drop_epoch=10),
    eval=EvalConfig(nms_iou_threshold=0.7),
)

_TINY = RunConfig(
    model=ModelConfig(
        backbone="convnet",
        backbone_weights="none",
        hidden_dim=128,
        num_levels=3,
        num_encoder_layers=1,
        num_decoder_layers=3,
        feedforward_dim=256,
        dropout=0.0,
        num_queries=40,
        mixed_selection=True,
        look_forward_twice=True,
    ),
    data=DataConfig(
        augmentation="flip",
        train_sizes=(128,),
        test_size=128,
        max_size=256,
        pad_multiple=32,
        num_workers=2,
    ),
    # Few steps from scratch: one high learning rate for all parameters, which falls to 0.
    optimizer=OptimizerConfig(
        lr=7e-4,
        backbone_lr=7e-4,
        reference_lr_factor=1.0,
        schedule="cosine",
        warmup_steps=50,
        clip_grad_norm=1.0,
    ),
    train=TrainConfig(epochs=4, batch_size=8, log_every=50, eval_every=2),
    eval=EvalConfig(batch_size=32),
)

PRESETS: dict[str, Preset] = {
    "ms-detr-r50-300": Preset(
        description="MS-DETR on Deformable-DETR, ResNet-50, 300 queries, 12 epochs",
        config=_MS_DETR,
        published_map=47.6,
    ),
    "ms-detr-pp-r50-300": Preset(
        description="MS-DETR on Deformable-DETR++, ResNet-50, 300 queries, 12 epochs",
        config=_MS_DETR_PP,
        published_map=48.8,
    ),
    "ms-detr-pp-r50-900": Preset(
        description="MS-DETR on Deformable-DETR++, ResNet-50, 900 queries, 12 epochs",
        config=replace(
            _MS_DETR_PP,
            model=replace(_MS_DETR_PP.model, num_queries=900),
            eval=EvalConfig(max_detections=300),
        ),
        published_map=50.0,
    ),
    "ms-detr-a-r50-300": Preset(
        description="MS-DETR implementation (a): one-to-many supervision at the layer outputs",
        config=replace(
            _MS_DETR,
            model=ModelConfig(
                decoder_order="self_cross", one_to_many="output", one_to_many_ffn=False
            ),
        ),
    ),
    "deformable-detr-r50": Preset(
        description="Deformable-DETR, ResNet-50, one stage, 50 epochs",
        config=_DEFORMABLE,
        published_map=44.5,
    ),
    "deformable-detr-r50-refine": Preset(
        description="Deformable-DETR with iterative box refinement, 50 epochs",
        config=replace(_DEFORMABLE, model=replace(_DEFORMABLE.model, box_refine=True)),
        published_map=46.2,
    ),
    "deformable-detr-r50-two-stage": Preset(
        description="Deformable-DETR, two stages with box refinement, 50 epochs",
        config=replace(
            _DEFORMABLE, model=replace(_DEFORMABLE.model, box_refine=True, two_stage=True)
        ),
        published_map=46.9,
    ),
    "deformable-detr-pp-r50-300": Preset(
        description="Deformable-DETR++: two stages, mixed selection, look forward twice, 12 epochs",
        config=_DEFORMABLE_PP,
    ),
    "h-deformable-detr-r50": Preset(
        description="H-DETR: Deformable-DETR++ and 1500 hybrid queries in training, 12 epochs",
        config=_with_hybrid_queries(_DEFORMABLE_PP),
        published_map=48.7,
    ),
    "group-deformable-detr-r50": Preset(
        description="Group DETR on Deformable-DETR++: 11 groups in training; no published number",
        config=_with_groups(_DEFORMABLE_PP),
    ),
    "dn-deformable-detr-r50": Preset(
        description="DN-DETR on DAB-Deformable-DETR, ResNet-50, one stage, 50 epochs",
        config=_DN,
        published_map=49.5,
    ),
    "dino-r50-4scale": Preset(
        description="DINO, ResNet-50, 4 levels, 900 queries, contrastive denoising, 12 epochs",
        config=_DINO,
        published_map=49.0,
    ),
    "deta-r50": Preset(
        description="DETA, ResNet-50, 5 levels, 900 queries, assignment by IoU and NMS, 12 epochs",
        config=_DETA,
        published_map=50.1,
    ),
    "ms-h-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ and 1500 hybrid queries in training, 12 epochs",
        config=_with_hybrid_queries(_MS_DETR_PP),
    ),
    "ms-group-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ in each of 11 groups in training, 12 epochs",
        config=_with_groups(_MS_DETR_PP),
    ),
    "ms-dn-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ and DN-DETR's denoising, 12 epochs",
        config=_with_denoising(_MS_DETR_PP),
    ),
    "ms-cdn-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ and DINO's contrastive denoising, 12 epochs",
        config=_with_contrastive_denoising(_MS_DETR_PP),
    ),
    "tiny": Preset(
        description="a small MS-DETR for 128-pixel images, trains on a CPU in minutes",
        config=_TINY,
    ),
}
