"""The same behaviour on a local disk and on a real S3 server, also one that fails and hangs."""

import hashlib
import pickle
import threading
from pathlib import Path

import pyarrow.compute as pc
import pytest

from core.errors import ConfigError, DataError
from distributed.checks.audit import audit
from distributed.files.storage import Folder, file_system
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.rounds import begin_round, rounds_there
from distributed.studies.shift import open_set, sets_there, shifted_config
from jobs import build_dataset, certify
from tests.helpers.s3 import FlakyProxy, uri
from tests.helpers.tiny import tiny_run


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, server: FlakyProxy) -> Folder:
    return Folder(tmp_path / "run") if request.param == "local" else Folder(uri(server, tmp_path.name))


def test_folder_write_read_list_remove(folder: Folder) -> None:
    inner = folder / "a/b"
    assert inner.files() == []
    assert not inner.exists("x.bin")
    with pytest.raises(FileNotFoundError):
        inner.read("x.bin")
    inner.write("x.bin", b"one")
    inner.write("x.bin", b"two")
    inner.write(".hidden", b"")
    (inner / "deep").write("y", b"yy")
    assert inner.read("x.bin") == b"two"
    assert inner.sha256("x.bin") == hashlib.sha256(b"two").hexdigest()
    assert [(file.name, file.size) for file in inner.files()] == [("x.bin", 3)]
    assert inner.files()[0].modified > 1.7e9
    assert [name for name in folder.walk() if "hidden" not in name] == ["a/b/deep/y", "a/b/x.bin"]
    assert (folder.folders(), inner.folders(), (folder / "none").folders()) == (["a"], ["deep"], [])
    assert (inner / "deep").parent == inner
    inner.remove("x.bin")
    inner.remove("x.bin")
    assert not inner.exists("x.bin")
    folder.remove_all()
    folder.remove_all()
    assert folder.walk() == []


def test_folder_create_only_once(folder: Folder) -> None:
    assert folder.create("lock", b"a")
    assert not folder.create("lock", b"b")
    assert folder.read("lock") == b"a"
    assert [file.name for file in folder.files()] == ["lock"]


def test_folder_travels_and_names_itself(folder: Folder) -> None:
    again = pickle.loads(pickle.dumps(folder / "x"))
    again.write("y", b"1")
    assert (folder / "x").read("y") == b"1"
    assert again == folder / "x"
    assert again.name == "x"
    assert "/x/y" in again.where("y")


def test_folder_fetch_gives_a_local_file_and_checks_it(folder: Folder) -> None:
    folder.write("m.safetensors", b"weights")
    file = folder.fetch("m.safetensors", hashlib.sha256(b"weights").hexdigest())
    assert file.read_bytes() == b"weights"
    if folder.local is None:
        with pytest.raises(DataError, match="another SHA-256"):
            folder.fetch("m.safetensors", "0" * 64)


def test_folder_staged_files_arrive(folder: Folder) -> None:
    with (folder / "report").staged() as local:
        (local / "table.csv").write_text("1,2")
    assert (folder / "report").read("table.csv") == b"1,2"


def test_folder_that_cannot_be_written_says_so(server: FlakyProxy) -> None:
    folder = Folder(uri(server, "run").replace("bucket", "no-such-bucket"))
    with pytest.raises(ConfigError, match=r"cannot write to 's3://no-such-bucket/run.*NO_SUCH_BUCKET"):
        folder.check_writable()
    with pytest.raises(ConfigError, match="cannot write to '/proc/run'"):
        Folder("/proc/run").check_writable()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://key:secret@bucket/run", "no credentials"),
        ("ftp://x/y", "cannot open"),
        ("s3://b/x?password=1", "may be a key or a token"),
        ("s3://b/x?project_id=1", "unknown"),
    ],
)
def test_folder_uri_that_is_refused_says_why_and_shows_no_secret(where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        file_system(where)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", ["fail", "hang"])
def test_folder_outlasts_a_server_that_fails_or_hangs(server: FlakyProxy, tmp_path: Path, mode: str) -> None:
    folder = Folder(uri(server, tmp_path.name))
    folder.write("x", b"0")
    outage = threading.Thread(target=server.disturb, args=(mode, 4.0))
    outage.start()
    for number in range(5):
        folder.write("x", b"%d" % number)
        assert folder.read("x") == b"%d" % number
    outage.join()
    assert server.refused if mode == "fail" else server.swallowed


def test_run_on_s3_equals_a_run_on_the_disk_and_resumes(
    server: FlakyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = uri(server, "runs/one")
    disk = tiny_run(tmp_path / "disk", "compute.executor=local", "dataset.train.first=30", "dataset.test.first=20")
    run = RunDirectory(where, disk.config)
    for name in ("denoiser", "classifier", "estimator"):
        (run.folder / "models").write(f"{name}.safetensors", disk.model(name).read_bytes())
    run.finish("train_base", read={}, wrote=disk.manifest["steps"]["train_base"]["wrote"], facts={})
    for each in (disk, run):
        build_dataset.run(each)
    store = ShardStore(where, "dataset")
    assert store.read().equals(ShardStore(disk.folder, "dataset").read())
    assert store.files() == ["part-000000-000002.parquet"]
    assert audit(RunDirectory(where, None))[0] == []
    (run.folder / "dataset").remove("part-000000-000002.parquet")
    build_dataset.run(RunDirectory(where, None))
    assert store.read().equals(ShardStore(disk.folder, "dataset").read())
    certify.run(RunDirectory(where, None), "dual", "base")
    rows = ShardStore(where, "certificates/dual-base").read()
    assert rows.num_rows == 20
    assert pc.all(pc.equal(rows.column("status"), "ok")).as_py()


def test_round_and_corrupted_set_below_a_run_on_s3(server: FlakyProxy, tmp_path: Path) -> None:
    disk = tiny_run(tmp_path / "disk", "compute.executor=local", "dataset.test.first=3")
    run = RunDirectory(uri(server, "runs/rounds"), disk.config)
    wrote = dict(disk.manifest["steps"]["train_base"]["wrote"])
    wrote["classifier_finetuned"] = wrote["classifier"]
    for name in wrote:
        run.put_model(name, disk.model(name.removesuffix("_finetuned")).read_bytes())
    run.finish("finetune_classifier", read={}, wrote=wrote, facts={})
    second = begin_round(run, 2)
    assert second.model_hashes(["classifier"]) == {"classifier": wrote["classifier_finetuned"]}
    assert [each.folder for each in rounds_there(run)] == [run.folder, run.folder / "rounds/2"]
    certify.run(open_set(run, shifted_config(run.config, "contrast", 2, None), "write"), "dual")
    (corrupted,) = sets_there(RunDirectory(run.folder, None))
    assert corrupted.models == run.models
    assert ShardStore(corrupted.folder, "certificates/dual").read().num_rows == 3
