"""Train a detector: `python train.py PRESET --data.root /path/to/coco`.

Several processes: `torchrun --nproc-per-node 8 train.py PRESET ...`.
"""

import sys

from msdetr.cli.train import main

if __name__ == "__main__":
    sys.exit(main(prog="train.py"))
