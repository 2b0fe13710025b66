"""A user's network as it comes: a torch module, or any callable around some. How it is called without changing it."""

import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from core.errors import ModelError

__all__ = [
    "Traits",
    "direct_module",
    "evaluating",
    "only_tensor",
    "submodules",
    "traits",
]

_LEAVES = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, np.generic, types.ModuleType)
_LIBRARIES = frozenset({"builtins", "torch", "numpy", "torchvision", "timm", "diffusers", "transformers"})
"""Packages whose own functions and classes keep no network of a user's in their globals."""
_PLAIN = frozenset({bool, int, float, str, type(None), nn.Parameter, Tensor})
_ROWS, _BOOKS = frozenset({tuple, list, set}), frozenset({dict, OrderedDict})
"""Most of what hangs on a torch module is plain, or one of these that holds nothing else: left out at once."""
_TENSORS = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a torch module that hold tensors alone, and its children, which are asked for."""
_MANY = 10_000
"""Containers with more items are data, not networks."""


def submodules(*things: object) -> list[nn.Module]:
    """Every torch module that a callable can be seen to reach, nested ones too.

    Looks into modules (also what hangs on them unregistered, as in a plain list), bound methods, `functools.partial`,
    closures, defaults, the globals that a function's code names, attributes and methods of objects, containers, and
    weak references. What is kept elsewhere (in a C extension, behind a name that is made at run time) is not found.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # the objects too: an id may be given again once its owner is gone
    left = list(things)
    while left:
        thing = left.pop()
        if type(thing) in _PLAIN or isinstance(thing, _LEAVES) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        left.extend(_inside(thing))
    return list(found.values())


def _inside(thing: Any) -> Iterator[object]:
    """What an object holds."""
    if isinstance(thing, types.FunctionType):
        yield from _inside_function(thing)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, staticmethod | classmethod):
        yield thing.__func__
    elif isinstance(thing, property):
        yield thing.fget
    elif isinstance(thing, weakref.ref):
        yield thing()
    elif isinstance(thing, dict):
        yield from list(thing.values()) if len(thing) <= _MANY else ()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from thing if len(thing) <= _MANY else ()
    elif isinstance(thing, type):
        yield from _inside_class(thing)
    else:
        known: frozenset[str] = frozenset()
        if isinstance(thing, nn.Module):
            yield from thing.children()  # those of TorchScript are in no attribute
            known = _TENSORS
        attributes = list((_stored(thing, "__dict__") or {}).items())  # at once: other threads may add to it
        for name, each in attributes:
            kind = type(each)
            if kind in _PLAIN or name in known or (kind in _BOOKS and not each):
                continue
            if not (kind in _ROWS and _PLAIN.issuperset(map(type, each))):
                yield each
        yield type(thing)
        for kind in type(thing).__mro__:
            names = kind.__dict__.get("__slots__", ())
            yield from (_stored(thing, name) for name in ([names] if isinstance(names, str) else names))


def _stored(thing: object, name: str) -> Any:
    """An attribute that is there, without running code of the object's own that makes one up (or raises)."""
    try:
        return object.__getattribute__(thing, name)
    except (AttributeError, TypeError):
        return None


def _inside_function(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from (function.__defaults__, function.__kwdefaults__, vars(function))
    if _is_library(function.__globals__.get("__name__")):
        return
    code = [function.__code__]
    for block in code:  # grows by the functions inside
        code.extend(constant for constant in block.co_consts if isinstance(constant, types.CodeType))
    names = {name for block in code for name in block.co_names}
    for name in names:
        value = function.__globals__.get(name)
        if not isinstance(value, types.ModuleType):
            yield value
        elif not _is_library(value.__name__):
            yield from (vars(value).get(attribute) for attribute in names)  # `helpers.model`


def _inside_class(kind: type) -> Iterator[object]:
    for base in kind.__mro__:
        if not _is_library(base.__module__):
            yield from vars(base).values()


def _is_library(module: object) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode within the block; afterwards each module's own flag is what it was.

    By the flags alone: `eval()` cannot be undone module by module, may be overridden, and raises after `torch.export`.
    """
    training = [module for module in modules if getattr(module, "training", False)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def direct_module(call: object) -> nn.Module | None:
    """The torch module that a callable is, or is a method or a partial application of; None for any other function."""
    while isinstance(call, functools.partial | types.MethodType):
        call = call.func if isinstance(call, functools.partial) else call.__self__
    return call if isinstance(call, nn.Module) else None


class Traits(NamedTuple):
    """What can be said of a network without running it.

    Attributes:
        dtype: what it takes: the type of all its floating parameters and buffers if they have one, else float32.
        materialised: whether all parameters have values: none of a lazy module's before its first pass, none on the
            meta device.
        any_batch: whether another number of rows is known to cost nothing but the pass: a plain module, not a compiled,
            exported or scripted one, whose shape may be fixed.
    """

    dtype: torch.dtype = torch.float32
    materialised: bool = True
    any_batch: bool = False


def traits(call: object) -> Traits:
    """Of a network; nothing is known of a function around some."""
    if (module := direct_module(call)) is None:
        return Traits()
    modules = list(module.modules())
    # The books themselves: `parameters()` takes five times as long.
    books = [book for each in modules for book in (each._parameters, each._buffers)]
    tensors = [tensor for book in books for tensor in book.values() if tensor is not None]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return Traits(
        kinds.pop() if len(kinds) == 1 else torch.float32,
        not any(t.is_meta or isinstance(t, UninitializedParameter | UninitializedBuffer) for t in tensors),
        not any(
            isinstance(each, torch.fx.GraphModule | torch.jit.ScriptModule)
            or hasattr(each, "_orig_mod")
            or getattr(each, "_compiled_call_impl", None) is not None
            for each in modules
        ),
    )


def only_tensor(output: Any, name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that a network means.

    Args:
        output: a tensor; or a mapping or object with a tensor under `key`, as transformers' and diffusers' outputs are;
            or a tuple, list or mapping in which one tensor alone has the expected shape.
        name: of the network, for messages.
        key: `logits` or `sample`.
        shape: expected.

    Raises:
        ModelError: where there is no such tensor, or it has another shape.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        parts = list(output.values()) if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor) and isinstance(parts, list | tuple):
            fitting = [part for part in parts if isinstance(part, Tensor) and part.shape == shape]
            found = fitting[0] if len(fitting) == 1 else None
        if not isinstance(found, Tensor):
            raise ModelError(
                f"the {name} returned a {type(output).__name__} in which no tensor, or more than one, can be the "
                f"{key} of shape {shape}: wrap it in a function that returns this tensor alone"
            )
    if found.layout != torch.strided:
        found = found.to_dense()
    if found.shape != shape or found.is_complex():
        kind = " complex" if found.is_complex() else ""
        advice = "number of classes" if key == "logits" else "output"
        raise ModelError(
            f"the {name} returned{kind} {key if key == 'logits' else 'images'} of shape {tuple(found.shape)} for a "
            f"batch of {shape[0]}; expected {shape}: check its {advice}"
        )
    logits: Tensor = found.detach()
    return logits
