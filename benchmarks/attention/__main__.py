"""`python -m benchmarks.attention [tune] [options]`; no verb: durations."""

from benchmarks.cli import run

if __name__ == "__main__":
    run("attention", {"": "measure:main", "tune": "tune:main"})
