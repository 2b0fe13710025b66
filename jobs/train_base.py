"""Step 1: the denoiser and the classifier, trained on the training split or taken from files."""

import sys

from core.errors import ModelError
from core.progress import Progress
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory) -> None:
    """Write models/denoiser and models/classifier, unless they are done."""
    if directory.is_done("train_base", writes=("denoiser", "classifier")):
        return
    import torch

    from core.models.checkpoints import load_classifier, load_denoiser
    from core.training.base import train_classifier, train_denoiser

    config, base = directory.config, directory.config.base
    torch.set_num_threads(config.compute.train_threads)
    interval = config.compute.progress_interval_s
    train = directory.data("train")
    if base.denoiser is not None:
        denoiser = load_denoiser(base.denoiser)
        denoiser.check_images(train.shape)
    else:
        with Progress(base.denoiser_steps, "denoiser", "steps", interval_s=interval) as progress:
            denoiser = train_denoiser(train, base, config.seed, progress)
    wrote = {"denoiser": directory.save_model("denoiser", denoiser)}
    if base.classifier is not None:
        classifier = load_classifier(base.classifier, train.num_classes, train.shape[0])
    else:
        with Progress(base.classifier_epochs, "classifier", "epochs", interval_s=interval) as progress:
            classifier = train_classifier(train, denoiser, base, config.seed + 1, progress)
    wrote["classifier"] = directory.save_model("classifier", classifier)

    test = directory.data("test")
    with torch.inference_mode():
        logits = torch.cat([classifier(batch) for batch in torch.split(test.pixels(), config.compute.batch_size)])
    if logits.shape != (len(test), test.num_classes):
        raise ModelError(
            f"the classifier returns {tuple(logits.shape)[1:]} logits, expected {test.num_classes} classes"
        )
    right = logits.argmax(dim=1) == torch.from_numpy(test.labels)
    accuracy = float(right.double().mean())
    print(f"classifier: {100 * accuracy:.1f}% of {len(test)} clean test images")
    directory.finish("train_base", read={}, wrote=wrote, facts={"clean_accuracy": accuracy})


def main() -> int:
    """Command line."""
    parser = job_parser("train_base", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["train_base"])


if __name__ == "__main__":
    sys.exit(main())
