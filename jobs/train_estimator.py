"""Step 3: train the variance estimator on the radii of the dataset."""

import hashlib
import json
import sys

from core.progress import Progress
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory) -> None:
    """Write models/estimator, unless it is done."""
    config, dataset = directory.config, dataset_digest(directory)
    reads = ("denoiser", *config.classifiers)  # the classifiers through the dataset
    done = directory.is_done("train_estimator", reads, writes=("estimator",))
    if done and directory.manifest["steps"]["train_estimator"].get("dataset") == dataset:
        return
    import numpy as np
    import torch

    from core.models.checkpoints import load_classifier, load_denoiser
    from core.models.small import SmallConvNet
    from core.training.estimator import train_estimator
    from distributed.cluster import train_device
    from distributed.tables import training_radii

    hashes = directory.model_hashes(reads)
    torch.set_num_threads(config.compute.train_threads)
    train = directory.data("train")
    radii = training_radii(directory, train)
    device = train_device(config.compute)
    denoiser = load_denoiser(directory.model("denoiser")).to(device)
    # Only what is trained on: images that could not be certified may not be readable either.
    pixels, places = train.readable_pixels(np.flatnonzero(radii.max(axis=1) > 0).tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 2)
        channels, size, num_sigmas, backbone = *pixels.shape[1:3], len(config.sigmas), config.estimator.backbone
        estimator = (
            SmallConvNet(channels, size, num_sigmas, config.base.classifier_width)
            if backbone is None
            else load_classifier(backbone, num_sigmas, channels, new_head=True)
        )
    if getattr(estimator, "new_head", False):
        print(f"estimator: its checkpoint's last layer is replaced by a new one with {num_sigmas} outputs")
    with Progress(
        config.estimator.epochs, "estimator", "epochs", interval_s=config.compute.progress_interval_s
    ) as progress:
        history = train_estimator(
            estimator.to(device),
            denoiser if config.estimator.denoiser else None,
            pixels,
            radii[places],
            config.estimator_sigma,
            config.estimator,
            config.seed + 2,
            progress,
        )
    digest = directory.save_model("estimator", estimator)
    facts = {"dataset": dataset, "samples": len(places), "of": len(radii), "loss": history}
    print(
        f"estimator: trained on {facts['samples']} of {facts['of']} samples (the others have radius 0 at every sigma)"
    )
    directory.finish("train_estimator", read=hashes, wrote={"estimator": digest}, facts=facts)


def dataset_digest(directory: RunDirectory) -> str | None:
    """Of the rows that the estimator is trained on: a retried example changes them."""
    record = directory.manifest["steps"].get("build_dataset")
    return None if record is None else hashlib.sha256(json.dumps(record["sha256"], sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Command line."""
    parser = job_parser("train_estimator", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["train_estimator"])


if __name__ == "__main__":
    sys.exit(main())
