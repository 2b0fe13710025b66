"""The training steps of a run: interrupted, resumed, refused; on workers of Ray Train; what they leave behind."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from core.data import Dataset
from core.errors import DataError
from core.models.checkpoints import load_model
from core.models.features import FeatureRouter
from core.procedures.smoothing import certificate
from core.records import Sampling
from core.training.estimator import shrunk_radii
from core.training.loop import Training
from distributed.execution.work import build_network
from distributed.files.storage import Folder
from distributed.methods.rows import CERTIFICATE_SCHEMA, certificate_row
from distributed.store import track
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.training import checkpoints
from distributed.training.labels import training_radii
from jobs import build_dataset, finetune_classifier, train_estimator
from tests.helpers.s3 import s3_server, uri
from tests.helpers.tiny import tiny_run

QUICK = ("estimator.epochs=3", "estimator.batch_size=16", "estimator.lr=1e-3", "finetune.epochs=2")
FEATURES = (
    "estimator.backbone=features", "estimator.loss=radius", "estimator.label_radius=shrunk",
    "estimator.feature_copies=3", "estimator.holdout=0.25",
    "estimator.holdout_copies=3", "base.experts={0.25: {width: 4, train: {}}, 0.5: {width: 8, train: {}}}",
)  # fmt: skip
FINETUNE = ("finetune.batch_size=16", "finetune.num_sigma_draws=20", "finetune.lr=1e-3")


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Radii as if certified."""

    def radii(directory: RunDirectory, train: Dataset) -> np.ndarray:
        return np.random.default_rng(0).uniform(-0.3, 1, (len(train), 2)).clip(0)

    monkeypatch.setattr("distributed.training.labels.training_radii", radii)


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each."""
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoints, "_COST", 1e9)


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process, so to say, behind so many batches."""
    run = Training.run

    def short(self: Training) -> Iterator[Any]:
        for number, record in enumerate(run(self), 1):
            yield record
            if number == batches:
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", short)


def both_steps(run: RunDirectory) -> dict[str, Any]:
    """Weights and losses of both trainings."""
    train_estimator.run(run)
    finetune_classifier.run(run)
    steps = run.manifest["steps"]
    return {name: (steps[name]["wrote"], steps[name]["loss"]) for name in ("train_estimator", "finetune_classifier")}


@pytest.mark.usefixtures("labels", "every_batch")
def test_training_steps_interrupted_within_an_epoch_end_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("compute.executor=local", *QUICK, *FINETUNE)
    whole = both_steps(tiny_run(tmp_path / "whole", *options))
    run = tiny_run(tmp_path / "run", *options)
    file = run.path / "training" / "train_estimator" / "checkpoint.pt"
    with monkeypatch.context() as patch:
        stop_after(8, patch)  # within the second epoch
        with pytest.raises(KeyboardInterrupt):
            train_estimator.run(run)
    before = torch.load(file, weights_only=True)
    assert (before["epoch"], before["batch"] > 0) == (1, True)
    seen: list[int] = []
    step = Training._step

    def noted(self: Training, *rest: Any) -> None:
        seen.append(self.epoch)
        step(self, *rest)

    monkeypatch.setattr(Training, "_step", noted)
    resumed = both_steps(run)
    assert seen.count(0) == -(-97 // 16)  # the classifier's: the estimator's first epoch was not done again
    assert resumed == whole
    left = sorted(str(path.relative_to(run.path)) for path in (run.path / "training").rglob("*") if path.is_file())
    assert left
    assert all("/tensorboard/events.out.tfevents." in name for name in left)


@pytest.mark.usefixtures("labels", "every_batch")
def test_train_estimator_on_features_interrupted_ends_as_undisturbed_and_keeps_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("compute.executor=local", *QUICK, *FEATURES)
    whole, run = tiny_run(tmp_path / "whole", *options), tiny_run(tmp_path / "run", *options)
    train_estimator.run(whole)
    out = capsys.readouterr().out
    assert "held out" in out
    with monkeypatch.context() as patch:
        stop_after(7, patch)  # within the second epoch
        with pytest.raises(KeyboardInterrupt):
            train_estimator.run(run)
    train_estimator.run(run)
    assert run.model("estimator").read_bytes() == whole.model("estimator").read_bytes()
    step = run.manifest["steps"]["train_estimator"]
    assert len(step["held_out"]) == 3
    shown = scalars(run.path / "training" / "train_estimator" / "tensorboard")
    for epoch, value in enumerate(step["held_out"], 1):
        assert shown["held_out", epoch] == pytest.approx(value, rel=1e-6)
        assert -shown["loss", epoch] == pytest.approx(shown["expected_radius" if epoch < 3 else "radius", epoch])
    router = load_model(run.model("estimator"))
    assert isinstance(router, FeatureRouter)
    assert router.extractor.place == 1  # of sigma_e = .5
    for role, own in zip(run.config.classifiers, router.extractor.classifiers, strict=True):
        for name, value in load_model(run.model(role)).state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
    network = build_network({"estimator": run.model("estimator")}, run.config, 10, "cpu")
    assert network.heads["estimator"].num_outputs == 2


def test_training_radii_shrunk_are_those_of_all_votes_of_the_true_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dataset in two files, one example failed at one level."""
    run = tiny_run(tmp_path / "run", "compute.executor=local", "estimator.label_radius=shrunk")
    train, rng, rows = run.data("train"), np.random.default_rng(0), []
    votes = np.zeros((len(train), 2), np.int64)
    for place, (example_id, label) in enumerate(zip(train.example_ids, train.labels.tolist(), strict=True)):
        for level, sigma in enumerate(run.config.sigmas):
            counts = [rng.multinomial(num, rng.dirichlet([0.1] * 9 + [3])) for num in (20, 60)]
            counts = [np.roll(each, label + 1) for each in counts]
            votes[place, level] = sum(int(each[label]) for each in counts)
            result = certificate(counts[0], counts[1], sigma, Sampling(20, 60, 0.01))
            row = certificate_row(example_id, label, result)
            if (place, level) == (5, 1):
                row |= {"counts_selection": [], "counts_estimation": [], "num_selection": 0, "num_estimation": 0}
                row |= {"status": "error", "radius": 0.0}
            rows.append(row)
    parts = [pa.Table.from_pylist(part, schema=CERTIFICATE_SCHEMA) for part in (rows[:40], rows[40:])]
    monkeypatch.setattr(ShardStore, "files", lambda self: ["0", "1"])
    monkeypatch.setattr(ShardStore, "read_file", lambda self, name: parts[int(name)])
    num = np.full_like(votes, 80)
    num[5] = 0
    expected = shrunk_radii(votes, num, np.array(run.config.sigmas), 100, 0.005)
    assert np.array_equal(training_radii(run, train), expected)
    assert not expected[5].any()
    assert 20 < np.count_nonzero(expected) < 194


@pytest.mark.usefixtures("labels", "every_batch")
def test_training_checkpoint_of_other_labels_or_weights_is_not_used_and_a_damaged_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local", *QUICK)
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            train_estimator.run(run)
    file = run.path / "training" / "train_estimator" / "checkpoint.pt"
    other = tiny_run(tmp_path / "other", "compute.executor=local", *QUICK, weight_seed=1)  # another denoiser
    (other.path / "training" / "train_estimator").mkdir(parents=True)
    (other.path / "training" / "train_estimator" / "checkpoint.pt").write_bytes(file.read_bytes())
    train_estimator.run(other)
    assert "is of a training with other models, labels or settings: not used" in capsys.readouterr().out
    fresh = tiny_run(tmp_path / "fresh", "compute.executor=local", *QUICK, weight_seed=1)
    train_estimator.run(fresh)
    assert fresh.model_hashes(["estimator"]) == other.model_hashes(["estimator"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"checkpoint.pt' is not a checkpoint of ours, or damaged .*remove it"):
        train_estimator.run(run)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show: the records of the event files, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[str, int], float] = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


@pytest.mark.usefixtures("labels")
def test_training_curves_are_the_losses_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[tuple[str, int], float] = {}

    class Backend:
        def __init__(self, *about: object) -> None: ...

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            told.update({(name, step): value for name, value in values.items()})

        def close(self) -> None: ...

    monkeypatch.setattr(track, "_BACKENDS", {"mlflow": Backend})
    monkeypatch.setattr(track, "check_tracker", lambda config: None)
    run = tiny_run(tmp_path, "compute.executor=local", *QUICK, "estimator.lr_step=2", "track=mlflow")
    train_estimator.run(run)
    shown = scalars(run.path / "training" / "train_estimator" / "tensorboard")
    for epoch, loss in enumerate(run.manifest["steps"]["train_estimator"]["loss"], 1):
        assert shown["loss", epoch] == pytest.approx(loss, rel=1e-6)
        assert told["train_estimator/loss", epoch] == loss
        assert 0 < shown["cross_entropy", epoch] < shown["loss", epoch]
        assert shown["samples_per_s", epoch] > 0
    assert [shown["lr", epoch] for epoch in (1, 2, 3)] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_checkpoint_and_curves_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        folder = Folder(uri(server, "run/training/x"))
        kept = checkpoints.Checkpoints(folder, "one")
        assert kept.read() is None
        kept.offer(lambda: {"epoch": 3, "weight": torch.arange(4)}, epoch_ended=True, ended=False)
        state = checkpoints.Checkpoints(folder, "one").read()
        assert state is not None
        assert (state["epoch"], state["weight"].tolist()) == (3, [0, 1, 2, 3])
        assert checkpoints.Checkpoints(folder, "two").read() is None
        monkeypatch.setattr(checkpoints, "_UPLOAD_S", 0.0)
        with checkpoints.Curves(folder / "tensorboard") as curves:
            curves.add({"epoch": 1.0, "loss": 2.0})
            assert len((folder / "tensorboard").files()) == 1
        kept.forget()
        assert folder.walk() == [f"tensorboard/{file.name}" for file in (folder / "tensorboard").files()]


@pytest.mark.slow
def test_training_on_two_workers_of_ray_train_equals_the_plain_loop(tmp_path: Path) -> None:
    """Labels by Ray Data, the estimator by two processes that talk over gloo."""
    run = tiny_run(tmp_path / "plain", "compute.executor=local", *QUICK, "estimator.batch_size=5")
    build_dataset.run(run)
    train_estimator.run(run)
    compute = run.config.compute.model_copy(update={"executor": "ray", "train_workers": 2})
    plan = RunDirectory(run.path, run.config.model_copy(update={"compute": compute}))
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    try:
        data = run.data("train")
        assert np.array_equal(training_radii(plan, data), training_radii(run, data))
        # The same run directory, with a dataset that is finished: only where it trains is another.
        (run.path / "models" / "estimator.safetensors").rename(run.path / "plain.safetensors")
        train_estimator.run(plan)
    finally:
        ray.shutdown()
    one, other = (
        load_model(run.path / name).state_dict() for name in ("plain.safetensors", "models/estimator.safetensors")
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    losses = [each.manifest["steps"]["train_estimator"]["loss"] for each in (run, plan)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert plan.manifest["steps"]["train_estimator"]["workers"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("labels")
@pytest.mark.parametrize("more", [(), FEATURES], ids=["images", "features"])
def test_training_on_one_worker_of_ray_train_has_the_bits_of_the_plain_loop(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    options = (*QUICK, *FINETUNE, *more)
    plain = both_steps(tiny_run(tmp_path / "plain", "compute.executor=local", *options))
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    try:
        one = both_steps(tiny_run(tmp_path / "one", "compute.train_workers=1", *options))
    finally:
        ray.shutdown()
    assert one == plain
