"""`python -m benchmarks.loader [buckets] [options]`; no verb: images per second."""

from benchmarks.cli import run

if __name__ == "__main__":
    run("loader", {"": "measure:main", "buckets": "buckets:main"})
