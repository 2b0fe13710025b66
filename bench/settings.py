"""What every part of the bench is told."""

from dataclasses import dataclass, field
from pathlib import Path

from core.machine.network import Forward

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Of one call.

    Attributes:
        device: `cpu` or `cuda`, for the parts that run networks.
        tiny: whether every part does as little as it can: to see that it works, not how fast.
        repetitions: turns of each contestant.
        forward: how networks are run.
        run: a run directory with trained networks of the digits, for the budgets; made when it is not there.
    """

    device: str = "cpu"
    tiny: bool = False
    repetitions: int = 5
    forward: Forward = field(default_factory=Forward)
    run: Path = Path("runs/bench")

    @property
    def turns(self) -> int:
        """Counted turns."""
        return 1 if self.tiny else self.repetitions
