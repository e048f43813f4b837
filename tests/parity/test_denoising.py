"""Denoising queries against DN-DETR and DINO from their recorded draws, in float64: contents,
boxes, masks, losses and gradients. Kernels compute losses in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from msdetr.config import AssignmentConfig, LossConfig, ModelConfig
from msdetr.model.attention import SelfAttention
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.heads import DetectionHeads
from msdetr.model.query_selection import AnchorQueries
from msdetr.model.query_sets import query_sets, visible_queries
from msdetr.structures import Branch, DetectorOutput, FeaturePyramid, Predictions, Targets
from msdetr.supervision.criterion import Criterion, LossOutput
from parity.golden import GoldenCase, published_values, weight_by_rule

FUNCTIONS = pytest.mark.golden("dn_", "cdn_", kind="function")
TOLERANCE = 1e-9


def _is_contrastive(case: GoldenCase) -> bool:
    return case.info["implementation"] == "dino"


def _config(case: GoldenCase, *, fixed_groups: bool = False) -> ModelConfig:
    """The options of a case, or its number of groups in place of its number of queries."""
    info = case.info
    fields: dict[str, Any] = {
        "num_classes": info["num_classes"],
        "hidden_dim": info["hidden_dim"],
        "num_heads": 2,
        "dropout": 0.0,
        "num_queries": info["num_queries"],
        "two_stage": False,
        "one_to_many": "none",
        "one_to_many_ffn": False,
        "logit_eps": 1e-3,
    }
    if not _is_contrastive(case):
        return ModelConfig(
            **fields,
            denoising="dn",
            query_position="box_content",
            denoising_groups=info["scalar"],
            denoising_label_noise=info["label_noise_scale"],
            denoising_box_noise=info["box_noise_scale"],
        )
    num_groups = 2 * info["dn_number"] if info["dn_number"] < 50 else None
    return ModelConfig(
        **fields,
        denoising="contrastive",
        query_position="box",
        denoising_queries=info["dn_number"],
        denoising_groups=info["num_dn_group"] if fixed_groups else num_groups,
        denoising_label_noise=info["dn_label_noise_ratio"] / 2,
        denoising_box_noise=info["dn_box_noise_scale"],
    )


def _module(case: GoldenCase, *, fixed_groups: bool = False) -> DenoisingQueries:
    """With the weights of the case."""
    config = _config(case, fixed_groups=fixed_groups)
    module = DenoisingQueries(config, case.info["num_classes"]).double()
    module.load_state_dict({"label_embed.weight": _weight(case, "label_enc.weight")})
    return module


def _weight(case: GoldenCase, name: str) -> Tensor:
    return weight_by_rule(name, case.arrays[f"grad.{name}"].shape)


def _targets(case: GoldenCase, extra: int = 0) -> Targets:
    """Padded to the largest count as in the published code, at least one slot, and `extra`."""
    exact = case.targets(empty_slots=0)
    missing = 0 if exact.labels.shape[1] else 1
    return case.targets(empty_slots=missing + extra)


def _of_targets(x: Tensor, targets: Targets) -> Tensor:
    """[B, G, S, T, ...] as the published code orders the copies: one row per copy, copies of all
    targets of the batch after each other."""
    return x.permute(0, 3, 1, 2, *range(4, x.dim()))[targets.mask].flatten(1, 2).transpose(0, 1)


@FUNCTIONS
def test_shapes(case: GoldenCase) -> None:
    """The bucket of the largest count gives the published groups and queries."""
    targets = case.targets(empty_slots=0)
    module = _module(case)
    num_slots = targets.labels.shape[1]
    if num_slots == 0:
        assert case.info["pad_size"] == 0
        with pytest.raises(ValueError, match="at least one slot"):
            module.query_set(num_slots)
        return
    query_set = module.query_set(num_slots)
    assert query_set.num_queries == case.info["pad_size"]
    assert num_slots == case.info["single_pad"]
    key = "num_dn_group" if _is_contrastive(case) else "scalar"
    assert query_set.num_groups == case.info[key]


@FUNCTIONS
@pytest.mark.parametrize("extra", [0, 2])
def test_noised_targets(case: GoldenCase, extra: int) -> None:
    module, targets = _module(case, fixed_groups=extra > 0), _targets(case, extra)
    num_slots = targets.labels.shape[1]
    uniform = case.noise(targets, module.query_set(num_slots), module.num_classes)
    noise = module.noise(uniform, num_slots)
    labels = _of_targets(module.noised_labels(targets.labels, noise), targets)
    boxes = _of_targets(module.noised_boxes(targets.boxes, noise), targets)
    assert torch.equal(labels.flatten(), case.tensor("noised_labels"))
    expected = case.tensor("noised_boxes")
    torch.testing.assert_close(boxes.flatten(0, 1), expected, rtol=0.0, atol=1e-12)


@FUNCTIONS
def test_queries_and_their_gradients(case: GoldenCase) -> None:
    """Contents and the logits of the boxes, in training; gradients of the embeddings."""
    config, module, targets = _config(case), _module(case), _targets(case)
    batch, num_slots = targets.labels.shape
    query_set = module.query_set(num_slots)
    denoising = module(targets, case.noise(targets, query_set, module.num_classes))
    pad = case.info["pad_size"]
    content, reference = denoising.content, denoising.reference
    assert content.shape[1] == reference.shape[1] == query_set.num_queries
    if pad == 0:
        assert not content.any()
        assert (reference == 0.5).all()
        content, reference = content[:, :0], reference[:, :0]
    parameters = {"label_enc.weight": module.label_embed.weight}
    if not _is_contrastive(case):
        selection = AnchorQueries(config).double()
        selection.load_state_dict(
            {
                "query_embed.weight": _weight(case, "tgt_embed.weight"),
                "anchors.weight": _weight(case, "refpoint_embed.weight"),
            }
        )
        memory = FeaturePyramid(torch.zeros(batch, 1, 1), ((1, 1),), torch.ones(batch, 1, 2))
        primary = selection(memory, DetectionHeads(config, module.num_classes))
        content = torch.cat((content, primary.content), dim=1)
        reference = torch.cat((reference, primary.reference), dim=1)
        parameters["tgt_embed.weight"] = selection.query_embed.weight
        parameters["refpoint_embed.weight"] = selection.anchors.weight
    logits = reference.logit()
    for result, name in ((content, "label"), (logits, "bbox")):
        expected = case.tensor(f"input_query_{name}")
        torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=TOLERANCE)

    loss = (content * case.tensor("grad_input_query_label")).sum()
    if "grad_input_query_bbox" in case.arrays:
        loss = loss + (logits * case.tensor("grad_input_query_bbox")).sum()
    if pad == 0:  # The set is there, and has no part in the loss.
        loss = loss + denoising.content.sum()
    loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.grad, case.tensor(f"grad.{name}"), rtol=TOLERANCE, atol=TOLERANCE
        )


@FUNCTIONS
def test_mask(case: GoldenCase) -> None:
    """Attention is that of PyTorch with the published mask."""
    config, module = _config(case), _module(case)
    hidden = case.tensor("attn_mask")
    sets = query_sets(config, training=True)
    if case.info["pad_size"]:
        query_set = module.query_set(case.info["single_pad"])
        sets = sets.preceded_by(query_set)
        visible = visible_queries(query_set, config.num_queries, torch.device("cpu"))
        assert torch.equal(visible, ~hidden[: len(visible)])
    attention = SelfAttention(config.hidden_dim, 2, 0.0).double()
    expected = nn.MultiheadAttention(config.hidden_dim, 2, batch_first=True).double()
    expected.load_state_dict(attention.state_dict())
    x, query_pos = torch.randn(2, 1, len(hidden), config.hidden_dim, dtype=torch.float64)
    position = x + query_pos
    result = attention(x, query_pos, sets)
    masked = expected(position, position, x, attn_mask=hidden)[0]
    torch.testing.assert_close(result, masked, rtol=TOLERANCE, atol=TOLERANCE)


class Supervision(NamedTuple):
    """Losses, and in float64 the gradients of all predictions."""

    losses: LossOutput
    gradients: dict[str, Predictions]


def _supervise(
    case: GoldenCase,
    branches: dict[str, Branch],
    targets: Targets,
    impl: str,
    place: dict[str, Any],
) -> Supervision:
    """Losses of the primary and the denoising set, with the weights of the case."""
    kinds = {"class": "ce", "bbox": "bbox", "giou": "giou"}
    names = ("loss_{}", "loss_{}_dn") if _is_contrastive(case) else ("", "tgt_loss_{}")
    options = {
        f"{prefix}{ours}_weight": case.info["weights"].get(name.format(theirs), 0.0)
        for prefix, name in zip(("", "denoising_"), names, strict=True)
        for ours, theirs in kinds.items()
    }
    criterion = Criterion(
        AssignmentConfig(giou_eps=1e-6), LossConfig(giou_eps=1e-6, **options), impl=impl
    )
    placed = {
        name: branch._replace(
            predictions=Predictions(
                *(x.to(**place).detach().requires_grad_() for x in branch.predictions)
            )
        )
        for name, branch in branches.items()
    }
    output = DetectorOutput(placed)
    losses = criterion(output, Targets(*(x.to(output.one_to_one.boxes.device) for x in targets)))
    losses.total.backward()
    gradients = {
        name: Predictions(*(field.grad.double().cpu() for field in branch.predictions))
        for name, branch in placed.items()
    }
    return Supervision(losses, gradients)


def _recorded(case: GoldenCase, prefix: str = "") -> dict[str, Predictions]:
    """Predictions (or with `grad.` their gradients) by set."""
    pad = case.info["pad_size"]
    fields = [case.tensor(f"{prefix}outputs_{name}") for name in ("class", "coord")]
    branch = "contrastive" if _is_contrastive(case) else "denoising"
    found = {"one_to_one": Predictions(*(x[:, :, pad:] for x in fields))}
    if pad:
        found[branch] = Predictions(*(x[:, :, :pad] for x in fields))
    return found


def _assert_losses(case: GoldenCase, losses: LossOutput, tolerance: float) -> None:
    result = published_values(losses.terms)
    expected = {name: value for name, value in case.info["losses"].items() if name in result}
    assert expected.keys() == case.info["weights"].keys()
    result = {name: result[name] for name in expected}
    assert result == pytest.approx(expected, rel=tolerance)
    assert losses.total.item() == pytest.approx(case.info["total"], rel=tolerance)


def _assert_gradients(result: Predictions, expected: Predictions, tolerance: float) -> None:
    for mine, truth in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=10 * tolerance, atol=tolerance)


@FUNCTIONS
@pytest.mark.parametrize("extra", [0, 2])
def test_losses_and_gradients(
    case: GoldenCase, extra: int, impl: str, request: pytest.FixtureRequest
) -> None:
    """With more target slots, the denoising set only has more empty ones."""
    place: dict[str, Any] = {}
    tolerance = TOLERANCE
    if impl == "triton":
        place = {"device": request.getfixturevalue("kernel_device"), "dtype": torch.float32}
        tolerance = 1e-5
    recorded, gradients = _recorded(case), _recorded(case, "grad.")
    targets = _targets(case, extra)
    num_slots = targets.labels.shape[1]
    query_set = _module(case, fixed_groups=extra > 0).query_set(num_slots)
    branch = query_set.branch
    shape = (*recorded["one_to_one"].logits.shape[:2], query_set.num_queries)
    logits = torch.randn(*shape, case.info["num_classes"], dtype=torch.float64)
    if branch == "contrastive" and branch in recorded:
        logits = torch.full_like(logits, -60.0)  # background without a loss
    predictions = Predictions(logits, torch.full((*shape, 4), 0.5, dtype=torch.float64))

    def recorded_slots(x: Tensor) -> Tensor:
        """The slots of the case, of [N, B, Q, ...], a view."""
        return x.unflatten(2, (-1, num_slots))[:, :, :, : num_slots - extra]

    if branch in recorded:
        for mine, theirs in zip(predictions, recorded[branch], strict=True):
            recorded_slots(mine).copy_(theirs.view_as(recorded_slots(mine)))
    given = _supervise(
        case,
        {
            "one_to_one": Branch(recorded["one_to_one"]),
            branch: Branch(predictions, num_groups=query_set.num_groups),
        },
        targets,
        impl,
        place,
    )
    _assert_losses(case, given.losses, tolerance)
    _assert_gradients(given.gradients["one_to_one"], gradients["one_to_one"], tolerance)
    denoising = given.gradients[branch]
    if branch in recorded:
        slots = Predictions(*(recorded_slots(x) for x in denoising))
        flat = Predictions(*(x.flatten(2, 3) for x in slots))
        _assert_gradients(flat, gradients[branch], tolerance)
        for x in slots:
            x.zero_()
    if branch == "denoising" or branch not in recorded:
        assert not any(x.any() for x in denoising), "empty slots"
