"""Writes stored rows into the documents: `python -m benchmarks.table [--check]`.

Between the lines `<!-- rows: NAME -->` and `<!-- end of rows -->` of a document are the tables of
one of `SECTIONS`. With `--check` nothing is written, and the exit status is 1 if a document differs
from the rows. `python -m benchmarks.table ROWS.json ...` prints the tables of any rows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks.common import RESULTS, Row, group_rows, read_json
from msdetr.cli.options import parse_options, user_errors

ROOT = RESULTS.parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "kernels" / "ms_deform_attn.md")
NOTHING = "Nothing on a GPU yet."
SHOWN = ("supervision_cpu.json", "*_cuda.json")
"""Files of rows that documents show."""
PUBLISHED_TIME = {"ms-detr-pp-r50-300": 1.03, "h-deformable-detr-r50": 1.31}
"""Training time over that without the supervision, as its authors report it, by preset."""
_BOTH_PASSES = "forward+backward"
_END = "<!-- end of rows -->"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write stored rows into the documents, or print given rows."""

    rows: tyro.conf.Positional[tuple[Path, ...]] = ()
    """JSON files of rows to print as Markdown, instead of writing documents."""
    check: bool = False
    """Write nothing, and exit with 1 if a document differs."""
    results: Path = RESULTS
    """Folder of the stored rows."""


def passes_in_columns(rows: Sequence[Row]) -> list[Row]:
    """Rows of deformable attention, one per implementation instead of one per pass."""
    fields = ("device", "commit", "shape", "batch", "dtype", "spread")
    merged = []
    for _, case in group_rows(rows, *fields):
        whole = {
            row["implementation"]: row["p50_us"] for row in case if row["pass"] == _BOTH_PASSES
        }
        ours = whole.get("msdetr-fused")
        for (name,), passes in group_rows(case, "implementation"):
            medians = {row["pass"]: row["p50_us"] for row in passes}
            theirs = whole.get(name)
            medians["ratio"] = theirs and ours and theirs / ours
            errors = [passes[0][f"{of}_error"] for of in ("output", "value", "projection")]
            known = [error for error in errors if error is not None]
            version = passes[0]["implementation_version"]
            titled = {"implementation": f"{name} {version}" if version else name}
            merged.append({**passes[0], **medians, **titled, "error": max(known, default=None)})
    return merged


def beside_published(rows: Sequence[Row]) -> list[Row]:
    """Rows of supervision, with the published `time_over_baseline`."""
    return [{**row, "published_time": PUBLISHED_TIME.get(row["preset"])} for row in rows]


class Section(NamedTuple):
    """How rows of some benchmarks are shown; a column is a heading and a format, by field."""

    benchmarks: tuple[str, ...]
    apart: tuple[str, ...]
    """Fields whose values have tables of their own."""
    names: tuple[str, ...]
    """Further fields that tell rows apart. The last one is always a column."""
    columns: dict[str, tuple[str, str]]
    """The others. A column without any value is left out."""
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows
    typical: Callable[[Row], bool] = lambda row: True
    """Whether a document shows the row."""


SECTIONS = {
    "detector": Section(
        ("train_step", "inference"),
        ("benchmark",),
        ("preset", "height", "width", "dtype", "batch", "implementation"),
        {
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
        },
    ),
    "supervision": Section(
        ("supervision",),
        (),
        ("implementation", "height", "width", "dtype", "batch", "preset"),
        {
            "seconds_p50": ("step", "seconds"),
            "time_over_baseline": ("over the baseline", ".1% change"),
            "published_time": ("published", ".0% change"),
            "peak_memory_mb": ("peak memory", "GiB"),
            "triton_launches": ("launches", "d"),
        },
        beside_published,
    ),
    "assignment": Section(
        ("assignment",),
        ("task",),
        ("batch", "queries", "targets", "implementation"),
        {
            "p50_us": ("call, us", ".0f"),
            "device_us": ("GPU alone, us", ".0f"),
            "launches": ("launches", "d"),
            "host_waits": ("host waits", "d"),
            "speedup": ("over published", ".2f x"),
            "status": ("status", "s"),
        },
        typical=lambda row: row["targets"] == 20 and row["queries"] != 900,
    ),
    "attention": Section(
        ("ms_deform_attn",),
        ("dtype", "spread"),
        ("shape", "batch", "implementation"),
        {
            "forward": ("forward, us", ".1f"),
            "backward": ("backward, us", ".1f"),
            _BOTH_PASSES: ("both, us", ".1f"),
            "ratio": ("both, over msdetr-fused", ".2f x"),
            "peak_memory_mb": ("peak memory, MiB", ".0f"),
            "error": ("relative error", ".1e"),
            "status": ("status", "s"),
        },
        passes_in_columns,
    ),
}


def tables(section: Section, rows: Sequence[Row]) -> str:
    """Markdown of the section's rows: a table with a caption per device, versions and commit."""
    shown = section.prepare([row for row in rows if row.get("benchmark") in section.benchmarks])
    where = ("device", "torch", "triton", "commit")
    groups = [group for _, group in group_rows(shown, *where, *section.apart)]
    groups.sort(key=lambda group: section.benchmarks.index(group[0]["benchmark"]))
    return "\n\n".join(_table(section, group) for group in groups)


def _table(section: Section, rows: Sequence[Row]) -> str:
    """A caption, with the fields that all rows share, and the table."""
    # Of a case that was measured twice, the later row.
    rows = [same[-1] for _, same in group_rows(rows, *section.names)]
    names = [
        name
        for name in section.names
        if name == section.names[-1] or len({row[name] for row in rows}) > 1
    ]
    shared = [name for name in (*section.apart, *section.names) if name not in names]
    columns = [
        (name, title, spec)
        for name, (title, spec) in section.columns.items()
        if any(row.get(name) not in (None, "ok") for row in rows)
    ]
    lines = [
        [*names, *(title for _, title, _ in columns)],
        ["---"] * len(names) + ["---:"] * len(columns),
    ]
    for row in rows:
        cells = [str(row[name]) for name in names]
        lines.append(cells + [_cell(row.get(name), spec) for name, _, spec in columns])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{_caption(rows, shared)}\n\n{table}"


def _caption(rows: Sequence[Row], shared: Sequence[str]) -> str:
    row = rows[0]
    case = ", ".join(f"{name} {row[name]}" for name in shared)
    where = f"{row['device']}, torch {row['torch']}, Triton {row['triton'] or 'absent'}"
    caption = f"**{case}**\n({where}, commit {row['commit']}"
    # Rows of earlier versions lack the clocks.
    clocks = [clock for row in rows if (clock := row.get("sm_clock_mhz")) is not None]
    if clocks:
        caption += f",\ndriver {row['driver']}, multiprocessors at {min(clocks)} to {max(clocks)} "
        caption += f"of {row['sm_clock_max_mhz']} MHz"
    return f"{caption}):"


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    if spec == "seconds":
        return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"
    if spec == "GiB":
        return f"{value / 2**10:.1f} GiB"
    number, _, unit = spec.partition(" ")
    if unit == "change":
        return f"{value - 1.0:+{number}}"
    return f"{value:{number}} {unit}".rstrip().replace("|", "\\|")


def shown_rows(folder: Path) -> list[Row]:
    """All rows of a folder that documents show."""
    # Shorter names first: `train_step_cuda.json`, then `train_step_8_cuda.json`.
    paths = sorted(
        (path for pattern in SHOWN for path in folder.glob(pattern)),
        key=lambda path: (len(path.name), path.name),
    )
    return [row for path in paths for row in read_json(path)]


def fill(text: str, rows: Sequence[Row]) -> str:
    """The text of a document, with the tables of the rows."""

    def fill_section(match: re.Match[str]) -> str:
        section = SECTIONS[match[1]]
        shown = [row for row in rows if row.get("benchmark") in section.benchmarks]
        content = tables(section, list(filter(section.typical, shown))) or NOTHING
        return f"<!-- rows: {match[1]} -->\n{content}\n{_END}"

    return re.sub(rf"<!-- rows: (\w+) -->\n.*?{_END}", fill_section, text, flags=re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Write or check the documents, or print; the exit status."""
    status = 0
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.table")
        if options.rows:
            rows = [row for path in options.rows for row in read_json(path)]
            print("\n\n".join(filter(None, (tables(x, rows) for x in SECTIONS.values()))))
            return 0
        rows = shown_rows(options.results)
        for path in DOCUMENTS:
            text = path.read_text(encoding="utf-8")
            filled = fill(text, rows)
            if filled == text:
                continue
            if options.check:
                print(f"{path} differs from the rows: run `python -m benchmarks.table`")
                status = 1
            else:
                path.write_text(filled, encoding="utf-8")
                print(f"wrote {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
