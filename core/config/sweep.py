"""A sweep: one base configuration and the settings that an ablation compares."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from core.config.loading import parse_config, read_yaml
from core.config.run import Config
from core.config.values import Section
from core.errors import ConfigError

__all__ = ["Setting", "Sweep", "load_sweep"]

Tuned = Literal["base", "finetuned"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


class _SweepFile(Section):
    """The file of a sweep; `grid` or `settings` says what is swept."""

    base: str
    """Configuration that the settings start from, relative to this file."""
    title: str
    """Heading of the table and the plot."""
    classifier: Tuned = "base"
    """What is certified: the classifier as it was before fine-tuning, so that settings differ in their estimator alone
    and share the standard certificates; or the fine-tuned one of each setting, as in the pipeline."""
    overrides: tuple[str, ...] = Field((), strict=False)
    """`key=value` texts for all settings."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of each key; every combination is a setting."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings by name, each with the keys that it changes."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.grid) == bool(self.settings):
            raise ValueError("grid: give a grid or settings, one of them, and not empty")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid: {', '.join(empty)} has no values")
        return self


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: its distinct name, fit for a folder, the values of the swept keys that it gives, and its
    run.
    """

    name: str
    values: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Sweep:
    """Settings that are compared.

    Attributes:
        classifier: `base` or `finetuned`, which classifier the certificates are of.
        settings: in the order of the file, at least one; no two with the same identity.
    """

    name: str
    title: str
    classifier: Tuned
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep (`_SweepFile`) and validate the configuration of every setting; `overrides` are for all of them.

    Raises:
        ConfigError: for a missing or malformed file, a setting that is not valid, an override of a swept key, or two
            settings that are the same run, or radii of different norms.
    """
    plain = read_yaml(path)
    try:
        file = _SweepFile.model_validate(plain)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))} {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line.strip()}" for line in lines)) from None
    points = list(file.settings.items() if file.settings else _combinations(file.grid))
    keys = tuple(dict.fromkeys(key for _, values in points for key in values))
    common = [*file.overrides, *overrides]
    for override in common:
        name = override.partition("=")[0]
        if clash := [key for key in keys if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")]:
            raise ConfigError(f"{path}: {override!r} overrides {clash[0]!r}, which is swept; drop one of them")
    base = read_yaml(path.parent / file.base)
    settings = []
    for name, values in points:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: the setting {name!r} needs a name of letters, digits and . , = + _ -")
        own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = parse_config(base, [*common, *own], source=f"{path}, setting {name}")
        settings.append(Setting(name, values, config))
    _check_distinct(settings, path)
    if len(norms := sorted({setting.config.law.norm for setting in settings})) > 1:
        raise ConfigError(f"{path}: settings with {' and '.join(norms)} radii cannot share a table; sweep them apart")
    return Sweep(path.stem, file.title, file.classifier, keys, tuple(settings))


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    last = [key.rpartition(".")[2] for key in grid]
    short = last if len(set(last)) == len(last) else list(grid)
    for values in itertools.product(*grid.values()):
        name = "_".join(f"{key}={_text(value)}" for key, value in zip(short, values, strict=True))
        yield name, dict(zip(grid, values, strict=True))


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_distinct(settings: Iterable[Setting], path: Path) -> None:
    seen: dict[str, str] = {}
    names: set[str] = set()
    for setting in settings:
        if setting.name in names:
            raise ConfigError(f"{path}: two settings are named {setting.name!r}")
        names.add(setting.name)
        if (other := seen.setdefault(setting.config.fingerprint(), setting.name)) != setting.name:
            raise ConfigError(f"{path}: the settings {other!r} and {setting.name!r} are the same run; drop one of them")
