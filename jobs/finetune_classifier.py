"""Step 4: fine-tune the classifier at the noise level that the estimator picks for each training sample.

An expert is fine-tuned on the samples that are routed to it. With finetune.epochs=0 there is no such step.
"""

import sys
from collections.abc import Sequence

from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory) -> None:
    """Write models/classifier_finetuned (or one for each expert), unless it is done."""
    config = directory.config
    reads = (*config.base_models, "estimator")
    if directory.is_done("finetune_classifier", reads, writes=[config.certified[role] for role in config.classifiers]):
        return
    from distributed.cluster.cluster import train_cluster

    with train_cluster(config.compute):
        _finetune(directory, reads)


def _finetune(directory: RunDirectory, reads: Sequence[str]) -> None:
    import numpy as np

    from core.config import SplitConfig
    from core.data.subsets import choose
    from core.models.checkpoints import load_model
    from distributed.training.lesson import Lesson
    from distributed.training.sigmas import forget_sigmas, training_sigmas
    from distributed.training.train import Member, forget, train

    config, finetune, hashes = directory.config, directory.config.finetune, directory.model_hashes(reads)
    whole = directory.data("train")
    part = set(choose(whole, SplitConfig(share=finetune.share, seed=config.seed), "finetune").example_ids)
    asked = np.flatnonzero([example_id in part for example_id in whole.example_ids])
    places, sigma = training_sigmas(directory, whole, asked)
    if len(places) < len(asked):
        print(f"fine-tuning: {len(asked) - len(places)} of {len(asked)} images cannot be read and are left out")

    code = config.own_code.values()
    tuned = {role: load_model(directory.model(role), code) for role in config.classifiers}
    members: dict[str, Member] = {}
    for role, level in config.classifiers.items():
        # An expert learns from the samples that the estimator routes to it.
        routed = np.ones(len(places), np.bool_) if level is None else sigma == level
        if not routed.any():
            print(f"fine-tuning: no sample is routed to {role}, it stays as it is")
            continue
        name = "finetune_classifier" if level is None else f"finetune_classifier-{level}"
        lesson = Lesson.of(directory, name, "classifier", places[routed], sigma[routed])
        members[role] = Member(lesson, tuned[role], "fine-tuning" if level is None else f"fine-tuning {role}")
    histories = dict(zip(members, train(directory, [*members.values()]), strict=True))
    losses = {role: [record["loss"] for record in histories.get(role, [])] for role in config.classifiers}
    wrote = {config.certified[role]: directory.save_model(config.certified[role], tuned[role]) for role in tuned}
    shares = {str(level): float((sigma == level).mean()) for level in config.sigmas}
    directory.finish(
        "finetune_classifier",
        read=hashes,
        wrote=wrote,
        facts={
            "samples": len(places),
            "of": len(whole),
            "share_of_samples_at_sigma": shares,
            "loss": losses.get("classifier", losses),
            "workers": max(1, config.compute.train_workers),
        },
    )
    for member in members.values():
        forget(member.lesson)
    forget_sigmas(directory.folder)


def main() -> int:
    """Command line."""
    parser = job_parser("finetune_classifier", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: ["finetune_classifier"])


if __name__ == "__main__":
    sys.exit(main())
