"""Steps that runs have in common: made once, and taken over with their manifest records.

A step may be taken from another run when everything that it reads is equal. What it reads is a list of sections of the
configuration (`_READS`); the step is run under a configuration that holds these sections and is otherwise the default
(`shared_config`), so that nothing else can have had a part in it, and the fingerprint of that configuration is its key.
"""

from collections.abc import Sequence
from typing import Final, Literal

from core.config import Config, ReportConfig
from core.errors import ConfigError
from distributed.execution.launch import work_of
from distributed.store.origin import origin_of
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["SHARED", "SharedStep", "adopt", "shared_config"]

SharedStep = Literal["train_base", "build_dataset", "certify-standard-base"]
SHARED: Final[tuple[SharedStep, ...]] = ("train_base", "build_dataset", "certify-standard-base")
"""Steps that read no estimator, in their order; the later ones read the models of the first."""

_BASE: Final = ("seed", "dataset", "base", "compute")
_READS: Final[dict[SharedStep, tuple[str, ...]]] = {
    "train_base": _BASE,
    "build_dataset": (*_BASE, "noise", "labels"),
    "certify-standard-base": (*_BASE, "noise", "certify"),
}
"""Sections that a step reads, besides Sigma: votes at a noise level do not depend on the other levels."""
_STORES: Final[dict[str, str]] = {"build_dataset": "dataset", "certify-standard-base": "certificates/standard-base"}


def shared_config(config: Config, step: SharedStep, sigmas: Sequence[float]) -> Config:
    """The configuration under which a step is run for all runs that share it.

    `sigmas`: of all of these runs together, ascending.
    """
    kept = {name: getattr(config, name) for name in _READS[step]}
    if "certify" in kept and config.certify.budget == "grid":  # the grid may come from the report
        kept["certify"] = config.certify.model_copy(update={"grid": config.grid_radii})
    return Config(**kept, sigmas=tuple(sigmas), report=ReportConfig(radii=(0.0,)))


def adopt(target: RunDirectory, source: RunDirectory, step: SharedStep) -> None:
    """Take over a finished step of `source`, with its record; nothing to do where `target` has it already.

    The result is what the step would have made in `target`: the same models, the same rows. A crash in between is
    mended by the next call, or by the step itself.

    Raises:
        ConfigError: when what the step reads is not equal in the two, or `source` has not finished it.
    """
    wanted = shared_config(target.config, step, source.config.sigmas)
    same = wanted.fingerprint() == source.config.fingerprint() and set(target.config.sigmas) <= set(wanted.sigmas)
    if not same or target.config.distilled_levels != source.config.distilled_levels:
        raise ConfigError(f"{step} of {str(source.folder)!r} was made from other settings than {str(target.folder)!r}")
    record = source.manifest["steps"].get(step)
    if record is None:
        raise ConfigError(f"{step} of {str(source.folder)!r} is not finished")
    if step == "train_base":
        _adopt_models(target, source)
    else:
        _adopt_rows(target, source, step)


def _adopt_models(target: RunDirectory, source: RunDirectory) -> None:
    names = target.config.base_models
    if target.is_done("train_base", writes=names):
        return
    hashes = source.model_hashes(names)
    for name in names:
        target.put_model(name, source.model(name).read_bytes())
    record = source.manifest["steps"]["train_base"]
    facts = {key: value for key, value in record.items() if key not in ("finished", "read", "wrote")}
    target.finish("train_base", read={}, wrote=hashes, facts={**facts, "taken_from": source.folder.uri})


def _adopt_rows(target: RunDirectory, source: RunDirectory, step: SharedStep) -> None:
    name = _STORES[step]
    work, hashes = work_of(target, name)
    rows, whole = ShardStore(target.folder, name), ShardStore(source.folder, name)
    plan = whole.read_plan()
    assert plan is not None, "a finished step has a plan"
    if target.is_done(step, sorted(hashes)) and len(rows.committed()) == len(plan):
        return
    if dict(plan.origin["models"]) != hashes:
        raise ConfigError(
            f"{step} of {str(source.folder)!r} was made with other base models than {str(target.folder)!r}"
        )
    data = target.data(work.split)
    if not data.matches(there := source.manifest["data"][work.split]["digest"]):
        raise ConfigError(
            f"{step} of {str(source.folder)!r} was made from another data set: fingerprint {there} there, "
            f"{data.digest()} now"
        )
    origin = origin_of(target.config, hashes, target.manifest["data"][work.split]["digest"], begun=plan)
    settings = target.config.identity()
    own = Plan(plan.order, plan.bounds, work.rows_per_example, origin, plan.device, plan.batch_size, settings)
    rows.write_plan(own, data.example_ids)
    rows.copy_from(whole, work.config.sigmas)
    facts = rows.verify(own, data.example_ids, work.levels).facts(0, 0, 0.0)
    target.finish(step, read=hashes, wrote={}, facts={**facts, "taken_from": source.folder.uri})
