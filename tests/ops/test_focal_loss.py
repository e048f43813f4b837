"""The focal loss against torchvision's on one-hot targets, and its kernels against float64.

On a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import PoisonedMemory, assert_as_accurate
from torch import Tensor

from msdetr.ops import focal_loss as focal_loss_module
from msdetr.ops.focal_loss import focal_loss
from msdetr.structures import BACKGROUND, IGNORED

FOCAL = {"alpha": 0.25, "gamma": 2.0}
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
HALF = (torch.bfloat16, torch.float16)
ROUNDING = 8
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def one_hot(target_class: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(target_class + 1, classes + 1)[..., 1:].to(dtype)


@dataclass(frozen=True)
class Call:
    """Arguments of the op, and the gradient of its output."""

    logits: Tensor
    target_class: Tensor
    grad_output: Tensor
    alpha: float = 0.25
    gamma: float = 2.0

    def run(self, impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The sums, and the gradient of the logits."""
        logits = self.logits if dtype is None else self.logits.to(dtype)
        logits = logits.detach().requires_grad_()
        loss = focal_loss(logits, self.target_class, alpha=self.alpha, gamma=self.gamma, impl=impl)
        (gradient,) = torch.autograd.grad(loss, logits, self.grad_output.to(loss.dtype))
        return [loss.detach(), gradient]


def random_call(
    device: torch.device,
    shape: tuple[int, ...] = (2, 2, 5, 7),
    *,
    dtype: torch.dtype = torch.float32,
    alpha: float = 0.25,
    gamma: float = 2.0,
    spread: float = 3.0,
) -> Call:
    logits = (spread * torch.randn(shape)).to(device, dtype)
    target_class = torch.randint(IGNORED, shape[-1], shape[:-1], device=device)
    return Call(logits, target_class, torch.randn(shape[0], device=device), alpha, gamma)


def check(call: Call) -> list[Tensor]:
    """Compare both results of the kernels with the reference, and return them."""
    result = call.run("triton")
    assert_as_accurate(
        result, call.run("reference"), call.run("reference", torch.float64), rounding=ROUNDING
    )
    return result


class TestReference:
    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_derivatives(self, gamma):
        """First and second derivatives: the gradient is written by hand."""
        logits = torch.randn(2, 1, 6, 3, dtype=torch.float64, requires_grad=True)
        target_class = torch.tensor([BACKGROUND, 0, 2, 1, 3, IGNORED]).expand(2, 1, 6)

        def loss(logits: Tensor) -> Tensor:
            return focal_loss(logits, target_class, alpha=0.25, gamma=gamma)

        assert torch.autograd.gradcheck(loss, [logits])
        assert torch.autograd.gradgradcheck(loss, [logits])

    def test_infinite_logits(self):
        """The loss of a correct infinite logit is 0, that of a wrong one infinite."""
        logits = torch.tensor([[[[INF, -INF, 0.0]]], [[[INF, INF, 0.0]]]])
        loss = focal_loss(logits, torch.zeros(2, 1, 1, dtype=torch.int64), **FOCAL)
        torch.testing.assert_close(loss, torch.tensor([0.75 * 0.25 * 0.6931472, INF]))

    def test_float64_stays(self):
        logits = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
        loss = focal_loss(logits, torch.randint(-1, 4, (1, 2, 5)), **FOCAL)
        assert loss.dtype == torch.float64


class TestBothImplementations:
    @pytest.mark.parametrize(
        ("alpha", "gamma"),
        [(0.25, 2.0), (0.25, 1.0), (0.25, 0.0), (0.6, 1.5), (0.0, 0.5), (1.0, 3.0)],
    )
    def test_equals_torchvision(self, kernel_device, impl, alpha, gamma):
        call = random_call(kernel_device, (2, 3, 4, 5), alpha=alpha, gamma=gamma)
        exact = call.logits.double().requires_grad_()
        target = one_hot(call.target_class.clamp(min=BACKGROUND), 5, exact.dtype)
        expected = torchvision.ops.sigmoid_focal_loss(exact, target, alpha, gamma)
        expected = (expected * (call.target_class != IGNORED)[..., None]).sum((1, 2, 3))
        gradients = torch.autograd.grad(expected, exact, call.grad_output.double())
        loss, gradient = call.run(impl)
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[0].float(), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("classes", [1, 4])
    def test_background_alone(self, kernel_device, impl, classes):
        logits = torch.zeros(1, 2, 3, classes, device=kernel_device)
        target_class = torch.full((1, 2, 3), -1, device=kernel_device)
        loss = focal_loss(logits, target_class, **FOCAL, impl=impl)
        assert loss.item() == pytest.approx(6 * classes * 0.75 * 0.25 * 0.6931472)

    @pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
    @pytest.mark.parametrize("gamma", [2.0, 1.5])
    def test_huge_logits_are_finite(self, kernel_device, impl, size, gamma):
        """The loss of a correct huge logit is 0, that of a wrong one its magnitude."""
        target_class = torch.zeros(1, 1, 1, dtype=torch.int64, device=kernel_device)
        for sign in (1, -1):
            logits = sign * torch.tensor([[[[size, -size]]]], device=kernel_device)
            logits.requires_grad_()
            loss = focal_loss(logits, target_class, alpha=0.25, gamma=gamma, impl=impl)
            expected = 0.0 if sign > 0 else 0.25 * size + 0.75 * size
            assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
            loss.sum().backward()
            expected = [0.0, 0.0] if sign > 0 else [-0.25, 0.75]
            assert logits.grad.flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)

    def test_nan_affects_only_its_layer_and_its_gradient(self, kernel_device, impl):
        call = random_call(kernel_device, (3, 2, 5, 4))
        call.target_class[1, 0, 2] = 1
        expected = call.run(impl)
        call.logits[1, 0, 2, 3] = NAN
        loss, gradient = call.run(impl)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().nonzero().tolist() == [[1, 0, 2, 3]]
        torch.testing.assert_close(loss[::2], expected[0][::2])

    @pytest.mark.parametrize("missing", [5, 2**32, 2**63 - 1, -3, IGNORED - 2**32, -(2**63)])
    def test_classes_that_do_not_exist_are_background(self, kernel_device, impl, missing):
        call = random_call(kernel_device, (2, 1, 4, 5))
        targets = [call.target_class.masked_fill(call.target_class < 2, x) for x in (-1, missing)]
        for mine, expected in zip(
            *(replace(call, target_class=x).run(impl) for x in targets), strict=True
        ):
            assert torch.equal(mine, expected)

    @pytest.mark.parametrize("classes", [1, 3, 8, 91])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ignored_queries_have_no_loss(self, kernel_device, impl, classes, gamma, dtype):
        """Whatever their logits are."""
        shape = (2, 1, 24, classes)
        call = random_call(kernel_device, shape, dtype=dtype, gamma=gamma)
        ignored = torch.rand(shape[:3], device=kernel_device) < 0.5
        call.target_class.masked_fill_(ignored, IGNORED)
        logits = call.logits.masked_fill(ignored[..., None], -INF)
        as_background = torch.where(ignored, BACKGROUND, call.target_class)
        expected = replace(call, logits=logits, target_class=as_background).run(impl)
        for value in (1.0, 1e6, INF, -INF, NAN):
            logits = call.logits.masked_fill(ignored[..., None], value)
            loss, gradient = replace(call, logits=logits).run(impl)
            assert not gradient[ignored].any()
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])

    @pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nothing(self, kernel_device, impl, shape, dtype):
        loss, gradient = random_call(kernel_device, shape, dtype=dtype).run(impl)
        assert loss.tolist() == [0.0] * shape[0]
        assert loss.dtype == torch.float32
        assert gradient.shape == shape
        assert gradient.dtype == dtype

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision_is_computed_in_float32(self, kernel_device, impl, dtype):
        call = random_call(kernel_device, dtype=dtype)
        loss, gradient = call.run(impl)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        whole = replace(call, logits=call.logits.float()).run(impl)
        torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradient.float(), whole[1], rtol=torch.finfo(dtype).eps, atol=1e-6
        )

    def test_one_value_per_layer(self, kernel_device, impl):
        call = random_call(kernel_device, (3, 2, 5, 4))
        loss, gradient = call.run(impl)
        for layer in range(3):
            one = slice(layer, layer + 1)
            single = replace(
                call,
                logits=call.logits[one],
                target_class=call.target_class[one],
                grad_output=call.grad_output[one],
            )
            for mine, expected in zip(single.run(impl), (loss, gradient), strict=True):
                torch.testing.assert_close(mine, expected[one])

    def test_only_the_arguments_are_kept(self, kernel_device, impl):
        call = random_call(kernel_device)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            focal_loss(call.logits.requires_grad_(), call.target_class, **FOCAL, impl=impl)
        storages = {x.untyped_storage().data_ptr() for x in (call.logits, call.target_class)}
        assert saved
        assert {x.untyped_storage().data_ptr() for x in saved} <= storages

    def test_autocast_changes_nothing(self, kernel_device, impl):
        call = random_call(kernel_device)
        expected = call.run(impl)
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            result = call.run(impl)
        assert all(map(torch.equal, result, expected))

    def test_compiles_in_one_graph(self, kernel_device, impl):
        torch._dynamo.reset()
        compiled = torch.compile(focal_loss, backend="aot_eager", fullgraph=True, dynamic=True)
        for shape in ((2, 2, 5, 7), (3, 4, 8, 7)):
            call = random_call(kernel_device, shape)
            logits = call.logits.clone().requires_grad_()
            loss = compiled(logits, call.target_class, **FOCAL, impl=impl)
            (gradient,) = torch.autograd.grad(loss, logits, call.grad_output)
            for mine, expected in zip((loss, gradient), call.run(impl), strict=True):
                torch.testing.assert_close(mine, expected)


class TestKernel:
    @pytest.mark.parametrize(
        "shape",
        [
            (1, 1, 1, 1),
            (3, 1, 13, 1),  # odd: chunks of one logit
            (1, 2, 8, 1),  # every logit its own query
            (1, 2, 4, 2),
            (1, 2, 4, 3),
            (1, 2, 4, 6),
            (2, 1, 8, 7),
            (1, 2, 4, 9),
            (2, 3, 7, 91),
            (2, 2, 14, 91),  # two programs per layer
            (1, 1, 3, 2500),  # several programs per query
            (2, 1, 16, 80),  # chunks end with queries
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sizes(self, kernel_device, shape, dtype):
        check(random_call(kernel_device, shape, dtype=dtype))

    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_saturated_logits(self, kernel_device, gamma, dtype):
        sizes = torch.tensor([1e4, 1e2, 88.0, 30.0, 1.0, 1e-3, 1e-8])
        logits = torch.cat((-sizes, torch.zeros(2), sizes)).repeat(2, 1, 4, 1)
        call = random_call(kernel_device, tuple(logits.shape), gamma=gamma)
        call = replace(call, logits=logits.to(kernel_device, dtype))
        assert all(x.isfinite().all() for x in check(call))

    def test_small_losses_are_relatively_exact(self, kernel_device):
        """Each logit is alone in its layer, so that no larger one hides its error."""
        logits = torch.linspace(-12, 4, 17, device=kernel_device).view(17, 1, 1, 1)
        target_class = torch.full((17, 1, 1), -1, device=kernel_device)
        call = Call(logits, target_class, torch.ones(17, device=kernel_device))
        exact = call.run("reference", torch.float64)
        for mine, truth in zip(call.run("triton"), exact, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=0)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
    def test_values_that_are_not_finite_equal_the_reference(self, kernel_device, gamma):
        logits = torch.tensor([INF, -INF, NAN, 1.0], device=kernel_device)
        logits = logits.view(4, 1, 1, 1).repeat(2, 1, 1, 1)  # a layer for each
        target_class = torch.tensor([0, -1], device=kernel_device)
        target_class = target_class.repeat_interleave(4).view(8, 1, 1)
        call = Call(logits, target_class, torch.ones(8, device=kernel_device), gamma=gamma)
        for mine, expected in zip(call.run("triton"), call.run("reference"), strict=True):
            torch.testing.assert_close(mine, expected, equal_nan=True)

    def test_memory_layouts(self, kernel_device):
        """Each is compiled on its own, and may sum in another order and round elsewhere."""
        call = random_call(kernel_device, (2, 3, 4, 5))
        expected = call.run("triton")
        wide = torch.full((2, 3, 4, 11), NAN, device=kernel_device)
        wide[..., 3:8] = call.logits
        every_other = torch.full((2, 2), NAN, device=kernel_device)
        every_other[:, 0] = call.grad_output
        strided = replace(
            call,
            logits=wide[..., 3:8],
            target_class=call.target_class.mT.contiguous().mT,
            grad_output=every_other[:, 0],
        )
        transposed = replace(call, logits=call.logits.transpose(0, 3).contiguous().transpose(0, 3))
        shifted = torch.cat((call.logits.new_zeros(1), call.logits.flatten()))  # by 4 bytes
        shifted = replace(call, logits=shifted[1:].view(call.logits.shape))
        for other in (strided, transposed, shifted):
            for mine, truth in zip(other.run("triton"), expected, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-5, atol=0)
        summed = replace(call, grad_output=torch.ones((), device=kernel_device).expand(2))
        dense = replace(call, grad_output=torch.ones(2, device=kernel_device))
        gradients = [one.run("triton")[1] for one in (summed, dense)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("shape", [(2, 2, 14, 91), (3, 1, 13, 1), (2, 1, 16, 80)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_element_is_written(self, kernel_device, shape, dtype):
        call = random_call(kernel_device, shape, dtype=dtype)
        arguments = (call.logits, call.target_class, call.alpha, call.gamma)
        with PoisonedMemory():
            result = (
                focal_loss_module._forward(*arguments),
                focal_loss_module._backward(call.grad_output, *arguments),
            )
        for mine, expected in zip(result, call.run("triton"), strict=True):
            assert torch.equal(mine, expected)

    def test_results_repeat(self, kernel_device):
        call = random_call(kernel_device, (2, 2, 14, 91))
        assert all(map(torch.equal, call.run("triton"), call.run("triton")))

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_random_sizes(self, kernel_device, data):
        shape = tuple(data.draw(st.integers(1, maximum)) for maximum in (3, 3, 9, 20))
        call = random_call(
            kernel_device,
            shape,
            dtype=data.draw(st.sampled_from([torch.float32, *HALF])),
            alpha=data.draw(st.floats(0.0, 1.0)),
            gamma=data.draw(st.sampled_from(GAMMAS)),
        )
        check(call)


class TestOperator:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, kernel_device, dtype):
        call = random_call(kernel_device, (2, 1, 3, 5), dtype=dtype)
        arguments = (call.target_class, call.alpha, call.gamma)
        torch.library.opcheck(
            torch.ops.msdetr.focal_loss.default, (call.logits.requires_grad_(), *arguments)
        )
        torch.library.opcheck(
            torch.ops.msdetr.focal_loss_backward.default,
            (call.grad_output, call.logits.detach(), *arguments),
        )

    def test_second_derivatives_are_refused(self, kernel_device):
        """Silence would be a wrong gradient."""
        call = random_call(kernel_device)
        logits = call.logits.requires_grad_()
        loss = focal_loss(logits, call.target_class, **FOCAL, impl="triton")
        (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()

    def test_export(self, kernel_device):
        class Loss(torch.nn.Module):
            def forward(self, logits: Tensor, target_class: Tensor) -> Tensor:
                return focal_loss(logits, target_class, **FOCAL, impl="triton")

        call = random_call(kernel_device)
        program = torch.export.export(Loss(), (call.logits, call.target_class))
        assert "msdetr.focal_loss" in str(program.graph)
        result = program.module()(call.logits, call.target_class)
        assert torch.equal(result, call.run("triton")[0])


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"logits": torch.zeros(2, 3, 4)}, r"logits must be \[N, B, Q, K\].* got \[2, 3, 4\]"),
            ({"logits": torch.zeros(1, 2, 3, 0)}, "logits must be .*K at least 1"),
            ({"logits": torch.zeros(1, 2, 3, 4).long()}, "logits must be floating point"),
            ({"target_class": torch.zeros(1, 2, 4).long()}, r"target_class must be \[1, 2, 3\]"),
            ({"target_class": torch.zeros(1, 2, 3).int()}, "target_class must be int64"),
            ({"target_class": torch.zeros(1, 2, 3).long().to("meta")}, "target_class is on meta"),
            ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
            ({"alpha": NAN}, "alpha must be"),
            ({"gamma": -1.0}, "gamma must be finite and not negative, got -1.0"),
            ({"gamma": INF}, "gamma must be"),
            ({"impl": "cuda"}, "impl must be"),
        ],
    )
    def test_wrong_ones_are_named(self, change, message):
        arguments = {
            "logits": torch.zeros(1, 2, 3, 4),
            "target_class": torch.zeros(1, 2, 3, dtype=torch.int64),
            **FOCAL,
        }
        with pytest.raises(ValueError, match=message):
            focal_loss(**{**arguments, **change})

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (torch.zeros(1, 2, 3, 4, dtype=torch.float64), "float32, bfloat16 or float16"),
            (torch.zeros(65536, 0, 1, 1), "up to 65535 layers"),
        ],
    )
    def test_what_the_kernel_does_not_serve(self, kernel_device, logits, message):
        logits = logits.to(kernel_device)
        target_class = torch.zeros(logits.shape[:3], dtype=torch.int64, device=kernel_device)
        with pytest.raises(NotImplementedError, match=message):
            focal_loss(logits, target_class, **FOCAL, impl="triton")
        assert focal_loss(logits, target_class, **FOCAL).isfinite().all()


@pytest.mark.gpu
class TestGpu:
    def test_graph_capture(self, kernel_device):
        call = random_call(kernel_device, (6, 2, 30, 91))
        logits = call.logits.clone().requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            loss = focal_loss(logits, call.target_class, **FOCAL)
            return loss, *torch.autograd.grad(loss, logits, call.grad_output)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        call.logits.normal_()
        logits.detach().copy_(call.logits)
        graph.replay()
        assert all(map(torch.equal, result, call.run("triton")))

    def test_nothing_waits_for_the_device(self, kernel_device):
        call = random_call(kernel_device)
        call.run("triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.run("triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_auto_takes_the_kernel(self, kernel_device):
        call = random_call(kernel_device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call.run("auto")
        names = [event.key for event in profile.key_averages()]
        assert any("focal_forward_kernel" in name for name in names)
        assert any("focal_backward_kernel" in name for name in names)

    def test_more_logits_than_32_bits_count(self, kernel_device):
        queries, classes = 2**25, 65
        if torch.cuda.get_device_properties(kernel_device).total_memory < 16 * 2**30:
            pytest.skip("needs 16 GiB")
        logits = torch.zeros(1, 1, queries, classes, dtype=torch.bfloat16, device=kernel_device)
        target_class = torch.full((1, 1, queries), -1, device=kernel_device)
        target_class[..., -1] = classes - 1
        loss = focal_loss(logits.requires_grad_(), target_class, **FOCAL, impl="triton")
        expected = queries * classes * 0.75 * 0.25 * 0.6931472
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.sum().backward()
        tail = focal_loss_module._backward(
            torch.ones(1, device=kernel_device),
            logits.detach()[..., -9:, :],
            target_class[..., -9:],
            *FOCAL.values(),
        )
        torch.testing.assert_close(logits.grad[..., -9:, :], tail)
        assert tail[..., -1, -1].item() < 0 < tail[..., -1, -2].item()
