"""The base networks of a run: which network each of its roles is, and how it is trained where it is trained here."""

from collections.abc import Sequence

from torch import nn

from core.config import Config, DenoiserTrainConfig
from core.data import Dataset
from core.training.classifier import ClassifierObjective, new_classifier
from core.training.denoising import DenoisingObjective, new_denoiser
from core.training.loop import Objective

__all__ = ["base_network", "base_objective"]

DENOISER = "denoiser"


def base_network(
    config: Config, role: str, shape: Sequence[int], num_classes: int, class_names: Sequence[str] | None = None
) -> nn.Module:
    """A network of `Config.base_models`, `denoiser` or a classifier, for images ``(C, H, W)``, with the weights that it
    has before it is trained here, if it is.

    Raises:
        ModelError, ConfigError: as `load_denoiser` and `load_classifier`.
    """
    if role != DENOISER:
        own = config.classifier(role)
        return new_classifier(own, shape, num_classes, class_names, new_head=own.train is not None)
    named = config.denoiser
    assert named is not None, "a role of the configuration"
    return new_denoiser(named, shape)


def base_objective(
    config: Config, role: str, data: Dataset, denoiser: nn.Module | None, *, processes: int = 1
) -> Objective:
    """What a base network that is trained here learns from the training split; a classifier behind its denoiser, if it
    has one.
    """
    if role != DENOISER:
        train = config.classifier(role).train
        assert train is not None, "trained here"
        return ClassifierObjective(data, denoiser, train, config.seed, role, noise=config.noise, processes=processes)
    training = config.training_of(role)
    assert isinstance(training, DenoiserTrainConfig), "trained here"
    return DenoisingObjective(data, training, config.distilled_levels, config.seed, role, processes=processes)
