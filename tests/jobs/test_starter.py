"""models/digits, from which `make demo FAST=1` starts: what its README says is what it holds."""

import json
from pathlib import Path

from core.config import load_config
from core.files import file_sha256
from core.models.checkpoints import load_model
from core.records import CLASSIFIER, ESTIMATOR
from distributed.execution.work import build_network
from distributed.store.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "models" / "digits"


def test_starter_was_made_from_its_configuration_by_a_committed_revision() -> None:
    directory = RunDirectory(STARTER, load_config(ROOT / "configs" / "digits_fast.yaml"), "look")  # or it refuses
    manifest = json.loads((STARTER / "manifest.json").read_text())
    assert manifest["fingerprint"] == directory.config.fingerprint()
    assert len(manifest["git_revision"]) == 40, "made from files that were not committed"
    assert list(manifest["steps"]) == ["train_base", "build_dataset", "train_estimator", "finetune_classifier"]


def test_starter_files_have_the_hashes_of_its_manifest_and_are_small() -> None:
    steps = json.loads((STARTER / "manifest.json").read_text())["steps"]
    for step in steps.values():
        for name, digest in step["wrote"].items():
            assert file_sha256(STARTER / "models" / f"{name}.safetensors") == digest
    for name, digest in steps["build_dataset"]["sha256"].items():
        assert file_sha256(STARTER / "dataset" / name) == digest
    assert sum(path.stat().st_size for path in STARTER.rglob("*") if path.is_file()) < 2e6


def test_starter_networks_fit_the_configuration_and_nothing_is_left_to_train() -> None:
    directory = RunDirectory(STARTER, None, "look")
    config = directory.config
    network = build_network({n: directory.model(n) for n in ("denoiser", CLASSIFIER, ESTIMATOR)}, config, 10, "cpu")
    assert network.heads[ESTIMATOR].num_outputs == len(config.sigmas)
    load_model(directory.model("classifier_finetuned"))
    assert directory.is_done("train_estimator", ("denoiser", CLASSIFIER), writes=(ESTIMATOR,))
    assert directory.is_done("finetune_classifier", ("denoiser", CLASSIFIER, ESTIMATOR))
    shares = directory.manifest["steps"]["finetune_classifier"]["share_of_samples_at_sigma"]
    assert sum(share > 0.01 for share in shares.values()) >= 2, "the estimator routes nowhere"
