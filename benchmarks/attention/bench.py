"""Measures one implementation of deformable attention on one case after the other.

`Bench` does so in this process, and `BenchApart` in one that may break.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import Tensor

from benchmarks.attention.cases import Case, Inputs, compulsory_bytes, make_inputs
from benchmarks.attention.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    Run,
    external_op,
)
from benchmarks.common import Row, environment, failure
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
from msdetr.ops.ms_deform_attn import ms_deform_attn_fused

PASSES = ("forward", "backward", "forward+backward")
RESULTS = ("output", "value", "projection")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error (of the 2-norm) above which a result is wrong. It leaves room for gradients that
are summed in the type of `value`, and none for coordinates of that type."""

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
            return [_empty_row(common, failure(error))]

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
