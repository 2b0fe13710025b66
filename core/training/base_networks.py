"""The base networks of a run: which network each of its roles is, and how it is trained where it is trained here."""

from collections.abc import Sequence

from torch import nn

from core.config import ClassifierConfig, Config, DenoiserTrainConfig
from core.data import Dataset
from core.errors import ModelError
from core.training.classifier import ClassifierObjective, new_classifier
from core.training.denoising import DenoisingObjective, new_denoiser
from core.training.loop import Objective

__all__ = ["base_network", "base_objective", "without_weights"]

DENOISER = "denoiser"


def base_network(
    config: Config,
    role: str,
    shape: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    *,
    untrained: bool = False,
) -> nn.Module:
    """A network of `Config.base_models`, `denoiser` or a classifier, for images ``(C, H, W)``, with the weights that it
    has before it is trained here, if it is; a denoiser that is `untrained`: see `new_denoiser`.

    Raises:
        ModelError, ConfigError: as `load_denoiser` and `load_classifier`.
    """
    if role != DENOISER:
        own = config.classifier(role)
        return new_classifier(own, shape, num_classes, class_names, new_head=own.train is not None)
    named = config.denoiser
    assert named is not None, "a role of the configuration"
    return new_denoiser(named, shape, untrained=untrained)


def without_weights(own: ClassifierConfig) -> ClassifierConfig:
    """The same classifier from random weights: its file is missing.

    Raises:
        ModelError: where the file alone says its architecture.
    """
    if own.arch is None:
        raise ModelError(f"{own.checkpoint!r} is missing, and nothing else says its architecture")
    return own.model_copy(update={"checkpoint": None, "label_map": None})


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
