"""Deformable attention, ours and the peers': `python -m benchmarks.bench_ms_deform_attn`.

Every implementation computes the same function of value, offsets, logits and reference points, and
the same gradients of the first three. Before it is timed, it is compared with the reference in
float64 on a small case of the same kind; one that is wrong is reported as wrong, with its errors.

On a GPU a duration is device time, by replay of CUDA graphs that go through several sets of inputs
(`timer` is `profiler` where an implementation cannot be captured: the sum of its kernels, without
the gaps between them). `roofline_share` is the time that the compulsory bytes of the pass take at
the bandwidth of a copy, measured in the same run, over the time that the pass took. `host_us` is
what the host needs to enqueue a call. `peak_memory_mb` is what forward + backward hold at most, on
top of their inputs. On a CPU durations are wall time, and the last two are not measured.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.common import Row, environment, print_table, write_rows
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
from benchmarks.ms_deform_attn_cases import (
    DTYPES,
    SHAPES,
    Case,
    Inputs,
    compulsory_bytes,
    make_inputs,
)
from benchmarks.ms_deform_attn_peers import (
    IMPLEMENTATIONS,
    OURS,
    Implementation,
    Run,
    external_op,
)
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device
from msdetr.ops.ms_deform_attn import ms_deform_attn_fused

PASSES = ("forward", "backward", "forward+backward")
RESULTS = ("output", "value", "projection")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error (of the 2-norm) above which a result is wrong. It leaves room for gradients that
are summed in the type of `value`, and none for coordinates of that type."""

_FIRST = ("msdetr-fused", "deformops", "reference")
_SECOND = ("msdetr", "deformops-fp32acc")

_MEASURED = (
    "p20_us",
    "p50_us",
    "p80_us",
    "gigabytes_per_second",
    "roofline_share",
    "compulsory_mb",
    "peak_memory_mb",
    "host_us",
    "timer",
)
"""What a row of a wrong implementation lacks."""

_COLUMNS = {
    "implementation": "",
    "pass": "",
    "shape": "",
    "batch": "",
    "dtype": "",
    "spread": "",
    "p20_us": ".1f",
    "p50_us": ".1f",
    "p80_us": ".1f",
    "gigabytes_per_second": ".1f",
    "roofline_share": ".3f",
    "peak_memory_mb": ".1f",
    "host_us": ".1f",
    "status": "",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time deformable attention: ours, the reference, and what else is installed."""

    shapes: tuple[str, ...] = ("encoder", "decoder-300", "decoder-900")
    """Of encoder, decoder-300, decoder-900, tiny and tiny-decoder."""
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
    """Seconds after which nothing more is begun; the most interesting cases come first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        for name in self.shapes:
            if name not in SHAPES:
                raise ValueError(f"shape {name!r}: known are {', '.join(SHAPES)}")
        for name in self.implementations:
            if name not in IMPLEMENTATIONS:
                raise ValueError(f"implementation {name!r}: known are {', '.join(IMPLEMENTATIONS)}")
        for op in self.ops:
            if not all(op.partition(":")):
                raise ValueError(f"op {op!r} must be module:function")
        if any(batch < 1 for batch in self.batches):
            raise ValueError(f"batches must be at least 1, got {self.batches}")
        if self.repetitions < 2:
            raise ValueError(f"repetitions must be at least 2, got {self.repetitions}")
        if any(spread < 0 for spread in self.spreads):
            raise ValueError(f"spreads must not be negative, got {self.spreads}")


def choose_implementations(options: Options, device: torch.device) -> list[Implementation]:
    """Those that the options name, or all that can run here.

    Raises:
        ValueError: one that is named cannot run here.
    """
    external = [external_op(path) for path in options.ops]
    for implementation in external:
        implementation.build()
    named = [IMPLEMENTATIONS[name] for name in options.implementations or IMPLEMENTATIONS]
    found = []
    for implementation in named:
        reason = implementation.unavailable(device)
        if reason is None:
            found.append(implementation)
        elif options.implementations:
            raise ValueError(f"{implementation.name} cannot run here: {reason}")
        else:
            print(f"without {implementation.name}: {reason}")
    return [*found, *external]


def plan(
    options: Options, implementations: Sequence[Implementation]
) -> list[tuple[Case, Implementation]]:
    """All that is to be measured, the most interesting first.

    That is the first type and spread, of ours, deformops, the reference and ops asked for by path.
    """
    pairs: list[tuple[tuple[int, ...], Case, Implementation]] = []
    for dtype_rank, dtype in enumerate(options.dtypes):
        for spread_rank, spread in enumerate(options.spreads):
            for shape in options.shapes:
                for batch in options.batches:
                    case = Case(shape, SHAPES[shape], batch, DTYPES[dtype], spread)
                    for implementation in implementations:
                        rank = _rank(implementation)
                        tier = rank + min(dtype_rank, 1) + min(spread_rank, 1)
                        order = (tier, dtype_rank, spread_rank, rank)
                        pairs.append((order, case, implementation))
    pairs.sort(key=lambda pair: pair[0])
    return [(case, implementation) for _, case, implementation in pairs]


def _rank(implementation: Implementation) -> int:
    if implementation.name in _FIRST or implementation.name not in IMPLEMENTATIONS:
        return 0
    return 1 if implementation.name in _SECOND else 2


@functools.lru_cache(maxsize=8)
def expected_results(case: Case, device: torch.device) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Inputs of a case, and from them `RESULTS` of the reference in float64."""
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
    """Error of each of `RESULTS` on a small case: the 2-norm's, relative to the result's."""
    inputs, expected = expected_results(case.small(), device)
    output = run(inputs)
    value, *rest = implementation.gradients(output, inputs)
    results = (output.detach(), value, torch.cat(rest, dim=-1))
    errors = {}
    for name, result, wanted in zip(RESULTS, results, expected, strict=True):
        if result.shape != wanted.shape:
            raise ValueError(f"{name} is {list(result.shape)}, not {list(wanted.shape)}")
        errors[name] = float((result.double() - wanted).norm() / wanted.norm())
    return errors


class Bench:
    """Measures one implementation on one case after the other."""

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device = device
        self.timer = timer
        self._environment = environment(device)
        self._bandwidth = copy_bytes_per_second(device, timer)
        self._inputs: tuple[Case, list[Inputs], dict[str, int]] | None = None
        self._errors: dict[tuple[str, Case], dict[str, float]] = {}

    def rows(self, case: Case, implementation: Implementation) -> list[Row]:
        """A row per pass; a single one, without figures, of an implementation that is wrong or
        fails."""
        common = self._common(case, implementation)
        try:
            run = implementation.build()
            errors = self._errors_of(case, implementation, run)
            # JSON has no NaN.
            finite = {name: error for name, error in errors.items() if math.isfinite(error)}
            common |= {f"{name}_error": error for name, error in finite.items()}
            # Not `>`, which NaN would pass.
            wrong = [name for name in RESULTS if not errors[name] <= TOLERANCES[case.dtype]]
            if wrong:
                found = ", ".join(f"{name} is off by {errors[name]:.1e}" for name in wrong)
                return [_empty_row(common, f"wrong: {found}")]
            return self._measured_rows(case, implementation, run, common)
        except Exception as error:  # of a peer, whatever it is: the others still run
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
            peak = peak_bytes(passes["forward+backward"]()[0], self.device) / 2**20
        rows = []
        for name, prepare in passes.items():
            calls = prepare()
            timer, seconds = self.timer(calls)
            measured = percentiles_us(seconds)
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
                    "timer": timer,
                    "status": "ok",
                }
            )
        return rows

    def _common(self, case: Case, implementation: Implementation) -> Row:
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
            "copy_gigabytes_per_second": self._bandwidth / 1e9,
            **self._environment,
        }

    def _errors_of(self, case: Case, implementation: Implementation, run: Run) -> dict[str, float]:
        key = (implementation.name, case.small())
        if key not in self._errors:
            self._errors[key] = relative_errors(case, implementation, run, self.device)
        return self._errors[key]

    def _inputs_of(self, case: Case) -> tuple[list[Inputs], dict[str, int]]:
        if self._inputs is None or self._inputs[0] != case:
            self._inputs = None  # whose memory goes first
            first = make_inputs(case, self.device)
            needed = compulsory_bytes(first)
            count = num_input_sets(needed["forward"], self.device)
            others = [make_inputs(case, self.device, seed=seed) for seed in range(1, count)]
            self._inputs = (case, [first, *others], needed)
        return self._inputs[1:]


def _passes(
    implementation: Implementation, run: Run, inputs: Sequence[Inputs]
) -> dict[str, Callable[[], list[Call]]]:
    """What prepares the calls of each pass, one per set of inputs."""

    def forward_and_backward(x: Inputs) -> object:
        return implementation.gradients(run(x), x)

    def backward(output: Tensor, x: Inputs) -> object:
        return implementation.gradients(output, x, retain_graph=True)

    return {
        "forward": lambda: [functools.partial(run, x) for x in inputs],
        "backward": lambda: [functools.partial(backward, run(x), x) for x in inputs],
        "forward+backward": lambda: [functools.partial(forward_and_backward, x) for x in inputs],
    }


def _empty_row(common: Row, status: str) -> Row:
    return {**common, "pass": PASSES[-1], **dict.fromkeys(_MEASURED), "status": status}


def measure(
    options: Options,
    *,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Row]]:
    """The rows of each case and implementation, as they are measured."""
    begin = clock()
    device = resolve_device(options.device)
    with work_on(device):
        default = functools.partial(time_calls, device=device, repetitions=options.repetitions)
        pairs = plan(options, choose_implementations(options, device))
        bench = Bench(device, timer or default)
        for done, (case, implementation) in enumerate(pairs):
            if options.time_budget is not None and clock() - begin > options.time_budget:
                print(f"time budget used up: {len(pairs) - done} of {len(pairs)} left out")
                return
            yield bench.rows(case, implementation)


def _describe(row: Row) -> str:
    what = " ".join(str(row[name]) for name in ("implementation", "pass", "shape"))
    case = f"batch {row['batch']} {row['dtype']} spread {row['spread']:g}"
    figure = row["status"] if row["p50_us"] is None else f"{row['p50_us']:.1f} us"
    return f"{what} {case}: {figure}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status: 1 if an implementation of ours is not ok."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rows: list[Row] = []
    with user_errors():
        options = parse_options(
            Options, arguments, prog="python -m benchmarks.bench_ms_deform_attn"
        )
        for new in measure(options):
            rows += new
            print(*map(_describe, new), sep="\n", flush=True)
            if options.output is not None:
                write_rows(options.output, rows)
    print_table(rows, _COLUMNS)
    ours_fail = any(row["implementation"] in OURS and row["status"] != "ok" for row in rows)
    return 1 if ours_fail else 0


if __name__ == "__main__":
    raise SystemExit(main())
