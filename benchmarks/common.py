"""What every benchmark needs: where it ran, how long it took, and where the rows go."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
"""One measurement: a flat JSON object."""

_ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device) -> Row:
    """The fields that say where a row was measured."""
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 80th percentile."""
    p50, p80 = np.quantile(np.asarray(seconds), (0.5, 0.8)).tolist()
    return p50, p80


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, in MiB: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # Linux counts in KiB.


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` as a JSON list, in the place of a file that is already there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=2) + "\n")


def read_rows(path: Path, *benchmarks: str) -> list[Row]:
    """The rows of a file that are of one of the benchmarks.

    Raises:
        ValueError: there are none, or the file is not JSON.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = [row for row in rows if row.get("benchmark") in benchmarks]
    if not found:
        raise ValueError(f"{path} holds no rows of {' or '.join(benchmarks)}")
    return found


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
        raise ValueError("plots need matplotlib: pip install 'msdetr[plot]'") from error
    return figure(figsize=figsize, layout="constrained")


def print_table(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the fields named by `columns`, each with its format, one line per row; None as `-`."""
    cells = [list(columns)] + [
        ["-" if row[name] is None else format(row[name], spec) for name, spec in columns.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


class PhaseTimer:
    """Times consecutive phases of work on a device.

    On a GPU the marks are events of its stream: the host does not wait between phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._marks: list[Any] = []

    def start(self, *, wait: bool = True) -> None:
        """Begin the first phase; with `wait`, after everything that the device still has to do."""
        if wait:
            self._synchronize()
        self._names, self._marks = [], [self._mark()]

    def lap(self, name: str) -> None:
        """End the phase `name`, and begin the next."""
        self._names.append(name)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Duration of each phase since `start`; waits for the device."""
        self._synchronize()
        durations = map(self._between, self._marks, self._marks[1:])
        return dict(zip(self._names, durations, strict=True))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it. A copy of the files
    alone is told by the environment (MSDETR_COMMIT)."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MSDETR_COMMIT", "unknown")
    return found.stdout.strip()
