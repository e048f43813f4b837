"""Non-maximum suppression of many problems: `python -m benchmarks.nms`.

`msdetr` is the kernel, on a GPU only, and `torchvision` the reference of the op, a call per
problem. They take turns, and must keep the same boxes. Durations are from the call to its end on
the device. `device_us`, on a GPU, is the kernel's, by replay of a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.cli import require_at_least
from benchmarks.common import Row, collect_rows, environment, print_table
from benchmarks.device_time import Call, graph_seconds, percentiles_us, time_in_turns, work_on
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device
from msdetr.ops.nms import nms_mask

_COLUMNS = (
    "implementation problems boxes kept:.3f iou_threshold p20_us:.0f p50_us:.0f p80_us:.0f "
    "device_us:.1f equal"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time non-maximum suppression: the kernel and torchvision's."""

    problems: tuple[int, ...] = (10, 80)
    """Problems of a call: images times levels."""
    boxes: tuple[int, ...] = (1000,)
    """Boxes of a problem."""
    iou_threshold: float = 0.9
    """Of suppression; DETA's proposals have 0.9."""
    repetitions: int = 20
    """Durations taken of each call."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "problems", "boxes")
        require_at_least(self, 2, "repetitions")


def make_boxes(problems: int, boxes: int, seed: int = 0) -> Tensor:
    """[P, n, 4] corners; half of the boxes lie near another one, closer or less close."""
    generator = torch.Generator().manual_seed(seed)
    shape = (problems, boxes)
    rand = functools.partial(torch.rand, generator=generator)
    corner, size = rand(*shape, 2), 0.05 + 0.25 * rand(*shape, 2)
    corners = torch.cat((corner, corner + size), dim=-1)
    noise = 0.02 * rand(*shape, 1) * torch.randn(*shape, 4, generator=generator)
    return torch.where(rand(*shape, 1) < 0.5, corners.roll(boxes // 2, dims=1) + noise, corners)


def measure(options: Options) -> Iterator[list[Row]]:
    """The rows of each case."""
    device = resolve_device(options.device)
    with work_on(device):
        for problems, count in itertools.product(options.problems, options.boxes):
            boxes = make_boxes(problems, count).to(device)
            suppress = functools.partial(nms_mask, boxes, iou_threshold=options.iou_threshold)
            calls: dict[str, Call] = {"torchvision": functools.partial(suppress, impl="reference")}
            if device.type == "cuda":
                calls["msdetr"] = functools.partial(suppress, impl="triton")
            expected = suppress(impl="reference")
            equal = torch.equal(suppress(), expected)
            durations = time_in_turns(calls, device, options.repetitions)
            yield [
                {
                    "benchmark": "nms",
                    "implementation": name,
                    "problems": problems,
                    "boxes": count,
                    "iou_threshold": options.iou_threshold,
                    "kept": expected.float().mean().item(),
                    **percentiles_us(durations[name]),
                    "device_us": _device_us(call) if name == "msdetr" else None,
                    "equal": equal,
                    "repetitions": options.repetitions,
                    **environment(device),
                }
                for name, call in calls.items()
            ]


def _device_us(call: Call) -> float:
    return statistics.median(graph_seconds([call], replays=10)) * 1e6


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if the kernel keeps other boxes."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.nms")
        rows = collect_rows(measure(options), options.output)
    print_table(rows, _COLUMNS)
    return 0 if all(row["equal"] for row in rows) else 1
