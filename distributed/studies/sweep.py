"""Ablations: the settings of a sweep as Ray Tune trials, each a run directory that takes over what is not swept.

OUT/shared/<step>-<key>/    run directories: what several settings read, made first, on all replicas
OUT/settings/<name>/        run directories: one for each setting, made side by side, one replica for each
                            (sweep_log.txt: what its steps printed)
OUT/tune/                   what Ray Tune writes about its trials
OUT/results.parquet, ...    `distributed.studies.sweep_results`

A setting is finished when its run directory says so: nothing else has to be restored after a kill.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, Setting, Sweep
from core.progress import clock
from distributed.checks.steps import steps_of
from distributed.cluster.cluster import connected, replica_pool
from distributed.files.storage import Folder, file_system
from distributed.store.lock import RunLock
from distributed.store.run_directory import RunDirectory
from distributed.studies.adopt import SHARED, SharedStep, adopt, shared_config

__all__ = [
    "SharedRun",
    "Steps",
    "is_finished",
    "own_steps",
    "read_times",
    "run_setting",
    "run_sweep",
    "setting_folder",
    "shared_runs",
    "shared_steps",
]

Steps = Mapping[str, Callable[[RunDirectory], None]]
"""What runs a step, by its name in the manifest."""

_TIMES, _LOG = "sweep_seconds.json", "sweep_log.txt"
_CRASHES = 3
"""How often a trial whose process died (a lost node, memory) is tried again."""


def shared_steps(sweep: Sweep) -> tuple[SharedStep, ...]:
    """Steps that settings may have in common, in their order."""
    return SHARED if sweep.classifier == "base" else SHARED[:2]


def own_steps(sweep: Sweep, config: Config) -> tuple[str, ...]:
    """Steps of the setting with this configuration, in their order."""
    certified = f"certify-{config.certify.routed}"
    if sweep.classifier == "base":
        return ("train_estimator", f"{certified}-base")
    steps = ("train_estimator", "finetune_classifier", "certify-standard", certified)
    return tuple(step for step in steps if step in steps_of(config))


@dataclass(frozen=True)
class SharedRun:
    """A step that one or more settings read.

    Attributes:
        step: which.
        folder: of its run directory.
        config: that it is run under.
        users: names of the settings.
    """

    step: SharedStep
    folder: Folder
    config: Config
    users: tuple[str, ...]

    def make(self, runs: Sequence["SharedRun"], steps: Steps) -> None:
        """Run the step, unless it is done; the base models come from the run among `runs` that makes them."""
        directory = RunDirectory(self.folder, self.config)
        with RunLock(directory.folder):
            print(f"shared: {self.step} for {len(self.users)} settings ({directory.folder.name})", flush=True)
            if self.step != "train_base":
                adopt(directory, _base_models(self.config, runs), "train_base")
            steps[self.step](directory)


def shared_runs(sweep: Sweep, out: Folder) -> list[SharedRun]:
    """What the settings of a sweep share, in the order in which it can be made.

    Votes at one noise level do not depend on the others, so settings with different Sigma share what is made for all of
    their levels together; with experts, Sigma names the networks, and each Sigma is on its own.
    """
    union = sorted({sigma for setting in sweep.settings for sigma in setting.config.sigmas})
    runs: dict[str, SharedRun] = {}
    for step in shared_steps(sweep):
        for setting in sweep.settings:
            sigmas = setting.config.sigmas if setting.config.has_experts else union
            config = shared_config(setting.config, step, sigmas)
            name = f"{step}-{config.fingerprint()}"
            users = (*(runs[name].users if name in runs else ()), setting.name)
            runs[name] = SharedRun(step, out / f"shared/{name}", config, users)
    return list(runs.values())


def setting_folder(out: Folder, setting: Setting) -> Folder:
    """The run directory of a setting."""
    return out / f"settings/{setting.name}"


def is_finished(sweep: Sweep, setting: Setting, out: Folder) -> bool:
    """Whether the run directory of a setting records all of its steps.

    Raises:
        ConfigError: when the folder was made with another configuration.
    """
    directory = RunDirectory(setting_folder(out, setting), setting.config, "dry")
    return all(step in directory.manifest["steps"] for step in own_steps(sweep, setting.config))


def run_sweep(sweep: Sweep, out: Folder, steps: Steps) -> dict[str, str]:
    """Make what is missing: first what is shared, then the settings, as many at a time as there are replicas.

    A setting that is finished is not touched. One that was interrupted goes on in its run directory. One whose process
    dies is tried again; one that fails with an error of ours is not, and does not stop the others.

    Returns:
        Why settings failed, by their names; the others are finished.

    Raises:
        DualRSError: when what is shared cannot be made, or a folder holds another configuration.
    """
    pending = [setting for setting in sweep.settings if not is_finished(sweep, setting, out)]
    print(f"{sweep.name}: {len(sweep.settings)} settings, {len(sweep.settings) - len(pending)} of them finished")
    if not pending:
        return {}
    with connected(pending[0].config.compute):
        names = {setting.name for setting in pending}
        shared = [run for run in shared_runs(sweep, out) if names & set(run.users)]
        for run in shared:
            run.make(shared, steps)
        return _run_trials(sweep, pending, out, shared, steps)


def _base_models(config: Config, runs: Sequence[SharedRun]) -> RunDirectory:
    for run in runs:
        wanted = shared_config(config, "train_base", run.config.sigmas)
        if run.step == "train_base" and wanted.fingerprint() == run.config.fingerprint():
            return RunDirectory(run.folder, None, "look")
    raise AssertionError("shared runs begin with the base models")


def run_setting(sweep: Sweep, setting: Setting, out: Folder, shared: Sequence[SharedRun], steps: Steps) -> None:
    """Take over what is shared, then run the setting's own steps, all in this process."""
    local = setting.config.compute.model_copy(update={"executor": "local", "train_workers": 0})
    directory = RunDirectory(setting_folder(out, setting), setting.config.model_copy(update={"compute": local}))
    with RunLock(directory.folder):
        for run in shared:
            if setting.name in run.users:
                adopt(directory, RunDirectory(run.folder, None, "look"), run.step)
        for step in own_steps(sweep, setting.config):
            done, start = step in directory.manifest["steps"], time.monotonic()
            steps[step](directory)
            if not done:
                times = {**read_times(directory.folder), step: round(time.monotonic() - start, 1)}
                directory.folder.write(_TIMES, json.dumps(times).encode())


def read_times(folder: Folder) -> dict[str, float]:
    """Seconds of each step of a setting, of the attempt that finished it."""
    try:
        return dict(json.loads(folder.read(_TIMES)))
    except FileNotFoundError:
        return {}


def _run_trials(
    sweep: Sweep, pending: Sequence[Setting], out: Folder, shared: Sequence[SharedRun], steps: Steps
) -> dict[str, str]:
    """The settings as trials of Ray Tune; returns why those that failed did, by name."""
    # Ctrl-C ends the job, as everywhere; and what is printed is ours.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    from ray import tune

    by_name = {setting.name: setting for setting in pending}
    here = str(Path.cwd())

    def trial(config: dict[str, Any]) -> None:
        setting = by_name[config["setting"]]
        if Path(here).is_dir():  # Ray Tune has gone to a folder of its own
            os.chdir(here)  # where relative paths of the configuration begin
        with _logged(setting_folder(out, setting)):
            try:
                run_setting(sweep, setting, out, shared, steps)
            except Exception as error:  # it would come again: only what ends the process is tried again, by Ray Tune
                traceback.print_exc()
                tune.report({"finished": 0, "error": f"{type(error).__name__}: {error}"})
            else:
                tune.report({"finished": 1, "error": ""})

    pool = replica_pool(pending[0].config.compute)
    system, path = file_system((out / "tune").uri)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": pool.num_cpus, "GPU": pool.num_gpus}),
        param_space={"setting": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=pool.largest, trial_dirname_creator=lambda each: str(each.config["setting"])
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
            storage_path=path,
            storage_filesystem=system,
            failure_config=tune.FailureConfig(max_failures=_CRASHES),
            callbacks=[_progress(len(by_name), pending[0].config.compute.progress_interval_s)],
            verbose=0,
        ),
    )
    print(f"{len(by_name)} settings, up to {pool.largest} at a time, on {pool.device}", flush=True)
    failed = {}
    for result in tuner.fit():
        name, metrics = str(result.config["setting"]), result.metrics or {}
        if result.error is not None:
            failed[name] = str(result.error).strip().splitlines()[-1]
        elif not metrics.get("finished"):
            failed[name] = str(metrics.get("error"))
    return failed


@contextmanager
def _logged(folder: Folder) -> Iterator[None]:
    """What is printed goes to a file of the setting; in an object store, which cannot append, to the driver."""
    if folder.local is None:
        yield
        return
    folder.local.mkdir(parents=True, exist_ok=True)
    with (folder.local / _LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def _progress(total: int, interval_s: float) -> Any:
    """A callback of Ray Tune that prints what begins and ends, with an ETA in settings."""
    from ray import tune

    class Report(tune.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.start = self.last = time.monotonic()
            self.done = 0

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            print(f"setting {trial.config['setting']}: begins", flush=True)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            result = trial.last_result or {}
            self.done += 1
            self.say(f"setting {trial.config['setting']}: {'done' if result.get('finished') else 'failed'}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.done += 1
            self.say(f"setting {trial.config['setting']}: failed")

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self.last >= max(interval_s, 10.0):
                running = [str(trial.config["setting"]) for trial in trials if trial.status == "RUNNING"]
                self.say(f"running: {', '.join(running) or 'none'}")

        def say(self, what: str) -> None:
            self.last = time.monotonic()
            elapsed = self.last - self.start
            eta = clock((total - self.done) * elapsed / self.done) if self.done else "unknown until one is done"
            ending = f"ETA {eta}" if self.done < total else f"took {clock(elapsed)}"
            print(f"{what}; {self.done}/{total} settings, {ending}", flush=True)

    return Report()
