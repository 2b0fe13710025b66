"""What the page of examples shows: the votes of every row, and images with the noisy copies that a certificate saw."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from numpy.typing import NDArray

from core.data import Dataset
from core.errors import DualRSError
from core.machine.noise import Copies, make_noise
from core.models.checkpoints import load_denoiser
from core.records import Phase
from core.report import ReportData
from core.report.examples import examples_page, floored, main_rows
from core.report.pages import Heading, Link, Section
from distributed.methods import method_named
from distributed.methods.method import column
from distributed.methods.rows import CERTIFICATE_SCHEMA, ERROR
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.tables import failed_examples

__all__ = ["examples_section"]

_FILE: Final = "examples.html"
_MOST_VOTES: Final = 5
"""Classes whose votes are shown, of a row."""
_SIDE: Final = 64
"""Longest side of an image in the list, pixels."""
_SHARP: Final = 16
"""Sides up to which it loses nothing."""


def examples_section(
    directory: RunDirectory, data: ReportData, tables: Mapping[str, pa.Table], images: bool = True
) -> Section:
    """The page of examples, one self-contained file, and the link to it.

    Images come with it where this machine has them: of all examples where they are in memory, else of those that are
    looked at closely (`report.gallery`), which come with a noisy copy too, and denoised.
    """
    width, standard = len(directory.config.sigmas), tables["standard"]
    ids, labels = (standard.column(name).to_pylist()[::width] for name in ("example_id", "label"))
    content: dict[str, Any] = {
        "ids": ids,
        "answer": _answers(directory, data, tables),
        "methods": [_method(name, table, directory.config.sigmas) for name, table in tables.items()],
        "errors": _errors(directory, tables, ids),
        "pictures": [],
        "gallery": [],
    }
    note = "The images are left out." if not images else _add_images(content, directory, data)
    names = directory.manifest.get("data", {}).get("class_names")
    page = examples_page(data, np.array(labels, np.int64), names, content, note)
    link = Link(_FILE, f"Each of the {len(ids):,} examples: its votes at every level, and what bounds its radius.")
    where = (directory.folder / "report").where(_FILE)
    said = f"examples: {where}" + f" ({note})" * (not content["gallery"])
    return Section(said, (Heading("Examples"), link), {_FILE: page.encode()})


def _answers(directory: RunDirectory, data: ReportData, tables: Mapping[str, pa.Table]) -> list[int]:
    """Predictions of `main_rows`."""
    if data.dual is not None:
        return list(tables[directory.config.certify.routed].column("prediction").to_pylist())
    place = next(i for i, rows in enumerate(data.standard) if rows is main_rows(data))
    return list(tables["standard"].column("prediction").to_pylist()[place :: len(data.standard)])


def _method(name: str, table: pa.Table, sigmas: Sequence[float]) -> dict[str, Any]:
    """The rows of a method by example: sigma, prediction, radius, p_lower, draws, why they ended, votes (selection,
    estimation), draws of each; where it has a router the levels, and what else it says in a number or a word.
    """
    method = method_named(name)
    step = len(sigmas) if method.per_level else 1
    shown = (
        "sigma", "prediction", "radius", "p_lower", "num_draws", "stop_reason", "counts_selection",
        "counts_estimation", "num_selection", "num_estimation",
    )  # fmt: skip
    rows = list(zip(*(_shown(table, each) for each in shown), strict=True))
    found: dict[str, Any] = {
        "name": method.title,
        "rows": [rows[start : start + step] for start in range(0, len(rows), step)],
        "facts": {field.name: _fact(table.column(field.name)) for field in table.schema if _is_fact(field)},
    }
    if "counts_selection_sigma" in table.schema.names:
        found["routers"] = [_levels(row, sigmas) for row in table.to_pylist()]
    return found


def _is_fact(field: pa.Field) -> bool:
    of_a_stage = field.name.startswith(("alpha_", "num_", "stop_", "target_"))
    return not (field.name in CERTIFICATE_SCHEMA.names or pa.types.is_list(field.type) or of_a_stage)


def _fact(values: pa.ChunkedArray) -> Any:
    """A column in words, or its one value; JSON has no infinity."""
    found = values.to_pylist()
    if pa.types.is_floating(values.type):
        down = [x if x is None or not np.isfinite(x) else np.floor(x * 1e4) / 1e4 for x in found]
        found = [None if x is None else f"{x:.4f}" for x in down]
    return found[0] if len(set(found)) == 1 else found


def _shown(table: pa.Table, name: str) -> Sequence[Any]:
    """A column of all methods, as the page has it."""
    if name in ("radius", "p_lower"):
        return floored(column(table, name))
    values: list[Any] = table.column(name).to_pylist()
    return [_most(counts) for counts in values] if name.startswith("counts_") else values


def _most(counts: Sequence[int]) -> list[int]:
    """[class, votes, class, votes, ...], those with the most votes first."""
    votes = np.asarray(counts, np.int64)
    order = np.argsort(-votes, kind="stable")[:_MOST_VOTES]
    return [int(each) for place in order if votes[place] for each in (place, votes[place])]


def _levels(row: Mapping[str, Any], sigmas: Sequence[float]) -> list[list[Any]]:
    """Level by level sigma and the router's votes; under the agreement claim what is shown of it, by what."""
    if row["status"] == ERROR:
        return []
    lines: list[list[Any]] = []
    routers = (row["counts_selection_sigma"], row["counts_estimation_sigma"] or [None] * len(sigmas))
    for place, (sigma, *votes) in enumerate(zip(sigmas, *routers, strict=True)):
        line = [sigma, *votes]
        if "radius_excluded" in row:
            chosen = place == row["sigma_index"]
            excluded, same = row["radius_excluded"][place], row["radius_class"][place]
            num = row["num_estimation"] if chosen else row["num_estimation_level"][place]
            counts = row["counts_estimation"] if chosen else row["counts_estimation_level"][place]
            by = "nothing" if not max(excluded, same) else "class" if same >= excluded else "router"
            by += ", chosen" * chosen + ", binds the radius" * (place == row["binding"])
            numbers = floored(np.array([excluded, same, row["p_lower_level"][place]]))
            line += [None if chosen else numbers[0], *numbers[1:], num, _most(counts), by]
        lines.append(line)
    return lines


def _errors(directory: RunDirectory, tables: Mapping[str, pa.Table], ids: Sequence[str]) -> dict[int, str]:
    """The kind of error by place; the whole message, which may name files of this machine, stays in errors/."""
    places = {example_id: place for place, example_id in enumerate(ids)}
    kinds: dict[int, str] = {}
    for name, table in tables.items():
        bad = failed_examples(table)
        told = ShardStore(directory.folder, f"certificates/{name}").read_errors().to_pylist() if bad else []
        kind = {row["example_id"]: row["error"] for row in told}
        kinds |= {places[each]: f"{method_named(name).title}: {kind.get(each, 'error')}" for each in bad}
    return kinds


# Images


def _add_images(content: dict[str, Any], directory: RunDirectory, data: ReportData) -> str:
    """Fill `gallery` and `pictures`; returns a sentence on them."""
    try:
        images = directory.data("test")
        places = {example_id: place for place, example_id in enumerate(images.example_ids)}
        ours = [places[example_id] for example_id in content["ids"]]
        content["gallery"] = _gallery(directory, data, images, ours)
        if not isinstance(images.images, np.ndarray):
            return ""
        content["pictures"] = [_small(images.image(place)) for place in ours]
    except (DualRSError, OSError, KeyError) as error:
        return f"No images: {error}."
    return "The small images are compressed."


def _gallery(directory: RunDirectory, data: ReportData, images: Dataset, places: Sequence[int]) -> list[dict[str, Any]]:
    """The examples with the largest certificates, the smallest, and the most radius lost to the choice of sigma.

    The noisy copy is the first of the classifier's estimation draws, so it is one that the certificate has seen (drawn
    on the CPU; a run on an accelerator drew others). A certificate of a wrong class counts as smaller than none.
    """
    config, num = directory.config, directory.config.report.gallery
    if data.dual is None or not num:
        return []
    worth = np.where(data.dual.correct, data.dual.radius, -data.dual.radius)
    order = np.argsort(-worth, kind="stable")  # ties in the order of the ids
    tied = int((worth == worth[order[0]]).sum())
    best = "largest certificate" + f" (shared by {tied:,})" * (tied > 1)
    lost = data.lost_by_example()
    wrong = [place for place in np.argsort(-lost, kind="stable")[:num] if lost[place] > 0]
    chosen: dict[int, str] = {}
    parts = {best: order[: min(tied, num)], "large certificate": order[tied:num], "smallest certificate": order[-num:]}
    for why, some in (parts | {"routed wrong": wrong}).items():
        for place in some:
            chosen.setdefault(int(place), why)
    denoiser = load_denoiser(directory.model("denoiser"), code=config.own_code.values()) if config.denoisers else None
    noise = make_noise(config.noise, config.seed, config.noise_version, config.compute.chunk_size)
    shots = []
    for place, why in chosen.items():
        sigma = config.sigmas[data.dual.sigma_choice[place]]  # the choice, certified or not
        clean = torch.from_numpy(images.image(places[place])).float().div(255)[None]
        noisy = torch.empty_like(clean)
        noise.corrupt(noisy, [Copies(clean[0], images.example_ids[places[place]], Phase.ESTIMATION, sigma, 0, 1)])
        shot = {"place": place, "why": why, "clean": _png(clean), "noisy": _png(noisy)}
        if denoiser is not None:
            with torch.no_grad():
                shot["denoised"] = _png(denoiser(noisy, torch.tensor([sigma], dtype=torch.float32)))
        shots.append(shot)
    return shots


def _png(image: torch.Tensor) -> str:
    pixels = image[0].clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return _address(_pillow(pixels), "PNG")


def _small(pixels: NDArray[np.uint8]) -> str:
    image = _pillow(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return _address(image, "WEBP", lossless=max(image.size) <= _SHARP, quality=80)


def _pillow(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    """The image of ``(C, H, W)``; its first channel where these are no colours."""
    return PIL.Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])


def _address(image: PIL.Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
