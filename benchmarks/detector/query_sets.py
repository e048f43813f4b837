"""Self-attention of sets of queries that do not see each other.

`python -m benchmarks.detector query_sets` times its forms, forward and backward: a call per set,
sets of one size as images of the batch, and one call with a mask. Denoising queries, which see the
primary ones, have forms of their own. On a CPU the forms take turns. On a GPU a duration is device
time, by replay of a CUDA graph.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cli import require_at_least
from benchmarks.common import Row, collect_rows, environment, print_table
from benchmarks.detector.cases import NUM_CLASSES, Dtype, recipe
from benchmarks.device_time import graph_seconds, percentiles_us, time_in_turns, work_on
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import ModelConfig
from msdetr.engine.device import resolve_device
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.query_sets import QuerySet, query_sets, visible_queries

Calls = Mapping[str, Callable[[], Sequence[Tensor]]]
SetName = Literal["hybrid", "group", "dn", "contrastive"]
RECIPES: dict[SetName, str] = {
    "hybrid": "h-deformable-detr-r50",
    "group": "group-deformable-detr-r50",
    "dn": "deformable-detr-pp-r50-300+dn",
    "contrastive": "deformable-detr-pp-r50-300+cdn",
}
"""Where the sizes are from."""
TOLERANCES: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of an output or a gradient between forms, over its largest value."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the self-attention of query sets that do not see each other, forward and backward."""

    sets: tuple[SetName, ...] = ("hybrid", "group", "dn", "contrastive")
    """Beside or instead of the primary set: hybrid queries, groups, denoising queries, of the
    sizes of `RECIPES`."""
    num_slots: int = 8
    """Target slots of an image, which the groups of denoising queries have."""
    batch: int = 2
    """Images at once."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Of queries, keys and values."""
    repetitions: int = 20
    """Measured calls of each form."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after each case."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch", "repetitions", "num_slots")


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attention [P, M, Q, D] of P problems with M heads."""
    attended: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended


def both_passes(forwards: Mapping[str, Callable[[], Tensor]], inputs: Sequence[Tensor]) -> Calls:
    """Calls for the output and its gradients at the inputs."""
    upstream = torch.randn_like(inputs[0])

    def call(forward: Callable[[], Tensor]) -> Sequence[Tensor]:
        output = forward()
        return output.detach(), *torch.autograd.grad(output, inputs, upstream)

    return {name: functools.partial(call, forward) for name, forward in forwards.items()}


def forms(inputs: Sequence[Tensor], sizes: Sequence[int]) -> Calls:
    """Calls for the output and the gradients of query, key and value [B, M, Q, D], by form.

    Args:
        inputs: query, key and value.
        sizes: numbers of queries of the sets, in order.
    """
    within = torch.block_diag(*(inputs[0].new_ones(size, size) for size in sizes))
    mask = torch.zeros_like(within).masked_fill_(within == 0, -torch.inf)

    def per_set() -> Tensor:
        sets = zip(*(x.split(list(sizes), dim=2) for x in inputs), strict=True)
        return torch.cat([attend(*one) for one in sets], dim=2)

    def folded() -> Tensor:
        sets = (_groups_as_images(x, len(sizes)) for x in inputs)
        return _images_as_groups(attend(*sets), len(sizes))

    def masked() -> Tensor:
        return attend(*inputs, mask=mask)

    forwards = {"a call per set": per_set, "sets in the batch": folded, "mask": masked}
    if len(set(sizes)) > 1:
        del forwards["sets in the batch"]
    return both_passes(forwards, inputs)


def denoising_forms(inputs: Sequence[Tensor], denoising: QuerySet) -> Calls:
    """As `forms`, for a denoising set and, after it, the primary set, which it sees."""
    count, num_groups = denoising.num_queries, denoising.num_groups
    num_primary = inputs[0].shape[2] - count
    visible = visible_queries(denoising, num_primary, inputs[0].device)
    primary_sees = visible.new_ones(num_primary, count + num_primary)
    primary_sees[:, :count] = False
    visible_to_all = torch.cat((visible, primary_sees))

    def with_primary(attended: Tensor) -> Tensor:
        return torch.cat((attended, attend(*(x[:, :, count:] for x in inputs))), dim=2)

    def masked_set() -> Tensor:
        query, key, value = inputs
        return with_primary(attend(query[:, :, :count], key, value, mask=visible))

    def copied_keys() -> Tensor:
        query, *seen = (_groups_as_images(x[:, :, :count], num_groups) for x in inputs)
        primary = (x[:, :, count:].repeat_interleave(num_groups, dim=0) for x in inputs[1:])
        key, value = (torch.cat(pair, dim=2) for pair in zip(seen, primary, strict=True))
        return with_primary(_images_as_groups(attend(query, key, value), num_groups))

    def masked() -> Tensor:
        return attend(*inputs, mask=visible_to_all)

    return both_passes(
        {"mask of the set": masked_set, "keys per group": copied_keys, "mask": masked}, inputs
    )


def _groups_as_images(x: Tensor, num_groups: int) -> Tensor:
    """[B, M, G Q, D] to [B G, M, Q, D]."""
    images: Tensor = x.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(0, 1)
    return images


def _images_as_groups(x: Tensor, num_groups: int) -> Tensor:
    queries: Tensor = x.unflatten(0, (-1, num_groups)).transpose(1, 2).flatten(2, 3)
    return queries


def check_agreement(calls: Calls, tolerance: float) -> None:
    """Raise ValueError if a form computes something else than the first."""
    expected, *others = ([x.float() for x in call()] for call in calls.values())
    for name, values in zip(list(calls)[1:], others, strict=True):
        for value, exact in zip(values, expected, strict=True):
            difference = float((value - exact).abs().max() / exact.abs().max())
            if not difference < tolerance:
                raise ValueError(f"{name!r} differs from the first form by {difference:.1e}")


def sets_of(model: ModelConfig, num_slots: int) -> list[QuerySet]:
    """The sets of a recipe in training, in order."""
    sets = query_sets(model, training=True)
    if model.denoising != "none":
        sets = sets.preceded_by(DenoisingQueries(model, NUM_CLASSES).query_set(num_slots))
    return list(sets.sets)


def measure(options: Options) -> Iterator[list[Row]]:
    """The rows of each case."""
    device = resolve_device(options.device)
    for dtype, name in ((dtype, name) for dtype in options.dtypes for name in options.sets):
        model = recipe(RECIPES[name]).model
        sets = sets_of(model, options.num_slots)
        sizes = [(one.num_groups, one.group_size) for one in sets]
        total = sum(one.num_queries for one in sets)
        shape = (options.batch, total, model.num_heads, model.hidden_dim // model.num_heads)
        with work_on(device):
            # Heads second, as a view: the model splits the channels of a query.
            inputs = [
                torch.randn(shape, dtype=getattr(torch, dtype), device=device)
                .transpose(1, 2)
                .requires_grad_()
                for _ in range(3)
            ]
            if sets[0].sees_primary:
                calls = denoising_forms(inputs, sets[0])
            else:
                calls = forms(
                    inputs, [size for num_groups, size in sizes for _ in range(num_groups)]
                )
            check_agreement(calls, TOLERANCES[dtype])
            if device.type == "cuda":
                repeat = functools.partial(graph_seconds, replays=options.repetitions)
                durations = {form: repeat([call]) for form, call in calls.items()}
            else:
                durations = time_in_turns(calls, device, options.repetitions)
        fastest = min(map(statistics.median, durations.values()))
        yield [
            {
                "benchmark": "query_sets",
                "extra_queries": name,
                "sets": "+".join(f"{n}x{size}" if n > 1 else f"{size}" for n, size in sizes),
                "dtype": dtype,
                "batch": options.batch,
                "form": form,
                **percentiles_us(seconds),
                "over_fastest": statistics.median(seconds) / fastest,
                "repetitions": len(seconds),
                **environment(device),
            }
            for form, seconds in durations.items()
        ]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector query_sets")
        rows = collect_rows(measure(options), options.output)
    print_table(rows, "sets dtype batch form p20_us:.0f p50_us:.0f p80_us:.0f over_fastest:.2f")
    return 0
