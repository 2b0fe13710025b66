"""How many replicas, and where, from what a cluster says it has."""

import pytest
import ray
import torch

from core.config import ComputeConfig, parse_config
from core.errors import ConfigError
from distributed.cluster import cluster
from distributed.cluster.cluster import Pool, check_gpus, placed, replica_pool, replicas_here, train_device


def pool(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], *overrides: str) -> Pool:
    """The pool on nodes with these resources."""
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    compute = [f"compute.{override}" for override in overrides]
    return replica_pool(parse_config({"sigmas": [0.5], "report": {"radii": [0]}}, compute).compute)


def test_pool_takes_a_replica_per_gpu_and_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool(monkeypatch, [{"CPU": 0}, {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}])
    assert found == Pool("cuda", smallest=6, initial=6, largest=6, num_cpus=0.0, num_gpus=1.0)


@pytest.mark.parametrize(("share", "room"), [("0.5", 12), ("0.34", 12), ("0.7", 6), ("1", 6), ("2", 3)])
def test_pool_fractional_replicas_do_not_straddle_gpus(monkeypatch: pytest.MonkeyPatch, share: str, room: int) -> None:
    assert pool(monkeypatch, [{"GPU": 4}, {"GPU": 2}], f"gpus_per_replica={share}").largest == room


def test_pool_on_cpus_counts_threads_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool(monkeypatch, [{"CPU": 3}, {"CPU": 3}], "threads_per_replica=2")
    assert (found.device, found.largest, found.num_cpus) == ("cpu", 2, 2.0)


def test_pool_grows_from_what_is_there_to_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool(monkeypatch, [{"CPU": 0}, {"GPU": 2}], "device=cuda", "min_replicas=1", "max_replicas=16")
    assert (found.smallest, found.initial, found.largest) == (1, 2, 16)
    found = pool(monkeypatch, [{"CPU": 0}], "device=cuda", "max_replicas=16")
    assert (found.smallest, found.initial, found.largest) == (1, 1, 16)
    assert found.describe() == "1 to 16 replicas of 1 GPU each (1 to begin with)"


@pytest.mark.parametrize(
    ("nodes", "overrides", "message"),
    [
        ([{"CPU": 0}], [], "has room for no replica now"),
        ([{"CPU": 8}], ["device=cuda"], r"has room for no replica now \(0 GPUs, 8 CPUs; one takes 1 GPU\)"),
        ([{"CPU": 2}], ["max_replicas=16"], "waits for it to grow; say with what: compute.device=cuda or compute"),
    ],
)
def test_pool_that_cannot_know_what_to_wait_for_refuses(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pool(monkeypatch, nodes, *overrides)


def test_training_on_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_device(ComputeConfig()) == "cpu"
    with pytest.raises(ConfigError, match=r"compute.train_device is 'cuda', but this machine has no GPU"):
        train_device(ComputeConfig(train_device="cuda"))


@pytest.mark.parametrize(
    ("gpus", "overrides", "refused"),
    [
        (0, [], True),
        (0, ["max_replicas=16"], True),
        (0, ["executor=local"], True),
        (0, ["max_replicas=16", "min_replicas=4"], True),
        (2, ["max_replicas=16", "min_replicas=4"], True),
        (2, ["max_replicas=16"], False),
        (2, ["max_replicas=16", "min_replicas=4", "gpus_per_replica=0.5"], False),
        (1, ["gpus_per_replica=2"], True),
        (1, ["executor=local", "max_replicas=4", "min_replicas=4"], False),
    ],
)
def test_gpus_that_this_machine_does_not_have_are_refused_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, gpus: int, overrides: list[str], refused: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    plain = {"sigmas": [0.5], "report": {"radii": [0]}}
    compute = parse_config(plain, [f"compute.{each}" for each in ("device=cuda", *overrides)]).compute
    if not refused:
        check_gpus(compute)
        return
    with pytest.raises(ConfigError, match=r"compute.device is 'cuda', but this machine has .*set compute.device=cpu"):
        check_gpus(compute)
    if compute.executor == "ray":
        monkeypatch.setattr(cluster, "_started_here", True)
        nodes = [{"CPU": 8.0, "GPU": float(gpus)}]
        with pytest.raises(ConfigError, match=r"has room for no replica now|a Ray of its own does not grow"):
            pool(monkeypatch, nodes, "device=cuda", *overrides)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    if compute.executor == "ray":
        check_gpus(compute)


def test_pool_of_a_ray_that_was_started_here_is_no_larger_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_started_here", True)
    found = pool(monkeypatch, [{"CPU": 8, "GPU": 2}], "device=cuda", "max_replicas=16")
    assert (found.smallest, found.initial, found.largest) == (1, 2, 2)


def test_replicas_here_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    expected = "cuda, of which this machine has none; counted with one replica"
    assert replicas_here(ComputeConfig(device="cuda"))[2].startswith(expected)


@pytest.mark.parametrize(
    ("address", "gpu", "overrides", "workers"),
    [
        ("head:6379", False, [], 1),
        ("head:6379", False, ["train_workers=3"], 3),
        ("head:6379", True, [], 0),
        ("", False, [], 0),
        ("head:6379", False, ["executor=local"], 0),
        ("head:6379", False, ["train_device=cpu"], 0),
    ],
)
def test_training_on_gpus_goes_to_a_node_that_has_one(
    monkeypatch: pytest.MonkeyPatch, address: str, gpu: bool, overrides: list[str], workers: int
) -> None:
    monkeypatch.setattr(cluster, "gpus_here", lambda: int(gpu))
    monkeypatch.setenv("RAY_ADDRESS", address)
    compute = [f"compute.{each}" for each in ("train_device=cuda", *overrides)]
    config = parse_config({"sigmas": [0.5], "report": {"radii": [0]}}, compute)
    found = placed(config)
    assert (found.compute.train_workers, found.identity()) == (workers, config.identity())
