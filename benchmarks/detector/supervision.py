"""What each supervision costs: `python -m benchmarks.detector supervision`.

A training step of several recipes, each against the first one, the baseline. On a CPU a recipe and
the baseline take turns step by step, so that other load on the machine affects both. They do so
pair by pair, because all recipes at once exceed the memory of a small machine.

A run may measure some of the recipes, and `--merge` keeps the stored rows of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cli import require_at_least
from benchmarks.common import Row, environment, print_table, read_rows, write_rows
from benchmarks.detector.cases import Case
from benchmarks.detector.comparison import ComparisonOptions, Member, measure_groups
from benchmarks.detector.implementations import Implementation, choose_implementations
from benchmarks.detector.train import PHASES, build_step
from benchmarks.processes import Worker
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device

MAX_TIME_OVER_BASELINE = {"ms-detr-pp-r50-300": 1.06}
"""For `--check`, by preset."""
_CASE = ("preset", "implementation", "dtype", "batch", "height", "width")
_MACHINE = ("baseline", "device", "driver", "torch", "triton", "threads")
"""What rows of one file have in common."""


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
        "deformable-detr-pp-r50-300+dn",
        "deformable-detr-pp-r50-300+cdn",
        "ms-dn-deformable-detr-r50",
        "ms-cdn-deformable-detr-r50",
        "dn-deformable-detr-r50",
        "dino-r50-4scale",
        "deta-r50",
    )
    """The baseline, and recipes to compare with it."""
    implementations: tuple[Implementation, ...] = ("eager",)
    """Implementations of both."""
    warmup: int = 1
    """Steps before the measured ones; a step is captured after two."""
    steps: int = 5
    """Measured steps of each recipe."""
    merge: bool = False
    """Keep the rows in `output` of recipes that this run does not measure."""
    check: bool = False
    """Exit with 1 unless one-to-many supervision costs at most 6 % of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "steps")
        if self.merge and self.output is None:
            raise ValueError("merge keeps rows of a file: give it by --output")
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
    """Rows with the time of the baseline's latest row; the baseline's first one only.

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
        seconds = latest.get(case)
        yield {
            **row,
            "benchmark": "supervision",
            "baseline": baseline,
            "baseline_seconds_p50": seconds,
            "time_over_baseline": seconds and row["seconds_p50"] / seconds,
        }


def check_comparable(rows: Iterable[Row]) -> None:
    """Raise ValueError if rows have different baselines, machines or versions."""
    rows = list(rows)
    for name in _MACHINE:
        known = sorted({str(row.get(name)) for row in rows})
        if len(known) > 1:
            raise ValueError(f"rows cannot be merged: {name} is {' and '.join(known)}")


def merged(stored: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Stored rows of recipes that were not measured again, and the rows of this run.

    A baseline stays with the rows that were compared with it. Runs of one commit share a row.
    """

    def values(row: Row, *names: str) -> tuple[object, ...]:
        return tuple(row.get(name) for name in names)

    def is_baseline(row: Row) -> bool:
        return bool(row["preset"] == row["baseline"])

    again = {values(row, *_CASE) for row in rows if not is_baseline(row)}
    kept = [row for row in stored if values(row, *_CASE) not in again]
    run = (*_CASE[1:], "commit")
    compared = {values(row, *run) for row in kept if not is_baseline(row)}
    kept = [row for row in kept if values(row, *run) in compared]
    known_baselines = {values(row, *run) for row in kept if is_baseline(row)}
    new = [row for row in rows if not is_baseline(row) or values(row, *run) not in known_baselines]
    return kept + new


_WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
"""Environment of a process that counts launches."""


def _count_launches(case: Case) -> int:
    # Importing it prepares the process for the pretended device.
    from benchmarks.detector.syncs import triton_launches

    return triton_launches(case)


def with_launches(rows: Iterable[Row], options: Options) -> Iterator[Row]:
    """Rows with `triton_launches`, counted on small images, in a process without a GPU."""
    counts: dict[str, int] = {}
    for row in rows:
        name = row["preset"]
        if name not in counts:
            case = Case(
                preset=name,
                batch=1,
                height=min(options.height, 288),
                width=min(options.width, 352),
                num_targets=options.num_targets,
            )
            with Worker("launches", _WITHOUT_GPU) as worker:
                counts[name] = worker.call(_count_launches, case)
        yield {**row, "triton_launches": counts[name]}


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


def collect_merged(rows: Iterable[Row], stored: Sequence[Row], output: Path | None) -> list[Row]:
    """Stored rows and those of this run, written after each of them."""
    measured: list[Row] = []
    results = list(stored)
    for row in rows:
        measured.append(row)
        results = merged(stored, measured)
        if output is not None:
            write_rows(output, results)
    return results


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if `--check` fails."""
    with user_errors():
        options = parse_options(
            Options, arguments, prog="python -m benchmarks.detector supervision"
        )
        device = resolve_device(options.device)
        names = choose_implementations(options.implementations, device, options.published)
        groups = groups_of(options.cases, names)
        stored: list[Row] = []
        if options.merge and options.output is not None:
            stored = read_rows(options.output, "supervision")
            here = {"baseline": options.presets[0], **environment(device)}
            check_comparable([*stored, here])
        measured = measure_groups(
            pairs(groups) if device.type == "cpu" else groups,
            device,
            options,
            build_step,
            phases=PHASES,
            repetitions=options.steps,
        )
        rows = over_baseline(measured, options.presets[0])
        if device.type == "cpu":  # on a GPU, the profiler counts all kernels
            rows = with_launches(rows, options)
        results = collect_merged(rows, stored, options.output)
    print_table(
        [{"triton_launches": None, **row} for row in results],
        "preset implementation dtype batch seconds_p50:.3f time_over_baseline:.3f "
        "forward_seconds:.3f criterion_seconds:.3f backward_seconds:.3f peak_memory_mb:.0f "
        "triton_launches",
    )
    failures = too_slow(results) if options.check else []
    for failure in failures:
        print(f"too slow: {failure}")
    return 1 if failures else 0
