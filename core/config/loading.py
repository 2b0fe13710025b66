"""From YAML and `key=value` texts to a validated configuration, or to a message that names key and remedy."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from core.addresses import shown
from core.config.run import Config
from core.errors import ConfigError

__all__ = ["load_config", "parse_config", "parse_values", "read_yaml"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people who write alpha: 1e-3 mean the number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    try:
        return float(loader.construct_scalar(node))
    except ValueError:
        return float(loader.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and validate a configuration file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` texts, values in YAML.

    Raises:
        ConfigError: for a missing or malformed file, an unknown key, a wrong type or value: names key and remedy.
    """
    return parse_config(read_yaml(path), overrides, source=str(path))


def read_yaml(path: Path) -> Any:
    """A YAML file as plain data.

    Raises:
        ConfigError: for a missing or malformed file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from error
    return _yaml(text, str(path))


def parse_config(plain: object, overrides: Iterable[str] = (), source: str = "the configuration") -> Config:
    """Validate a configuration given as plain data; see `load_config`."""
    if not isinstance(plain, dict):
        raise ConfigError(f"{source}: expected `key: value` lines at the top level, got {type(plain).__name__}")
    plain = copy.deepcopy(plain)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"override {shown(override)!r}: expected key=value, for example certify.num_estimation=1000"
            )
        _set(plain, key.split("."), _yaml(value, f"override {override!r}"), override)
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, source) for detail in error.errors())) from None


def parse_values(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as a flat mapping, values in YAML.

    Raises:
        ConfigError: for a text without "=" or a value that is not YAML.
    """
    values = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{shown(override)!r}: expected key=value, for example alpha=1e-4")
        values[key] = _yaml(value, repr(override))
    return values


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def _set(plain: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for key in path[:-1]:
        plain = plain.setdefault(key, {})
        if not isinstance(plain, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    plain[path[-1]] = value


def _explain(detail: Mapping[str, Any], source: str) -> str:
    """One line of a validation error: file, key, what was got, what was expected."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key {key!r}; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "tuple_type":  # YAML has no tuples
        message = f"expected a list, for example [{detail['input']}]"
    if not key:
        return f"{source}: {message}"
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):  # of a section: it names its key itself
        return f"{source}: {message}" if message.startswith(key) else f"{source}: {key}.{message}"
    if detail["type"] == "missing":
        return f"{source}: {key!r} is missing; add it"
    return f"{source}: {key!r} is {detail['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: Iterable[str | int]) -> list[str]:
    section: type[BaseModel] = Config
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        if mapping := next((c for c in candidates if get_origin(c) is dict), None):
            candidates = list(get_args(mapping))
            next(parts, None)  # its key
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
