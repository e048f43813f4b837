"""`train.py PRESET [--option value ...]`: train a detector."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

from msdetr.cli.cpu_runtime import keep_freed_memory, tune_cpu_environment
from msdetr.cli.options import configure_logging, parse_preset, user_errors

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr train") -> int:
    """Train, and return the exit status: 0, or 1 where a loss or gradient was not finite or the
    model could not be compiled.

    Wrong options and files end the process with status 2.
    """
    config = parse_preset(sys.argv[1:] if arguments is None else arguments, prog=prog)
    tune_cpu_environment()
    # Importing torch takes seconds, which --help and errors in options do not need.
    from msdetr.engine.compile import CompileError
    from msdetr.engine.distributed import worker_from_environment
    from msdetr.engine.finite import NonFiniteError
    from msdetr.engine.run import build_trainer

    with contextlib.ExitStack() as stack:
        with user_errors():
            worker = stack.enter_context(worker_from_environment(config.device))
            configure_logging(is_main=worker.is_main)
            if worker.device.type == "cpu":
                keep_freed_memory()
            trainer = build_trainer(config, worker)
        try:
            trainer.train()
        except (NonFiniteError, CompileError) as error:
            logger.error("error: %s", error)
            return 1
    return 0
