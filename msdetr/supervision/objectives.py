"""The objectives of a configuration: a list of branches with their matchers and loss weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.supervision.losses import loss_weights
from msdetr.supervision.matchers import (
    FixedPairs,
    Matcher,
    decoder_matcher,
    encoder_matcher,
    hybrid_matcher,
    one_to_many_matcher,
    one_to_one_matcher,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Supervision of one branch of the detector's output."""

    branch: str
    """Key of `DetectorOutput.branches`."""
    matcher: Matcher
    """Assigns the branch's queries to targets."""
    weights: Mapping[str, float]
    """Weight of each loss term, by its name in `msdetr.supervision.losses.LOSS_TERMS`."""
    targets_repeated: int = 1
    """Losses are divided by this many times the number of targets (H-DETR, whose targets are
    repeated)."""
    sum_groups: bool = False
    """Add up the losses of the branch's groups instead of averaging them."""
    per_process: bool = False
    """Losses are divided by the targets of this process instead of the mean over processes
    (DN-DETR)."""
    needs_targets: bool = False
    """No loss in a step without any target (DINO, whose queries would all learn background). The
    losses of a group are divided by at least 1."""
    last_layer_only: bool = False
    """Supervise the last layer of the branch instead of all layers."""

    @property
    def layers(self) -> slice:
        """The supervised layers of the branch."""
        return slice(-1, None) if self.last_layer_only else slice(None)


def build_objectives(assignment: AssignmentConfig, loss: LossConfig) -> tuple[Objective, ...]:
    """All objectives, in the order in which they are computed and logged.

    A matcher may read the assignments of the objectives before its own. An objective whose branch
    the detector does not have is skipped.
    """
    matchers = {
        "one_to_one": decoder_matcher(assignment),
        "one_to_many": one_to_many_matcher(assignment),
        "hybrid": hybrid_matcher(assignment),
        "denoising": FixedPairs(),
        "contrastive": FixedPairs(),
        "encoder": encoder_matcher(assignment),
        "encoder_selected": one_to_one_matcher(assignment),
    }
    weights = {"contrastive": "denoising", "encoder_selected": "encoder"}
    return tuple(
        Objective(
            branch=branch,
            matcher=matcher,
            weights=loss_weights(loss, weights.get(branch, branch)),
            targets_repeated=assignment.hybrid_k if branch == "hybrid" else 1,
            sum_groups=loss.sum_group_losses and branch not in ("denoising", "contrastive"),
            per_process=branch == "denoising",
            needs_targets=branch == "contrastive",
            last_layer_only=not loss.auxiliary,
        )
        for branch, matcher in matchers.items()
    )
