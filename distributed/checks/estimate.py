"""What the steps of a run will take: noisy copies, rows through each network, bytes; device hours at given rates.

Rows are counted as `core.machine.network.Network.rows` counts them, less the padding of the last batches.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.config import Config, DenoiserTrainConfig, TrainConfig
from core.data import Dataset, Split
from core.progress import clock
from core.records import CLASSIFIER, ESTIMATOR, is_paired
from core.training.classifier import copies_of, rows_per_image
from distributed.execution.launch import outline, step_of, stores
from distributed.execution.work import Work
from distributed.methods.method import Kind
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = [
    "DENOISER",
    "TRAINING",
    "Part",
    "count_parts",
    "format_parts",
    "limit_notes",
    "rows_of",
    "size",
    "store_bytes",
]

DENOISER = "denoiser"
TRAINING: Kind = ("training",)
"""Forward and backward."""


@dataclass
class Part:
    """A step, or a part of one.

    Attributes:
        name: of the step, as in the manifest, and of its part.
        examples: that are left to do.
        copies: noisy copies by kind, in all.
        rows: rows through `denoiser`, `estimator` and `classifier`, in all.
        exact: whether these are exact; otherwise they are upper bounds.
        stored_bytes: of its output.
        replicas: that share the work.
        rates: measured noisy copies per second of one device, by kind.
        start_s: measured seconds that a replica takes to load and to warm up.
    """

    name: str
    examples: int
    copies: Mapping[Kind, int]
    rows: Mapping[str, int]
    exact: bool = True
    stored_bytes: int = 0
    replicas: int = 1
    rates: dict[Kind, float] = field(default_factory=dict)
    start_s: float = 0.0

    @property
    def num_copies(self) -> int:
        """Noisy copies of all kinds."""
        return sum(self.copies.values())

    @property
    def work_s(self) -> float | None:
        """Seconds of one device, without the start of the replicas; None where a rate is not known."""
        kinds = [kind for kind, num in self.copies.items() if num]
        if any(kind not in self.rates for kind in kinds):
            return None
        return math.fsum(self.copies[kind] / self.rates[kind] for kind in kinds)

    @property
    def device_s(self) -> float | None:
        """Seconds that devices are held in all: the work, and the start of each replica."""
        return None if self.work_s is None else self.work_s + self.start_s * self.replicas

    @property
    def wall_s(self) -> float | None:
        """Seconds that it takes when all replicas are there from the beginning."""
        return None if self.work_s is None else self.work_s / self.replicas + self.start_s


def rows_of(copies: Mapping[Kind, int], config: Config) -> Counter[str]:
    """Rows through the denoiser, if any, and through each head."""
    rows: Counter[str] = Counter()
    for kind, num in copies.items():
        heads = [name for name in kind if not is_paired(name)]
        passes = num * len(kind) // len(heads)  # twice as many where the reference sees them too
        rows.update(dict.fromkeys(heads, passes))
        if config.denoisers and (heads != [ESTIMATOR] or config.estimator.denoiser):
            rows[DENOISER] += passes
    return rows


def store_bytes(work: Work, examples: int, num_classes: int) -> int:
    """About how large the rows of so many examples are as Parquet, rather too large: of random values."""
    random, num, sampling = np.random.default_rng(0), 1000, work.sampling
    columns = []
    for column in work.method.columns(work.terms):
        width = len(work.config.sigmas) if column.name.endswith("_sigma") else num_classes
        share = np.full(width, 0.4 / width) + 0.6 * (np.arange(width) == 0)
        draws = sampling.num_selection if "selection" in column.name else sampling.num_estimation
        if pa.types.is_list(column.type) and not column.name.startswith("counts_"):  # an entry for each level
            if pa.types.is_string(column.type.value_type):
                columns.append(pa.array([["full"] * len(work.config.sigmas)] * num))
            else:
                entries = list(100 * random.random((num, len(work.config.sigmas))))
                columns.append(pa.array(entries).cast(column.type, safe=False))
        elif pa.types.is_list(column.type):
            votes = list(random.multinomial(draws, share / share.sum(), size=num))
            if pa.types.is_list(column.type.value_type):  # of all levels but the last, at most
                votes = [[each] * (len(work.config.sigmas) - 1) for each in votes]
            columns.append(pa.array(votes, column.type))
        elif column.name == "example_id":
            columns.append(pa.array([f"example-{number:08d}" for number in random.integers(10**6, size=num)]))
        elif column.name == "image_hash":
            columns.append(pa.array([random.bytes(8).hex() for _ in range(num)]))
        elif pa.types.is_string(column.type):
            columns.append(pa.array(["full"] * num))
        elif pa.types.is_floating(column.type):  # the others have few values
            varied = column.name.startswith(("radius", "p_lower"))
            columns.append(pa.array(random.random(num) if varied else random.integers(2, size=num) / 4))
        else:
            columns.append(pa.array(random.integers(2, size=num)).cast(column.type))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=work.method.columns(work.terms)), sink, compression="zstd")
    return math.ceil(int(sink.getvalue().size) / num * examples * work.rows_per_example)


def count_parts(
    directory: RunDirectory,
    steps: Sequence[str],
    data: Mapping[Split, Dataset],
    model_bytes: Mapping[str, int],
    replicas: int,
) -> list[Part]:
    """Rows and bytes of the steps that are to be run.

    Args:
        directory: the run; what it holds already does not count.
        steps: by their names in the manifest.
        data: the splits that they read.
        model_bytes: sizes of the networks, by name.
        replicas: that certify at the same time.
    """
    config, parts = directory.config, []
    workers = max(1, config.compute.train_workers)
    estimator, finetune = config.estimator, config.finetune
    denoises = len(config.denoisers)

    def training(name: str, copies: int, model: str, exact: bool = True, share: int = 1, **rows: int) -> None:
        stored = model_bytes.get(model, 0)
        parts.append(Part(name, len(data["train"]), {TRAINING: copies}, rows, exact, stored, share))

    for step in steps:
        num = len(data["train"]) if "train" in data else 0
        if step == "train_base":
            for role in config.base_models:
                train = config.training_of(role)
                if isinstance(train, DenoiserTrainConfig):
                    copies = train.steps * min(train.batch_size, num)
                    training(f"{step}, {role}", copies, role, False, workers, denoiser=copies)
                elif isinstance(train, TrainConfig):
                    images = train.epochs * num
                    noisy, clean = images * rows_per_image(train), images * bool(train.clean)
                    copies, front = images * copies_of(train), noisy * denoises
                    training(f"{step}, {role}", copies, role, True, workers, denoiser=front, classifier=noisy + clean)
        elif step == "train_estimator":  # without the samples of radius 0 at every sigma
            held, epochs = round(estimator.holdout * num), estimator.epochs
            copies = epochs * ((num - held) * estimator.num_copies + held * estimator.holdout_copies)
            if estimator.reads_features:  # each is computed once, and then there is little left to do
                copies = (num - held) * estimator.feature_copies + held * estimator.holdout_copies
            front = copies * denoises * estimator.denoiser
            training(step, copies, "estimator", False, workers, denoiser=front, estimator=copies)
        elif step == "finetune_classifier":
            num = max(1, round(num * finetune.share)) if num else 0
            draws: Mapping[Kind, int] = {(ESTIMATOR,): num * finetune.num_sigma_draws}
            parts.append(Part(f"{step}, sigmas", num, draws, rows_of(draws, config), replicas=workers))
            copies = finetune.epochs * num
            front = copies * denoises
            training(f"{step}, training", copies, "classifier", True, workers, denoiser=front, classifier=copies)
        elif step in (by_step := {step_of(store): store for store in stores()}):
            parts.append(_certifying(directory, by_step[step], data, replicas))
    return parts


def _certifying(directory: RunDirectory, store: str, data: Mapping[Split, Dataset], replicas: int) -> Part:
    work = outline(directory, store)
    shards, whole = ShardStore(directory.folder, store), data[work.split]
    plan = shards.read_plan()
    left = len(whole) - (int(plan.sizes[sorted(shards.committed())].sum()) if plan else 0)
    each, exact = work.method.copies(work.terms)
    copies = Counter({kind: left * num for kind, num in each.items()})
    return Part(
        name=step_of(store),
        examples=left,
        copies=copies,
        rows=rows_of(copies, work.config),
        exact=exact,
        stored_bytes=store_bytes(work, left, whole.num_classes),
        replicas=replicas,
    )


_NETWORKS = (DENOISER, ESTIMATOR, CLASSIFIER)
_COLUMNS = ("step", "examples", "noisy copies", *_NETWORKS, "copies/s", "device hours", "wall")


def format_parts(parts: Sequence[Part], price: float | None) -> str:
    """The table: a line for each part, and their sum.

    Args:
        parts: of a run.
        price: of a device hour, None to leave money out.
    """
    lines = [(*_COLUMNS, "output", *(["price"] if price is not None else []))]
    for part in parts:
        lines.append(_line(part, price))
    if len(parts) > 1:
        known = [part for part in parts if part.device_s is not None]
        lacking = len(known) < len(parts)
        hours = math.fsum(part.device_s or 0.0 for part in known) / 3600
        wall = math.fsum(part.wall_s or 0.0 for part in known)
        most = "" if all(part.exact for part in parts) else "<= "
        total = ["total", "", most + f"{sum(part.num_copies for part in parts):,}"]
        total += [f"{sum(part.rows.get(name, 0) for part in parts):,}" for name in _NETWORKS]
        total += ["", "not measured" if lacking else most + _three(hours), "" if lacking else clock(wall)]
        total += [size(sum(part.stored_bytes for part in parts))]
        lines.append((*total, *(["" if lacking else f"{most}{hours * price:.2f}"] if price is not None else [])))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if not column else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(part: Part, price: float | None) -> tuple[str, ...]:
    most = "" if part.exact else "<= "
    cells = [part.name, f"{part.examples:,}", f"{most}{part.num_copies:,}"]
    cells += [f"{part.rows[name]:,}" if part.rows.get(name) else "-" for name in _NETWORKS]
    if part.work_s is None or part.device_s is None or part.wall_s is None:
        cells += ["not measured", "", ""]
    else:
        cells += [_three(part.num_copies / part.work_s) if part.work_s else "-"]
        cells += [most + _three(part.device_s / 3600), clock(part.wall_s)]
    cells += [size(part.stored_bytes)]
    if price is not None:
        cells += ["" if part.device_s is None else f"{most}{part.device_s / 3600 * price:.2f}"]
    return tuple(cells)


def _three(number: float) -> str:
    """Three digits or more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def limit_notes(parts: Sequence[Part], spent: float, limit: float | None) -> list[str]:
    """What a run has taken before, and whether the estimate goes beyond its limit, both in device hours."""
    notes = [f"spent before, by all starts of this run: {spent:.3g} device hours"] if spent else []
    hours = math.fsum(part.device_s or 0.0 for part in parts) / 3600
    if limit is not None and spent + hours > limit:
        notes.append(
            f"compute.max_device_hours = {limit:.4g}: {max(0.0, limit - spent):.3g} are left, the estimate is "
            f"{hours:.3g}; the run may stop before its end, and goes on from there with a larger limit"
        )
    return notes


def size(num_bytes: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= 0.1 * scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes else "-"
