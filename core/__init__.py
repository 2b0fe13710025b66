"""Dual Randomized Smoothing: certified robustness with a noise level of each input's own (arXiv 2512.01782).

    from core import ABSTAIN, DualSmoothedClassifier, SmoothedClassifier

This floor knows neither Ray nor Parquet nor the command line. Names are imported when they are first used, so that
`import core` costs nothing.
"""

import importlib
import importlib.metadata
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from core.agreement_records import AgreementCertificate
    from core.deterministic import LipschitzCertificate, LipschitzClassifier
    from core.fitting import fit_router
    from core.models.lipschitz import MaxMin
    from core.procedures.composition import RoutedCertificate, RouterCertificate, Unasked, route
    from core.procedures.routers import smoothed_router
    from core.records import ABSTAIN, Certificate, DualCertificate
    from core.smoothed import DualSmoothedClassifier, SmoothedClassifier

_HOMES = {
    "ABSTAIN": "core.records",
    "AgreementCertificate": "core.agreement_records",
    "Certificate": "core.records",
    "DualCertificate": "core.records",
    "DualSmoothedClassifier": "core.smoothed",
    "LipschitzCertificate": "core.deterministic",
    "LipschitzClassifier": "core.deterministic",
    "MaxMin": "core.models.lipschitz",
    "RoutedCertificate": "core.procedures.composition",
    "RouterCertificate": "core.procedures.composition",
    "SmoothedClassifier": "core.smoothed",
    "Unasked": "core.procedures.composition",
    "fit_router": "core.fitting",
    "route": "core.procedures.composition",
    "smoothed_router": "core.procedures.routers",
}

__all__ = [
    "ABSTAIN",
    "AgreementCertificate",
    "Certificate",
    "DualCertificate",
    "DualSmoothedClassifier",
    "LipschitzCertificate",
    "LipschitzClassifier",
    "MaxMin",
    "RoutedCertificate",
    "RouterCertificate",
    "SmoothedClassifier",
    "Unasked",
    "fit_router",
    "route",
    "smoothed_router",
]


def _version() -> str:
    """The version in pyproject.toml: of the checkout that this is, or of the installed distribution."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():  # first: a checkout may run where another version is installed (`ray job --working-dir`)
        plain = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if plain.get("name") == "dual-rs":
            return str(plain["version"])
    return importlib.metadata.version("dual-rs")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'core' has no attribute {name!r}")
