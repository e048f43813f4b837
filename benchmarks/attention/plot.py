"""Draws stored rows: `python -m benchmarks.attention plot ROWS.json --output DIR`.

There are two kinds of PNG, both of the median duration: implementations side by side, per shape,
type and spread; and durations over the spread of the offsets, per shape, type and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Row, group_rows, new_figure, read_rows
from msdetr.cli.options import parse_options, user_errors

PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the rows of `python -m benchmarks.attention`."""

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
    for fixed, over in (("spread", "batch"), ("batch", "spread")):
        for (shape, dtype, value), group in group_rows(rows, "shape", "dtype", fixed):
            if over == "spread" and len({row["spread"] for row in group}) < 2:
                continue
            kind = "bars" if over == "batch" else "spread"
            paths.append(folder / f"{kind}_{shape}_{dtype}_{fixed}{value:g}.png")
            figure = new_figure(figsize=(12, 4.5))
            figure.suptitle(f"{shape}, {dtype}, {fixed} {value:g}, {group[0]['device']}")
            _draw_passes(figure, group, over)
            figure.savefig(paths[-1], dpi=120)
    return paths


def _draw_passes(figure: Any, rows: Sequence[Row], over: str) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    values = sorted({row[over] for row in rows})
    width = 0.8 / len(names)
    panels = figure.subplots(1, len(PASSES), sharey=True)
    for axes, name_of_pass in zip(panels, PASSES, strict=True):
        axes.set_title(name_of_pass)
        for place, name in enumerate(names):
            durations = {
                row[over]: row["p50_us"]
                for row in rows
                if row["implementation"] == name and row["pass"] == name_of_pass
            }
            points = sorted(durations.items())
            if over == "spread":
                axes.plot(
                    *zip(*points, strict=True) if points else ((), ()), marker="o", label=name
                )
                continue
            positions = [values.index(x) + (place + 0.5) * width - 0.4 for x, _ in points]
            axes.bar(positions, [y for _, y in points], width, label=name)
        if over == "spread":
            axes.set_xlabel("spread of the offsets (pixels, or box sides / 2 P)")
        else:
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlabel("batch")
    panels[0].set_ylabel("median duration (us)")
    panels[0].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def main(arguments: Sequence[str]) -> int:
    """Read and draw; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.attention plot")
        for path in draw(read_durations(options.rows), options.output):
            print(path)
    return 0
