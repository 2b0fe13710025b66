"""Plants small faults in the modules that certificates rest on, and counts those that no test finds: `make mutants`.

The faults are mutmut's (its operators, on whole modules: its own runner leaves out constants and functions with a
decorator, and half of what matters here is one of these). Each is planted in a fork of a process that has imported the
libraries, and meets the test files of its module alone, fast tests first. What a message says is not mutated.
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import libcst as cst
import libcst.matchers as m
import pytest
import yaml
from libcst.metadata import CodeRange, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators

TESTS = {
    "core/law.py": "law confidence",
    "core/machine/splitting.py": "l1_noise@splitting",
    "core/procedures/confidence.py": "confidence e_process agreement@two_bounds",
    "core/procedures/smoothing.py": "smoothing reference_bound",
    "core/procedures/randomized.py": "randomized",
    "core/procedures/dual.py": "smoothing dual_sequential properties",
    "core/procedures/sequential.py": "sequential dual_sequential",
    "core/procedures/multiscale.py": "multiscale multiscale_closed_forms",
    "core/procedures/ladder.py": "sequential dual_sequential",
    "core/procedures/composition.py": "composition",
    "core/procedures/routers.py": "composition agreement",
    "core/models/lipschitz.py": "lipschitz deterministic",
    "core/deterministic.py": "deterministic",
    "core/procedures/agreement.py": "agreement agreement_oracles agreement_planted agreement_sequential",
    "core/procedures/agreement_terms.py": "agreement agreement_sequential",
    "core/machine/engine.py": "engine device_use@memory",
    "core/machine/reference.py": "reference",
    "core/machine/noise.py": "noise engine",
    "core/machine/keystream.py": "keystream",
    "core/machine/normal.py": "normal",
    "core/machine/former_noise.py": "former_noise",
    "core/machine/noise_check.py": "noise_check",
    "core/machine/exact_noise.py": "exact_noise exact_certificates",
    "core/training/losses/terms.py": "losses",
    "core/training/losses/plain.py": "losses",
    "core/training/losses/attacked.py": "losses",
    "distributed/store/lock.py": "lock",
    "distributed/store/shards.py": "shards provenance image_hashes@begun",
    "distributed/store/verify.py": "shards image_hashes@images",
    "distributed/checks/audit.py": "audit image_hashes provenance",
    "distributed/methods/method.py": "methods recertify audit@altered",
    "distributed/methods/rows.py": "methods recertify audit@altered",
    "distributed/methods/standard.py": "methods recertify audit@altered",
    "distributed/methods/dual.py": "methods recertify audit@altered",
    "distributed/methods/agreement.py": "methods agreement recertify audit@altered",
    "distributed/methods/multiscale.py": "methods recertify audit@altered",
}
"""The modules, and the test files that each one's mutants meet; behind an @ what the names of tests must hold."""

ACCEPTED = Path("tests/mutants.yaml")
"""Mutants that may survive, by file: lines as they were, what they become (anything, if that is not said), and why."""

_LIBRARIES = (
    "torch",
    "scipy.stats",
    "mpmath",
    "hypothesis",
    "pyarrow.parquet",
    "pyarrow.fs",
    "diffusers",
    "timm",
    "ray.data",
)
_MESSAGES = m.Raise() | m.Call(func=m.Attribute(value=m.Name("_log") | m.Name("error"))) | m.Call(func=m.Name("print"))
_NOT_RUN = m.Annotation() | m.Decorator() | m.Import() | m.ImportFrom() | m.FormattedString() | m.Expr(m.SimpleString())
_BY_VALUE = (mutators.operator_number, mutators.operator_swap_op)


@dataclass(frozen=True)
class Mutant:
    """A module with one fault.

    Attributes:
        was, becomes: the lines that differ.
        line: where.
        source: the whole module.
    """

    was: str
    becomes: str
    line: int
    source: str


class _Nodes(cst.CSTVisitor):
    """What may be mutated, where it stands, and whether it is run at each call (or once, on import)."""

    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, CodeRange, bool]] = []
        self._functions = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _MESSAGES | _NOT_RUN):
            return False
        place = self.get_metadata(WhitespaceInclusivePositionProvider, node)
        self.found.append((node, place, self._functions > 0))
        self._functions += isinstance(node, cst.FunctionDef)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        self._functions -= isinstance(node, cst.FunctionDef)


def mutants_of(source: str) -> list[Mutant]:
    """All of them, in the order of the file; on import only numbers and operators are changed."""
    module, nodes = cst.parse_module(source), _Nodes()
    cst.MetadataWrapper(module, unsafe_skip_copy=True).visit(nodes)
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    made: dict[str, Mutant] = {}
    for node, place, called in nodes.found:
        first, last = (starts[end.line - 1] + end.column for end in (place.start, place.end))
        for kind, operator in mutators.mutation_operators:
            if isinstance(node, kind) and (called or operator in _BY_VALUE):
                variants = list(operator(node))
                for new in variants[:1] if operator is mutators.operator_string else variants:
                    changed = source[:first] + module.code_for_node(new) + source[last:]
                    if changed != source:
                        made.setdefault(changed, _mutant(source, changed))
    return sorted(made.values(), key=lambda mutant: mutant.line)


def _mutant(source: str, changed: str) -> Mutant:
    old, new = ([line.strip() for line in text.splitlines()] for text in (source, changed))
    first = next(i for i in range(len(old)) if old[i] != new[i])
    same = next(i for i in range(1, len(old)) if old[-i] != new[-i]) - 1  # at the end
    was, becomes = (" ".join(lines[first : len(lines) - same]) for lines in (old, new))
    return Mutant(was, becomes, first + 1, changed)


class _Planted(SourceFileLoader):
    """Imports one module from a text instead of its file."""

    def __init__(self, file: str, source: str) -> None:
        super().__init__(file.removesuffix(".py").replace("/", "."), str(Path(file).resolve()))
        self.planted = source

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.planted, self.path, "exec")


class _Plugin:
    """Runs tests by what they took before, and notes what they take.

    `finished_run` of the audit's tests takes half a minute: a run that the tests made without a mutant is copied.
    """

    def __init__(self, took: dict[str, float], runs: Path, words: Mapping[str, str]) -> None:
        self.took, self.runs, self.words = took, runs, words

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self.words[item.path.name] in item.name]
        items[:] = sorted(chosen, key=lambda item: self.took.get(item.nodeid, 0.0))

    def keep_runs(self) -> None:
        """To be called before any test file is imported: those name the function."""
        runs: Any = importlib.import_module("tests.helpers.runs")
        runs.finished_run = functools.partial(self._finished_run, runs.finished_run)

    def _finished_run(self, make: Any, path: Path, *overrides: str, **options: Any) -> Any:
        kept = self.runs / hashlib.sha256(repr((overrides, options)).encode()).hexdigest()
        if not kept.exists():
            shutil.copytree(make(path, *overrides, **options).path, kept)
            return make.__globals__["RunDirectory"](path, None)
        return make.__globals__["RunDirectory"](shutil.copytree(kept, path, dirs_exist_ok=True), None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # a run that many share is no part of the test that asks for it first
            self.took[report.nodeid] = report.duration


def _run_tests(file: str, source: str, folder: Path, first: bool) -> None:
    """In a process of its own: exit code 0 where the tests pass. The first time notes what they take."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in () if first else (1, 2):
        os.dup2(null, stream)
    sys.meta_path.insert(0, _Planted(file, source))
    note = folder / "took.json"
    took, cpu_s = ({}, 3600.0) if first else json.loads(note.read_text())
    resource.setrlimit(resource.RLIMIT_CPU, (int(2 * cpu_s) + 5,) * 2)  # a loop without an end
    words = {f"test_{name}.py": word for name, _, word in (each.partition("@") for each in TESTS[file].split())}
    plugin = _Plugin(took, folder, words)
    if file.startswith("distributed/"):
        plugin.keep_runs()
    names = [str(path) for name in words for path in Path("tests").rglob(name)]
    code = pytest.main(["-x", "-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider", *names], [plugin])
    if first:
        note.write_text(json.dumps((plugin.took, time.process_time())))
    os._exit(int(code))


def try_mutant(file: str, source: str, folder: Path, limit_s: float, first: bool = False) -> str:
    """What becomes of a module's tests: `survived`, `killed` or `timeout`; `folder` keeps what the first run found."""
    process = get_context("fork").Process(target=_run_tests, args=(file, source, folder, first))
    process.start()
    process.join(limit_s)
    assert process.pid is not None
    ended = process.exitcode not in (None, -signal.SIGXCPU, -signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever the tests left behind
    process.join()
    return "timeout" if not ended else "survived" if process.exitcode == 0 else "killed"


def _is_accepted(file: str, mutant: Mutant) -> bool:
    entries = yaml.safe_load(ACCEPTED.read_text()).get(file, [])
    return any(
        mutant.was in each["was"] and mutant.becomes in each.get("becomes", [mutant.becomes]) for each in entries
    )


def run_module(file: str, chosen: Sequence[Mutant], workers: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and what became of it; exits where the tests fail without one."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        folder, start = Path(name), time.monotonic()
        if try_mutant(file, Path(file).read_text(), folder, 1200.0, first=True) != "survived":
            sys.exit(f"{file}: its tests fail without a mutant")
        limit_s = 5.0 * (time.monotonic() - start) + 30.0
        results = pool.map(lambda mutant: try_mutant(file, mutant.source, folder, limit_s), chosen)
        for mutant, result in zip(chosen, results, strict=True):
            yield mutant, "accepted" if result == "survived" and _is_accepted(file, mutant) else result


def main() -> int:
    """Returns 1 where a mutant survived that is not accepted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="make mutants")
    parser.add_argument("files", nargs="*", default=list(TESTS), help="modules; all of the table unless given")
    parser.add_argument("--sample", type=int, default=100, help="mutants of a module, drawn; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample: another one tries others")
    parser.add_argument("--workers", type=int, default=1, help="at a time")
    parser.add_argument("--only", default="", help="regular expression that the changed line must match")
    args = parser.parse_args()
    if unknown := set(args.files) - TESTS.keys():
        parser.error(f"no test files are known for {', '.join(sorted(unknown))}; expected {', '.join(TESTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # no threads: they do not survive a fork
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage twice in each fork: not among the libraries' objects
    rows: list[tuple[object, ...]] = []
    left = 0
    for file in args.files:
        every = [mutant for mutant in mutants_of(Path(file).read_text()) if re.search(args.only, mutant.was)]
        chosen = random.Random(args.seed).sample(every, args.sample) if 0 < args.sample < len(every) else every
        counts = dict.fromkeys(("killed", "timeout", "accepted", "survived"), 0)
        for mutant, result in run_module(file, chosen, args.workers):
            counts[result] += 1
            if result in ("killed", "accepted"):
                print(".", end="", flush=True)
            else:
                print(f"\n{file}:{mutant.line}: {result}\n    - {mutant.was}\n    + {mutant.becomes}", flush=True)
        left += counts["survived"]
        score = 1.0 - (counts["accepted"] + counts["survived"]) / max(1, len(chosen))
        rows.append((file, len(every), len(chosen), *counts.values(), f"{score:.1%}"))
        print(f"\n{file}: {counts}", flush=True)
    print("\n| module | mutants | tried | killed | timeout | accepted | survived | score |\n|---|" + "---:|" * 7)
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    gc.unfreeze()
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
