"""A real S3 server on this machine, and a proxy in front of it that fails and hangs on command."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pyarrow.fs as pafs

os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FlakyProxy:
    """Passes TCP connections on to a port; `fail` resets those that come, `hang` swallows them."""

    def __init__(self, target: int) -> None:
        self.target, self.mode, self.refused, self.swallowed = target, "pass", 0, 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = int(self._server.getsockname()[1])
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def disturb(self, mode: str, seconds: float) -> None:
        """Be in another mode for a while."""
        self.mode, self.refused, self.swallowed = mode, 0, 0
        time.sleep(seconds)
        self.mode = "pass"

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client), closing(socket.create_connection(("127.0.0.1", self.target))) as server:
            pair = {client: server, server: client}
            while True:
                ready, _, _ = select.select(list(pair), [], [], 1.0)
                for side in ready:
                    # kept-alive connections feel the outage as well
                    if self.mode == "fail":
                        self.refused += 1
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        return
                    if self.mode == "hang":
                        self.swallowed += 1
                        self._held.append(client.dup())
                        while self.mode == "hang":
                            time.sleep(0.05)
                    try:
                        data = side.recv(1 << 16)
                        if not data:
                            return
                        pair[side].sendall(data)
                    except OSError:
                        return


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[FlakyProxy]:
    """A server with an empty bucket, behind a proxy."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            pafs.S3FileSystem(
                endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
            ).create_dir(bucket)
            proxy = FlakyProxy(port)
            yield proxy
            proxy.close()
        finally:
            process.kill()


def uri(proxy: FlakyProxy, key: str) -> str:
    """URI of a key in the bucket."""
    return f"s3://bucket/{key}?endpoint_override=127.0.0.1:{proxy.port}&scheme=http"
