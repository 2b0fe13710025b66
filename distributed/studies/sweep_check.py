"""Before a sweep takes a device: every problem of every setting at once, and what the sweep will take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from core.config import Config, Sweep
from core.errors import DualRSError
from distributed.checks.estimate import Part, format_parts
from distributed.checks.measure import measure_parts
from distributed.checks.preflight import Found, check, count_found, refuse
from distributed.cluster.cluster import replicas_here
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory
from distributed.studies.sweep import is_finished, own_steps, setting_folder, shared_runs, shared_steps

__all__ = ["check_sweep", "dry_run_sweep"]


@dataclass(frozen=True)
class _Piece:
    """A run directory of the sweep: what it has to hold in the end, and which of that is made in it."""

    name: str
    folder: Folder
    config: Config
    steps: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.folder, self.config, "dry")


def _pieces(sweep: Sweep, out: Folder) -> Iterator[_Piece]:
    """What is not finished, in the order in which it is made."""
    pending = [setting for setting in sweep.settings if not is_finished(sweep, setting, out)]
    names = {setting.name for setting in pending}
    for run in shared_runs(sweep, out):
        steps = tuple(dict.fromkeys(("train_base", str(run.step))))
        if names & set(run.users) and run.step not in RunDirectory(run.folder, run.config, "dry").manifest["steps"]:
            yield _Piece(f"shared by {len(run.users)}", run.folder, run.config, steps, (run.step,))
    for setting in pending:
        own = own_steps(sweep, setting.config)
        yield _Piece(setting.name, setting_folder(out, setting), setting.config, (*shared_steps(sweep), *own), own)


def _check(pieces: Sequence[_Piece]) -> list[Found]:
    found, problems = [], dict[str, DualRSError]()
    for piece in pieces:
        found.append(check(piece.directory, piece.steps, here=False))  # trials have devices of their own
        for problem in found[-1].problems:
            problems.setdefault(str(problem), type(problem)(f"{piece.name}: {problem}"))
    refuse(list(problems.values()))
    return found


def check_sweep(sweep: Sweep, out: Folder) -> None:
    """Check all that the unfinished settings need, without running a network or writing anything.

    Raises:
        DualRSError: all problems in one; one that several settings have is named once.
    """
    _check(list(_pieces(sweep, out)))


def dry_run_sweep(sweep: Sweep, out: Folder, price: float | None, seconds: float = 1.0) -> None:
    """Print the settings, what they share, and what is left to do, measured here; write nothing.

    `price`: of a device hour, None to leave money out; `seconds`: that each of the measurements takes.

    Raises:
        DualRSError: as `check_sweep`.
    """
    print(f"{sweep.name}: {sweep.title}; {len(sweep.settings)} settings in {out}")
    for setting in sweep.settings:
        state = "finished" if is_finished(sweep, setting, out) else "to do"
        values = ", ".join(f"{key} = {value}" for key, value in setting.values.items()) or "the base configuration"
        print(f"  {setting.name}: {values} ({state})")
    for run in shared_runs(sweep, out):
        users = "all" if len(run.users) == len(sweep.settings) else ", ".join(run.users)
        print(f"shared: {run.step} ({run.folder.name}) by {users}")
    pieces = list(_pieces(sweep, out))
    founds = _check(pieces)
    if not pieces:
        print("everything is finished: nothing to do")
        return
    device, replicas, of = replicas_here(sweep.settings[0].config.compute)
    print(f"device: {of}; a setting takes one replica, what is shared takes all")
    if device == "cuda" and not torch.cuda.is_available():
        print("compute.device is cuda and this machine has no GPU: nothing can be measured here")
    parts: list[Part] = []
    for piece, found in zip(pieces, founds, strict=True):
        each = count_found(piece.directory, found, replicas if piece.name.startswith("shared") else 1)
        own = [part for part in each if part.name.startswith(piece.own)]
        if device == "cpu" or torch.cuda.is_available():
            measure_parts(piece.directory, own, found.data, device, seconds)
        parts += [replace(part, name=f"{piece.name}: {part.name}") for part in own]
    print(f"\n{format_parts(parts, price)}\n")
    print("<= is an upper bound: Dual RS takes less where the estimator picks sigma_e, abstains, or excludes a level")
    print(f"wall: one after the other; up to {replicas} settings run at a time")
