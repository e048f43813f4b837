"""`python -m benchmarks.codegen [options]`."""

from benchmarks.cli import run

if __name__ == "__main__":
    run("codegen", {"": "measure:main"})
