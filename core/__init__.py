"""Dual Randomized Smoothing: certified robustness with a noise level of each input's own (arXiv 2512.01782).

    from core import ABSTAIN, DualSmoothedClassifier, SmoothedClassifier

This floor knows neither Ray nor Parquet nor the command line. Names are imported when they are first used, so that
`import core` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.records import ABSTAIN, Certificate, DualCertificate
    from core.smoothed import DualSmoothedClassifier, SmoothedClassifier

_HOMES = {
    "ABSTAIN": "core.records",
    "Certificate": "core.records",
    "DualCertificate": "core.records",
    "DualSmoothedClassifier": "core.smoothed",
    "SmoothedClassifier": "core.smoothed",
}

__all__ = ["ABSTAIN", "Certificate", "DualCertificate", "DualSmoothedClassifier", "SmoothedClassifier"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'core' has no attribute {name!r}")
