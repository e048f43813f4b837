from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from msdetr.cli import main as console
from msdetr.cli.options import configure_logging, option_value, parse_preset, user_errors
from msdetr.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_to_their_configuration(name: str) -> None:
    assert parse_preset([name], prog="train.py") == PRESETS[name].config


@pytest.mark.parametrize(
    "options", [["--compile", "off"], ["--compile=off"], ["--compile.mode", "off"]]
)
def test_compile_has_a_short_form(options: list[str]) -> None:
    config = parse_preset(["tiny", *options, "--compile.no-warm-up"], prog="train.py")
    assert config.compile.mode == "off"
    assert not config.compile.warm_up


@pytest.mark.parametrize(
    "options",
    [["--assignment.one-to-many-cost-box=0.9"], ["--assignment.one_to_many_cost_box", "0.9"]],
)
def test_options_of_earlier_versions_are_accepted(options: list[str]) -> None:
    config = parse_preset(["tiny", *options], prog="train.py")
    assert config.assignment.one_to_many_iou_weight == 0.9


def test_options_override_the_preset() -> None:
    config = parse_preset(
        [
            *("tiny", "--data.root", "somewhere", "--output", "run", "--resume", "auto"),
            *("--train.epochs", "3", "--train.max-steps", "7", "--train.batch-size", "2"),
            *("--seed", "5", "--data.train-sizes", "64", "96", "--model.no-mixed-selection"),
            *("--eval.nms-iou-threshold", "0.5"),
        ],
        prog="train.py",
    )
    assert config.data.root == Path("somewhere")
    assert (config.output, config.resume, config.seed) == (Path("run"), "auto", 5)
    assert (config.train.epochs, config.train.max_steps, config.train.batch_size) == (3, 7, 2)
    assert config.data.train_sizes == (64, 96)
    assert not config.model.mixed_selection
    assert config.eval.nms_iou_threshold == 0.5
    assert config.optimizer == PRESETS["tiny"].config.optimizer


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "a preset is needed"),
        (["tinny"], "there is no preset 'tinny'"),
        (["--seed", "1", "tiny"], "the preset comes first"),
        (["tiny", "--train.epochz", "3"], "--train.epochs"),
        (["tiny", "--train.epochs", "many"], "invalid literal"),
        (["tiny", "--train.epochs", "0"], "epochs must be at least 1"),
        (["tiny", "--model.hidden-dim", "100"], "divisible by num_heads"),
        (["tiny", "--model.no-two-stage"], "needs two_stage"),
        (["tiny", "--resume", "auto", "--weights", "w.pth"], "give one of them"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_preset(arguments, prog="train.py")
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert reason in " ".join(output.err.replace("│", " ").split())
    assert output.out == ""
    assert "Traceback" not in output.err


def test_an_unknown_preset_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_preset(["tinny"], prog="train.py")
    error = capsys.readouterr().err
    assert all(name in error for name in PRESETS)
    with pytest.raises(SystemExit) as caught:
        parse_preset(["--help"], prog="train.py")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse_preset(["tiny", "--nonsense"], prog="train.py")
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_help_needs_no_torch() -> None:
    script = (
        "import json, sys; from msdetr.cli.main import main\n"
        "statuses = []\n"
        "for arguments in (['--help'], ['train', '--help'], ['train', 'tiny', '--help'],"
        " ['evaluate', '--help'], ['predict', '--help'], ['demo', '--help']):\n"
        "    try: statuses.append(main(arguments))\n"
        "    except SystemExit as end: statuses.append(end.code)\n"
        "print(json.dumps({'statuses': statuses, 'torch': 'torch' in sys.modules}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(run.stdout.splitlines()[-1]) == {"statuses": [0] * 6, "torch": False}
    for text in ("--train.max-steps", "Passes over the training images", "--score-threshold"):
        assert text in run.stdout


def test_console_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main([]) == 2
    assert console.main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("msdetr 0.")


def test_option_value() -> None:
    assert option_value(["--a", "1", "--checkpoint", "f"], "--checkpoint") == "f"
    assert option_value(["--checkpoint=f"], "--checkpoint") == "f"
    assert option_value(["--checkpoint"], "--checkpoint") is None
    assert option_value(["--checkpoints", "f"], "--checkpoint") is None


def test_user_errors_have_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise ValueError("the reason")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the reason\n"
    with pytest.raises(KeyError), user_errors():  # A bug, not an error of the user.
        raise KeyError("x")


@dataclass
class _LoggerState:
    handlers: list[logging.Handler]
    level: int


@pytest.fixture(autouse=True)
def _restored_logging() -> object:
    package = logging.getLogger("msdetr")
    state = _LoggerState(list(package.handlers), package.level)
    yield
    package.handlers, package.level = state.handlers, state.level


def test_logging_of_main_and_other_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("msdetr.part")
    configure_logging()
    logger.info("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.setenv("RANK", "3")
    configure_logging(is_main=False)
    logger.info("not shown")
    logger.warning("a warning")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "rank 3: a warning\n")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_are_short(script: str) -> None:
    assert len((ROOT / script).read_text().splitlines()) < 60
