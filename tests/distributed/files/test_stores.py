"""Which server an address means: the one that the environment names, for drivers and replicas alike."""

import io
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest

from core.errors import ConfigError, DataError
from distributed.files import storage, stores
from distributed.files.datasets import open_storage
from distributed.files.storage import Folder
from distributed.files.stores import endpoint, store_environment
from tests.helpers.s3 import FlakyProxy, free_port

VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST",
)  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setattr(Folder, "_answered", set())


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_folder_goes_to_the_endpoint_of_the_environment(
    variable: str, server: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{server.port}")
    Folder(f"s3://bucket/{variable}").write("x", b"here")
    named = Folder(f"s3://bucket/{variable}?endpoint_override=127.0.0.1:{server.port}&scheme=http")
    assert named.read("x") == b"here"
    assert open_storage(f"s3://bucket/{variable}").read("x") == b"here"


CONFIG = """
[default]
endpoint_url = http://default:1
[profile own]
endpoint_url = http://own:2
[profile both]
endpoint_url = http://both:3
services = mine
[services mine]
ec2 =
  endpoint_url = http://ec2:4
s3 =
  endpoint_url = https://mine:5
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http://default:1"),
        ({"AWS_PROFILE": "own"}, "http://own:2"),
        ({"AWS_DEFAULT_PROFILE": "own"}, "http://own:2"),
        ({"AWS_PROFILE": "both"}, "https://mine:5"),
        ({"AWS_PROFILE": "none"}, ""),
        ({"AWS_PROFILE": "own", "AWS_ENDPOINT_URL": "http://all:6"}, "http://all:6"),
        ({"AWS_ENDPOINT_URL": "http://all:6", "AWS_ENDPOINT_URL_S3": "http://s3:7"}, "http://s3:7"),
        ({"AWS_ENDPOINT_URL": "http://all:6", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, ""),
    ],
)
def test_endpoint_is_found_in_the_order_of_botocore(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(CONFIG)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = endpoint("s3://bucket/run")
    assert f"{found['scheme']}://{found['endpoint_override']}" == expected if expected else found == {}
    assert store_environment().get("AWS_ENDPOINT_URL_S3", "") == expected
    assert endpoint("s3://bucket/run?endpoint_override=host:1") == {}
    assert endpoint("gs://bucket/run") == {}


@pytest.mark.parametrize(
    "text", ["host:9000", "ftp://host", "http://host:x", "http://host/path", "http://", "http://h?x"]
)
def test_endpoint_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", text)
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL is .*expected http://host:port"):
        stores.file_system("s3://bucket/run")


def test_store_environment_names_places_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_REGION", "x"), ("AWS_PROFILE", "p"), ("AWS_SECRET_ACCESS_KEY", "s"), ("HF_TOKEN", "t")):
        monkeypatch.setenv(name, value)
    assert store_environment().items() >= {("AWS_REGION", "x"), ("AWS_PROFILE", "p")}
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & store_environment().keys()


def test_folder_of_a_dead_endpoint_fails_after_the_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_S", 1.0)
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"cannot reach 's3://bucket/run' at http://127.0.0.1:{port}, tried for"):
        Folder("s3://bucket/run").read("x")
    assert time.monotonic() - start < 15


def test_folder_that_has_answered_is_waited_for_also_where_it_travels(
    server: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_S", 0.0)
    folder = Folder(f"s3://bucket/patience?endpoint_override=127.0.0.1:{server.port}&scheme=http")
    with pytest.raises(FileNotFoundError):
        folder.read("x")
    travelled = pickle.dumps(folder)
    monkeypatch.setattr(Folder, "_answered", set())
    outage = threading.Thread(target=server.disturb, args=("fail", 5.0))
    outage.start()
    pickle.loads(travelled).write("x", b"1")
    outage.join()
    assert server.refused


@contextmanager
def recording() -> Iterator[tuple[str, list[str]]]:
    """A server that has nothing: its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("variable", "prefix"), [("STORAGE_EMULATOR_HOST", ""), ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://")]
)
def test_folder_of_google_goes_to_the_emulator(variable: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording() as (address, asked):
        monkeypatch.setenv(variable, prefix + address)
        assert not Folder("gs://bucket/run").exists("x")
    assert any("/b/bucket/o" in path for path in asked)


class Broken(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system whose library has errors of its own."""

    protocol = "broken"

    def info(self, path: str, **_: object) -> dict[str, object]:
        if path.endswith("gone"):
            raise LookupError("no network\nand more")
        return {"name": path, "size": 4, "type": "file"}

    def _open(self, path: str, *_: object, **__: object) -> io.BytesIO:
        class File(io.BytesIO):
            def read(self, *_: object) -> bytes:
                raise LookupError("connection lost")

        return File(b"four")


def test_file_system_of_fsspec_fails_with_one_line_whatever_it_raises() -> None:
    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(DataError, match=r"cannot reach 'fsspec\+broken://gone': LookupError: no network; check"):
        open_storage("fsspec+broken://gone")
    with pytest.raises(OSError, match="LookupError: connection lost"):
        open_storage("fsspec+broken://file").read("")
    with pytest.raises(DataError, match=r"cannot reach 'hf://name': ValueError: .*'name'"):
        open_storage("hf://name")
