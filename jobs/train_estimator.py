"""Step 3: train the variance estimator on the radii of the dataset."""

import sys

from core.progress import Progress
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, run_step

READS = ("classifier", "denoiser")  # the classifier through the dataset


def run(directory: RunDirectory) -> None:
    """Write models/estimator, unless it is done."""
    if directory.is_done("train_estimator", READS, writes=("estimator",)):
        return
    import torch

    from core.models.checkpoints import load_classifier, load_denoiser
    from core.models.small import SmallConvNet
    from core.training.estimator import train_estimator
    from distributed.tables import training_radii

    config = directory.config
    hashes = directory.model_hashes(READS)
    torch.set_num_threads(config.compute.train_threads)
    train = directory.data("train")
    radii = training_radii(directory, train)
    denoiser = load_denoiser(directory.model("denoiser"))
    pixels = train.pixels()
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
            estimator,
            denoiser if config.estimator.denoiser else None,
            pixels,
            radii,
            config.estimator_sigma,
            config.estimator,
            config.seed + 2,
            progress,
        )
    digest = directory.save_model("estimator", estimator)
    facts = {"samples": int((radii.max(axis=1) > 0).sum()), "of": len(radii), "loss": history}
    print(
        f"estimator: trained on {facts['samples']} of {facts['of']} samples (the others have radius 0 at every sigma)"
    )
    directory.finish("train_estimator", read=hashes, wrote={"estimator": digest}, facts=facts)


def main() -> int:
    """Command line."""
    parser = job_parser("train_estimator", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["train_estimator"])


if __name__ == "__main__":
    sys.exit(main())
