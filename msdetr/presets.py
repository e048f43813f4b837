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

_DEFORMABLE = RunConfig(
    model=ModelConfig(
        feedforward_dim=1024,
        decoder_order="self_cross",
        one_to_many="none",
        one_to_many_ffn=False,
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
    model=replace(
        _MS_DETR_PP.model, decoder_order="self_cross", one_to_many="none", one_to_many_ffn=False
    ),
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
    "ms-h-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ and 1500 hybrid queries in training, 12 epochs",
        config=_with_hybrid_queries(_MS_DETR_PP),
    ),
    "ms-group-deformable-detr-r50": Preset(
        description="MS-DETR on Deformable-DETR++ in each of 11 groups in training, 12 epochs",
        config=_with_groups(_MS_DETR_PP),
    ),
    "tiny": Preset(
        description="a small MS-DETR for 128-pixel images, trains on a CPU in minutes",
        config=_TINY,
    ),
}
