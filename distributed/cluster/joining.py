"""Joining a Ray cluster: which address is meant, whether a head answers there, and what its workers have to know."""

import os
import socket
import time
from functools import cache

from core.addresses import shown
from core.errors import ConfigError
from distributed.cluster.upload import job_runtime_env
from distributed.files.stores import store_environment

__all__ = ["check_cluster", "joins", "runtime_env"]

JOIN_S = 15.0
"""How long the head of a cluster may take to answer."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins. What Ray's head answers begins with settings, too: type 4 in the fourth byte."""


def joins() -> bool:
    """Whether a job joins a cluster (RAY_ADDRESS), and does not start a Ray of its own."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def check_cluster(wait_s: float = JOIN_S) -> None:
    """Refuse an address in RAY_ADDRESS where no head of a cluster answers; without one, nothing happens.

    Ray itself says nothing for two minutes and then ends the process.

    Raises:
        ConfigError: says what was tried, and for how long.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not joins() or address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS is {shown(address)!r}, the address of the dashboard and of `ray job submit`, which reads "
            "RAY_API_SERVER_ADDRESS; set RAY_ADDRESS to the head's HOST:6379, or unset it to run on this machine"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS is {shown(address)!r}, expected HOST:PORT such as 10.0.0.1:6379, or auto")
    if (problem := _search(host.strip("[]"), int(port), wait_s)) is not None:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, where no Ray answers ({problem}), tried for {wait_s:g} s: is the head up "
            "(`ray status`), and is the port open to this machine? Unset RAY_ADDRESS to run here"
        )


@cache  # a sweep asks for each of its settings
def _search(host: str, port: int, wait_s: float) -> str | None:
    """Look for a head until there is one, or for `wait_s`; says at once what it waits for."""
    begun, patience_s = time.monotonic(), 1.0
    while (problem := _no_head(host, port, min(patience_s, wait_s))) is not None:
        if time.monotonic() - begun + 0.5 > wait_s:
            return problem
        if patience_s == 1.0:
            print(f"no Ray answers at {host}:{port} ({problem}): trying for {wait_s:g} s (RAY_ADDRESS)", flush=True)
        patience_s = 5.0
        time.sleep(0.5)
    return None


def _no_head(host: str, port: int, wait_s: float) -> str | None:
    """Why there is no head of a cluster, None where there is one."""
    try:
        with socket.create_connection((host, port), timeout=wait_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return None  # as much as can be told without its certificate
            connection.sendall(_PREFACE)
            answer = connection.recv(9)
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    return None if answer[3:4] == b"\4" else "something else is there"


def runtime_env() -> dict[str, dict[str, str]] | None:
    """Where the stores are: workers of a cluster have the environment of their nodes, not the driver's."""
    own = job_runtime_env().get("env_vars") or {}  # Ray refuses a variable that is said twice
    named = {name: value for name, value in store_environment().items() if name not in own}
    return {"env_vars": named} if named else None
