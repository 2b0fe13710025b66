"""One page of a run in progress, from its directory alone: how far, how fast, who is at work, errors, curves so far."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.progress import clock
from core.report import Kind, Method
from core.report.pages import NONE, Block, Heading, Table, Text, html_page, percent
from distributed.checks.status import StoreStatus, status
from distributed.methods import method_of
from distributed.methods.method import common_columns
from distributed.store.progress import read_progress
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["live_page", "training_lines"]

Floats = NDArray[np.float64]
_MOST_ERRORS = 10


def training_lines(directory: RunDirectory, now: float) -> list[str]:
    """How far each training at work is, as it said last; `now` is seconds since the epoch."""
    lines = []
    for said in read_progress(directory.folder):
        done, total, unit, rate = (said[key] for key in ("done", "total", "unit", "rate"))
        parts = [f"{done:,}/{total:,} {unit} ({100 * done / max(total, 1):.0f}%)"]
        parts += [said["note"]] if said["note"] else []
        parts += [f"{rate:,.1f} {unit}/s", f"ETA {clock((total - done) / rate)}"] if rate else []
        lines.append(f"{said['what']}: {', '.join(parts)}, last heard of {clock(max(0.0, now - said['time']))} ago")
    return lines


def live_page(directory: RunDirectory, now: float, told: Sequence[str]) -> bytes:
    """The page, as HTML that needs nothing but itself.

    `now`: seconds since the epoch; `told`: sentences to begin with, what else is known of the run.
    """
    from core.report import plots  # matplotlib, which jobs.status does not need otherwise

    found = {each.store: (each, ShardStore(directory.folder, each.store)) for each in status(directory, now)}
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    blocks: list[Block] = [Text(f"As of {moment}, from {directory.folder}."), *map(Text, told)]
    blocks += [Heading("How far"), _table(found.values())]
    commits = {name: _commits(store) for name, (_, store) in found.items()}
    if drawn := {name: curve for name, curve in commits.items() if len(curve[0]) > 1}:
        text = "Examples committed, against the hours since the first shard: where a line is flat, nothing was."
        blocks.append(plots.to_picture(plots.progress_figure(drawn), "progress", text))
    curves = {name: method for _, store in found.values() for name, method in _methods(directory, store)}
    if curves:
        text = "Certified accuracy of the examples that are done; they come in the order of the data set."
        blocks += [Heading("Curves so far"), plots.to_picture(plots.curves_figure(curves), "curves", text)]
    errors = Counter(
        (name, row["error"], row["message"].partition("\n")[0])
        for name, (_, store) in found.items()
        for row in store.read_errors().select(["error", "message"]).to_pylist()
    )
    if errors:
        most = errors.most_common(_MOST_ERRORS)
        rows = tuple((name, f"{num:,}", f"{kind}: {text}") for (name, kind, text), num in most)
        blocks += [Heading("Errors"), Table(("Store", "Rows", "Why"), rows)]
    return html_page(f"{directory.config.dataset.name}: a run in progress", blocks, directory.manifest).encode()


def _table(found: Iterable[tuple[StoreStatus, ShardStore]]) -> Table:
    header = ("Store", "Examples", "Done", "Examples/s", "ETA", "Last shard", "At work", "Errors", "Retries")
    rows = [
        (
            each.store,
            f"{each.done:,} of {each.total:,}",
            percent(each.done / max(each.total, 1)),
            NONE if each.rate is None else f"{each.rate:,.1f}",
            "finished" if each.finished else NONE if each.eta_s is None else clock(each.eta_s),
            NONE if each.idle_s is None else f"{clock(each.idle_s)} ago",
            NONE if each.finished else f"{len(store.at_work()):,} replicas",
            f"{each.errors:,}",
            f"{each.retries:,}",
        )
        for each, store in found
    ]
    return Table(header, tuple(rows))


def _commits(store: ShardStore) -> tuple[Floats, Floats]:
    """Hours since the first commit, and the examples that were there then."""
    plan, commits = store.read_plan(), store.commits()
    assert plan is not None, "a store has a status from its plan on"
    moments = np.array([moment for moment, _ in commits])
    return (moments - moments[:1]) / 3600, np.cumsum([float(plan.sizes[list(shards)].sum()) for _, shards in commits])


def _methods(directory: RunDirectory, store: ShardStore) -> Iterator[tuple[str, Method]]:
    """What is certified so far, by level where a method has one."""
    if not store.committed():
        return
    table, levels = store.read(), method_of(store.name).levels(directory.config.sigmas)
    for sigma in levels:
        name = store.name if sigma is None else f"{store.name}, sigma = {sigma:g}"
        columns = common_columns(table if sigma is None else table.filter(pc.equal(table["sigma"], sigma)))
        certified = (columns["correct"], columns["radius"])
        yield name, Method(name, Kind.OTHER, 0, *certified, None, None, None, directory.config.report.strict)
