"""Networks of the user's own: `arch: module:function`, an importable function that returns a torch module.

The configuration names it, and nothing else may: a file that names code is refused unless the configuration names the
same (`check_named`).
"""

import inspect
import socket
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from core.errors import ModelError
from core.models.hub import local_path, weights_file
from core.models.weights import load_strictly, read_checkpoint, unwrapped
from core.own_function import function_of, line_of, source_of

__all__ = ["build_own", "check_named", "described", "load_own"]


def build_own(arch: str, num_outputs: int | None, channels: int) -> nn.Module:
    """Call the function that `arch` names; this runs the user's code.

    It is given `num_classes` (the logits that it is to return; not a denoiser's, where `num_outputs` is None) and
    `channels` where it takes arguments of these names, and nothing else. It is called on the CPU; where the default
    device is meta, the network is moved there afterwards.

    Returns:
        The network, ``(B, channels, H, W)`` -> logits ``(B, num_outputs)``, as the function made it.

    Raises:
        ModelError: names the module and this machine when it cannot be imported, has no such function, or the function
            fails or returns something else.
    """
    function = function_of(arch)
    given = {"channels": channels} | ({} if num_outputs is None else {"num_classes": num_outputs})
    try:
        taken = inspect.signature(function).parameters
        with torch.device("cpu"):
            module = function(**{name: value for name, value in given.items() if name in taken})
    except Exception as error:  # the user's own code: whatever it raises
        raise ModelError(f"arch {arch!r}: the function failed ({line_of(error)}): mend it") from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"arch {arch!r}: the function returned a {type(module).__name__}, expected a torch module (nn.Module)"
        )
    return module.to("meta") if torch.get_default_device().type == "meta" else module


def load_own(module: nn.Module, checkpoint: str, arch: str, ema: bool = True) -> dict[str, str]:
    """Load a state dict into a network that `build_own` has made, strictly; returns what there is to note of it.

    Raises:
        ModelError: as `read_checkpoint` and `load_strictly`.
    """
    path = local_path(checkpoint)
    found = read_checkpoint(weights_file(path), ema=ema)
    _, prefix = unwrapped(module.state_dict())  # what wraps the network itself is there in both
    weights = {prefix + key: value for key, value in found.weights.items()}
    load_strictly(module, weights, f"{checkpoint!r} (as {arch})")
    return {"checkpoint": checkpoint, "weights": ".".join(found.under) or "all of the file"}


def described(arch: str, source: Mapping[str, str]) -> str:
    """For the manifest."""
    return f"{arch} ({source['file']}, SHA-256 {source['sha256']})"


def check_named(spec: Mapping[str, Any], code: Collection[str], source: str) -> None:
    """Refuse a description, from the header of a file, that names code which the configuration does not (`code`, the
    values of `Config.own_code`), or of which the source has changed.

    Raises:
        ModelError: says what was named, and what to do.
    """
    for arch, made_with in _named(spec):
        if arch not in code:
            raise ModelError(
                f"{source} names code, {arch!r}: no code is run because a file names it; if it is yours, name it in "
                f"the configuration (arch: {arch})"
            )
        if (found := source_of(arch)) != made_with:
            raise ModelError(
                f"arch {arch!r}: {found['file']} on {socket.gethostname()} has SHA-256 {found['sha256'][:16]}, but "
                f"{source} was made with {str(made_with.get('sha256'))[:16]}: put the source back as it was (the same "
                "on all nodes), or use another --out"
            )


def _named(spec: Any) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Every `module:function` of a description, with the source that it was made with."""
    if isinstance(spec, list):
        for each in spec:
            yield from _named(each)
    elif isinstance(spec, Mapping):
        if isinstance(arch := spec.get("arch"), str) and ":" in arch:
            yield arch, spec.get("source") or {}
        for value in spec.values():
            yield from _named(value)
