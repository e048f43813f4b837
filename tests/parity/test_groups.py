"""Group DETR against LW-DETR, its published code with deformable attention, in float64.

LW-DETR is another detector: it has no deformable encoder, and its queries start at learned offsets
from the proposals (`LWDETR` below). The rest is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msdetr.config import AssignmentConfig, LossConfig, ModelConfig
from msdetr.model.decoder import Decoder, DecoderLayer
from msdetr.model.geometry import level_valid_ratios
from msdetr.model.heads import DetectionHeads
from msdetr.model.proposal_queries import ProposalQueries
from msdetr.model.query_sets import query_sets
from msdetr.structures import Branch, DetectorOutput, FeaturePyramid, Predictions, Targets
from msdetr.supervision.criterion import Criterion, LossOutput
from parity.golden import GoldenCase, assert_relative, published_pairs, published_values


def _config(info: dict[str, Any], **fields: Any) -> ModelConfig:
    """Fields that layer and model share, and those of the case."""
    return ModelConfig(
        num_levels=len(info["shapes"]),
        num_decoder_points=info["dec_n_points"],
        feedforward_dim=info["dim_feedforward"],
        dropout=0.0,
        num_queries=info["num_queries"],
        extra_queries="group",
        num_groups=info["group_detr"],
        proposal_score="best_class",
        decoder_order="self_cross",
        one_to_many="none",
        one_to_many_ffn=False,
        mixed_selection=True,
        **fields,
    )


def _shapes(info: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in info["shapes"])


_LAYER_NAMES = {
    "norm1": "self_attn_norm",
    "norm2": "cross_attn_norm",
    "norm3": "ffn.norm",
    "linear1": "ffn.linear1",
    "linear2": "ffn.linear2",
}


def _layer_name(published: str) -> str:
    """Our name of a parameter of a decoder layer."""
    module, _, rest = published.partition(".")
    return f"{_LAYER_NAMES.get(module, module)}.{rest}"


@pytest.mark.golden("group_layer")
def test_layer(case: GoldenCase, impl: str) -> None:
    if impl == "triton":
        pytest.skip("the layer chooses its implementation by device")
    info = case.info
    config = _config(info, hidden_dim=info["d_model"], num_heads=info["nheads"])
    layer = DecoderLayer(config).double()
    state = case.published_state_dict()
    layer.load_state_dict({_layer_name(name): tensor for name, tensor in state.items()})
    points = case.tensor("reference_points")
    assert torch.equal(points, points[:, :, :1].expand_as(points))  # without padding
    leaves = {name: case.tensor(name).requires_grad_() for name in ("tgt", "query_pos", "memory")}
    shapes = _shapes(info)
    valid_sizes = torch.tensor(shapes).expand(len(points), -1, -1)
    ratios = level_valid_ratios(shapes, valid_sizes)

    def run(num_queries: int) -> Tensor:
        memory = FeaturePyramid(leaves["memory"], shapes, valid_sizes)
        x, query_pos, reference = (
            tensor[:, :num_queries] for tensor in (leaves["tgt"], leaves["query_pos"], points)
        )
        sets = query_sets(config, training=layer.training)
        assert sets.num_queries == num_queries
        output: Tensor = layer(x, query_pos, reference[:, :, 0], ratios, memory, sets).x
        return output

    output = run(points.shape[1])
    assert_relative(output, case.tensor("output"), "output", 1e-9)
    output.backward(case.tensor("grad_output"))
    for name, leaf in leaves.items():
        assert_relative(leaf.grad, case.tensor(f"grad.{name}"), name, 1e-9)
    result = {name: layer.get_parameter(_layer_name(name)).grad.norm().item() for name in state}
    assert result == pytest.approx(case.grad_norms, rel=1e-9)

    layer.eval()
    assert_relative(run(info["num_queries"]), case.tensor("output_eval"), "evaluation", 1e-9)


def _criterion(info: dict[str, Any], impl: str = "auto") -> Criterion:
    """The criterion with the weights of a case. Its matching costs are 2, 5 and 2, our defaults."""
    weights = info["weights"]
    return Criterion(
        AssignmentConfig(),
        LossConfig(
            class_weight=weights["loss_ce"],
            bbox_weight=weights["loss_bbox"],
            giou_weight=weights["loss_giou"],
            encoder_class_weight=weights["loss_ce_enc"],
            encoder_bbox_weight=weights["loss_bbox_enc"],
            encoder_giou_weight=weights["loss_giou_enc"],
            sum_group_losses=info["sum_group_losses"],
        ),
        impl=impl,
    )


def _assert_losses(losses: LossOutput, info: dict[str, Any], tolerance: float) -> None:
    expected = {
        name: value
        for name, value in info["losses"].items()
        if not name.startswith(("class_error", "cardinality_error"))
    }
    assert published_values(losses.terms) == pytest.approx(expected, rel=tolerance)
    assert losses.total.item() == pytest.approx(info["total"], rel=tolerance)


def _assert_pairs(
    case: GoldenCase, criterion: Criterion, output: DetectorOutput, targets: Targets
) -> None:
    assignments = criterion.assign(output, targets)
    num_layers = len(output.one_to_one.logits)
    places = [(f"layer{layer}.", "one_to_one", layer) for layer in range(num_layers)]
    for prefix, branch, layer in [*places, ("enc.", "encoder_selected", 0)]:
        for image in range(len(targets.count)):
            result = published_pairs(
                assignments[branch], layer, image, num_groups=case.info["group_detr"]
            )
            assert result == case.pairs(f"{prefix}pairs{image}")


@pytest.mark.golden("group_criterion")
def test_losses_and_gradients(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    place: dict[str, Any] = {}
    tolerance = 1e-9
    if impl == "triton":
        place = {"device": request.getfixturevalue("kernel_device"), "dtype": torch.float32}
        tolerance = 1e-5
    info = case.info
    fields = {}
    for branch, prefixes in (
        ("one_to_one", [f"layer{layer}." for layer in range(info["layers"])]),
        ("encoder_selected", ["enc."]),
    ):
        fields[branch] = Predictions(
            *(
                torch.stack([case.tensor(f"{prefix}pred_{field}") for prefix in prefixes])
                .to(**place)
                .requires_grad_()
                for field in Predictions._fields
            )
        )
    output = DetectorOutput(
        {name: Branch(value, num_groups=info["group_detr"]) for name, value in fields.items()}
    )
    criterion = _criterion(info, impl)
    targets = Targets(*(field.to(output.one_to_one.boxes.device) for field in case.targets()))
    losses = criterion(output, targets)
    _assert_losses(losses, info, tolerance)
    _assert_pairs(case, criterion, output, targets)

    losses.total.backward()
    for branch, predictions in fields.items():
        for layer in range(len(predictions.logits)):
            prefix = "enc." if branch == "encoder_selected" else f"layer{layer}."
            for field in Predictions._fields:
                torch.testing.assert_close(
                    getattr(predictions, field).grad[layer].double().cpu(),
                    case.tensor(f"grad.{prefix}pred_{field}"),
                    rtol=10 * tolerance,
                    atol=tolerance,
                )


_MODULE_NAMES = {
    "query_feat": "selection.query_embed",
    "norm": "decoder.norm",
    "ref_point_head": "decoder.query_position.ref_point_head",
    "class_embed": "heads.class_embed.0",
    "bbox_embed": "heads.bbox_embed.0",
}
_ENCODER_NAMES = {
    # Ours of group 0 and of the further ones.
    "enc_output": ("selection.enc_output", "selection.group_enc_output"),
    "enc_output_norm": ("selection.enc_output_norm", "selection.group_enc_output_norm"),
    "enc_out_class_embed": ("heads.class_embed.1", "heads.group_class_embed"),
    "enc_out_bbox_embed": ("heads.bbox_embed.1", "heads.group_bbox_embed"),
}


class LWDETR(nn.Module):
    """LW-DETR without its backbone: our selection, decoder and heads, and learned offsets of the
    selected boxes, which have no counterpart here."""

    def __init__(self, info: dict[str, Any]) -> None:
        super().__init__()
        refines = not info["lite_refpoint_refine"]
        config = _config(
            info,
            hidden_dim=info["hidden_dim"],
            num_heads=info["ca_nheads"],
            num_decoder_layers=info["dec_layers"],
            query_position="box",
            head_sharing="decoder",
            decoder_norm=True,
            box_refine=refines,
            look_forward_twice=refines,
            logit_eps=1e-12,  # it adds up logits
        )
        self.selection = ProposalQueries(config)
        self.heads = DetectionHeads(config, info["num_classes"])
        self.decoder = Decoder(config)
        for layer in self.decoder.layers:
            layer.self_attn.num_heads = info["sa_nheads"]
        self.refpoint_embed = nn.Embedding(config.num_groups * config.num_queries, 4)

    def forward(self, memory: FeaturePyramid) -> DetectorOutput:
        queries = self.selection(memory, self.heads)
        offset = self.selection.weight_of(self.refpoint_embed)
        reference = (queries.reference.logit() + offset).sigmoid()
        branches = self.decoder(queries._replace(reference=reference), memory, self.heads)
        return DetectorOutput(branches | queries.proposals)

    def our_name(self, published: str) -> str:
        """Our name of a published parameter."""
        name = published.removeprefix("transformer.").removeprefix("decoder.")
        module, *rest = name.split(".")
        if module == "layers":
            return f"decoder.layers.{rest[0]}.{_layer_name('.'.join(rest[1:]))}"
        if module not in _ENCODER_NAMES:
            return ".".join((_MODULE_NAMES.get(module, module), *rest))
        group = int(rest[0])
        first, further = _ENCODER_NAMES[module]
        return ".".join((first if group == 0 else f"{further}.{group - 1}", *rest[1:]))


class Step(NamedTuple):
    """A training step of one case."""

    model: LWDETR
    memory: FeaturePyramid
    output: DetectorOutput
    losses: LossOutput


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """Steps by case name, each computed once for all tests of the module."""
    return {}


@pytest.fixture
def step(case: GoldenCase, steps: dict[str, Step], impl: str) -> Step:
    info = case.info
    if impl == "triton":
        pytest.skip("the model chooses its implementation by device")
    if info["ia_bce_loss"] or info["bbox_reparam"] or not info["two_stage"]:
        pytest.skip("this form of LW-DETR has no counterpart here")
    if case.name not in steps:
        model = LWDETR(info).double()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in case.published_state_dict().items():
                parameters[model.our_name(name)].copy_(tensor)
        memory = _memory(info)
        output = model(memory)
        losses = _criterion(info)(output, case.targets())
        losses.total.backward()
        steps[case.name] = Step(model, memory, output, losses)
    return steps[case.name]


def _memory(info: dict[str, Any]) -> FeaturePyramid:
    """Feature maps by the rule of the golden set."""
    generator = np.random.Generator(np.random.PCG64(info["seed"]))
    valid_sizes = torch.tensor(info["valid_sizes"])
    batch, channels = len(valid_sizes), info["hidden_dim"]
    maps = [
        torch.from_numpy(generator.standard_normal((batch, channels, height, width)))
        for height, width in info["shapes"]
    ]
    tokens = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], dim=1)
    return FeaturePyramid(tokens, _shapes(info), valid_sizes)


@pytest.mark.golden("group_model")
def test_model_outputs(case: GoldenCase, step: Step) -> None:
    branches = step.output.branches
    assert branches.keys() == {"one_to_one", "encoder_selected"}
    decoder = branches["one_to_one"].predictions
    proposals = branches["encoder_selected"].predictions
    last = len(decoder.logits) - 1
    layers = [("" if i == last else f"aux{i}.", decoder, i) for i in range(last + 1)]
    for prefix, predictions, layer in [*layers, ("enc.", proposals, 0)]:
        for field in Predictions._fields:
            name = f"{prefix}pred_{field}"
            assert_relative(getattr(predictions, field)[layer], case.tensor(name), name)


@pytest.mark.golden("group_model")
def test_model_in_evaluation_mode(case: GoldenCase, step: Step) -> None:
    """The first group alone, which no other group has changed."""
    step.model.eval()
    with torch.no_grad():
        output = step.model(step.memory)
    step.model.train()
    assert output.branches.keys() == {"one_to_one"}
    num_queries = case.info["num_queries"]
    for field in Predictions._fields:
        expected = case.tensor(f"pred_{field}")[:, :num_queries]
        assert_relative(getattr(output.one_to_one, field)[-1], expected, field)


@pytest.mark.golden("group_model")
def test_model_losses_and_pairs(case: GoldenCase, step: Step) -> None:
    _assert_losses(step.losses, case.info, 1e-5)
    _assert_pairs(case, _criterion(case.info), step.output, case.targets())


@pytest.mark.golden("group_model")
def test_model_gradient_norms(case: GoldenCase, step: Step) -> None:
    parameters = dict(step.model.named_parameters())
    result = {
        name: parameters[step.model.our_name(name)].grad.norm().item() for name in case.grad_norms
    }
    scale = max(case.grad_norms.values())
    assert result == pytest.approx(case.grad_norms, rel=1e-5, abs=1e-9 * scale)
    compared = {step.model.our_name(name) for name in case.grad_norms}
    assert compared >= {name for name, value in parameters.items() if value.grad is not None}
