"""The images behind the numbers: those that Dual RS certifies furthest, and those that it certifies least."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from core.errors import DualRSError
from core.machine.noise import Copies, make_noise
from core.models.checkpoints import load_denoiser
from core.records import Phase
from core.report import Gallery
from distributed.methods.rows import ERROR
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["gallery"]


def gallery(directory: RunDirectory, each: int) -> Gallery | str:
    """The images of the `each` largest and the `each` smallest certificates of Dual RS, clean, noisy and denoised.

    The noisy copy is the first of the classifier's estimation draws, so it is one that the certificate has seen (drawn
    on the CPU; a run on an accelerator drew others). A certificate of a wrong class counts as smaller than none.

    Returns:
        The gallery, or why there is none: this machine may have neither the images nor the models.
    """
    store = ShardStore(directory.folder, f"certificates/{directory.config.certify.routed}")
    if not store.committed():
        return "Dual RS was not run"
    table = store.read()
    table = table.filter(pa.array(np.array(table.column("status").to_pylist()) != ERROR))
    correct = table.column("correct").to_numpy()
    radius = table.column("radius").to_numpy()
    order = np.argsort(-np.where(correct, radius, -radius), kind="stable")  # ties in the order of the ids
    tied = int((correct & (radius == radius[order[0]])).sum()) if len(order) else 0
    rows = table.take([*order[:each], *order[each:][-each:]]).to_pylist()
    config = directory.config
    sigmas = [config.sigmas[row["sigma_index"]] for row in rows]  # the choice, certified or not
    try:
        data = directory.data("test")
        denoiser = (
            load_denoiser(directory.model("denoiser"), code=config.own_code.values()) if config.denoisers else None
        )
        places = {example_id: place for place, example_id in enumerate(data.example_ids)}
        clean = torch.stack([torch.from_numpy(data.image(places[row["example_id"]])) for row in rows]).float() / 255
    except (DualRSError, OSError) as error:
        return str(error)
    noise = make_noise(config.noise, config.seed, config.noise_version, config.compute.chunk_size)
    noisy, captions = torch.empty_like(clean), []
    for number, (image, row, sigma) in enumerate(zip(clean, rows, sigmas, strict=True)):
        first = Copies(image, row["example_id"], Phase.ESTIMATION, sigma, 0, 1)
        noise.corrupt(noisy[number : number + 1], [first])
        captions.append(_caption(row, sigma))
    denoised = None
    if denoiser is not None:
        with torch.no_grad():
            denoised = denoiser(noisy, torch.tensor(sigmas, dtype=torch.float32)).numpy()
    return Gallery(
        captions=tuple(captions),
        clean=clean.numpy(),
        noisy=noisy.clamp(0, 1).numpy(),
        denoised=denoised,
        tied=tied,
    )


def _caption(row: dict[str, Any], sigma: float) -> str:
    answer = (
        "abstained"
        if row["abstained"]
        else f"class {row['prediction']}" + ("" if row["correct"] else " (wrong)") + f", radius {row['radius']:.3f}"
    )
    return f"{row['example_id']}: label {row['label']}, {answer}, sigma {sigma:g}"
