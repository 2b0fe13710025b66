"""Losses of base classifiers that are to be smoothed."""

from dataclasses import fields

from core.config.losses import LossConfig
from core.training.losses.attacked import CatRs, SmoothAdv, SmoothMix
from core.training.losses.plain import Consistency, Gaussian, Macer
from core.training.losses.terms import Loss, NoisyBatch, Predict, consistency_terms

__all__ = [
    "CatRs",
    "Consistency",
    "Gaussian",
    "Loss",
    "Macer",
    "NoisyBatch",
    "Predict",
    "SmoothAdv",
    "SmoothMix",
    "consistency_terms",
    "make_loss",
]

_LOSSES: tuple[type[Loss], ...] = (Gaussian, Consistency, Macer, SmoothMix, CatRs, SmoothAdv)


def make_loss(config: LossConfig, label_smoothing: float = 0.0) -> Loss:
    """The loss that `config` names, with the published numbers for what it leaves open."""
    (made,) = (loss for loss in _LOSSES if loss.name == config.name)
    given = {field.name: getattr(config, field.name, None) for field in fields(made)}
    return made(**{k: v for k, v in given.items() if v is not None} | {"smoothing": label_smoothing})
