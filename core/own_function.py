"""Functions of the user's own, `module:function`: imported, and the file that they are from."""

import functools
import hashlib
import importlib
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ModelError

__all__ = ["function_of", "line_of", "source_of"]


def function_of(reference: str, key: str = "arch") -> Callable[..., Any]:
    """Import what a `module:function` names, also from the working directory; this runs the user's code. `key` is the
    configuration's, for messages.

    Raises:
        ModelError: names the module and this machine when it cannot be imported or has no such function.
    """
    name, _, attribute = reference.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(here)  # a console script does not look where it is started
    try:
        module = importlib.import_module(name)
    except Exception as error:  # of the user's own code
        raise ModelError(
            f"{key} {reference!r}: cannot import {name!r} on {socket.gethostname()} ({line_of(error)}): keep {name}.py "
            "in the working directory, which travels with `ray job submit --working-dir .`, or install it on all nodes"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        where = module.__file__ or name
        raise ModelError(f"{key} {reference!r}: {where} has no function {attribute!r}: look at its name")
    found: Callable[..., Any] = function
    return found


def line_of(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def source_of(reference: str, key: str = "arch") -> dict[str, str]:
    """Name and SHA-256 of the file that defines a `module:function`: that file alone, not what it imports.

    Raises:
        ModelError: as `function_of`, and for a module without a file.
    """
    function, name = function_of(reference, key), reference.partition(":")[0]
    owner = function.__module__ if isinstance(function, types.FunctionType | type) else name
    module = sys.modules.get(owner, sys.modules[name])
    if getattr(module, "__file__", None) is None:
        raise ModelError(f"{key} {reference!r}: the module has no source file: use one that is a .py file")
    return dict(_source(module))


@functools.cache  # what was imported, whatever becomes of the file
def _source(module: types.ModuleType) -> tuple[tuple[str, str], ...]:
    file = Path(str(module.__file__))
    return ("file", file.name), ("sha256", hashlib.sha256(file.read_bytes()).hexdigest())
