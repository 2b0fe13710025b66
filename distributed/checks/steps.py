"""What each step of a run needs, and what it makes."""

from typing import NamedTuple

from core.config import Config
from core.data import Split
from core.records import ESTIMATOR
from distributed.methods import METHODS, method_named

__all__ = ["Step", "steps_of"]


class Step(NamedTuple):
    """What a step needs and makes: splits of the data set, models (what it reads and writes)."""

    splits: tuple[Split, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    trains: bool = False
    """Whether it is a training that workers can share."""


def steps_of(config: Config) -> dict[str, Step]:
    """Every step of a configuration, by its name in the manifest."""
    made, taken = config.base_models, tuple(config.certified.values())
    trained = any(config.training_of(role) is not None for role in made)
    tuned = tuple(name for name in taken if name not in made)  # none: no such step
    tuning = Step(("train",), (*made, "estimator"), tuned, trains=True)
    return {
        "train_base": Step(("train", "test"), (), made, trains=trained),
        "build_dataset": Step(("train",), made),
        "train_estimator": Step(("train",), made, ("estimator",), trains=True),
        **({"finetune_classifier": tuning} if tuned else {}),
        **{
            f"certify-{name}{ending}": Step(("test",), (*networks, *_beside(name)))
            for ending, networks in (("", taken), ("-base", made))
            for name in METHODS
        },
    }


def _beside(method: str) -> tuple[str, ...]:
    """What a method asks besides the classifier."""
    return ("estimator",) if ESTIMATOR in method_named(method).heads else ()
