"""What a job submitted with `ray job submit --working-dir .` finds: the upload leaves out folders and large files."""

import json
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from core.addresses import is_address
from core.config import Config
from core.errors import ConfigError
from core.models.hub import is_hub_name
from distributed.files.storage import Folder

__all__ = ["check_upload", "job_runtime_env", "named_files"]

LEFT_OUT: Final = ("bench", "build", "checkpoints", "comparison", "data", "dist", "docs", "runs", "site", "tests")
"""Folders of the checkout that deploy/runtime_env.yaml and .gitignore keep at home."""


def job_runtime_env() -> dict[str, Any]:
    """The runtime environment that this job was submitted with; empty outside `ray job submit`."""
    return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {})


def check_upload(config: Config, steps: Collection[str], out: Folder) -> None:
    """Refuse files that are not here (most stayed at home), and a run directory that would go with Ray's copy of the
    working directory.

    Args:
        config: of the run.
        steps: that are still to be run; the base models are read by `train_base` alone.
        out: the run directory.

    Raises:
        ConfigError: names each key and file.
    """
    if not job_runtime_env().get("working_dir"):
        return
    here = Path.cwd()
    if out.local is not None and out.local.is_relative_to(here):
        raise ConfigError(
            f"--out: {str(out.local.relative_to(here))!r} would lie in Ray's temporary copy of the working directory "
            f"on {socket.gethostname()}; name a path that all nodes share, or an address (s3://bucket/run)"
        )
    gone = {
        key: path
        for key, path in named_files(config, steps).items()
        if not is_address(path) and not Path(path).exists()
    }
    if gone:
        raise ConfigError(
            ", ".join(f"{key}: {path!r}" for key, path in gone.items())
            + f": not on {socket.gethostname()}, to which Ray has uploaded the working directory without "
            f"{', '.join(LEFT_OUT)} and what .gitignore names; copy them to your bucket and give the address "
            "(s3://bucket/..., gs://...), or give an absolute path that all nodes see"
        )


def named_files(config: Config, steps: Collection[str]) -> dict[str, str]:
    """Files and folders that the configuration names, by key."""
    data = config.dataset
    named: dict[str, str | None] = {"dataset.path": data.path, "dataset.class_file": data.class_file}
    for split, part in (("train", data.train), ("test", data.test)):
        named |= {f"dataset.{split}.path": part.path, f"dataset.{split}.ids_file": part.ids_file}
    for key, own in config.own_models.items():
        step = "train_base" if key.startswith("base.") else "train_estimator"
        if step in steps and own.checkpoint and not is_hub_name(own.checkpoint):
            named[f"{key}.checkpoint"] = own.checkpoint
    return {key: path for key, path in named.items() if path}
