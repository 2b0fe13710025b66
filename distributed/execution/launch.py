"""From a run directory and the name of a store to committed shards: what all certifying jobs share."""

from dataclasses import replace

from core.data import Dataset
from core.errors import ConfigError, DataError
from core.own_function import source_of
from core.records import ESTIMATOR, Sampling
from distributed.execution.scheduler import run_work
from distributed.execution.work import Work
from distributed.files.datasets import absolute
from distributed.methods import METHODS, method_of
from distributed.store.origin import origin_of, step_of
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.store.verify import changed_images

__all__ = ["certify_store", "outline", "step_of", "stores", "work_of"]


def stores() -> tuple[str, ...]:
    """Folders of certificates in a run directory. `-base` is the classifier as it was before fine-tuning."""
    return ("dataset", *(f"certificates/{name}{ending}" for ending in ("", "-base") for name in METHODS))


def outline(directory: RunDirectory, store: str) -> Work:
    """What fills a store, without the models: enough to count with."""
    config = directory.config
    fixed = store == "dataset" or not method_of(store).early
    labels = config.labels
    sampling = config.sampling()
    if store == "dataset":
        sampling = Sampling(labels.num_selection, labels.num_estimation, labels.alpha, config.law)
    return Work(
        root=directory.folder,
        store=store,
        split="train" if store == "dataset" else "test",
        sampling=sampling,
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
    if not (work.sampling.plain or work.method.any_bound):
        odd = "reference" if work.sampling.num_reference else "bound: randomized"
        raise ConfigError(f"certify.{odd}: is for the methods standard and dual, not for {store}; leave it out")
    as_trained = store == "dataset" or store.endswith("-base")
    config = directory.config
    models = {role: role for role in config.base_models} if as_trained else config.certified
    if ESTIMATOR in work.method.heads:
        models["estimator"] = "estimator"
    hashes = directory.model_hashes(sorted(models.values()))
    taken = {role: (name, hashes[name]) for role, name in models.items()}
    return replace(work, models=taken, networks=directory.models), hashes


def _check_images(directory: RunDirectory, work: Work, data: Dataset) -> None:
    """Refuse to go on where images are others than those that there are rows of: some are looked at, chosen afresh."""
    for name in stores():
        if outline(directory, name).split != work.split:
            continue
        for problem in changed_images(ShardStore(directory.folder, name).images(), data):
            raise DataError(
                f"{name}: {problem}; put the data set back as it was (dataset.path, dataset.{work.split}.path), or use "
                "another --out"
            )


def certify_store(directory: RunDirectory, store: str, retry_errors: bool = False) -> None:
    """Certify what is missing of a store and record the step as finished; nothing to do when all is there.

    `retry_errors`: whether a finished step with errors is taken up again.

    Raises:
        ConfigError: as `work_of`, or when the folder holds rows of other models, or the data set is another one.
        DataError: when images have changed since rows were computed from them.
    """
    config, step = directory.config, step_of(store)
    if ":" in config.noise:
        directory.check_source("noise", config.noise, source_of(config.noise, "noise")["sha256"])
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
    _check_images(directory, work, data)
    origin = origin_of(config, hashes, work.data_digest, begun=shards.read_plan())
    facts = run_work(work, origin, data.example_ids, settings=config.identity())
    retries = f", {facts['retries']} retries" if facts["retries"] else ""
    failed = f", {facts['error_rows']} with errors" if facts["error_rows"] else ""
    print(f"{store}: {facts['rows']:,} rows{failed} in {facts['shards']} shards{retries}, {facts['duration_s']} s")
    votes = facts.pop("votes")
    if lost := facts["non_finite_draws"]:
        every = lost + votes
        print(
            f"{store}: {lost:,} of {every:,} votes ({100 * lost / every:.3g}%) had non-finite logits; they count "
            f"against every class (networks: {', '.join(sorted(hashes))}; compute.precision={config.compute.precision})"
        )
    directory.finish(step, read=hashes, wrote={}, facts=facts)
