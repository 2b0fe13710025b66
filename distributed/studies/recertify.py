"""Certificates for another alpha, another split or a subset of Sigma, from stored votes alone."""

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from core.config import Config
from core.errors import ConfigError
from core.records import AlphaSplit, Sampling
from core.report import ReportData
from distributed.files.storage import Folder
from distributed.methods import METHODS, method_named, method_of
from distributed.methods.method import Terms, keyed
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.tables import report_data

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
    terms = replace(terms, sigmas=sigmas, level_shares=_shares(config, sigmas))
    stores = {name: ShardStore(directory.folder, f"certificates/{name}") for name in METHODS}
    run = {
        name: keyed(store.read().to_pylist(), method_named(name).per_level)
        for name, store in stores.items()
        if store.files()
    }
    made: dict[str, list[dict[str, Any]]] = {}
    for name, store in stores.items():
        stored = list(run.get(name, {}).values())
        made[store.name] = list(method_named(name).rederived(stored, run, config.sigmas, terms))

    # Only now, when nothing can be refused any more, the result of an earlier call makes room.
    root = directory.folder / f"recertified/{change.name()}"
    root.remove_all()
    for name, rows in made.items():
        if rows:
            ShardStore(root, name).commit(0, rows, method_of(name).schema, "recertified")
    notes = (
        f"Derived from the votes of {directory.folder.name}: alpha = {alpha:g}, share of the noise level "
        f"{change.sigma_share:g}, Sigma = {list(sigmas)}.",
    )
    changed = config.model_copy(
        update={
            "sigmas": sigmas,
            "certify": certify.model_copy(
                update={"alpha": alpha, "alpha_split": split, "level_shares": terms.level_shares}
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
