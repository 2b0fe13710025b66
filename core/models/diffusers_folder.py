"""Denoisers in diffusers' own format: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json."""

import json
import re
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from core.errors import ModelError
from core.models.denoiser import OneShotDenoiser
from core.models.weights import read_json, read_weights

__all__ = ["describe_schedule", "read_folder", "unet_config", "write_folder"]

_BETA_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete"),
        *("EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep"),
        *("DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    )
)
"""Samplers of networks that were trained as DDPM's: alpha_bar from betas, integer timesteps. They differ in the steps
that they take, never in what the network was trained on."""
_COVERED = {
    "prediction_type": "epsilon",  # the default of all of them; files of 2022 leave it out
    "predict_epsilon": True,  # of 2022, before prediction_type
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",  # continuous: the network is given log sigma
    "use_flow_sigmas": False,
}
_EXAMPLE = (
    '{"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, '
    '"beta_end": 0.02}'
)
_EMA_NOTES = (
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
    "ema_decay",
)
"""What diffusers' EMAModel writes into a config.json."""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(
    folder: Path, *, untrained: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor] | None, dict[str, Any] | None]:
    """The U-Net's configuration, its weights (None if `untrained`), and its noise schedule (None where it has no
    scheduler), of a `UNet2DModel` or of a pipeline with subfolders unet/ and scheduler/.

    Raises:
        ModelError: for a missing or unreadable file, another kind of model, or a schedule that is not covered.
    """
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    for name in ("vae", "vqvae"):
        if name in index or (folder / name).is_dir():
            raise ModelError(
                f"{str(folder)!r} is a latent diffusion model (it has a {name}), which does not denoise pixels: use "
                "another denoiser"
            )
    if (folder / "unet").is_dir() and (folder / "unet_ema").is_dir():
        raise ModelError(f"{str(folder)!r} has unet/ and their moving average unet_ema/: name one of the two folders")
    unet = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    plain = read_json(unet / "config.json")
    kind = plain.get("_class_name")
    if kind != "UNet2DModel":
        raise ModelError(f"{str(unet / 'config.json')!r} describes a {kind!r}, expected a 'UNet2DModel'")
    files = [unet / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    weights = None if untrained else read_weights(next((file for file in files if file.exists()), files[0]))
    places = [folder, folder / "scheduler", unet, unet.parent / "scheduler"]
    files = [file for file in (place / "scheduler_config.json" for place in dict.fromkeys(places)) if file.exists()]
    schedules = [describe_schedule(read_json(file), str(file)) for file in files]
    if any(schedule != schedules[0] for schedule in schedules):
        raise ModelError(
            f"{' and '.join(repr(str(file)) for file in files)} contradict each other: remove the wrong one"
        )
    return (
        unet_config(plain),
        None if weights is None else {_new_name(key): value for key, value in weights.items()},
        schedules[0] if schedules else None,
    )


def describe_schedule(plain: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A scheduler's configuration as arguments of `OneShotDenoiser`.

    Raises:
        ModelError: for anything but a network that predicts the noise of a linear or cosine schedule, and where the
            file does not say which.
    """
    kind = plain.get("_class_name")
    if kind not in _SCHEDULERS:
        raise ModelError(
            f"{source}: _class_name is {kind!r}, whose network is not known to be trained as DDPM's (expected one of "
            f"{', '.join(sorted(_SCHEDULERS))}): use another denoiser, or write what it was trained with: {_EXAMPLE}"
        )
    for key, covered in _COVERED.items():
        if plain.get(key, covered) != covered:
            raise ModelError(
                f"{source}: {key} is {plain[key]!r}, one-shot denoising covers {covered!r} only: use another denoiser"
            )
    name = plain.get("beta_schedule")
    needed = ["beta_schedule", "num_train_timesteps", *(("beta_start", "beta_end") if name == "linear" else ())]
    if missing := [key for key in needed if plain.get(key) is None]:
        raise ModelError(
            f"{source}: {', '.join(missing)} missing, and no network tells what it was trained with: add it, for "
            f"example {_EXAMPLE}"
        )
    if name not in _BETA_SCHEDULES:
        raise ModelError(f"{source}: beta_schedule is {name!r}, expected one of {', '.join(_BETA_SCHEDULES)}")
    try:
        steps = int(plain["num_train_timesteps"])
        low, high = float(plain.get("beta_start", 1e-4)), float(plain.get("beta_end", 0.02))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{source}: num_train_timesteps, beta_start or beta_end is no number: {error}") from error
    if steps < 2 or not 0 < low <= high < 1:
        raise ModelError(
            f"{source}: expected num_train_timesteps >= 2 and 0 < beta_start <= beta_end < 1, "
            f"got {steps}, {low}, {high}"
        )
    return {
        "schedule": _BETA_SCHEDULES[name],
        "num_steps": steps,
        "beta_range": (low, high) if name == "linear" else None,
        "rescale_timesteps": bool(plain.get("rescale_timesteps", False)),
    }


def write_folder(denoiser: OneShotDenoiser, target: Path) -> None:
    """Write a denoiser around a `UNet2DModel` into a new or empty folder, so that both `load_denoiser` and
    `UNet2DModel.from_pretrained` read it; whole or not at all.

    scheduler_config.json has one key more than diffusers knows, `rescale_timesteps` (see `OneShotDenoiser`).
    """
    config: Any = denoiser.unet.config
    version = metadata.version("diffusers")
    scheduler: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": version,
        "beta_schedule": {ours: theirs for theirs, ours in _BETA_SCHEDULES.items()}[denoiser.schedule],
        "num_train_timesteps": denoiser.num_steps,
        "prediction_type": "epsilon",
        "rescale_timesteps": denoiser.rescale_timesteps,
    }
    if denoiser.schedule == "linear":
        scale = 1000 / denoiser.num_steps
        low, high = denoiser.beta_range or (scale * 1e-4, scale * 0.02)
        scheduler |= {"beta_start": low, "beta_end": high}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        folder = Path(aside) / target.name
        folder.mkdir()
        tensors = {key: value.detach().cpu().contiguous() for key, value in denoiser.unet.state_dict().items()}
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        named = {"_class_name": "UNet2DModel", "_diffusers_version": version, **unet_config(config)}
        for name, content in (("config.json", named), ("scheduler_config.json", scheduler)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.replace(target)


def unet_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A `UNet2DModel`'s configuration without diffusers' own notes in it."""
    return {key: value for key, value in plain.items() if not key.startswith("_") and key not in _EMA_NOTES}


def _new_name(key: str) -> str:
    """Attention as diffusers names it today; files of 2022 such as google/ddpm-cifar10-32 say query, proj_attn, ..."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", key
    )
