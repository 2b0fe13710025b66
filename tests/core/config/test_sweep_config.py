import re
from pathlib import Path

import pytest

from core.config import load_config, load_sweep
from core.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "configs/sweeps").glob("*.yaml"))
DIGITS = Path("configs/digits.yaml").absolute()


def write(path: Path, text: str) -> Path:
    file = path / "sweep.yaml"
    file.write_text(f"base: {DIGITS}\ntitle: A sweep\n{text}")
    return file


def test_shipped_sweeps_are_the_ablations_of_the_paper_and_load() -> None:
    swept = {file.stem: load_sweep(file).keys for file in SHIPPED}
    assert swept == {
        "backbone": ("estimator.denoiser", "estimator.backbone"),
        "label_n": ("labels.num_estimation",),
        "lambda": ("estimator.consistency_lambda",),
        "loss": ("estimator.loss", "estimator.consistency_weight"),
        "share": ("dataset.train.share",),
        "sigma_e": ("sigma_e",),
        "sigmas": ("sigmas",),
        "w_r": ("estimator.consistency_weight",),
    }
    weights = [s.config.estimator.consistency_lambda for s in load_sweep(Path("configs/sweeps/lambda.yaml")).settings]
    assert (min(weights), max(weights)) == (10, 60)


def test_load_sweep_grid_is_every_combination_over_the_base(tmp_path: Path) -> None:
    file = write(
        tmp_path, "overrides: [seed=5, 'report.radii=[0]']\ngrid: {sigma_e: [0.5, 0.6], sigmas: [[0.1, 0.2], [0.5]]}"
    )
    sweep = load_sweep(file, ["labels.alpha=0.01"])
    assert [setting.name for setting in sweep.settings] == [
        "sigma_e=0.5_sigmas=0.1,0.2", "sigma_e=0.5_sigmas=0.5", "sigma_e=0.6_sigmas=0.1,0.2", "sigma_e=0.6_sigmas=0.5",
    ]  # fmt: skip
    third = sweep.settings[2]
    assert dict(third.values) == {"sigma_e": 0.6, "sigmas": [0.1, 0.2]}
    assert third.config == load_config(
        DIGITS, ["seed=5", "report.radii=[0]", "labels.alpha=0.01", "sigma_e=0.6", "sigmas=[0.1,0.2]"]
    )
    assert (sweep.classifier, sweep.keys) == ("base", ("sigma_e", "sigmas"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a grid or settings, one of them"),
        ("grid: {seed: [1]}\nsettings: {a: {seed: 1}}", "give a grid or settings, one of them"),
        ("grid: {seed: []}", "seed has no values"),
        ("grid: {seed: [1]}\nfrobnicate: 1", "frobnicate"),
        ("grid: {estimator.lambda: [1]}", r"estimator\.lambda=1|unknown key 'estimator.lambda'"),
        ("grid: {sigma_e: [0.5, 0.1]}", r"setting sigma_e=0.1: sigma_e: must be at least"),
        ("settings: {'../a': {seed: 1}}", "needs a name of letters"),
        ("overrides: [seed=3]\ngrid: {seed: [1]}", "'seed=3' overrides 'seed', which is swept"),
        ("overrides: ['estimator={epochs: 3}']\ngrid: {estimator.lr: [0.1]}", "overrides 'estimator.lr'"),
        ("settings: {a: {sigma_e: 0.5}, b: {}}", "the settings 'a' and 'b' are the same run"),
        ("grid: {report.strict: [true, false]}", "are the same run"),
    ],
)
def test_load_sweep_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_sweep(write(tmp_path, text))
    assert re.search(r"sweep\.yaml", str(caught.value))


def test_load_sweep_base_is_relative_to_the_file_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("base: ../nowhere.yaml\ntitle: x\ngrid: {seed: [1]}")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml"):
        load_sweep(tmp_path / "sweep.yaml")
