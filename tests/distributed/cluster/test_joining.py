"""Whether there is a cluster where RAY_ADDRESS says so, and what its workers are told."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from core.errors import ConfigError
from distributed.cluster.joining import check_cluster, joins, runtime_env
from tests.helpers.s3 import free_port

ROOT = Path(__file__).parents[3]


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Somebody who says this to whoever comes, or nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            held = []
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                held.append(client)
                if answer is not None:
                    client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", r"the address of the dashboard .* set RAY_ADDRESS to the head's HOST:6379"),
        ("https://u:HUSH@head/x", r"RAY_ADDRESS is 'https://\*\*\*@head/x', the address of the dashboard"),
        ("head", "expected HOST:PORT"),
        ("head:port", "expected HOST:PORT"),
        ("head:0", "expected HOST:PORT"),
    ],
)
def test_check_cluster_address_that_is_none_is_refused_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        check_cluster()
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("address", ["", "local"])
def test_check_cluster_without_one_has_nothing_to_say(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not joins()
    check_cluster()


@pytest.mark.parametrize(
    ("answer", "problem"), [(None, "no answer"), (b"HTTP/1.1 400 Bad Request\r\n", "something else is there")]
)
def test_check_cluster_somebody_who_is_no_head_is_refused_in_time(
    answer: bytes | None, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(answer) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        start = time.monotonic()
        with pytest.raises(ConfigError, match=rf"no Ray answers \({problem}\), tried for 2 s"):
            check_cluster(2.0)
        assert time.monotonic() - start < 5
        assert capsys.readouterr().out.startswith(f"no Ray answers at {address} ({problem}): trying for 2 s")


def test_job_with_a_dead_head_ends_before_anything_else_with_the_reason(tmp_path: Path) -> None:
    code = "import distributed.cluster.joining as j, sys; j.check_cluster.__defaults__ = (1.0,)\n"
    code += "from jobs.certify import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--method=dual", "--config=configs/digits.yaml", f"--out={tmp_path}"]
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "where no Ray answers (Connection refused), tried for 1 s" in result.stderr.splitlines()[1]
    assert "Traceback" not in result.stderr


def test_connected_joins_a_cluster_whose_workers_learn_the_endpoint() -> None:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    code = """
import os, ray
from core.config import ComputeConfig
from distributed.cluster.cluster import connected
with connected(ComputeConfig()):
    print(ray.get(ray.remote(lambda: os.environ.get("AWS_ENDPOINT_URL_S3")).remote()))
"""
    try:
        own = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "AWS_ENDPOINT_URL": "http://own:9000"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | own, cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        ray.shutdown()
    assert result.stdout.splitlines()[-1:] == ["http://own:9000"], result.stderr


def test_runtime_env_leaves_what_the_job_said_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://own:9000")
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"AWS_REGION": "there"}}}')
    found = runtime_env()
    assert found is not None
    assert found["env_vars"]["AWS_ENDPOINT_URL_S3"] == "http://own:9000"
    assert "AWS_REGION" not in found["env_vars"]
