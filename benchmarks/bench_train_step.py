"""A training step of each implementation: `python -m benchmarks.bench_train_step`.

A step is forward, criterion, backward, and the update (clipping and AdamW), on random images and
targets that are on the device already. Ours is `Trainer.train_step` itself. How implementations
are compared is told in `benchmarks.comparison`, which they are in
`benchmarks.detector_implementations`, what each step holds in `benchmarks.train_steps`, and what
the fields of a row mean in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comparison import ComparisonOptions, collect, compare, print_rows, too_slow
from benchmarks.train_steps import PHASES, build_step
from msdetr.cli.options import parse_options, user_errors

LEAST_SPEEDUP = 1.5
"""Over the published code, for `--check`."""


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time a training step: ours in its variants, the published code's, Hugging Face's."""

    steps: int = 3
    """Measured steps of each implementation."""
    check: bool = False
    """Exit with 1 unless the fastest of ours is 1.5 times as fast as the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status: 1 if `--check` fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.bench_train_step")
        rows = compare(
            options.cases,
            options,
            build_step,
            benchmark="train_step",
            parts=PHASES,
            repetitions=options.steps,
        )
        found = collect(rows, options.output)
    print_rows(found, PHASES)
    failures = too_slow(found, LEAST_SPEEDUP) if options.check else []
    for failure in failures:
        print(f"too slow: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
