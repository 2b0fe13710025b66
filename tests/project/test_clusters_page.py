"""docs/clusters.md as printed, from upload to report: several Ray nodes, an S3 server, CIFAR-10 in miniature."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from distributed.checks.audit import audit
from distributed.files.storage import Folder
from distributed.files.stores import file_system
from distributed.store.progress import device_hours
from distributed.store.run_directory import RunDirectory
from tests.helpers import miniatures
from tests.helpers.documents import blocks
from tests.helpers.s3 import free_port, s3_server

ROOT = miniatures.ROOT
BIN = Path(sys.executable).parent
CODE = ("core", "distributed", "jobs", "configs", "deploy", "pyproject.toml", "constraints.txt", ".gitignore")
UNET = "schedule: cosine-4000, head_dim: 64"
"""What the shrunk U-Net does not say itself."""
OWN = """
from core.models.resnet_cifar import ResNetCifar


def network():
    return ResNetCifar(10)
"""
"""A file of the user's own, in the working directory."""


def printed() -> list[str]:
    """The commands of the section on AWS, in their order."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    section = page.partition("\n## AWS\n")[2].partition("\n## ")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".md") as file:
        file.write(section)
        file.flush()
        text = "\n".join(blocks(Path(file.name), "sh"))
    return re.sub(r"\\\n\s*", " ", text).strip().splitlines()


@contextmanager
def ray_nodes(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A head without CPUs and two workers, as `ray start` makes them; yields the dashboard's address."""
    port, dashboard = free_port(), free_port()
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=0"]
    head += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", "--dashboard-agent-listen-port=0"]
    worker = [f"--address=127.0.0.1:{port}", "--num-cpus=1", "--dashboard-agent-listen-port=0"]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "ray.log").open("ab"))
        for number, options in enumerate((head, worker, worker), 1):
            temp = tempfile.mkdtemp(prefix="ray-")  # each its own, as hosts have: a node unpacks the working directory
            stack.callback(shutil.rmtree, temp, ignore_errors=True)  # over what is there
            start = partial(
                subprocess.Popen,
                [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--temp-dir={temp}", *options],
                env=environment, cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip
            node = start()
            stack.callback(_end, node)
            deadline, there = time.monotonic() + 600, 0
            while there < number:
                assert time.monotonic() < deadline, (folder / "ray.log").read_text()
                if node.poll() is not None:  # Ray gives a node thirty seconds, which a busy machine may not have
                    assert number > 1, (folder / "ray.log").read_text()
                    node = start()
                    stack.callback(_end, node)
                status = [str(BIN / "ray"), "status", f"--address=127.0.0.1:{port}"]
                said = subprocess.run(status, env=environment, capture_output=True, text=True).stdout
                there = said.partition("Pending:")[0].count(" node_")
        yield f"http://127.0.0.1:{dashboard}"


def _end(node: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    node.terminate()
    try:
        node.wait(30)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()


class Desk:
    """The user's side: a checkout without data, and the printed commands with the addresses replaced."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        for name in CODE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        plain = (folder / "deploy/runtime_env.yaml").read_text()
        plain = re.sub(r"(?ms)^pip:.*?(?=^env_vars:)", "", plain)  # the nodes have our environment
        (folder / "deploy/runtime_env.yaml").write_text(plain)

    def run(self, command: str, *more: str) -> str:
        """Run a printed command; `more` is put behind it."""
        command = command.replace("BUCKET/PREFIX", "bucket/prefix").replace("device=cuda", "device=cpu")
        words = shlex.split(command.replace("max_replicas=16", "max_replicas=2"))
        words = [re.sub(r"^base.denoiser=(s3:.*)", rf"base.denoiser={{checkpoint: \1, {UNET}}}", w) for w in words]
        if words[0] == "aws":
            assert words[1:3] == ["s3", "cp"]
            self._copy(*[word for word in words[3:] if word != "--recursive"])
            return ""
        words[0] = str(BIN / words[0])
        result = subprocess.run(
            [*words, *more], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=3000
        )
        text = result.stdout + result.stderr
        print(f"$ {command}\n{text}", flush=True)
        assert result.returncode == 0, text
        return text

    def _copy(self, source: str, target: str) -> None:
        """`aws s3 cp`, which is not among what the tests need."""
        pairs = [file_system(name if "://" in name else str(self.folder / name)) for name in (source, target)]
        (here, start), (there, end) = pairs
        if here.get_file_info(start).type == pafs.FileType.Directory:
            there.create_dir(end)
        pafs.copy_files(start, end, here, there)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    with ExitStack() as stack:
        store = stack.enter_context(s3_server())
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_worker_register_timeout_seconds": "600",  # a busy machine
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "400",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "400",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{store.port}",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        nodes = tmp_path_factory.mktemp("nodes")
        environment["RAY_API_SERVER_ADDRESS"] = stack.enter_context(ray_nodes(nodes, environment))
        os.environ["AWS_ENDPOINT_URL_S3"] = environment["AWS_ENDPOINT_URL_S3"]
        yield Desk(folder, environment)
        del os.environ["AWS_ENDPOINT_URL_S3"]


def small(**keys: object) -> list[str]:
    """What makes the run small; its place and its paths stay as printed."""
    here = ("compute.executor", "compute.device", "compute.shard_examples")
    plain = [each for each in miniatures.overrides(**keys) if each.partition("=")[0] not in here]
    return [*plain, "compute.shard_examples=2", "compute.progress_interval_s=1"]


def finished(where: str) -> RunDirectory:
    """Whether a run on S3 is whole and right, and its report."""
    run = RunDirectory(where, None, "look")
    assert audit(run)[0] == []
    assert device_hours(run.folder) > 0
    return run


@pytest.mark.slow
def test_page_runs_as_printed_from_the_upload_to_the_report(desk: Desk) -> None:
    home = desk.folder
    (home / "data").mkdir()
    (home / "checkpoints").mkdir()
    miniatures.cifar10_pickles(home / "data" / "cifar-10-batches-py", labels=(3, 5))
    miniatures.openai_unet(home / "checkpoints" / "cifar10_uncond_50M_500K.pt")
    vit = miniatures.vit_folder(home / "checkpoints" / "vit-base-patch16-224-cifar10")
    shape = {f"base__classifier__{key}": vit[key] for key in ("arch", "input_size")}
    commands = printed()
    uploads = [c for c in commands if c.startswith("aws s3 cp --recursive ") and c.endswith(("data", "checkpoints"))]
    assert len(uploads) == 2
    for command in uploads:
        desk.run(command)
    for name in ("data", "checkpoints"):  # the nodes have them from the bucket alone
        shutil.rmtree(home / name)
        (home / name).mkdir()
    rest = commands[commands.index(uploads[-1]) + 1 :]

    (look,) = (command for command in rest if "--dry-run" in command)
    said = desk.run(look, *small(**shape))
    assert "measured on a CPU of" in said
    assert re.search(r"^total .* \d+\.\d\d$", said, re.MULTILINE), "no price"
    assert "not measured" not in said

    submits = [command for command in rest if "--no-wait" in command]
    assert len(submits) == 2
    desk.run(submits[0], *small(**shape))
    status = next(c for c in rest if "jobs.status" in c)
    deadline, seen = time.monotonic() + 900, ""
    while "dataset: " not in seen:  # at work on the labels
        assert time.monotonic() < deadline, seen
        time.sleep(1)
        if Folder("s3://bucket/prefix/run").exists("manifest.json"):
            seen = desk.run(status)
    assert "page: s3://bucket/prefix/run/status.html" in seen
    desk.run(next(c for c in rest if "status.html" in c and c.startswith("aws")))
    assert "a run in progress" in (home / "status.html").read_text()
    desk.run(next(c for c in rest if c.startswith("ray job stop")))
    desk.run(submits[1])
    desk.run("ray job logs --follow run-2")
    assert "succeeded" in desk.run("ray job status run-2")
    desk.run(next(c for c in rest if "run/report" in c))
    assert "Dual RS" in (home / "report" / "report.md").read_text()
    run = finished("s3://bucket/prefix/run")
    assert run.config.compute.max_device_hours == 100.0
    assert [*run.manifest["steps"]] == [
        "train_base", "build_dataset", "train_estimator", "finetune_classifier", "certify-standard", "certify-dual",
    ]  # fmt: skip


@pytest.mark.slow
def test_page_runs_with_a_network_of_the_working_directory(desk: Desk) -> None:
    """`module:function`, weights in the bucket, two workers of Ray, and everything else as above."""
    (desk.folder / "my_networks.py").write_text(OWN)
    miniatures.resnet_file(desk.folder / "mine.pt", favourite=3)
    desk.run("aws s3 cp mine.pt s3://BUCKET/PREFIX/checkpoints/mine.pt")
    (desk.folder / "mine.pt").unlink()
    (submit,) = (c for c in printed() if "--no-wait" in c and "--config" in c)
    submit = submit.replace("--no-wait", "").replace("run-1", "own-1").replace("PREFIX/run ", "PREFIX/own ")
    submit = re.sub(r"base\.\S+ ", "", submit)
    own = {"base__classifier": {"arch": "my_networks:network", "checkpoint": "s3://bucket/prefix/checkpoints/mine.pt"}}
    desk.run(submit, *small(base__denoiser="none", **own))
    run = finished("s3://bucket/prefix/own")
    assert any("my_networks:network" in str(value) for value in run.manifest.values())
