"""Conversion of the published code's command lines to configurations.

Checkpoints of the published code describe the model only by the arguments of their run. This
package converts those arguments, or a list of flags, to a `RunConfig`. Modules that end in `_flags`
list the options of a command line, and the modules beside them convert their values:

- `deformable`: `ms-detr` (the MS-DETR tree), `ms-detr-impl-a` (its implementation (a)),
  `deformable-detr` (the original) and `h-deformable-detr` (H-DETR)
- `deta`: `deta`
- `dn_detr`: `dn-dab-deformable-detr`, one model of DN-DETR
- `dino`: `dino`, options and keys of the configuration file

For all of them:

- `--batch_size` counts the images of one process, `TrainConfig.batch_size` those of all. It is
  multiplied by the `world_size` of the arguments where they have one, otherwise by the number of
  processes of the published recipes (`PUBLISHED_NUM_PROCESSES`).
- `--resume`, `--pretrain_model_path` and `--finetune` become `weights`: the published optimizer
  state is not loaded.
- `--device cuda`, the default, becomes `auto`, so that a checkpoint loads on any machine.
- Other options have no counterpart. `tests/test_published.py` lists them with the reasons.
"""

from msdetr.published.command_lines import (
    PUBLISHED_FLAGS,
    PUBLISHED_NUM_PROCESSES,
    Implementation,
    infer_implementation,
)
from msdetr.published.conversion import config_from_published_args
from msdetr.published.deformable_flags import DEAD_FLAGS
from msdetr.published.flag import PublishedFlag
from msdetr.published.shared import STARTING_POINTS

__all__ = [
    "DEAD_FLAGS",
    "PUBLISHED_FLAGS",
    "PUBLISHED_NUM_PROCESSES",
    "STARTING_POINTS",
    "Implementation",
    "PublishedFlag",
    "config_from_published_args",
    "infer_implementation",
]
