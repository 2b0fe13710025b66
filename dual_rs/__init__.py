"""Dual Randomized Smoothing under one name: what `pip install` gives.

    from dual_rs import DualSmoothedClassifier, SmoothedClassifier

These are the public names of `core`; `dual-rs JOB` is `python -m jobs.JOB`. In a checkout the packages stand at its top
(`core`, `distributed`, `jobs`); installed from a wheel they are inside this one.
"""

from typing import TYPE_CHECKING

from core import __all__ as __all__
from core import __getattr__ as __getattr__

if TYPE_CHECKING:
    from core import *  # noqa: F403
