"""`python -m benchmarks.gpu {run,more} [options]`: the steps of `make gpu` and `make gpu-more`.

It starts on a machine with Python alone: what the steps need comes from `--wheelhouse`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.gpu.driver import Driver, install
from benchmarks.gpu.steps import COMMANDS


def main() -> int:
    """Run the steps; the exit status is 1 if one failed or was stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and logs")
    parser.add_argument("--seconds", type=float, help="time limit (default: of all steps)")
    parser.add_argument("--wheelhouse", type=Path, help="folder of `make wheelhouse`")
    parser.add_argument("--published", type=Path, help="checkout of the published code")
    names = [step.name for steps, _ in COMMANDS.values() for step in steps]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="run these alone")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, without a GPU")
    options = parser.parse_args()
    steps, seconds = COMMANDS[options.command]
    with tempfile.TemporaryDirectory(prefix="msdetr-gpu-") as work:
        driver = Driver(
            options.command,
            options.out,
            Path(work),
            options.seconds or seconds,
            published=options.published,
            rehearse=options.rehearse,
        )
        if options.wheelhouse is not None:
            install(options.wheelhouse, driver.packages)
        reason = None if options.rehearse else driver.why_nothing_runs()
        if reason is not None:
            print(f"nothing can run here: {reason}")
            print("(`make gpu WHEELHOUSE=DIR` adds packages, `make gpu-rehearsal` needs no GPU)")
            return 1
        return driver.run([x for x in steps if not options.only or x.name in options.only])


if __name__ == "__main__":
    raise SystemExit(main())
