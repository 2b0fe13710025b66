"""Certificates for another alpha, split or claim, or a subset of Sigma, from stored votes alone."""

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from core.agreement_records import Claim, Router
from core.config import Config
from core.errors import ConfigError
from core.records import AlphaSplit
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
        share: of alpha, what Dual RS spends on the noise level, in (0, 1); None keeps the run's.
        split: how Dual RS spends alpha; None keeps the run's way.
        sigmas: a subset of Sigma; None keeps all of it.
        claim: of Dual RS, see `CertifyConfig`; None keeps the run's.
        router: of the agreement claim; None keeps the run's.
    """

    alpha: float | None = None
    share: float | None = None
    split: AlphaSplit | None = None
    sigmas: tuple[float, ...] | None = None
    claim: Claim | None = None
    router: Router | None = None

    def name(self) -> str:
        """Folder of the result."""
        parts = [f"alpha-{self.alpha:g}"] if self.alpha is not None else []
        named = {"claim": self.claim, "router": self.router, "split": self.split}
        parts += [f"{key}-{value}" for key, value in named.items() if value is not None]
        parts += [f"share-{self.share:g}"] if self.share is not None else []
        parts += ["sigmas-" + "-".join(f"{sigma:g}" for sigma in self.sigmas)] if self.sigmas else []
        return "_".join(parts) or "same"


def recertify(directory: RunDirectory, change: Change) -> tuple[ReportData, Folder]:
    """Derive certificates/ anew under recertified/<name of the change>/ and return what a report needs.

    The votes were drawn without regard to alpha, the split or the subset, so the new certificates hold as if they had
    been asked for in the first place; for one certificate at a time, not for the best of several changes. A noise
    level that is left out of Sigma keeps its votes from the others: draws that the estimator gave to it count for no
    level. Where the estimator's choice moves, the classifier's votes come from certificates/standard, which has them
    at every level from the same noise. So it has Multiscale's and the agreement claim's, which are derived too, run
    before or not, where the budget is fixed.

    Raises:
        ConfigError: for a change out of range, or a run without the certificates that it needs.
    """
    config = directory.config
    sigmas = change.sigmas or config.sigmas
    if not set(sigmas) <= set(config.sigmas) or list(sigmas) != sorted(set(sigmas)):
        raise ConfigError(f"sigmas must be an ascending subset of {list(config.sigmas)}, got {list(sigmas)}")
    if change.share is not None and not 0.0 < change.share < 1.0:
        raise ConfigError(f"share must lie in (0, 1), got {change.share!r}")
    certify = config.certify
    claim, router = change.claim or certify.claim, change.router or certify.router
    split = change.split or (certify.alpha_split if claim == "constant" else "halves")
    for key, value, known in (("split", split, AlphaSplit), ("claim", claim, Claim), ("router", router, Router)):
        if value not in get_args(known):
            raise ConfigError(f"{key} is one of {get_args(known)}, got {value!r}")
    if change.share not in (None, 0.5) and split == "full":
        raise ConfigError(f"share goes with split=halves alone, got {change}")
    if split == "full" and claim == "agreement":
        raise ConfigError("split=full is for claim=constant: under agreement an error of either stage is enough")
    if change.alpha is not None and config.law.exhaustive:
        raise ConfigError(f"alpha: certificates under noise {config.noise} have no failure probability; leave it out")
    alpha = certify.alpha if change.alpha is None else change.alpha
    new: dict[str, Any] = {"alpha": alpha, "alpha_split": split, "claim": claim, "router": router}
    new["level_shares"] = _shares(config, sigmas)
    if change.share is not None and claim == "agreement":
        new["router_share"] = change.share
    changed = config.model_copy(
        update={"sigmas": sigmas, "certify": certify.model_copy(update=new), "sigma_e": config.estimator_sigma}
    )
    sampling = changed.sampling()
    if claim == "agreement" and not sampling.plain:
        raise ConfigError("claim=agreement: the run has certify.reference or bound: randomized, which it does not know")
    terms = Terms.of(changed, sampling, certify.budget)
    if change.share is not None and claim == "constant":
        terms = replace(terms, sigma_share=change.share)
    share = terms.sigma_share if claim == "constant" else terms.router_share

    standard = ShardStore(directory.folder, "certificates/standard")
    if not standard.files():
        raise ConfigError(f"{str(standard.folder)!r} has no certificates: run jobs.certify --method standard first")
    stores = {name: ShardStore(directory.folder, f"certificates/{name}") for name in METHODS}
    run = {
        name: keyed(store.read().to_pylist(), method_named(name).per_level)
        for name, store in stores.items()
        if store.files()
    }
    made: dict[str, list[dict[str, Any]]] = {}
    for name, store in stores.items():
        stored = list(run.get(name, {}).values())
        method = method_named(name)
        derives = method.any_bound or sampling.plain
        made[store.name] = list(method.rederived(stored, run, config.sigmas, terms)) if derives else []

    routed = "dual" if claim == "constant" else "agreement"
    if change.claim is not None and not made[stores[routed].name]:
        raise ConfigError(
            f"claim={claim} needs certificates/{routed}"
            + (" or, of a run with budget fixed, certificates/dual" if claim == "agreement" else "")
            + f"; run jobs.certify --method {routed} first"
        )

    # Only now, when nothing can be refused any more, the result of an earlier call makes room.
    root = directory.folder / f"recertified/{change.name()}"
    root.remove_all()
    for name, rows in made.items():
        if rows:
            ShardStore(root, name).commit(0, rows, method_of(name).columns(terms), "recertified")
    notes = (
        f"Derived from the votes of {directory.folder.name}: alpha = {alpha:g}, share of the noise level "
        f"{share:g}, Sigma = {list(sigmas)}, claim {claim} (router of agreement: {router}).",
    )
    return report_data(changed, root, directory.manifest, sigma_share=terms.sigma_share, notes=notes), root


def _shares(config: Config, sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """Multiscale's shares of alpha for a subset of Sigma, in the same proportions."""
    given = dict(zip(config.sigmas, config.certify.level_shares, strict=False))
    if not given or sigmas == config.sigmas:
        return config.certify.level_shares
    total = math.fsum(given[sigma] for sigma in sigmas)
    return tuple(given[sigma] / total for sigma in sigmas)
