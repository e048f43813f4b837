"""The console script `msdetr`: one subcommand per tool, each imported on demand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from msdetr.version import __version__

COMMANDS = {
    "train": "train a detector from a preset",
    "evaluate": "score a detector on a data set with COCO metrics",
    "predict": "detect objects in images, draw and list them",
    "export": "write the weights of a checkpoint into one file",
    "doctor": "check a data set before training",
    "demo": "train, evaluate and draw on a small generated data set",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        command = importlib.import_module(f"msdetr.cli.{name}")
        status: int = command.main(arguments[1:])
        return status
    if name == "--version":
        print(f"msdetr {__version__}")
        return 0
    lines = "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items())
    text = f"usage: msdetr COMMAND [options]\n       msdetr COMMAND --help\n\n{lines}"
    if name in ("-h", "--help"):
        print(text)
        return 0
    problem = f"there is no command {name!r}" if name else "a command is needed"
    print(f"error: {problem}\n\n{text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
