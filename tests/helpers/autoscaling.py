"""A Ray cluster whose nodes come and go by demand, on this machine: Ray's fake multi-node provider.

Not `ray.cluster_utils.AutoscalingCluster`, which runs `ray stop --force` and so ends every Ray of the machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

__all__ = ["autoscaling_cluster", "workers_alive"]

LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)
WATCH = """
import sys, time
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while True:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    print(sum("node:__internal_head__" not in node["Resources"] for node in nodes), flush=True)
    time.sleep(1.0)
"""


@contextmanager
def autoscaling_cluster(
    autoscaler: Literal["v1", "v2"], max_workers: int, idle_s: float, log: Path, gpus: int = 0
) -> Iterator[str]:
    """A head without CPUs, and nodes of one CPU each that Ray's autoscaler starts and ends.

    Args:
        autoscaler: which of Ray's two.
        max_workers: nodes at most; there are none in the beginning.
        idle_s: seconds without work after which a node goes.
        log: for the autoscaler's output.
        gpus: that each node says it has.

    Yields:
        The address of the cluster.
    """
    # Not under pytest's folder: the paths of Ray's sockets would be too long.
    folder = Path(tempfile.mkdtemp(prefix="fake-nodes-", dir="/tmp"))
    address = f"127.0.0.1:{_free_port()}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_config(autoscaler, address, max_workers, idle_s, gpus)))
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment["RAY_AUTH_MODE"] = "disabled"
    environment.pop("RAY_ADDRESS", None)
    if autoscaler == "v2":
        environment |= {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=0",
        "--node-ip-address=127.0.0.1",
        f"--port={address.rpartition(':')[2]}",
        f"--autoscaling-config={config}",
        f"--temp-dir={folder}",
        "--include-dashboard=false",
        f"--ray-client-server-port={_free_port()}",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]
    with (folder / "head.log").open("wb") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(head, address, folder / "head.log")
        yield address
    finally:
        _end(head, folder)
        with log.open("wb") as output:
            for part in (folder / "head.log", *sorted(folder.glob("session_2*/logs/monitor.*"))):
                output.write(f"--- {part.name}\n".encode() + part.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def workers_alive(address: str, limit_s: float) -> Iterator[Iterator[int]]:
    """Nodes beside the head that are alive, every second, as a process of its own sees them.

    Raises:
        AssertionError: in the iteration, when the process has ended or the time is up.
    """
    command = [sys.executable, "-c", WATCH, address]
    deadline = time.monotonic() + limit_s
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def samples() -> Iterator[int]:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdigit():  # and not what Ray says of a node that has gone
                    yield int(line)
                assert time.monotonic() < deadline, f"not done after {limit_s:.0f} s"
            raise AssertionError("the process that watches the nodes has ended")

        try:
            yield samples()
        finally:
            process.kill()


def _config(
    autoscaler: Literal["v1", "v2"], address: str, max_workers: int, idle_s: float, gpus: int
) -> dict[str, Any]:
    provider: dict[str, Any] = {
        "gcs_address": address,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    if autoscaler == "v1":
        provider["type"] = "fake_multinode"
    else:
        provider |= {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        }
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "GPU": gpus},
            "node_config": {},
            "min_workers": 0,
            "max_workers": max_workers,
        },
    }
    return {
        "cluster_name": "autoscaling",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60.0,
        "docker": {},
        "provider": provider,
        "auth": {},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in LISTS},
    }


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait_until_up(head: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no head at {address} after 300 s:\n{log.read_text()}"
        time.sleep(0.2)


def _end(head: "subprocess.Popen[bytes]", folder: Path) -> None:
    """End the head and all that it has started; the nodes are children of its autoscaler.

    Not by SIGTERM: the head would wait 30 s for its nodes to become empty. A head that has died leaves its nodes
    behind; the folder, which is this cluster's alone, is on their command lines.
    """
    frozen: set[psutil.Process] = set()
    while new := _started(head, folder) - frozen:
        for process in new:  # so that none starts another one meanwhile
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        frozen |= new
    for process in frozen:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    psutil.wait_procs(frozen, timeout=30)


def _started(head: "subprocess.Popen[bytes]", folder: Path) -> set[psutil.Process]:
    roots = [psutil.Process(head.pid)] if head.poll() is None else []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in argument for argument in process.info["cmdline"] or ()):
            roots.append(process)
    found = set(roots)
    for process in roots:
        with suppress(psutil.NoSuchProcess):
            found |= set(process.children(recursive=True))
    return found
