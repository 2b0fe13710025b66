"""How long a command takes to say its help, and Python to import `core`: processes of their own, in turns."""

import subprocess
import sys
from pathlib import Path

from bench.settings import Settings
from bench.timing import Line, interleaved, spread

__all__ = ["startup"]

_ROOT = Path(__file__).parent.parent


def startup(settings: Settings) -> list[Line]:
    """Every job with a command line."""
    jobs = sorted(file.stem for file in (_ROOT / "jobs").glob("[a-z]*.py"))
    commands = {"python -c 'import core'": ["-c", "import core"]}
    commands |= {f"python -m jobs.{job} --help": ["-m", f"jobs.{job}", "--help"] for job in jobs}
    if settings.tiny:
        commands = {name: commands[name] for name in ("python -c 'import core'", "python -m jobs.certify --help")}

    def started(arguments: list[str]) -> float:
        subprocess.run([sys.executable, *arguments], check=True, cwd=_ROOT, stdout=subprocess.DEVNULL)
        return 1

    sides = {name: (lambda arguments=arguments: started(arguments)) for name, arguments in commands.items()}
    taken = interleaved(sides, min(settings.turns, 2), warm=not settings.tiny)
    return [
        Line(
            "startup",
            name,
            spread([turn.wall_s for turn in turns]),
            unit="s",
            wanted="<= 1.5" if "jobs" in name else "",
        )
        for name, turns in taken.items()
    ]
