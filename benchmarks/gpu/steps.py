"""The steps of `make gpu` and `make gpu-more`, most valuable first.

A command is a module or a script with its arguments, for this Python, or another program. In it,
`{out}` is the folder of the results, `{work}` a temporary folder, `{published}` the folder of the
published code, and `{budget}` the seconds after which a benchmark begins nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

_KERNELS = "tests/ops/test_ms_deform_attn_kernel.py"
_LISTS = "tests/ops/test_ms_deform_attn_lists.py"
_LIBRARY = "tests/ops/test_ms_deform_attn_library.py"
_ASSIGNMENT = "tests/ops/test_assignment_kernels.py"
_FOCAL_LOSS = "tests/ops/test_focal_loss.py"
_NMS = "tests/ops/test_nms.py"
_TIMED = " ".join(
    f"tests/benchmarks/test_{name}.py" for name in ("attention", "assignment", "tune")
)
# Kernels compile on the host, so several processes share the GPU. Measurements run alone on it.
_TESTS = "-m pytest -v -n 8 --durations 5"
_SIZE = "--device cuda --height 800 --width 1333"
_STEP = f"-m benchmarks.detector train {_SIZE} --warmup 3 --time-budget {{budget}}"
_RUN = (
    "train.py ms-detr-r50-300 --data.root {work}/demo/data --model.backbone-weights none "
    "--train.batch-size 4 --train.max-steps 20 --data.num-image-buckets 2"
)
ATTENTION_KERNELS = ("forward_kernel", "points_kernel", "splat_kernel")


@dataclass(frozen=True)
class Step:
    """A command with its share of the time."""

    name: str
    seconds: int
    """At least, while there is time."""
    command: str
    rehearsal: str
    """Options that replace those of the command without a GPU."""
    outputs: tuple[str, ...] = ()
    """Files that it writes to the folder of the results."""
    reserve: int = 20
    """Seconds between the end of its budget and its own: to finish what has begun."""
    takes_spare: bool = True
    """Whether it also gets the seconds that earlier steps left."""

    @property
    def program(self) -> str | None:
        """The program on the PATH that it needs, besides Python."""
        word = self.command.split()[0]
        return None if word == "-m" or word.endswith(".py") else word


_COLLECT = "-n 0 --collect-only -qqq"
_TINY = "--device cpu --presets tiny --height 64 --width 64 --batches 1 --dtypes float32"
_TINY_STEP = f"{_TINY} --implementations eager --steps 1 --warmup 1"
_TINY_ATTENTION = (
    "--device cpu --shapes tiny tiny-decoder --batches 1 --dtypes bfloat16 --spreads 0 "
    "--repetitions 2"
)

RUN = (
    Step(
        "kernels",
        40,
        f"{_TESTS} {_KERNELS}::TestPixelsAsQueries {_KERNELS}::TestAccuracy {_LISTS} "
        f"{_LIBRARY}::TestGpu {_FOCAL_LOSS}::TestGpu "
        f"{_ASSIGNMENT}::TestOneToMany::test_sizes_of_training "
        f"{_ASSIGNMENT}::TestLinearAssignment::test_thousands_of_problems",
        _COLLECT,
    ),
    Step(
        "host_reads",
        50,
        "-m benchmarks.detector syncs --device cuda --check --height 480 --width 640 "
        "--more-presets h-deformable-detr-r50 group-deformable-detr-r50 "
        "ms-h-deformable-detr-r50 ms-group-deformable-detr-r50 dn-deformable-detr-r50 "
        "dino-r50-4scale deta-r50 ms-cdn-deformable-detr-r50",
        "--device pretend --preset tiny --more-presets --height 128 --width 160",
    ),
    Step(
        "attention",
        100,
        "-m benchmarks.attention --device cuda --shapes encoder decoder-300 "
        "--dtypes bfloat16 float32 --spreads 0 2 --time-budget {budget} "
        "--output {out}/ms_deform_attn_cuda.json",
        _TINY_ATTENTION,
        ("ms_deform_attn_cuda.json",),
        takes_spare=False,  # it would take all, which the next ones need to compile
    ),
    Step(
        "attention_compiled",
        35,
        "-m benchmarks.attention --device cuda --implementations reference-compiled "
        "--shapes encoder decoder-300 --batches 2 --dtypes bfloat16 --spreads 0 "
        "--time-budget {budget} --output {out}/ms_deform_attn_compiled_cuda.json",
        f"{_TINY_ATTENTION} --implementations reference",
        ("ms_deform_attn_compiled_cuda.json",),
        reserve=10,
    ),
    Step(
        "train_step",
        145,
        f"{_STEP} --batches 2 8 --dtypes bfloat16 --steps 20 "
        "--implementations eager compiled-graphs compiled --output {out}/train_step_cuda.json",
        _TINY_STEP,
        ("train_step_cuda.json",),
        reserve=40,
    ),
    Step(
        "inference",
        60,
        f"-m benchmarks.detector inference {_SIZE} --batches 1 8 --dtypes bfloat16 --passes 50 "
        "--warmup 5 --implementations eager compiled-graphs compiled "
        "--time-budget {budget} --output {out}/inference_cuda.json",
        f"{_TINY} --implementations eager --passes 2 --warmup 1",
        ("inference_cuda.json",),
        reserve=30,
    ),
    Step(
        "assignment",
        25,
        "-m benchmarks.assignment --device cuda --batches 2 16 --targets 20 100 "
        "--time-budget {budget} --output {out}/assignment_cuda.json",
        "--device cpu --batches 2 --queries 30 --targets 5 --anchors 50 --repetitions 2",
        ("assignment_cuda.json",),
        reserve=10,
    ),
    Step(
        "tests",
        25,
        f"{_TESTS} {_NMS} {_FOCAL_LOSS} {_ASSIGNMENT} {_LIBRARY} {_LISTS} {_KERNELS}",
        _COLLECT,
    ),
)

MORE = (
    Step(
        "tune",
        60,
        "-m benchmarks.attention tune --dtypes bfloat16 --queries few grid "
        "--kernels value lists windows --time-budget {budget} "
        "--table {out}/ms_deform_attn_configs.json",
        "--help",
        ("ms_deform_attn_configs.json",),
    ),
    Step(
        "profile",
        40,
        "-m benchmarks.detector profile --device cuda --height 800 --width 1333 "
        "--dtype bfloat16 --output {out}/profile_cuda.json --trace {out}/trace_cuda.json.gz",
        "--device cpu --preset tiny --height 64 --width 64 --dtype float32 --warmup 1 --steps 1",
        ("profile_cuda.json", "trace_cuda.json.gz"),
    ),
    Step(
        "ncu",
        35,
        "ncu --target-processes all --clock-control none --set full --csv --page details "
        "--log-file {out}/ncu.csv --launch-count 9 --kill yes "
        f"--kernel-name regex:^({'|'.join(ATTENTION_KERNELS)})$ "
        "{python} -m benchmarks.attention --device cuda --implementations msdetr-fused "
        "--shapes encoder --batches 2 --dtypes bfloat16 --spreads 0",
        _TINY_ATTENTION,
        ("ncu.csv",),
    ),
    Step(
        "train_step_8",
        80,
        f"{_STEP} --batches 8 --dtypes bfloat16 --steps 20 "
        "--implementations eager compiled-graphs --output {out}/train_step_8_cuda.json",
        _TINY_STEP,
        ("train_step_8_cuda.json",),
        reserve=45,
    ),
    Step(
        "attention_900",
        30,
        "-m benchmarks.attention --device cuda --shapes decoder-900 --dtypes bfloat16 float32 "
        "--spreads 0 --time-budget {budget} --output {out}/ms_deform_attn_900_cuda.json",
        _TINY_ATTENTION,
        ("ms_deform_attn_900_cuda.json",),
        reserve=10,
    ),
    Step(
        "query_sets",
        15,
        "-m benchmarks.detector query_sets --device cuda --dtypes bfloat16 float32 "
        "--output {out}/query_sets_cuda.json",
        "--device cpu --dtypes float32 --sets group --batch 1 --repetitions 1",
        ("query_sets_cuda.json",),
    ),
    Step(
        "supervision",
        60,
        f"-m benchmarks.detector supervision {_SIZE} --warmup 3 --time-budget {{budget}} "
        "--dtypes bfloat16 --steps 20 --implementations compiled-graphs "
        "--presets deformable-detr-pp-r50-300 ms-detr-pp-r50-300 ms-cdn-deformable-detr-r50 "
        "h-deformable-detr-r50 dino-r50-4scale deta-r50 group-deformable-detr-r50 "
        "--output {out}/supervision_cuda.json",
        f"{_TINY_STEP} --presets tiny deformable-detr-r50",
        ("supervision_cuda.json",),
        reserve=45,
    ),
    Step(
        "published",
        60,
        f"{_STEP} --published {{published}} --dtypes float32 --steps 10 "
        "--implementations published compiled-graphs --output {out}/published_cuda.json",
        _TINY_STEP,
        ("published_cuda.json",),
        reserve=45,
    ),
    Step(
        "gpu_tests",
        60,
        f"{_TESTS} -m gpu --continue-on-collection-errors --ignore tests/ops "
        + " ".join(f"--ignore {file}" for file in _TIMED.split()),
        _COLLECT,
    ),
    Step("timers", 20, f"-m pytest -v -m gpu {_TIMED}", "--collect-only -qqq"),
    Step(
        "parity",
        25,
        f'{_TESTS} tests/parity --impl triton -k "msda or one_to or losses"',
        _COLLECT,
    ),
    Step(
        "demo",
        30,
        "-m msdetr.cli.main demo --output {work}/demo --num-train 400 --num-val 40 --max-steps 40",
        "--num-train 4 --num-val 2 --max-steps 1",
    ),
    Step("run_float32", 25, f"{_RUN} --compile off --output {{work}}/float32", "--help"),
    Step(
        "run_bfloat16",
        25,
        f"{_RUN} --train.precision bfloat16 --compile off --output {{work}}/bfloat16",
        "--help",
    ),
    Step(
        "run_graphs",
        35,
        f"{_RUN} --train.precision bfloat16 --compile.cuda-graphs --output {{work}}/graphs",
        "--help",
    ),
)

COMMANDS = {"run": (RUN, 480), "more": (MORE, 600)}
"""Steps of each command, and the seconds that they take at most, together."""
