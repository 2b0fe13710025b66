"""Checkpoints: safetensors files that carry their architecture as plain JSON in the header.

Loading builds a network of a known kind from that description and nothing else: no code, no pickle.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from core.errors import ModelError
from core.files import write_whole
from core.models.denoiser import OneShotDenoiser
from core.models.small import SmallConvNet

__all__ = ["build_denoiser", "load_denoiser", "load_model", "save_model"]


def build_denoiser(unet: dict[str, Any], schedule: Any = "linear", num_steps: int = 1000) -> OneShotDenoiser:
    """A `OneShotDenoiser` around a diffusers `UNet2DModel` with this configuration."""
    # By its module: `from diffusers import UNet2DModel` takes seconds longer to import.
    from diffusers.models.unets.unet_2d import UNet2DModel

    return OneShotDenoiser(UNet2DModel(**unet), schedule, num_steps)


def _describe(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, OneShotDenoiser):
        config = {key: value for key, value in dict(module.unet.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
        return {"kind": "denoiser", "unet": config, "schedule": module.schedule, "num_steps": module.num_steps}
    if isinstance(module, SmallConvNet):
        return {"kind": "small_conv_net", **module.spec}
    raise ModelError(f"do not know how to describe a {type(module).__name__} in a checkpoint")


_BUILDERS: dict[str, Callable[..., nn.Module]] = {"denoiser": build_denoiser, "small_conv_net": SmallConvNet}


def save_model(module: nn.Module, path: Path) -> None:
    """Write weights and architecture to `path`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_whole(path, save(tensors, metadata={"architecture": json.dumps(_describe(module), sort_keys=True)}))


def load_model(path: Path) -> nn.Module:
    """Build the network that `path` describes and load its weights, strictly.

    Raises:
        ModelError: for a missing, truncated or foreign file, an unknown kind, or weights that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get("architecture")
        weights = load_file(path)
    except FileNotFoundError as error:
        raise ModelError(f"no checkpoint at {str(path)!r}") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    if description is None:
        raise ModelError(f"{str(path)!r} does not say which architecture it holds (no 'architecture' in its header)")
    try:
        spec = dict(json.loads(description))
    except (TypeError, ValueError) as error:
        raise ModelError(f"the architecture in the header of {str(path)!r} is not a JSON object: {error}") from error
    kind = spec.pop("kind", None)
    if kind not in _BUILDERS:
        raise ModelError(f"{str(path)!r} holds a {kind!r}; known kinds: {', '.join(sorted(_BUILDERS))}")
    try:
        with torch.random.fork_rng(devices=[]):
            module = _BUILDERS[kind](**spec)
        module.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the weights in {str(path)!r} do not fit their architecture: {error}") from error
    return module.eval()


def load_denoiser(path: Path) -> OneShotDenoiser:
    """`load_model` for a file that must hold a denoiser."""
    module = load_model(path)
    if not isinstance(module, OneShotDenoiser):
        raise ModelError(f"{str(path)!r} holds a {type(module).__name__}, expected a denoiser")
    return module
