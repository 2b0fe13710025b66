"""From a run directory and the name of a store to committed shards: what all certifying jobs share."""

from typing import Literal

from core.files import file_sha256
from core.records import Sampling
from distributed.datasets import load_dataset
from distributed.replica import Work
from distributed.run_directory import RunDirectory
from distributed.scheduler import run_work
from distributed.shards import Plan, ShardStore

__all__ = ["STORES", "certify_store", "step_of", "work_of"]

STORES = (
    "dataset",
    "certificates/standard",
    "certificates/dual",
    "certificates/standard-base",
    "certificates/dual-base",
)
"""Folders of certificates in a run directory. `-base` is the classifier as it was before fine-tuning."""


def step_of(store: str) -> str:
    """The step in the manifest that fills a store."""
    return "build_dataset" if store == "dataset" else store.replace("certificates/", "certify-")


def work_of(directory: RunDirectory, store: str) -> tuple[Work, dict[str, str]]:
    """What fills a store, and the hashes of the models that it takes (by their name in the run directory).

    Raises:
        ConfigError: when an earlier step is missing, or a model is not the one that it wrote.
    """
    config = directory.config
    method: Literal["standard", "dual"] = "dual" if "dual" in store else "standard"
    classifier = "classifier" if store == "dataset" or store.endswith("-base") else "classifier_finetuned"
    models = {"denoiser": "denoiser", "classifier": classifier}
    if method == "dual":
        models["estimator"] = "estimator"
    stage = config.labels if store == "dataset" else config.certify
    hashes = directory.model_hashes(sorted(models.values()))
    work = Work(
        root=directory.path.resolve(),
        store=store,
        method=method,
        split="train" if store == "dataset" else "test",
        sampling=Sampling(stage.num_selection, stage.num_estimation, stage.alpha),
        budget="fixed" if store == "dataset" else config.certify.budget,
        models={role: directory.model(name).resolve() for role, name in models.items()},
        config=config,
        device=config.compute.device,
    )
    return work, hashes


def certify_store(directory: RunDirectory, store: str) -> None:
    """Certify what is missing of a store and record the step as finished; nothing to do when all is there.

    Raises:
        ConfigError: as `work_of`, or when the folder holds rows of other models.
    """
    config, step, shards = directory.config, step_of(store), ShardStore(directory.path, store)
    work, hashes = work_of(directory, store)
    if (
        directory.is_done(step, sorted(hashes))
        and len(shards.committed()) == directory.manifest["steps"][step]["shards"]
    ):
        return
    example_ids = load_dataset(config.dataset, work.split).example_ids
    origin = {"fingerprint": config.fingerprint(), "models": hashes}
    wanted = Plan.divide(len(example_ids), config.compute.shard_examples, work.rows_per_example, origin)
    plan = shards.plan(wanted, example_ids)
    facts = run_work(work, plan, example_ids)
    facts["sha256"] = {path.name: file_sha256(path) for path in shards.files()}
    print(f"{store}: {facts['rows']:,} rows in {facts['shards']} shards, {facts['duration_s']} s")
    if facts["non_finite_draws"]:
        print(f"{store}: {facts['non_finite_draws']:,} votes had non-finite logits; they count against every class")
    directory.finish(step, read=hashes, wrote={}, facts=facts)
