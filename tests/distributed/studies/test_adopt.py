"""Steps taken over from another run are what the run would have made itself."""

from pathlib import Path

import pytest

from core.config import Config, parse_config
from core.errors import ConfigError
from distributed.checks.audit import audit, replay
from distributed.execution.launch import certify_store
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.adopt import SHARED, adopt, shared_config
from tests.helpers.tiny import PLAIN, tiny_run

UNION = (0.25, 0.35, 0.5)
FEW = ("compute.executor=local", "dataset.train.first=10", "dataset.test.first=8", "compute.shard_examples=3")


def config(*overrides: str) -> Config:
    return parse_config(PLAIN, [*FEW, *overrides])


def source_of(path: Path, step: str, models: RunDirectory, *overrides: str) -> RunDirectory:
    """A shared run that has finished `step` for all levels of UNION, with the networks of another run."""
    source = RunDirectory(path, shared_config(config(*overrides), step, UNION))  # type: ignore[arg-type]
    hashes = models.manifest["steps"]["train_base"]["wrote"]
    for name in hashes:
        (source.folder / "models").write(f"{name}.safetensors", models.model(name).read_bytes())
    source.finish("train_base", read={}, wrote=hashes, facts={"clean_accuracy": 0.5})
    if step != "train_base":
        certify_store(source, "dataset" if step == "build_dataset" else "certificates/standard-base")
    return source


@pytest.mark.parametrize(
    ("step", "store"), [("build_dataset", "dataset"), ("certify-standard-base", "certificates/standard-base")]
)
def test_adopt_rows_of_a_wider_sigma_are_those_that_the_run_makes_itself(step: str, store: str, tmp_path: Path) -> None:
    alone = tiny_run(tmp_path / "alone", *FEW)
    certify_store(alone, store)
    source = source_of(tmp_path / "source", step, alone)
    target = RunDirectory(tmp_path / "target", config())
    adopt(target, source_of(tmp_path / "base", "train_base", alone), "train_base")
    adopt(target, source, step)  # type: ignore[arg-type]
    wide, own = ShardStore(source.folder, store).read(), ShardStore(target.folder, store).read()
    assert (wide.num_rows, own.num_rows) == (3 * own.num_rows // 2, ShardStore(alone.folder, store).read().num_rows)
    assert own.equals(ShardStore(alone.folder, store).read())
    assert audit(target) == ([], {store: own.num_rows})
    assert replay(target, 20, seed=0) == []
    before = {path: path.stat().st_mtime_ns for path in target.path.rglob("*.*")}
    adopt(target, source, step)  # type: ignore[arg-type]
    certify_store(target, store)
    assert {path: path.stat().st_mtime_ns for path in target.path.rglob("*.*")} == before


def test_adopt_after_a_crash_in_between_is_whole_again(tmp_path: Path) -> None:
    base = tiny_run(tmp_path / "base", *FEW)
    source = source_of(tmp_path / "source", "build_dataset", base)
    target = RunDirectory(tmp_path / "target", config())
    adopt(target, source_of(tmp_path / "models", "train_base", base), "train_base")

    def crash(self: ShardStore, other: ShardStore, sigmas: tuple[float, ...]) -> None:
        name = other.files()[0]
        self.folder.write(name, other.folder.read(name))  # with a level too many: as if cut off, and foreign
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, "copy_from", crash)
        with pytest.raises(KeyboardInterrupt):
            adopt(target, source, "build_dataset")
    assert "build_dataset" not in target.manifest["steps"]
    adopt(RunDirectory(target.path, None), source, "build_dataset")
    assert audit(RunDirectory(target.path, None, "look"))[0] == []


@pytest.mark.parametrize("other", ["seed=1", "labels.num_estimation=61", "noise=exact", "compute.batch_size=63"])
def test_adopt_refuses_what_was_made_from_other_settings(other: str, tmp_path: Path) -> None:
    source = RunDirectory(tmp_path / "source", shared_config(config(), "build_dataset", UNION))
    target = RunDirectory(tmp_path / "target", config(other))
    with pytest.raises(ConfigError, match="was made from other settings"):
        adopt(target, source, "build_dataset")


def test_adopt_refuses_a_denoiser_that_was_distilled_for_other_levels(tmp_path: Path) -> None:
    made = config("base.denoiser.train.objective=distilled")
    source = RunDirectory(tmp_path / "source", shared_config(made, "train_base", UNION))
    with pytest.raises(ConfigError, match="was made from other settings"):
        adopt(RunDirectory(tmp_path / "target", made), source, "train_base")


def test_adopt_refuses_rows_of_other_models_another_level_and_an_unfinished_step(tmp_path: Path) -> None:
    base = tiny_run(tmp_path / "base", *FEW)
    source = source_of(tmp_path / "source", "build_dataset", base)
    other = tiny_run(tmp_path / "other", *FEW, weight_seed=1)
    with pytest.raises(ConfigError, match="was made with other base models"):
        adopt(other, source, "build_dataset")
    wider = RunDirectory(tmp_path / "wider", config("sigmas=[0.25,0.6]"))
    with pytest.raises(ConfigError, match="was made from other settings"):
        adopt(wider, source, "build_dataset")
    target = RunDirectory(tmp_path / "target", config())
    with pytest.raises(ConfigError, match="was made from other settings"):  # not the configuration of this step
        adopt(target, source, "certify-standard-base")
    empty = RunDirectory(tmp_path / "empty", shared_config(config(), "build_dataset", UNION))
    with pytest.raises(ConfigError, match="is not finished"):
        adopt(target, empty, "build_dataset")


def test_shared_config_holds_what_the_step_reads_and_nothing_else() -> None:
    for same in ("estimator.consistency_lambda=3", "sigma_e=0.7", "finetune.epochs=2", "report.radii=[0.1]"):
        for step in SHARED:
            ours, theirs = (shared_config(c, step, UNION).fingerprint() for c in (config(), config(same)))
            assert ours == theirs, (same, step)
    moves = {
        "seed=1": ("train_base", "build_dataset", "certify-standard-base"),
        "dataset.train.share=0.5": ("train_base", "build_dataset", "certify-standard-base"),
        "base.classifier.train.epochs=2": ("train_base", "build_dataset", "certify-standard-base"),
        "noise=exact": ("build_dataset", "certify-standard-base"),
        "labels.alpha=0.02": ("build_dataset",),
        "certify.alpha=0.02": ("certify-standard-base",),
    }
    for change, steps in moves.items():
        for step in SHARED:
            ours, theirs = (shared_config(c, step, UNION).fingerprint() for c in (config(), config(change)))
            assert (ours != theirs) == (step in steps), (change, step)
    grid = [config("certify.budget=grid", f"report.radii={radii}") for radii in ("[0,0.1]", "[0,0.2]")]
    one, other = (shared_config(c, "certify-standard-base", UNION) for c in grid)
    assert one.certify.grid == (0.0, 0.1) != other.certify.grid
