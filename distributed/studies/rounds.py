"""The alternation (step 4 of the paper's training): round r > 1 is a run directory of its own, RUN/rounds/r.

Its denoiser is that of the run, its base classifier the one that the round before has fine-tuned; apart from that it is
a run like any other. It draws noise of its own: the classifier of a later round has been trained with what the noise of
the earlier ones showed, and a certificate needs noise that had no part in making the network.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from core.config import Config
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory

__all__ = ["begin_round", "broken_links", "round_config", "rounds_there"]

_SEEDS_APART = 1000
"""The seeds of two rounds differ by this: training uses a few numbers after the seed for its parts."""


def round_config(config: Config, number: int) -> Config:
    """The configuration of a round: that of the run with a seed of its own, `seed + 1000 (number - 1)`."""
    return config.model_copy(update={"rounds": 1, "seed": config.seed + _SEEDS_APART * (number - 1)})


def begin_round(run: RunDirectory, number: int) -> RunDirectory:
    """Open round `number` >= 2 of a run, with the networks of the round before; goes on with one that was begun.

    Raises:
        ConfigError: when the round before has no fine-tuned classifier yet, or the configuration is another one.
    """
    before = run if number == 2 else RunDirectory(_folder(run, number - 1), None, "look")
    sources = run.config.certified
    hashes = before.model_hashes(sorted(sources.values()))
    given = {name: hashes[source] for name, source in sources.items()}
    directory = RunDirectory(_folder(run, number), round_config(run.config, number))
    record = directory.manifest["steps"].get("train_base")
    if record is None or record["wrote"] != given or not directory.is_done("train_base", writes=sorted(given)):
        for name, source in sources.items():
            directory.put_model(name, before.model(source).read_bytes())
        directory.finish("train_base", read={}, wrote=given, facts={"taken_from_round": number - 1})
    return directory


def rounds_there(run: RunDirectory) -> list[RunDirectory]:
    """The rounds that have been begun, the run itself first; only to look at."""
    found, number = [run], 2
    while _folder(run, number).exists("manifest.json"):
        found.append(RunDirectory(_folder(run, number), None, "look"))
        number += 1
    return found


def broken_links(rounds: Sequence[RunDirectory]) -> list[tuple[str, str]]:
    """Networks of a round that are not those which the round before has fine-tuned, as (folder, what is wrong)."""
    found = []
    for before, directory in pairwise(rounds):
        if not directory.manifest["steps"]:  # it has just been begun
            continue
        written = [
            {name: digest for step in each.manifest["steps"].values() for name, digest in step["wrote"].items()}
            for each in (before, directory)
        ]
        for name, source in directory.config.certified.items():
            if written[1].get(name) != written[0].get(source):
                where = PurePosixPath("rounds", directory.folder.name)
                found.append((str(where), f"its {name} is not the {source} of the round before"))
    return found


def _folder(run: RunDirectory, number: int) -> Folder:
    return run.folder / f"rounds/{number}"
