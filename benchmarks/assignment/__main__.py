"""`python -m benchmarks.assignment [options]`."""

from benchmarks.cli import run

if __name__ == "__main__":
    run("assignment", {"": "measure:main"})
