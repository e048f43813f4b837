"""The configuration classes: frozen dataclasses with one documented field per decision.

`RunConfig` holds all of them. `msdetr.presets` names the recipes. The command line is generated
from these classes, so that every field is an option.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from msdetr.config.checks import check_types, require_at_least, require_fraction


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector's architecture; every variant of the published code is one combination."""

    backbone: Literal["resnet50", "resnet101", "convnet"] = "resnet50"
    """Feature extractor: torchvision's ResNets, or `convnet`, a small network for small images."""
    backbone_weights: str = "IMAGENET1K_V1"
    """Initial ResNet weights: a torchvision weights name, `none`, or the path of a file."""
    train_backbone: bool = True
    """Train ResNet stages 2-4 (stem and stage 1 stay frozen); False freezes the whole backbone."""
    dilation: bool = False
    """Replace the stride of the last ResNet stage by dilation (the published `--dilation`)."""
    num_classes: int | None = None
    """Class logits per query. None takes the number from the annotation file (91 for COCO)."""
    hidden_dim: int = 256
    """Width of tokens and queries; divisible by `num_heads` and by 4."""
    num_heads: int = 8
    """Attention heads."""
    num_levels: int = 4
    """Feature levels: up to 3 are the last backbone stages, 4 and 5 add strided levels."""
    num_encoder_layers: int = 6
    """Encoder layers."""
    num_decoder_layers: int = 6
    """Decoder layers."""
    num_encoder_points: int = 4
    """Sampling points per head and level in the encoder."""
    num_decoder_points: int = 4
    """Sampling points per head and level in the decoder."""
    feedforward_dim: int = 2048
    """Inner width of the feed-forward networks."""
    dropout: float = 0.1
    """Dropout probability in encoder and decoder."""
    num_queries: int = 300
    """Object queries; with `extra_queries='group'`, those of each group."""
    extra_queries: Literal["none", "hybrid", "group"] = "none"
    """Queries that exist in training only: `hybrid` adds a set under one-to-many matching (H-DETR),
    `group` repeats the object queries (Group DETR). No set sees another in self-attention."""
    num_hybrid_queries: int = 1500
    """Queries of the set that `extra_queries='hybrid'` adds."""
    num_groups: int = 11
    """Groups of object queries in training with `extra_queries='group'`."""
    denoising: Literal["none", "dn", "contrastive"] = "none"
    """Queries made of noised targets, in training only. `dn` recovers the targets (DN-DETR),
    `contrastive` also rejects copies with more noise (DINO)."""
    denoising_queries: int = 100
    """Noised copies of the targets of an image, over all groups: as many groups as these allow, at
    least one. `contrastive` makes as many again to reject."""
    denoising_groups: int | None = None
    """Groups of noised copies, with one copy of each target per group. None leaves their number to
    `denoising_queries`."""
    denoising_label_noise: float = 0.25
    """Probability that the label of a copy is replaced by a random class."""
    denoising_box_noise: float = 0.4
    """Largest shift of the sides of a copy, in halves of its width and height."""
    denoising_label_rows: int | None = None
    """Rows of the label embedding; None is `num_classes` + 1, as published."""
    query_position: Literal["initial", "box", "box_content"] = "initial"
    """Position codes of queries. `initial`: one code for all layers. `box`: each layer codes the
    boxes from which it starts (DAB-DETR, DINO); one-stage queries are then learned boxes.
    `box_content`: from the second layer on, scaled by the content (DAB-Deformable-DETR)."""
    position_embedding: Literal["sine", "learned"] = "sine"
    """Position code of the feature maps."""
    position_temperature: float = 10000.0
    """Sine code: ratio of the longest to the shortest wavelength (DINO: 20)."""
    position_offset: float = 0.5
    """Sine code: position of the first cell, in cells; 0.5 is its centre (DINO: 1)."""
    decoder_order: Literal["cross_self", "self_cross"] = "cross_self"
    """`cross_self` attends to the image first (MS-DETR), `self_cross` to the queries first."""
    one_to_many: Literal["none", "internal", "output"] = "internal"
    """Where one-to-many supervision is taken: nowhere, after the first attention of each decoder
    layer, or at its output (own class heads, shared box heads)."""
    one_to_many_ffn: bool = True
    """Give internal one-to-many supervision a feed-forward network of its own (training only)."""
    two_stage: bool = True
    """Start queries from the encoder's best proposals instead of learned reference points."""
    box_refine: bool = True
    """Refine reference boxes layer by layer, with separate heads per layer."""
    proposal_score: Literal["first_class", "best_class"] = "first_class"
    """Two-stage: rank proposals by their first class logit and supervise all of them as "object"
    (Deformable-DETR), or by their best class and supervise the selected ones with real labels
    (DINO, Group DETR)."""
    mixed_selection: bool = False
    """Two-stage: learned query content, only the positions come from the proposals."""
    proposal_nms_iou_threshold: float | None = None
    """Two-stage: of the proposals of each level, drop those that overlap a better one by more than
    this, and take equally many of each level (DETA). None ranks all proposals together."""
    proposal_content: bool = False
    """Two-stage: add a projection of a proposal's token to the content of its query (DETA)."""
    look_forward_twice: bool = False
    """Let a layer's box loss also train the refinement of the layer before."""
    head_sharing: Literal["auto", "none", "decoder", "all"] = "auto"
    """Class and box heads: `none` has a pair per decoder layer and one for the encoder, `decoder`
    one for all decoder layers and one for the encoder (DINO), `all` a single pair. `auto` is `none`
    with box refinement, and `all` without."""
    decoder_norm: bool = False
    """Predict from the output of a decoder layer after one more LayerNorm, which all layers share;
    the next layer starts from boxes refined without it (DINO, LW-DETR)."""
    logit_eps: float = 1e-5
    """Smallest distance of a coordinate from 0 and 1 where its logit is taken (DN-DETR, DINO:
    1e-3)."""

    @property
    def shared_heads(self) -> Literal["none", "decoder", "all"]:
        """`head_sharing`, resolved."""
        if self.head_sharing != "auto":
            return self.head_sharing
        return "none" if self.box_refine else "all"

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(
            1,
            self,
            "num_classes",
            "hidden_dim",
            "num_heads",
            "num_encoder_points",
            "num_decoder_points",
            "num_encoder_layers",
            "num_decoder_layers",
            "feedforward_dim",
            "num_queries",
            "num_hybrid_queries",
            "num_groups",
            "denoising_queries",
            "denoising_groups",
            "denoising_label_rows",
        )
        require_at_least(0, self, "denoising_box_noise", "position_offset")
        require_fraction(self, "denoising_label_noise")
        require_fraction(self, "proposal_nms_iou_threshold")
        if not 0.0 < self.position_temperature < math.inf:
            raise ValueError(
                f"position_temperature must be positive and finite, got {self.position_temperature}"
            )
        if not 0.0 < self.logit_eps < 0.5:
            raise ValueError(f"logit_eps must be in (0, 0.5), got {self.logit_eps}")
        if not 1 <= self.num_levels <= 5:
            raise ValueError(f"num_levels must be 1 to 5, got {self.num_levels}")
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be divisible by num_heads ({self.num_heads})"
            )
        if self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be divisible by 4: "
                "position codes hold a sine and a cosine of both coordinates"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.mixed_selection and not self.two_stage:
            raise ValueError("mixed_selection selects encoder proposals: it needs two_stage")
        if self.proposal_score == "best_class" and not self.two_stage:
            raise ValueError("proposal_score ranks encoder proposals: it needs two_stage")
        if self.proposal_content and not self.two_stage:
            raise ValueError("proposal_content reads encoder proposals: it needs two_stage")
        if self.proposal_nms_iou_threshold is not None and (
            not self.two_stage or self.proposal_score != "first_class"
        ):
            raise ValueError(
                "proposal_nms_iou_threshold thins out encoder proposals: it needs two_stage and "
                "proposal_score='first_class'"
            )
        if self.proposal_nms_iou_threshold is not None and self.extra_queries != "none":
            raise ValueError(
                f"proposal_nms_iou_threshold with extra_queries={self.extra_queries!r}: DETA's "
                "selection is for one set of queries"
            )
        if self.query_position != "initial" and self.two_stage and not self.mixed_selection:
            raise ValueError(
                f"query_position={self.query_position!r} with two_stage needs mixed_selection: "
                "there is no content besides the learned one"
            )
        if self.query_position == "box_content" and self.num_decoder_layers < 2:
            raise ValueError(
                "query_position='box_content' scales from the second layer on: it needs "
                f"num_decoder_layers of at least 2, got {self.num_decoder_layers}"
            )
        if self.query_position == "initial" and not self.two_stage and self.denoising != "none":
            raise ValueError(
                f"denoising={self.denoising!r} makes queries of boxes: it needs two_stage, or "
                "query_position 'box' or 'box_content'"
            )
        if self.extra_queries == "group" and self.two_stage and self.proposal_score != "best_class":
            raise ValueError(
                "extra_queries='group' with two_stage needs proposal_score='best_class': each "
                "group is supervised on the proposals that it selects"
            )
        if self.look_forward_twice and not self.box_refine:
            raise ValueError("look_forward_twice concerns refined boxes: it needs box_refine")
        if self.one_to_many_ffn and self.one_to_many != "internal":
            raise ValueError(
                f"one_to_many_ffn belongs to one_to_many='internal', not {self.one_to_many!r}"
            )
        if self.dilation and self.backbone == "convnet":
            raise ValueError("dilation is for the ResNet backbones")


@dataclass(frozen=True, kw_only=True)
class AssignmentConfig:
    """How predictions are assigned to targets."""

    cost_class: float = 2.0
    """One-to-one: weight of the focal class cost."""
    cost_bbox: float = 5.0
    """One-to-one: weight of the L1 box cost."""
    cost_giou: float = 2.0
    """One-to-one: weight of the GIoU cost."""
    giou_eps: float = 0.0
    """One-to-one: added to the denominators of the GIoU cost (DN-DETR, DINO: 1e-6)."""
    decoder_match: Literal["hungarian", "iou"] = "hungarian"
    """Object queries: one per target at least total cost, or several by the IoU of their initial
    boxes, the same in all layers (DETA, stage 2)."""
    encoder_match: Literal["anchors", "predictions", "iou"] = "anchors"
    """Match encoder proposals by their anchors (MS-DETR), by predicted boxes (Deformable-DETR), or
    several per target by the IoU of their anchors (DETA, stage 1)."""
    encoder_cost_class: float = 0.0
    """Class cost of the encoder's match; box and GIoU costs are those above."""
    hybrid_k: int = 6
    """Hybrid queries: each target is matched with this many of them, at least total cost."""
    one_to_many_k: int = 6
    """One-to-many: at most this many queries per target."""
    one_to_many_threshold: float = 0.4
    """One-to-many: a query is positive where its best score reaches this."""
    one_to_many_iou_weight: float = 0.7
    """One-to-many score: weight of the IoU."""
    one_to_many_class_score_weight: float = 0.3
    """One-to-many score: weight of the class probability."""
    positive_fraction: float = 0.25
    """One-to-many: at most `int(positive_fraction * num_queries)` positives are kept, drawn at
    random; 1.0 keeps all and makes the assignment deterministic."""
    iou_k: int = 4
    """Matching by IoU: at most this many queries per target."""
    iou_threshold: float = 0.6
    """Matching by IoU: a query is positive where its best IoU reaches this. As in one-to-many
    matching, `positive_fraction` of the queries are kept at most."""
    encoder_iou_threshold: float = 0.7
    """Matching of encoder proposals by IoU: a proposal is positive from this IoU on."""
    encoder_max_positives: int = 128
    """Matching of encoder proposals by IoU: at most this many positives are kept per image."""
    indices_merge: bool = False
    """Add the one-to-one pairs to the one-to-many branch and give each query one target."""

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, self, "hybrid_k", "one_to_many_k", "iou_k", "encoder_max_positives")
        require_fraction(self, "positive_fraction")
        require_fraction(self, "iou_threshold")
        require_fraction(self, "encoder_iou_threshold")
        require_at_least(
            0,
            self,
            "cost_class",
            "cost_bbox",
            "cost_giou",
            "encoder_cost_class",
            "giou_eps",
            "one_to_many_iou_weight",
            "one_to_many_class_score_weight",
        )
        if self.cost_bbox == 0 and self.cost_giou == 0:
            raise ValueError("cost_bbox and cost_giou are both 0: boxes would not matter")
        if self.indices_merge and self.decoder_match == "iou":
            raise ValueError(
                "indices_merge adds one-to-one pairs: it needs decoder_match hungarian"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the training objective."""

    class_weight: float = 1.0
    """One-to-one focal loss."""
    bbox_weight: float = 5.0
    """One-to-one L1 box loss."""
    giou_weight: float = 2.0
    """One-to-one GIoU loss."""
    one_to_many_class_weight: float = 2.0
    """One-to-many focal loss."""
    one_to_many_bbox_weight: float = 5.0
    """One-to-many L1 box loss."""
    one_to_many_giou_weight: float = 2.0
    """One-to-many GIoU loss."""
    hybrid_class_weight: float = 2.0
    """Focal loss of hybrid queries. H-DETR's lambda multiplies all three weights."""
    hybrid_bbox_weight: float = 5.0
    """L1 box loss of hybrid queries."""
    hybrid_giou_weight: float = 2.0
    """GIoU loss of hybrid queries."""
    denoising_class_weight: float = 1.0
    """Focal loss of denoising queries."""
    denoising_bbox_weight: float = 5.0
    """L1 box loss of denoising queries."""
    denoising_giou_weight: float = 2.0
    """GIoU loss of denoising queries."""
    giou_eps: float = 0.0
    """Added to the denominators of the GIoU (DN-DETR, DINO: 1e-6)."""
    sum_group_losses: bool = False
    """Groups of queries: add their losses up instead of averaging them."""
    encoder_class_weight: float = 2.0
    """Encoder (two-stage) focal loss."""
    encoder_bbox_weight: float = 5.0
    """Encoder (two-stage) L1 box loss."""
    encoder_giou_weight: float = 2.0
    """Encoder (two-stage) GIoU loss."""
    focal_alpha: float = 0.25
    """Weight of positives in the focal loss; negatives get the rest."""
    focal_gamma: float = 2.0
    """Exponent that lowers the weight of easy examples in the focal loss."""
    auxiliary: bool = True
    """Supervise every decoder layer; False supervises the last one only."""

    def __post_init__(self) -> None:
        check_types(self)
        weights = [field.name for field in dataclasses.fields(self) if "weight" in field.name]
        require_at_least(0, self, *weights, "focal_gamma", "giou_eps")
        require_fraction(self, "focal_alpha")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, annotations and augmentation."""

    root: Path | None = None
    """Folder in the layout of the COCO download: `train2017/`, `val2017/`,
    `annotations/instances_train2017.json`, `annotations/instances_val2017.json`."""
    train_images: Path | None = None
    """Folder of the training images, instead of the one under `root`."""
    train_annotations: Path | None = None
    """Training annotations (COCO JSON), instead of those under `root`."""
    val_images: Path | None = None
    """Folder of the validation images, instead of the one under `root`."""
    val_annotations: Path | None = None
    """Validation annotations (COCO JSON), instead of those under `root`."""
    label_layout: Literal["auto", "coco", "contiguous"] = "auto"
    """How category ids become labels: `coco` keeps the ids (91 classes), `contiguous` numbers the
    categories from 0, `auto` keeps the ids exactly for COCO's own 80 categories."""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF rotation of photographs. COCO's boxes are drawn on the stored pixels: `ignore`."""
    augmentation: Literal["detr", "flip", "none"] = "detr"
    """Training augmentation: `detr` flips, scales and crops, `flip` flips and scales, `none` only
    scales to `test_size`."""
    train_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter image side in training, drawn per image, in pixels."""
    crop_resize_sizes: tuple[int, ...] = (400, 500, 600)
    """Shorter side before a random crop, drawn per image, in pixels."""
    crop_min_size: int = 384
    """Smallest side of a random crop, in pixels."""
    crop_max_size: int = 600
    """Largest side of a random crop, in pixels."""
    test_size: int = 800
    """Shorter image side in evaluation, in pixels."""
    max_size: int = 1333
    """Upper bound of the longer image side, in pixels."""
    pad_multiple: int = 64
    """Batches are padded right and bottom to a multiple of this; 1 keeps the exact size."""
    num_image_buckets: int | None = None
    """At most this many padded shapes (height, width), chosen for the data set so that little is
    padded; for `torch.compile` and CUDA graphs. 0 pads each batch as little as `pad_multiple`
    allows: about 170 shapes on COCO. None is 16 where the step is compiled, and 0 elsewhere."""
    target_buckets: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Targets are padded to the smallest of these that holds the batch (beyond: a multiple of the
    last)."""
    cache: Literal["none", "memory"] = "none"
    """`memory` keeps decoded images in shared memory (`/dev/shm`), once per machine: 3 bytes per
    pixel, 100 GB for COCO."""
    num_workers: int = 4
    """Loader processes per rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("crop_min_size", "crop_max_size", "test_size", "max_size", "pad_multiple")
        require_at_least(1, self, *sizes)
        require_at_least(0, self, "num_image_buckets", "num_workers")
        for name in ("train_sizes", "crop_resize_sizes", "target_buckets"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be positive numbers, at least one, got {values}")
        if tuple(sorted(set(self.target_buckets))) != self.target_buckets:
            raise ValueError(f"target_buckets must ascend, got {self.target_buckets}")
        if self.crop_min_size > self.crop_max_size:
            raise ValueError(
                f"crop_min_size ({self.crop_min_size}) exceeds crop_max_size ({self.crop_max_size})"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rates and their schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9 (the published `--sgd`)."""
    lr: float = 2e-4
    """Learning rate, for the batch size of the preset."""
    backbone_lr: float = 2e-5
    """Learning rate of the backbone."""
    reference_lr_factor: float = 0.1
    """Factor on `lr` for `sampling_offsets` and `reference_points`."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    clip_grad_norm: float = 0.1
    """Upper bound of the total gradient norm; 0 switches clipping off."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: times 0.1 every `lr_drop_epoch` epochs, as published. `cosine`: one half wave down
    to 0."""
    lr_drop_epoch: int = 11
    """Epochs between learning rate drops of the `step` schedule."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""

    def __post_init__(self) -> None:
        check_types(self)
        rates = ("lr", "backbone_lr", "reference_lr_factor")
        require_at_least(0, self, *rates, "weight_decay", "clip_grad_norm", "warmup_steps")
        require_at_least(1, self, "lr_drop_epoch")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of training, and what is written at which steps."""

    epochs: int = 12
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many optimizer steps if `epochs` are not done before; the learning rate
    schedule stays that of `epochs`."""
    batch_size: int = 16
    """Images per optimizer step, over all processes and micro-batches; divisible by both."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step, computed one after the other to save memory. The update is
    that of the whole batch: losses are divided by the targets of all micro-batches."""
    activation_checkpointing: Literal["none", "encoder", "all"] = "none"
    """Save memory by computing activations a second time in the backward pass: those of the encoder
    layers, or (`all`) also those of the decoder layers and the backbone stages."""
    ema_decay: float | None = None
    """Decay of the exponential moving average (EMA) of the weights, for instance 0.9999. The EMA
    weights are then evaluated and exported. None keeps none."""
    ema_warmup_steps: int = 2000
    """The decay at step n is `ema_decay * (1 - exp(-n / ema_warmup_steps))`; 0 has no warm-up."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` computes matrix products under autocast; boxes, costs and losses stay float32."""
    log_every: int = 50
    """Steps between log lines. On a GPU this is also how often the host waits for it."""
    checkpoint_every: int | None = None
    """Steps between checkpoints within an epoch; one is written after every epoch in any case."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept in the run folder."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated. 0 never evaluates."""

    def __post_init__(self) -> None:
        check_types(self)
        lengths = ("epochs", "max_steps", "batch_size", "accumulation_steps")
        intervals = ("log_every", "checkpoint_every", "keep_checkpoints")
        require_at_least(1, self, *lengths, *intervals)
        require_at_least(0, self, "ema_warmup_steps", "eval_every")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size ({self.batch_size}) is the number of images over all micro-batches: "
                f"it must be divisible by accumulation_steps ({self.accumulation_steps})"
            )
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in (0, 1), or None, got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compilation of the training step by torch.compile."""

    mode: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles on CUDA and not on the CPU. Code that cannot be compiled is an error; `off`
    trains without compilation."""
    warm_up: bool = True
    """With `data.num_image_buckets`: compile for all image buckets before the first step, instead
    of for each bucket at its first batch."""
    cuda_graphs: bool = False
    """Capture the step of each image bucket as a CUDA graph and replay it, so that the host has no
    work within a step. Needs CUDA."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """From predictions to scored detections."""

    batch_size: int = 8
    """Images per forward pass and process."""
    max_detections: int = 100
    """Highest scored detections kept per image (published: 100, and 300 for 900 queries)."""
    nms_iou_threshold: float | None = None
    """Suppress a detection that overlaps a better one of its class by more than this IoU."""

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, self, "batch_size", "max_detections")
        require_fraction(self, "nms_iou_threshold")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    assignment: AssignmentConfig = field(default_factory=AssignmentConfig)
    """The assignment of predictions to targets."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set and its augmentation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """Compilation."""
    output: Path = Path("runs/msdetr")
    """Run folder: configuration, metrics, checkpoints, weights."""
    resume: str | None = None
    """Checkpoint to continue from; `auto` takes the newest of the run folder, if there is one."""
    weights: Path | None = None
    """Weights to start from (of a run, or published); training starts at step 0."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each holds the whole model (`ddp`), or a shard of its parameters,
    gradients and optimizer state (`fsdp`). Checkpoints of one continue in the other."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    seed: int = 42
    """Seed of initialisation, data order, augmentation, dropout and random assignment."""

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(0, self, "seed")
        if self.resume is not None and self.weights is not None:
            raise ValueError("resume continues a run, weights starts a new one: give one of them")
        starts_at_points = not self.model.two_stage and self.model.query_position == "initial"
        if self.assignment.decoder_match == "iou" and starts_at_points:
            raise ValueError(
                "assignment.decoder_match='iou' reads the boxes from which queries start: it needs "
                "model.two_stage, or model.query_position 'box' or 'box_content'"
            )
        if self.parallel == "fsdp" and self.compile.cuda_graphs:
            raise ValueError(
                "compile.cuda_graphs needs parallel ddp: shards are gathered to addresses that "
                "change, which a graph cannot follow"
            )
        checkpoints = self.train.activation_checkpointing != "none"
        if self.compile.cuda_graphs and checkpoints and self.model.dropout > 0:
            raise ValueError(
                "compile.cuda_graphs with train.activation_checkpointing needs model.dropout 0: "
                "the state of the random generator cannot be read during the capture of a graph"
            )
        if self.parallel == "fsdp" and self.optimizer.name == "sgd":
            raise ValueError(
                "parallel fsdp needs optimizer.name adamw: torch's fused SGD takes no shards"
            )
