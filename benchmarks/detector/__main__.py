"""`python -m benchmarks.detector VERB [options]`."""

from benchmarks.cli import run

if __name__ == "__main__":
    run(
        "detector",
        {
            "train": "train:main",
            "inference": "inference:main",
            "profile": "profile:main",
            "syncs": "syncs:main",
            "denoising": "denoising:main",
            "query_sets": "query_sets:main",
            "supervision": "supervision:main",
            "plot": "plot:draw_plots",
        },
    )
