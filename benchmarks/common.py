"""Shared by all benchmarks: rows, the environment of a measurement, and printed tables."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
"""One measurement: a flat JSON object."""

RESULTS = Path(__file__).with_name("results")
"""Folder of the stored rows."""


_GPU_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
}
"""Fields of a row, and what `nvidia-smi` calls them."""


def environment(device: torch.device) -> Row:
    """The fields that describe where a row was measured, and the clock of a GPU right now."""
    return {
        "device": _device_name(device),
        **_gpu_state(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def _gpu_state(device: torch.device) -> Row:
    """Driver, clock of the multiprocessors and its maximum; None where they are unknown."""
    if device.type != "cuda":
        return dict.fromkeys(_GPU_FIELDS)
    uuid = torch.cuda.get_device_properties(device).uuid
    query = f"--query-gpu={','.join(_GPU_FIELDS.values())}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        driver, *clocks = (value.strip() for value in run.stdout.split(","))
        return dict(zip(_GPU_FIELDS, (driver, *map(int, clocks)), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return dict.fromkeys(_GPU_FIELDS)


def peak_memory_mb(device: torch.device) -> float:
    """Maximum memory so far in MiB: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # On Linux, `getrusage` is never below the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak) / 2**10


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` as a JSON list, a line per row; replaces an existing file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    partial.replace(path)


def failure(error: Exception) -> str:
    """The status of an implementation that raised an error: its first line."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def collect_rows(batches: Iterable[Sequence[Row]], output: Path | None) -> list[Row]:
    """All rows of the batches, written to `output` after each batch."""
    rows: list[Row] = []
    for batch in batches:
        rows += batch
        if output is not None:
            write_rows(output, rows)
    return rows


def read_json(path: Path) -> list[Row]:
    """All rows in a file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return rows


def read_rows(path: Path, *benchmarks: str) -> list[Row]:
    """The rows in a file that belong to one of the benchmarks.

    Raises:
        ValueError: there are none, or the file is not JSON.
    """
    selected = [row for row in read_json(path) if row.get("benchmark") in benchmarks]
    if not selected:
        raise ValueError(f"{path} holds no rows of {' or '.join(benchmarks)}")
    return selected


def group_rows(rows: Iterable[Row], *names: str) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by the values of these fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups.items()


def new_figure(figsize: tuple[float, float]) -> Any:
    """An empty figure of matplotlib, sized in inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install -e '.[plot]'") from error
    return figure(figsize=figsize, layout="constrained")


def print_table(rows: Sequence[Row], columns: str) -> None:
    """Print a line per row.

    Args:
        rows: None is printed as `-`, and a mapping as `name:value` for each item.
        columns: names of fields, each with an optional format, such as `batch seconds:.2f`.
    """
    fields = [column.partition(":")[::2] for column in columns.split()]
    cells = [[name for name, _ in fields]]
    cells += [[_cell(row[name], spec) for name, spec in fields] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any, spec: str) -> str:
    if isinstance(value, Mapping):
        value = " ".join(f"{name}:{count}" for name, count in value.items()) or None
    return "-" if value is None else format(value, spec)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str:
    """The commit of this checkout, with `-dirty` where files other than results differ from it.

    Outside of a checkout it is read from the environment variable MSDETR_COMMIT.
    """
    git = ("git", "-C", str(RESULTS.parent))
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        commit = run([*git, "rev-parse", "--short", "HEAD"]).stdout.strip()
        changes = run([*git, "status", "--porcelain", "-uno", ":/", ":!results"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MSDETR_COMMIT", "unknown")
    return f"{commit}-dirty" if changes else commit
