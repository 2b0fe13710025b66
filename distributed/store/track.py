"""MLflow or Weights & Biases beside the run directory, for those who look there: off unless `track` names one.

Where to and as whom is for their own environment variables to say; nothing of those passes through here. What they are
sent: the metrics of trainings, certified accuracy, the report; of the configuration seed, noise levels, data set.
"""

import hashlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from core.addresses import shown
from core.config import Config
from core.errors import ConfigError
from distributed.store.run_directory import RunDirectory

__all__ = ["Tracker", "check_tracker", "tracked"]

_log = logging.getLogger(__name__)
_PROJECT: Final = "dual-rs"
_TAG: Final = "dual_rs.run"


class _MLflow:
    def __init__(self, name: str, run: str, facts: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        runs = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={_TAG: run}, run_name=name).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in facts.items()])

    def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step or 0) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # more are refused
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def log_artifact(self, folder: Path, name: str) -> None:
        self._client.log_artifacts(self._id, str(folder), name)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandB:
    def __init__(self, name: str, run: str, facts: Mapping[str, Any]) -> None:
        import wandb

        # Neither command lines, nor the console, nor code, nor the machine: what we mean to send and no more.
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_code=True, disable_git=True, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, host="-",
        )  # fmt: skip
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._artifact = wandb.Artifact
        self._run = wandb.init(
            project=project, id=run, name=name, resume="allow", config=dict(facts), settings=settings
        )

    def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
        if step is None:
            self._run.summary.update(dict(values))
            return
        # Trainings run side by side and again after a kill: each group has an axis of its own.
        own = {f"{name.rpartition('/')[0]}/epoch": step for name in values}
        for axis in own:
            self._run.define_metric(f"{axis.removesuffix('epoch')}*", step_metric=axis)
        self._run.log({**values, **own})

    def log_artifact(self, folder: Path, name: str) -> None:
        artifact = self._artifact(f"{name}-{self._run.id}", type=name)
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


_BACKENDS: Final[Mapping[str, Callable[[str, str, Mapping[str, Any]], Any]]] = {"mlflow": _MLflow, "wandb": _WandB}


class Tracker:
    """What a run is followed with; nothing, with no backend. One that fails is left alone after a warning: the numbers
    are in the run directory all the same, and no training must end for it.
    """

    def __init__(self, kind: str, backend: Any) -> None:
        self._kind, self._backend = kind, backend

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Values by name, `group/name`; `step` counts within a group."""
        self._try(lambda backend: backend.log_metrics(values, step))

    def log_artifact(self, folder: Path, name: str) -> None:
        """A folder with everything in it."""
        self._try(lambda backend: backend.log_artifact(folder, name))

    def close(self) -> None:
        """No more will come from this process; another one may go on with the same run."""
        self._try(lambda backend: backend.close())

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._backend is None:
            return
        try:
            action(self._backend)
        except Exception as error:
            self._backend = None
            _log.warning("track: %s failed, this step tells it no more: %s", self._kind, _plain(error))


def check_tracker(config: Config) -> None:
    """Refuse a tracker that is not installed, before any work.

    Raises:
        ConfigError: says what to install.
    """
    kind = config.track
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ConfigError(
            f"track: {kind} is not installed: python -m pip install {kind} (the extra {kind!r} of dual-rs), or "
            "leave it at none"
        )


@contextmanager
def tracked(directory: RunDirectory) -> Iterator[Tracker]:
    """The tracker of a run: the same run there for every job.

    Raises:
        ConfigError: when it is not installed, not reached, or knows nobody of this name.
    """
    config, kind = directory.config, directory.config.track
    tracker = Tracker(kind, None)
    if kind != "none":
        check_tracker(config)
        run = hashlib.sha256(f"{directory.manifest['created']} {config.fingerprint()}".encode()).hexdigest()[:16]
        sigmas = ", ".join(f"{sigma:g}" for sigma in config.sigmas)
        facts = {"dataset": config.dataset.name, "sigmas": sigmas, "seed": config.seed}
        try:
            tracker = Tracker(kind, _BACKENDS[kind](directory.folder.name, run, facts))
        except Exception as error:
            way = "WANDB_API_KEY, WANDB_MODE=offline" if kind == "wandb" else "MLFLOW_TRACKING_URI"
            raise ConfigError(f"track: {kind} does not start: {_plain(error)} (see {way}; or track=none)") from error
        print(f"track: {kind}, run {run}", flush=True)
    try:
        yield tracker
    finally:
        tracker.close()


def _plain(error: Exception) -> str:
    """One line, without the secrets that an address may hold."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    return re.sub(r"\w+://[^\s'\"]+", lambda found: shown(found[0]), text)
