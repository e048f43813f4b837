"""Draws stored rows: `python -m benchmarks.plot_ms_deform_attn ROWS.json --output DIR`.

Two kinds of PNG, both of the median duration: implementations side by side, per shape, type and
spread; and over the spread of the offsets, per shape, type and batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Row, group_rows, new_figure, read_rows
from msdetr.cli.options import parse_options, user_errors

PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the rows of bench_ms_deform_attn."""

    rows: tyro.conf.Positional[Path]
    """JSON file of rows."""
    output: Path
    """Folder for the PNG files."""


def read_durations(path: Path) -> list[Row]:
    """The rows that hold a duration.

    Raises:
        ValueError: the file holds none.
    """
    timed = [row for row in read_rows(path, "ms_deform_attn") if row.get("p50_us") is not None]
    if not timed:
        raise ValueError(f"{path} holds no durations of ms_deform_attn")
    return timed


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw rows into PNG files of a folder; their paths.

    Raises:
        ValueError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (shape, dtype, spread), group in group_rows(rows, "shape", "dtype", "spread"):
        figure = new_figure(figsize=(12, 4.5))
        figure.suptitle(f"{shape}, {dtype}, spread {spread:g}, {group[0]['device']}")
        _draw_bars(figure, group)
        paths.append(folder / f"bars_{shape}_{dtype}_spread{spread:g}.png")
        figure.savefig(paths[-1], dpi=120)
    for (shape, dtype, batch), group in group_rows(rows, "shape", "dtype", "batch"):
        if len({row["spread"] for row in group}) < 2:
            continue
        figure = new_figure(figsize=(12, 4.5))
        figure.suptitle(f"{shape}, {dtype}, batch {batch}, {group[0]['device']}")
        _draw_lines(figure, group)
        paths.append(folder / f"spread_{shape}_{dtype}_batch{batch}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _draw_bars(figure: Any, rows: Sequence[Row]) -> None:
    names = _unique(rows, "implementation")
    batches = sorted(_unique(rows, "batch"))
    width = 0.8 / len(names)
    for axes, name_of_pass in zip(_axes(figure), PASSES, strict=True):
        for i, name in enumerate(names):
            found = {
                row["batch"]: row["p50_us"]
                for row in rows
                if row["implementation"] == name and row["pass"] == name_of_pass
            }
            x = [place + (i + 0.5) * width - 0.4 for place, b in enumerate(batches) if b in found]
            heights = [found[batch] for batch in batches if batch in found]
            axes.bar(x, heights, width, label=name)
        axes.set_title(name_of_pass)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_xlabel("batch")
    _finish(figure)


def _draw_lines(figure: Any, rows: Sequence[Row]) -> None:
    for axes, name_of_pass in zip(_axes(figure), PASSES, strict=True):
        for name in _unique(rows, "implementation"):
            points = sorted(
                (row["spread"], row["p50_us"])
                for row in rows
                if row["implementation"] == name and row["pass"] == name_of_pass
            )
            axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=name)
        axes.set_title(name_of_pass)
        axes.set_xlabel("spread of the offsets (pixels, or box sides / 2 P)")
    _finish(figure)


def _axes(figure: Any) -> Iterable[Any]:
    axes: Iterable[Any] = figure.subplots(1, len(PASSES), sharey=True)
    return axes


def _finish(figure: Any) -> None:
    figure.axes[0].set_ylabel("median duration (us)")
    figure.axes[0].set_yscale("log")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _unique(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and draw; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.plot_ms_deform_attn")
        for path in draw(read_durations(options.rows), options.output):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
