"""Certificates for another alpha, another split or a subset of Sigma, from stored votes alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from core.config import Config
from core.errors import ConfigError
from core.records import AlphaSplit, Phase, Sampling
from core.report import ReportData
from distributed.recompute import Terms, dual_from_row, multiscale_from_votes, standard_from_row
from distributed.rows import (
    CERTIFICATE_SCHEMA,
    DUAL_SCHEMA,
    ERROR,
    MULTISCALE_SCHEMA,
    certificate_row,
    dual_row,
    error_row,
    multiscale_row,
)
from distributed.run_directory import RunDirectory
from distributed.shards import ShardStore
from distributed.storage import Folder
from distributed.tables import report_data

__all__ = ["Change", "recertify"]


@dataclass(frozen=True)
class Change:
    """What is to be different from the run.

    Attributes:
        alpha: total failure probability; None keeps the run's.
        sigma_share: share of alpha that Dual RS spends on the noise level, in (0, 1).
        split: how Dual RS spends alpha; None keeps the run's way.
        sigmas: a subset of Sigma; None keeps all of it.
    """

    alpha: float | None = None
    sigma_share: float = 0.5
    split: AlphaSplit | None = None
    sigmas: tuple[float, ...] | None = None

    def name(self) -> str:
        """Folder of the result."""
        parts = [f"alpha-{self.alpha:g}"] if self.alpha is not None else []
        parts += [f"split-{self.split}"] if self.split is not None else []
        parts += [f"share-{self.sigma_share:g}"] if self.sigma_share != 0.5 else []
        parts += ["sigmas-" + "-".join(f"{sigma:g}" for sigma in self.sigmas)] if self.sigmas else []
        return "_".join(parts) or "same"


def recertify(directory: RunDirectory, change: Change) -> tuple[ReportData, Folder]:
    """Derive certificates/ anew under recertified/<name of the change>/ and return what a report needs.

    The votes were drawn without regard to alpha, the split or the subset, so the new certificates hold as if they had
    been asked for in the first place; for one certificate at a time, not for the best of several changes. A noise
    level that is left out of Sigma keeps its votes from the others: draws that the estimator gave to it count for no
    level. Where the estimator's choice moves, the classifier's votes come from certificates/standard, which has them
    at every level from the same noise. So it has Multiscale's, which is derived too, run before or not, where the
    budget is fixed.

    Raises:
        ConfigError: for a change out of range, or a run without the certificates that it needs.
    """
    config = directory.config
    sigmas = change.sigmas or config.sigmas
    if not set(sigmas) <= set(config.sigmas) or list(sigmas) != sorted(set(sigmas)):
        raise ConfigError(f"sigmas must be an ascending subset of {list(config.sigmas)}, got {list(sigmas)}")
    if not 0.0 < change.sigma_share < 1.0:
        raise ConfigError(f"share must lie in (0, 1), got {change.sigma_share!r}")
    certify = config.certify
    split = change.split or certify.alpha_split
    if split not in get_args(AlphaSplit) or (split == "full" and change.sigma_share != 0.5):
        raise ConfigError(f"split is one of {get_args(AlphaSplit)}, and share goes with halves alone, got {change}")
    alpha = certify.alpha if change.alpha is None else change.alpha
    sampling = Sampling(certify.num_selection, certify.num_estimation, alpha)
    terms = replace(Terms.of(config, sampling, certify.budget), split=split, sigma_share=change.sigma_share)

    standard = ShardStore(directory.folder, "certificates/standard")
    if not standard.files():
        raise ConfigError(f"{str(standard.folder)!r} has no certificates: run jobs.certify --method standard first")
    by_key = {(row["example_id"], row["sigma"]): row for row in standard.read().to_pylist()}
    standard_rows = [
        row
        if row["status"] == ERROR
        else certificate_row(row["example_id"], row["label"], standard_from_row(row, terms), row["image_hash"])
        for row in by_key.values()
        if row["sigma"] in sigmas
    ]
    dual = ShardStore(directory.folder, "certificates/dual")
    subset = replace(terms, sigmas=sigmas, level_shares=_shares(config, sigmas))
    dual_rows = [
        row
        if row["status"] == ERROR
        else dual_row(row["example_id"], row["label"], dual_from_row(row, subset), row["image_hash"])
        for row in _restricted(dual.read().to_pylist() if dual.files() else [], by_key, config.sigmas, subset)
    ]

    multiscale_rows = list(_cascades(by_key, subset)) if certify.budget == "fixed" else []

    # Only now, when nothing can be refused any more, the result of an earlier call makes room.
    root = directory.folder / f"recertified/{change.name()}"
    root.remove_all()
    ShardStore(root, "certificates/standard").commit(0, standard_rows, CERTIFICATE_SCHEMA, "recertified")
    if dual_rows:
        ShardStore(root, "certificates/dual").commit(0, dual_rows, DUAL_SCHEMA, "recertified")
    if multiscale_rows:
        ShardStore(root, "certificates/multiscale").commit(0, multiscale_rows, MULTISCALE_SCHEMA, "recertified")
    notes = (
        f"Derived from the votes of {directory.folder.name}: alpha = {alpha:g}, share of the noise level "
        f"{change.sigma_share:g}, Sigma = {list(sigmas)}.",
    )
    changed = config.model_copy(
        update={
            "sigmas": sigmas,
            "certify": certify.model_copy(
                update={"alpha": alpha, "alpha_split": split, "level_shares": subset.level_shares}
            ),
            "sigma_e": terms.sigma_e,
        }
    )
    data = report_data(changed, root, directory.manifest, sigma_share=change.sigma_share, notes=notes)
    return data, root


def _shares(config: Config, sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """Multiscale's shares of alpha for a subset of Sigma, in the same proportions."""
    given = dict(zip(config.sigmas, config.certify.level_shares, strict=False))
    if not given or sigmas == config.sigmas:
        return config.certify.level_shares
    total = math.fsum(given[sigma] for sigma in sigmas)
    return tuple(given[sigma] / total for sigma in sigmas)


def _cascades(standard: Mapping[tuple[str, float], Mapping[str, Any]], terms: Terms) -> Iterator[dict[str, Any]]:
    """Rows of Multiscale from the votes of standard RS: the same noise gave them."""
    for example_id in dict.fromkeys(example_id for example_id, _ in standard):
        rows = {sigma: standard[example_id, sigma] for sigma in terms.sigmas}
        first = next(iter(rows.values()))
        label = first["label"]
        if any(row["status"] == ERROR for row in rows.values()):
            yield error_row(MULTISCALE_SCHEMA, example_id, label, None, terms.sampling.alpha)
            continue
        votes = {
            (sigma, phase): np.asarray(row[f"counts_{phase.value}"], np.int64)
            for sigma, row in rows.items()
            for phase in (Phase.SELECTION, Phase.ESTIMATION)
        }
        yield multiscale_row(example_id, label, multiscale_from_votes(votes, terms), first["image_hash"])


def _restricted(
    rows: list[dict[str, Any]],
    standard: Mapping[tuple[str, float], Mapping[str, Any]],
    all_sigmas: tuple[float, ...],
    terms: Terms,
) -> Iterator[dict[str, Any]]:
    """Rows of Dual RS with the estimator's votes for the subset, and the classifier's at the level it then picks."""
    kept = [all_sigmas.index(sigma) for sigma in terms.sigmas]
    for row in rows:
        if row["status"] == ERROR:
            yield row
            continue
        before = all_sigmas[row["sigma_index"]]
        new = dict(row)
        for phase in ("selection", "estimation"):
            new[f"counts_{phase}_sigma"] = [row[f"counts_{phase}_sigma"][index] for index in kept]
        votes = new["counts_selection_sigma"]
        sigma = terms.sigmas[votes.index(max(votes))]
        if sigma != before or not row["counts_selection"]:
            if terms.budget != "fixed":
                raise ConfigError("a subset of Sigma that moves the estimator's choice needs budget: fixed")
            new |= {key: standard[row["example_id"], sigma][key] for key in _CLASSIFIER_COLUMNS}
        yield new


_CLASSIFIER_COLUMNS = ("counts_selection", "counts_estimation", "num_estimation", "stop_reason")
