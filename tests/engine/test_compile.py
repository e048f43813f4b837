"""Compiled training steps: equal to eager ones, and compiled once per shape."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engine.helpers import assignment_of, deterministic_config
from model.helpers import image_batch, tiny_config
from scenes import padded_targets, random_boxes
from torch import Tensor, nn

from msdetr.config import CompileConfig, LossConfig, RunConfig
from msdetr.engine import compile as compile_module
from msdetr.engine import trainer as trainer_module
from msdetr.engine.compile import (
    CompileError,
    compile_step,
    compiled_regions,
    explain_compile_errors,
    is_compiled,
    num_graphs,
)
from msdetr.engine.distributed import Worker
from msdetr.engine.prefetch import StepInput
from msdetr.engine.run import build_trainer
from msdetr.engine.trainer import Trainer
from msdetr.model.detector import Detector, build_detector
from msdetr.structures import ImageBatch, TargetCount, Targets
from msdetr.supervision.criterion import Criterion


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


class Step(NamedTuple):
    """The results of a forward and a backward pass."""

    total: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def new_step(**changes: object) -> tuple[Detector, Criterion]:
    """A detector in training mode, and a criterion without random numbers."""
    torch.manual_seed(0)
    config = tiny_config(**changes)
    model = build_detector(config).train()
    # Heads start at zero, so that errors of the layers before them would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    assignment = assignment_of(config, positive_fraction=1.0, encoder_max_positives=10**6)
    return model, Criterion(assignment, LossConfig())


def images_of(*sizes: tuple[int, int], padded: tuple[int, int] = (64, 64)) -> ImageBatch:
    """The same images at every call."""
    torch.manual_seed(1)
    return image_batch(*sizes, padded=padded)


def targets_of(*counts: int, slots: int = 8) -> Targets:
    """The same targets at every call."""
    torch.manual_seed(2)
    labels = [torch.arange(count) % 3 for count in counts]
    return padded_targets(labels, [random_boxes(count) for count in counts], slots=slots)


def run(
    model: Detector,
    criterion: Criterion,
    images: ImageBatch,
    targets: Targets,
    dtype: torch.dtype = torch.float32,
) -> Step:
    model.zero_grad(set_to_none=True)
    device = images.pixels.device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        noise = model.draw_noise(targets, torch.Generator(device).manual_seed(3))
        output = model(images, targets, noise)
    losses = criterion(
        output,
        targets,
        priority=criterion.draw_priority(output),  # All positives are kept.
        num_targets=TargetCount(targets.count.sum(), targets.count.sum()),
    )
    losses.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(losses.total.detach(), losses.terms, gradients)


def assert_close(actual: Step, expected: Step) -> None:
    """Losses agree to 1e-5, and every gradient to 1e-3 of its norm: float32."""
    torch.testing.assert_close(actual.total, expected.total, rtol=1e-5, atol=0.0)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = (actual.gradients[name] - gradient).norm()
        # Gradients with a tiny norm are rounding errors, of biases before a softmax.
        assert difference <= 1e-3 * (gradient.norm() + 1e-3), name


def assert_as_close(actual: Step, other: Step, exact: Step) -> None:
    """In bfloat16, losses agree to 1e-2 with float32. The distance of the gradient from float32 is
    at most 1.2 times that of `other`, and 4 times for each parameter."""
    torch.testing.assert_close(actual.total, exact.total, rtol=1e-2, atol=0.0)

    def distances(step: Step) -> dict[str, Tensor]:
        return {name: (step.gradients[name] - g).norm() for name, g in exact.gradients.items()}

    ours, others = distances(actual), distances(other)
    assert torch.stack([*ours.values()]).norm() <= 1.2 * torch.stack([*others.values()]).norm()
    for name, gradient in exact.gradients.items():
        assert ours[name] <= 4 * others[name] + 1e-3 * (gradient.norm() + 1.0), name


VARIANTS = {
    "ms-detr": {},
    "ms-detr-pp": {"mixed_selection": True, "look_forward_twice": True},
    "implementation a": {
        "one_to_many": "output",
        "one_to_many_ffn": False,
        "decoder_order": "self_cross",
    },
    "one stage": {"two_stage": False, "box_refine": False},
    "learned positions": {"position_embedding": "learned"},
    "frozen backbone": {"train_backbone": False},
    "hybrid queries, implementation a": {
        "extra_queries": "hybrid",
        "num_hybrid_queries": 10,
        "decoder_order": "self_cross",
        "one_to_many": "output",
        "one_to_many_ffn": False,
    },
    "groups in one stage": {
        "extra_queries": "group",
        "num_groups": 3,
        "two_stage": False,
        "decoder_order": "self_cross",
        "one_to_many": "none",
        "one_to_many_ffn": False,
    },
    "dino": {
        "denoising": "contrastive",
        "denoising_groups": 2,
        "query_position": "box",
        "mixed_selection": True,
        "look_forward_twice": True,
        "proposal_score": "best_class",
        "head_sharing": "decoder",
        "decoder_norm": True,
        "decoder_order": "self_cross",
        "one_to_many": "none",
        "one_to_many_ffn": False,
    },
    "denoising in one stage": {
        "denoising": "dn",
        "query_position": "box_content",
        "two_stage": False,
        "decoder_order": "self_cross",
        "one_to_many": "none",
        "one_to_many_ffn": False,
    },
    "deta": {
        "proposal_nms_iou_threshold": 0.9,
        "proposal_content": True,
        "decoder_order": "self_cross",
        "one_to_many": "none",
        "one_to_many_ffn": False,
    },
    "ms-detr with denoising": {"denoising": "contrastive", "mixed_selection": True},
    "groups in two stages": {
        "extra_queries": "group",
        "num_groups": 3,
        "proposal_score": "best_class",
        "mixed_selection": True,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_captured_whole(changes: dict[str, object]):
    model, criterion = new_step(**changes)
    eager = run(model, criterion, images_of(), targets_of(3, 1))
    compile_step(model, criterion, backend="eager")
    compiled = run(model, criterion, images_of(), targets_of(3, 1))
    assert_close(compiled, eager)
    warm = num_graphs()
    assert warm >= 8
    run(model, criterion, images_of(), targets_of(0, 2))
    assert num_graphs() == warm


def test_activation_checkpointing_stays_possible():
    model, criterion = new_step(dropout=0.1)
    model.checkpoint_activations("all")
    compile_step(model, criterion, backend="aot_eager")
    torch.manual_seed(1)
    checkpointed = run(model, criterion, images_of(), targets_of(3, 1))
    model.checkpoint_activations("none")
    torch.manual_seed(1)
    kept = run(model, criterion, images_of(), targets_of(3, 1))
    assert_close(checkpointed, kept)


def test_generated_code_computes_what_eager_code_does():
    # One stage: in two stages, rounding could change the selected queries.
    model, criterion = new_step(two_stage=False)
    eager = run(model, criterion, images_of(), targets_of(3, 1))
    compile_step(model, criterion)
    assert_close(run(model, criterion, images_of(), targets_of(3, 1)), eager)


@pytest.mark.parametrize("what", ["layers", pytest.param("step", marks=pytest.mark.slow)])
def test_generated_code_in_bfloat16(what: str, monkeypatch: pytest.MonkeyPatch):
    model, criterion = new_step(two_stage=False, num_decoder_layers=1 if what == "layers" else 2)
    if what == "layers":  # A step has a hundred loops, each with a second of C++ compilation.
        layers = (*model.encoder.layers, *model.decoder.layers)
        some = [region for region in compiled_regions(model, criterion) if region.owner in layers]
        monkeypatch.setattr(compile_module, "compiled_regions", lambda model, criterion: some)
    eager, low = (
        run(model, criterion, images_of(), targets_of(3, 1), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    compile_step(model, criterion)
    compiled = run(model, criterion, images_of(), targets_of(3, 1), torch.bfloat16)
    assert num_graphs() >= 2
    assert_as_close(compiled, low, eager)


def test_a_captured_step_in_bfloat16():
    """All regions, cut and differentiated as for generated code, which would take minutes."""
    model, criterion = new_step(two_stage=False)
    eager, low = (
        run(model, criterion, images_of(), targets_of(3, 1), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    compile_step(model, criterion, backend="aot_eager")
    captured = run(model, criterion, images_of(), targets_of(3, 1), torch.bfloat16)
    assert num_graphs() >= 9  # One per kind of region; layers share theirs.
    assert_as_close(captured, low, eager)


def test_no_recompilation_once_every_bucket_was_met():
    model, criterion = new_step(num_encoder_layers=2)
    compile_step(model, criterion, backend="eager")
    buckets = ((64, 64), (64, 96), (96, 64))
    for padded in buckets:
        run(model, criterion, images_of(padded=padded), targets_of(3, 1))
    run(model, criterion, images_of(padded=buckets[0]), targets_of(3, 1, slots=16))
    warm = num_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        # Every pair of counts and slots, of counts and bucket, of slots and bucket.
        for i, counts in enumerate(((0, 0), (8, 2), (1, 7))):
            for j, slots in enumerate((8, 16, 32)):
                images = images_of((40, 61), (64, 33), padded=buckets[(i + j) % 3])
                run(model, criterion, images, targets_of(*counts, slots=slots))
    assert num_graphs() == warm


def test_no_recompilation_with_denoising():
    model, criterion = new_step(denoising="contrastive", denoising_queries=20)
    compile_step(model, criterion, backend="eager")
    shapes = list(itertools.product(((64, 64), (64, 96)), (8, 16, 32)))
    for padded, slots in shapes:
        run(model, criterion, images_of(padded=padded), targets_of(3, 1, slots=slots))
    warm = num_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for padded, slots in shapes:
            for counts in ((0, 0), (8, 2)):
                images = images_of((40, 61), (64, 33), padded=padded)
                run(model, criterion, images, targets_of(*counts, slots=slots))
    assert num_graphs() == warm


def test_layers_of_a_kind_share_their_graphs():
    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model, criterion = new_step(num_encoder_layers=layers, num_decoder_layers=layers)
        compile_step(model, criterion, backend="eager")
        run(model, criterion, images_of(), targets_of(3, 1))
        graphs.append(num_graphs())
    assert graphs[0] == graphs[1]


def test_an_unmet_shape_compiles_once_more():
    model, criterion = new_step()
    compile_step(model, criterion, backend="eager")
    run(model, criterion, images_of(), targets_of(3, 1))
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        run(model, criterion, images_of(padded=(96, 96)), targets_of(3, 1))


def test_names_and_copies_of_weights_stay_those_of_the_model():
    model, criterion = new_step()
    before = copy.deepcopy(model.state_dict())
    compile_step(model, criterion, backend="aot_eager")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [type(module) for module in model.modules()].count(Detector) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_position": "box", "mixed_selection": True, "denoising": "dn"},
        {"decoder_norm": True, "denoising": "contrastive"},
    ],
    ids=["ms-detr", "positions of boxes", "norm"],
)
def test_regions_cover_the_whole_model(changes):
    model, criterion = new_step(**changes)
    owners = {id(region.owner) for region in compiled_regions(model, criterion)}

    def is_covered(module: nn.Module) -> bool:
        return id(module) in owners or (
            bool(list(module.children())) and all(map(is_covered, module.children()))
        )

    # The neck and the position code run inside of `flatten`, heads and norm inside of `predict`.
    inside = ("neck", "position_embedding", "heads", "norm", "denoising")
    for name, child in (*model.named_children(), *model.decoder.named_children()):
        assert name in inside or is_covered(child), name
    methods = [region.method for region in compiled_regions(model, criterion)]
    assert methods.count("with_denoising") == (model.denoising is not None)


def test_code_that_cannot_be_compiled_is_an_error_with_a_remedy():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    compiled = torch.compile(Broken(), fullgraph=True, backend="aot_eager")
    with pytest.raises(CompileError, match="--compile off"), explain_compile_errors():
        compiled(torch.ones(2))


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("on", "cpu", True),
        ("off", "cuda", False),
    ],
)
def test_what_a_run_compiles(mode: str, device: str, expected: bool):
    assert is_compiled(CompileConfig(mode=mode), torch.device(device)) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generated_code_on_a_gpu():
    model, criterion = new_step(two_stage=False, hidden_dim=64)
    model.cuda()
    images = ImageBatch(*(tensor.cuda() for tensor in images_of()))
    targets = Targets(*(tensor.cuda() for tensor in targets_of(3, 1)))
    eager, low = (
        run(model, criterion, images, targets, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    compile_step(model, criterion)
    assert_close(run(model, criterion, images, targets), eager)
    assert_as_close(run(model, criterion, images, targets, torch.bfloat16), low, eager)


class TestRun:
    """A run with a compiled step."""

    def config(self, data: Path, output: Path, mode: str) -> RunConfig:
        config = deterministic_config(data, output, eval_every=2)
        return dataclasses.replace(config, compile=CompileConfig(mode=mode))

    def test_it_trains_as_one_that_is_not_and_compiles_before_the_first_step(
        self, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        quick = functools.partial(compile_step, backend="eager")
        monkeypatch.setattr(trainer_module, "compile_step", quick)
        worker = Worker(device=torch.device("cpu"))
        graphs: list[int] = []
        real_step = Trainer.train_step

        def counted_step(trainer: Trainer, step_input: StepInput) -> None:
            graphs.append(num_graphs())
            real_step(trainer, step_input)

        monkeypatch.setattr(Trainer, "train_step", counted_step)
        trainers = {}
        for mode in ("off", "on"):
            trainers[mode] = build_trainer(self.config(shapes, tmp_path / mode, mode), worker)
            trainers[mode].train()
        eager, compiled = trainers["off"], trainers["on"]
        assert eager.config.data.num_image_buckets == 0
        assert compiled.config.data.num_image_buckets == 16
        assert graphs[:4] == [0] * 4
        assert graphs[4] > 10
        assert graphs[4:] == [graphs[4]] * 4
        assert num_graphs() == graphs[4]  # Evaluation runs eagerly.
        for name, weight in eager.model.state_dict().items():
            torch.testing.assert_close(compiled.model.state_dict()[name], weight)
