"""Step 1: the denoiser (if any) and the classifier, or an expert for each sigma, trained here or taken from files."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.errors import ModelError
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, run_step

if TYPE_CHECKING:
    from torch import nn

    from core.data import Dataset
    from distributed.training.train import Member

DENOISER = "denoiser"


def run(directory: RunDirectory) -> None:
    """Write the networks of `Config.base_models`, unless they are done."""
    if directory.is_done("train_base", writes=directory.config.base_models):
        return
    from distributed.cluster.cluster import train_cluster

    with train_cluster(directory.config.compute):
        _make(directory)


def _make(directory: RunDirectory) -> None:
    from core.machine.cpu import settle
    from distributed.cluster.cluster import train_device
    from distributed.training.train import Member, forget
    from distributed.views.card import write_card

    config = directory.config
    settle(config.compute.train_threads)
    # With training workers the driver need not have a GPU.
    device = "cpu" if config.compute.train_workers else train_device(config.compute)
    test = directory.data("test")
    if not config.denoisers:
        print("base.denoiser is none: the networks read the noisy images themselves")
    wrote: dict[str, str] = {}
    accuracy: dict[str, float] = {}
    taken: dict[str, Any] = {}
    networks: dict[str, Any] = {}
    members: dict[str, Member] = {}
    for roles in (config.denoisers, (*config.classifiers,)):  # the classifiers learn behind the denoiser
        made = _networks(directory, roles, wrote.get(DENOISER), members, networks)
        for role, network in made.items():
            if facts := getattr(network, "taken", None):
                own = config.denoiser if role == DENOISER else config.classifier(role)
                taken[role] = facts | ({"checkpoint": own.checkpoint} if own and own.checkpoint else {})
            if role != DENOISER:
                size = config.compute.training_batch_size
                accuracy[role] = clean_accuracy(role, network.to(device), test, size)
            wrote[role] = directory.save_model(role, network)
    for role, facts in taken.items():
        print(f"{role}: taken as " + "; ".join(f"{key} {value}" for key, value in facts.items()))
    facts = {"clean_accuracy": accuracy.get("classifier", accuracy), "networks": networks}
    directory.finish("train_base", read={}, wrote=wrote, facts=facts | ({"taken": taken} if taken else {}))
    write_card(directory)
    for member in members.values():
        forget(member.lesson)


def _networks(
    directory: RunDirectory,
    roles: Sequence[str],
    denoiser: str | None,
    members: dict[str, "Member"],
    networks: dict[str, Any],
) -> dict[str, "nn.Module"]:
    """Some of the base networks: taken from files, and trained where the configuration says so.

    `denoiser`: SHA-256 of the one that they learn behind, None for none; `members` takes those that are trained,
    `networks` what is to be said of each, and of its training.
    """
    import torch

    from core.models.denoiser import OneShotDenoiser
    from core.models.weights import check_weights
    from core.training.base_networks import base_network
    from core.training.classifier import numbers_of
    from distributed.store.sources import local_models
    from distributed.training.lesson import Lesson
    from distributed.training.train import Member, train

    config, data = directory.config, directory.data("train")
    local = local_models(directory, "base")
    made: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for role in roles:
            torch.manual_seed(config.seed + (role != DENOISER))
            made[role] = base_network(local, role, data.shape, data.num_classes, data.class_names)
    if isinstance(first := made.get(DENOISER), OneShotDenoiser):
        first.check_images(data.shape)
    learning = {
        role: Member(Lesson.of(directory, f"train_base-{role}", "base", role=role, denoiser=denoiser), network, role)
        for role, network in made.items()
        if config.training_of(role) is not None
    }
    members |= learning
    compute = config.compute
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for (role, member), history in zip(learning.items(), train(directory, [*learning.values()]), strict=True):
        settings = config.training_of(role)
        assert settings is not None
        check_weights(f"{role} (trained here, lr={settings.lr:g})", member.model)
        networks[role] = {
            "numbers": numbers_of(settings),
            "loss": [record["loss"] for record in history],
            "seconds": history[-1]["seconds"],
            "workers": compute.train_workers,
            "device": here if compute.train_device == "cuda" and not compute.train_workers else compute.train_device,
        }
    for role, network in made.items():
        num = sum(parameter.numel() for parameter in network.parameters())
        networks[role] = {"parameters": num, **networks.get(role, {})}
    return made


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
