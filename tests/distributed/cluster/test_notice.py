"""A machine that learns of its end drains its node; elsewhere nothing is asked."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from distributed.cluster import notice
from distributed.cluster.notice import Notice
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from tests.helpers.tiny import tiny_run

AWS_PATH = "/latest/meta-data/spot/instance-action"
GOOGLE_PATH = "/computeMetadata/v1/instance/preempted"


class Metadata(ThreadingHTTPServer):
    """Plays the metadata service of a cloud: IMDSv2 (no answer without its token), and that of Google."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ends_in_s: float | None = None
        self.broken = False
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(500 if self.server.broken else status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        self.server.asked.append(self.path)
        seconds = int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
        self._answer(200 if 0 < seconds <= 21600 else 400, "secret")

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        left_s = self.server.ends_in_s
        if self.path == AWS_PATH and self.headers["X-aws-ec2-metadata-token"] == "secret":
            end = datetime.now(UTC) + timedelta(seconds=left_s or 0)
            self._answer(404 if left_s is None else 200, json.dumps({"action": "terminate", "time": f"{end:%FT%TZ}"}))
        elif self.path == GOOGLE_PATH and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "FALSE" if left_s is None else "TRUE")
        else:
            self._answer(401)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def metadata() -> Iterator[tuple[Metadata, str]]:
    """The service, and its HOST:PORT."""
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Nodes that were drained, and with how many seconds left."""
    found: list[tuple[str, float]] = []
    monkeypatch.setattr(notice, "_drain", lambda *told: found.append(told))
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(notice, "FIRMWARE", Path("/nowhere"))
    return found


@pytest.mark.parametrize(
    ("variable", "scheme", "path", "least_s", "most_s"),
    [
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://", AWS_PATH, 115, 120),
        ("GCE_METADATA_HOST", "", GOOGLE_PATH, 30, 30),
    ],
)
def test_notice_drains_the_node_once_with_the_seconds_that_are_left(
    variable: str,
    scheme: str,
    path: str,
    least_s: float,
    most_s: float,
    drained: list[tuple[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with metadata() as (server, at):
        monkeypatch.setenv(variable, scheme + at)
        watch = Notice("node")
        watch.look()
        watch.look()
        assert drained == []
        server.ends_in_s = 120.0
        watch.look()
        watch.look()
        ((node, left_s),) = drained
        assert node == "node"
        assert least_s <= left_s <= most_s
        assert server.asked.count(path) == 3
        assert server.asked.count("/latest/api/token") == (path == AWS_PATH)


def test_notice_service_that_fails_is_given_up_with_one_warning(
    drained: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with metadata() as (server, at):
        monkeypatch.setenv("GCE_METADATA_HOST", at)
        server.broken = True
        watch = Notice("node")
        for _ in range(6):
            watch.look()
        assert len(server.asked) == 3
    assert drained == []
    (record,) = caplog.records
    assert "no spot notices will be heard of on this node" in record.message


@pytest.mark.parametrize(
    ("name", "said", "asks"),
    [
        ("sys_vendor", "Amazon EC2", "_aws"),
        ("product_name", "Google Compute Engine", "_google"),
        ("sys_vendor", "Dell Inc.", None),
        (None, "", None),
    ],
)
def test_notice_asks_only_where_the_firmware_names_a_cloud(
    name: str | None,
    said: str,
    asks: str | None,
    drained: list[tuple[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notice, "FIRMWARE", tmp_path)
    if name is not None:
        (tmp_path / name).write_text(f"{said}\n")
    asked: list[str] = []
    for service in ("_aws", "_google"):
        monkeypatch.setattr(Notice, service, lambda self, service=service: asked.append(service))
    Notice("node").look()
    assert asked == [asks] * (asks is not None)


@pytest.mark.slow
def test_build_dataset_node_with_a_notice_takes_no_more_shards_and_loses_none(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "compute.shard_examples=4")
    store, log = ShardStore(run.path, "dataset"), tmp_path / "log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    command = [sys.executable, "-m", "tests.helpers.replicas", "Slow", "--out", str(run.path)]
    command += ["compute.min_replicas=2", "compute.max_replicas=2"]

    def begun() -> set[tuple[str, str]]:
        return {(file.parent.name, file.name) for file in (run.path / "attempts/dataset").glob("*/*")}

    with metadata() as (server, at), log.open("wb") as output:
        spot = cluster.add_node(num_cpus=1, env_vars={"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{at}"})
        cluster.add_node(num_cpus=1)
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONUNBUFFERED": "1"}
        job = subprocess.Popen(
            command, cwd=Path(__file__).parents[3], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _until(lambda: len(store.committed()) >= 2 and len({name for _, name in begun()}) == 2, log)
            server.ends_in_s = 120.0
            _until(lambda: "its replicas take no more shards" in log.read_text(), log)
            time.sleep(15.0)  # what it had is done by now: three shards of three seconds, two at a time
            before = begun()
            _until(lambda: len(begun() - before) >= 3 or job.poll() is not None, log)
            assert len({name for _, name in begun() - before}) == 1
            cluster.remove_node(spot, allow_graceful=False)  # and it is gone
            assert job.wait(timeout=200) == 0, log.read_text()
        finally:
            job.kill()
            job.wait()
            cluster.shutdown()
            print(log.read_text())
    assert len(store.read()) == 97 * 2
    assert RunDirectory(run.path, None).manifest["steps"]["build_dataset"]["retries"] == 0


def _until(holds: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
