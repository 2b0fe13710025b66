"""Models from files: our own format, and a denoiser or classifier from whatever the field publishes.

Our own: safetensors files that carry their architecture as plain JSON in the header. Loading builds a network of a
known kind from that description and nothing else: no code, no pickle.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from core.config import ClassifierConfig
from core.errors import ConfigError, ModelError
from core.files import write_whole
from core.models.classifiers import ImageClassifier, build_classifier
from core.models.denoiser import OneShotDenoiser, Schedule
from core.models.diffusers_folder import read_folder, unet_config
from core.models.openai_unet import convert_openai_unet, is_openai_unet
from core.models.small import SmallConvNet
from core.models.weights import load_strictly, read_safetensors, read_weights

__all__ = ["assemble_denoiser", "build_denoiser", "load_classifier", "load_denoiser", "load_model", "save_model"]


def build_denoiser(
    unet: dict[str, Any],
    schedule: Schedule = "linear",
    num_steps: int = 1000,
    beta_range: tuple[float, float] | None = None,
    rescale_timesteps: bool = True,
) -> OneShotDenoiser:
    """A `OneShotDenoiser` around a diffusers `UNet2DModel` with this configuration."""
    # By its module: `from diffusers import UNet2DModel` takes seconds longer to import.
    from diffusers.models.unets.unet_2d import UNet2DModel

    network = UNet2DModel(**unet)
    return OneShotDenoiser(
        network, schedule, num_steps, beta_range and (beta_range[0], beta_range[1]), rescale_timesteps
    )


def _describe(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, OneShotDenoiser):
        config: Any = module.unet.config
        return {
            "kind": "denoiser",
            "unet": unet_config(config),
            "schedule": module.schedule,
            "num_steps": module.num_steps,
            "beta_range": module.beta_range,
            "rescale_timesteps": module.rescale_timesteps,
        }
    for kind, known in (("image_classifier", ImageClassifier), ("small_conv_net", SmallConvNet)):
        if isinstance(module, known):
            return {"kind": kind, **module.spec}
    raise ModelError(f"do not know how to describe a {type(module).__name__} in a checkpoint")


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "denoiser": build_denoiser,
    "image_classifier": ImageClassifier,
    "small_conv_net": SmallConvNet,
}


def save_model(module: nn.Module, path: Path) -> None:
    """Write weights and architecture to `path`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_whole(path, save(tensors, metadata={"architecture": json.dumps(_describe(module), sort_keys=True)}))


def load_model(path: Path) -> nn.Module:
    """Build the network that `path` describes and load its weights, strictly.

    Inside `with torch.device("meta")` the network has no weights: only names and shapes are read and compared. The
    same holds for `load_denoiser` and `load_classifier`.

    Raises:
        ModelError: for a missing, truncated or foreign file, an unknown kind, or weights that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get("architecture")
        weights = read_safetensors(path)
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
    except (ModelError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot build the {kind} that {str(path)!r} describes: {error}") from error
    load_strictly(module, weights, repr(str(path)))
    return module.eval()


def load_denoiser(
    source: str | Path,
    *,
    schedule: Schedule | None = None,
    num_steps: int | None = None,
    head_dim: int | None = None,
) -> OneShotDenoiser:
    """A denoiser from whatever `source` is.

    - A folder: diffusers' format, a `UNet2DModel` or a pipeline; the schedule is read from its scheduler_config.json.
    - A file of our own format.
    - Another file: the state dict of one of OpenAI's U-Nets, with the schedule of its family's published networks.
    - A name like google/ddpm-cifar10-32, where there is no such path: a folder on the Hugging Face hub.

    Args:
        source: path or name.
        schedule: instead of what the source says or its family has.
        num_steps: timesteps of that schedule; 1000 (linear) or 4000 (cosine) unless given.
        head_dim: see `convert_openai_unet`.

    Raises:
        ModelError: for anything else, and for what one-shot denoising does not cover.
    """
    path, name = Path(source), repr(str(source))
    given = None if schedule is None else {"schedule": schedule, "num_steps": num_steps or _STEPS[schedule]}
    if not path.exists():
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise ModelError(f"no checkpoint at {name}")
        path = _from_hub(str(source))
    if path.is_dir():
        config, weights, described = read_folder(path)
        # diffusers trains on integer timesteps, whatever their number.
        arguments = described if given is None else {**given, "rescale_timesteps": False}
        if arguments is None:
            raise ModelError(
                f"{name} has no scheduler_config.json, so its noise schedule is unknown: add the one it was trained "
                'with, for example {"beta_schedule": "linear", "num_train_timesteps": 1000}'
            )
        return assemble_denoiser(config, weights, arguments, name)
    if _is_own(path):
        module = load_model(path)
        if not isinstance(module, OneShotDenoiser):
            raise ModelError(f"{name} holds a {type(module).__name__}, expected a denoiser")
        return module
    weights = read_weights(path)
    if not is_openai_unet(weights) and "conv_in.weight" in weights:
        raise ModelError(f"{name} holds the bare weights of a diffusers model: give the folder with its config.json")
    converted = convert_openai_unet(weights, head_dim=head_dim, source=name)
    return assemble_denoiser(converted.config, converted.weights, given or converted.schedule_arguments, name)


_STEPS: dict[Schedule, int] = {"linear": 1000, "cosine": 4000}


def assemble_denoiser(
    config: dict[str, Any], weights: dict[str, torch.Tensor], arguments: dict[str, Any], name: str
) -> OneShotDenoiser:
    """A denoiser from its parts, in evaluation mode.

    Args:
        config: of a `UNet2DModel`.
        weights: its state dict; float32 tensors become the parameters without a copy.
        arguments: of `OneShotDenoiser`.
        name: what messages call it.

    Raises:
        ModelError: for parts that do not fit.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        with torch.device("meta"):  # initialising half a billion weights takes longer than reading them
            unet = UNet2DModel(**config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} describes a U-Net that diffusers cannot build: {error}") from error
    load_strictly(unet, weights, name, assign=True)
    return OneShotDenoiser(unet, **arguments).eval()


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"]
    try:
        folder = snapshot_download(
            name, allow_patterns=[*wanted, *(f"unet/{file}" for file in wanted), "scheduler/scheduler_config.json"]
        )
    except Exception as error:  # of the hub, of its HTTP library, of the system
        raise ModelError(
            f"{name!r} is no path here, and as a model of the Hugging Face hub it cannot be fetched "
            f"({str(error).strip().partition(chr(10))[0]}): fetch it where there is a network "
            f"(hf download {name} --local-dir FOLDER) and name the folder"
        ) from error
    return Path(folder)


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "architecture" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_classifier(
    config: ClassifierConfig, num_classes: int, channels: int = 3, *, new_head: bool = False
) -> nn.Module:
    """`build_classifier`, or a classifier of our own format.

    Raises:
        ConfigError: for keys beside a file of our own format, which says all that itself.
        ModelError: as `build_classifier`; or for a file of our own with another number of classes.
    """
    if config.checkpoint is None or not _is_own(Path(config.checkpoint)):
        return build_classifier(config, num_classes, channels, new_head=new_head)
    extra = [key for key in ("arch", "input_size", "mean", "std", "label_map") if getattr(config, key) is not None]
    if extra:
        raise ConfigError(f"{config.checkpoint!r} is of our own format and says its {extra[0]} itself; remove the key")
    module = load_model(Path(config.checkpoint))
    outputs = getattr(module, "num_outputs", None)
    if outputs != num_classes:
        raise ModelError(
            f"{config.checkpoint!r} holds a {type(module).__name__} with {outputs} classes, expected {num_classes}"
        )
    return module
