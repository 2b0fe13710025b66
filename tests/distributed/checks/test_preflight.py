"""What is checked and estimated before a run: all problems at once, rows as they will be, and no trace."""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from PIL import Image

import distributed.execution.work as work_module
from core.config import Config, parse_config
from core.errors import ConfigError, DataError, DualRSError, ModelError
from core.machine.engine import Engine
from core.models.checkpoints import build_denoiser, load_classifier, load_denoiser, save_model
from core.models.denoiser import OneShotDenoiser, small_unet_config
from core.models.resnet_cifar import ResNetCifar
from core.models.small import SmallConvNet
from core.procedures.smoothing import certificate
from core.records import CLASSIFIER, ESTIMATOR
from distributed.checks.estimate import (
    DENOISER,
    Part,
    count_parts,
    format_parts,
    rows_of,
    store_bytes,
)
from distributed.checks.measure import measure_parts
from distributed.checks.preflight import check, dry_run, refuse
from distributed.execution.launch import certify_store, outline, work_of
from distributed.execution.replica import Replica
from distributed.files.datasets import absolute, load_dataset
from distributed.files.storage import Folder
from distributed.methods.dual import Dual, dual_copies
from distributed.methods.rows import certificate_row
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import pipeline
from tests.helpers.s3 import s3_server, uri
from tests.helpers.tiny import PLAIN, tiny_run
from tests.jobs.test_jobs import call

ALL = pipeline.checked_of(parse_config(PLAIN))


def images(root: Path, split: str, classes: tuple[str, ...] = ("cat", "dog"), size: int = 8) -> Path:
    """Two images of each class."""
    for class_name in classes:
        folder = root / split / class_name
        folder.mkdir(parents=True)
        for number in range(2):
            random = np.random.default_rng([number, len(class_name), ord(class_name[0]), len(split)])
            Image.fromarray(random.integers(0, 255, (size, size, 3), np.uint8)).save(folder / f"{number}.png")
    return root


def folder_config(root: Path, *overrides: str) -> Config:
    plain = {**PLAIN, "dataset": {"name": "folder", "path": str(root)}}
    return parse_config(plain, overrides)


def dry(where: Path | str, config: Config | None) -> RunDirectory:
    return RunDirectory(where, config, "dry")


def texts(problems: list[DualRSError]) -> str:
    return "\n".join(f"{type(problem).__name__}: {problem}" for problem in problems)


def tree(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own files: denoisers for colour and for grey images, classifiers with 2, 3 and 12 classes, and broken ones."""
    folder = tmp_path_factory.mktemp("models")
    save_model(build_denoiser(small_unet_config(3, 8)), folder / "colour.safetensors")
    save_model(build_denoiser(small_unet_config(1, 8)), folder / "grey.safetensors")
    save_model(
        build_denoiser(small_unet_config(3, 8), num_steps=100, beta_range=(1e-4, 1e-3)), folder / "short.safetensors"
    )
    for classes in (2, 3):
        save_model(SmallConvNet(3, 8, classes), folder / f"classes{classes}.safetensors")
    torch.save(ResNetCifar(12).state_dict(), folder / "resnet.pt")
    whole = (folder / "resnet.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    whole = (folder / "colour.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(images(tmp_path / "data", "train"), "test")


def test_check_good_input_finds_facts_and_no_problems(data: Path, models: Path, tmp_path: Path) -> None:
    config = folder_config(
        data,
        f"base.denoiser={models}/colour.safetensors",
        f"base.classifier={{checkpoint: {models}/classes2.safetensors}}",
    )
    before = tree(tmp_path)
    found = check(dry(tmp_path / "runs" / "deep" / "run", config), ALL)
    assert texts(found.problems) == ""
    assert found.steps == list(ALL)
    facts = dict(found.facts)
    assert facts["train data"] == "folder, 4 images 3x8x8, 2 classes"
    assert "colour.safetensors" in facts["denoiser"]
    assert "trained here" in facts["estimator"]
    assert all(tensor.is_meta for tensor in found.networks["classifier"].state_dict().values())
    assert {path: stamp for path, stamp in tree(tmp_path).items() if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }
    assert not (tmp_path / "runs").exists()


def test_check_a_set_of_one_class_is_refused(tmp_path: Path) -> None:
    root = images(images(tmp_path / "data", "train", ("cat",)), "test", ("cat",))
    found = check(dry(tmp_path / "run", folder_config(root)), ALL)
    assert "DataError: dataset.train: folder has one class, expected two or more" in texts(found.problems)


def test_check_all_problems_at_once_each_with_key_and_remedy(data: Path, models: Path, tmp_path: Path) -> None:
    (data / "test" / "dog" / "1.png").write_bytes(b"not a picture")
    config = folder_config(
        data,
        f"base.denoiser={models}/short.safetensors",
        f"base.classifier={{checkpoint: {models}/classes3.safetensors}}",
        "estimator.backbone={arch: resnet9000}",
        f"dataset.train.path={tmp_path}/nowhere",
        "dataset.num_classes=2",
    )
    found = check(dry("/proc/run", config), ALL)
    with pytest.raises(ConfigError) as caught:
        refuse(found.problems)
    assert any("example 'test/dog/1.png': cannot decode" in fact for _, fact in found.facts)  # becomes an error row
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(found.problems)} problems"
    expected = [
        "configuration: cannot write to '/proc/run'",
        f"data: {f'{tmp_path}/nowhere'!r} is not there; set dataset.path",
        f"model: base.classifier: '{models}/classes3.safetensors' holds a SmallConvNet with 3 classes, expected 2",
        "model: estimator.backbone: no architecture 'resnet9000' in timm",
        "model: denoiser: sigma=0.5 is above the schedule's largest noise level",
    ]
    assert len(lines) == 1 + len(expected)
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(f"  {start}")


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["dataset.path={tmp}/gone"], DataError, "gone' is not there; set dataset.path"),
        (["dataset.num_classes=3"], DataError, "has 2 class folders, expected 3"),
        (["dataset.test.split=other"], DataError, "images of the training split have shape"),
        (["dataset.test.split=empty"], DataError, "no class folders in"),
        (["base.denoiser={models}/no.safetensors"], ModelError, "base.denoiser: no checkpoint at"),
        (["base.denoiser={models}/truncated.safetensors"], ModelError, "base.denoiser: .*truncated"),
        (["base.denoiser={models}/classes2.safetensors"], ModelError, "holds a SmallConvNet, expected a denoiser"),
        (["base.denoiser={models}/grey.safetensors"], ModelError, "denoiser: .*takes images of 1 channels, got 3"),
        (["base.denoiser={models}/short.safetensors"], ModelError, "above the schedule's largest"),
        (["base.classifier={{checkpoint: {models}/classes3.safetensors}}"], ModelError, "with 3 classes, expected 2"),
        (["base.classifier={{arch: resnet110, checkpoint: {models}/resnet.pt}}"], ModelError, "12 classes, 2 are need"),
        (["base.classifier={{arch: resnet110, checkpoint: {models}/truncated.pt}}"], ModelError, "truncated or damag"),
        (["estimator.backbone={{arch: resnet9000}}"], ModelError, "estimator.backbone: no architecture 'resnet9000'"),
        (["dataset.resize=9", "dataset.crop=9"], ModelError, "denoiser: the denoiser takes images whose sides"),
    ],
)
def test_check_bad_input_is_one_problem_of_its_kind(
    overrides: list[str], kind: type, message: str, data: Path, models: Path, tmp_path: Path
) -> None:
    images(data, "other", size=6)
    (data / "empty").mkdir()
    given = [override.format(tmp=tmp_path, models=models) for override in overrides]
    found = check(dry(tmp_path / "run", folder_config(data, *given)), ALL)
    assert kind in map(type, found.problems), texts(found.problems)
    with pytest.raises(kind, match=f"(?s){message}"):
        refuse([problem for problem in found.problems if type(problem) is kind][:1])
    assert not (tmp_path / "run").exists()


def test_check_step_without_the_earlier_ones_or_with_changed_models(tmp_path: Path) -> None:
    config = parse_config(PLAIN)
    found = check(dry(tmp_path / "run", config), ["certify-dual"])
    assert texts(found.problems) == (
        f"ConfigError: {str(tmp_path / 'run')!r}: denoiser, classifier_finetuned, estimator not there yet: run the "
        "earlier steps (jobs.pipeline)"
    )
    run = tiny_run(tmp_path / "run")
    assert check(dry(tmp_path / "run", None), ["certify-dual-base", "build_dataset"]).problems == []
    assert "the dataset not there yet" in texts(check(run, ["train_estimator"]).problems)
    save_model(SmallConvNet(1, 8, 7), run.model("classifier"))
    assert "is not the file that this run wrote" in texts(check(run, ["build_dataset"]).problems)
    tiny_run(tmp_path / "run")
    save_model(SmallConvNet(1, 8, 7), run.model("estimator"))
    run = RunDirectory(tmp_path / "run", None)
    wrote = dict(run.manifest["steps"]["train_base"]["wrote"])
    wrote["estimator"] = (run.folder / "models").sha256("estimator.safetensors")
    run.finish("train_base", read={}, wrote=wrote, facts={})
    assert "estimator: returns (7,) logits an image, expected 2" in texts(check(run, ["certify-dual-base"]).problems)


def test_check_room_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda where: usage._replace(free=1000))
    found = check(dry(tmp_path / "run", parse_config(PLAIN)), ALL)
    assert "has 1 kB of room, the run writes up to" in texts(found.problems)


def test_shapes_alone_are_read_on_the_meta_device(models: Path) -> None:
    with torch.device("meta"):
        denoiser = load_denoiser(models / "colour.safetensors")
        named = f"{{arch: resnet110, checkpoint: {models}/resnet.pt, mean: [0.5], std: [0.5]}}"
        config = folder_config(models, f"base.classifier={named}").base
        assert config.classifier is not None
        classifier = load_classifier(config.classifier, 12)
    assert isinstance(denoiser, OneShotDenoiser)
    assert denoiser.timestep(0.5) > 0  # the schedule is there
    for network in (denoiser.unet, classifier):
        assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert not any(tensor.is_meta for tensor in load_denoiser(models / "colour.safetensors").state_dict().values())


def test_check_writable_removes_the_folders_that_it_made(tmp_path: Path) -> None:
    Folder(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    Folder(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_check_writable_leaves_nothing_on_an_object_store() -> None:
    with s3_server() as server:
        folder = Folder(uri(server, "runs/a/b"))
        system, _ = folder._remote
        folder.check_writable()
        assert system.get_file_info(pafs.FileSelector("bucket", recursive=True)) == []
        folder.write("x", b"1")
        folder.check_writable()
        assert folder.walk() == ["x"]
        found = check(RunDirectory(uri(server, "other"), parse_config(PLAIN), "dry"), ["build_dataset"])
        assert "an object store, writable" in dict(found.facts)["output"]
        assert folder.walk() == ["x"]


# Estimates


class Counting(Engine):
    """Keeps the engines that were made."""

    made: list[Engine] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Counting.made.append(self)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    monkeypatch.setattr(Counting, "made", [])
    monkeypatch.setattr(work_module, "Engine", Counting)
    return Counting.made


WHOLE_BATCHES = ("compute.executor=local", "compute.batch_size=20", "dataset.test_size=60", "compute.chunk_size=20")
"""All requests are multiples of 20 draws: no batch is padded."""


def test_rows_of_a_standard_run_are_as_counted(tmp_path: Path, engines: list[Engine]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES)
    work, _ = work_of(run, "certificates/standard-base")
    each, exact = work.method.copies(work.terms)
    certify_store(run, work.store)
    assert exact
    assert engines[-1].network.rows == {name: 60 * rows for name, rows in rows_of(each, run.config).items()}
    assert engines[-1].network.rows == {DENOISER: 60 * 240, CLASSIFIER: 60 * 240}


@pytest.mark.parametrize(
    "overrides", [(), ("sigma_e=0.7",), ("estimator.denoiser=false",)], ids=["shared", "other sigma_e", "bare"]
)
def test_rows_of_a_dual_run_are_as_counted(tmp_path: Path, engines: list[Engine], overrides: tuple[str, ...]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, *overrides)
    config = run.config
    certify_store(run, "certificates/dual-base")
    rows = ShardStore(run.folder, "certificates/dual-base").read().to_pylist()
    work = outline(run, "certificates/dual-base")
    copies: Counter[tuple[str, ...]] = Counter()
    kinds: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        shared = config.sigmas[row["sigma_index"]] == config.estimator_sigma
        certified = row["sigma"] is not None
        kinds[shared, certified] += 1
        copies += dual_copies(work.terms, shared=shared, class_stage=certified)
    assert len(kinds) > 1
    assert engines[-1].network.rows == rows_of(copies, config)
    most = rows_of({kind: 60 * num for kind, num in work.method.copies(work.terms)[0].items()}, config)
    assert all(most[name] >= num for name, num in engines[-1].network.rows.items())
    assert sum(copies.values()) == sum(row["num_draws"] for row in rows)


def test_rows_of_a_single_sigma_are_exact(tmp_path: Path, engines: list[Engine]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, "sigmas=[0.5]")
    save_model(SmallConvNet(1, 8, 1), run.model("estimator"))
    wrote = {**run.manifest["steps"]["train_base"]["wrote"]}
    wrote["estimator"] = (run.folder / "models").sha256("estimator.safetensors")
    run.finish("train_base", read={}, wrote=wrote, facts={})
    certify_store(run, "certificates/dual-base")
    work = outline(run, "certificates/dual-base")
    each, exact = work.method.copies(work.terms)
    assert exact
    assert engines[-1].network.rows == {DENOISER: 60 * 120, ESTIMATOR: 60 * 120, CLASSIFIER: 60 * 120}
    assert rows_of(each, run.config) == {DENOISER: 120, ESTIMATOR: 120, CLASSIFIER: 120}


def test_rows_of_multiscale_stay_below_the_bound_and_reach_it_where_no_level_decides(
    tmp_path: Path, engines: list[Engine]
) -> None:
    settings = ("certify.budget=grid", "sigmas=[0.1, 1.0]")
    run = tiny_run(tmp_path, *WHOLE_BATCHES, *settings, weight_seed=4)
    store = "certificates/multiscale-base"
    certify_store(run, store)
    work = outline(run, store)
    each, exact = work.method.copies(work.terms)
    assert (each, exact) == ({(CLASSIFIER,): 240}, False)
    rows = ShardStore(run.folder, store).read().to_pylist()
    assert engines[-1].network.rows == {name: sum(r["num_draws"] for r in rows) for name in (DENOISER, CLASSIFIER)}
    assert {row["num_draws"] for row in rows} == {120, 240}
    assert {row["num_estimation"] for row in rows} == {100}, "all draws of a level, whatever the budget"


@pytest.mark.parametrize("budget", ["sequential", "grid"])
@pytest.mark.parametrize("method", ["standard", "dual"])
def test_rows_of_sequential_budgets_stay_below_the_bound(
    tmp_path: Path, engines: list[Engine], budget: str, method: str
) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, f"certify.budget={budget}", "certify.look_every=20")
    store = f"certificates/{method}-base"
    certify_store(run, store)
    work = outline(run, store)
    each, exact = work.method.copies(work.terms)
    assert not exact
    most = {name: 60 * num for name, num in rows_of(each, run.config).items()}
    assert engines[-1].network.rows.keys() == most.keys()
    assert all(num <= most[name] for name, num in engines[-1].network.rows.items())


def test_count_parts_of_a_pipeline_and_of_one_that_has_begun(tmp_path: Path) -> None:
    config = parse_config(PLAIN, ["base.denoiser_steps=10", "finetune.epochs=2", "compute.executor=local"])
    found = check(dry(tmp_path / "new", config), ALL)
    parts = {part.name: part for part in count_parts(dry(tmp_path / "new", config), ALL, found.data, {}, 2)}
    assert {name: (part.num_copies, part.exact) for name, part in parts.items()} == {
        "train_base, denoiser": (10 * 128, True),
        "train_base, classifier": (40 * 97, True),
        "build_dataset": (97 * 2 * 80, True),
        "train_estimator": (90 * 97 * 2, False),
        "finetune_classifier, sigmas": (97 * 100, True),
        "finetune_classifier, training": (2 * 97, True),
        "certify-standard": (1700 * 2 * 120, True),
        "certify-dual": (1700 * 2 * 120, False),
    }
    assert "not measured" in format_parts(list(parts.values()), None)
    run = tiny_run(tmp_path / "run", "compute.executor=local", "compute.part_rows=1")
    certify_store(run, "dataset")
    (run.path / "dataset" / "shard-000003.parquet").unlink()
    (part,) = count_parts(run, ["build_dataset"], {"train": run.data("train")}, {}, 1)
    assert part.examples == 10


def test_store_bytes_is_above_what_is_written_and_not_far(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    work, random = outline(run, "certificates/standard-base"), np.random.default_rng(0)
    rows = []
    for number in range(1000):
        share = random.dirichlet(np.full(10, 0.2))
        selection, estimation = (random.multinomial(num, share) for num in (20, 100))
        for sigma in run.config.sigmas:
            made = certificate(selection, estimation, sigma, work.sampling)
            rows.append(certificate_row(f"digits-{number:04d}", number % 10, made))
    store = ShardStore(run.folder, work.store)
    store.commit(0, rows, work.method.schema, "cpu")
    written = sum(file.size for file in store.folder.files())
    estimated = store_bytes(work, 1000, 10)
    assert written <= estimated <= 4 * written


def test_part_time_and_money() -> None:
    part = Part("x", 10, {Dual.heads: 7200, (CLASSIFIER,): 3600}, {}, replicas=2, rates={Dual.heads: 1.0})
    assert part.device_s is None
    part.rates[CLASSIFIER,] = 2.0
    part = replace(part, start_s=100.0)
    assert (part.work_s, part.device_s, part.wall_s) == (9000.0, 9200.0, 4600.0)
    assert format_parts([part], 3.0).splitlines()[1].split()[-1] == f"{9200 / 3600 * 3:.2f}"


def test_dry_run_prints_the_table_and_leaves_no_trace(tmp_path: Path) -> None:
    small = ["base.denoiser_steps=20", "compute.executor=local", "certify.num_estimation=200", "report.radii=[0, 0.5]"]
    where = tmp_path / "runs" / "one"
    result = call(
        "pipeline", "--config", "configs/digits.yaml", "--out", str(where), "--dry-run", "--price", "3", *small
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "train data  digits, 1,297 images 1x8x8, 10 classes" in result.stdout
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "778,200" in lines["build_dataset"]
    assert "<= " in lines["certify-dual"]
    assert "not measured" not in result.stdout
    assert "<= is an upper bound" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_run_that_is_there_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local")
    before = tree(tmp_path)
    dry_run(dry(run.folder.uri, None), ["build_dataset"], None, seconds=0.2)
    assert "15,520" in capsys.readouterr().out
    assert tree(tmp_path).items() - before.items() == {((run.path), run.path.stat().st_mtime_ns)}  # the probe
    certify_store(run, "dataset")
    dry_run(dry(run.folder.uri, None), ["build_dataset"], None)
    assert "everything is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "messages"),
    [
        (
            ["base.denoiser=nowhere.pt", "dataset={{name: folder, path: {tmp}/gone}}"],
            3,
            ["2 problems", "data: ", "model: "],
        ),
        (["base.denoiser=nowhere.pt", "--dry-run"], 3, ["base.denoiser: no checkpoint at 'nowhere.pt'"]),
        (["--price", "3"], 2, ["--price: goes with --dry-run"]),
        (["labels.num_estimation=2"], 2, ["cannot certify anything"]),
    ],
)
def test_pipeline_bad_input_is_refused_before_anything_is_made(
    args: list[str], code: int, messages: list[str], tmp_path: Path
) -> None:
    given = [arg.format(tmp=tmp_path) for arg in args]
    config = tmp_path / "c.yaml"
    config.write_text("{sigmas: [0.12, 0.25, 0.5], certify: {num_estimation: 1000}}")
    result = call("pipeline", "--config", str(config), "--out", str(tmp_path / "run"), *given)
    assert result.returncode == code, result.stderr
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


# Another data set


def test_run_directory_refuses_another_data_set(data: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", folder_config(data))
    run.data("train")
    noted = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]
    assert noted == {
        "train": {"digest": run.data("train").digest(), "examples": 4, "classes": 2, "shape": [3, 8, 8]},
        "class_names": ["cat", "dog"],
    }
    shutil.move(data, tmp_path / "moved")
    moved = folder_config(tmp_path / "moved")
    assert len(RunDirectory(tmp_path / "run", moved).data("train")) == 4
    shutil.copy(tmp_path / "moved/train/cat/0.png", tmp_path / "moved/train/cat/1.png")
    for directory in (RunDirectory(tmp_path / "run", None), dry(tmp_path / "run", moved)):
        with pytest.raises(ConfigError, match=r"dataset.train: this is not the data set .* put the old one back"):
            directory.data("train")
    assert "is not the data set" in texts(check(dry(tmp_path / "run", moved), ["build_dataset"]).problems)


def test_run_directory_of_an_earlier_version_gets_the_digest(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["data"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    dry(tmp_path, None).data("train")
    assert "data" not in json.loads((tmp_path / "manifest.json").read_text())
    run = RunDirectory(tmp_path, None)
    certify_store(run, "dataset")
    again = RunDirectory(tmp_path, None)
    assert again.manifest["data"]["train"]["digest"] == load_dataset(run.config.dataset, "train").digest()
    assert set(again.manifest["steps"]) == {"train_base", "build_dataset"}


def test_replica_refuses_another_data_set(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    certify_store(run, "dataset")
    work, _ = work_of(run, "dataset")
    replica = Replica(replace(work, device="cpu", data_digest="0" * 16))
    with pytest.raises(ConfigError, match=r"has another data set than the driver .*expected 0000000000000000"):
        replica.submit(0)
    replica.close()


def test_work_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {**PLAIN, "dataset": {"name": "folder", "path": "data", "test": {"path": "s3://b/x", "ids_file": "ids.txt"}}}
    )
    there = absolute(config.dataset)
    assert (there.path, there.test.path, there.test.ids_file) == (
        str(tmp_path / "data"),
        "s3://b/x",
        f"{tmp_path}/ids.txt",
    )
    assert (there.train.path, there.class_file) == (None, None)
    assert outline(RunDirectory(tmp_path / "run", config), "dataset").config.dataset == there


@pytest.mark.slow
def test_estimated_device_hours_are_within_15_percent(tmp_path: Path) -> None:
    """Measured here and now: other work on this machine spoils it, so the best of three is taken."""
    ratios = []
    for attempt in range(3):
        run = tiny_run(
            tmp_path / str(attempt),
            "compute.executor=local",
            "compute.shard_examples=100",
            "compute.batch_size=500",
            "compute.chunk_size=100",
            "labels.num_selection=100",
            "labels.num_estimation=100",
            "dataset.test_size=500",
            "sigmas=[0.12, 0.25, 0.5]",
        )
        (part,) = count_parts(run, ["build_dataset"], {"train": run.data("train")}, {}, 1)
        measure_parts(run, [part], {"train": run.data("train")}, "cpu", 4.0)
        assert part.device_s is not None
        start = time.perf_counter()
        certify_store(run, "dataset")
        ratios.append(part.device_s / (time.perf_counter() - start))
        print(f"estimated {part.device_s:.1f} s, ratio to the real run {ratios[-1]:.3f}")
        if abs(ratios[-1] - 1) <= 0.15:
            return
    pytest.fail(f"estimated to real: {ratios}")
