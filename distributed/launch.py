"""From a run directory and the name of a store to committed shards: what all certifying jobs share."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from core.records import Sampling
from distributed.datasets import absolute
from distributed.run_directory import RunDirectory, finetuned
from distributed.scheduler import run_work
from distributed.shards import ShardStore
from distributed.work import Method, Work

__all__ = ["STORES", "certify_store", "outline", "step_of", "work_of"]

STORES = (
    "dataset",
    "certificates/standard",
    "certificates/dual",
    "certificates/multiscale",
    "certificates/standard-base",
    "certificates/dual-base",
    "certificates/multiscale-base",
)
"""Folders of certificates in a run directory. `-base` is the classifier as it was before fine-tuning."""


def step_of(store: str) -> str:
    """The step in the manifest that fills a store."""
    return "build_dataset" if store == "dataset" else store.replace("certificates/", "certify-")


def outline(directory: RunDirectory, store: str) -> Work:
    """What fills a store, without the models: enough to count with."""
    config = directory.config
    method: Method = "dual" if "dual" in store else "multiscale" if "multiscale" in store else "standard"
    fixed = store == "dataset" or method == "multiscale"
    stage = config.labels if store == "dataset" else config.certify
    return Work(
        root=directory.folder,
        store=store,
        method=method,
        split="train" if store == "dataset" else "test",
        sampling=Sampling(stage.num_selection, stage.num_estimation, stage.alpha),
        budget="fixed" if fixed else config.certify.budget,
        models={},
        config=config.model_copy(update={"dataset": absolute(config.dataset)}),
        device=config.compute.device,
    )


def work_of(directory: RunDirectory, store: str) -> tuple[Work, dict[str, str]]:
    """What fills a store, and the hashes of the models that it takes (by their name in the run directory).

    Raises:
        ConfigError: when an earlier step is missing, or a model is not the one that it wrote.
    """
    work = outline(directory, store)
    as_trained = store == "dataset" or store.endswith("-base")
    roles = directory.config.classifiers
    models = {"denoiser": "denoiser"} | {role: role if as_trained else finetuned(role) for role in roles}
    if work.method == "dual":
        models["estimator"] = "estimator"
    hashes = directory.model_hashes(sorted(models.values()))
    taken = {role: (name, hashes[name]) for role, name in models.items()}
    return replace(work, models=taken, networks=directory.models), hashes


def certify_store(directory: RunDirectory, store: str, retry_errors: bool = False) -> None:
    """Certify what is missing of a store and record the step as finished; nothing to do when all is there.

    Args:
        directory: the run.
        store: one of STORES.
        retry_errors: whether a finished step with errors is taken up again.

    Raises:
        ConfigError: as `work_of`, or when the folder holds rows of other models, or the data set is another one.
    """
    config, step = directory.config, step_of(store)
    work, hashes = work_of(directory, store)
    shards = ShardStore(directory.folder, store)
    if (
        directory.is_done(step, sorted(hashes))
        and len(shards.committed()) == directory.manifest["steps"][step]["shards"]
        and not (retry_errors and shards.shards_with_errors())
    ):
        return
    data = directory.data(work.split)
    work = replace(work, data_digest=directory.manifest["data"][work.split]["digest"])
    facts = run_work(work, {"fingerprint": config.fingerprint(), "models": hashes}, data.example_ids)
    retries = f", {facts['retries']} retries" if facts["retries"] else ""
    failed = f", {facts['error_rows']} with errors" if facts["error_rows"] else ""
    print(f"{store}: {facts['rows']:,} rows{failed} in {facts['shards']} shards{retries}, {facts['duration_s']} s")
    if lost := facts["non_finite_draws"]:
        every = lost + sum(_votes(shards.read_file(file)) for file in shards.files())
        print(
            f"{store}: {lost:,} of {every:,} votes ({100 * lost / every:.3g}%) had non-finite logits; they count "
            f"against every class (networks: {', '.join(sorted(hashes))}; compute.precision={config.compute.precision})"
        )
    directory.finish(step, read=hashes, wrote={}, facts=facts)


def _votes(table: pa.Table) -> int:
    """Votes for a class, in all columns of counts."""
    columns = [table.column(name) for name in table.column_names if name.startswith("counts_")]
    return sum(int(pc.sum(pc.list_flatten(column, recursive=True)).as_py() or 0) for column in columns)
