"""The list of mutants that may survive speaks of the code as it is."""

from pathlib import Path

import pytest
import yaml

from tests.mutants import ACCEPTED, TESTS, mutants_of

ENTRIES: dict[str, list[dict[str, list[str]]]] = yaml.safe_load(ACCEPTED.read_text())


@pytest.mark.parametrize("file", ENTRIES)
def test_accepted_mutants_are_mutants_of_the_code_as_it_is(file: str) -> None:
    made = {(mutant.was, mutant.becomes) for mutant in mutants_of(Path(file).read_text())}
    lines = {was for was, _ in made}
    for entry in ENTRIES[file]:
        assert entry["why"]
        assert set(entry["was"]) <= lines
        for becomes in entry.get("becomes", []):
            assert any((was, becomes) in made for was in entry["was"]), becomes


def test_every_module_has_test_files_and_every_test_file_is_there() -> None:
    names = {path.stem.removeprefix("test_") for path in Path("tests").rglob("test_*.py")}
    for file, tests in TESTS.items():
        assert Path(file).exists()
        assert {each.partition("@")[0] for each in tests.split()} <= names
    assert ENTRIES.keys() <= TESTS.keys()
