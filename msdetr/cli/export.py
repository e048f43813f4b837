"""`msdetr export CHECKPOINT --output FILE`: the weights of a checkpoint as one file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from msdetr.cli.options import configure_logging, parse_options, user_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the weights of a checkpoint, whole, into one safetensors file with its configuration.

    One process is enough, whatever number of processes wrote the checkpoint.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of a run (`checkpoints/step-...`), or one of the published code."""
    output: Path = Path("weights.safetensors")
    """The file to write; an existing one is replaced."""
    ema: bool = True
    """Take the EMA weights where the run kept them, else those of its last step."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr export") -> int:
    """Export, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(ExportOptions, arguments, prog=prog)
    from msdetr.engine.pretrained import read_weights
    from msdetr.weights import save_weights

    configure_logging()
    with user_errors():
        weights = read_weights(options.checkpoint, ema=options.ema)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save_weights(options.output, weights.state_dict, weights.config, weights.label_map)
    logger.info("wrote %d tensors to %s", len(weights.state_dict), options.output)
    return 0
