"""Names of parameters: ours, and those of the published models.

The published models list tensors under several names: the decoder registers the box heads (and in
two stages the class heads) a second time. Implementation (a) registers its box heads a third time.
Layers that share a head list it once per layer. Our model lists each tensor once. The canonical
name of a tensor is its published name without `transformer.decoder.` (of heads) and with the lowest
layer. The published code trains it under that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from msdetr.config import ModelConfig
from msdetr.model.checkpoint_adapter.architectures import (
    PublishedModel,
    published_model,
    require_published_architecture,
)

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
    ("query_selection.anchors", "refpoint_embed"),
    ("query_selection.reference_points", "transformer.reference_points"),
    ("query_selection.enc_output", "transformer.enc_output"),
    ("query_selection.enc_output_norm", "transformer.enc_output_norm"),
    ("query_selection.pos_trans", "transformer.pos_trans"),
    ("query_selection.pos_trans_norm", "transformer.pos_trans_norm"),
    ("query_selection.pix_trans", "transformer.pix_trans"),
    ("query_selection.pix_trans_norm", "transformer.pix_trans_norm"),
    ("decoder.norm", "transformer.decoder.norm"),
    ("decoder.query_position.ref_point_head", "transformer.decoder.ref_point_head"),
    ("decoder.query_position.query_scale", "transformer.decoder.query_scale"),
    ("denoising.label_embed", "label_enc"),
    ("heads.class_embed", "class_embed"),
    ("heads.bbox_embed", "bbox_embed"),
    ("heads.one_to_many_class_embed", "class_embed_o2m"),
)

_QUERY_EMBED = "query_selection.query_embed"
_PUBLISHED_QUERY_EMBED: dict[PublishedModel, str] = {
    "deformable-detr": "query_embed",
    "deta": "query_embed",
    "dn-dab-deformable-detr": "tgt_embed",
    "dino": "transformer.tgt_embed",
}

_LABEL_EMBED = "label_enc.weight"
_DECODER_ALIASES = ("transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.")
_HEAD = re.compile(r"^(class_embed|bbox_embed|class_embed_o2m)\.(\d+)\.(.+)$")
_ENCODER_HEAD = re.compile(r"^transformer\.enc_out_(class_embed|bbox_embed)\.(.+)$")
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
_TO_OURS = _renamings(
    tuple((published, ours) for ours, published in _MODULE_NAMES)
    + tuple((published, _QUERY_EMBED) for published in set(_PUBLISHED_QUERY_EMBED.values()))
)


def _rename(name: str, renamings: tuple[_Renaming, ...]) -> str | None:
    for pattern, target in renamings:
        renamed, count = pattern.subn(target, name)
        if count:
            return renamed
    return None


def published_name(our_name: str, config: ModelConfig | None = None) -> str:
    """The canonical published name of one of our parameters or buffers.

    Args:
        our_name: the parameter or buffer.
        config: the model it belongs to; None is one of Deformable-DETR's kind.

    Raises:
        ValueError: the published model has nothing of this kind.
    """
    name = _without_aliases(our_name, config)
    return name if config is None else _published_aliases(name, config)[0]


def _without_aliases(our_name: str, config: ModelConfig | None) -> str:
    """The published name of one of our tensors; of heads, with our index as the layer."""
    if our_name.startswith(_QUERY_EMBED + "."):
        model = "deformable-detr" if config is None else published_model(config)
        return _PUBLISHED_QUERY_EMBED[model] + our_name.removeprefix(_QUERY_EMBED)
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
        config: the model they belong to; it decides which layers share their heads.

    Raises:
        ValueError: names that no published model has, or two names of one tensor with
            different values.
    """
    known, _ = split_ignored(state_dict, config)
    converted: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unexpected = []
    for key, tensor in known.items():
        name = _rename(_canonical_name(key, config), _TO_OURS)
        if name is None:
            unexpected.append(key)
        elif name not in converted:
            converted[name], origin[name] = tensor, key
        elif not torch.equal(converted[name], tensor):
            raise ValueError(
                f"{origin[name]} and {key} are one tensor in a published model with "
                f"box_refine={config.box_refine} and head_sharing={config.head_sharing!r}, but "
                "differ here"
            )
    if unexpected:
        raise ValueError(f"not names of a published model: {', '.join(sorted(unexpected))}")
    return converted


def split_ignored(
    state_dict: Mapping[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Drop the prefix `module.` and set apart what the model of `config` does not use.

    These are counters, and without denoising the label embedding, which DINO has in any case.

    Returns:
        The tensors of the model, and the ignored ones, both by published name.
    """
    has_unused_labels = published_model(config) == "dino" and config.denoising == "none"
    prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
    known: dict[str, Tensor] = {}
    ignored: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        unused = name.endswith(_IGNORED_SUFFIXES) or (has_unused_labels and name == _LABEL_EMBED)
        (ignored if unused else known)[name] = tensor
    return known, ignored


def _canonical_name(key: str, config: ModelConfig) -> str:
    """The published name of our tensor: heads by their index in `DetectionHeads`."""
    if key.startswith(_DECODER_ALIASES):
        key = key.removeprefix("transformer.decoder.")
    if key.startswith("bbox_embed_o2m."):
        key = key.replace("bbox_embed_o2m.", "bbox_embed.", 1)
    key = _ENCODER_HEAD.sub(rf"\1.{config.num_decoder_layers}.\2", key)
    return _HEAD.sub(lambda head: f"{head[1]}.{_our_head(int(head[2]), config)}.{head[3]}", key)


def _our_head(layer: int, config: ModelConfig) -> int:
    """Our index of the head of a layer; `num_decoder_layers` is the encoder."""
    sharing = config.shared_heads
    if sharing == "decoder":
        return int(layer == config.num_decoder_layers)
    return layer if sharing == "none" else 0


def ours_to_published(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `published_to_ours`: the published state dict with every alias.

    Args:
        state_dict: our names -> tensors.
        config: the model they belong to; it tells the published model, see `published_model`. Of
            Deformable-DETR's kind, `one_to_many` names the implementation: `internal` is `ms-detr`,
            `output` is `ms-detr-impl-a`, `none` is the same in all four. One-stage `output` keeps
            the one-to-many heads of every decoder layer; the published class drops the last and
            then fails in its first step. Hybrid queries (`h-deformable-detr`) are more rows of
            `query_embed`, if it exists. DINO without denoising gets a label embedding of zeros:
            the published model has one and does not use it.

    Raises:
        ValueError: no published implementation has this architecture, or a name is not ours.
    """
    require_published_architecture(config)
    published = {
        key: tensor
        for name, tensor in state_dict.items()
        for key in _published_aliases(_without_aliases(name, config), config)
    }
    if published_model(config) == "dino" and config.denoising == "none":
        published |= _unused_label_embed(published, config)
    return published


def _unused_label_embed(published: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    head = published.get("class_embed.0.weight")
    if head is None:
        return {}
    rows = config.denoising_label_rows or len(head) + 1
    return {_LABEL_EMBED: head.new_zeros(rows, config.hidden_dim)}


def _published_aliases(name: str, config: ModelConfig) -> list[str]:
    """All published names of a tensor, the canonical one first.

    Args:
        name: see `_without_aliases`.
        config: the model it belongs to.
    """
    head = _HEAD.match(name)
    if head is None:
        return [name]
    family, index, rest = head.groups()
    num_layers = config.num_decoder_layers
    # In two stages the last class and box head belong to the encoder.
    num_heads = num_layers + (config.two_stage and family != "class_embed_o2m")
    is_dino = published_model(config) == "dino"
    aliases = []
    for layer in range(num_heads):
        if _our_head(layer, config) != int(index):
            continue
        if is_dino and layer == num_layers:
            aliases.append(f"transformer.enc_out_{family}.{rest}")
            continue
        aliases.append(f"{family}.{layer}.{rest}")
        if (family == "bbox_embed" and config.box_refine) or (
            family == "class_embed" and config.two_stage
        ):
            aliases.append(f"transformer.decoder.{family}.{layer}.{rest}")
        if family == "bbox_embed" and config.one_to_many == "output" and layer < num_layers:
            aliases.append(f"bbox_embed_o2m.{layer}.{rest}")
    if not aliases:
        raise ValueError(f"{name}: the published model has no head of this index")
    return aliases
