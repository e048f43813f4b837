"""Stored rows of a whole detector as Markdown: `python -m benchmarks.readme_table ROWS.json ...`.

A table per benchmark, device and image size. What the README shows of them is printed by this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.common import Row, read_rows
from msdetr.cli.options import parse_options, user_errors

BENCHMARKS = {"train_step": "Training step", "inference": "Inference"}

_COLUMNS = {
    "images_per_second": ("images/s", ".3g"),
    "seconds_p50": ("median", "seconds"),
    "seconds_p80": ("p80", "seconds"),
    "speedup_over_eager": ("over eager", ".2f x"),
    "speedup_over_published": ("over published", ".2f x"),
    "gpu_idle_share": ("GPU idle", ".1%"),
    "kernels": ("kernels", ".0f"),
    "host_reads": ("host reads", "d"),
    "model_flops_utilisation": ("FLOP/s utilisation", ".1%"),
    "peak_memory_mb": ("peak memory", "GiB"),
}
"""Heading and format by field."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print stored rows of bench_train_step and bench_inference as Markdown."""

    rows: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files of rows."""


def read_detector_rows(path: Path) -> list[Row]:
    """The rows of a file that are of a whole detector.

    Raises:
        ValueError: there are none, or an earlier version has written them.
    """
    rows = read_rows(path, *BENCHMARKS)
    for row in rows:
        missing = [name for name in _COLUMNS if name not in row]
        if missing:
            raise ValueError(f"{path}: rows lack {', '.join(missing)}: measure them again")
    return rows


def tables(rows: Sequence[Row]) -> str:
    """Markdown of the rows, with a caption per table; columns without any value are left out."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        where = (row["device"], f"torch {row['torch']}", f"Triton {row['triton'] or 'absent'}")
        size = f"{row['height']}x{row['width']}"
        caption = (BENCHMARKS[row["benchmark"]], size, *where, f"commit {row['commit']}")
        groups.setdefault(caption, []).append(row)
    return "\n\n".join(
        f"{', '.join(caption)}:\n\n{_table(group)}" for caption, group in groups.items()
    )


def _table(rows: Sequence[Row]) -> str:
    used = {
        name: column
        for name, column in _COLUMNS.items()
        if any(row[name] is not None for row in rows)
    }
    lines = [
        ["preset", "precision", "batch", "implementation", *(title for title, _ in used.values())],
        ["---"] * 4 + ["---:"] * len(used),
    ]
    for row in rows:
        case = [f"`{row['preset']}`", row["dtype"], str(row["batch"]), row["implementation"]]
        lines.append(case + [_cell(row[name], spec) for name, (_, spec) in used.items()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: float | None, spec: str) -> str:
    if value is None:
        return "-"
    if spec == "seconds":
        return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"
    if spec == "GiB":
        return f"{value / 2**10:.1f} GiB"
    number, _, unit = spec.partition(" ")
    return f"{value:{number}} {unit}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and print; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.readme_table")
        rows = [row for path in options.rows for row in read_detector_rows(path)]
    print(tables(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
