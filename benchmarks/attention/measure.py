"""Durations of deformable attention, ours and the peers': `python -m benchmarks.attention`.

Every implementation computes the same function of value, offsets, logits and reference points, and
the same gradients of the first three (libreyolo has none). Before it is timed, it is compared with
the reference in float64 on a small case of the same kind; one that is wrong is reported as wrong,
with its errors.

On a GPU a duration is device time, by replay of CUDA graphs that go through several sets of inputs.
An implementation that waits for the GPU cannot be captured and is reported as failed.
`roofline_share` is the time that the compulsory bytes of the pass take at the bandwidth of a copy,
measured in the same run, over the time that the pass took. `host_us` is the host's time to enqueue
a call. `peak_memory_mb` is the maximum memory of forward + backward, in addition to their inputs.
On a CPU durations are wall time, and the last two are not measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.attention.cases import (
    DTYPES,
    SHAPES,
    Case,
    Inputs,
    compulsory_bytes,
    make_inputs,
)
from benchmarks.attention.implementations import (
    IMPLEMENTATIONS,
    OURS,
    Implementation,
    Run,
    external_op,
)
from benchmarks.cli import choose_available, require_at_least, require_known, within_budget
from benchmarks.common import Row, collect_rows, environment, print_table
from benchmarks.device_time import (
    Call,
    Timer,
    copy_bytes_per_second,
    host_seconds,
    num_input_sets,
    peak_bytes,
    percentiles_us,
    time_calls,
    work_on,
)
from benchmarks.processes import Worker
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device
from msdetr.ops.ms_deform_attn import ms_deform_attn_fused

PASSES = ("forward", "backward", "forward+backward")
RESULTS = ("output", "value", "projection")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error (of the 2-norm) above which a result is wrong. It leaves room for gradients that
are summed in the type of `value`, and none for coordinates of that type."""

_FIRST = ("msdetr-fused", "deformops", "reference")
_LAST = ("reference-compiled",)
"""Takes seconds to compile for each case."""

_MEASURED = (
    "p20_us",
    "p50_us",
    "p80_us",
    "gigabytes_per_second",
    "roofline_share",
    "compulsory_mb",
    "peak_memory_mb",
    "host_us",
)
"""Fields that are None in the row of a wrong implementation."""

_COLUMNS = (
    "implementation pass shape batch dtype spread p20_us:.1f p50_us:.1f p80_us:.1f "
    "gigabytes_per_second:.1f roofline_share:.3f peak_memory_mb:.1f host_us:.1f status"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time deformable attention: ours, the reference, and what else is installed."""

    shapes: tuple[str, ...] = ("encoder", "decoder-300", "decoder-900")
    """From encoder, decoder-300, decoder-900, tiny and tiny-decoder."""
    batches: tuple[int, ...] = (2, 8)
    """Images per call."""
    dtypes: tuple[Literal["bfloat16", "float32", "float16"], ...] = (
        "bfloat16",
        "float32",
        "float16",
    )
    """Types of value and projection."""
    spreads: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Standard deviations of what is added to the initial offsets."""
    implementations: tuple[str, ...] = ()
    """By name; empty: all that can run here."""
    ops: tuple[str, ...] = ()
    """Further ops as module:function, called with value, spatial shapes [L, 2], sampling locations
    and attention weights."""
    repetitions: int = 20
    """Durations taken of each pass."""
    time_budget: float | None = None
    """Seconds after which no further case begins; the most interesting cases come first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        require_known("shape", self.shapes, SHAPES)
        require_known("implementation", self.implementations, IMPLEMENTATIONS)
        for op in self.ops:
            if not all(op.partition(":")):
                raise ValueError(f"op {op!r} must be module:function")
        require_at_least(self, 1, "batches")
        require_at_least(self, 2, "repetitions")
        require_at_least(self, 0, "spreads")


def choose_implementations(options: Options, device: torch.device) -> list[Implementation]:
    """The implementations that the options name, or all that can run here, and further ops.

    Raises:
        ValueError: one that is named cannot run here.
    """
    external = [external_op(path) for path in options.ops]
    for implementation in external:
        implementation.build()
    names = choose_available(
        options.implementations,
        tuple(IMPLEMENTATIONS),
        lambda name: IMPLEMENTATIONS[name].unavailable(device),
    )
    return [*(IMPLEMENTATIONS[name] for name in names), *external]


def plan(
    options: Options, implementations: Sequence[Implementation]
) -> list[tuple[Case, Implementation]]:
    """All cases and implementations, the most interesting first.

    Those are of the first type and spread: ours, deformops, the reference and ops given by path.
    Compiled code comes last.
    """
    pairs = [
        (Case(shape, SHAPES[shape], batch, DTYPES[dtype], spread), implementation)
        for dtype, spread, shape, batch, implementation in itertools.product(
            options.dtypes, options.spreads, options.shapes, options.batches, implementations
        )
    ]

    def tier(pair: tuple[Case, Implementation]) -> int:
        case, implementation = pair
        is_first = (case.dtype == DTYPES[options.dtypes[0]], case.spread == options.spreads[0])
        # Ops given by path are as interesting as the first.
        is_later = implementation.name in IMPLEMENTATIONS and implementation.name not in _FIRST
        return is_later + is_first.count(False) + 3 * (implementation.name in _LAST)

    return sorted(pairs, key=tier)


@functools.lru_cache(maxsize=8)
def expected_results(case: Case, device: torch.device) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Inputs of a case, and `RESULTS` of the reference on them in float64."""
    inputs = make_inputs(case, device, seed=1000)
    leaves = (inputs.value, inputs.projection)
    value, projection = (leaf.detach().to(torch.float64).requires_grad_() for leaf in leaves)
    output = ms_deform_attn_fused(
        value,
        inputs.levels,
        projection,
        inputs.reference_points.to(torch.float64),
        impl="reference",
    )
    gradients = torch.autograd.grad(output, (value, projection), inputs.grad_output.double())
    return inputs, (output.detach(), *gradients)


def relative_errors(
    case: Case, implementation: Implementation, run: Run, device: torch.device
) -> dict[str, float]:
    """Error of each of `RESULTS` on a small case: its 2-norm, relative to that of the result.

    Without a backward pass, that of the output alone.
    """
    inputs, expected = expected_results(case.small(), device)
    output = run(inputs)
    results = [output.detach()]
    if implementation.has_backward:
        value, *rest = implementation.gradients(output, inputs)
        results += [value, torch.cat(rest, dim=-1)]
    errors = {}
    for name, result, wanted in zip(RESULTS, results, expected, strict=False):
        if result.shape != wanted.shape:
            raise ValueError(f"{name} is {list(result.shape)}, not {list(wanted.shape)}")
        errors[name] = float((result.double() - wanted).norm() / wanted.norm())
    return errors


class Bench:
    """Measures one implementation on one case after the other."""

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device = device
        self.timer = timer
        self._bandwidth = copy_bytes_per_second(device, timer)
        self._inputs: tuple[Case, list[Inputs], dict[str, int]] | None = None
        self._errors: dict[tuple[str, Case], dict[str, float]] = {}

    def rows(self, case: Case, implementation: Implementation) -> list[Row]:
        """A row per pass, or one without durations if the implementation is wrong or fails."""
        rows = self._checked_rows(case, implementation)
        where = environment(self.device)  # with the clock just after the measurement
        return [{**row, **where} for row in rows]

    def _checked_rows(self, case: Case, implementation: Implementation) -> list[Row]:
        common = _common(case, implementation, self._bandwidth)
        try:
            run = implementation.build()
            errors = self._errors_of(case, implementation, run)
            # JSON has no NaN.
            finite = {name: error for name, error in errors.items() if math.isfinite(error)}
            common |= {f"{name}_error": error for name, error in finite.items()}
            # Not `>`, which NaN would pass.
            wrong = [name for name in errors if not errors[name] <= TOLERANCES[case.dtype]]
            if wrong:
                reasons = ", ".join(f"{name} is off by {errors[name]:.1e}" for name in wrong)
                return [_empty_row(common, f"wrong: {reasons}")]
            return self._measured_rows(case, implementation, run, common)
        except Exception as error:  # of any kind, as it may be a peer's: the others still run
            reason = (str(error).splitlines() or [""])[0]
            return [_empty_row(common, f"failed: {type(error).__name__}: {reason}")]

    def _measured_rows(
        self, case: Case, implementation: Implementation, run: Run, common: Row
    ) -> list[Row]:
        inputs, needed = self._inputs_of(case)
        is_gpu = self.device.type == "cuda"
        passes = _passes(implementation, run, inputs)
        peak = None
        if is_gpu:
            *_, whole = passes.values()
            peak = peak_bytes(whole()[0], self.device) / 2**20
        rows = []
        for name, prepare in passes.items():
            calls = prepare()
            measured = percentiles_us(self.timer(calls))
            bytes_per_second = needed[name] / (measured["p50_us"] / 1e6)
            rows.append(
                {
                    **common,
                    "pass": name,
                    **measured,
                    "gigabytes_per_second": bytes_per_second / 1e9,
                    "roofline_share": bytes_per_second / self._bandwidth,
                    "compulsory_mb": needed[name] / 2**20,
                    "peak_memory_mb": peak,
                    "host_us": host_seconds(calls) * 1e6 if is_gpu else None,
                    "status": "ok",
                }
            )
        return rows

    def _errors_of(self, case: Case, implementation: Implementation, run: Run) -> dict[str, float]:
        key = (implementation.name, case.small())
        if key not in self._errors:
            self._errors[key] = relative_errors(case, implementation, run, self.device)
        return self._errors[key]

    def _inputs_of(self, case: Case) -> tuple[list[Inputs], dict[str, int]]:
        if self._inputs is None or self._inputs[0] != case:
            self._inputs = None  # frees its memory first
            first = make_inputs(case, self.device)
            needed = compulsory_bytes(first)
            count = num_input_sets(needed["forward"], self.device)
            others = [make_inputs(case, self.device, seed=seed) for seed in range(1, count)]
            self._inputs = (case, [first, *others], needed)
        return self._inputs[1:]


def _passes(
    implementation: Implementation, run: Run, inputs: Sequence[Inputs]
) -> dict[str, Callable[[], list[Call]]]:
    """Functions that prepare the calls of each pass, one per set of inputs."""

    def forward_and_backward(x: Inputs) -> object:
        return implementation.gradients(run(x), x)

    def backward(output: Tensor, x: Inputs) -> object:
        return implementation.gradients(output, x, retain_graph=True)

    passes: dict[str, Callable[[], list[Call]]] = {
        "forward": lambda: [functools.partial(run, x) for x in inputs],
        "backward": lambda: [functools.partial(backward, run(x), x) for x in inputs],
        "forward+backward": lambda: [functools.partial(forward_and_backward, x) for x in inputs],
    }
    return passes if implementation.has_backward else {"forward": passes["forward"]}


def _common(case: Case, implementation: Implementation, bandwidth: float | None = None) -> Row:
    shape = case.shape
    queries = shape.num_tokens if shape.num_queries is None else shape.num_queries
    return {
        "benchmark": "ms_deform_attn",
        "implementation": implementation.name,
        "implementation_version": implementation.version,
        "shape": case.shape_name,
        "batch": case.batch,
        "queries": queries,
        "dtype": str(case.dtype).removeprefix("torch."),
        "spread": case.spread,
        **{f"{name}_error": None for name in RESULTS},
        "copy_gigabytes_per_second": bandwidth and bandwidth / 1e9,
    }


def _empty_row(common: Row, status: str) -> Row:
    return {**common, "pass": PASSES[-1], **dict.fromkeys(_MEASURED), "status": status}


class BenchApart:
    """A `Bench` in a process of its own, which is replaced when it ends or its GPU fails.

    After an access out of bounds, a process can compute nothing more on its GPU. The implementation
    that did it is not measured again, and the others are.
    """

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self._device = device
        self._repetitions = repetitions
        self._worker: Worker | None = None
        self._excluded: set[str] = set()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None

    def rows(self, case: Case, implementation: Implementation) -> list[Row]:
        """As of `Bench`; none of an implementation that broke its process before."""
        name = implementation.name
        if name in self._excluded:
            return []
        if self._worker is None:
            self._worker = Worker(name)
            self._worker.call(_open_bench, self._device, self._repetitions)
        try:
            rows, works = self._worker.call(_rows_of_bench, case, name)
        except BrokenProcessPool:
            row = _empty_row(_common(case, implementation), "failed: its process ended")
            rows, works = [{**row, **environment(self._device)}], False
        if not works:
            print(f"{name} broke its process, and is not measured again", flush=True)
            self._excluded.add(name)
            self.close()
        return rows


_stack = contextlib.ExitStack()
"""Open until this worker process ends."""
_bench: Bench
"""The bench of this worker process."""


def _open_bench(device: torch.device, repetitions: int) -> None:
    global _bench
    _stack.enter_context(work_on(device))
    _bench = Bench(device, functools.partial(time_calls, device=device, repetitions=repetitions))


def _rows_of_bench(case: Case, name: str) -> tuple[list[Row], bool]:
    """The rows, and whether the device still works."""
    rows = _bench.rows(case, IMPLEMENTATIONS.get(name) or external_op(name))
    try:
        torch.ones(1, device=_bench.device).item()
    except RuntimeError:
        return rows, False
    return rows, True


def measure(
    options: Options,
    *,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Row]]:
    """The rows of each case and implementation, after each measurement."""
    device = resolve_device(options.device)
    pairs = plan(options, choose_implementations(options, device))
    with contextlib.ExitStack() as stack:
        bench: Bench | BenchApart
        if device.type == "cuda" and timer is None:
            bench = BenchApart(device, options.repetitions)
            stack.callback(bench.close)
        else:
            stack.enter_context(work_on(device))
            default = functools.partial(time_calls, device=device, repetitions=options.repetitions)
            bench = Bench(device, timer or default)
        for case, implementation in within_budget(pairs, options.time_budget, clock):
            rows = bench.rows(case, implementation)
            for row in rows:
                print(_describe(row), flush=True)
            yield rows


def _describe(row: Row) -> str:
    name = " ".join(str(row[name]) for name in ("implementation", "pass", "shape"))
    case = f"batch {row['batch']} {row['dtype']} spread {row['spread']:g}"
    figure = row["status"] if row["p50_us"] is None else f"{row['p50_us']:.1f} us"
    return f"{name} {case}: {figure}"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if an implementation of ours is not ok."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.attention")
        rows = collect_rows(measure(options), options.output)
    print_table(rows, _COLUMNS)
    ours_fail = any(row["implementation"] in OURS and row["status"] != "ok" for row in rows)
    return 1 if ours_fail else 0
