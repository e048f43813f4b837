"""Inference of each implementation: `python -m benchmarks.bench_inference`.

A pass is the model and its post-processing, from a batch on the device to detections there. Its
latency is that of a pass that is waited for. `images_per_second` is, on a GPU, of passes that
follow each other without that, and on a CPU the batch over the latency. Which implementations there
are is told in `benchmarks.detector_implementations`, how they are compared in
`benchmarks.comparison`, and what the fields of a row mean in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comparison import ComparisonOptions, collect, compare, print_rows
from benchmarks.inference_passes import build_pass
from msdetr.cli.options import parse_options, user_errors


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time inference: ours in its variants, the published code's, Hugging Face's."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Images at once."""
    passes: int = 10
    """Measured passes of each implementation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.bench_inference")
        rows = compare(
            options.cases,
            options,
            build_pass,
            benchmark="inference",
            repetitions=options.passes,
        )
        found = collect(rows, options.output)
    print_rows(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
