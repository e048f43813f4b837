"""Draws stored rows of a whole detector: `python -m benchmarks.detector plot ROWS.json ...`.

A PNG per file and benchmark: images per second of each implementation, a panel per preset and
precision, a group of bars per batch. `python -m benchmarks.table` writes tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Row, group_rows, new_figure, read_rows
from benchmarks.detector.implementations import IMPLEMENTATIONS
from msdetr.cli.options import parse_options, user_errors

BENCHMARKS = {"train_step": "Training step", "inference": "Inference"}


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw stored rows of `train` and `inference`."""

    rows: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files of rows."""
    output: Path | None = None
    """Folder for the PNG files (default: that of the rows)."""


def draw(path: Path, folder: Path) -> list[Path]:
    """Draw the rows of a file into PNG files `FILE_BENCHMARK.png` of a folder; their paths.

    Raises:
        ValueError: matplotlib is not installed, or the file has no such rows.
    """
    paths = []
    for (benchmark,), rows in group_rows(read_rows(path, *BENCHMARKS), "benchmark"):
        panels = list(group_rows(rows, "preset", "dtype"))
        figure = new_figure(figsize=(1.0 + 4.0 * len(panels), 3.6))
        height, width, device = (rows[0][name] for name in ("height", "width", "device"))
        figure.suptitle(f"{BENCHMARKS[benchmark]}, {height}x{width}, {device}")
        for axes, ((preset, dtype), group) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.set_title(f"{preset}, {dtype}", fontsize="medium")
            _draw_bars(axes, group)
        figure.axes[0].set_ylabel("images per second")
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{path.stem}_{benchmark}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    batches = sorted({row["batch"] for row in rows})
    names = [name for name in IMPLEMENTATIONS if any(row["implementation"] == name for row in rows)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        bars_of = [row for row in rows if row["implementation"] == name]
        bars = axes.bar(
            [batches.index(row["batch"]) + (place + 0.5) * width - 0.4 for row in bars_of],
            [row["images_per_second"] for row in bars_of],
            width,
            label=name,
            # One colour per implementation in all panels.
            color=f"C{IMPLEMENTATIONS.index(name)}",
        )
        axes.bar_label(bars, fmt="%.3g", fontsize="small")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.margins(y=0.1)  # room for the numbers
    axes.set_xlabel("batch")


def draw_plots(arguments: Sequence[str]) -> int:
    """Read and draw; the exit status."""
    with user_errors():
        options = parse_options(PlotOptions, arguments, prog="python -m benchmarks.detector plot")
        for rows in options.rows:
            for path in draw(rows, options.output or rows.parent):
                print(path)
    return 0
