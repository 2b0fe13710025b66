"""deploy/slurm.sh with `srun`, `ray` and `scontrol` that only write down what they are asked."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
case "$*" in
*"ray start"*)
    trap 'echo "step got TERM" >>"$LOG"; exit 0' TERM
    [[ -n ${RAY_AUTH_TOKEN:-} && $RAY_AUTH_MODE == token ]] && echo "token in the environment" >>"$LOG"
    while true; do sleep 0.05; done ;;
*"python -c"* | *health-check* | *"driver "*) # in a container, on the first node
    while [[ $1 == --* ]]; do shift; done
    exec "$@" ;;
esac
"""
APPTAINER = """#!/usr/bin/env bash
echo "apptainer $*" >>"$LOG"
shift 7
exec "$@"
"""
RECORDER = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
DRIVER = """#!/usr/bin/env bash
until [[ $(grep -c "token in the environment" "$LOG") == 2 ]]; do sleep 0.02; done
echo "driver at $RAY_ADDRESS: $*" >>"$LOG"
[[ $1 == exit ]] && exit "$2"
trap 'echo "driver got TERM" >>"$LOG"; sleep 0.2; echo "driver committed" >>"$LOG"; exit 130' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The log of the shims, and an environment as sbatch gives it to the script."""
    shims = {"srun": SRUN, "ray": RECORDER, "scontrol": RECORDER, "driver": DRIVER, "apptainer": APPTAINER}
    for name, script in shims.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "DUALRS_POLL_S": "0.05",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "4",
    }
    return log, environment


def start_slurm(environment: dict[str, str], *command: str) -> subprocess.Popen[str]:
    script = ["bash", str(ROOT / "deploy/slurm.sh"), *command]
    return subprocess.Popen(script, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(log: Path, line: str) -> None:
    deadline = time.monotonic() + 10
    while line not in log.read_text():
        assert time.monotonic() < deadline, f"no {line!r} in:\n{log.read_text()}"
        time.sleep(0.02)


def test_slurm_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "deploy/slurm.sh")], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(ROOT / "deploy/slurm.sh")], check=True)


def test_slurm_starts_head_and_workers_and_ends_only_its_steps(slurm: tuple[Path, dict[str, str]]) -> None:
    log, environment = slurm
    job = start_slurm(environment, "driver", "exit", "0")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 0, output
    lines = log.read_text().splitlines()
    starts = [line for line in lines if line.startswith("srun") and "ray start" in line]  # both at once
    head, workers = sorted(starts, key=lambda line: "--head" not in line)
    assert "--nodes=1 " in head
    for flag in ("--head", "--block", "--dashboard-host=127.0.0.1", "--temp-dir=/tmp/dual-rs-4711"):
        assert flag in head
    assert "--nodes=2 " in workers
    assert "--head" not in workers
    address = re.search(r"--address=(\S+)", workers)
    assert address is not None
    assert any(line.startswith(f"driver at {address[1]}: exit 0") for line in lines)
    assert f"--port={address[1].rpartition(':')[2]}" in head
    assert lines.count("token in the environment") == 2
    assert lines.count("step got TERM") == 2
    assert not re.search(r"[0-9a-f]{32}", "\n".join(lines)), "the token is on a command line"
    assert not any("ray stop" in line or line.startswith("scontrol") for line in lines)
    assert lines[-1].endswith("rm -rf -- /tmp/dual-rs-4711")


@pytest.mark.parametrize("image", ["/shared/dual-rs.sif", "registry/dual-rs:0.1.0"])
def test_slurm_in_a_container_runs_ray_and_the_driver_inside(slurm: tuple[Path, dict[str, str]], image: str) -> None:
    log, environment = slurm
    environment |= {"DUALRS_IMAGE": image, "DUALRS_MOUNTS": "/shared"}
    job = start_slurm(environment, "driver", "exit", "0")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 0, output
    here, lines = environment["SLURM_SUBMIT_DIR"], log.read_text().splitlines()
    option = f"--bind {here},/tmp,/shared --pwd {here} {image}"
    if not image.endswith(".sif"):
        option = f"--container-image={image} --container-mounts={here}:{here},/tmp:/tmp,/shared:/shared"
    inside = [line for line in lines if option in line]
    for what in ("ray start --head", "ray start --block", "ray health-check", "python -c", "driver exit 0"):
        assert any(what in line for line in inside), what
    assert any(line.endswith(": exit 0") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_signal_stops_the_driver_cleanly_and_requeues(
    slurm: tuple[Path, dict[str, str]], number: signal.Signals
) -> None:
    log, environment = slurm
    job = start_slurm(environment, "driver", "run")
    wait_for(log, "driver at")
    job.send_signal(number)
    output, _ = job.communicate(timeout=20)
    lines = log.read_text().splitlines()
    assert job.returncode == 130, output
    order = [lines.index(line) for line in ("driver got TERM", "driver committed", "step got TERM")]
    assert order == sorted(order)
    assert lines[-1] == "scontrol requeue 4711"


def test_slurm_failing_driver_is_not_queued_again(slurm: tuple[Path, dict[str, str]]) -> None:
    log, environment = slurm
    job = start_slurm(environment, "driver", "exit", "3")
    job.communicate(timeout=20)
    assert job.returncode == 3
    assert "scontrol" not in log.read_text()
    assert "step got TERM" in log.read_text()


def test_slurm_without_a_command_says_how(slurm: tuple[Path, dict[str, str]]) -> None:
    job = start_slurm(slurm[1])
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 2
    assert "usage: sbatch" in output
