"""Work that a GPU does beside the training step's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    """A second stream of a GPU; elsewhere, the place where the work is written.

    Its work begins after everything asked for before `fork`, and is done before anything asked for
    after `join`. So memory needs no record of both streams: what the step made is read here while
    the step holds it, and what is made here is freed for this stream alone, which waits for the
    step before it writes again. Both can be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Run what is inside beside what follows, up to `join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what was forked."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
