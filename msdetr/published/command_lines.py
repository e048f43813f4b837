"""The published command lines, and which one arguments belong to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Literal

from msdetr.published import deformable_flags, dino_flags, dn_detr_flags
from msdetr.published.flag import PublishedFlag

Implementation = Literal[
    "ms-detr",
    "ms-detr-impl-a",
    "deformable-detr",
    "h-deformable-detr",
    "dn-dab-deformable-detr",
    "dino",
    "deta",
]

PUBLISHED_FLAGS: dict[Implementation, dict[str, PublishedFlag]] = {
    "ms-detr": deformable_flags.MS_DETR,
    "ms-detr-impl-a": deformable_flags.MS_DETR_IMPL_A,
    "deformable-detr": deformable_flags.DEFORMABLE_DETR,
    "h-deformable-detr": deformable_flags.H_DEFORMABLE_DETR,
    "dn-dab-deformable-detr": dn_detr_flags.DN_DETR,
    "dino": dino_flags.DINO,
    "deta": deformable_flags.DETA,
}
"""The options of each published command line, by attribute name."""

PUBLISHED_NUM_PROCESSES: dict[Implementation, int] = {
    "ms-detr": 8,
    "ms-detr-impl-a": 8,
    "deformable-detr": 16,
    "h-deformable-detr": 8,
    "dn-dab-deformable-detr": 8,
    "dino": 8,
    "deta": 8,
}
"""Processes of the published recipes: batch 32 for Deformable-DETR, 16 for the others."""


RUNTIME_ATTRIBUTES = frozenset(
    {
        "distributed",
        "dist_backend",
        "dist_url",
        "gpu",
        "local_rank",
        "options",  # DINO has merged them into the other arguments
        "override_resumed_lr_drop",
        "rank",
        "world_size",
    }
)
"""Attributes that the published code adds to its arguments at run time."""


def _only_of(implementation: Implementation) -> set[str]:
    others = [flags for owner, flags in PUBLISHED_FLAGS.items() if owner != implementation]
    return set(PUBLISHED_FLAGS[implementation]).difference(RUNTIME_ATTRIBUTES, *others)


_DISTINCTIVE: tuple[tuple[Implementation, set[str]], ...] = (
    ("dino", _only_of("dino")),
    ("dn-dab-deformable-detr", _only_of("dn-dab-deformable-detr")),
    ("deta", _only_of("deta")),
    ("h-deformable-detr", set(deformable_flags.HYBRID_FLAGS)),
    ("ms-detr", set(deformable_flags.MAIN_TREE_FLAGS)),
    ("ms-detr-impl-a", set(deformable_flags.ONE_TO_MANY_FLAGS)),
)
"""The first with one of its options among the arguments is their command line."""


def infer_implementation(args: argparse.Namespace | Mapping[str, object]) -> Implementation:
    """The command line of these arguments, inferred from the options that only it has."""
    names = set(vars(args) if isinstance(args, argparse.Namespace) else args)
    for implementation, distinctive in _DISTINCTIVE:
        if names & distinctive:
            return implementation
    return "deformable-detr"
