"""A run directory: the manifest says what was asked, what is done, and from which files.

manifest.json    configuration, versions, device, finished steps with the hashes of the models they read and wrote
lock.json        who is at work
models/          *.safetensors
plan/            which examples belong to which shard
dataset/         shards: the all-sigma certification of the training split
training/        <training>/ the checkpoint that a training goes on from, until its step is finished; learning curves
certificates/    <method>/ shards: the test-time certificates
errors/          why an example has no certificate; replicas that had to be given up
attempts/        which replica began which shard, until the step is finished
report/
rounds/R/        run directories: round R of the alternation (`distributed.studies.rounds`)
shift/           run directories: the test split of a corrupted data set (`distributed.studies.shift`)
"""

import hashlib
import itertools
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import core
from core.config import Config, parse_config
from core.errors import ConfigError, DataError
from distributed.files.storage import Folder
from distributed.store.origin import differences
from distributed.store.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from core.data import Dataset, Split

__all__ = ["RunDirectory", "model_bytes"]

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "diffusers", "timm", "ray", "numpy", "scipy", "pyarrow", "pillow", "scikit-learn")
_MANIFEST = "manifest.json"
_CLASS_NAMES = "class_names"
_BORROWED = "borrow_models"
"""The step of a run directory that uses the networks of another one."""


class RunDirectory:
    """Opens or creates a run directory for one configuration.

    Args:
        where: the folder: a path, or a URI of an object store.
        config: what to run. None takes the configuration that the folder was made with.
        mode: `write`; `dry` writes nothing, not even the folder, before `begin`; `look` never does, and the folder must
            be there.

    Raises:
        ConfigError: when the folder was made with another configuration (the message lists each difference), or when
            there is none to take.
    """

    def __init__(
        self, where: Folder | Path | str, config: Config | None, mode: Literal["write", "dry", "look"] = "write"
    ) -> None:
        self.folder = Folder(where)
        self._mode = mode
        self._data: dict[Split, tuple[Dataset, str]] = {}
        self._open(config)

    def begin(self) -> None:
        """End the dry mode: read the folder again, and make it if it is not there."""
        self._mode = "write"
        self._open(self.config)

    def _open(self, config: Config | None) -> None:
        stored = self._read()
        if stored is None:
            if config is None or self._mode == "look":
                raise ConfigError(f"{str(self.folder)!r} holds no manifest.json: name a configuration with --config")
            if self._mode == "write":
                self.folder.check_writable()
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
                "versions": _versions(),
                "data": {},
                "steps": {},
            }
            self._write()
            return
        self._manifest = stored
        before = parse_config({"noise_version": 1} | stored["config"], source=self._manifest_file)
        self._refuse_edited(before)
        if config is not None and "noise_version" not in config.model_fields_set:
            config = config.model_copy(update={"noise_version": before.noise_version})
        self.config = config or before
        if changes := list(differences(before.identity(), self.config.identity())):
            raise ConfigError(
                f"{str(self.folder)!r} was made with another configuration:\n"
                + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in changes)
                + "\nuse another --out for the new one, or go back to the old values"
            )
        if self.config != before:  # the report's radii, or where it runs
            self._manifest["config"] = self.config.model_dump(mode="json")
            self._write()

    def _refuse_edited(self, config: Config) -> None:
        """Refuse a manifest that does not agree with itself.

        Raises:
            ConfigError: names the keys that were edited, where the seed or a plan tell.
        """
        if self._manifest.get("fingerprint") != config.fingerprint():
            said = [each for plan in self._plans() for each in differences(plan.settings, config.identity())]
            keys = "".join(f"\n  {key}: {old!r} when it was begun, {new!r} now" for key, old, new in said[:10])
            raise ConfigError(
                f"{self._manifest_file!r}: its configuration was edited: it has fingerprint {config.fingerprint()!r}, "
                f"the run was begun with {self._manifest.get('fingerprint')!r}; put the old values back, or use "
                f"another --out for the new ones{keys}"
            )
        if self._manifest.get("seed") != config.seed:
            raise ConfigError(
                f"{self._manifest_file!r}: seed was edited: it is {self._manifest.get('seed')!r}, the configuration's "
                f"is {config.seed!r}; put the old value back"
            )

    def _plans(self) -> Iterator[Plan]:
        """A plan that names the settings it was made for, if there is one."""
        folder = self.folder / "plan"
        with suppress(DataError):
            plans = (Plan.from_bytes(folder.read(file.name), file.name) for file in folder.files())
            yield from islice((plan for plan in plans if plan.settings), 1)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as it stands in the file."""
        return self._manifest

    @property
    def path(self) -> Path:
        """The folder, where it is on a local or shared disk.

        Raises:
            ConfigError: for an object store.
        """
        if self.folder.local is None:
            raise ConfigError(f"{str(self.folder)!r} is not on a disk of this machine")
        return self.folder.local

    @property
    def models(self) -> Folder:
        """Where its networks are: models/, or those of the run that they are borrowed from."""
        folder = self.folder
        for _ in range(self._manifest["steps"].get(_BORROWED, {}).get("levels_up", 0)):
            folder = folder.parent
        return folder / "models"

    def borrow(self, lender: "RunDirectory", names: Sequence[str]) -> None:
        """Use networks of a run that this folder lies in, as they are now; nothing is copied.

        Raises:
            ConfigError: as `model_hashes` of the lender.
        """
        if lender.config.dataset.layout == "original":  # Parquet files have names of their own for ImageNet's classes
            self._check_classes("dataset.test", lender.manifest.get("data", {}).get(_CLASS_NAMES))
        levels, above = 0, self.folder
        while above != lender.folder:
            assert above != above.parent, f"{self.folder} does not lie in {lender.folder}"
            levels, above = levels + 1, above.parent
        hashes, record = lender.model_hashes(names), self._manifest["steps"].get(_BORROWED)
        if record is None or record["wrote"] != hashes:
            self.finish(_BORROWED, read={}, wrote=hashes, facts={"levels_up": levels})

    def model(self, name: str) -> Path:
        """A local file with the network `name`: the one in the folder, or a copy of the object.

        Raises:
            ConfigError: for an object that no finished step wrote.
        """
        models = self.models
        return models.local / _model_file(name) if models.local else self._fetch(name)

    def _fetch(self, name: str) -> Path:
        return self.models.fetch(_model_file(name), self.model_hashes([name])[name])

    def save_model(self, name: str, module: "nn.Module") -> str:
        """Write the network `name`, whole or not at all; returns its SHA-256 for `finish`."""
        return self.put_model(name, model_bytes(module))

    def put_model(self, name: str, content: bytes) -> str:
        """Write the file of the network `name`, whole or not at all; returns its SHA-256 for `finish`."""
        (self.folder / "models").write(_model_file(name), content)
        return hashlib.sha256(content).hexdigest()

    def model_hashes(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of models that finished steps wrote, checked against the files (an object when it is fetched).

        Raises:
            ConfigError: for a model that no finished step wrote, or a file that has changed since.
        """
        written = {name: digest for step in self._manifest["steps"].values() for name, digest in step["wrote"].items()}
        models = self.models
        for name in names:
            where = models.where(_model_file(name))
            if name not in written or not models.exists(_model_file(name)):
                raise ConfigError(f"{where!r} is not there yet: run the earlier steps (jobs.pipeline)")
            if models.local is not None and models.sha256(_model_file(name)) != written[name]:
                raise ConfigError(
                    f"{where!r} is not the file that this run wrote (another SHA-256 than in "
                    "manifest.json): put it back, or start another --out"
                )
        return {name: written[name] for name in names}

    def data(self, split: "Split") -> "Dataset":
        """A split of the configured data set, loaded once and checked by `check_data`.

        Raises:
            ConfigError: as `check_data`, and for a split that the configuration does not describe.
            DataError: for files that are missing or are not what they should be.
        """
        from distributed.files.datasets import load_dataset

        data = self._data[split][0] if split in self._data else load_dataset(self.config.dataset, split)
        self.check_data(split, data)
        return data

    def check_data(self, split: "Split", data: "Dataset") -> None:
        """Refuse another data set than the one that this run began with, or other classes; at first use, note them.

        Where both splits are loaded, as the first step does, refuse two that are not apart.

        Raises:
            ConfigError: says what is another one, or what the splits share.
            DataError: when one of the images that `Dataset.digest` looks at cannot be read, or none can be decoded.
        """
        if split not in self._data or self._data[split][0] is not data:
            other: Split = "test" if split == "train" else "train"
            if other in self._data and (shared := data.shared(self._data[other][0])):
                raise ConfigError(
                    f"dataset.{split}: the training and the test split share {shared}; set path, split or ids_file of "
                    "dataset.train and dataset.test so that they are apart"
                )
            self._data[split] = data, data.digest()
            for note in data.notes:
                _log.warning("dataset.%s: %s", split, note)
        found: dict[str, Any] = {
            "digest": self._data[split][1], "examples": len(data), "classes": data.num_classes, "shape": data.shape,
        } | ({"notes": list(data.notes)} if data.notes else {})  # fmt: skip
        before = self._noted("data", split, found)
        if before and before["digest"] != found["digest"] and not data.matches(before["digest"]):
            old, new = (f"{each['digest']} ({each['examples']:,} examples)" for each in (before, found))
            raise ConfigError(
                f"dataset.{split}: this is not the data set that {str(self.folder)!r} began with: fingerprint {old} "
                f"there, {new} now; put the old one back (dataset.path, dataset.{split}.path, its ids_file; or the "
                "version of this program, if that has begun to read it otherwise), or use another --out"
            )
        self._check_classes(f"dataset.{split}", data.class_names)

    def check_source(self, key: str, named: str, sha256: str) -> None:
        """Refuse another model (or code) at this key of the configuration than this run began with; at first, note it.

        Raises:
            ConfigError: says what has changed.
        """
        before = self._noted("sources", key, {"named": named, "sha256": sha256})
        if before and before["sha256"] != sha256:
            raise ConfigError(
                f"{key}: {named!r} is not the file that {str(self.folder)!r} began with (SHA-256 "
                f"{before['sha256'][:16]} there, {sha256[:16]} now): put it back as it was, or use another --out"
            )

    def _check_classes(self, key: str, names: Sequence[str] | None) -> None:
        """One list of class names for a run: noted at first use, the same ever after."""
        before = None if names is None else self._noted("data", _CLASS_NAMES, list(names))
        if names is not None and before is not None and list(names) != before:
            pairs = itertools.zip_longest(before, names)
            number, (old, new) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ConfigError(
                f"{key}: its {len(names)} classes are not the {len(before)} that {str(self.folder)!r} began with: "
                f"number {number} is {old!r} there, {new!r} now; put the old names back, or use another --out"
            )

    def is_done(self, step: str, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> bool:
        """Whether `step` has finished, the models that it `reads` are as they were, and those it `writes` are there."""
        record = self._manifest["steps"].get(step)
        if record is None or not all(self.models.exists(_model_file(name)) for name in writes):
            return False
        return bool(record["read"] == self.model_hashes(reads))

    def finish(self, step: str, *, read: Mapping[str, str], wrote: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Record a finished step, atomically: the hashes of the models it read and wrote, and facts worth keeping."""
        record = {"finished": _now(), "read": dict(read), "wrote": dict(wrote), **facts}
        if (versions := _versions()) != self._manifest["versions"]:  # a resumed run may have met other ones
            record["versions"] = versions
        self._merge("steps", step, record)

    def _noted(self, section: str, key: str, found: Mapping[str, Any] | list[str]) -> Any:
        """What was noted before, None at first use, which notes what is found now."""
        before = self._manifest.get(section, {}).get(key)  # a run of an earlier version may have no such section
        if before is None and self._mode == "write":
            self._merge(section, key, found)
        return before

    def _merge(self, section: str, key: str, record: Mapping[str, Any] | list[str]) -> None:
        """Add to a section of the file; another job may have added something of its own in the meantime."""
        now = self._read() or self._manifest
        for name in ("data", "sources", "steps"):
            self._manifest[name] = dict(now.get(name, {}))
        self._manifest[section][key] = record if isinstance(record, list) else dict(record)
        self._write()

    @property
    def _manifest_file(self) -> str:
        return self.folder.where(_MANIFEST)

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self.folder.read(_MANIFEST)
        except FileNotFoundError:
            return None
        try:
            plain = json.loads(content)
            sections = [plain["config"], plain["steps"], plain.get("data", {}), *dict(plain["steps"]).values()]
            sections += [record[key] for record in sections[3:] for key in ("read", "wrote")]
            if not all(isinstance(section, dict) for section in sections):
                raise TypeError("config, steps, data and each step are objects")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._manifest_file!r} is not a manifest of ours ({error!r}); restore it") from error
        return dict(plain)

    def _write(self) -> None:
        if self._mode != "write":
            return
        self.folder.write(_MANIFEST, (json.dumps(self._manifest, indent=2) + "\n").encode())


def model_bytes(module: "nn.Module") -> bytes:
    """The file of a network."""
    from core.models.checkpoints import save_model

    with tempfile.TemporaryDirectory() as aside:
        save_model(module, file := Path(aside) / _model_file("model"))
        return file.read_bytes()


def _model_file(name: str) -> str:
    return f"{name}.safetensors"


def _versions() -> dict[str, str]:
    return {"dual-rs": core.__version__} | {name: metadata.version(name) for name in _PACKAGES}


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
