"""Reading other people's weights: safetensors, or a plain state dict saved with torch.save. Nothing in them is run."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from core.errors import ModelError

__all__ = ["load_strictly", "misfits", "read_json", "read_safetensors", "read_weights"]

_NESTED_UNDER = ("state_dict", "model", "net")
_WRAPPERS = ("module.", "model.", "1.")
"""Prefixes of DataParallel, of trainers, and of `Sequential(normalize, net)` as Cohen et al. (2019) save theirs."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, by its content rather than its name, on the CPU.

    A dict nested under 'state_dict', 'model' or 'net' is taken out, and a prefix that all keys share ('module.',
    'model.', '1.') is dropped. Inside `with torch.device("meta")` it is names and shapes alone.

    Raises:
        ModelError: for a missing or truncated file, and for a pickle that holds anything but plain data: it is refused
            unread, for loading it would run what it says.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise ModelError(f"no checkpoint at {str(path)!r}") from error
    except OSError as error:
        raise ModelError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}") from error
    if start[8:] == b"{":  # the length of a JSON header, then the header
        try:
            return _unwrapped(read_safetensors(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{str(path)!r} is truncated or not a readable safetensors file ({error}): fetch it again"
            ) from error
    return _unwrapped(_state_dict(_unpickle(path, is_zip=start[:2] == b"PK"), path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU; inside `with torch.device("meta")` its header alone is read.

    Raises:
        SafetensorError, OSError: when it cannot be read.
    """
    if not _shapes_only():
        return dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _shapes_only() -> bool:
    return torch.get_default_device().type == "meta"


def _unpickle(path: Path, is_zip: bool) -> Any:
    where = "meta" if _shapes_only() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(path, map_location=where, weights_only=True, mmap=is_zip and where == "meta")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ModelError(
                f"{str(path)!r} is a pickle that asks for {found[1].rstrip('.')!r}, an object or code rather than "
                "tensors: refused, nothing in it was run. If you trust where it is from, load it yourself and save its "
                "state dict: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from None
        raise ModelError(
            f"{str(path)!r} is neither a safetensors file nor a state dict saved with torch.save: refused"
        ) from None
    except Exception as error:
        # What a damaged pickle raises depends on where it breaks: EOFError, OSError, RuntimeError, KeyError, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = "an archive of torch.save" if is_zip else "a pickle"
        raise ModelError(f"{str(path)!r} is {kind} that is truncated or damaged ({reason}): fetch it again") from None


def _state_dict(plain: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(plain, Mapping):
        inner = next((plain[key] for key in _NESTED_UNDER if isinstance(plain.get(key), Mapping)), None)
        if inner is None:
            break
        plain = inner
    if not isinstance(plain, Mapping):
        raise ModelError(f"{str(path)!r} holds a {type(plain).__name__}, expected a state dict (name -> tensor)")
    strange = [f"{key!r}: {type(value).__name__}" for key, value in plain.items() if not isinstance(value, Tensor)]
    if strange or not plain:
        raise ModelError(
            f"{str(path)!r} holds no state dict (name -> tensor), at the top or under {', '.join(_NESTED_UNDER)}: "
            + (f"found {_few(strange)}" if strange else "it is empty")
        )
    return {str(key): value for key, value in plain.items()}


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if weights and all(key.startswith(prefix) for key in weights):
            return _unwrapped({key.removeprefix(prefix): value for key, value in weights.items()})
    return weights


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that accompanies weights.

    Raises:
        ModelError: for a missing file or other content.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ModelError(f"{str(path)!r} holds a {type(plain).__name__}, expected a JSON object")
    return plain


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What keeps `found` from being `expected`: the first missing, unexpected and mismatched names, or an empty text.

    Only names and shapes are looked at.
    """
    parts = []
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            parts.append(f"{word}: {_few(names)}")
    return "; ".join(parts)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Load `weights`, all of them and nothing else.

    Args:
        module: the network.
        weights: its state dict.
        source: what messages call it.
        assign: make the tensors the parameters instead of copying them: for a module on the meta device.

    Raises:
        ModelError: names the first keys that are missing, unexpected or of another shape.
    """
    problem = misfits(module.state_dict(), weights)
    if problem:
        raise ModelError(f"the weights in {source} do not fit their architecture: {problem}")
    if assign:  # a copy converts by itself
        weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    module.load_state_dict(weights, strict=True, assign=assign)
