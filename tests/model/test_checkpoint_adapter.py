"""Published checkpoints load safely, and no tensor is lost on the way there and back."""

from __future__ import annotations

import io
import logging
import zlib
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msdetr.config import ModelConfig, RunConfig
from msdetr.engine.pretrained import load_detector
from msdetr.model.checkpoint_adapter import (
    load_published_checkpoint,
    load_state,
    ours_to_published,
    published_name,
    published_to_ours,
    split_ignored,
)
from msdetr.model.detector import build_detector
from msdetr.published import (
    PUBLISHED_FLAGS,
    PUBLISHED_NUM_PROCESSES,
    STARTING_POINTS,
    config_from_published_args,
)
from msdetr.structures import ImageBatch
from parity.golden import canonical_name, golden_models

GOLDEN_MODELS = golden_models()
golden = pytest.mark.parametrize("name", GOLDEN_MODELS)


def golden_config(case: dict) -> RunConfig:
    return config_from_published_args(
        case["flags"], implementation=case["implementation"], overrides=case["overrides"]
    )


def golden_namespace(case: dict) -> Namespace:
    """The arguments as the published code would have stored them in its checkpoint."""
    flags = PUBLISHED_FLAGS[case["implementation"]]
    values = {name: flag.default for name, flag in flags.items()}
    given = iter(case["flags"])
    for flag in given:
        name = flag.removeprefix("--")
        values[name] = True if flags[name].type is bool else flags[name].type(next(given))
    world_size = PUBLISHED_NUM_PROCESSES[case["implementation"]]
    added = {"world_size": world_size, "rank": 0, "gpu": 0}
    return Namespace(**values | case["overrides"] | added)


def published_state(case: dict, *, full_size: bool = False) -> dict[str, torch.Tensor]:
    """A published state dict: random, shared where it is shared there.

    Sides beyond the first are cut to 2 unless `full_size`, which repeats one number without
    holding memory for it.
    """
    tensors: dict[str, torch.Tensor] = {}
    state = OrderedDict()
    for key, shape in case["state_dict"].items():
        name = canonical_name(key, case)
        if name not in tensors:
            seed = zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(seed)
            cut = [] if full_size else shape[:1] + [min(side, 2) for side in shape[1:]]
            tensors[name] = torch.randn(cut, generator=generator)
        state[key] = tensors[name].expand(shape) if full_size else tensors[name]
    return state


def assert_same_tensors(result, expected):
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(result[key], tensor), key


@golden
def test_round_trip_keeps_every_published_tensor(name):
    case = GOLDEN_MODELS[name]
    config = golden_config(case).model
    published = published_state(case)
    ours = published_to_ours(published, config)
    assert len(ours) == len({canonical_name(key, case) for key in published})
    assert_same_tensors(ours_to_published(ours, config), published)


@golden
def test_canonical_names_are_those_of_the_recorded_gradients(name):
    case = GOLDEN_MODELS[name]
    config = golden_config(case).model
    ours = published_to_ours(published_state(case), config)
    names = [published_name(key, config) for key in ours]
    assert len(set(names)) == len(names)
    assert set(names) >= {canonical_name(key, case) for key in case["grad_norms"]}


@golden
def test_published_file_loads(name, tmp_path):
    case = GOLDEN_MODELS[name]
    published = published_state(case)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published, "args": golden_namespace(case), "epoch": 11}, path)
    loaded = load_published_checkpoint(path, implementation=case["implementation"])
    assert loaded.config == golden_config(case)
    assert loaded.epoch == 11
    assert loaded.ignored == {}
    assert_same_tensors(ours_to_published(loaded.state_dict, loaded.config.model), published)
    # The arguments also tell whose they are.
    assert load_published_checkpoint(path).config == loaded.config


@golden
def test_golden_weights_fill_the_detector(name):
    detector = pytest.importorskip("msdetr.model.detector")
    case = GOLDEN_MODELS[name]
    config = golden_config(case).model
    ours = published_to_ours(published_state(case, full_size=True), config)
    with torch.device("meta"):
        model = detector.Detector(config)
    model.load_state_dict(ours, strict=True, assign=True)
    assert_same_tensors(model.state_dict(), ours)


SMALL = ModelConfig(
    num_classes=5,
    hidden_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=3,
    feedforward_dim=16,
    num_queries=6,
    dropout=0.0,
)
ONE_STAGE_SHARED = replace(
    SMALL,
    two_stage=False,
    box_refine=False,
    decoder_order="self_cross",
    one_to_many="none",
    one_to_many_ffn=False,
)
OUTPUT = replace(SMALL, decoder_order="self_cross", one_to_many="output", one_to_many_ffn=False)
HYBRID = replace(OUTPUT, one_to_many="none", extra_queries="hybrid", num_hybrid_queries=9)
GROUP = replace(HYBRID, extra_queries="group", proposal_score="best_class")
DN = replace(
    ONE_STAGE_SHARED,
    box_refine=True,
    query_position="box_content",
    denoising="dn",
    logit_eps=1e-3,
)
DINO = replace(
    HYBRID,
    extra_queries="none",
    proposal_score="best_class",
    query_position="box",
    mixed_selection=True,
    denoising="contrastive",
    head_sharing="decoder",
    decoder_norm=True,
    position_temperature=20.0,
    position_offset=1.0,
    logit_eps=1e-3,
)
DETA = replace(HYBRID, extra_queries="none", num_levels=5, proposal_content=True)
VARIANTS = {
    "internal": SMALL,
    "internal without ffn": replace(SMALL, one_to_many_ffn=False),
    "internal, shared heads": replace(SMALL, box_refine=False),
    "internal, one stage": replace(SMALL, two_stage=False),
    "plus": replace(SMALL, mixed_selection=True, look_forward_twice=True),
    "output": OUTPUT,
    "output, shared heads": replace(OUTPUT, box_refine=False),
    "output, one stage": replace(OUTPUT, two_stage=False),
    "none, shared heads": ONE_STAGE_SHARED,
    "none, two stage, shared heads": replace(ONE_STAGE_SHARED, two_stage=True),
    "hybrid": HYBRID,
    "hybrid plus": replace(HYBRID, mixed_selection=True, look_forward_twice=True),
    "hybrid, one stage": replace(HYBRID, two_stage=False),
    "hybrid, shared heads": replace(HYBRID, box_refine=False),
    "learned positions, resnet101": replace(
        SMALL, position_embedding="learned", backbone="resnet101", dilation=True
    ),
    "one level": replace(SMALL, num_levels=1),
    "five levels": replace(SMALL, num_levels=5),
    "dn": DN,
    "dino": DINO,
    "dino, a head per layer": replace(DINO, head_sharing="none"),
    "dino, one head": replace(DINO, head_sharing="all"),
    "dino, more labels": replace(DINO, denoising_label_rows=9, look_forward_twice=True),
    "deta": replace(DETA, proposal_nms_iou_threshold=0.9),
    "deta, shared heads": replace(DETA, box_refine=False),
}


def numbered_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The detector's state dict with a number per key instead of its weights."""
    detector = pytest.importorskip("msdetr.model.detector")
    with torch.device("meta"):
        model = detector.Detector(config)
    return {name: torch.tensor(float(i)) for i, name in enumerate(model.state_dict())}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_the_round_trip(variant):
    config = VARIANTS[variant]
    ours = numbered_state(config)
    published = ours_to_published(ours, config)
    assert_same_tensors(published_to_ours(published, config), ours)
    assert {published_name(key, config) for key in ours} <= published.keys()


def head_layers(published, family: str) -> set[str]:
    """The layers for which a family of heads is listed."""
    prefix = family + "."
    return {key.removeprefix(prefix).split(".")[0] for key in published if key.startswith(prefix)}


def test_shared_heads_are_listed_for_every_layer():
    config = VARIANTS["none, two stage, shared heads"]
    published = ours_to_published(numbered_state(config), config)
    for family in ("class_embed", "bbox_embed", "transformer.decoder.class_embed"):
        assert head_layers(published, family) == {"0", "1", "2", "3"}
    # Without refinement the decoder does not know the box heads.
    assert head_layers(published, "transformer.decoder.bbox_embed") == set()
    assert published["class_embed.3.bias"] == published["class_embed.0.bias"]


@pytest.mark.parametrize("sharing", ["none", "decoder", "all"])
def test_heads_of_dino(sharing):
    config = replace(DINO, head_sharing=sharing)
    published = ours_to_published(numbered_state(config), config)
    for family in ("class_embed", "bbox_embed"):
        assert head_layers(published, family) == {"0", "1", "2"}
        assert head_layers(published, f"transformer.decoder.{family}") == {"0", "1", "2"}
    first, second = (published[f"class_embed.{layer}.bias"] for layer in range(2))
    encoder = published["transformer.enc_out_class_embed.bias"]
    assert (first == second) == (sharing != "none")
    assert (first == encoder) == (sharing == "all")
    index = {"none": 3, "decoder": 1, "all": 0}[sharing]
    canonical = published_name(f"heads.class_embed.{index}.bias", config)
    if sharing == "all":
        assert canonical == "class_embed.0.bias"
    else:
        assert canonical == "transformer.enc_out_class_embed.bias"
    with pytest.raises(ValueError, match=f"class_embed.{index + 1}.bias: .*no head of this index"):
        published_name(f"heads.class_embed.{index + 1}.bias", config)


def test_a_head_too_many_is_not_lost():
    with pytest.raises(ValueError, match=r"class_embed\.4\.bias: .*no head of this index"):
        ours_to_published({"heads.class_embed.4.bias": torch.zeros(5)}, SMALL)


def test_dino_without_denoising_keeps_its_unused_label_embedding_aside():
    config = replace(DINO, denoising="none")
    ours = {name: torch.ones(5, 32) for name in numbered_state(config)}
    published = ours_to_published(ours, config)
    # The published model demands one.
    assert torch.equal(published["label_enc.weight"], torch.zeros(6, 32))
    more = ours_to_published(ours, replace(config, denoising_label_rows=9))
    assert torch.equal(more["label_enc.weight"], torch.zeros(9, 32))
    known, ignored = split_ignored(published, config)
    assert ignored.keys() == {"label_enc.weight"}
    assert "label_enc.weight" not in known
    assert_same_tensors(published_to_ours(published, config), ours)
    assert "denoising.label_embed.weight" in published_to_ours(published, DINO)
    assert "denoising.label_embed.weight" in published_to_ours(published, SMALL)


def test_implementation_a_lists_its_box_heads_three_times():
    published = ours_to_published(numbered_state(OUTPUT), OUTPUT)
    for family in ("class_embed_o2m", "bbox_embed_o2m"):
        assert head_layers(published, family) == {"0", "1", "2"}  # the encoder's head is not
    key = "bbox_embed.2.layers.1.weight"
    assert published[key] == published[f"transformer.decoder.{key}"]
    assert published[key] == published["bbox_embed_o2m.2.layers.1.weight"]
    assert published["class_embed_o2m.2.bias"] != published["class_embed.2.bias"]


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        ("backbone.layer1.0.downsample.0.weight", "backbone.0.body.layer1.0.downsample.0.weight"),
        ("position_embedding.row_embed.weight", "backbone.1.row_embed.weight"),
        ("neck.projections.3.1.bias", "input_proj.3.1.bias"),
        ("level_embed", "transformer.level_embed"),
        (
            "encoder.layers.10.self_attn.value_proj.bias",
            "transformer.encoder.layers.10.self_attn.value_proj.bias",
        ),
        ("encoder.layers.0.self_attn_norm.bias", "transformer.encoder.layers.0.norm1.bias"),
        ("encoder.layers.0.ffn.norm.bias", "transformer.encoder.layers.0.norm2.bias"),
        ("decoder.layers.4.cross_attn_norm.weight", "transformer.decoder.layers.4.norm1.weight"),
        ("decoder.layers.4.self_attn_norm.weight", "transformer.decoder.layers.4.norm2.weight"),
        ("decoder.layers.4.ffn.norm.weight", "transformer.decoder.layers.4.norm3.weight"),
        (
            "decoder.layers.4.self_attn.in_proj_weight",
            "transformer.decoder.layers.4.self_attn.in_proj_weight",
        ),
        (
            "decoder.layers.4.one_to_many_ffn.linear2.bias",
            "transformer.decoder.layers.4.linear4.bias",
        ),
        ("query_selection.query_embed.weight", "query_embed.weight"),
        ("query_selection.pos_trans_norm.weight", "transformer.pos_trans_norm.weight"),
        ("heads.one_to_many_class_embed.1.weight", "class_embed_o2m.1.weight"),
    ],
)
def test_names(ours, published):
    assert published_name(ours) == published
    tensor = torch.zeros(1)
    assert published_to_ours({published: tensor}, SMALL) == {ours: tensor}


@pytest.mark.parametrize(
    ("config", "ours", "published"),
    [
        (DN, "query_selection.query_embed.weight", "tgt_embed.weight"),
        (DN, "query_selection.anchors.weight", "refpoint_embed.weight"),
        (DN, "denoising.label_embed.weight", "label_enc.weight"),
        (
            DN,
            "decoder.query_position.query_scale.layers.1.bias",
            "transformer.decoder.query_scale.layers.1.bias",
        ),
        (DINO, "query_selection.query_embed.weight", "transformer.tgt_embed.weight"),
        (DINO, "decoder.norm.bias", "transformer.decoder.norm.bias"),
        (
            DINO,
            "decoder.query_position.ref_point_head.layers.0.weight",
            "transformer.decoder.ref_point_head.layers.0.weight",
        ),
        (DETA, "query_selection.pix_trans_norm.bias", "transformer.pix_trans_norm.bias"),
    ],
)
def test_names_of_later_detectors(config, ours, published):
    assert published_name(ours, config) == published
    tensor = torch.zeros(1)
    assert published_to_ours({published: tensor}, config) == {ours: tensor}
    assert ours_to_published({ours: tensor}, config) == {published: tensor}


def test_names_that_are_not_of_the_model_are_refused():
    with pytest.raises(ValueError, match="level_embedding"):
        published_name("level_embedding")
    with pytest.raises(ValueError, match=r"detr\.query_embed\.weight, transformer\.gate"):
        published_to_ours(
            {"transformer.gate": torch.zeros(1), "detr.query_embed.weight": torch.zeros(1)}, SMALL
        )


def test_copies_that_differ_are_refused():
    heads = {"class_embed.0.bias": torch.zeros(5), "class_embed.2.bias": torch.ones(5)}
    assert len(published_to_ours(heads, SMALL)) == 2
    with pytest.raises(ValueError, match=r"class_embed\.0\.bias and class_embed\.2\.bias"):
        published_to_ours(heads, ONE_STAGE_SHARED)
    alias = {"bbox_embed.1.x": torch.zeros(5), "transformer.decoder.bbox_embed.1.x": torch.ones(5)}
    with pytest.raises(ValueError, match="differ here"):
        published_to_ours(alias, SMALL)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (replace(SMALL, backbone="convnet"), "convnet"),
        (replace(SMALL, decoder_order="self_cross"), "no published implementation"),
        (replace(OUTPUT, decoder_order="cross_self"), "no published implementation"),
        (replace(OUTPUT, mixed_selection=True), "mixed_selection"),
        (GROUP, "extra_queries='group'"),
        (replace(GROUP, extra_queries="none"), "proposal_score='best_class'"),
        (replace(HYBRID, one_to_many="output"), "extra_queries='hybrid' with one_to_many='output'"),
        (replace(SMALL, extra_queries="hybrid"), "one_to_many='internal'"),
        (replace(HYBRID, decoder_order="cross_self"), "no published implementation"),
        (
            replace(SMALL, denoising="dn"),
            "denoising='dn': the published deformable-detr has 'none'",
        ),
        (replace(SMALL, position_offset=1.0), "position_offset=1.0: .* has 0.5"),
        (replace(SMALL, head_sharing="all"), "head_sharing='all' with box_refine=True"),
        (replace(SMALL, logit_eps=1e-3), "logit_eps=0.001"),
        (replace(DN, denoising="none"), "denoising='none': the published dn-dab-deformable-detr"),
        (replace(DN, head_sharing="all"), "head_sharing='all'"),
        (replace(DN, look_forward_twice=True), "look_forward_twice=True"),
        (replace(DINO, denoising="dn"), "denoising='dn': .*dino has 'none' or 'contrastive'"),
        (replace(DINO, decoder_order="cross_self"), "decoder_order='cross_self'"),
        (replace(DINO, extra_queries="hybrid"), "extra_queries='hybrid'"),
        (replace(DINO, one_to_many="output"), "one_to_many='output'"),
        (replace(DINO, query_position="initial"), "query_position='initial'"),
        (replace(DETA, mixed_selection=True), "mixed_selection=True"),
        (replace(DETA, denoising="contrastive"), "denoising='contrastive'"),
        (replace(DETA, proposal_nms_iou_threshold=0.5), "proposal_nms_iou_threshold=0.5"),
    ],
)
def test_architectures_that_nobody_published_are_refused(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        ours_to_published({}, config)


def test_distributed_prefix_and_counters():
    state = {
        "module.transformer.level_embed": torch.ones(2),
        "module.backbone.0.body.bn1.num_batches_tracked": torch.tensor(7),
        "module.total_ops": torch.tensor(1.0),
    }
    known, ignored = split_ignored(state, SMALL)
    assert known.keys() == {"transformer.level_embed"}
    assert ignored.keys() == {"backbone.0.body.bn1.num_batches_tracked", "total_ops"}
    assert published_to_ours(state, SMALL).keys() == {"level_embed"}


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.level_embed = torch.nn.Parameter(torch.zeros(2, 3))
        self.neck = torch.nn.ModuleDict({"projections": torch.nn.Linear(1, 1)})


def test_load_state_fills_the_model():
    model = TwoLayers()
    state = {name: torch.full_like(tensor, 3.0) for name, tensor in model.state_dict().items()}
    load_state(model, state)
    assert_same_tensors(model.state_dict(), state)


def test_load_state_lists_everything_that_does_not_fit_and_loads_nothing():
    model = TwoLayers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {
        "level_embed": torch.ones(2, 4),
        "neck.projections.weight": torch.ones(1, 1),
        "heads.class_embed.0.bias": torch.ones(1),
        "gate": torch.ones(1),
    }
    with pytest.raises(ValueError, match="do not fit") as info:
        load_state(model, state)
    assert str(info.value).splitlines()[1:] == [
        "  missing: neck.projections.bias (published: input_proj.bias)",
        "  unexpected: gate",
        "  unexpected: heads.class_embed.0.bias (published: class_embed.0.bias)",
        "  shape (2, 4) instead of (2, 3): level_embed (published: transformer.level_embed)",
    ]
    assert_same_tensors(model.state_dict(), before)


def test_load_state_uses_the_published_names_of_the_model():
    model = TwoLayers()
    model.config = DINO
    state = model.state_dict() | {
        "query_selection.query_embed.weight": torch.ones(1),
        "heads.class_embed.1.bias": torch.ones(1),
        "heads.class_embed.2.bias": torch.ones(1),
    }
    with pytest.raises(ValueError, match="do not fit") as info:
        load_state(model, state)
    prefix = "  unexpected: "
    assert [line.removeprefix(prefix) for line in str(info.value).splitlines()[1:]] == [
        "heads.class_embed.1.bias (published: transformer.enc_out_class_embed.bias)",
        "heads.class_embed.2.bias",
        "query_selection.query_embed.weight (published: transformer.tgt_embed.weight)",
    ]


ARGS = Namespace(num_queries=6, two_stage=True, with_box_refine=True, use_aux_ffn=False)
MODEL = {"class_embed.0.weight": torch.zeros(21, 4), "transformer.level_embed": torch.ones(4, 4)}


@pytest.fixture
def save(tmp_path):
    def write(content, **kwargs) -> Path:
        path = tmp_path / "checkpoint.pth"
        torch.save(content, path, **kwargs)
        return path

    return write


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_whole_training_checkpoint_loads(save, zipped):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 40)
    content = {
        "model": OrderedDict(MODEL),
        "args": ARGS,
        "epoch": 4,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
    }
    loaded = load_published_checkpoint(save(content, _use_new_zipfile_serialization=zipped))
    assert loaded.state_dict.keys() == {"heads.class_embed.0.weight", "level_embed"}
    assert loaded.config.model.num_queries == 6
    assert loaded.epoch == 4


def test_number_of_classes_is_that_of_the_heads(save):
    path = save({"model": MODEL, "args": ARGS})
    assert load_published_checkpoint(path).config.model.num_classes == 21
    # A configuration that says otherwise is kept: the mismatch shows when the model is loaded.
    assert load_published_checkpoint(path, config=RunConfig()).config.model.num_classes == 21
    config = RunConfig(model=ModelConfig(num_classes=3))
    assert load_published_checkpoint(path, config=config).config == config


def test_the_file_that_the_published_run_started_from_is_not_followed(save):
    args = Namespace(**vars(ARGS), resume="https://example.org/start.pth")
    loaded = load_published_checkpoint(save({"model": MODEL, "args": args}))
    assert loaded.config.weights is None
    assert loaded.config.resume is None


def test_ignored_tensors_are_kept_and_reported(save, caplog):
    counter = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(5)}
    with caplog.at_level(logging.INFO, logger="msdetr.model.checkpoint_adapter"):
        loaded = load_published_checkpoint(save({"model": MODEL | counter, "args": ARGS}))
    assert_same_tensors(loaded.ignored, counter)
    assert "num_batches_tracked" in caplog.text


@pytest.mark.parametrize("content", [MODEL, {"model": MODEL, "epoch": 3}])
def test_weights_without_arguments_need_a_configuration(save, content):
    path = save(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: .*no `args`.*config"):
        load_published_checkpoint(path)
    loaded = load_published_checkpoint(path, config=RunConfig())
    assert loaded.state_dict.keys() == {"heads.class_embed.0.weight", "level_embed"}
    assert loaded.epoch == content.get("epoch")


SIZES = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16}
RUNTIME = {
    "distributed": True,
    "world_size": 4,
    "rank": 0,
    "gpu": 0,
    "dist_url": "env://",
    "dist_backend": "nccl",
}
H_DETR_QUERIES = {
    "with_box_refine": True,
    "look_forward_twice": True,
    "num_queries_one2one": 7,
    "num_queries_one2many": 11,
    "k_one2many": 3,
    "lambda_one2many": 0.5,
    "topk": 5,
    "use_wandb": True,
    "override_resumed_lr_drop": True,
}
# Command line, stored arguments, rows and columns of the query embeddings, and largest number of
# detections.
FILES = {
    "h-detr, mixed selection": (
        "h-deformable-detr",
        H_DETR_QUERIES | {"two_stage": True, "mixed_selection": True},
        (18, 32),
        5,
    ),
    "h-detr, one stage": ("h-deformable-detr", H_DETR_QUERIES, (18, 64), 5),
    "dn-detr": (
        "dn-dab-deformable-detr",
        {"use_dn": True, "num_queries": 7, "local_rank": 0, "pretrain_model_path": "start.pth"},
        (7, 31),
        100,
    ),
    "dino": (
        "dino",
        {
            "num_queries": 7,
            "num_select": 5,
            "options": {"dn_scalar": 100, "use_ema": False},
            "dn_scalar": 100,
            "pretrain_model_path": "https://example.org/start.pth",
            "finetune_ignore": ["label_enc.weight", "class_embed"],
        },
        (7, 32),
        5,
    ),
    "dino without denoising": ("dino", {"num_queries": 7, "use_dn": False}, (7, 32), 300),
    "deta": (
        "deta",
        {
            "with_box_refine": True,
            "two_stage": True,
            "num_feature_levels": 5,
            "num_queries": 7,
            "assign_first_stage": True,
            "assign_second_stage": True,
            "finetune": "start.pth",
        },
        None,
        100,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_detector_becomes_a_detector(save, name):
    """From a file as the published code writes it to predictions, and back."""
    implementation, given, embeddings, max_detections = FILES[name]
    flags = PUBLISHED_FLAGS[implementation]
    defaults = {name: flag.default for name, flag in flags.items()}
    args = Namespace(**defaults | SIZES | given | RUNTIME)
    overrides = {name: "" for name in STARTING_POINTS if name in defaults}
    config = config_from_published_args(args, overrides=overrides).model
    written = build_detector(replace(config, backbone_weights="none")).state_dict()
    if embeddings is None:
        assert "query_selection.query_embed.weight" not in written
    else:
        assert written["query_selection.query_embed.weight"].shape == embeddings
    published = ours_to_published(written, config)

    path = save({"model": published, "args": args, "epoch": 11})
    loaded = load_detector(path)
    assert loaded.config.weights is None
    assert loaded.config.train.batch_size == 8
    assert loaded.config.eval.max_detections == max_detections
    assert_same_tensors(loaded.model.state_dict(), written)
    assert_same_tensors(ours_to_published(loaded.model.state_dict(), config), published)
    images = ImageBatch(torch.randn(1, 3, 96, 160), torch.tensor([[96, 160]]))
    with torch.no_grad():
        output = loaded.model(images)
    assert output.branches.keys() == {"one_to_one"}
    assert output.one_to_one.logits.shape == (2, 1, 7, 91)


class Intruder:
    """Runs when it is unpickled."""

    executed = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Intruder.executed = True
    return {}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["extra", "args"])
def test_files_that_would_run_code_are_refused(save, zipped, place):
    content = {"model": MODEL, "args": ARGS}
    if place == "extra":
        content["extra"] = Intruder()
    else:
        content["args"] = Namespace(**vars(ARGS), lr=Intruder())
    path = save(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: refused, it needs \S*_run: only"):
        load_published_checkpoint(path)
    assert not Intruder.executed
    torch.load(path, weights_only=False)
    assert Intruder.executed  # the file really was one of those
    Intruder.executed = False


def test_namespace_is_allowed_while_loading_only(save):
    path = save({"model": MODEL, "args": ARGS})
    load_published_checkpoint(path)
    assert Namespace not in torch.serialization.get_safe_globals()


def test_other_classes_than_namespace_are_named(save):
    path = save({"model": MODEL, "args": ARGS, "where": Path("x")})
    with pytest.raises(ValueError, match="refused, it needs pathlib"):
        load_published_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04junk", b"\x80\x02}."])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: not a readable PyTorch checkpoint"):
        load_published_checkpoint(path)


def test_a_truncated_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": MODEL, "args": ARGS}, buffer)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(buffer.getvalue()[:-200])
    with pytest.raises(ValueError, match="not a readable PyTorch checkpoint"):
        load_published_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"model": {}, "args": ARGS}, "no state dict"),
        ({"model": [1], "args": ARGS}, "no state dict"),
        ({"weights": MODEL, "args": ARGS}, "not tensors of a model: weights, args"),
        ({"model": MODEL, "args": {"lr": 1.0}}, "args is a dict"),
        ({"model": MODEL, "args": ARGS, "epoch": "last"}, "epoch is 'last'"),
        ({"model": MODEL, "args": Namespace(masks=True)}, r"checkpoint\.pth: .*masks"),
        ({"model": MODEL, "args": Namespace(colour=3)}, r"checkpoint\.pth: .*colour"),
        ({"model": {"transformer.level_embed": torch.ones(1)}, "args": ARGS}, "class_embed"),
        ({"model": MODEL | {"a.b": torch.ones(1)}, "args": ARGS}, r"checkpoint\.pth: .*a\.b"),
    ],
)
def test_other_content_is_refused_by_name(save, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_published_checkpoint(save(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_published_checkpoint(tmp_path / "nowhere.pth")
