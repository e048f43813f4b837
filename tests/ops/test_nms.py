"""Greedy non-maximum suppression against its definition, and its kernel against torchvision.

On a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from msdetr.boxes import box_iou
from msdetr.ops.nms import nms_mask

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide).*:RuntimeWarning")

THRESHOLDS = (0.0, 0.5, 0.9, 1.0)


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32, side: float = 0.5) -> Tensor:
    """Corner boxes; about half of them overlap others by more or less."""
    corner, size = torch.rand(*shape, 2), side * (0.1 + torch.rand(*shape, 2))
    boxes = torch.cat((corner, corner + size), dim=-1)
    near = boxes.roll(3, dims=-2) + 0.05 * side * torch.rand(*shape, 1) * torch.randn(*shape, 4)
    return torch.where(torch.rand(*shape, 1) < 0.5, near, boxes).to(dtype)


def chain(n: int) -> Tensor:
    """[1, n, 4], each with an IoU of 3/5 with its neighbours and 1/3 with the next ones."""
    x = 0.25 * torch.arange(n)
    return torch.stack((x, torch.zeros(n), x + 1.0, torch.ones(n)), dim=-1)[None]


def greedy(boxes: Tensor, threshold: float) -> list[bool]:
    """The definition, for boxes [n, 4]."""
    kept: list[int] = []
    for i in range(len(boxes)):
        if all(box_iou(boxes[i], boxes[j]).item() <= threshold for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


def check(boxes: Tensor, threshold: float) -> Tensor:
    """The kernel's result, which equals torchvision's on a CPU."""
    keep = nms_mask(boxes, iou_threshold=threshold, impl="triton")
    expected = nms_mask(boxes.cpu(), iou_threshold=threshold, impl="reference")
    assert keep.dtype == torch.bool
    assert keep.device == boxes.device
    assert torch.equal(keep.cpu(), expected)
    return keep


class TestBothImplementations:
    @pytest.mark.parametrize("threshold", THRESHOLDS)
    def test_definition(self, kernel_device, impl, threshold):
        boxes = random_boxes(3, 20)
        keep = nms_mask(boxes.to(kernel_device), iou_threshold=threshold, impl=impl)
        assert keep.tolist() == [greedy(of_problem, threshold) for of_problem in boxes]
        assert keep.all() == (threshold == 1.0)

    def test_suppressed_boxes_do_not_suppress(self, kernel_device, impl):
        keep = nms_mask(chain(9).to(kernel_device), iou_threshold=0.5, impl=impl)
        assert keep.tolist() == [[True, False] * 4 + [True]]

    def test_the_threshold_itself_is_not_above(self, kernel_device, impl):
        boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]]], device=kernel_device)
        for threshold, expected in ((0.5, True), (0.499, False)):
            keep = nms_mask(boxes, iou_threshold=threshold, impl=impl)
            assert keep.tolist() == [[True, expected]]

    def test_thresholds_between_float32_numbers(self, kernel_device, impl):
        """3/5 in float32 is above 0.6, and 0.6 in float32 is not."""
        boxes = chain(2).to(kernel_device)
        iou = torch.tensor(3.0).div(5.0).item()
        for threshold in (0.6, iou):
            keep = nms_mask(boxes, iou_threshold=threshold, impl=impl)
            assert keep[0, 1].item() == (iou <= threshold)

    @pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (0, 0, 4)])
    def test_nothing(self, kernel_device, impl, shape):
        keep = nms_mask(torch.zeros(shape, device=kernel_device), iou_threshold=0.5, impl=impl)
        assert keep.shape == shape[:2]
        assert keep.dtype == torch.bool

    def test_problems_are_independent(self, kernel_device, impl):
        boxes = random_boxes(4, 30).to(kernel_device)
        keep = nms_mask(boxes, iou_threshold=0.3, impl=impl)
        singly = [nms_mask(boxes[i, None], iou_threshold=0.3, impl=impl) for i in range(4)]
        assert torch.equal(keep, torch.cat(singly))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, kernel_device, impl, dtype):
        boxes = random_boxes(2, 30, dtype=dtype).to(kernel_device)
        keep = nms_mask(boxes, iou_threshold=0.3, impl=impl)
        assert torch.equal(keep, nms_mask(boxes.float(), iou_threshold=0.3, impl=impl))

    def test_no_gradient(self, kernel_device, impl):
        boxes = random_boxes(1, 4).to(kernel_device).requires_grad_()
        assert not nms_mask(boxes, iou_threshold=0.5, impl=impl).requires_grad

    def test_compiles_in_one_graph(self, kernel_device, impl):
        torch._dynamo.reset()
        compiled = torch.compile(nms_mask, backend="aot_eager", fullgraph=True, dynamic=True)
        for shape in ((2, 5), (3, 9)):
            boxes = random_boxes(*shape).to(kernel_device)
            keep = compiled(boxes, iou_threshold=0.3, impl=impl)
            assert torch.equal(keep, nms_mask(boxes, iou_threshold=0.3, impl=impl))


class TestKernel:
    @pytest.mark.parametrize("threshold", THRESHOLDS)
    @pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 200])
    def test_sizes(self, kernel_device, n, threshold):
        check(random_boxes(3, n).to(kernel_device), threshold)

    @pytest.mark.parametrize(("threshold", "side"), [(0.5, 0.5), (0.9, 0.1)])
    def test_a_level_of_deta(self, kernel_device, threshold, side):
        check(random_boxes(1, 1000, side=side).to(kernel_device), threshold)

    @pytest.mark.parametrize("n", [64, 200])
    def test_long_chains(self, kernel_device, n):
        keep = check(chain(n).to(kernel_device), 0.5)
        assert keep.tolist() == [[i % 2 == 0 for i in range(n)]]

    def test_duplicates(self, kernel_device):
        boxes = random_boxes(2, 20).repeat(1, 5, 1)
        keep = check(boxes.to(kernel_device), 0.99)
        assert not keep[:, 20:].any()
        assert check(boxes.to(kernel_device), 1.0)[:, 20:].any()  # An IoU of 1 is not above 1.

    def test_touching_boxes_do_not_overlap(self, kernel_device):
        x, y = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
        boxes = torch.stack((x, y, x + 1, y + 1), dim=-1).flatten(0, 1)[None]
        assert check(boxes.to(kernel_device), 0.0).all()

    @pytest.mark.parametrize("threshold", THRESHOLDS)
    def test_degenerate_boxes(self, kernel_device, threshold):
        """Points, lines, inverted and infinite boxes, NaN, and areas that overflow or underflow."""
        values = torch.tensor([0.0, 0.5, 1.0, -1.0, 1e-30, 1e20, INF, -INF, NAN])
        boxes = values[torch.randint(len(values), (4, 150, 4))]
        boxes[2:, :, :2] = 0.0  # Otherwise hardly any two overlap.
        check(boxes.to(kernel_device), threshold)

    def test_equal_points_do_not_overlap(self, kernel_device):
        assert check(torch.zeros(1, 70, 4, device=kernel_device), 0.0).all()

    def test_rounding(self, kernel_device):
        """Overlaps of small integers, and thresholds that are met exactly or almost."""
        x = torch.randint(0, 6, (4, 60, 4)).float()
        boxes = torch.cat((x[..., :2], x[..., :2] + 1 + x[..., 2:]), dim=-1).to(kernel_device)
        for numerator, denominator in ((1, 2), (1, 3), (3, 5), (7, 10), (1, 10)):
            check(boxes, numerator / denominator)

    def test_memory_layouts(self, kernel_device):
        boxes = random_boxes(3, 70).to(kernel_device)
        expected = check(boxes, 0.3)
        wide = torch.full((3, 140, 6), NAN, device=kernel_device)
        wide[:, ::2, 1:5] = boxes
        transposed = boxes.transpose(0, 2).contiguous().transpose(0, 2)
        for other in (wide[:, ::2, 1:5], transposed):
            assert torch.equal(check(other, 0.3), expected)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    problems=st.integers(1, 3),
    n=st.integers(1, 140),
    threshold=st.floats(0.0, 1.0),
    side=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_random_sizes(kernel_device, problems, n, threshold, side):
    check(random_boxes(problems, n, side=side).to(kernel_device), threshold)


@pytest.mark.parametrize("op", ["nms_mask", "nms_mask_torchvision"])
def test_opcheck(kernel_device, op):
    arguments = (random_boxes(2, 9).to(kernel_device), 0.5)
    torch.library.opcheck(getattr(torch.ops.msdetr, op).default, arguments)


def test_float64_takes_the_reference(kernel_device):
    boxes = random_boxes(2, 9, dtype=torch.float64).to(kernel_device)
    with pytest.raises(NotImplementedError, match="float64 boxes"):
        nms_mask(boxes, iou_threshold=0.5, impl="triton")
    keep = nms_mask(boxes, iou_threshold=0.3)
    assert keep.tolist() == [greedy(of_problem, 0.3) for of_problem in boxes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes must be \[P, n, 4\], got \[3, 4\]"),
        ({"boxes": torch.zeros(1, 3, 5)}, r"boxes must be \[P, n, 4\]"),
        ({"boxes": torch.zeros(1, 3, 4).long()}, "boxes must be floating point"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": NAN}, "iou_threshold must be"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"boxes": torch.zeros(1, 3, 4), "iou_threshold": 0.5}
    with pytest.raises(ValueError, match=message):
        nms_mask(**arguments | change)


@pytest.mark.gpu
def test_graph_capture(kernel_device):
    """Nothing is read on the host."""
    boxes = random_boxes(10, 1000).to(kernel_device)
    expected = nms_mask(boxes, iou_threshold=0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = nms_mask(boxes, iou_threshold=0.9)
    graph.replay()
    assert torch.equal(keep, expected)
