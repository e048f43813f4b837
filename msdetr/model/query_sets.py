"""Sets of queries that run through the decoder side by side, with the same weights.

The primary set is the one that infers. Other sets exist in training only. A set consists of groups
of equal size. In self-attention a query sees the queries of its own group. Denoising queries see
those that infer, too; no other query sees a second group or set.

- `extra_queries: hybrid` (H-DETR, arXiv:2207.13080): a set of its own size behind the primary one.
- `extra_queries: group` (Group DETR, arXiv:2207.13085): the primary set has several groups. The
  first one infers.
- `denoising` (DN-DETR, arXiv:2203.01305): a set before the primary one, whose size depends on the
  targets of the batch; see `msdetr.model.denoising`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msdetr.config import ModelConfig


class QuerySet(NamedTuple):
    """Queries that are adjacent in the decoder's input."""

    branch: str
    """Branch of the detector's output that holds the predictions of the decoder's layers."""
    group_size: int
    """Queries of one group."""
    num_groups: int = 1
    sees_primary: bool = False
    """Whether its queries attend to the first group of the primary set, too."""

    @property
    def num_queries(self) -> int:
        """Queries of all groups."""
        return self.group_size * self.num_groups


class QuerySets(NamedTuple):
    """All sets, in the order of their queries."""

    sets: tuple[QuerySet, ...]
    primary_index: int = 0
    """Place of the primary set among `sets`."""

    @property
    def primary(self) -> QuerySet:
        """The set that infers."""
        return self.sets[self.primary_index]

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

    def of_primary(self, x: Tensor) -> Tensor:
        """[B, Q, ...] of all sets to a view [B, Q of the set, ...] of the primary one."""
        return self.split(x)[self.primary_index]

    def preceded_by(self, query_set: QuerySet) -> QuerySets:
        """These sets with one more before them."""
        return QuerySets((query_set, *self.sets), self.primary_index + 1)


def visible_queries(query_set: QuerySet, num_primary: int, device: torch.device) -> Tensor:
    """What the queries of a set with `sees_primary` attend to.

    Returns:
        [Q, Q + num_primary] bool, True where a query of the set sees a query of the set, and, after
        those, one of the primary queries.
    """
    group = torch.arange(query_set.num_queries, device=device) // query_set.group_size
    own = group[:, None] == group
    return torch.cat((own, own.new_ones(len(own), num_primary)), dim=1)


def query_sets(config: ModelConfig, *, training: bool) -> QuerySets:
    """The sets of a configuration without denoising queries, in training or in inference."""
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
