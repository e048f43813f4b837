"""Loss terms under the names of the published code."""

from __future__ import annotations

from msdetr.losses.criterion import LossOutput

_TERMS = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
_BRANCHES = {"one_to_one": "", "one_to_many": "_o2m", "encoder": "_enc"}


def by_published_name(losses: LossOutput) -> dict[str, float]:
    """`loss_ce_0`, ..., `loss_ce` (last layer), `loss_ce_0_o2m`, ..., `loss_ce_enc`."""
    named = {}
    for name, values in losses.terms.items():
        branch, term = name.split("/")
        for layer, value in enumerate(values.tolist()):
            index = "" if layer == len(values) - 1 else f"_{layer}"
            named[f"{_TERMS[term]}{index}{_BRANCHES[branch]}"] = value
    return named
