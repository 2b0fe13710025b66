"""Fetching published files: from an HTTP server that breaks off, from a hub, and nowhere."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.config import load_config
from core.models import hub
from jobs import fetch
from jobs.fetch import PUBLISHED, Published
from tests.helpers.tiny import run_main

ROOT = Path(__file__).parents[2]
WEIGHTS = bytes(range(256)) * 4000


def archive(name: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        info = tarfile.TarInfo(name)
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    return content.getvalue()


FILES = {"/w.pt": WEIGHTS, "/c.tar.gz": archive("cifar-10-batches-py/data_batch_1"), "/evil.tar.gz": archive("../evil")}


class Server(ThreadingHTTPServer):
    """Breaks off after `at_once` bytes of an answer; keeps the ranges that were asked for."""

    at_once = 10**9
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        content = FILES[self.path][start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.at_once])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    with Server(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def publish(monkeypatch: pytest.MonkeyPatch, server: Server, **files: str) -> None:
    """Files of this server under the names of published ones, with their hashes."""
    monkeypatch.setattr(fetch, "PUBLISHED", {
        name: Published(
            url=f"http://127.0.0.1:{server.server_address[1]}{path}",
            size=len(FILES[path]),
            sha256=hashlib.sha256(FILES[path]).hexdigest(),
        )
        for name, path in files.items()
    })  # fmt: skip


CONFIG = [str(ROOT / "configs/cifar10.yaml")]
NAMED = ["base.denoiser=checkpoints/w.pt", "base.classifier={train: {}}"]


def test_fetch_goes_on_where_it_broke_off_and_compares_the_hash(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, server, **{"w.pt": "/w.pt", "cifar-10-batches-py": "/c.tar.gz"})
    server.at_once = 600_000
    assert run_main(fetch, *CONFIG, *NAMED) == 3
    out = capsys.readouterr().out
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert f"/w.pt, {len(WEIGHTS):,} bytes, SHA-256 {digest}, to checkpoints/w.pt" in out
    assert not (tmp_path / "checkpoints/w.pt").exists()
    assert (tmp_path / "data/cifar-10-batches-py/data_batch_1").read_bytes() == b"abc"
    assert run_main(fetch, *CONFIG, *NAMED) == 0
    assert (tmp_path / "checkpoints/w.pt").read_bytes() == WEIGHTS
    assert server.asked == [None, None, "bytes=600000-"]
    assert run_main(fetch, *CONFIG, *NAMED) == 0
    assert len(server.asked) == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["w.pt"]


def test_fetch_keeps_nothing_of_another_file(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, server, **{"w.pt": "/w.pt", "cifar-10-batches-py": "/evil.tar.gz"})
    other = fetch.PUBLISHED["w.pt"]._replace(sha256="0" * 64)
    monkeypatch.setitem(fetch.PUBLISHED, "w.pt", other)
    assert run_main(fetch, *CONFIG, *NAMED) == 3
    assert f"expected {'0' * 64}" in capsys.readouterr().out
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_fetch_from_the_hub_and_what_nobody_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).write_text(name)
    monkeypatch.setattr(hub, "from_hub", lambda name: tmp_path / "snapshot")
    (tmp_path / "data").mkdir()
    keys = ["dataset.path=data", "base.denoiser=s3://bucket/x.pt"]
    assert run_main(fetch, *CONFIG, *keys) == 0
    folder = tmp_path / "checkpoints/vit-base-patch16-224-cifar10"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert run_main(fetch, str(ROOT / "configs/cifar10_experts.yaml"), *keys) == 3
    assert "checkpoints/expert-1.0 is missing (nothing is published under this name" in capsys.readouterr().out


def test_shipped_configurations_ask_for_published_files_or_say_that_they_are_ones_own() -> None:
    from distributed.checks.steps import steps_of
    from distributed.cluster.upload import named_files

    asked: set[str] = set()
    text = "".join(path.read_text() for path in (ROOT / "configs").glob("*.yaml"))
    for path in (ROOT / "configs").glob("*.yaml"):
        config = load_config(path)
        for file in named_files(config, steps_of(config)).values():
            if not Path(file).exists():
                asked.add(Path(file).name)
                known = PUBLISHED.get(Path(file).name, Published())
                assert (known.url or known.hub) in text
                assert (known.sha256 or "") in text
    assert asked >= set(PUBLISHED)
