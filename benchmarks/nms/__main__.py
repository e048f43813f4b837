"""`python -m benchmarks.nms [options]`."""

from benchmarks.cli import run

if __name__ == "__main__":
    run("nms", {"": "measure:main"})
