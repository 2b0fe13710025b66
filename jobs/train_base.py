"""Step 1: the denoiser (if any) and the classifier, or an expert for each sigma, trained here or taken from files."""

import sys
from typing import TYPE_CHECKING, Any

from core.errors import ModelError
from core.progress import Progress
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, run_step

if TYPE_CHECKING:
    from torch import nn

    from core.data import Dataset


def run(directory: RunDirectory) -> None:
    """Write the networks of `Config.base_models`, unless they are done."""
    config, base = directory.config, directory.config.base
    if directory.is_done("train_base", writes=config.base_models):
        return
    from core.machine.cpu import settle
    from core.models.checkpoints import load_classifier, load_denoiser
    from core.models.classifiers import ImageClassifier
    from core.models.weights import check_weights
    from core.training.base import train_classifier, train_denoiser
    from distributed.cluster.cluster import train_device

    settle(config.compute.train_threads)
    # With training workers the driver need not have a GPU.
    device = "cpu" if config.compute.train_workers else train_device(config.compute)
    interval = config.compute.progress_interval_s
    train, test = directory.data("train"), directory.data("test")
    taken: dict[str, dict[str, Any]] = {}
    denoiser, wrote = None, {}
    if not config.denoisers:
        print("base.denoiser is none: the networks read the noisy images themselves")
    elif base.denoiser is not None:
        denoiser = load_denoiser(base.denoiser, schedule=base.denoiser_schedule, head_dim=base.denoiser_head_dim)
        taken["denoiser"] = denoiser.taken
        denoiser.check_images(train.shape)
    else:
        with Progress(base.denoiser_steps, "denoiser", "steps", interval_s=interval) as progress:
            denoiser = train_denoiser(train, base, config.seed, progress)
        check_weights(f"denoiser (trained here, base.denoiser_lr={base.denoiser_lr:g})", denoiser)
    if denoiser is not None:
        wrote["denoiser"] = directory.save_model("denoiser", denoiser)
    accuracy = {}
    for role in config.classifiers:
        own = config.own_classifier(role)
        if own is not None:
            names = train.class_names
            classifier: nn.Module = load_classifier(own, train.num_classes, train.shape[0], class_names=names)
            if isinstance(classifier, ImageClassifier):
                taken[role] = classifier.taken
        else:
            with Progress(base.classifier_epochs, role, "epochs", interval_s=interval) as progress:
                classifier = train_classifier(train, denoiser, config.training_of(role), config.seed + 1, progress)
            check_weights(f"{role} (trained here, base.classifier_lr={base.classifier_lr:g})", classifier)
        accuracy[role] = clean_accuracy(role, classifier.to(device), test, config.compute.training_batch_size)
        wrote[role] = directory.save_model(role, classifier)
    for role, facts in taken.items():
        print(f"{role}: taken as " + "; ".join(f"{key} {value}" for key, value in facts.items()))
    facts = {"clean_accuracy": accuracy.get("classifier", accuracy)} | ({"taken": taken} if taken else {})
    directory.finish("train_base", read={}, wrote=wrote, facts=facts)


def clean_accuracy(role: str, classifier: "nn.Module", test: "Dataset", batch_size: int) -> float:
    """Accuracy without noise on the images that can be read, also printed.

    Raises:
        ModelError: when there is not a logit for each class.
    """
    import torch

    right = total = unsound = 0
    for start in range(0, len(test), batch_size):
        pixels, places = test.readable_pixels(range(len(test))[start : start + batch_size])
        with torch.inference_mode():
            logits = classifier(pixels.to(next(classifier.parameters()).device)).cpu()
        if logits.shape != (len(places), test.num_classes):
            raise ModelError(
                f"the {role} returns {tuple(logits.shape)[1:]} logits, expected {test.num_classes} classes"
            )
        finite = logits.isfinite().all(dim=1)
        unsound += int((~finite).sum())
        right += int(((logits.argmax(dim=1) == torch.from_numpy(test.labels[places])) & finite).sum())
        total += len(places)
    unread = f" ({len(test) - total} cannot be read)" if total < len(test) else ""
    wrong = f"; {unsound} have non-finite logits, which count as wrong" if unsound else ""
    accuracy = right / max(total, 1)
    print(f"{role}: {100 * accuracy:.1f}% of {total} clean test images{unread}{wrong}")
    return accuracy


def main() -> int:
    """Command line."""
    parser = job_parser("train_base", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["train_base"])


if __name__ == "__main__":
    sys.exit(main())
