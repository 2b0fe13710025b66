"""`models/card.md`: what the base networks of a run are, for who is given the folder."""

from typing import TYPE_CHECKING

from core.report.card import run_card
from core.report.pages import Block, Text
from distributed.store.run_directory import RunDirectory

if TYPE_CHECKING:
    from core.report import ReportData

__all__ = ["write_card"]


def write_card(directory: RunDirectory, data: "ReportData | None" = None) -> None:
    """Write the card of a run whose `train_base` is finished; nothing for one that borrows its networks.

    `data`: of its report, for the certified accuracy; None before there are certificates.
    """
    if "networks" not in directory.manifest["steps"].get("train_base", {}):
        return
    certified: list[Block] = []
    if data is not None:
        from core.report.render import accuracy_table

        config = directory.config
        networks = ", ".join(config.certified[role] for role in config.classifiers)
        draws = "all copies" if config.law.exhaustive else f"{config.certify.num_estimation:,} draws"
        spent = f"{draws}, failure probability {config.alpha:g}, {config.law.norm} radii"
        spent += f"; for {config.holds_for}" if config.certify.reference else ""
        certified = [accuracy_table(data), Text(f"Of {networks}; {spent}.")]
    (directory.folder / "models").write("card.md", run_card(directory.config, directory.manifest, certified).encode())
