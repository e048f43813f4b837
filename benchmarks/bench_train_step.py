"""A training step of each implementation: `python -m benchmarks.bench_train_step`.

A step is forward, criterion, backward, and the update (clipping and AdamW), on random images and
targets that are on the device already. Ours is `Trainer.train_step` itself. How implementations
are compared is told in `benchmarks.comparison`, which they are in
`benchmarks.detector_implementations`, what each step holds in `benchmarks.train_steps`, and what
the fields of a row mean in docs/benchmarks.md.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common import Row, print_table, write_rows
from benchmarks.comparison import ComparisonOptions, add_speedups, compare, too_slow
from benchmarks.detector_cases import Case
from benchmarks.train_steps import PHASES, build_step
from msdetr.cli.options import parse_options, tune_cpu_runtime, user_errors
from msdetr.engine.compile import CompileError

LEAST_SPEEDUP = 1.5
"""Over the published code, for `--check`."""

_OF_COMPILED = ("graph_breaks", "recompiles")
_COLUMNS = {
    "preset": "",
    "implementation": "",
    "dtype": "",
    "batch": "",
    "seconds_p50": ".4f",
    "seconds_p80": ".4f",
    **{f"{phase}_seconds": ".4f" for phase in PHASES},
    "images_per_second": ".3f",
    "speedup_over_published": ".2f",
    "speedup_over_eager": ".2f",
    "gpu_idle_share": ".3f",
    "kernels_per_step": ".0f",
    "host_reads_per_step": "",
    "recompiles": "",
    "peak_memory_mb": ".0f",
    "model_flops_utilisation": ".3f",
}


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time a training step: ours in its variants, the published code's, Hugging Face's."""

    num_targets: int = 7
    """Boxes per image (COCO has 7.3 on average)."""
    steps: int = 3
    """Measured steps of each implementation."""
    warmup: int = 2
    """Steps before the measured ones; a recorded step is fully recorded after two."""
    check: bool = False
    """Exit with 1 unless the fastest of ours is 1.5 times as fast as the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        self.cases  # noqa: B018 # they check what they hold

    @property
    def cases(self) -> list[Case]:
        """What is measured, in this order."""
        return [
            Case(
                preset=preset,
                batch=batch,
                dtype=dtype,
                height=self.height,
                width=self.width,
                num_targets=self.num_targets,
                seed=self.seed,
            )
            for preset, batch, dtype in itertools.product(self.presets, self.batches, self.dtypes)
        ]


def measure(options: Options) -> Iterator[Row]:
    """A row per case and implementation, without what compares it with others.

    Raises:
        ValueError: an implementation cannot run here, or computes other losses.
        CompileError: part of the step cannot be compiled.
    """
    rows = compare(
        options.cases,
        options,
        build_step,
        benchmark="train_step",
        repetitions=options.steps,
        warmup=options.warmup,
    )
    fields = (*(f"{part}_seconds" for part in (*PHASES, "forward_backward")), *_OF_COMPILED)
    for row in rows:
        yield row | {name: row.get(name) for name in fields}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status: 1 if `--check` fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    tune_cpu_runtime()
    rows: list[Row] = []
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.bench_train_step")
        try:
            for row in measure(options):
                rows.append(row)
                add_speedups(rows)
                if options.output is not None:
                    write_rows(options.output, rows)
        except CompileError as error:
            raise ValueError(str(error)) from error
    print_table(rows, _COLUMNS)
    failures = too_slow(rows, LEAST_SPEEDUP) if options.check else []
    for failure in failures:
        print(f"too slow: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
