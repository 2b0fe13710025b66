"""Reading other people's weights: safetensors, or a plain state dict saved with torch.save. Nothing in them is run."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from core.errors import ModelError

__all__ = [
    "Checkpoint",
    "check_weights",
    "load_strictly",
    "misfits",
    "read_checkpoint",
    "read_json",
    "read_safetensors",
    "read_weights",
    "unwrapped",
]

_NESTED_UNDER = ("state_dict", "model", "net", "model_state_dict")
_AVERAGES = re.compile(r"(^|_)ema(_|$)")
"""Names of moving averages: state_dict_ema and model_ema (timm), ema, params_ema, ..."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and where in its file it was.

    Attributes:
        weights: by name, on the CPU.
        under: the keys that it lay under, outermost first; empty for a bare state dict.
        prefix: what all names began with, and do no longer: `module.`, `_orig_mod.`, `1.module.`, ...
        beside: what lay beside it that is no mapping of tensors: names of classes, an epoch, ...
    """

    weights: dict[str, Tensor]
    under: tuple[str, ...] = ()
    prefix: str = ""
    beside: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path, *, ema: bool = True) -> Checkpoint:
    """The state dict in a file, by its content rather than its name, on the CPU.

    A dict nested under 'state_dict', 'model', 'net' or 'model_state_dict' is taken out, and the part of the name that
    all keys share (wrappers: DataParallel, torch.compile, trainers, Sequential) is dropped. Inside `with
    torch.device("meta")` it is names and shapes alone.

    Args:
        path: of the file.
        ema: take the exponential moving average of the weights where there is one beside the raw ones, as timm does.

    Raises:
        ModelError: for a missing or truncated file, for one with two networks of which either may be meant, and for a
            pickle that holds anything but plain data: it is refused unread, for loading it would run what it says.
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
            with safe_open(path, framework="pt") as opened:
                beside = {key: _plain(text) for key, text in (opened.metadata() or {}).items()}
            weights, prefix = unwrapped(read_safetensors(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{str(path)!r} is truncated or not a readable safetensors file ({error}): fetch it again"
            ) from error
        return Checkpoint(weights, prefix=prefix, beside=beside)
    return _state_dict(_unpickle(path, is_zip=start[:2] == b"PK"), path, ema)


def _plain(text: str) -> Any:
    """A value of a safetensors header, which holds texts only: as JSON where it is some."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of `read_checkpoint`."""
    return read_checkpoint(path).weights


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
        if is_zip and _is_exported(path):
            raise ModelError(
                f"{str(path)!r} is a program of torch.export: refused, for reading it may run code (its loader "
                "unpickles what weights_only refuses, and evaluates expressions of shapes). If you trust its origin, "
                "give a function of your own that loads it (arch: module:function), or save its state dict"
            ) from None
        if "TorchScript" in reason:
            raise ModelError(
                f"{str(path)!r} is a TorchScript archive, which holds code: refused. If you trust its origin, give "
                "torch.jit.load of it to the API (core.SmoothedClassifier), or save its state dict"
            ) from None
        kind = "an archive of torch.save" if is_zip else "a pickle"
        raise ModelError(f"{str(path)!r} is {kind} that is truncated or damaged ({reason}): fetch it again") from None


def _is_exported(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/archive_format") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _state_dict(plain: Any, path: Path, ema: bool) -> Checkpoint:
    under: list[str] = []
    beside: dict[str, Any] = {}
    while isinstance(plain, Mapping) and (key := _inner(plain, path, ema)) is not None:
        under.append(key)
        beside |= {str(name): value for name, value in plain.items() if not _holds_tensors(value)}
        plain = plain[key]
    where = f" under {'.'.join(under)!r}" if under else ""
    if not isinstance(plain, Mapping):
        raise ModelError(f"{str(path)!r} holds a {type(plain).__name__}{where}, expected a state dict (name -> tensor)")
    strange = [f"{key!r}: {type(value).__name__}" for key, value in plain.items() if not isinstance(value, Tensor)]
    if strange or not plain:
        raise ModelError(
            f"{str(path)!r} holds no state dict (name -> tensor){where or ', at the top or under '}"
            + ("" if where else ", ".join(_NESTED_UNDER))
            + (f": found {_few(strange)}" if strange else ": it is empty")
        )
    weights, prefix = unwrapped({str(key): value for key, value in plain.items()})
    return Checkpoint(weights, tuple(under), prefix, beside)


def _inner(plain: Mapping[Any, Any], path: Path, ema: bool) -> str | None:
    """Under which key the weights are; None where these are they."""
    averages = [key for key, value in plain.items() if _AVERAGES.search(str(key)) and _holds_tensors(value)]
    inside = {key: value for key, value in plain.items() if key not in averages and _holds_tensors(value)}
    raw = [key for key in inside if key in _NESTED_UNDER]
    chosen = averages if averages and (ema or not raw) else raw
    if not chosen:
        return None
    # A second one of as many tensors (teacher, swa_state_dict, best_model) may be meant as well.
    size = len(plain[chosen[0]])
    others = {key: value for key, value in inside.items() if key not in raw and isinstance(value, Mapping)}
    rivals = chosen + [
        key
        for key, value in others.items()
        if len(value) == size and all(isinstance(each, Tensor) for each in value.values())
    ]
    if ema and not averages:  # an average that a callback of the trainer keeps
        rivals += [path for key, value in others.items() for path in _averages_in(value, str(key))]
    if len(rivals) > 1:
        raise ModelError(
            f"{str(path)!r} holds several networks ({', '.join(map(repr, rivals))}) and does not say which is meant: "
            "save the state dict of the one in a file of its own"
        )
    return str(chosen[0])


def _averages_in(value: Any, path: str) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if _AVERAGES.search(str(key)) and _holds_tensors(inner):
            yield f"{path}.{key}"
        else:
            yield from _averages_in(inner, f"{path}.{key}")


def _holds_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in parts)


def unwrapped(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Without the beginning that all names share, up to a dot; and that beginning.

    No network here has all of its layers in one submodule, so what they share is a wrapper's. The strict load that
    follows compares every name.
    """
    prefix = ""
    while True:
        roots = {"".join(key.partition(".")[:2]) for key in weights}
        if len(roots) != 1 or not (root := roots.pop()).endswith("."):
            return weights, prefix
        weights = {key.removeprefix(root): value for key, value in weights.items()}
        prefix += root


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that accompanies weights.

    Raises:
        ModelError: for a missing file or other content, and for one that needs code from elsewhere (`auto_map`).
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ModelError(f"{str(path)!r} holds a {type(plain).__name__}, expected a JSON object")
    if plain.get("auto_map"):
        raise ModelError(
            f"{str(path)!r} names code of its own in 'auto_map', which is never run here: give the network to the API "
            "(core.SmoothedClassifier), or remove the key if it is the library's own after all"
        )
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

    With `assign`, for a module on the meta device, the tensors become the parameters instead of being copied.

    Raises:
        ModelError: names the first keys that are missing, unexpected or of another shape; or as `check_weights`.
    """
    problem = misfits(module.state_dict(), weights)
    if problem:
        raise ModelError(f"the weights in {source} do not fit their architecture: {problem}")
    if assign:  # a copy converts by itself
        weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    module.load_state_dict(weights, strict=True, assign=assign)
    check_weights(source, module)


def check_weights(name: str, network: nn.Module) -> None:
    """Refuse a network that a diverged training or a bad conversion has left without numbers: all its draws are wasted.

    Buffers may be infinite: masks are. What is on the meta device has no numbers to look at.

    Raises:
        ModelError: names the network and its first such tensor.
    """
    parameters = {key for key, _ in network.named_parameters()}
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            continue
        wrong = int((tensor.isnan() if key not in parameters else ~tensor.isfinite()).sum())
        if wrong:
            raise ModelError(
                f"{name}: {wrong:,} of the {tensor.numel():,} weights in {key!r} are not finite, so that no draw would "
                "vote for a class; give other weights, or train it in another --out with a lower learning rate"
            )
