"""The models and the code of the user's own that a run takes: found, hashed, and compared with what it began with."""

from typing import Any

from core.config import Config
from core.own_function import source_of
from distributed.files.models import fetch_model, model_sha256
from distributed.store.run_directory import RunDirectory

__all__ = ["local_models"]


def local_models(directory: RunDirectory, section: str) -> Config:
    """The run's configuration with the models of a section as files of this machine.

    The first job that takes them notes the SHA-256 of each, and of the file of each `module:function`, in the
    manifest; whoever goes on with the same step compares.

    `section`: `base` or `estimator`, or one of their keys such as `base.denoiser`.

    Raises:
        ConfigError: for one that has changed since.
        ModelError: for one that is not there, or cannot be imported.
    """
    plain: dict[str, Any] = {}
    for key, own in directory.config.own_models.items():
        if not f"{key}.".startswith(f"{section}."):
            continue
        if (arch := directory.config.own_code.get(f"{key}.arch")) is not None:
            directory.check_source(f"{key}.arch", arch, source_of(arch)["sha256"])
        if own.checkpoint is not None:
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
