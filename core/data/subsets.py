"""Parts of a split, as users name them."""

from pathlib import Path

import numpy as np

from core.config import SplitConfig
from core.data.classes import canonical, shown
from core.data.dataset import Dataset
from core.errors import ConfigError, DataError

__all__ = ["choose", "read_lines"]


def choose(data: Dataset, part: SplitConfig, key: str) -> Dataset:
    """The examples that `part` asks for, in the data set's order: `ids_file`, or `every`, then `first`, then `share`.

    Raises:
        ConfigError: when there are fewer than `first`.
        DataError: for an id in the file that is not in the split, or is there twice.
    """
    if part.ids_file is not None:
        return _by_id(data, part.ids_file, key)
    places = np.arange(len(data))[:: part.every]
    if part.first is not None:
        if part.first > len(places):
            raise ConfigError(f"{key}.first asks for {part.first:,} examples, there are {len(places):,}; lower it")
        places = places[: part.first]
    if part.share < 1.0:
        num = max(1, round(part.share * len(places)))
        places = np.sort(np.random.default_rng(part.seed).permutation(places)[:num])
    return data if len(places) == len(data) else data.take(places)


def read_lines(path: str, key: str, *, distinct: bool = True) -> list[str]:
    """The lines of a UTF-8 text file (with a byte order mark or without), without empty ones.

    Raises:
        ConfigError: when it cannot be read.
        DataError: when a line is there twice although they should be `distinct`, or there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path!r}: {error}") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]  # not where else Unicode ends a line
    if not lines:
        raise DataError(f"{key}: {path!r} is empty, expected one name per line")
    if distinct and len(set(lines)) != len(lines):
        twice = next(line for number, line in enumerate(lines) if line in lines[:number])
        raise DataError(f"{key}: {path!r} names {twice!r} twice; remove one")
    return lines


def _by_id(data: Dataset, path: str, key: str) -> Dataset:
    wanted = read_lines(path, f"{key}.ids_file")
    exact = {example_id: index for index, example_id in enumerate(data.example_ids)}
    place = {canonical(example_id): index for example_id, index in exact.items()} | exact
    if unknown := [name for name in wanted if name not in place and canonical(name) not in place]:
        raise DataError(
            f"{key}.ids_file: {path!r} names {len(unknown)} examples that are not in this split of {data.name}: "
            f"{shown(unknown)}; its ids look like {data.example_ids[0]!r}"
        )
    return data.take(sorted({place[name if name in place else canonical(name)] for name in wanted}))
