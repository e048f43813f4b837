"""Timers of devices: durations of calls, host time of a launch, peak memory.

A timer takes several calls that do the same work on different inputs, and alternates between them,
so that no cache holds the inputs of a call.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]


Timer = Callable[[Sequence[Call]], list[float]]
"""Durations of a call in seconds."""

MIN_REPLAY_SECONDS = 1e-3
"""Minimum duration of a captured graph, so that its launch does not count."""
_MAX_ROUNDS = 50
_MAX_SECONDS = 2.0
"""Of all replays, of which there are at least `_MIN_REPLAYS`."""
_MIN_REPLAYS = 5
_MAX_INPUT_SETS = 16
_CPU_COPY_BYTES = 2**25
_CUDA_COPY_BYTES = 2**30


@contextmanager
def work_on(device: torch.device) -> Iterator[None]:
    """On a GPU, run everything inside on one stream of `device` that can be captured."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


class PhaseTimer:
    """Times consecutive phases of work on a device.

    On a GPU the marks are events on its stream, so the host does not wait between phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._marks: list[Any] = []

    def start(self, *, wait: bool = True) -> None:
        """Begin the first phase; with `wait`, after all pending work of the device."""
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


def time_calls(
    calls: Sequence[Call], device: torch.device, *, repetitions: int = 20
) -> list[float]:
    """Durations on the device: by replay of a CUDA graph on a GPU, and of wall time on a CPU.

    Args:
        calls: what to time.
        device: where they work.
        repetitions: durations to take; on a GPU each is a mean over all calls.

    Raises:
        RuntimeError: a call cannot be captured, for example because it reads from the device.
    """
    if device.type != "cuda":
        return wall_seconds(calls, repetitions=repetitions)
    return graph_seconds(calls, replays=repetitions)


def wall_seconds(calls: Sequence[Call], *, repetitions: int) -> list[float]:
    """Durations by the host's clock, after a warm-up: for a CPU."""
    for call in calls:
        call()
    durations = []
    for repetition in range(repetitions):
        call = calls[repetition % len(calls)]
        begin = time.perf_counter()
        call()
        durations.append(time.perf_counter() - begin)
    return durations


def time_in_turns(
    calls: Mapping[str, Call], device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    """Durations of each call in seconds, until the device is done; calls take turns."""

    def timed(call: Call) -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    durations: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if repetition:  # the first one is a warm-up
                durations[name].append(seconds)
    return durations


def graph_seconds(calls: Sequence[Call], *, replays: int) -> list[float]:
    """Durations on the GPU by replay of a CUDA graph, inside `work_on`.

    A replay runs every call at least once, so a duration is the mean over all inputs. Slow calls
    are replayed fewer times.

    Raises:
        RuntimeError: a call cannot be captured, for example because it reads from the device.
    """
    _warm_up(calls)
    _refuse_waits(calls)
    graph = _capture(calls, rounds=1)
    # The first replay uploads the graph.
    estimate = min(_replay_seconds(graph, replays=3)[1:])
    rounds = min(math.ceil(MIN_REPLAY_SECONDS / estimate), _MAX_ROUNDS)
    if rounds > 1:
        del graph  # frees its memory
        graph = _capture(calls, rounds=rounds)
        _replay_seconds(graph, replays=1)
    per_replay = rounds * len(calls)
    affordable = int(_MAX_SECONDS / (estimate * rounds))
    replays = min(replays, max(affordable, _MIN_REPLAYS))
    return [seconds / per_replay for seconds in _replay_seconds(graph, replays=replays)]


def host_seconds(calls: Sequence[Call], *, chunks: int = 25, chunk: int = 4) -> float:
    """Host time of one call on a GPU: the median of chunks that begin with an idle device.

    A chunk is so short that the device's queue cannot fill up, which would make the host wait.
    """
    _warm_up(calls)
    durations = []
    for start in range(0, chunks * chunk, chunk):
        chosen = [calls[i % len(calls)] for i in range(start, start + chunk)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in chosen:
            call()
        durations.append((time.perf_counter() - begin) / chunk)
    torch.cuda.synchronize()
    return statistics.median(durations)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Maximum GPU memory of a call, above what was allocated before."""
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def copy_bytes_per_second(device: torch.device, timer: Timer) -> float:
    """Memory bandwidth of a copy, counting bytes read and bytes written."""
    size = _CPU_COPY_BYTES
    if device.type == "cuda":
        size = min(_CUDA_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(timer([lambda: target.copy_(source)]))


def num_input_sets(bytes_read: int, device: torch.device) -> int:
    """Number of input sets such that reading the others fills a GPU's cache twice."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(max(math.ceil(2 * cache / bytes_read), 1) + 1, _MAX_INPUT_SETS)


def percentiles_us(durations: Sequence[float]) -> dict[str, float]:
    """Percentiles 20, 50 and 80 of durations in seconds, in microseconds."""
    values = np.quantile(np.asarray(durations), (0.2, 0.5, 0.8)) * 1e6
    return dict(zip(("p20_us", "p50_us", "p80_us"), values.tolist(), strict=True))


def _warm_up(calls: Sequence[Call]) -> None:
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()


def _refuse_waits(calls: Sequence[Call]) -> None:
    """Raise RuntimeError if a call waits for the GPU, as a capture would.

    After a failed capture, torch's random generator and allocator remain in capture mode, and later
    work fails.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _capture(calls: Sequence[Call], *, rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Garbage collection of a Triton kernel unloads its module, which breaks a capture.
    collects = gc.isenabled()
    gc.disable()
    try:
        # The stream of the inputs: backward runs where forward ran.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(rounds):
                for call in calls:
                    call()
    finally:
        if collects:
            gc.enable()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, *, replays: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
