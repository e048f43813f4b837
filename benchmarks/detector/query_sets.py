"""Self-attention of sets of queries that do not see each other.

`python -m benchmarks.detector query_sets` times its forms, forward and backward: a call per set,
sets of one size as images of the batch, and one call with a mask. On a CPU the forms take turns. On
a GPU a duration is device time, by replay of a CUDA graph.
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
from benchmarks.detector.cases import Dtype
from benchmarks.device_time import graph_seconds, percentiles_us, time_in_turns, work_on
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import ModelConfig
from msdetr.engine.device import resolve_device

Calls = Mapping[str, Callable[[], Sequence[Tensor]]]
TOLERANCES: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of an output or a gradient between forms, over its largest value."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the self-attention of query sets that do not see each other, forward and backward."""

    sets: tuple[Literal["hybrid", "group"], ...] = ("hybrid", "group")
    """A hybrid set beside the primary one, or groups, of the default sizes."""
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
        require_at_least(self, 1, "batch", "repetitions")


def forms(inputs: Sequence[Tensor], sizes: Sequence[int]) -> Calls:
    """Calls for the output and the gradients of query, key and value [B, M, Q, D], by form.

    Args:
        inputs: query, key and value.
        sizes: numbers of queries of the sets, in order.
    """
    within = torch.block_diag(*(inputs[0].new_ones(size, size) for size in sizes))
    mask = torch.zeros_like(within).masked_fill_(within == 0, -torch.inf)
    upstream = torch.randn_like(inputs[0])

    def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
        attended: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended

    def per_set() -> Tensor:
        sets = zip(*(x.split(list(sizes), dim=2) for x in inputs), strict=True)
        return torch.cat([attend(*one) for one in sets], dim=2)

    def folded() -> Tensor:
        sets = (x.unflatten(2, (len(sizes), -1)).transpose(1, 2).flatten(0, 1) for x in inputs)
        attended = torch.unflatten(attend(*sets), 0, (-1, len(sizes)))
        return attended.transpose(1, 2).flatten(2, 3)

    def masked() -> Tensor:
        return attend(*inputs, mask=mask)

    def both_passes(forward: Callable[[], Tensor]) -> Sequence[Tensor]:
        output = forward()
        return output.detach(), *torch.autograd.grad(output, inputs, upstream)

    forwards = {"a call per set": per_set, "sets in the batch": folded, "mask": masked}
    if len(set(sizes)) > 1:
        del forwards["sets in the batch"]
    return {name: functools.partial(both_passes, forward) for name, forward in forwards.items()}


def check_agreement(calls: Calls, tolerance: float) -> None:
    """Raise ValueError if a form computes something else than the first."""
    expected, *others = ([x.float() for x in call()] for call in calls.values())
    for name, values in zip(list(calls)[1:], others, strict=True):
        for value, exact in zip(values, expected, strict=True):
            difference = float((value - exact).abs().max() / exact.abs().max())
            if not difference < tolerance:
                raise ValueError(f"{name!r} differs from the first form by {difference:.1e}")


def measure(options: Options) -> Iterator[list[Row]]:
    """The rows of each case."""
    device, model = resolve_device(options.device), ModelConfig()
    channels, count = model.hidden_dim // model.num_heads, model.num_queries
    sizes_of = {"hybrid": (count, model.num_hybrid_queries), "group": (count,) * model.num_groups}
    for dtype, name in ((dtype, name) for dtype in options.dtypes for name in options.sets):
        sizes = sizes_of[name]
        shape = (options.batch, sum(sizes), model.num_heads, channels)
        with work_on(device):
            # Heads second, as a view: the model splits the channels of a query.
            inputs = [
                torch.randn(shape, dtype=getattr(torch, dtype), device=device)
                .transpose(1, 2)
                .requires_grad_()
                for _ in range(3)
            ]
            calls = forms(inputs, sizes)
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
                "sets": "+".join(map(str, sizes)) if name == "hybrid" else f"{len(sizes)}x{count}",
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
