"""Shows stored rows of a whole detector, as Markdown or as plots.

- `python -m benchmarks.detector table ROWS.json ...` prints a table per benchmark, device and image
  size, as `python -m benchmarks.table` writes them into the documents.
- `python -m benchmarks.detector plot ROWS.json ...` draws a PNG per file and benchmark: images per
  second of each implementation, a panel per preset and precision, a group of bars per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Row, describe, group_rows, markdown_table, new_figure, read_rows
from benchmarks.detector.implementations import IMPLEMENTATIONS
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
class TableOptions:
    """Print stored rows of `train` and `inference` as Markdown."""

    rows: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files of rows."""


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw stored rows of `train` and `inference`."""

    rows: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files of rows."""
    output: Path | None = None
    """Folder for the PNG files (default: that of the rows)."""


def read_detector_rows(path: Path) -> list[Row]:
    """The rows of a whole detector in a file.

    Raises:
        ValueError: there are none, or an earlier version wrote them.
    """
    rows = read_rows(path, *BENCHMARKS)
    for row in rows:
        missing = [name for name in _COLUMNS if name not in row]
        if missing:
            raise ValueError(f"{path}: rows lack {', '.join(missing)}: measure them again")
    return rows


def tables(rows: Sequence[Row]) -> str:
    """Markdown of the rows, with a caption per table; columns without any value are left out."""
    fields = ("benchmark", "height", "width", "device", "torch", "triton", "commit")
    return "\n\n".join(
        f"{BENCHMARKS[name]}, {height}x{width}.\n{describe(group)}\n\n{_table(group)}"
        for (name, height, width, *_), group in group_rows(rows, *fields)
    )


def _table(rows: Sequence[Row]) -> str:
    used = {
        name: column
        for name, column in _COLUMNS.items()
        if any(row[name] is not None for row in rows)
    }
    head = ["preset", "precision", "batch", "implementation"]
    cells = [
        [f"`{row['preset']}`", row["dtype"], str(row["batch"]), row["implementation"]]
        + [_cell(row[name], spec) for name, (_, spec) in used.items()]
        for row in rows
    ]
    return markdown_table([*head, *(title for title, _ in used.values())], cells, len(head))


def _cell(value: float | None, spec: str) -> str:
    if value is None:
        return "-"
    if spec == "seconds":
        return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"
    if spec == "GiB":
        return f"{value / 2**10:.1f} GiB"
    number, _, unit = spec.partition(" ")
    return f"{value:{number}} {unit}".rstrip()


def draw(path: Path, folder: Path) -> list[Path]:
    """Draw the rows of a file into PNG files `FILE_BENCHMARK.png` of a folder; their paths.

    Raises:
        ValueError: matplotlib is not installed, or the file has no such rows.
    """
    paths = []
    for (benchmark,), rows in group_rows(read_detector_rows(path), "benchmark"):
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


def print_tables(arguments: Sequence[str]) -> int:
    """Read and print; the exit status."""
    with user_errors():
        options = parse_options(TableOptions, arguments, prog="python -m benchmarks.detector table")
        rows = [row for path in options.rows for row in read_detector_rows(path)]
    print(tables(rows))
    return 0


def draw_plots(arguments: Sequence[str]) -> int:
    """Read and draw; the exit status."""
    with user_errors():
        options = parse_options(PlotOptions, arguments, prog="python -m benchmarks.detector plot")
        for rows in options.rows:
            for path in draw(rows, options.output or rows.parent):
                print(path)
    return 0
