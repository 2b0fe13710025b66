import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["core", "distributed", "jobs"])
def test_import_names_resolve_inside_the_checkout(name: str) -> None:
    """`distributed` is also the name of one of dask's packages."""
    module = __import__(name)
    assert Path(module.__file__ or "").is_relative_to(ROOT)


@pytest.mark.parametrize(
    ("code", "unloaded"),
    [
        ("import core; core.ABSTAIN", {"torch", "ray", "pyarrow"}),
        ("from core import SmoothedClassifier", {"ray", "diffusers"}),
    ],
)
def test_import_loads_no_more_than_it_needs(code: str, unloaded: set[str]) -> None:
    code += f"; import sys; print({unloaded} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"


def test_core_unknown_name_is_an_attribute_error() -> None:
    import core

    with pytest.raises(AttributeError, match="no attribute 'Smooth'"):
        core.Smooth  # noqa: B018
