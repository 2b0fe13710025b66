"""Owns what a certification method is to the pipeline: its draws, its rows, and what a stored row proves.

Each method is one class (`distributed.methods.method.Method`) in a module of its own. Whatever deals with all of them,
replicas, the audit, the estimate, `jobs.recertify`, the report, walks over METHODS and asks it. May import `core` and
Arrow, nothing of `distributed`.
"""

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from distributed.methods.method import Method

__all__ = ["METHODS", "method_named", "method_of", "methods"]

METHODS: dict[str, tuple[str, str]] = {
    "standard": ("distributed.methods.standard:Standard", "CERTIFY (Cohen et al. 2019) once per sigma"),
    "dual": ("distributed.methods.dual:Dual", "min(R_sigma, R_c), alpha / 2 each"),
    "agreement": (
        "distributed.methods.agreement:Agreement",
        "min over the levels of max(E, R): the class stays wherever the router may go (certify.router)",
    ),
    "multiscale": (
        "distributed.methods.multiscale:Multiscale",
        "the cascade of Jeong & Shin (2023) from the largest sigma down, alpha divided over the levels "
        "(certify.level_shares), all draws of each level that it asks whatever certify.budget says",
    ),
}
"""By name: where its class is (`module:Class`, imported when it is first asked for) and what a user is told of it. In
the order in which the pipeline certifies and the report lists stores."""


@cache
def method_named(name: str) -> "Method":
    """The method of a name in METHODS."""
    module, _, kind = METHODS[name][0].partition(":")
    return cast("Method", cast(Any, getattr(importlib.import_module(module), kind))())


def method_of(store: str) -> "Method":
    """The method whose rows a store holds: `dataset`, `certificates/NAME`, `certificates/NAME-base`.

    Raises:
        KeyError: for a store of no method.
    """
    return method_named("standard" if store == "dataset" else store.rpartition("/")[2].removesuffix("-base"))


def methods() -> "list[Method]":
    """All of them, in the order of METHODS."""
    return [method_named(name) for name in METHODS]
