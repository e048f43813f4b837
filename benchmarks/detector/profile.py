"""Where the time of a training step goes: `python -m benchmarks.detector profile`.

Kernels, fills and copies of the GPU by name, the longest first. On a CPU the operators of torch,
without those that they call. The trace opens in https://ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.cli import require_at_least
from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.detector.cases import Case
from benchmarks.detector.comparison import Setup
from benchmarks.detector.train import OurStep
from benchmarks.launches import device_events
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device


@dataclass(frozen=True, kw_only=True)
class Options(Case):
    """Profile a training step."""

    implementation: Literal["eager", "compiled", "compiled-graphs"] = "eager"
    """How the step runs."""
    warmup: int = 3
    """Steps before the profiled ones."""
    steps: int = 3
    """Profiled steps."""
    top: int = 40
    """Kernels to print."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows of all kernels."""
    trace: Path | None = None
    """File for the trace, `.json` or `.json.gz`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "warmup", "steps", "top")


def profile_step(options: Options, device: torch.device) -> torch.profiler.profile:
    """The profile of the steps."""
    step = OurStep(Setup(options.implementation, options, device, None, Path("no weights")))
    step.run(options.warmup)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    with profile:
        step.run(options.steps)
    return profile


def kernel_rows(profile: torch.profiler.profile, device: torch.device, steps: int) -> list[Row]:
    """A row per kernel, the longest first; on a CPU per operator."""
    if device.type == "cuda":
        events = [(event.name, event.time_range.elapsed_us()) for event in device_events(profile)]
    else:
        events = [(event.name, event.self_cpu_time_total) for event in profile.events()]
    durations: dict[str, list[float]] = {}
    for name, duration in events:
        durations.setdefault(name, []).append(duration)
    total = sum(duration for _, duration in events)
    rows = [
        {
            "kernel": name,
            "launches": len(each) / steps,
            "us": sum(each) / steps,
            "share": sum(each) / total,
        }
        for name, each in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def main(arguments: Sequence[str]) -> int:
    """Profile, print and write; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector profile")
        device = resolve_device(options.device)
        profile = profile_step(options, device)
    rows = kernel_rows(profile, device, options.steps)
    case = {name: asdict(options)[name] for name in ("preset", "implementation", "dtype", "batch")}
    common = {"benchmark": "profile", **case, "height": options.height, "width": options.width}
    where = environment(device)
    if options.output is not None:
        write_rows(options.output, [{**common, **row, **where} for row in rows])
    if options.trace is not None:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(options.trace))
    print_table(
        [{**row, "kernel": row["kernel"][:80]} for row in rows[: options.top]],
        "us:.1f share:.3f launches:.1f kernel",
    )
    return 0
