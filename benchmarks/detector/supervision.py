"""What each supervision costs: `python -m benchmarks.detector supervision`.

A training step of several recipes, each against the first one, the baseline. On a CPU a recipe and
the baseline take turns step by step, so that other load on the machine affects both. They do so
pair by pair, because all recipes at once exceed the memory of a small machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cli import require_at_least
from benchmarks.common import Row, collect_rows, print_table
from benchmarks.detector.cases import Case
from benchmarks.detector.comparison import ComparisonOptions, Member, measure_groups
from benchmarks.detector.implementations import Implementation, choose_implementations
from benchmarks.detector.train import PHASES, build_step
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device

MAX_TIME_OVER_BASELINE = {"ms-detr-pp-r50-300": 1.06}
"""For `--check`, by preset."""


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time a training step of several recipes against the first one."""

    presets: tuple[str, ...] = (
        "deformable-detr-pp-r50-300",
        "ms-detr-pp-r50-300",
        "h-deformable-detr-r50",
        "group-deformable-detr-r50",
        "ms-h-deformable-detr-r50",
        "ms-group-deformable-detr-r50",
    )
    """The baseline, and recipes to compare with it."""
    implementations: tuple[Implementation, ...] = ("eager",)
    """Implementations of both."""
    warmup: int = 1
    """Steps before the measured ones; a step is captured after two."""
    steps: int = 5
    """Measured steps of each recipe."""
    check: bool = False
    """Exit with 1 unless one-to-many supervision costs at most 6 % of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "steps")
        if len(set(self.presets)) < max(2, len(self.presets)):
            raise ValueError("presets: give a baseline, and others to compare with it")


def groups_of(cases: Sequence[Case], names: Sequence[Implementation]) -> list[list[Member]]:
    """The cases of each batch, precision and implementation, in order."""
    where = dict.fromkeys((case.batch, case.dtype) for case in cases)
    return [
        [(name, case) for case in cases if (case.batch, case.dtype) == shared]
        for name in names
        for shared in where
    ]


def pairs(groups: Iterable[Sequence[Member]]) -> list[list[Member]]:
    """The first of a group with each of the others."""
    return [[first, other] for first, *others in groups for other in others]


def over_baseline(rows: Iterable[Row], baseline: str) -> Iterator[Row]:
    """Rows with `time_over_baseline`, against the baseline's latest; the baseline's first one only.

    Args:
        rows: in the order of measurement. One without a baseline before it gets None.
        baseline: its preset.
    """
    latest: dict[tuple[object, ...], float] = {}
    for row in rows:
        case = tuple(row[name] for name in ("implementation", "dtype", "batch"))
        known = case in latest
        if row["preset"] == baseline:
            latest[case] = row["seconds_p50"]
            if known:
                continue
        ratio = row["seconds_p50"] / latest[case] if case in latest else None
        yield {**row, "benchmark": "supervision", "baseline": baseline, "time_over_baseline": ratio}


def too_slow(rows: Iterable[Row]) -> list[str]:
    """The limits that no row proves, or that a row exceeds."""
    slow = []
    for preset, limit in MAX_TIME_OVER_BASELINE.items():
        ratios = [row["time_over_baseline"] for row in rows if row["preset"] == preset]
        if not ratios or None in ratios:
            slow.append(f"{preset} was not compared with the baseline")
        elif max(ratios) > limit:
            slow.append(f"{preset} takes {max(ratios):.3f} of the baseline's time, not {limit:g}")
    return slow


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if `--check` fails."""
    with user_errors():
        options = parse_options(
            Options, arguments, prog="python -m benchmarks.detector supervision"
        )
        device = resolve_device(options.device)
        names = choose_implementations(options.implementations, device, options.published)
        groups = groups_of(options.cases, names)
        measured = measure_groups(
            pairs(groups) if device.type == "cpu" else groups,
            device,
            options,
            build_step,
            phases=PHASES,
            repetitions=options.steps,
        )
        rows = over_baseline(measured, options.presets[0])
        results = collect_rows(([row] for row in rows), options.output)
    print_table(
        results,
        "preset implementation dtype batch seconds_p50:.3f time_over_baseline:.3f "
        "forward_seconds:.3f criterion_seconds:.3f backward_seconds:.3f peak_memory_mb:.0f",
    )
    failures = too_slow(results) if options.check else []
    for failure in failures:
        print(f"too slow: {failure}")
    return 1 if failures else 0
