"""Machine code of the Triton kernels, inspected without a GPU: `python -m benchmarks.codegen`.

The launches of `cases` are compiled by `compiler` and disassembled by `sass`. A row describes the
code of one kernel (`fields`). Kernels that loop over sampling points are counted in instructions
per unit (`point_loops`): one sampling point of eight (query, head) rows, per warp. The best
published kernels (deformops) take 195 of them forward and 390 backward, in bfloat16 on sm_90.

A run stores its rows in `benchmarks/results/codegen_triton_X.Y.json`, by version of Triton. With
`--check` it stores nothing and fails if code spills, has atomics that retry or fences that wait for
the GPU, reads `value` in small pieces, misses a target, or is worse than the stored rows
(`checks`). With a version of Triton that has no stored rows it reports all that, and succeeds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cli import require_at_least
from benchmarks.codegen.cases import CASES, Case
from benchmarks.codegen.checks import check, row_key
from benchmarks.codegen.compiler import (
    ARCHITECTURES,
    Architecture,
    compile_launches,
    require_compiler,
)
from benchmarks.codegen.fields import measured_fields
from benchmarks.codegen.sass import disassemble
from benchmarks.common import RESULTS, Row, environment, print_table, write_rows
from msdetr.cli.options import parse_options, user_errors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile the kernels for some architectures, and describe their code."""

    check: bool = False
    """Compare with the stored rows instead of storing; exit with 1 if a check fails."""
    architectures: tuple[Architecture, ...] = ARCHITECTURES
    """Compile for these."""
    cases: str = ""
    """Compile the cases whose name and dtype contain this text."""
    results: Path = RESULTS
    """Folder of the stored rows, a file per version of Triton."""
    workers: int = 2
    """Processes that compile."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "workers")
        if not self.architectures:
            raise ValueError(f"architectures: none; known are {', '.join(ARCHITECTURES)}")
        if not self.selected:
            known = ", ".join(case.title for case in CASES)
            raise ValueError(f"cases: none contains {self.cases!r}; known are {known}")

    @property
    def selected(self) -> list[Case]:
        """The cases to compile."""
        return [case for case in CASES if self.cases in case.title]


def table_path(folder: Path, version: str) -> Path:
    """The file of the rows of a Triton version, such as `3.8.0`."""
    return folder / f"codegen_triton_{'.'.join(version.split('.')[:2])}.json"


def measure_case(case: Case, architecture: Architecture) -> list[Row]:
    """A row per kernel of a case, with the conditions of `compile_launches`.

    Raises:
        RuntimeError: a kernel does not compile, or its code is not understood.
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
        # Triton's own errors cannot be pickled.
        raise RuntimeError(f"{case.title} for {architecture}: {error}") from error


def measure(options: Options) -> list[Row]:
    """Rows of all selected cases, ordered by kernel."""
    where = environment(torch.device("cpu"))
    versions = {name: where[name] for name in ("triton", "torch", "commit")}
    tasks = list(itertools.product(options.selected, options.architectures))
    context = get_context("spawn")
    with ProcessPoolExecutor(min(options.workers, len(tasks)), mp_context=context) as pool:
        results = pool.map(measure_case, *zip(*tasks, strict=True))
        progress = tqdm(results, total=len(tasks), unit="case", disable=None)
        rows = [{**row, **versions} for case_rows in progress for row in case_rows]
    if len({row_key(row) for row in rows}) < len(rows):
        raise RuntimeError("a case launches a kernel twice: split it into two cases")
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(rows, key=lambda row: kernels.index(row["kernel"]))


_COLUMNS = (
    "kernel case dtype architecture registers spill_bytes shared_bytes warps_per_sm instructions "
    "loop_instructions instructions_per_unit:.1f loads row_loads scalar_row_loads stores barriers "
    "loop_barriers loop_spills retried_atomics atomics fences"
)


def main(arguments: Sequence[str]) -> int:
    """Compile, print, and store or check; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.codegen")
        require_compiler()
    rows = measure(options)
    print_table(rows, _COLUMNS)
    version = rows[0]["triton"]
    table = table_path(options.results, version)
    stored: list[Row] = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else []
    if not options.check:
        measured = {row_key(row)[1:] for row in rows}  # without the kernel: a case's can change
        known = {case.title for case in CASES}
        kept = [row for row in stored if row_key(row)[1:] not in measured]
        kept = [row for row in kept if f"{row['case']} {row['dtype']}" in known]
        write_rows(table, [*kept, *rows])
        return 0
    problems = check(rows, stored)
    print(f"\n{len(rows)} rows of Triton {version}, {len(problems)} problems", *problems, sep="\n")
    if not stored:
        print(f"{table} does not exist: this version of Triton is reported, not checked")
    return 1 if problems and stored else 0
