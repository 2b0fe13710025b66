"""Two pages that the code writes: every key of the configuration, and every job with its options."""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from core.config import Config
from jobs.__main__ import summaries

__all__ = ["configuration_page", "fields", "jobs_page"]


def fields(
    section: type[BaseModel] = Config, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, type[BaseModel] | None]]:
    """Every key below a section, in the order of the code: its dotted name, its field and, for a section, its class."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        yield prefix + name, field, inner
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def configuration_page() -> str:
    """The reference of the configuration, as Markdown."""
    parts = [
        "# Configuration",
        "This page is made from the code (`core/config`). A configuration is a YAML file of these keys; "
        "`section.key=value` on a command line overrides one. Unknown keys, wrong types and values that "
        "contradict each other are refused before anything runs. Most keys decide the numbers of a run, and a run "
        "directory then refuses another value; "
        "`report.*`, paths and most of `compute.*` may change ([which](operations.md#resume)).",
        "[Data sets](datasets.md) shows the keys of `dataset` with examples; `configs/` holds the published settings.",
    ]
    sections: list[tuple[str, type[BaseModel]]] = [("", Config)]
    sections += [(name, inner) for name, _, inner in fields() if inner is not None]
    for name, section in sections:
        parts.append(f"## {f'`{name}`' if name else 'Top level'}")
        parts.append(_text(section.__doc__ or ""))
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            inner = _section(field.annotation)
            meaning = _text(field.description or (inner.__doc__ if inner else "") or "").replace("|", "\\|")
            if inner is not None:
                target = f"{name}.{key}".lstrip(".").replace(".", "")
                meaning += f" See [its keys](#{target})."
            rows.append(f"| `{key}` | {_type(field).replace('|', chr(92) + '|')} | {_default(field)} | {meaning} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def jobs_page() -> str:
    """The reference of the jobs, as Markdown: what `python -m jobs` and each `--help` print."""
    parts = [
        "# Jobs",
        "This page is made from the code. Every job is `python -m jobs.NAME`, in the checkout or wherever the wheel is "
        "installed; `python -m jobs` lists them.",
        "\n".join(["| job | what it does |", "|---|---|"])
        + "".join(f"\n| [{name}](#{name}) | {_text(line)} |" for name, line in summaries().items()),
    ]
    for name in summaries():
        parts += [f"## {name}", f"```text\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    module, out = importlib.import_module(f"jobs.{name}"), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    return out.getvalue().strip()


def _text(text: str) -> str:
    """On one line, with `<` shown as it is."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", text).strip())
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, itself, optionally, or as the values of a mapping."""
    for candidate in (annotation, *get_args(annotation), *(x for a in get_args(annotation) for x in get_args(a))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(field: FieldInfo) -> str:
    return ", ".join([_type_name(field.annotation), *_limits(field.metadata)])


def _limits(metadata: Iterable[Any]) -> list[str]:
    marks = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [f"{sign} {getattr(each, name)}" for each in metadata for name, sign in marks.items() if hasattr(each, name)]


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin in (Union, UnionType):
        return " or ".join("none" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}" if Ellipsis in args else f"{len(args)} × {_type_name(args[0])}"
    if origin is dict:
        return f"mapping of {_type_name(args[0])} to {_type_name(args[1])}"
    if hasattr(annotation, "__metadata__"):
        found = [each for part in annotation.__metadata__ for each in getattr(part, "metadata", [part])]
        return " ".join([_type_name(args[0]), *_limits(found)])
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, "section" if _section(annotation) else str(annotation))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**needed**"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return ""
    return f"`{list(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value}`"
