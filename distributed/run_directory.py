"""A run directory: the manifest says what was asked, what is done, and from which files.

manifest.json    configuration, versions, device, finished steps with the hashes of the models they read and wrote
models/          *.safetensors
plan/            which examples belong to which shard
dataset/         shards: the all-sigma certification of the training split
certificates/    <method>/ shards: the test-time certificates
report/
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from core.config import Config, parse_config
from core.errors import ConfigError
from core.files import file_sha256, write_whole

__all__ = ["RunDirectory"]

_PACKAGES = ("torch", "diffusers", "timm", "ray", "numpy", "scipy", "pyarrow", "scikit-learn")


class RunDirectory:
    """Opens or creates a run directory for one configuration.

    Args:
        path: the folder.
        config: what to run. None takes the configuration that the folder was made with.

    Raises:
        ConfigError: when the folder was made with another configuration (the message lists each difference), or when
            there is none to take.
    """

    def __init__(self, path: Path, config: Config | None) -> None:
        self.path = path
        self._file = path / "manifest.json"
        stored = self._read()
        if stored is None:
            if config is None:
                raise ConfigError(f"{str(path)!r} holds no manifest.json: name a configuration with --config")
            path.mkdir(parents=True, exist_ok=True)
            self.config = config
            self._manifest: dict[str, Any] = {
                "created": _now(),
                "config": config.model_dump(mode="json"),
                "fingerprint": config.fingerprint(),
                "seed": config.seed,
                "git_revision": _git_revision(),
                "platform": {
                    "python": sys.version.split()[0],
                    "machine": platform.machine(),
                    "system": platform.system(),
                },
                "versions": {name: metadata.version(name) for name in _PACKAGES},
                "steps": {},
            }
            self._write()
            return
        self._manifest = stored
        before = parse_config(stored["config"], source=str(self._file))
        self.config = config or before
        changes = _differences(before.identity(), self.config.identity())
        if changes:
            raise ConfigError(
                f"{str(path)!r} was made with another configuration:\n"
                + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in changes)
                + "\nuse another --out for the new one, or go back to the old values"
            )
        if self.config != before:  # the report's radii, or where it runs
            self._manifest["config"] = self.config.model_dump(mode="json")
            self._write()

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as it stands in the file."""
        return self._manifest

    def model(self, name: str) -> Path:
        """Where the network `name` is kept."""
        return self.path / "models" / f"{name}.safetensors"

    def model_hashes(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of models that finished steps wrote, checked against the files.

        Raises:
            ConfigError: for a model that no finished step wrote, or a file that has changed since.
        """
        written = {name: digest for step in self._manifest["steps"].values() for name, digest in step["wrote"].items()}
        for name in names:
            if name not in written or not self.model(name).exists():
                raise ConfigError(f"{str(self.model(name))!r} is not there yet: run the earlier steps (jobs.pipeline)")
            if file_sha256(self.model(name)) != written[name]:
                raise ConfigError(
                    f"{str(self.model(name))!r} is not the file that this run wrote (another SHA-256 than in "
                    "manifest.json): put it back, or start another --out"
                )
        return {name: written[name] for name in names}

    def is_done(self, step: str, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> bool:
        """Whether `step` has finished, with the models that are there now, and its own models are still there.

        Args:
            step: its name.
            reads: models that it uses.
            writes: models that it makes.
        """
        record = self._manifest["steps"].get(step)
        if record is None or not all(self.model(name).exists() for name in writes):
            return False
        return bool(record["read"] == self.model_hashes(reads))

    def finish(self, step: str, *, read: Mapping[str, str], wrote: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Record a finished step, atomically: the hashes of the models it read and wrote, and facts worth keeping."""
        record = {"finished": _now(), "read": dict(read), "wrote": dict(wrote), **facts}
        # Another job may have finished a step of its own in the meantime.
        self._manifest["steps"] = {**(self._read() or self._manifest)["steps"], step: record}
        self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            text = self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            plain = json.loads(text)
            _ = plain["config"], plain["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(self._file)!r} is not a manifest of ours ({error!r})") from error
        return dict(plain)

    def _write(self) -> None:
        write_whole(self._file, (json.dumps(self._manifest, indent=2) + "\n").encode())


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        rows = []
        for name in sorted(old.keys() | new.keys()):
            rows += _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return rows
    return [] if old == new else [(key, old, new)]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(  # noqa: S603 - a fixed command
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
