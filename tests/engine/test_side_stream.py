"""Work beside the step: in place on the CPU, ordered by waits on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msdetr.engine.side_stream import SideStream


def test_elsewhere_work_is_done_in_place() -> None:
    side, done = SideStream(torch.device("cpu")), []
    with side.fork():
        done.append(1)
    assert done == [1]
    side.join()


def test_each_stream_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Stream(SimpleNamespace):
        def wait_stream(self, other: Any) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        events.append(f"on {chosen.name}")
        yield
        events.append("on main")

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(name="side", device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    side = SideStream(device)
    with side.fork():
        events.append("work")
    side.join()
    waits = ["side waits for main", "main waits for side"]
    assert events == [waits[0], "on side", "work", "on main", waits[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_results_are_complete_after_the_join(captured: bool) -> None:
    device = torch.device("cuda", 0)
    side, x = SideStream(device), torch.zeros(2**24, device=device)

    def step() -> torch.Tensor:
        x.add_(1.0)
        with side.fork():
            doubled = x * 2.0
            for _ in range(20):
                doubled = doubled + 1.0
        side.join()
        return doubled

    if not captured:
        for number in range(1, 6):
            assert (step() == 2.0 * number + 20.0).all()
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for number in range(1, 6):
        graph.replay()
        assert (result == 2.0 * number + 20.0).all()
