"""Models from files: our own format, and a denoiser or classifier from whatever the field publishes.

Our own: safetensors files that carry their architecture as plain JSON in the header. Loading builds a network of a
known kind from that description and nothing else: no code, no pickle.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from core.config import ClassifierConfig
from core.config.models import is_own_code
from core.errors import ConfigError, ModelError
from core.files import write_whole
from core.models.classifiers import ImageClassifier, build_classifier
from core.models.denoiser import OneShotDenoiser, Schedule, parse_schedule
from core.models.diffusers_folder import read_folder, unet_config
from core.models.features import FeatureExtractor, FeatureHead, FeatureRouter
from core.models.hub import local_path
from core.models.openai_unet import convert_openai_unet, is_openai_unet, published_unet
from core.models.own_code import build_own, check_named, described
from core.models.small import SmallConvNet
from core.models.weights import load_strictly, read_checkpoint, read_safetensors
from core.own_function import source_of

__all__ = [
    "assemble_denoiser",
    "build_denoiser",
    "build_own_denoiser",
    "load_classifier",
    "load_denoiser",
    "load_model",
    "save_model",
]


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


def build_own_denoiser(
    arch: str, schedule: str, channels: int, source: Mapping[str, str] | None = None
) -> OneShotDenoiser:
    """A `OneShotDenoiser` around what a function of the user's own returns (`core.models.own_code`): that is run.

    The network is given the integer timesteps of `schedule` (`linear-1000`); for `source` see `ImageClassifier`.
    """
    denoiser = OneShotDenoiser(build_own(arch, None, channels), **parse_schedule(schedule), rescale_timesteps=False)
    made_with = source_of(arch) if source is None else dict(source)
    denoiser.own = {"arch": arch, "schedule": schedule, "channels": channels, "source": made_with}
    denoiser.taken = {"code": described(arch, made_with), "schedule": f"{schedule} (the configuration)"}
    return denoiser


_SPECIFIED: dict[str, type[FeatureHead | ImageClassifier | SmallConvNet]] = {
    "feature_head": FeatureHead,
    "image_classifier": ImageClassifier,
    "small_conv_net": SmallConvNet,
}
"""Kinds whose `spec` are the arguments that they are made of."""


def _describe(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, OneShotDenoiser) and module.own:
        return {"kind": "own_denoiser", **module.own}
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
    if isinstance(module, FeatureRouter):
        classifiers = [_describe(classifier) for classifier in module.extractor.classifiers]
        own = {"classifiers": classifiers, "place": module.extractor.place, "head": module.head.spec}
        return {"kind": "feature_router", **own}
    for kind, known in _SPECIFIED.items():
        if isinstance(module, known):
            return {"kind": kind, **module.spec}
    raise ModelError(f"do not know how to describe a {type(module).__name__} in a checkpoint")


def _build_router(classifiers: list[dict[str, Any]], place: int, head: dict[str, Any]) -> FeatureRouter:
    return FeatureRouter(FeatureExtractor([_build(**spec) for spec in classifiers], place), FeatureHead(**head))


def _build(kind: str, **spec: Any) -> nn.Module:
    return _BUILDERS[kind](**spec)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **_SPECIFIED,
    "denoiser": build_denoiser,
    "feature_router": _build_router,
    "own_denoiser": build_own_denoiser,
}


def save_model(module: nn.Module, path: Path) -> None:
    """Write weights and architecture to `path`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_whole(path, save(tensors, metadata={"architecture": json.dumps(_describe(module), sort_keys=True)}))


def load_model(path: Path, code: Collection[str] = ()) -> nn.Module:
    """Build the network that `path` describes and load its weights, strictly. Nothing is run because the file says so.

    Inside `with torch.device("meta")` the network has no weights: only names and shapes are read and compared. The
    same holds for `load_denoiser` and `load_classifier`.

    Args:
        path: a file of our own format.
        code: every `module:function` that the configuration names (`Config.own_code`); the file may name no other.

    Raises:
        ModelError: for a missing, truncated or foreign file, an unknown kind, or weights that do not fit; as
            `check_named`.
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
    check_named(spec, code, repr(str(path)))
    try:
        with torch.random.fork_rng(devices=[]):
            module = _build(kind, **spec)
    except (ModelError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"cannot build the {kind} that {str(path)!r} describes: {error}") from error
    load_strictly(module, weights, repr(str(path)))
    return module.eval()


def load_denoiser(
    source: str | Path,
    *,
    schedule: str | None = None,
    head_dim: int | None = None,
    code: Collection[str] = (),
    untrained: bool = False,
) -> OneShotDenoiser:
    """A denoiser from whatever `source` is.

    - A folder: diffusers' format, a `UNet2DModel` or a pipeline; the schedule is read from its scheduler_config.json.
    - A file of our own format.
    - Another file: the state dict of one of OpenAI's U-Nets.
    - A name like google/ddpm-cifar10-32, where there is no such path: a folder on the Hugging Face hub.

    Args:
        source: path or name.
        schedule: the noise schedule that the network was trained with, such as `linear-1000`, where the source does not
            say it itself.
        head_dim: see `convert_openai_unet`; of no meaning for other sources.
        code: see `load_model`.
        untrained: the weights are missing: take random ones, for the architecture of a folder's config.json, or of the
            published network whose file has this name.

    Returns:
        The denoiser in evaluation mode; its `taken` says where the schedule is from.

    Raises:
        ConfigError: for a schedule or heads beside a source that says them itself.
        ModelError: for anything else, and for what one-shot denoising does not cover.
    """
    name = repr(str(source))
    path = Path(source) if untrained else local_path(source)
    if untrained and not path.is_dir():
        if (published := published_unet(path.name)) is None:
            raise ModelError(f"{name} is missing, and neither a config.json nor a published name says its architecture")
        return assemble_denoiser(published[0], None, published[1], name)
    folder, own = path.is_dir(), not path.is_dir() and _is_own(path)
    if head_dim is not None and (folder or own):
        raise ConfigError(f"{name} says its attention heads itself; remove head_dim")
    if folder:
        config, weights, described = read_folder(path, untrained=untrained)
        if described is not None and schedule is not None:
            raise ConfigError(f"{name} says its noise schedule itself; remove schedule")
        whence = "scheduler_config.json"
        if schedule is not None:  # diffusers trains on integer timesteps, whatever their number
            described, whence = {**parse_schedule(schedule), "rescale_timesteps": False}, "the configuration"
        if described is None:
            raise ModelError(
                f"{name} has no scheduler_config.json, so its noise schedule is unknown: give schedule, for "
                "example linear-1000"
            )
        return _noted(assemble_denoiser(config, weights, described, name), source, schedule=whence)
    if own:
        module = load_model(path, code)
        if not isinstance(module, OneShotDenoiser):
            raise ModelError(f"{name} holds a {type(module).__name__}, expected a denoiser")
        if schedule is not None:
            raise ConfigError(f"{name} says its noise schedule itself; remove schedule")
        return _noted(module, source, schedule="the file")
    checkpoint = read_checkpoint(path)
    if not is_openai_unet(checkpoint.weights) and "conv_in.weight" in checkpoint.weights:
        raise ModelError(f"{name} holds the bare weights of a diffusers model: give the folder with its config.json")
    converted = convert_openai_unet(checkpoint.weights, head_dim=head_dim, schedule=schedule, source=name)
    denoiser = assemble_denoiser(converted.config, converted.weights, converted.schedule_arguments, name)
    known = converted.published
    whence = f"as published for {known}, whose shapes it has" if known else "the configuration"
    under = ".".join(checkpoint.under) or "all of the file"
    return _noted(denoiser, source, schedule=whence, heads=whence, weights=under)


def _noted(denoiser: OneShotDenoiser, source: str | Path, *, schedule: str, **facts: str) -> OneShotDenoiser:
    said = {"schedule": f"{denoiser.schedule}-{denoiser.num_steps} ({schedule})", "predicts": "noise", **facts}
    denoiser.taken = {"checkpoint": str(source), **said}
    return denoiser


def assemble_denoiser(
    config: dict[str, Any], weights: dict[str, torch.Tensor] | None, arguments: dict[str, Any], name: str
) -> OneShotDenoiser:
    """A denoiser from a `UNet2DModel`'s configuration and state dict (None: random weights) and the arguments of
    `OneShotDenoiser`, in evaluation mode; float32 weights become the parameters without a copy.

    Raises:
        ModelError: for parts that do not fit.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        # Initialising half a billion weights takes longer than reading them.
        with nullcontext() if weights is None else torch.device("meta"):
            unet = UNet2DModel(**config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} describes a U-Net that diffusers cannot build: {error}") from error
    if weights is not None:
        load_strictly(unet, weights, name, assign=True)
    return OneShotDenoiser(unet, **arguments).eval()


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "architecture" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_classifier(
    config: ClassifierConfig,
    num_classes: int,
    channels: int = 3,
    *,
    new_head: bool = False,
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """`build_classifier`, or a classifier of our own format.

    Raises:
        ConfigError: for keys beside a file of our own format, which says all that itself.
        ModelError: as `build_classifier`; or for a file of our own with another number of classes.
    """
    if config.checkpoint is None or not _is_own(Path(config.checkpoint)):
        return build_classifier(config, num_classes, channels, new_head=new_head, class_names=class_names)
    code = [config.arch] if config.arch is not None and is_own_code(config.arch) else []
    said = ("input_size", "mean", "std", "label_map") if code else ("arch", "input_size", "mean", "std", "label_map")
    extra = [key for key in said if getattr(config, key) is not None]
    if extra:
        raise ConfigError(f"{config.checkpoint!r} is of our own format and says its {extra[0]} itself; remove the key")
    module = load_model(Path(config.checkpoint), code)
    outputs = getattr(module, "num_outputs", None)
    if outputs != num_classes:
        raise ModelError(
            f"{config.checkpoint!r} holds a {type(module).__name__} with {outputs} classes, expected {num_classes}"
        )
    return module
