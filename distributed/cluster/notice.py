"""A spot machine that learns of its end tells Ray, which hands its replicas no more shards.

Ray does the rest: a node that drains gets no new actors and tasks, Ray Data feeds replicas on other nodes alone, and
those of this one finish what they have. What does not fit in the notice is done elsewhere, as after any loss.

Only on machines of AWS and Google, known by what the firmware says (or by the variables with which their own libraries
are sent elsewhere), is anything asked. Kubernetes tells the pod: its hook calls `ray drain-node`.
"""

import http.client
import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

__all__ = ["Notice"]

_log = logging.getLogger(__name__)

FIRMWARE: Final = Path("/sys/class/dmi/id")
ASK_S: Final = 1.0
"""How long the metadata service may take. It is on the machine itself."""
MOST_FAILURES: Final = 3
"""Failures in a row after which it is not asked again: a pod, say, that may not reach it."""
GOOGLE_S: Final = 30.0
"""How long before its end a spot machine of Google learns of it. AWS says when it ends: two minutes later."""


class Notice:
    """What the machine's cloud says of its end."""

    def __init__(self, node_id: str) -> None:
        self._node_id, self._failures = node_id, 0
        self._token, self._token_until = "", 0.0
        self._ask = self._aws if _on("AWS") else self._google if _on("GOOGLE") else None

    def look(self) -> None:
        """Ask, and drain the node when its end is near. Never raises; without a cloud it does nothing."""
        if self._ask is None:
            return
        try:
            left_s = self._ask()
            if left_s is not None:
                self._ask = None
                _drain(self._node_id, left_s)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                self._ask = None
                _log.warning("no spot notices will be heard of on this node: %s", error)

    def _aws(self) -> float | None:
        """Seconds that are left, None while there is no notice (404). IMDSv2, with a token."""
        at = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")).netloc
        if time.monotonic() > self._token_until:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            self._token = _request(at, "/latest/api/token", header, "PUT") or ""
            self._token_until = time.monotonic() + 20000.0
        said = _request(at, "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
        return None if said is None else datetime.fromisoformat(json.loads(said)["time"]).timestamp() - time.time()

    def _google(self) -> float | None:
        at = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        said = _request(at, "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return GOOGLE_S if said == "TRUE" else None


def _on(cloud: str) -> bool:
    """Whether this machine is one of a cloud's."""
    name, variable, said = {
        "AWS": ("sys_vendor", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "Amazon EC2"),
        "GOOGLE": ("product_name", "GCE_METADATA_HOST", "Google Compute Engine"),
    }[cloud]
    if variable in os.environ:
        return True
    try:
        return (FIRMWARE / name).read_text().strip() == said
    except OSError:
        return False


def _request(at: str, path: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The answer, None where there is none (404). Never through a proxy."""
    connection = http.client.HTTPConnection(at, timeout=ASK_S)
    try:
        connection.request(method, path, headers=dict(headers))
        answer = connection.getresponse()
        if answer.status not in (200, 404):
            raise OSError(f"{at}{path} answers {answer.status} {answer.reason}")
        return answer.read().decode() if answer.status == 200 else None
    finally:
        connection.close()


def _drain(node_id: str, left_s: float) -> None:
    """What `ray drain-node` does."""
    import ray
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    deadline_ms = int((time.time() + max(left_s, 0.0)) * 1000)
    address = ray.get_runtime_context().gcs_address
    client = ray._raylet.GcsClient(address=address)
    taken, why_not = client.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, "spot notice", deadline_ms)
    _log.warning(
        "this machine goes in %.0f s: %s",
        left_s,
        "its replicas take no more shards" if taken else f"Ray says {why_not}",
    )
