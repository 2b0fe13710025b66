"""Publishing a run: what is in the folder and what is not, what is refused, and the calls that a hub receives."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow.parquet as pq
import pytest
import yaml

from core.errors import DataError
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.publication import public
from jobs import publish
from tests.helpers.runs import finished_run
from tests.helpers.tiny import run_main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    found = finished_run(tmp_path_factory.mktemp("home-of-me") / "run", "dataset.test_size=12")
    found.check_source("base.classifier.checkpoint", str(found.path.parent / "my weights.pt"), "0" * 64)
    return found


def test_public_cuts_paths_and_addresses_and_nothing_else() -> None:
    kept = [
        "google/ddpm-cifar10-32",
        "beit.in22k/ft",
        "module:function",
        "2026-11-27T00:29:37Z",
        "n/a, 1/2",
        "",
        0.25,
        None,
    ]
    assert public(kept) == kept
    named = {"path": "/home/me/my data/cifar", "a": ["s3://bucket/run?endpoint_override=x"], "b": "~/x/y.pt"}
    assert public(named) == {"path": ".../cifar", "a": [".../run"], "b": ".../y.pt"}
    assert public("2 files of /data/me/x.txt, '../me/y' left out") == "2 files of .../x.txt, '.../y' left out"
    assert public(r"C:\Users\me\x.pt") == ".../x.pt"


def test_publish_writes_the_card_the_rows_and_the_report_without_local_paths_or_images(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    assert run_main(publish, "--out", str(run.path), "--to", str(target)) == 0
    assert f"published: {target}/README.md" in capsys.readouterr().out
    _, header, card = (target / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(header)
    assert [each["config_name"] for each in about["configs"]] == ["standard", "dual"]
    for each in about["configs"]:
        files = sorted(target.glob(each["data_files"][0]["path"]))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        store = ShardStore(run.folder, f"certificates/{each['config_name']}")
        assert sorted(map(str, rows)) == sorted(map(str, store.read().to_pylist()))
    assert "Audited: all 36 rows follow from their votes" in card
    assert json.loads((target / "manifest.json").read_text())["sources"] == {
        "base.classifier.checkpoint": {"named": ".../my weights.pt", "sha256": "0" * 64}
    }
    files = [file for file in target.rglob("*") if file.is_file()]
    assert {"report.html", "examples.html", "table.csv", "certified_accuracy.png"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".parquet":
            content = str((pq.read_metadata(file).metadata, pq.read_table(file).to_pylist())).encode()
        assert b"home-of-me" not in content, file
    assert "data:image" not in (target / "report" / "examples.html").read_text()
    assert {path.name for path in target.iterdir()} == {"README.md", "manifest.json", "certificates", "report"}

    assert run_main(publish, "--out", str(run.path), "--to", str(target)) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_publish_refuses_what_is_unfinished_or_fails_its_audit_unless_told(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(publish, "write", lambda directory, target, said: written.append(said))
    command = ("--out", str(run.path), "--to", str(tmp_path / "new"))
    store = ShardStore(run.folder, "certificates/dual")
    name = store.files()[0]
    shard = store.folder.read(name)
    store.folder.remove(name)
    assert run_main(publish, *command) == 3
    assert "error: not published: the audit found certificates/dual" in capsys.readouterr().err
    assert run_main(publish, *command, "--anyway") == 0
    store.folder.write(name, shard)
    steps = run.manifest["steps"]
    step = steps.pop("certify-dual")
    (run.path / "manifest.json").write_text(json.dumps(run.manifest))
    try:
        assert run_main(publish, *command) == 3
        assert "error: not published: certificates/dual is not finished (" in capsys.readouterr().err
        assert run_main(publish, *command, "--anyway") == 0
    finally:
        steps["certify-dual"] = step
        (run.path / "manifest.json").write_text(json.dumps(run.manifest))
    assert [said.partition(": ")[0] for said in written] == ["NOT TO BE RELIED ON. Published although"] * 2
    assert "certificates/dual is not finished" in written[1]


# The hub


class Hub(ThreadingHTTPServer):
    """A hub with one data set: its files, and what was asked of it."""

    files: dict[str, bytes]
    asked: list[str]
    forbids = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        named = sorted(self.server.files)
        if "/tree/" in self.path:
            self._answer([{"type": "file", "path": path, "oid": "0", "size": 1} for path in named])
        else:
            self._answer({"id": "me/certificates", "sha": "0", "siblings": [{"rfilename": path} for path in named]})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path} {self.headers['Authorization']}")
        if self.server.forbids:
            self._answer({"error": "no right to it"}, 403)
        elif self.path == "/api/repos/create":
            self.server.asked.append(json.dumps(json.loads(content), sort_keys=True))
            self._answer({"url": self._where})
        elif "/preupload/" in self.path:
            named = [each["path"] for each in json.loads(content)["files"]]
            self._answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self._answer({"commitUrl": f"{self._where}/commit/0", "commitOid": "0"})
        else:
            self._answer({"errors": [], "warnings": []})

    @property
    def _where(self) -> str:
        return f"http://{self.headers['Host']}/datasets/me/certificates"

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as found:
        found.files, found.asked = {"certificates/dual/shard-000000.parquet": b"old", "LICENSE": b"mine"}, []
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{found.server_address[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        cache = str(tmp_path / "cache.json")  # of what the client asks beside all this; not the machine's own
        monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", cache, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_token_of_mine")
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_push_replaces_the_rows_of_an_earlier_publication_and_no_other_file(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    files = {"README.md": b"---\npretty_name: x\n---\n", "certificates/dual/part-000000-000001.parquet": b"new"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert publish.push(folder, "me/certificates", private=True).endswith("/datasets/me/certificates")
    assert hub.files == files | {"LICENSE": b"mine"}
    asked = [text for text in hub.asked if not text.startswith("GET")]
    assert asked[0] == "POST /api/repos/create Bearer hf_token_of_mine"
    made = json.loads(asked[1])
    assert (made["name"], made["organization"], made["type"]) == ("certificates", "me", "dataset")
    assert made.get("private") or made.get("visibility") == "private"
    hub.forbids = True
    with pytest.raises(DataError, match=r"the hub refused 'me/certificates': .*403") as refused:
        publish.push(folder, "me/certificates", private=True)
    assert "\n" not in str(refused.value)
    assert "hf_token_of_mine" not in str(refused.value)


def test_publish_to_a_hub_without_a_token_or_an_owner_says_so_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run_main(publish, "--out", str(tmp_path / "none"), "--repo", "me/certificates") == 2
    assert "error: --repo: there is no token of Hugging Face: set HF_TOKEN" in capsys.readouterr().err
    assert run_main(publish, "--out", str(tmp_path / "none"), "--repo", "certificates") == 2
    assert "error: --repo: expected OWNER/NAME, got 'certificates'" in capsys.readouterr().err
