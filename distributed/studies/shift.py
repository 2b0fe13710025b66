"""Distribution shift: a run's networks, as they are, on corrupted versions of its test set.

Each corrupted set is a run directory of its own, RUN/shift/<corruption>-<severity>, that borrows the run's networks: it
is certified, resumed, audited and reported like any other.
"""

import math
from typing import Any, Literal

from core.config import Config, parse_config
from core.data.corruptions import CORRUPTIONS
from core.errors import ConfigError
from distributed.store.run_directory import RunDirectory
from distributed.studies.rounds import rounds_there

__all__ = ["known_corruptions", "open_set", "sets_there", "shifted_config", "with_all_below"]

_BENCHMARK = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of CIFAR-10-C and ImageNet-C (arXiv 1903.12261) that averages are taken over."""
_SIDE = 224
"""Of ImageNet-C's images."""


def known_corruptions(config: Config) -> tuple[str, ...]:
    """The corruptions that are certified unless others are named."""
    return tuple(CORRUPTIONS) if config.dataset.name == "digits" else _BENCHMARK


def shifted_config(config: Config, corruption: str, severity: int, path: str | None, every: int = 1) -> Config:
    """A run's configuration with its test set corrupted; everything else is the same.

    Args:
        config: of the run, on `digits`, `cifar10` or `imagenet`.
        corruption: its name.
        severity: 1 to 5.
        path: where CIFAR-10-C or ImageNet-C is.
        every: takes every so many-th of the run's test images.

    Raises:
        ConfigError: for a data set that has no corrupted version, or arguments that do not fit it.
    """
    clean = config.dataset
    if clean.name not in ("digits", "cifar10", "imagenet"):
        raise ConfigError(
            f"dataset.name: there is no corrupted version of {clean.name!r}, only of digits, cifar10 and imagenet; "
            "certify a corrupted set of your own in a run of its own"
        )
    if clean.test.ids_file is not None:
        raise ConfigError(
            "dataset.test.ids_file: names clean images, the corrupted ones have ids of their own; use a run whose test "
            "images are chosen by every, first and share"
        )
    if (path is None) != (clean.name == "digits"):
        raise ConfigError(
            "--path: the digits are corrupted here, drop it"
            if clean.name == "digits"
            else f"--path: say where the corrupted version of {clean.name} is"
        )
    first = clean.test.first
    part = {"every": clean.test.every * every, "share": clean.test.share, "seed": clean.test.seed}
    dataset: dict[str, Any] = {
        "name": f"{clean.name}-c",
        "path": path,
        "corruption": corruption,
        "severity": severity,
        "test": part if first is None else part | {"first": math.ceil(first / every)},
    }
    if clean.name == "digits":
        dataset |= {"test_size": clean.test_size, "split_seed": clean.split_seed}
    if clean.name == "imagenet":
        dataset |= {"num_classes": clean.num_classes, "class_file": clean.class_file}
        _, crop = clean.resize_crop
        if crop != _SIDE:
            dataset |= {"resize": crop, "crop": crop, "interpolation": clean.interpolation}
    plain = config.model_dump(mode="json") | {"dataset": dataset, "rounds": 1}
    return parse_config(plain, source=f"{corruption}, severity {severity}")


def open_set(run: RunDirectory, config: Config, mode: Literal["write", "dry"]) -> RunDirectory:
    """The run directory of a corrupted set, with the run's networks.

    Raises:
        ConfigError: when the run has not all of its networks yet, or the set was begun with another
            configuration.
    """
    directory = RunDirectory(run.folder / f"shift/{config.dataset.corruption}-{config.dataset.severity}", config, mode)
    directory.borrow(run, [*config.certified.values(), "estimator"])
    return directory


def with_all_below(run: RunDirectory) -> list[tuple[str, RunDirectory]]:
    """A run, its later rounds and its corrupted sets, each behind what its stores are called with; only to look at."""
    rounds = [(f"rounds/{each.folder.name}/", each) for each in rounds_there(run)[1:]]
    return [("", run), *rounds, *((f"shift/{each.folder.name}/", each) for each in sets_there(run))]


def sets_there(run: RunDirectory) -> list[RunDirectory]:
    """The corrupted sets that have been begun, by corruption and severity; only to look at."""
    found = [
        RunDirectory(run.folder / f"shift/{name}", None, "look")
        for name in (run.folder / "shift").folders()
        if (run.folder / f"shift/{name}").exists("manifest.json")
    ]
    return sorted(found, key=lambda each: (each.config.dataset.corruption or "", each.config.dataset.severity or 0))
