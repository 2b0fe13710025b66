"""Step 1: the denoiser and the classifier, trained on the training split or taken from files."""

import sys
from pathlib import Path

from core.errors import ModelError
from core.progress import Progress
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def run(directory: RunDirectory) -> None:
    """Write models/denoiser and models/classifier, unless they are done."""
    if directory.is_done("train_base", writes=("denoiser", "classifier")):
        return
    import torch

    from core.files import file_sha256
    from core.models.checkpoints import load_denoiser, load_model, save_model
    from core.training.base import train_classifier, train_denoiser
    from distributed.datasets import load_dataset

    config, base = directory.config, directory.config.base
    torch.set_num_threads(config.compute.train_threads)
    interval = config.compute.progress_interval_s
    train = load_dataset(config.dataset, "train")
    if base.denoiser_file:
        denoiser = load_denoiser(Path(base.denoiser_file))
    else:
        with Progress(base.denoiser_steps, "denoiser", "steps", interval_s=interval) as progress:
            denoiser = train_denoiser(train, base, config.seed, progress)
    save_model(denoiser, directory.model("denoiser"))
    if base.classifier_file:
        classifier = load_model(Path(base.classifier_file))
    else:
        with Progress(base.classifier_epochs, "classifier", "epochs", interval_s=interval) as progress:
            classifier = train_classifier(train, denoiser, base, config.seed + 1, progress)
    save_model(classifier, directory.model("classifier"))

    test = load_dataset(config.dataset, "test")
    with torch.inference_mode():
        logits = classifier(test.pixels())
    if logits.shape != (len(test), test.num_classes):
        raise ModelError(
            f"the classifier returns {tuple(logits.shape)[1:]} logits, expected {test.num_classes} classes"
        )
    right = logits.argmax(dim=1) == torch.from_numpy(test.labels)
    accuracy = float(right.double().mean())
    print(f"classifier: {100 * accuracy:.1f}% of {len(test)} clean test images")
    directory.finish(
        "train_base",
        read={},
        wrote={name: file_sha256(directory.model(name)) for name in ("denoiser", "classifier")},
        facts={"clean_accuracy": accuracy},
    )


def main() -> int:
    """Command line."""
    parser = job_parser("train_base", __doc__)
    return run_job(parser, lambda args: run(open_run(args)))


if __name__ == "__main__":
    sys.exit(main())
