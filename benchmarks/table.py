"""Writes the stored rows of GPUs into the documents: `python -m benchmarks.table [--check]`.

A document has a pair of lines `<!-- rows: NAME -->` and `<!-- end of rows -->` for each of
`SECTIONS`, and what is between them is replaced. With `--check`, nothing is written, and the exit
status is 1 if a document differs from the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import (
    RESULTS,
    Row,
    describe,
    group_rows,
    markdown_table,
    read_json,
)
from benchmarks.detector import report
from msdetr.cli.options import parse_options, user_errors

ROOT = RESULTS.parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "kernels" / "ms_deform_attn.md")
NOTHING = "Nothing on a GPU yet."
_END = "<!-- end of rows -->"
_WHERE = ("device", "torch", "triton", "commit")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the stored rows of GPUs into the documents."""

    check: bool = False
    """Write nothing, and exit with 1 if a document differs."""
    results: Path = RESULTS
    """Folder of the rows."""


def attention_tables(rows: Sequence[Row]) -> str:
    """Medians of each pass, a line per case and implementation."""
    parts = []
    for _, group in group_rows(rows, *_WHERE):
        lines = []
        subjects = [
            (case, name, passes)
            for case, of_case in group_rows(group, "shape", "batch", "dtype", "spread")
            for (name,), passes in group_rows(of_case, "implementation")
        ]
        for (shape, batch, dtype, spread), name, passes in subjects:
            by_pass = {row["pass"]: row["p50_us"] for row in passes if row["status"] == "ok"}
            first = passes[0]
            errors = [first[f"{x}_error"] for x in ("output", "value", "projection")]
            lines.append(
                [shape, str(batch), dtype, f"{spread:g}", name]
                + [_cell(by_pass.get(x), ".1f") for x in ("forward", "backward")]
                + [_cell(by_pass.get("forward+backward"), ".1f")]
                + [_cell(first["peak_memory_mb"], ".0f")]
                + [_cell(max((x for x in errors if x is not None), default=None), ".1e")]
                + ["" if first["status"] == "ok" else first["status"]]
            )
        head = ["shape", "batch", "type", "spread", "implementation", "forward, us"]
        head += ["backward, us", "both, us", "peak, MiB", "largest error", "status"]
        parts.append(f"{describe(group)}\n\n{markdown_table(head, lines, 5)}")
    return "\n\n".join(parts)


def assignment_tables(rows: Sequence[Row]) -> str:
    """Medians of a call, a line per case and implementation."""
    columns = {
        "p50_us": ("call, us", ".0f"),
        "device_us": ("GPU alone, us", ".0f"),
        "launches": ("launches", "d"),
        "host_waits": ("host waits", "d"),
        "speedup": ("over published", ".2f"),
    }
    names = ["task", "batch", "queries", "targets", "implementation"]
    return "\n\n".join(
        f"Assignment. {describe(group)}\n\n"
        + markdown_table(
            [*names, *(title for title, _ in columns.values()), "status"],
            [
                [str(row[name]) for name in names]
                + [_cell(row[name], spec) for name, (_, spec) in columns.items()]
                + ["" if row["status"] == "ok" else row["status"]]
                for row in group
            ],
            len(names),
        )
        for _, group in group_rows(rows, *_WHERE)
    )


SECTIONS: Mapping[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], str]]] = {
    "detector": (tuple(report.BENCHMARKS), report.tables),
    "assignment": (("assignment",), assignment_tables),
    "attention": (("ms_deform_attn",), attention_tables),
}
"""By name: the benchmarks whose rows are shown, and how."""


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def gpu_rows(folder: Path) -> list[Row]:
    """All rows of a folder that were measured on a GPU: those of `*_cuda.json`."""
    # Shorter names first: `train_step_cuda.json`, then `train_step_8_cuda.json`.
    paths = sorted(folder.glob("*_cuda.json"), key=lambda path: (len(path.name), path.name))
    return [row for path in paths for row in read_json(path)]


def fill(text: str, rows: Iterable[Row]) -> str:
    """The text of a document, with the tables of the rows.

    Raises:
        ValueError: it names an unknown section.
    """
    rows = list(rows)

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise ValueError(f"unknown section {name!r}: known are {', '.join(SECTIONS)}")
        benchmarks, write = SECTIONS[name]
        shown = [row for row in rows if row.get("benchmark") in benchmarks]
        return f"<!-- rows: {name} -->\n{write(shown) if shown else NOTHING}\n{_END}"

    return re.sub(rf"<!-- rows: (\S+) -->\n.*?{_END}", section, text, flags=re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Write or check the documents; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.table")
        rows = gpu_rows(options.results)
        status = 0
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
    import sys

    raise SystemExit(main(sys.argv[1:]))
