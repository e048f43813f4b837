"""Published checkpoints: conversion of parameter names, and safe loading of files.

The published model lists tensors under several names: the decoder registers the box heads (and in
two stages the class heads) a second time. Implementation (a) registers its box heads a third time.
Without box refinement, all layers share one head that is listed once per layer. Our model lists
each tensor once. The canonical name of a tensor is its published name without
`transformer.decoder.` and with the lowest layer. The published code trains it under that name.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig, RunConfig
from msdetr.published import Implementation, config_from_published_args

logger = logging.getLogger(__name__)

_MODULE_NAMES = (
    # Ours and the published name; `*` stands for a layer.
    ("backbone", "backbone.0.body"),
    ("position_embedding", "backbone.1"),
    ("neck.projections", "input_proj"),
    ("level_embed", "transformer.level_embed"),
    ("encoder.layers.*.self_attn", "transformer.encoder.layers.*.self_attn"),
    ("encoder.layers.*.self_attn_norm", "transformer.encoder.layers.*.norm1"),
    ("encoder.layers.*.ffn.linear1", "transformer.encoder.layers.*.linear1"),
    ("encoder.layers.*.ffn.linear2", "transformer.encoder.layers.*.linear2"),
    ("encoder.layers.*.ffn.norm", "transformer.encoder.layers.*.norm2"),
    ("decoder.layers.*.cross_attn", "transformer.decoder.layers.*.cross_attn"),
    ("decoder.layers.*.cross_attn_norm", "transformer.decoder.layers.*.norm1"),
    ("decoder.layers.*.self_attn", "transformer.decoder.layers.*.self_attn"),
    ("decoder.layers.*.self_attn_norm", "transformer.decoder.layers.*.norm2"),
    ("decoder.layers.*.ffn.linear1", "transformer.decoder.layers.*.linear1"),
    ("decoder.layers.*.ffn.linear2", "transformer.decoder.layers.*.linear2"),
    ("decoder.layers.*.ffn.norm", "transformer.decoder.layers.*.norm3"),
    ("decoder.layers.*.one_to_many_ffn.linear1", "transformer.decoder.layers.*.linear3"),
    ("decoder.layers.*.one_to_many_ffn.linear2", "transformer.decoder.layers.*.linear4"),
    ("decoder.layers.*.one_to_many_ffn.norm", "transformer.decoder.layers.*.norm4"),
    ("query_selection.query_embed", "query_embed"),
    ("query_selection.reference_points", "transformer.reference_points"),
    ("query_selection.enc_output", "transformer.enc_output"),
    ("query_selection.enc_output_norm", "transformer.enc_output_norm"),
    ("query_selection.pos_trans", "transformer.pos_trans"),
    ("query_selection.pos_trans_norm", "transformer.pos_trans_norm"),
    ("heads.class_embed", "class_embed"),
    ("heads.bbox_embed", "bbox_embed"),
    ("heads.one_to_many_class_embed", "class_embed_o2m"),
)

_DECODER_ALIASES = ("transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.")
_HEAD = re.compile(r"^(class_embed|bbox_embed|class_embed_o2m)\.(\d+)\.(.+)$")
# BatchNorm's step counter and the profiler's counts are not part of either model.
_IGNORED_SUFFIXES = ("num_batches_tracked", "total_ops", "total_params")

_Renaming = tuple[re.Pattern[str], str]


def _renamings(pairs: tuple[tuple[str, str], ...]) -> tuple[_Renaming, ...]:
    return tuple(
        (
            re.compile("^" + re.escape(source).replace(r"\*", r"(\d+)") + r"(?=\.|$)"),
            target.replace("*", r"\1"),
        )
        for source, target in pairs
    )


_TO_PUBLISHED = _renamings(_MODULE_NAMES)
_TO_OURS = _renamings(tuple((published, ours) for ours, published in _MODULE_NAMES))


def _rename(name: str, renamings: tuple[_Renaming, ...]) -> str | None:
    for pattern, target in renamings:
        renamed, count = pattern.subn(target, name)
        if count:
            return renamed
    return None


def published_name(our_name: str) -> str:
    """The canonical published name of one of our parameters or buffers.

    Raises:
        ValueError: the published model has nothing of this kind.
    """
    name = _rename(our_name, _TO_PUBLISHED)
    if name is None:
        raise ValueError(f"{our_name} has no published name")
    return name


def published_to_ours(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename a published state dict (`module.` prefix or not) to ours, each tensor once.

    Completeness is not checked here but in `load_state`. Tensors that neither model uses
    (`split_ignored`) are left out.

    Args:
        state_dict: published names -> tensors.
        config: the model they belong to; `box_refine` decides whether layers share their heads.

    Raises:
        ValueError: names that no published model has, or two names of one tensor with
            different values.
    """
    known, _ = split_ignored(state_dict)
    converted: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unexpected = []
    for key, tensor in known.items():
        canonical = _canonical_name(key, shared_heads=not config.box_refine)
        name = _rename(canonical, _TO_OURS)
        if name is None:
            unexpected.append(key)
        elif name not in converted:
            converted[name], origin[name] = tensor, key
        elif not torch.equal(converted[name], tensor):
            raise ValueError(
                f"{origin[name]} and {key} are one tensor in a published model with "
                f"box_refine={config.box_refine}, but differ here"
            )
    if unexpected:
        raise ValueError(f"not names of a published model: {', '.join(sorted(unexpected))}")
    return converted


def split_ignored(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Drop the prefix `module.` and set apart the counters that neither model uses.

    Returns:
        The tensors of the model, and the ignored ones, both by published name.
    """
    prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
    known: dict[str, Tensor] = {}
    ignored: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        chosen = ignored if key.endswith(_IGNORED_SUFFIXES) else known
        chosen[key.removeprefix(prefix)] = tensor
    return known, ignored


def _canonical_name(key: str, *, shared_heads: bool) -> str:
    if key.startswith(_DECODER_ALIASES):
        key = key.removeprefix("transformer.decoder.")
    if key.startswith("bbox_embed_o2m."):
        key = key.replace("bbox_embed_o2m.", "bbox_embed.", 1)
    return _HEAD.sub(r"\1.0.\3", key) if shared_heads else key


def ours_to_published(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `published_to_ours`: the published state dict with every alias.

    Args:
        state_dict: our names -> tensors.
        config: the model they belong to. Its `one_to_many` names the implementation: `internal`
            is `ms-detr`, `output` is `ms-detr-impl-a`, `none` is the same in all four. One-stage
            `output` keeps the one-to-many heads of every decoder layer; the published class drops
            the last and then fails in its first step. Hybrid queries (`h-deformable-detr`) are
            more rows of `query_embed`, if it exists.

    Raises:
        ValueError: no published implementation has this architecture, or a name is not ours.
    """
    _require_published_architecture(config)
    return {
        key: tensor
        for name, tensor in state_dict.items()
        for key in _published_aliases(published_name(name), config)
    }


def _published_aliases(canonical: str, config: ModelConfig) -> list[str]:
    """All names under which the published model lists this tensor."""
    head = _HEAD.match(canonical)
    if head is None:
        return [canonical]
    family, layer, rest = head.groups()
    num_layers = config.num_decoder_layers
    # In two stages the last class and box head belong to the encoder.
    num_heads = num_layers + (config.two_stage and family != "class_embed_o2m")
    aliases = []
    for index in [int(layer)] if config.box_refine else range(num_heads):
        aliases.append(f"{family}.{index}.{rest}")
        if (family == "bbox_embed" and config.box_refine) or (
            family == "class_embed" and config.two_stage
        ):
            aliases.append(f"transformer.decoder.{family}.{index}.{rest}")
        if family == "bbox_embed" and config.one_to_many == "output" and index < num_layers:
            aliases.append(f"bbox_embed_o2m.{index}.{rest}")
    return aliases


def _require_published_architecture(config: ModelConfig) -> None:
    branches = {
        "internal": "cross_self",
        "output": "self_cross",
        "none": "self_cross",
    }
    if config.backbone == "convnet":
        raise ValueError("backbone convnet: the published code has ResNets only")
    if config.extra_queries == "group":
        raise ValueError("extra_queries='group': no published detector of this kind has groups")
    if config.extra_queries == "hybrid" and config.one_to_many != "none":
        raise ValueError(
            f"extra_queries='hybrid' with one_to_many={config.one_to_many!r}: the published H-DETR "
            "has no one-to-many supervision of its primary queries"
        )
    if config.proposal_score != "first_class":
        raise ValueError(
            f"proposal_score={config.proposal_score!r}: the published code ranks proposals by the "
            "first class logit"
        )
    if config.decoder_order != branches[config.one_to_many]:
        raise ValueError(
            f"decoder_order={config.decoder_order!r} with one_to_many={config.one_to_many!r} "
            "exists in no published implementation"
        )
    if config.one_to_many == "output" and (config.mixed_selection or config.look_forward_twice):
        raise ValueError(
            "the published implementation (a), one_to_many='output', has neither "
            "mixed_selection nor look_forward_twice"
        )


def load_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load our state dict into the model, all of it or nothing.

    Raises:
        ValueError: keys are missing or unexpected or have another shape; every one is listed,
            with its published name.
    """
    check_state(model, state_dict)
    model.load_state_dict(dict(state_dict), strict=True)


def check_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with those of the model, without reading values.

    Raises:
        ValueError: as `load_state`.
    """
    expected = model.state_dict()
    problems = []
    for key in sorted(expected.keys() - state_dict.keys()):
        problems.append(f"missing: {_both_names(key)}")
    for key in sorted(state_dict.keys() - expected.keys()):
        problems.append(f"unexpected: {_both_names(key)}")
    for key in sorted(expected.keys() & state_dict.keys()):
        actual, needed = tuple(state_dict[key].shape), tuple(expected[key].shape)
        if actual != needed:
            problems.append(f"shape {actual} instead of {needed}: {_both_names(key)}")
    if problems:
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))


def _both_names(our_name: str) -> str:
    name = _rename(our_name, _TO_PUBLISHED)
    return our_name if name is None else f"{our_name} (published: {name})"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Content of a published `.pth` file, converted to our names."""

    config: RunConfig
    """Configuration from its `args`, or as given by the caller."""
    state_dict: dict[str, Tensor]
    """Weights under our names, on the CPU."""
    epoch: int | None
    """The last finished epoch, counted from 0; None where the file has none."""
    ignored: dict[str, Tensor]
    """Tensors that neither model uses, under their published names."""


def load_published_checkpoint(
    path: Path,
    *,
    config: RunConfig | None = None,
    implementation: Implementation | None = None,
) -> PublishedCheckpoint:
    """Load a published checkpoint without executing any code in it.

    Args:
        path: a file with `model`, `args` and perhaps `epoch`, or a bare state dict.
        config: configuration of the weights; None derives it from `args`. The class heads set
            `num_classes` where `config` leaves it open or is derived: the published arguments do
            not hold it for custom data.
        implementation: published code that wrote `args`, see `config_from_published_args`.

    Raises:
        ValueError: the file is no checkpoint, needs objects other than tensors, plain values and
            an `argparse.Namespace`, has no `args` while `config` is None, or its arguments or
            names are not those of the published code.
        OSError: the file cannot be read.
    """
    weights, args, epoch = _read_parts(path)
    try:
        if config is None:
            if args is None:
                raise ValueError("it has no `args` to tell its architecture: give a config")
            # Its `resume` names the file that the published run itself started from.
            config = config_from_published_args(
                args, implementation=implementation, overrides={"resume": ""}
            )
            config = _with_num_classes(config, None)
        known, ignored = split_ignored(weights)
        if config.model.num_classes is None:
            config = _with_num_classes(config, _count_classes(known))
        state_dict = published_to_ours(known, config.model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if ignored:
        logger.info("%s: ignored %s", path, ", ".join(sorted(ignored)))
    return PublishedCheckpoint(config=config, state_dict=state_dict, epoch=epoch, ignored=ignored)


def _with_num_classes(config: RunConfig, num_classes: int | None) -> RunConfig:
    return replace(config, model=replace(config.model, num_classes=num_classes))


def _count_classes(published: Mapping[str, Tensor]) -> int:
    weight = published.get("class_embed.0.weight")
    if weight is None or weight.dim() != 2:
        raise ValueError("it has no class_embed.0.weight to tell the number of classes")
    return weight.shape[0]


def _read_parts(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace | None, int | None]:
    """The state dict, the arguments and the epoch of a checkpoint file."""
    content = _load_safely(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    weights, args, epoch = content, None, None
    if "model" in content:
        weights, args, epoch = content["model"], content.get("args"), content.get("epoch")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path}: holds no state dict")
    foreign = [
        str(key)
        for key, value in weights.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if foreign:
        raise ValueError(f"{path}: not tensors of a model: {', '.join(foreign)}")
    if args is not None and not isinstance(args, argparse.Namespace):
        raise ValueError(f"{path}: args is a {type(args).__name__}, not a Namespace")
    if epoch is not None and not isinstance(epoch, int):
        raise ValueError(f"{path}: epoch is {epoch!r}, not a number")
    return weights, args, epoch


def _load_safely(path: Path) -> Any:
    """`torch.load` that builds tensors, plain values and `argparse.Namespace`, nothing else."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a broken pickle fails in its own way each time
            refused = _refused_globals(path, error)
            if refused:
                raise ValueError(
                    f"{path}: refused, it needs {', '.join(refused)}: only tensors, plain values "
                    "and argparse.Namespace are read, because a checkpoint could run any code"
                ) from error
            raise ValueError(f"{path}: not a readable PyTorch checkpoint") from error


def _refused_globals(path: Path, error: Exception) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # files of the old format cannot be searched, the error names the first
        return re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
