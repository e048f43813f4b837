"""`python -m benchmarks.detector {train,inference,profile,syncs,plot} [options]`."""

from benchmarks.cli import run

if __name__ == "__main__":
    run(
        "detector",
        {
            "train": "train:main",
            "inference": "inference:main",
            "profile": "profile:main",
            "syncs": "syncs:main",
            "plot": "plot:draw_plots",
        },
    )
