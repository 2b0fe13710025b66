"""From a run directory and the names of models to committed shards: what the certifying jobs share."""

from collections.abc import Mapping
from typing import Literal

from core.data import Split, load_dataset
from core.records import Sampling
from core.sequential import Budget
from distributed.replica import Work
from distributed.run_directory import RunDirectory
from distributed.scheduler import run_work
from distributed.shards import Plan, ShardStore

__all__ = ["certify_split"]


def certify_split(
    directory: RunDirectory,
    *,
    step: str,
    store: str,
    method: Literal["standard", "dual"],
    split: Split,
    sampling: Sampling,
    budget: Budget = "fixed",
    heads: Mapping[str, str],
) -> None:
    """Certify what is missing of a split and record the step as finished; nothing to do when it is and all is there.

    Args:
        directory: the run.
        step: its name in the manifest.
        store: folder for the shards.
        method: as in `Work`.
        split: as in `Work`.
        sampling: as in `Work`.
        budget: as in `Work`.
        heads: which model of the run directory serves as which head; the denoiser goes without saying.

    Raises:
        ConfigError: when an earlier step is missing, or the folder holds rows of other models.
    """
    config = directory.config
    models = {"denoiser": "denoiser", **heads}
    names = sorted(set(models.values()))
    if directory.is_done(step, names):
        num_shards = directory.manifest["steps"][step]["shards"]
        if len(ShardStore(directory.path, store).committed()) == num_shards:
            return
    hashes = directory.model_hashes(names)
    work = Work(
        root=directory.path.resolve(),
        store=store,
        method=method,
        split=split,
        sampling=sampling,
        budget=budget,
        models={role: directory.model(name).resolve() for role, name in models.items()},
        config=config,
        device=config.compute.device,
    )
    example_ids = load_dataset(config.dataset, split).example_ids
    origin = {"fingerprint": config.fingerprint(), "models": {role: hashes[name] for role, name in models.items()}}
    wanted = Plan.divide(len(example_ids), config.compute.shard_examples, work.rows_per_example, origin)
    plan = ShardStore(directory.path, store).plan(wanted, example_ids)
    facts = run_work(work, plan, example_ids)
    print(f"{store}: {facts['rows']:,} rows in {facts['shards']} shards, {facts['duration_s']} s")
    directory.finish(step, read=hashes, wrote={}, facts=facts)
