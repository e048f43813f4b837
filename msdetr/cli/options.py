"""Shared code of the command-line tools: options from dataclasses, errors, logging.

Does not import torch, so that `--help` and errors in options respond at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

import tyro
from tqdm import tqdm

from msdetr.config import RunConfig
from msdetr.config.parsing import current_name
from msdetr.presets import PRESETS

T = TypeVar("T")

USAGE_ERROR = 2
"""Exit status of a command whose options or files are wrong."""


def parse_options(
    options: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None = None,
) -> T:
    """Fill a dataclass from command-line arguments.

    Wrong options and contradictory values end the process with the reason and status 2, `--help`
    with status 0. Of several processes only the first prints.
    """
    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=list(arguments),
        default=tyro.MISSING_NONPROP if default is None else default,
        console_outputs=_is_main_process(),
    )


def parse_preset(arguments: Sequence[str], *, prog: str) -> RunConfig:
    """The configuration of `PRESET [--option value ...]`."""
    name = arguments[0] if arguments else ""
    if name in PRESETS:
        preset = PRESETS[name]
        return parse_options(
            RunConfig,
            [_current_option(argument) for argument in arguments[1:]],
            prog=f"{prog} {name}",
            default=preset.config,
            description=f"Train {preset.description}.",
        )
    usage = f"usage: {prog} PRESET [--option value ...]\n       {prog} PRESET --help\n\n"
    if name in ("-h", "--help"):
        print(f"{usage}Train a detector. PRESET is one of\n\n{_preset_list()}")
        raise SystemExit(0)
    problem = f"there is no preset {name!r}" if name else "a preset is needed"
    if name.startswith("-"):
        problem = f"the preset comes first, before {name}"
    exit_with_error(f"{problem}; known are\n\n{_preset_list()}\n\n{usage.rstrip()}")


def _current_option(argument: str) -> str:
    """An argument with the present name of its option: `--compile off` is `--compile.mode off`, and
    the names of renamed fields are replaced."""
    option, equals, value = argument.partition("=")
    if option == "--compile":
        option = "--compile.mode"
    section, dot, field = option.rpartition(".")
    if section.startswith("--"):
        field = current_name(field.replace("-", "_")).replace("_", "-")
    return f"{section}{dot}{field}{equals}{value}"


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The value of option `name` in `--name value` or `--name=value`; None where it is absent.

    For options that determine the defaults of others.
    """
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


def exit_with_error(message: str) -> NoReturn:
    """Print an error on stderr, and end the process with status 2."""
    rank = "" if _is_main_process() else f"rank {os.environ['RANK']}: "
    print(f"{rank}error: {message}", file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Report ValueError and OSError, which are errors of the user, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        exit_with_error(str(error))


def configure_logging(*, is_main: bool = True) -> None:
    """Log plain lines from INFO on to stdout; on other ranks than 0 only warnings, to stderr."""
    handler = _ConsoleHandler(to_stdout=is_main)
    rank = "" if is_main else f"rank {os.environ.get('RANK', '?')}: "
    handler.setFormatter(logging.Formatter(f"{rank}%(message)s"))
    package = logging.getLogger("msdetr")
    package.handlers = [handler]
    package.setLevel(logging.INFO if is_main else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    """Writes lines without breaking progress bars."""

    def __init__(self, *, to_stdout: bool) -> None:
        super().__init__()
        self.to_stdout = to_stdout

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if self.to_stdout else sys.stderr
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def _preset_list() -> str:
    width = max(map(len, PRESETS))
    return "\n".join(f"  {name:<{width}}  {PRESETS[name].description}" for name in PRESETS)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
