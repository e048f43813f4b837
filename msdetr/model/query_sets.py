"""Sets of queries that run through the decoder side by side, with the same weights.

The primary set is the one that infers. Other sets exist in training only. A set consists of groups
of equal size. In self-attention a query sees the queries of its own group and no others: groups and
sets are separate problems, and no mask is needed.

- `none`: the primary set, one group.
- `hybrid` (H-DETR, arXiv:2207.13080): a second set of its own size.
- `group` (Group DETR, arXiv:2207.13085): the primary set has several groups. The first one infers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from msdetr.config import ModelConfig
from msdetr.structures import split_groups


class QuerySet(NamedTuple):
    """Queries that are adjacent in the decoder's input."""

    branch: str
    """Branch of the detector's output that holds the predictions of the decoder's layers."""
    group_size: int
    """Queries of one group."""
    num_groups: int = 1

    @property
    def num_queries(self) -> int:
        """Queries of all groups."""
        return self.group_size * self.num_groups


class QuerySets(NamedTuple):
    """All sets, in the order of their queries. The primary set is the first."""

    sets: tuple[QuerySet, ...]

    @property
    def primary(self) -> QuerySet:
        """The set that infers."""
        return self.sets[0]

    @property
    def num_queries(self) -> int:
        """Queries of all sets."""
        return sum(query_set.num_queries for query_set in self.sets)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, Q, ...] of all sets to a view [B, Q of the set, ...] of each."""
        if len(self.sets) == 1:
            return (x,)
        parts: tuple[Tensor, ...] = x.split([part.num_queries for part in self.sets], dim=1)
        return parts

    def split_groups(self, x: Tensor) -> list[Tensor]:
        """[B, Q, ...] of all sets to [B * groups, group size, ...] of each, image-major."""
        return [
            split_groups(part, query_set.num_groups, dim=1)
            for query_set, part in zip(self.sets, self.split(x), strict=True)
        ]


def query_sets(config: ModelConfig, *, training: bool) -> QuerySets:
    """The sets of a configuration, in training or in inference."""
    num_groups = 1
    if training and config.extra_queries == "group":
        num_groups = config.num_groups
    sets = [QuerySet("one_to_one", config.num_queries, num_groups)]
    if training and config.extra_queries == "hybrid":
        sets.append(QuerySet("hybrid", config.num_hybrid_queries))
    return QuerySets(tuple(sets))


def num_encoder_groups(config: ModelConfig) -> int:
    """Groups that select proposals of the encoder, each with a projection and heads of its own."""
    if not config.two_stage:
        return 0
    return query_sets(config, training=True).primary.num_groups
