"""What a run will take at stated rates: no device, no weights and, of published sets, no images are needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from core.config import Config
from core.errors import ConfigError, DataError
from core.records import CLASSIFIER, ESTIMATOR
from distributed.checks.dry_run import show_parts
from distributed.checks.estimate import DENOISER, TRAINING, Part, count_parts, rows_of
from distributed.checks.preflight import Found, refuse, unfinished
from distributed.checks.published import published_data
from distributed.cluster.cluster import replicas_here
from distributed.store.run_directory import RunDirectory

__all__ = ["parse_rates", "price_at"]

_NETWORKS: Final = (DENOISER, ESTIMATOR, CLASSIFIER)
_BACKWARD: Final = 3
"""Forward passes that a forward and a backward pass take, by arithmetic."""


def parse_rates(texts: Sequence[str]) -> dict[str, float]:
    """Numbers per second by network or step, of `NAME=PER_S`; ConfigError for what is no positive number."""
    rates = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            rates[name] = math.nan
        if not 0 < rates[name] < math.inf:
            raise ConfigError(f"--rate: expected NAME=PER_S, such as classifier=20000, got {text!r}")
    return rates


def price_at(directory: RunDirectory, steps: Sequence[str], price: float | None, rates: Mapping[str, float]) -> None:
    """Print what steps will take at stated rates of one device; write nothing, look at no network.

    A training step counts as three forward passes of the network that learns; reading, noise and starting as nothing.

    Args:
        directory: opened `dry`.
        steps: by their names in the manifest; those that are finished take nothing.
        price: of a device hour.
        rates: images per second and network: one classifier (or expert); the estimator with all that it reads but the
            denoiser. Or noisy copies per second and step, as a dry run or a run elsewhere printed them.

    Raises:
        ConfigError: for a network without a rate, a rate without a network or step.
        DataError: for a data set that is neither here nor known by its published size.
    """
    config, found = directory.config, Found()
    found.steps = unfinished(directory, steps, found)
    refuse(found.problems)
    if not found.steps:
        print("everything is finished: nothing to do")
        return
    notes = []
    for split in ("train", "test"):
        try:
            found.data[split] = directory.data(split)
        except (DataError, OSError) as error:
            if (data := published_data(config, split)) is None:
                raise DataError(f"dataset.{split}: cannot be counted without its files: {error}") from error
            found.data[split] = data
            notes.append(f"dataset.{split} is not here: counted as published, {len(found.data[split]):,} examples")
    replicas = replicas_here(config.compute)[1]
    parts = count_parts(directory, found.steps, found.data, {}, replicas)
    names = [*_NETWORKS, *(part.name for part in parts)]
    if unknown := [name for name in rates if name not in names]:
        raise ConfigError(f"--rate: {unknown[0]!r} is none of {', '.join(map(repr, names))}")
    for part in parts:
        _set_rates(part, config, rates)
    said = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    notes.append(f"rates are stated, not measured: {said} a second (networks: images; steps: copies), of one device")
    show_parts(directory, parts, price, notes)


def _set_rates(part: Part, config: Config, rates: Mapping[str, float]) -> None:
    for kind, copies in part.copies.items():
        rows = dict(part.rows) if kind == TRAINING else dict(rows_of({kind: copies}, config))
        used = [name for name in _NETWORKS if rows.get(name)]
        if not copies or part.name in rates:
            part.rates[kind] = rates.get(part.name, math.inf)
            continue
        if missing := [name for name in used if name not in rates]:
            more = " ".join(f"--rate {name}=IMAGES_PER_S" for name in missing)
            raise ConfigError(f"--rate: add {more}, or --rate {part.name!r}=COPIES_PER_S")
        if kind == TRAINING and not (part.name == "train_estimator" and config.estimator.reads_features):
            rows[used[-1]] *= _BACKWARD  # those in front of it are fixed
        part.rates[kind] = copies / math.fsum(rows[name] / rates[name] for name in used)
