"""The deformable attention kernels against float64: on a GPU if there is one, otherwise in Triton's
interpreter, where every program takes tenths of a second. Hence the small shapes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import PoisonedMemory, assert_as_accurate
from ops.test_ms_deform_attn import random_inputs
from torch import Tensor

from msdetr.ops import ms_deform_attn_library
from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from msdetr.structures import SpatialShapes

pytest.importorskip("triton")

from msdetr.kernels.ms_deform_attn import launch as kernels
from msdetr.kernels.ms_deform_attn.plan import needs_wide_offsets

ROUNDING = 32
LEVELS = ((5, 7), (3, 4), (2, 2), (1, 1))
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """Arguments of the fused op, and the gradient of its output."""

    value: Tensor
    shapes: SpatialShapes
    projection: Tensor
    reference: Tensor
    valid_sizes: Tensor | None
    grad_output: Tensor

    def run(self, impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of value, projection and reference points."""
        tensors = (self.value, self.projection, self.reference)
        inputs = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in tensors]
        value, projection, reference = inputs
        output = ms_deform_attn_fused(
            value, self.shapes, projection, reference, self.valid_sizes, impl=impl
        )
        gradients = torch.autograd.grad(output, inputs, self.grad_output.to(output.dtype))
        return [output.detach(), *gradients]


def random_call(
    device: torch.device,
    *,
    shapes: SpatialShapes = LEVELS,
    batch: int = 1,
    queries: int | None = 3,
    heads: int = 2,
    head_dim: int = 4,
    points: int = 4,
    reference_dim: int = 2,
    valid_sizes: list | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Call:
    """Random arguments. `queries=None` takes the pixels of the levels, as in an encoder."""
    tokens = sum(height * width for height, width in shapes)
    if queries is None:
        centers = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
            for h, w in shapes
        ]
        reference = torch.cat(centers)[None, :, None].repeat(batch, 1, len(shapes), 1)
        queries = tokens
    else:
        reference = torch.rand(batch, queries, len(shapes), reference_dim)
    samples = heads * len(shapes) * points
    offsets = torch.randn(batch, queries, 2 * samples) * spread
    # Exact in every type, and never at pixel centres: gradients of positions are one-sided there.
    offsets = (offsets * 4).round().clamp(-30, 30) / 4 + 5 / 32
    projection = torch.cat((offsets, torch.randn(batch, queries, samples)), dim=-1)
    return Call(
        torch.randn(batch, tokens, heads, head_dim).to(device, dtype),
        shapes,
        projection.to(device, dtype),
        reference.to(device),
        None if valid_sizes is None else torch.tensor(valid_sizes, device=device),
        torch.randn(batch, queries, heads * head_dim).to(device, dtype),
    )


def check(call: Call) -> list[Tensor]:
    """Compare all results of the kernels with the reference, and return them."""
    result = call.run("triton")
    assert_as_accurate(
        result, call.run("reference"), call.run("reference", torch.float64), rounding=ROUNDING
    )
    return result


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def call_with_samples_on_edges(device: torch.device, dtype: torch.dtype) -> Call:
    """An encoder's call whose samples lie at the edges of the default windows, or close to them.

    In both coordinates, the samples of a cell of 8 x 8 pixels of level 0 are the same number of
    pixels before and behind the cell's centre. So they place the windows around it.
    """
    shapes = ((16, 16), (8, 8), (4, 4))
    edges = torch.tensor([-8.5, -7.625, -7.5, -7.375, 7.375, 7.5, 7.625, 8.5])
    rows = []
    for query_level, (height, width) in enumerate(shapes):
        query = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        center = query * 2**query_level // 8 * 8 + 4.0  # of the cell, in pixels of level 0
        offsets = []
        for level in range(len(shapes)):
            place = edges if level < 2 else edges - 4 * edges.sign()  # smaller windows
            place = torch.stack((place[query % 8], place[(query + 1) % 8]), dim=1)
            of_cell = center / 2**level - (query + 0.5) * 2.0 ** (query_level - level)
            offsets.append(place + of_cell[:, None])
        rows.append(torch.stack(offsets, dim=1))
    offsets = torch.cat(rows).flatten(1)  # [Q, L * P * 2]
    assert torch.equal(offsets.to(dtype).float(), offsets)
    call = random_call(
        device, shapes=shapes, queries=None, heads=1, head_dim=16, points=2, dtype=dtype
    )
    call.projection[0, :, : offsets.shape[1]] = offsets.to(call.projection)
    return call


def check_samples_on_edges(device: torch.device, dtype: torch.dtype) -> None:
    """The gradient of `value`, from windows and from reductions of single samples."""
    call = call_with_samples_on_edges(device, dtype)

    def gradient(impl: str, dtype: torch.dtype | None = None) -> Tensor:
        value, projection = (
            x if dtype is None else x.to(dtype) for x in (call.value, call.projection)
        )
        value = value.detach().requires_grad_()
        output = ms_deform_attn_fused(value, call.shapes, projection, call.reference, impl=impl)
        return torch.autograd.grad(output, value, call.grad_output.to(output.dtype))[0]

    allowed = [gradient("reference")], [gradient("reference", torch.float64)]
    assert_as_accurate([gradient("triton")], *allowed, rounding=ROUNDING)
    with deterministic_algorithms():  # without windows
        single = gradient("triton")
    assert_as_accurate([single], *allowed, rounding=ROUNDING)


class TestFused:
    @pytest.mark.parametrize(
        "sizes",
        [
            {"head_dim": 32, "reference_dim": 2, "batch": 2},
            {"head_dim": 1, "points": 1, "reference_dim": 4, "heads": 1},
            {"head_dim": 3, "points": 2, "reference_dim": 4},
            {"head_dim": 48, "points": 3, "shapes": LEVELS[:2]},
            {"head_dim": 16, "points": 5, "reference_dim": 4, "shapes": LEVELS[:3]},
            {"head_dim": 256, "points": 1, "heads": 1, "shapes": LEVELS[:1]},
            {"head_dim": 65, "points": 1, "heads": 1, "shapes": LEVELS[:1]},
            {"head_dim": 2, "points": 16, "heads": 1, "shapes": LEVELS[:1]},
            {"head_dim": 2, "points": 1, "heads": 3, "shapes": LEVELS * 2},
            {"head_dim": 8, "queries": 70, "heads": 1, "shapes": LEVELS[:1]},
        ],
        ids=str,
    )
    def test_sizes(self, kernel_device, sizes):
        check(random_call(kernel_device, **sizes))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("reference_dim", [2, 4])
    def test_half_precision(self, kernel_device, dtype, reference_dim):
        check(random_call(kernel_device, head_dim=32, dtype=dtype, reference_dim=reference_dim))

    @pytest.mark.parametrize("queries", [3, None])
    def test_padding(self, kernel_device, queries):
        """Padding is not read, whatever its content, and gets no gradient."""
        valid_sizes = [[[3, 5], [2, 3]], [[5, 7], [3, 4]]]
        call = random_call(
            kernel_device,
            shapes=LEVELS[:2],
            batch=2,
            queries=queries,
            heads=1,
            valid_sizes=valid_sizes,
        )
        value = call.value.clone()
        value[0, 5] = value[0, 34] = float("nan")  # right of and below the valid area of level 0
        result = check(replace(call, value=value))
        assert torch.equal(result[0], call.run("triton")[0])
        assert not result[1][0, [5, 34]].any()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
    def test_far_samples_are_zero(self, kernel_device, bad):
        call = random_call(kernel_device, heads=1, shapes=LEVELS[:2])
        # Offsets of the second query, x of even and y of odd points.
        call.projection[0, 1, 0:16:4] = bad
        call.projection[0, 1, 3:16:4] = bad
        value = call.value.clone()
        value[0, 0] = value[0, 34] = value[0, 35] = float("inf")  # corners of the maps
        output = replace(call, value=value).run("triton")[0]
        assert not output[0, 1].any()
        output, grad_value, grad_projection, grad_reference = call.run("triton")
        assert not output[0, 1].any()
        assert grad_value.isfinite().all()
        assert not grad_projection[0, 1, :16].any()
        assert grad_projection.isfinite().all()
        assert grad_reference.isfinite().all()

    def test_padding_points_and_levels_do_not_reach_neighbours(self, kernel_device):
        """Rows of the projection are not padded: nothing beyond them is read."""
        call = random_call(kernel_device, heads=1, points=3, shapes=LEVELS[:1])
        wide = torch.full((1, 3, 12), float("nan"), device=kernel_device)
        wide[..., :9] = call.projection
        result = replace(call, projection=wide[..., :9]).run("triton")
        for mine, expected in zip(result, call.run("triton"), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (1, 1)])
    def test_nothing_and_one(self, kernel_device, batch, queries):
        call = random_call(kernel_device, batch=batch, queries=queries, shapes=LEVELS[:2])
        output, grad_value, grad_projection, grad_reference = call.run("triton")
        assert output.shape == (batch, queries, 8)
        assert grad_value.shape == call.value.shape
        assert grad_value.any() == (batch * queries > 0)
        assert grad_projection.shape == call.projection.shape
        assert grad_reference.shape == call.reference.shape

    def test_memory_layouts(self, kernel_device):
        valid_sizes = [[[3, 5], [2, 3]], [[5, 7], [3, 4]]]
        call = random_call(
            kernel_device, batch=2, shapes=LEVELS[:2], heads=2, valid_sizes=valid_sizes
        )
        expected = call.run("triton")
        tokens, channels = call.value.shape[1], 8
        # A slice of one product for the values of three layers.
        wide = torch.randn(2, tokens, 3 * channels, device=kernel_device)
        wide[..., channels : 2 * channels] = call.value.flatten(2)
        slice_of_layers = wide[..., channels : 2 * channels].unflatten(-1, (2, 4))
        assert not slice_of_layers.is_contiguous()
        changed = replace(
            call,
            value=slice_of_layers,
            projection=call.projection.transpose(1, 2).contiguous().transpose(1, 2),
            reference=call.reference.transpose(0, 1).contiguous().transpose(0, 1),
            valid_sizes=call.valid_sizes.flip(-1).contiguous().flip(-1),
            grad_output=call.grad_output.transpose(1, 2).contiguous().transpose(1, 2),
        )
        heads_first = replace(call, value=call.value.transpose(1, 2).contiguous().transpose(1, 2))
        for other in (changed, heads_first):
            for mine, truth in zip(other.run("triton"), expected, strict=True):
                torch.testing.assert_close(mine, truth, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), ()], ids=str)
    def test_only_what_is_needed_is_computed(self, kernel_device, needed, monkeypatch):
        call = random_call(kernel_device, shapes=LEVELS[:2], heads=1)
        expected = call.run("triton")[1:]
        launched = []
        for name in ("backward_points", "backward_value"):
            original = getattr(kernels, name)

            def spy(*args, _name=name, _original=original, **kwargs):
                launched.append(_name)
                return _original(*args, **kwargs)

            monkeypatch.setattr(kernels, name, spy)
        inputs = [call.value, call.projection, call.reference]
        inputs = [x.clone().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        output = ms_deform_attn_fused(inputs[0], call.shapes, *inputs[1:], impl="triton")
        assert output.requires_grad == bool(needed)
        if needed:
            output.backward(call.grad_output)
        for i, x in enumerate(inputs):
            if i in needed:
                torch.testing.assert_close(x.grad, expected[i], rtol=0, atol=1e-6)
            else:
                assert x.grad is None
        assert launched.count("backward_value") == (0 in needed)
        assert launched.count("backward_points") == (1 in needed or 2 in needed)

    def test_nothing_but_the_inputs_is_saved(self, kernel_device):
        call = random_call(kernel_device, shapes=LEVELS[:2], heads=1)
        saved = []
        inputs = [x.requires_grad_() for x in (call.value, call.projection, call.reference)]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            ms_deform_attn_fused(inputs[0], call.shapes, *inputs[1:], impl="triton")
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        assert saved
        assert {x.untyped_storage().data_ptr() for x in saved} <= storages

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_random_sizes(self, kernel_device, data):
        side = st.integers(1, 6)
        shapes = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=2))
        call = random_call(
            kernel_device,
            shapes=tuple(shapes),
            batch=data.draw(st.integers(1, 2)),
            queries=data.draw(st.integers(1, 5)),
            heads=data.draw(st.integers(1, 2)),
            head_dim=data.draw(st.integers(1, 12)),
            points=data.draw(st.integers(1, 6)),
            reference_dim=data.draw(st.sampled_from([2, 4])),
            dtype=data.draw(st.sampled_from([torch.float32, *HALF])),
            spread=data.draw(st.sampled_from([0.5, 4.0])),
        )
        check(call)


class TestPixelsAsQueries:
    """Queries of an encoder: two-dimensional tiles, and window sums for bfloat16 values."""

    SHAPES = ((4, 24), (2, 12), (1, 6), (1, 3))  # wider than a window

    def test_tiles(self, kernel_device):
        check(random_call(kernel_device, shapes=((9, 4), (2, 3)), queries=None, heads=1))

    @pytest.mark.parametrize("spread", [0.5, 6.0])
    def test_windows(self, kernel_device, spread):
        """Small offsets fit in the windows; large ones do not, and are added one by one."""
        call = random_call(
            kernel_device,
            shapes=self.SHAPES,
            queries=None,
            heads=1,
            head_dim=16,
            dtype=torch.bfloat16,
            spread=spread,
        )
        check(call)

    @pytest.mark.parametrize(
        "sizes",
        [
            {"shapes": ((11, 13),), "points": 1},
            {"shapes": ((2, 20),), "points": 2, "batch": 2},
            {"shapes": ((3, 5), (6, 10)), "points": 2, "head_dim": 32},  # not a pyramid
            {"shapes": ((9, 5), (4, 4), (3, 3), (1, 2), (2, 1)), "points": 3},
        ],
        ids=str,
    )
    def test_windows_of_other_sizes(self, kernel_device, sizes):
        sizes = {"head_dim": 16, **sizes}
        call = random_call(
            kernel_device, queries=None, heads=1, dtype=torch.bfloat16, spread=3.0, **sizes
        )
        check(call)

    def test_windows_with_padding_and_far_samples(self, kernel_device):
        valid_sizes = [[[3, 20], [2, 10], [1, 5], [1, 2]]]
        call = random_call(
            kernel_device,
            shapes=self.SHAPES,
            queries=None,
            heads=1,
            head_dim=16,
            dtype=torch.bfloat16,
            valid_sizes=valid_sizes,
        )
        call.projection[0, 40, :16] = float("nan")
        call.projection[0, 41, :16] = float("inf")
        call.projection[0, 42, :16] = 1e30
        result = call.run("triton")
        exact = call.run("reference", torch.float64)
        assert_as_accurate(result[:2], call.run("reference")[:2], exact[:2], rounding=ROUNDING)

    def test_samples_on_the_edges_of_windows(self, kernel_device):
        """Each is added by one of both kernels. Others miss an edge by an eighth of a pixel."""
        check_samples_on_edges(kernel_device, torch.bfloat16)

    def test_windows_and_plain_reductions_are_both_used(self, kernel_device, monkeypatch):
        """Otherwise the tests above would not compare both paths."""
        taken = []

        class Spy:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    self.kernel[grid](*args, **kwargs)
                    taken.append(args[4])  # the windows

                return launch

        monkeypatch.setattr(kernels, "splat_kernel", Spy(kernels.splat_kernel))
        left_out = []
        for spread in (0.0, 6.0):
            random_call(
                kernel_device,
                shapes=self.SHAPES[:2],
                queries=None,
                heads=1,
                head_dim=16,
                dtype=torch.bfloat16,
                spread=spread,
            ).run("triton")
            left_out.append(taken[-1][..., 2].sum().item())
        assert left_out[0] == 0
        assert left_out[1] > 0


class TestStandard:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize(
        "sizes",
        [
            {"channels": 32, "points": 4},
            {"channels": 5, "points": 3, "batch": 1, "shapes": LEVELS[:2]},
        ],
        ids=str,
    )
    def test_equals_the_reference(self, kernel_device, dtype, sizes):
        value, locations, weights = random_inputs(**{"shapes": LEVELS, "heads": 1} | sizes)
        shapes = sizes.get("shapes", LEVELS)
        tensors = (value.to(dtype), locations.float(), weights.to(dtype))
        tensors = [x.to(kernel_device) for x in tensors]
        grad_output = torch.randn(len(value), locations.shape[1], value.shape[3]).to(tensors[0])

        def run(impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
            inputs = [x if dtype is None else x.to(dtype) for x in tensors]
            inputs = [x.detach().requires_grad_() for x in inputs]
            output = ms_deform_attn(inputs[0], shapes, *inputs[1:], impl=impl)
            gradients = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
            return [output.detach(), *gradients]

        assert_as_accurate(
            run("triton"), run("reference"), run("reference", torch.float64), rounding=ROUNDING
        )

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_far_samples_are_zero(self, kernel_device, bad):
        value, locations, weights = random_inputs(shapes=LEVELS, dtype=torch.float32)
        locations[0, 1, ..., 0] = bad
        inputs = [x.to(kernel_device).requires_grad_() for x in (value, locations, weights)]
        output = ms_deform_attn(inputs[0], LEVELS, *inputs[1:], impl="triton")
        assert not output[0, 1].any()
        output.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)
        assert not inputs[1].grad[0, 1].any()

    def test_spatial_shapes_as_a_tensor(self, kernel_device):
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=LEVELS, heads=1)]
        tensor = torch.tensor(LEVELS, device=kernel_device)
        expected = ms_deform_attn(inputs[0], LEVELS, *inputs[1:], impl="triton")
        result = ms_deform_attn(inputs[0], tensor, *inputs[1:], impl="triton")
        assert torch.equal(result, expected)


ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))


class TestAccuracy:
    def test_thousands_of_additions_in_one_pixel(self, kernel_device):
        """A bfloat16 sum would stop growing at 256 times an addend."""
        queries = 2048
        call = random_call(
            kernel_device,
            shapes=((2, 2),),
            queries=queries,
            heads=1,
            head_dim=2,
            points=1,
            dtype=torch.bfloat16,
        )
        call = replace(
            call,
            projection=torch.zeros_like(call.projection),
            reference=torch.full_like(call.reference, 0.25),  # the first pixel's centre
            grad_output=torch.ones_like(call.grad_output),
        )
        grad_value = call.run("triton")[1]
        assert grad_value[0, 0].tolist() == [[queries, queries]]
        assert not grad_value[0, 1:].any()

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_encoder_size(self, kernel_device, dtype):
        call = random_call(
            kernel_device, shapes=ENCODER, queries=None, heads=8, head_dim=32, dtype=dtype
        )
        check(call)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_no_sample_is_at_a_pixel_centre(self, dtype):
        """There, the reference itself is far off, and errors of positions would not show."""
        call = random_call(torch.device("cpu"), shapes=ENCODER, queries=None, heads=1, dtype=dtype)
        offsets = call.projection[0, :, : 4 * 4 * 2].double().unflatten(1, (4, 4, 2))
        sides = torch.tensor(ENCODER).flip(-1)
        position = call.reference[0].double()[:, :, None] * sides[:, None] - 0.5 + offsets
        assert (position - position.round()).abs().amin() > 1e-4


@pytest.mark.parametrize("queries", [5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written(kernel_device, queries, dtype):
    call = random_call(
        kernel_device, queries=queries, shapes=LEVELS[:2], points=3, head_dim=16, dtype=dtype
    )
    expected = call.run("triton")
    arguments = (
        call.grad_output,
        call.value,
        [side for shape in call.shapes for side in shape],
        call.projection,
        call.reference,
        None,
    )
    with PoisonedMemory():
        output = ms_deform_attn_library._fused_forward(*arguments[1:])
        gradients = ms_deform_attn_library._fused_backward(
            *arguments, need_value=True, need_projection=True, need_reference=True,
            deterministic=False,
        )  # fmt: skip
    for mine, truth in zip([output, *gradients], expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, truth, rtol=1e-2, atol=1e-2)


class TestDeterministic:
    @pytest.fixture(autouse=True)
    def _deterministic(self):
        with deterministic_algorithms():
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_accurate(self, kernel_device, dtype):
        call = random_call(kernel_device, head_dim=8, dtype=dtype)
        torch.use_deterministic_algorithms(False)  # The reference has no such path on a GPU.
        reference, exact = call.run("reference"), call.run("reference", torch.float64)
        torch.use_deterministic_algorithms(True)
        assert_as_accurate(call.run("triton"), reference, exact, rounding=ROUNDING)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_any_magnitude(self, kernel_device, scale):
        call = random_call(kernel_device, heads=1, shapes=LEVELS[:2])
        expected = call.run("triton")[1] * scale
        result = replace(call, grad_output=call.grad_output * scale).run("triton")[1]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6 * scale)

    def test_order_does_not_matter(self, kernel_device):
        """Shuffled queries are added in another order, and give the same bits."""
        call = random_call(kernel_device, queries=130, heads=1, shapes=((2, 2),), points=1)
        order = torch.randperm(130)
        shuffled = replace(
            call,
            projection=call.projection[:, order],
            reference=call.reference[:, order],
            grad_output=call.grad_output[:, order],
        )
        assert torch.equal(call.run("triton")[1], shuffled.run("triton")[1])

    def test_zero_and_non_finite_gradients(self, kernel_device):
        call = random_call(kernel_device, heads=1, shapes=LEVELS[:2])
        zero = replace(call, grad_output=torch.zeros_like(call.grad_output))
        assert not zero.run("triton")[1].any()
        call.grad_output[0, 0, 0] = float("inf")
        assert call.run("triton")[1].isnan().all()

    @pytest.mark.parametrize("logits", [[math.nan], [math.inf], [-math.inf] * 8])
    def test_softmax_that_is_not_finite(self, kernel_device, logits):
        call = random_call(kernel_device, heads=1, shapes=LEVELS[:2])
        call.projection[0, 0, -len(logits) :] = torch.tensor(logits)
        assert call.run("triton")[1].isnan().all()

    def test_standard_op(self, kernel_device):
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=LEVELS, heads=1)]
        expected = torch.randn_like(inputs[0].flatten(2)[:, :3])
        gradients = []
        for impl in ("triton", "reference"):
            if impl == "reference":
                torch.use_deterministic_algorithms(False)
            value = inputs[0].clone().requires_grad_()
            weights = inputs[2] * 100.0  # not a softmax: their magnitude affects the scale
            output = ms_deform_attn(value, LEVELS, inputs[1], weights, impl=impl)
            gradients += torch.autograd.grad(output, value, expected)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)

    @pytest.mark.gpu
    def test_repeats_bitwise(self, kernel_device):
        call = random_call(
            kernel_device,
            shapes=ENCODER,
            queries=None,
            heads=8,
            head_dim=32,
            dtype=torch.bfloat16,
        )
        first = call.run("triton")
        for _ in range(3):
            assert all(map(torch.equal, first, call.run("triton")))


class TestWideOffsets:
    @pytest.mark.parametrize(
        ("shapes", "queries", "stride", "wide"),
        [
            (((100, 167), (50, 84)), 22223, 1536, False),
            (((4096, 4096),), 300, 256, True),
            (((2893, 2893),), 300, 256, False),  # (2893 + 3)^2 * 256 just below 2^31
            (((2894, 2894),), 300, 256, True),
            (((10, 10),), 2**24, 128, True),
            (((10, 10),), 2**24 - 1, 128, False),
        ],
    )
    def test_are_used_where_32_bits_are_not_enough(self, shapes, queries, stride, wide):
        tokens = sum(height * width for height, width in shapes)
        value = torch.empty(2, tokens, 1, stride, device="meta")
        points = kernels.Points(
            torch.empty(2, queries, 8, device="meta"),
            torch.empty(2, queries, 4, device="meta"),
            None,
            4,
        )
        assert kernels._sizes(value, shapes, points).WIDE is wide
        assert needs_wide_offsets(shapes, queries, stride) == wide

    def test_more_than_2_to_31_elements_on_meta_tensors(self):
        batch, queries, flat = 9, 1000, [2048, 2048]
        value = torch.empty(batch, 2048 * 2048, 8, 32, device="meta", requires_grad=True)
        projection = torch.empty(batch, queries, 8 * 4 * 3, device="meta", requires_grad=True)
        reference = torch.empty(batch, queries, 1, 2, device="meta")
        assert value.numel() > 2**31
        output = torch.ops.msdetr.ms_deform_attn_fused(value, flat, projection, reference, None)
        assert output.shape == (batch, queries, 256)
        assert output.is_meta
        gradients = torch.autograd.grad(output.sum(), (value, projection))
        assert [x.shape for x in gradients] == [value.shape, projection.shape]

    @pytest.mark.parametrize("queries", [5, None])
    def test_give_the_same_results(self, kernel_device, queries, monkeypatch):
        call = random_call(kernel_device, shapes=LEVELS[:2], queries=queries, heads=1)
        expected = call.run("triton")
        sizes_of = kernels.sizes_of
        monkeypatch.setattr(kernels, "sizes_of", lambda *args: sizes_of(*args)._replace(WIDE=True))
        for mine, truth in zip(call.run("triton"), expected, strict=True):
            torch.testing.assert_close(mine, truth, rtol=0, atol=1e-6)

    @pytest.mark.interpreted
    @pytest.mark.parametrize(
        ("batch", "shapes", "strides"),
        [(3, ((1, 2), (1, 1)), (2**30, 4, 4, 1)), (1, ((1, 3), (1, 1)), (0, 2**30, 4, 1))],
        ids=["images", "pixels"],
    )
    def test_distant_images_and_pixels(self, kernel_device, tmp_path, batch, shapes, strides):
        """Values in a file with holes, 2^31 elements and more apart."""
        call = random_call(
            kernel_device, batch=batch, shapes=shapes, heads=1, dtype=torch.bfloat16, spread=0.5
        )
        size = 1 + sum((n - 1) * s for n, s in zip(call.value.shape, strides, strict=True))
        memory = torch.from_file(str(tmp_path / "values"), True, size, dtype=torch.bfloat16)
        apart = memory.as_strided(call.value.shape, strides).copy_(call.value)
        results = []
        for value in (apart, call.value):
            projection = call.projection.detach().requires_grad_()
            output = ms_deform_attn_fused(value, shapes, projection, call.reference, impl="triton")
            results.append((output, *torch.autograd.grad(output, projection, call.grad_output)))
        assert results[0][0].any()
        assert all(map(torch.equal, *results))

    @pytest.mark.gpu
    def test_more_than_2_to_31_elements(self, kernel_device):
        """5 GB of values; the last image is compared with the same image alone."""
        call = random_call(
            kernel_device,
            shapes=((1024, 1024),),
            batch=1,
            queries=64,
            heads=8,
            head_dim=32,
            dtype=torch.bfloat16,
        )
        copies = replace(
            call,
            value=call.value.expand(9, -1, -1, -1).contiguous(),
            projection=call.projection.expand(9, -1, -1),
            reference=call.reference.expand(9, -1, -1, -1),
            grad_output=call.grad_output.expand(9, -1, -1),
        )
        assert copies.value.numel() > 2**31
        for many, one in zip(copies.run("triton"), call.run("triton"), strict=True):
            torch.testing.assert_close(many[-1:], one, rtol=1e-2, atol=1e-2)


class TestManyImages:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("queries", [1, None])
    def test_launches_are_split_at_the_limit_of_the_grid(
        self, kernel_device, dtype, queries, monkeypatch
    ):
        call = random_call(
            kernel_device,
            batch=3,
            queries=queries,
            heads=1,
            head_dim=16,
            shapes=((3, 3),),
            valid_sizes=[[[3, 3]], [[2, 3]], [[3, 1]]],
            dtype=dtype,
        )
        expected = call.run("triton")
        monkeypatch.setattr(kernels, "_MAX_IMAGES", 2)
        for mine, truth in zip(call.run("triton"), expected, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-2, atol=1e-2)


class TestErrors:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"dtype": torch.float64}, "takes float32, bfloat16 or float16 values, got .*float64"),
            ({"shapes": ((1, 1),) * 9}, "up to 8 levels, got 9"),
            ({"points": 17}, "1 to 16 points, got 17"),
            ({"head_dim": 257}, "head dimensions 1 to 256, got 257"),
        ],
    )
    def test_unsupported_arguments_are_refused(self, kernel_device, sizes, message):
        call = random_call(kernel_device, **{"shapes": LEVELS[:1], "heads": 1} | sizes)
        with pytest.raises(NotImplementedError, match=message):
            call.run("triton")
        output = ms_deform_attn_fused(call.value, call.shapes, call.projection, call.reference)
        assert output.isfinite().all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"projection": torch.zeros(1, 3, 24, dtype=torch.int32)}, "projection must be float"),
            ({"reference": torch.zeros(1, 3, 1, 2).int()}, "reference_points must be floating"),
            ({"reference": torch.zeros(1, 3, 1, 2, device="meta")}, "reference_points is on meta"),
            ({"shapes": ((5, 7), (0, 4))}, "spatial_shapes must be positive"),
        ],
    )
    def test_errors_name_the_argument(self, kernel_device, change, message):
        call = random_call(kernel_device, shapes=LEVELS[:1], heads=2)
        change = {
            name: x.to(kernel_device) if isinstance(x, Tensor) and not x.is_meta else x
            for name, x in change.items()
        }
        if "shapes" in change:
            change["reference"] = torch.zeros(1, 3, 2, 2, device=kernel_device)
        call = replace(call, **change)
        with pytest.raises(ValueError, match=message):
            ms_deform_attn_fused(call.value, call.shapes, call.projection, call.reference)

    def test_shapes_as_a_tensor_are_refused_in_compiled_code(self):
        call = random_call(torch.device("cpu"), shapes=LEVELS[:1])
        shapes = torch.tensor(LEVELS[:1])
        run = torch.compile(ms_deform_attn_fused, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"pairs of Python integers in compiled code"):
            run(call.value, shapes, call.projection, call.reference)
