"""What rows are made from: written into the plan and into every file of rows, and compared wherever one is read.

A file proves its origin against mistakes and clumsy edits. Nothing here is secret: whoever computes all of it anew,
consistently, is found by replay alone (`distributed.checks.audit`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from core.config import Config
from core.errors import DataError
from core.law import Arithmetic
from core.own_function import source_of
from distributed.store.plan import Plan

__all__ = [
    "against_manifest",
    "arithmetic_of",
    "check_file",
    "devices_mix",
    "differences",
    "is_named",
    "metadata_of",
    "odd",
    "origin_of",
    "step_of",
]

VERSION: Final = 2
"""Of what is written. In the first version, which does not name itself, a plan holds fingerprint and models alone,
files of rows say nothing, rows do not name the image, and `Law.arithmetic` is 1."""


def origin_of(config: Config, models: Mapping[str, str], data: str, begun: Plan | None = None) -> dict[str, Any]:
    """The origin of the rows of a store, plain JSON.

    Args:
        config: of the run.
        models: SHA-256 by name.
        data: digest of the split.
        begun: the plan that is gone on with: what its version does not name is left out.
    """
    origin = {"fingerprint": config.fingerprint(), "models": dict(models)}
    if begun is not None and not is_named(begun):
        return origin
    named = {"version": VERSION, **origin, "seed": config.seed, "noise": config.noise, "data": data}
    if ":" in config.noise:
        named["noise_sha256"] = source_of(config.noise, "noise")["sha256"]
    return named if config.noise_version == 1 else named | {"noise_version": config.noise_version}


def against_manifest(plan: Plan, store: str, manifest: Mapping[str, Any]) -> str:
    """What a run's manifest states of a store, and its plan does not; as `odd`."""
    steps, split = manifest["steps"], "train" if store == "dataset" else "test"
    written = {name: digest for step in steps.values() for name, digest in step["wrote"].items()}
    read = steps[step_of(store)]["read"] if step_of(store) in steps else written
    stated = {
        "fingerprint": manifest.get("fingerprint"),
        "models": {name: read.get(name) for name in plan.origin.get("models", {})},
        "seed": manifest.get("seed"),
        "data": manifest.get("data", {}).get(split, {}).get("digest"),
    }
    there = {key: plan.origin[key] for key in stated if key in plan.origin}
    return odd({key: stated[key] for key in there}, there)


def step_of(store: str) -> str:
    """The step in the manifest that fills a store."""
    return "build_dataset" if store == "dataset" else store.replace("certificates/", "certify-")


def is_named(plan: Plan) -> bool:
    """Whether all files of this plan name their origin; those of a run that was begun before they did need not."""
    return "version" in plan.origin


def devices_mix(plan: Plan) -> bool:
    """Whether all devices draw the same noise for this plan's rows."""
    return bool(plan.origin.get("noise_version", 1) > 1)


def arithmetic_of(plan: Plan) -> Arithmetic:
    """How the radii of this plan's rows are rounded."""
    return 2 if is_named(plan) else 1


def metadata_of(plan: Plan, store: str, shards: Sequence[int]) -> dict[str, str]:
    """What the file of these shards says of its origin, in its metadata."""
    return {"origin": json.dumps(_stated(plan, store, shards))}


def check_file(plan: Plan, store: str, shards: Sequence[int], metadata: Mapping[str, str], where: str) -> None:
    """Refuse a file that was made from something else than its plan says.

    Raises:
        DataError: names the file and what differs.
    """
    remedy = "remove the file and start the job again: it makes the file anew"
    if "origin" not in metadata:
        if is_named(plan):
            raise DataError(f"{where!r} does not say what it was made from, as all files of this run do; {remedy}")
        return
    try:
        found = dict(json.loads(metadata["origin"]))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where!r} does not say what it was made from ({error}); {remedy}") from error
    if problem := odd(found, _stated(plan, store, shards)):
        raise DataError(f"{where!r} is not of this run and place: {problem}; {remedy}")


def odd(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs between two origins, by key: "data.seed is 1, expected 0"; empty when nothing does."""
    return ", ".join(f"{key} is {one!r}, expected {two!r}" for key, one, two in differences(found, expected))


def differences(one: Any, two: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two plain structures differ: the key (with dots), and what each says there."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for name in sorted(one.keys() | two.keys()):
            yield from differences(one.get(name), two.get(name), f"{key}.{name}" if key else name)
    elif one != two:
        yield key, one, two


def _stated(plan: Plan, store: str, shards: Sequence[int]) -> dict[str, Any]:
    return {**plan.origin, "plan": plan.digest, "store": store, "shards": [shards[0], shards[-1]]}
