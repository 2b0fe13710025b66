"""Step 3: train the variance estimator on the radii of the dataset."""

import hashlib
import json
import sys
from collections.abc import Sequence

from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory) -> None:
    """Write models/estimator, unless it is done."""
    config, dataset = directory.config, dataset_digest(directory)
    reads = config.base_models  # the classifiers through the dataset
    done = directory.is_done("train_estimator", reads, writes=("estimator",))
    if done and directory.manifest["steps"]["train_estimator"].get("dataset") == dataset:
        return
    from distributed.cluster.cluster import train_cluster

    with train_cluster(config.compute):
        _train(directory, reads, dataset)


def _train(directory: RunDirectory, reads: Sequence[str], dataset: str | None) -> None:
    import torch

    from core.models.checkpoints import load_model
    from core.models.classifiers import ImageClassifier
    from core.models.features import FeatureRouter
    from core.training.estimator import hold_out, learnable, new_estimator
    from distributed.store.sources import local_models
    from distributed.training.labels import training_radii
    from distributed.training.lesson import Lesson
    from distributed.training.train import Member, forget, train

    config, hashes = directory.config, directory.model_hashes(reads)
    data, code = directory.data("train"), config.own_code.values()
    radii = training_radii(directory, data)
    kept = learnable(radii)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 2)
        local = local_models(directory, "estimator")
        estimator = new_estimator(local, data.shape, lambda role: load_model(directory.model(role), code))
    backbone = config.estimator.backbone
    learner = estimator.head if isinstance(estimator, FeatureRouter) else estimator
    taken = estimator.taken if backbone and isinstance(estimator, ImageClassifier) and backbone.checkpoint else None
    if getattr(estimator, "new_head", False):
        print(f"estimator: its checkpoint's last layer is replaced by a new one with {len(config.sigmas)} outputs")
    _, held = hold_out(len(kept), config.estimator.holdout, config.seed, "train_estimator")
    also = f"; {len(held)} of them are held out" if len(held) else ""
    print(f"estimator: trained on {len(kept)} of {len(radii)} samples (the others have radius 0 at every sigma){also}")
    lesson = Lesson.of(directory, "train_estimator", "estimator", kept, radii[kept])
    (history,) = train(directory, [Member(lesson, learner, "estimator")])
    digest = directory.save_model("estimator", estimator)
    facts = {
        **({"taken": taken} if taken else {}),
        "dataset": dataset,
        "samples": len(kept),
        "of": len(radii),
        "loss": [record["loss"] for record in history],
        **({"held_out": [record["held_out"] for record in history]} if config.estimator.holdout else {}),
        "workers": max(1, config.compute.train_workers),
    }
    directory.finish("train_estimator", read=hashes, wrote={"estimator": digest}, facts=facts)
    forget(lesson)


def dataset_digest(directory: RunDirectory) -> str | None:
    """Of the rows that the estimator is trained on: a retried example changes them."""
    record = directory.manifest["steps"].get("build_dataset")
    return None if record is None else hashlib.sha256(json.dumps(record["sha256"], sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Command line."""
    parser = job_parser("train_estimator", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["train_estimator"])


if __name__ == "__main__":
    sys.exit(main())
