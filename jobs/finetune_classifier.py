"""Step 4: fine-tune the classifier at the noise level that the estimator picks for each training sample.

An expert is fine-tuned on the samples that are routed to it.
"""

import sys

from core.progress import Progress
from distributed.run_directory import RunDirectory, finetuned
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory) -> None:
    """Write models/classifier_finetuned (or one for each expert), unless it is done."""
    config, finetune = directory.config, directory.config.finetune
    reads = (*config.classifiers, "denoiser", "estimator")
    if directory.is_done("finetune_classifier", reads, writes=[finetuned(role) for role in config.classifiers]):
        return
    import torch

    from core.config import SplitConfig
    from core.data.subsets import choose
    from core.engine import Engine, Task
    from core.models.checkpoints import load_model
    from core.noise import make_noise
    from core.training.finetune import choose_sigma, finetune_classifier
    from distributed.cluster import train_device
    from distributed.work import build_network

    hashes = directory.model_hashes(reads)
    torch.set_num_threads(config.compute.train_threads)
    interval, device = config.compute.progress_interval_s, train_device(config.compute)
    whole = directory.data("train")
    part = choose(whole, SplitConfig(share=finetune.share, seed=config.seed), "finetune")
    pixels, places = part.readable_pixels(range(len(part)))
    train = part.take(places)
    if len(train) < len(part):
        print(f"fine-tuning: {len(part) - len(train)} of {len(part)} images cannot be read and are left out")

    network = build_network(
        {name: directory.model(name) for name in ("denoiser", "estimator")}, config, train.num_classes, device
    )
    engine = Engine(
        network,
        make_noise(config.noise, config.seed, config.compute.chunk_size),
        batch_size=config.compute.training_batch_size,
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

    wrote: dict[str, str] = {}
    losses: dict[str, list[float]] = {}
    labels = torch.from_numpy(train.labels)
    for role, level in config.classifiers.items():
        classifier = load_model(directory.model(role)).to(device)
        # An expert learns from the samples that the estimator routes to it.
        routed = slice(None) if level is None else sigma == torch.tensor(level)
        if not len(labels[routed]):
            print(f"fine-tuning: no sample is routed to {role}, it stays as it is")
            losses[role] = []
        else:
            name = "fine-tuning" if level is None else f"fine-tuning {role}"
            with Progress(finetune.epochs, name, "epochs", interval_s=interval) as progress:
                losses[role] = finetune_classifier(
                    classifier,
                    network.denoiser,
                    pixels[routed],
                    labels[routed],
                    sigma[routed],
                    finetune,
                    config.seed + 3,
                    progress,
                )
        wrote[finetuned(role)] = directory.save_model(finetuned(role), classifier)
    shares = {str(level): float((sigma == torch.tensor(level)).float().mean()) for level in config.sigmas}
    directory.finish(
        "finetune_classifier",
        read=hashes,
        wrote=wrote,
        facts={
            "samples": len(train),
            "of": len(whole),
            "share_of_samples_at_sigma": shares,
            "loss": losses.get("classifier", losses),
        },
    )


def main() -> int:
    """Command line."""
    parser = job_parser("finetune_classifier", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["finetune_classifier"])


if __name__ == "__main__":
    sys.exit(main())
