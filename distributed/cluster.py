"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from core.config import ComputeConfig
from core.errors import ConfigError

__all__ = ["connected", "replica_slots"]


@contextmanager
def connected(compute: ComputeConfig) -> Iterator[None]:
    """Be connected to a cluster inside the block.

    A connection that is already there is used and left alone. Under `ray job submit`, or with RAY_ADDRESS set, that
    cluster is joined. Otherwise Ray starts on this machine and is stopped at the end. Ray's ports listen on all
    interfaces whatever address it is given, so such a cluster asks for a token that only this process tree knows.
    """
    joins = "RAY_ADDRESS" in os.environ
    if not joins and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token for this cluster alone, never written down: Ray's own default leaves one in the home directory, which
        # later clusters would then ask for. Ray reads both when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray's own progress lines are for its developers: ours say what matters.
    if joins:
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, compute.num_replicas),
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def replica_slots(compute: ComputeConfig) -> tuple[str, int]:
    """The device that replicas take and how many of them there is room for in the cluster as it is now.

    Raises:
        ConfigError: when there is no GPU yet and nothing says how many to wait for.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    device = compute.device if compute.device != "auto" else ("cuda" if gpus else "cpu")
    room = gpus if device == "cuda" else cpus // compute.threads_per_replica
    if device == "cuda" and not gpus and not compute.num_replicas:
        raise ConfigError(
            "compute.device is 'cuda' but the cluster has no GPU; set compute.num_replicas to the number of GPUs to "
            "wait for, or compute.device=cpu"
        )
    return device, compute.num_replicas or max(1, room)
