"""Build labels (the radius of every image at every noise level) on Ray: `python examples/build_labels.py [RUN]`.

On a laptop it starts a Ray of its own (seconds). With RAY_ADDRESS=HOST:6379 it joins a cluster; RUN is then a path that
all nodes share, or s3://bucket/run. Kill it and start it again: it goes on where it stopped.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from core.config import parse_config
from distributed.store.run_directory import RunDirectory
from distributed.training.labels import training_radii
from jobs import build_dataset

MODELS = Path(__file__).parent.parent / "models" / "digits" / "models"


def main(where: str) -> None:
    """Forty training images under two noise levels, with the digits' models that come with the checkout."""
    config = parse_config(
        {
            "sigmas": [0.25, 0.5],
            "dataset": {"name": "digits", "train": {"first": 40}},
            "base": {
                "denoiser": str(MODELS / "denoiser.safetensors"),
                "classifier": {"checkpoint": str(MODELS / "classifier.safetensors")},
            },
            "labels": {"num_selection": 20, "num_estimation": 100},
            "compute": {"max_replicas": 2, "shard_examples": 10},  # a cluster: device: cuda, as many as it may start
        }
    )
    run = RunDirectory(where, config)
    build_dataset.run(run)

    train = run.data("train")
    radii = training_radii(run, train)  # (examples, sigmas); 0 where the class is wrong or not certain
    best = np.asarray(config.sigmas)[radii.argmax(axis=1)]
    for sigma in config.sigmas:
        print(
            f"sigma {sigma}: best for {int(np.sum((best == sigma) & (radii.max(axis=1) > 0)))} of {len(train)} images"
        )


if __name__ == "__main__":  # Ray's workers import this file
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
