"""The gallery of a finished run: which images, and that the noisy copies are those of the certificate."""

from pathlib import Path

import numpy as np
import pytest

from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.gallery import gallery
from tests.helpers.reference_noise import normals
from tests.helpers.runs import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return finished_run(tmp_path_factory.mktemp("run"))


def test_gallery_shows_the_largest_and_the_smallest_certificates_in_order(run: RunDirectory) -> None:
    rows = ShardStore(run.folder, "certificates/dual").read().to_pylist()
    value = {row["example_id"]: row["radius"] if row["correct"] else -row["radius"] for row in rows}
    images = gallery(run, 2)
    assert not isinstance(images, str)
    assert images.tied == list(value.values()).count(max(value.values()))
    shown = [value[caption.split(":")[0]] for caption in images.captions]
    assert shown == [*sorted(value.values())[::-1][:2], *sorted(value.values())[::-1][-2:]]
    for caption in images.captions:
        (row,) = [row for row in rows if row["example_id"] == caption.split(":")[0]]
        answer = "abstained" if row["abstained"] else f"class {row['prediction']}"
        assert f"label {row['label']}, {answer}" in caption


def test_gallery_noisy_copy_is_the_first_of_the_estimation_draws(run: RunDirectory) -> None:
    images = gallery(run, 1)
    assert not isinstance(images, str)
    assert images.denoised is not None
    data = run.data("test")
    for number, caption in enumerate(images.captions):
        example_id, sigma = caption.split(":")[0], float(caption.split()[-1])
        image = data.image(data.example_ids.index(example_id)).astype(np.float32) / 255
        np.testing.assert_array_equal(images.clean[number], image)
        draw = normals(run.config.seed, example_id, "estimation", sigma, 1, image.shape)[0]
        expected = np.clip(image + sigma * draw, 0, 1)
        np.testing.assert_allclose(images.noisy[number], expected, atol=1e-6)
        assert images.denoised[number].min() >= 0
        assert images.denoised[number].max() <= 1


def test_gallery_without_images_or_models_says_why(run: RunDirectory, tmp_path: Path) -> None:
    assert gallery(RunDirectory(tmp_path, run.config), 1) == "Dual RS was not run"
    model = run.model("denoiser")
    aside = model.rename(model.with_suffix(".aside"))
    try:
        assert "denoiser" in str(gallery(run, 1))
    finally:
        aside.rename(model)
