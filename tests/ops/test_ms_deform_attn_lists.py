"""The gradient of `value` by lists of samples, and by reductions for the same queries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.test_ms_deform_attn_kernel import (
    HALF,
    LEVELS,
    check,
    deterministic_algorithms,
    random_call,
)

pytest.importorskip("triton")

from msdetr.kernels.ms_deform_attn import configs
from msdetr.kernels.ms_deform_attn import launch as kernels
from msdetr.kernels.ms_deform_attn.plan import count_list_programs


class Spy:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def walk(monkeypatch) -> Spy:
    spy = Spy(kernels.walk_kernel)
    monkeypatch.setattr(kernels, "walk_kernel", spy)
    return spy


@pytest.fixture
def _no_lists() -> Iterator[None]:
    with configs.override({"lists": {}}):
        yield


SIZES = [
    {"head_dim": 48, "points": 3, "shapes": LEVELS[:2]},
    {"head_dim": 64, "points": 5, "reference_dim": 4, "heads": 3},
    {"head_dim": 256, "points": 1, "heads": 1, "shapes": LEVELS[:1]},
    {"head_dim": 8, "points": 1, "queries": 33, "shapes": LEVELS[:1]},  # 70 lists: 3 programs
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lists(kernel_device, walk, sizes):
    check(random_call(kernel_device, **sizes))
    assert walk.launches == 1


@pytest.mark.usefixtures("_no_lists")
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(kernel_device, walk, sizes, dtype):
    check(random_call(kernel_device, dtype=dtype, **sizes))
    assert walk.launches == 0


@pytest.mark.usefixtures("_no_lists")
def test_fixed_point_needs_lists(kernel_device, walk):
    """Whatever the table says, and for pixels as queries."""
    with deterministic_algorithms():
        random_call(kernel_device, queries=None, shapes=LEVELS[:1]).run("triton")
    assert walk.launches == 1


def test_pixels_as_queries(kernel_device, walk):
    """The table may select lists for them, too."""
    with configs.override({"lists": {"rows": 8, "num_warps": 1}}):
        check(random_call(kernel_device, queries=None, heads=1, shapes=LEVELS[1:]))
    assert walk.launches == 1


@pytest.mark.parametrize(("queries", "used"), [(5555, True), (5556, False), (22223, False)])
def test_are_used_where_they_take_less_memory(queries, used, monkeypatch):
    shapes = ((100, 167), (50, 84), (25, 42), (13, 21))
    value = torch.empty(1, 22223, 8, 32, device="meta")
    points = torch.empty(1, queries, 256, device="meta")
    points = kernels.Points(points, points[..., :128], points[..., :8].unflatten(-1, (4, 2)), 4)
    taken = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: taken.append(self.name)

    for name in ("value_kernel", "link_kernel", "walk_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(name))
    grad_output = torch.empty(1, queries, 256, device="meta")
    kernels.backward_value(grad_output, value, shapes, points, None, deterministic=False)
    assert taken == (["link_kernel", "walk_kernel"] if used else ["value_kernel"])


def test_coarse_levels_have_eight_lists():
    shapes = ((7, 8), (2, 4))  # 8 of 64 pixels
    assert count_list_programs(shapes, 1, 16) == 4 + 4
    assert count_list_programs(((7, 9), (3, 4)), 1, 16) == 4 + 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_all_samples_in_one_pixel(kernel_device, dtype):
    call = random_call(
        kernel_device,
        shapes=((8, 8), (2, 2)),
        queries=33,
        heads=1,
        head_dim=32,
        points=1,
        dtype=dtype,
    )
    call.projection.zero_()
    call.reference.fill_(0.25)  # a pixel's corner at level 0, a pixel's centre at level 1
    call.grad_output.fill_(2.0)
    grad_value = call.run("triton")[1]
    assert (grad_value[0, [9, 10, 17, 18]] == 33 / 4).all()
    assert (grad_value[0, 64] == 33).all()
    assert grad_value.count_nonzero() == 5 * 32


def test_wide_offsets(kernel_device, walk, monkeypatch):
    call = random_call(kernel_device, head_dim=32, heads=1)
    expected = call.run("triton")[1]
    sizes_of = kernels.sizes_of
    monkeypatch.setattr(kernels, "sizes_of", lambda *args: sizes_of(*args)._replace(WIDE=True))
    result = call.run("triton")[1]
    assert walk.launches == 2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
