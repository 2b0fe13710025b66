"""A finished run, made in seconds."""

import shutil
from pathlib import Path

from core.files import file_sha256
from distributed.store.run_directory import RunDirectory
from jobs import certify
from tests.helpers.tiny import tiny_run

OVERRIDES = (
    "compute.executor=local",
    "compute.part_rows=1",
    "dataset.test_size=50",
    "labels.num_estimation=40",
    "labels.num_selection=10",
)


def finished_run(path: Path, *overrides: str, more: tuple[str, ...] = (), weight_seed: int = 0) -> RunDirectory:
    """50 test images, certified with standard RS and Dual RS (and more methods)."""
    run = tiny_run(path, *OVERRIDES, *overrides, weight_seed=weight_seed)
    run.finish(  # the models stand in for the fine-tuned one
        "finetune_classifier",
        read={},
        wrote={"classifier_finetuned": _copy(run.model("classifier"), run.model("classifier_finetuned"))},
        facts={},
    )
    for method in ("standard", "dual", *more):
        certify.run(run, method)
    return run


def _copy(source: Path, target: Path) -> str:
    shutil.copy(source, target)
    return file_sha256(target)
