"""Machine code of the Triton kernels, looked at without a GPU: `python -m benchmarks.codegen`.

The launches of `codegen_cases` are compiled by `offline_compiler` and disassembled by `sass`; a row
says what the code of a kernel costs (`codegen_fields`).

Of a kernel that visits points in a loop, instructions are counted per unit (`point_loops`): one
sampling point of eight (query, head) rows, per warp. The best published kernels (deformops) take
195 of them forward and 390 backward, in bfloat16 on sm_90.

A run stores its rows in `benchmarks/results/codegen.json`. With `--check` it stores nothing: it
fails if code spills, has atomics that retry or fences that wait for the GPU, reads `value` in
small pieces, misses a target, or has become worse than the stored rows (`codegen_checks`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.codegen_cases import CASES, Case
from benchmarks.codegen_checks import check, row_key
from benchmarks.codegen_fields import measured_fields
from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.offline_compiler import (
    ARCHITECTURES,
    Architecture,
    compile_launches,
    require_compiler,
)
from benchmarks.sass import disassemble
from msdetr.cli.options import parse_options, user_errors

TABLE = Path(__file__).with_name("results") / "codegen.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile the kernels for some architectures, and describe their code."""

    check: bool = False
    """Compare with the stored rows instead of storing; status 1 if anything is wrong."""
    architectures: tuple[Architecture, ...] = ARCHITECTURES
    """Compile for these."""
    cases: str = ""
    """Compile the cases whose name and dtype contain this text."""
    table: Path = TABLE
    """JSON file of the stored rows."""
    workers: int = 2
    """Processes that compile."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if not self.architectures:
            raise ValueError(f"architectures: none; known are {', '.join(ARCHITECTURES)}")
        if not self.selected:
            known = ", ".join(case.title for case in CASES)
            raise ValueError(f"cases: none contains {self.cases!r}; known are {known}")

    @property
    def selected(self) -> list[Case]:
        """Those of `CASES` to compile."""
        return [case for case in CASES if self.cases in case.title]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left out."""
        return len(self.selected) == len(CASES) and set(self.architectures) == set(ARCHITECTURES)


def measure_case(case: Case, architecture: Architecture) -> list[Row]:
    """Rows of a case, a kernel each; what `compile_launches` says goes for this too.

    Raises:
        RuntimeError: it does not compile, or its code is not understood.
    """
    try:
        return [
            {
                "benchmark": "codegen",
                "kernel": code.kernel,
                "case": case.name,
                "dtype": case.dtype,
                "architecture": architecture,
                **measured_fields(code, *disassemble(code.cubin), architecture),
            }
            for code in compile_launches(case.launch, architecture)
        ]
    except Exception as error:
        # Also because Triton's own errors do not travel between processes.
        raise RuntimeError(f"{case.title} for {architecture}: {error}") from error


def measure(options: Options) -> list[Row]:
    """Rows of all that is selected, kernel by kernel."""
    where = environment(torch.device("cpu"))
    versions = {name: where[name] for name in ("triton", "torch", "commit")}
    tasks = list(itertools.product(options.selected, options.architectures))
    context = get_context("spawn")
    with ProcessPoolExecutor(min(options.workers, len(tasks)), mp_context=context) as pool:
        found = pool.map(measure_case, *zip(*tasks, strict=True))
        shown = tqdm(found, total=len(tasks), unit="case", disable=None)
        rows = [{**row, **versions} for of_case in shown for row in of_case]
    if len({row_key(row) for row in rows}) < len(rows):
        raise RuntimeError("a case launches a kernel twice: make two cases of it")
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(rows, key=lambda row: kernels.index(row["kernel"]))


_COLUMNS = {
    "kernel": "kernel",
    "case": "case",
    "dtype": "dtype",
    "arch": "architecture",
    "regs": "registers",
    "spill": "spill_bytes",
    "shared": "shared_bytes",
    "warps/SM": "warps_per_sm",
    "instr": "instructions",
    "loop": "loop_instructions",
    "/unit": "instructions_per_unit",
    "loads": "loads",
    "of value": "row_loads",
    "scalar": "scalar_row_loads",
    "stores": "stores",
    "BAR": "barriers",
    "BAR in loop": "loop_barriers",
    "spills in loop": "loop_spills",
}
"""Fields of the printed table, by title."""
_SYNC_COLUMNS = {
    "kernel": "kernel",
    "case": "case",
    "dtype": "dtype",
    "arch": "architecture",
    "CAS": "retried_atomics",
    "SASS": "atomics",
    "PTX": "ptx_atomics",
    "fences": "fences",
}


def _print(rows: Sequence[Row]) -> None:
    print("loads and stores: bits per thread, and how many instructions")
    _print_fields(rows, _COLUMNS)
    synchronising = [row for row in rows if row["atomics"] or row["ptx_atomics"] or row["fences"]]
    if synchronising:
        print()
        _print_fields(synchronising, _SYNC_COLUMNS)


def _print_fields(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    cells = [{title: _cell(row[field]) for title, field in columns.items()} for row in rows]
    print_table(cells, dict.fromkeys(columns, ""))


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return " ".join(f"{name}:{count}" for name, count in value.items()) or None
    return f"{value:.1f}" if isinstance(value, float) else value


def _read(path: Path) -> list[Row]:
    with contextlib.suppress(FileNotFoundError):
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        return rows
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and store or check; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.codegen")
        require_compiler()
        stored = _read(options.table)
    rows = measure(options)
    _print(rows)
    if not options.check:
        measured = {row_key(row) for row in rows}
        kept = [row for row in stored if row_key(row) not in measured]
        write_rows(options.table, rows if options.is_complete else [*kept, *rows])
        return 0
    problems = check(rows, stored)
    if not any(row["triton"] == rows[0]["triton"] for row in stored):
        print(f"{options.table} has no rows of Triton {rows[0]['triton']}: nothing to compare with")
    print(f"\n{len(rows)} rows, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
