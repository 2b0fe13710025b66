from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import ModelError
from core.files import file_sha256
from core.models.checkpoints import build_denoiser, load_model, save_model
from core.models.denoiser import OneShotDenoiser, Schedule, alphas_cumprod, small_unet_config
from core.models.small import SmallConvNet


class Predictor(nn.Module):
    """A noise predictor that knows the clean image, or answers what it is told."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, scaled: Tensor, t: Tensor):  # type: ignore[no-untyped-def]
        self.seen.append((scaled, t))
        return type("Output", (), {"sample": self.answer})


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [("cosine", 4000, [573, 1158, 1984, 2809]), ("linear", 1000, [70, 145, 259, 396])],
)
def test_timestep_published_schedules_give_the_reference_table(
    schedule: Schedule, num_steps: int, expected: list[int]
) -> None:
    denoiser = OneShotDenoiser(nn.Identity(), schedule, num_steps)
    sigmas = [0.12, 0.25, 0.5, 1.0]
    assert [denoiser.timestep(sigma) for sigma in sigmas] == expected
    assert denoiser.timesteps(torch.tensor(sigmas)).tolist() == expected
    assert denoiser.timestep(1e-9) == 1


def test_timestep_beyond_the_schedule_raises() -> None:
    with pytest.raises(ModelError, match="above the schedule's largest noise level"):
        OneShotDenoiser(nn.Identity(), "linear", 1000).timestep(1000.0)


def test_forward_with_the_true_noise_returns_the_clean_image() -> None:
    torch.manual_seed(0)
    clean, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma = torch.tensor([0.12, 0.25, 0.5, 1.0])
    bar = torch.from_numpy(alphas_cumprod("linear", 1000))[[70, 145, 259, 396]].float().view(-1, 1, 1, 1)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    scaled = bar.sqrt() * (2 * noisy - 1)
    true = (scaled - bar.sqrt() * (2 * clean - 1)) / (1 - bar).sqrt()
    unet = Predictor(torch.cat([true, torch.full_like(true, 9.0)], dim=1))  # learned sigma: 2C channels, half ignored
    assert torch.allclose(OneShotDenoiser(unet)(noisy, sigma), clean, atol=1e-5)
    assert torch.allclose(unet.seen[0][0], scaled)
    assert unet.seen[0][1].tolist() == [70, 145, 259, 396]
    # The scaled noise has the level that the timestep stands for, to within a step of the table.
    assert torch.allclose(((1 - bar) / bar).sqrt().flatten(), 2 * sigma, rtol=0.02)


def test_forward_clamps_to_the_pixel_scale() -> None:
    unet = Predictor(torch.full((1, 1, 2, 2), -50.0))
    assert torch.equal(OneShotDenoiser(unet)(torch.zeros(1, 1, 2, 2), torch.tensor([0.5])), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("kind", ["denoiser", "classifier"])
def test_save_model_then_load_model_gives_the_same_outputs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_denoiser(small_unet_config(1, 8), "cosine", 4000) if kind == "denoiser" else SmallConvNet(1, 8, 10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "models" / "m.safetensors"
    save_model(model, path)
    loaded = load_model(path)
    args = (torch.rand(5, 1, 8, 8), torch.full((5,), 0.5))[: 2 if kind == "denoiser" else 1]
    with torch.inference_mode():
        assert torch.equal(loaded(*args), model.eval()(*args))
    assert not loaded.training
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]
    first = file_sha256(path)
    save_model(loaded, path)
    assert file_sha256(path) == first


def test_small_unet_has_about_forty_thousand_parameters() -> None:
    assert sum(p.numel() for p in build_denoiser(small_unet_config(1, 8)).parameters()) == 40_489


def test_load_model_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint at"):
        load_model(tmp_path / "none.safetensors")
    good = tmp_path / "good.safetensors"
    save_model(SmallConvNet(1, 8, 10), good)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_model(truncated)
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"a": torch.zeros(1)}, pickled)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_model(pickled)
    bare = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, bare)
    with pytest.raises(ModelError, match="does not say which architecture"):
        load_model(bare)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign, metadata={"architecture": '{"kind": "os.system"}'})
    with pytest.raises(ModelError, match=r"holds a 'os\.system'; known kinds"):
        load_model(foreign)
    for header in ("no json", "[1]", "7", '{"kind": "small_conv_net", "wide": 1}'):
        save_file({"a": torch.zeros(1)}, foreign, metadata={"architecture": header})
        with pytest.raises(ModelError, match=r"foreign\.safetensors"):
            load_model(foreign)
    misfit = tmp_path / "misfit.safetensors"
    save_file(
        {"a": torch.zeros(1)},
        misfit,
        metadata={"architecture": '{"kind": "small_conv_net", "channels": 1, "size": 8, "num_outputs": 10}'},
    )
    with pytest.raises(ModelError, match="do not fit their architecture"):
        load_model(misfit)
    with pytest.raises(ModelError, match="do not know how to describe a Linear"):
        save_model(nn.Linear(1, 1), tmp_path / "x.safetensors")
