"""Score a detector: `python evaluate.py --checkpoint FILE --data.root /path/to/coco`.

Several processes: `torchrun --nproc-per-node 8 evaluate.py ...`.
"""

import sys

from msdetr.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(prog="evaluate.py"))
