"""The models and the code of the user's own that a run takes: found, hashed, and compared with what it began with."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from core.config import ClassifierConfig, Config
from core.own_function import source_of
from distributed.files.models import fetch_model, model_sha256
from distributed.store.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import nn

__all__ = ["base_model", "local_models", "model_key"]


def model_key(role: str) -> str:
    """The key of the configuration that says what a network of `Config.base_models`, or the estimator, is."""
    if role == "estimator":
        return "estimator.backbone"
    return f"base.{role}" if "-" not in role else f"base.experts.{role.partition('-')[2]}"


def base_model(
    directory: RunDirectory,
    role: str,
    shape: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    absent: Collection[str] = (),
) -> "nn.Module":
    """`base_network` from the models as `local_models` finds them; with random weights where the key is `absent`."""
    from core.training.base_networks import base_network

    key = model_key(role)
    local = local_models(directory, key, absent)
    return base_network(local, role, shape, num_classes, class_names, untrained=key in absent)


def local_models(directory: RunDirectory, section: str, absent: Collection[str] = ()) -> Config:
    """The run's configuration with the models of a section as files of this machine.

    The first job that takes them notes the SHA-256 of each, and of the file of each `module:function`, in the
    manifest; whoever goes on with the same step compares.

    `section`: `base` or `estimator`, or one of their keys such as `base.denoiser`; `absent`: keys whose files are
    missing, which classifiers then do without (`without_weights`).

    Raises:
        ConfigError: for one that has changed since.
        ModelError: for one that is not there, or cannot be imported.
    """
    from core.training.base_networks import without_weights

    plain: dict[str, Any] = {}
    for key, own in directory.config.own_models.items():
        if not f"{key}.".startswith(f"{section}."):
            continue
        if (arch := directory.config.own_code.get(f"{key}.arch")) is not None:
            directory.check_source(f"{key}.arch", arch, source_of(arch)["sha256"])
        if key in absent:
            plain[key] = without_weights(own) if isinstance(own, ClassifierConfig) else own
        elif own.checkpoint is not None:
            path = fetch_model(own.checkpoint)
            directory.check_source(f"{key}.checkpoint", own.checkpoint, model_sha256(path))
            plain[key] = own.model_copy(update={"checkpoint": str(path)})
    config, base = directory.config, directory.config.base
    experts = {sigma: plain.get(f"base.experts.{sigma}", own) for sigma, own in (base.experts or {}).items()}
    backbone = plain.get("estimator.backbone", config.estimator.backbone)
    update = {
        "denoiser": plain.get("base.denoiser", base.denoiser),
        "classifier": plain.get("base.classifier", base.classifier),
        "experts": experts or base.experts,
    }
    return config.model_copy(
        update={
            "base": base.model_copy(update=update),
            "estimator": config.estimator.model_copy(update={"backbone": backbone}),
        }
    )
