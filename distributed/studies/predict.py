"""Predicting, or certifying, images that nobody has labelled: PREDICT of Cohen et al. 2019 and of Dual RS, batched."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from core.agreement_records import AgreementCertificate, AgreementPrediction
from core.config import Config
from core.csv_text import csv_text
from core.data import StoredImages
from core.data.classes import readable
from core.data.folders import image_files, left_out, named
from core.data.formats import ENDINGS
from core.data.loading import preparation
from core.data.parquet_files import ParquetPart, parquet_files
from core.errors import ConfigError, DataError
from core.machine.engine import Task
from core.procedures.agreement import agreement_predict
from core.procedures.confidence import draws_needed
from core.procedures.dual import dual_predict
from core.procedures.smoothing import predict
from core.progress import Progress
from core.records import ABSTAIN, Certificate, DualCertificate, DualPrediction, Prediction
from distributed.cluster.cluster import device_here, gpus_here
from distributed.execution.launch import work_of
from distributed.execution.work import Work, build_engine
from distributed.files.datasets import class_names, open_storage
from distributed.files.parquet_images import read_unlabelled
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory

_log = logging.getLogger(__name__)

__all__ = ["Images", "Question", "columns_of", "open_images", "predict_images", "write_rows"]

Images = tuple[tuple[str, ...], StoredImages]
"""Names, and the images behind them, still encoded."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked about each image.

    Attributes:
        method: `dual` or `agreement`, or `standard` at one noise level.
        sigma: that level, one of Sigma; None for the others.
        certify: whether for a certificate with a radius, or for the class alone.
        num: noisy copies (of each stage of Dual RS); of a certificate, those that bound.
        alpha: failure probability of each answer.
        classifier: fine-tuned, or as it was before.
        seed: of the noise.

    Raises:
        ConfigError: for values out of range, or so few copies that there would be no answer.
    """

    method: Literal["standard", "dual", "agreement"]
    sigma: float | None
    certify: bool
    num: int
    alpha: float
    classifier: Literal["finetuned", "base"]
    seed: int

    def __post_init__(self) -> None:
        if self.num < 1 or not 0.0 < self.alpha < 1.0 or self.seed < 0:
            raise ConfigError(
                f"need num >= 1, alpha in (0, 1) and seed >= 0, got {self.num!r}, {self.alpha!r} and {self.seed!r}"
            )
        stage = self.alpha if self.method == "standard" else self.alpha / 2
        # Where all copies agree: the p-value is 2 (1/2)^num, the bound alpha^(1/num).
        needed = draws_needed(0.0, 1.0, stage) if self.certify else math.ceil(1.0 - math.log2(stage))
        if self.num < needed:
            raise ConfigError(
                f"num: {self.num} copies are too few to decide anything at {stage:g} a stage; use at least {needed}"
            )


def open_images(where: str, config: Config, image_column: str | None = None, id_column: str | None = None) -> Images:
    """Images of a folder (at any depth), one image file, or Parquet files where there are none.

    They are prepared as those of the run's data set; nothing is decoded yet.

    Args:
        where: a path or an address.
        config: of the run.
        image_column: of Parquet files; `image` unless given.
        id_column: of Parquet files; names are made from the row number unless given.

    Raises:
        DataError: when there is no image.
    """
    if "://" not in where and not Path(where).exists():
        raise DataError(f"{where!r} is not there: expected a folder of images, an image, or Parquet files")
    storage, prepared = open_storage(where), preparation(config.dataset)
    files, others = image_files(storage)
    if others == [""] and where.lower().endswith(ENDINGS):
        files = others
    names = tuple(readable(path or where.rstrip("/").rpartition("/")[2]) for path in files)
    if not files:
        parquet = tuple(path for path in parquet_files(storage) if (path or where).endswith(".parquet"))
        if not parquet:
            raise DataError(f"no image files ({', '.join(ENDINGS)}) and no Parquet files in {where!r}")
        columns = (image_column or "image", "", id_column)
        return read_unlabelled(ParquetPart(where, parquet, "row", 8, columns, None, None, prepared))
    if image_column or id_column:
        raise ConfigError(f"{where!r} holds image files: columns are for Parquet files")
    if others != files:
        for note in left_out(others):
            _log.warning("%s: %s", where, note)
    stored = StoredImages(
        torch.arange(len(files)).numpy(),
        lambda place: storage.read(files[place]),
        lambda place: named(storage, files[place]),
        prepared,
    )
    return names, stored


def predict_images(directory: RunDirectory, images: Images, question: Question, device: str = "auto") -> list[Row]:
    """Answer the question about each image, in this process; rows with `columns_of` in the order of the images.

    Guarantee: each answer that is not an abstention is wrong with probability at most `question.alpha` over its noise,
    which is a pure function of (seed, name of the image, phase, sigma). Wrong: another class than that of the smoothed
    classifier (Dual RS: at the noise level that the smoothed estimator picks), at the image or, with `certify`,
    somewhere in the open ball of the radius. An image that cannot be read becomes a row with the error.

    Raises:
        ConfigError: for a question out of range, or a run without the networks that it needs.
        ModelError: from the networks, which all images share.
        DataError: for two images of one name.
    """
    work = _work(directory, question, device)
    config = work.config
    shape, num_classes, classes = _expected(directory)
    names, stored = images
    if len(set(names)) < len(names):
        repeated, times = Counter(names).most_common(1)[0]
        raise DataError(f"{repeated!r} names {times} images, expected one each; name another --id-column")
    procedure, answers = _procedure(work, question), partial(_answer, classes=classes, sigmas=config.sigmas)
    rows: dict[int, Row] = {}
    engine = build_engine(work, num_classes, config.compute.training_batch_size)

    def tasks() -> Iterator[Task[Any]]:
        for index, name in enumerate(names):
            try:
                pixels = stored.decode(index, name)
                if pixels.shape != shape:
                    raise DataError(f"example {name!r} has shape {pixels.shape}, the run's images have {shape}")
            except DataError as error:
                rows[index] = _error(name, str(error))
                progress.update(1)
            else:
                yield Task(index, name, torch.from_numpy(pixels).float().div_(255.0), procedure())

    with Progress(len(names), "predict", "images", interval_s=config.compute.progress_interval_s) as progress:
        for finished in engine.run(tasks()):
            rows[finished.key] = {"id": names[finished.key], **answers(finished.result), "error": ""}
            progress.update(1)
    return [rows[index] for index in range(len(names))]


def _work(directory: RunDirectory, question: Question, device: str) -> Work:
    """The networks and settings that answer; the seed is the question's."""
    config = directory.config
    if config.law.exhaustive and not question.certify:
        raise ConfigError(f"noise {config.noise} decides without chance: ask for the certificate (--certify)")
    if config.law.exhaustive and question.seed != config.seed:
        raise ConfigError(f"seed: under noise {config.noise} it is part of the classifier, {config.seed}; leave it out")
    if question.method == "standard" and question.sigma not in config.sigmas:
        raise ConfigError(f"sigma: standard needs one of {list(config.sigmas)}, the run's noise levels")
    if question.method != "standard" and question.sigma is not None:
        raise ConfigError("sigma: Dual RS picks it for each image; drop it, or ask for the standard method")
    ending = "" if question.classifier == "finetuned" else "-base"
    work, _ = work_of(directory, f"certificates/{question.method}{ending}")
    device = device_here(device)
    if device == "cuda" and not gpus_here():
        raise ConfigError("device: this machine has no GPU that can be used; use cpu")
    answering = work.config.deployed  # the reference itself, where certificates are for one
    sampling = replace(answering.sampling(question.alpha), num_estimation=question.num)
    seeded = answering.model_copy(update={"seed": question.seed})
    return replace(work, config=seeded, sampling=sampling, device=device)


def _procedure(work: Work, question: Question) -> Callable[[], Any]:
    config = work.config
    if question.certify:
        return work.method.procedures(work.terms)[0 if question.sigma is None else config.sigmas.index(question.sigma)]
    if question.sigma is None:
        asked = (config.sigmas, config.estimator_sigma, question.num, question.alpha)
        if question.method == "dual":
            return partial(dual_predict, *asked)
        return partial(agreement_predict, *asked, config.certify.router)
    return partial(predict, question.sigma, question.num, question.alpha)


def _expected(directory: RunDirectory) -> tuple[tuple[int, ...], int, Sequence[str] | None]:
    """Shape of an image, number and names of classes, from the manifest or, where it has not noted them, the data."""
    noted = directory.manifest["data"].get("train", {})
    if "shape" in noted:
        names = directory.manifest["data"].get("class_names")
        return tuple(noted["shape"]), int(noted["classes"]), names or _names(directory.config, int(noted["classes"]))
    train = directory.data("train")
    return train.shape, train.num_classes, train.class_names


def _names(config: Config, num_classes: int) -> Sequence[str] | None:
    """Class names, if they are known here: the answers do not depend on them."""
    try:
        names = class_names(config.dataset)
    except (ConfigError, DataError):
        return None
    return names if names is not None and len(names) == num_classes else None


def columns_of(question: Question) -> tuple[str, ...]:
    """Columns of the answer's rows.

    `class`: index, -1 where abstaining; `sigma`: the noise level, none where the estimator abstained or its votes leave
    several; `p_value` and `p_value_sigma`: of the exact tests of the class (the largest, where it was asked at several
    levels) and of the noise level; radii: in the norm of the noise, pixel scale [0, 1], 0 where abstaining; `error`:
    why an image could not be read, and nothing else is known of it.
    """
    further = {"dual": ("radius_sigma", "radius_class"), "agreement": ("radius_constant",), "standard": ()}
    if question.certify:
        numbers: tuple[str, ...] = ("radius", "p_lower", *further[question.method])
    else:
        numbers = ("p_value", *(("p_value_sigma",) if question.method == "dual" else ()))
    return ("id", "class", "class_name", "sigma", "abstained", *numbers, "error")


Result = Prediction | DualPrediction | AgreementPrediction | Certificate | DualCertificate | AgreementCertificate


_NUMBERS: Final = ("p_value", "radius", "p_lower", "radius_sigma", "radius_class", "radius_constant")


def _answer(result: Result, classes: Sequence[str] | None, sigmas: Sequence[float]) -> dict[str, Any]:
    abstained = result.prediction == ABSTAIN
    row = {
        "class": result.prediction,
        "class_name": "" if abstained or classes is None else classes[result.prediction],
        "sigma": None if isinstance(result, AgreementPrediction) else result.sigma,
        "abstained": abstained,
    }
    row |= {name: getattr(result, name) for name in _NUMBERS if hasattr(result, name)}
    match result:
        case AgreementPrediction():
            one = sigmas[result.candidates[0]] if len(result.candidates) == 1 else None
            row |= {"sigma": one, "p_value": max((stage.p_value for stage in result.stages), default=None)}
        case AgreementCertificate():
            row["p_lower"] = result.levels[result.level].p_lower
        case DualPrediction():
            label = result.class_stage
            row |= {"p_value": label.p_value if label else None, "p_value_sigma": result.sigma_stage.p_value}
    return row


def _error(name: str, message: str) -> Row:
    return {"id": name, "class": ABSTAIN, "class_name": "", "sigma": None, "abstained": True, "error": message}


def write_rows(rows: Sequence[Row], columns: Sequence[str], file: str) -> None:
    """Write rows as CSV or Parquet, by the file's ending, whole or not at all; what is not known is empty (null).

    Raises:
        ConfigError: for another ending.
    """
    if file.endswith(".parquet"):
        types = {"class": pa.int64(), "abstained": pa.bool_()} | dict.fromkeys(
            ("id", "class_name", "error"), pa.string()
        )
        schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema), sink)
        content = bytes(sink.getvalue().to_pybytes())
    elif file.endswith(".csv"):
        content = csv_text(columns, ([row.get(name) for name in columns] for row in rows)).encode()
    else:
        raise ConfigError(f"{file!r}: the file to write ends in .csv or .parquet")
    target = Folder(file)
    target.parent.write(target.name, content)
