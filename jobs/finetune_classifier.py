"""Step 4: fine-tune the classifier at the noise level that the estimator picks for each training sample."""

import sys

from core.progress import Progress
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, run_step

READS = ("classifier", "denoiser", "estimator")


def run(directory: RunDirectory) -> None:
    """Write models/classifier_finetuned, unless it is done."""
    if directory.is_done("finetune_classifier", READS, writes=("classifier_finetuned",)):
        return
    import torch

    from core.engine import Engine, Task
    from core.models.checkpoints import load_model
    from core.noise import make_noise
    from core.training.finetune import choose_sigma, finetune_classifier
    from distributed.replica import build_network

    config, finetune = directory.config, directory.config.finetune
    hashes = directory.model_hashes(READS)
    torch.set_num_threads(config.compute.train_threads)
    interval = config.compute.progress_interval_s
    train = directory.data("train")
    pixels = train.pixels()

    network = build_network(
        {name: directory.model(name) for name in ("denoiser", "estimator")}, config, train.num_classes, "cpu"
    )
    engine = Engine(
        network, make_noise(config.noise, config.seed, config.compute.chunk_size), batch_size=config.compute.batch_size
    )
    tasks = (
        Task(
            index,
            train.example_ids[index],
            pixels[index],
            choose_sigma(config.sigmas, config.estimator_sigma, finetune.num_sigma_draws),
        )
        for index in range(len(train))
    )
    sigma = torch.zeros(len(train))
    with Progress(len(train), "sigma of each sample", "samples", interval_s=interval) as progress:
        for finished in engine.run(tasks):
            sigma[finished.key] = finished.result
            progress.update(1)

    classifier = load_model(directory.model("classifier"))
    with Progress(finetune.epochs, "fine-tuning", "epochs", interval_s=interval) as progress:
        history = finetune_classifier(
            classifier,
            network.denoiser,
            pixels,
            torch.from_numpy(train.labels),
            sigma,
            finetune,
            config.seed + 3,
            progress,
        )
    digest = directory.save_model("classifier_finetuned", classifier)
    shares = {str(level): float((sigma == torch.tensor(level)).float().mean()) for level in config.sigmas}
    directory.finish(
        "finetune_classifier",
        read=hashes,
        wrote={"classifier_finetuned": digest},
        facts={"share_of_samples_at_sigma": shares, "loss": history},
    )


def main() -> int:
    """Command line."""
    parser = job_parser("finetune_classifier", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["finetune_classifier"])


if __name__ == "__main__":
    sys.exit(main())
