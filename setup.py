"""What a wheel holds: one package, `dual_rs`. Everything else about the project is in pyproject.toml.

A checkout has `core`, `distributed` and `jobs` at its top, where `ray job submit --working-dir .` finds them. In
somebody's environment those names would be anybody's (`distributed` is dask's), so that there they are `dual_rs.core`,
`dual_rs.distributed` and `dual_rs.jobs`.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_NAMES = "core|distributed|jobs"
_MOVED = (
    (re.compile(rf"^(\s*from )({_NAMES})\b", re.MULTILINE), r"\1dual_rs.\2"),
    (re.compile(rf"^(\s*)import ({_NAMES})$", re.MULTILINE), r"\1from dual_rs import \2"),
    (re.compile(rf"""(["'])({_NAMES})\.(?=[a-z_{{])"""), r"\1dual_rs.\2."),  # names of modules in strings
    (re.compile(r"python -m jobs\b"), "python -m dual_rs.jobs"),
)


class OnePackage(build_py):
    """Moves the three packages below `dual_rs`, in a wheel; an editable install is the checkout as it is."""

    def run(self) -> None:
        """Build, then move."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "dual_rs"
        for name in _NAMES.split("|"):
            (package.parent / name).rename(package / name)
        for file in package.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for pattern, moved in _MOVED:
                text = pattern.sub(moved, text)
            file.write_text(text, encoding="utf-8")


setup(cmdclass={"build_py": OnePackage})
