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


def test_import_core_loads_neither_torch_nor_ray() -> None:
    code = "import core, sys; core.ABSTAIN; print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_import_public_api_does_not_load_ray() -> None:
    code = "from core import SmoothedClassifier; import sys; print('ray' in sys.modules, 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False False"


def test_core_unknown_name_is_an_attribute_error() -> None:
    import core

    with pytest.raises(AttributeError, match="no attribute 'Smooth'"):
        core.Smooth  # noqa: B018
