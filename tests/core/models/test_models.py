import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import ModelError
from core.files import file_sha256
from core.models.checkpoints import build_denoiser, load_denoiser, load_model, save_model
from core.models.denoiser import OneShotDenoiser, Schedule, alphas_cumprod, trained_unet_config
from core.models.small import SmallConvNet
from tests.helpers.openai_reference import CIFAR, randomised


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
    model = build_denoiser(trained_unet_config(1, 8), "cosine", 4000) if kind == "denoiser" else SmallConvNet(1, 8, 10)
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


def test_small_conv_net_from_24_pixels_on_halves_them_first(tmp_path: Path) -> None:
    for size, stride, side in ((8, 1, 4), (23, 1, 12), (24, 2, 6), (28, 2, 7), (29, 2, 8)):
        model = SmallConvNet.for_images((3, size, size), 10, 8).eval()
        first, last = model.layers[0], model.layers[-1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Linear)
        kernel = (3, 3) if stride == 1 else (5, 5)
        assert (first.kernel_size, first.stride, last.in_features) == (kernel, (stride, stride), 16 * side**2)
        assert first(torch.zeros(1, 3, size, size)).shape[-1] == math.ceil(size / stride)
        save_model(model, tmp_path / "m.safetensors")
        images = torch.rand(2, 3, size, size)
        with torch.inference_mode():
            assert torch.equal(load_model(tmp_path / "m.safetensors")(images), model(images))


def test_save_model_small_network_of_stride_1_is_described_as_ever(tmp_path: Path) -> None:
    """Its file's SHA-256 is in manifests: a new key with its default would change it."""
    save_model(SmallConvNet(1, 8, 10), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["architecture"])
    assert described == {"kind": "small_conv_net", "channels": 1, "size": 8, "num_outputs": 10, "width": 16}


def test_small_unet_has_about_forty_thousand_parameters() -> None:
    assert sum(p.numel() for p in build_denoiser(trained_unet_config(1, 8)).parameters()) == 40_489


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


DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
"""config.json of google/ddpm-cifar10-32."""
LINEAR = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
SIGMAS = torch.tensor([0.12, 0.25, 0.5, 1.0])


def reference_ratio(schedule: Schedule) -> list[float]:
    """sqrt(1 - alpha_bar) / sqrt(alpha_bar) of each timestep, by plain loops."""
    ratio, bar = [], 1.0
    steps = 1000 if schedule == "linear" else 4000
    for t in range(steps):
        if schedule == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * t / (steps - 1)
        else:
            ends = [math.cos(((t + i) / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (0, 1)]
            beta = min(1 - ends[1] / ends[0], 0.999)
        bar *= 1 - beta
        ratio.append(math.sqrt(1 - bar) / math.sqrt(bar))
    return ratio


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_timestep_is_the_first_from_one_with_at_least_the_noise(schedule: Schedule) -> None:
    ratio = reference_ratio(schedule)
    denoiser = OneShotDenoiser(nn.Identity(), schedule, len(ratio))
    sigmas = np.exp(np.random.default_rng(0).uniform(math.log(0.003), math.log(5), 300))
    expected = [next(t for t in range(1, len(ratio)) if ratio[t] >= 2 * sigma) for sigma in sigmas]
    assert [denoiser.timestep(float(sigma)) for sigma in sigmas] == expected


@pytest.mark.parametrize(
    ("rescale", "seen"), [(True, [143.25, 289.5, 496.0, 702.25]), (False, [573, 1158, 1984, 2809])]
)
def test_forward_gives_the_network_rescaled_timesteps_in_floating_point(rescale: bool, seen: list[float]) -> None:
    unet = Predictor(torch.zeros(4, 3, 8, 8))
    OneShotDenoiser(unet, "cosine", 4000, rescale_timesteps=rescale)(torch.rand(4, 3, 8, 8), SIGMAS)
    assert unet.seen[0][1].tolist() == seen


def test_forward_of_a_converted_network_is_the_published_formula(tmp_path: Path) -> None:
    network = randomised(replace(CIFAR, width=32, multipliers=(1, 2), blocks=1, attention_at=(2,)))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    denoiser = load_denoiser(str(tmp_path / "net.pt"), head_dim=16, schedule="cosine-4000")
    torch.manual_seed(1)
    noisy = torch.rand(4, 3, 16, 16) + SIGMAS.view(-1, 1, 1, 1) * torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        got = denoiser(noisy, SIGMAS)
        for row, (sigma, t) in enumerate(zip(SIGMAS, [573, 1158, 1984, 2809], strict=True)):
            bar = 1 / (1 + reference_ratio("cosine")[t] ** 2)
            x_t = math.sqrt(bar) * (2 * noisy[row : row + 1] - 1)
            epsilon = network(x_t, torch.tensor([t * 1000 / 4000]))[:, :3]
            clean = ((x_t - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)).clamp(-1, 1)
            assert torch.allclose(got[row], (clean[0] + 1) / 2, atol=2e-5)
            assert torch.allclose(denoiser(noisy[row : row + 1], sigma[None])[0], got[row], atol=2e-5)
    assert 0.05 < float((got > 0).float().mean()) < 1  # not all clamped


def test_predict_noise_under_autocast_embeds_timesteps_in_float32() -> None:
    denoiser = build_denoiser(trained_unet_config(1, 8), "cosine", 4000).eval()
    copied = copy.deepcopy(denoiser)
    assert denoiser.state_dict().keys() == OneShotDenoiser(denoiser.unet).state_dict().keys()
    seen: list[Tensor] = []
    for model in (denoiser, copied):
        embedding = model.get_submodule("unet.time_embedding")
        embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images, t = torch.rand(3, 1, 8, 8), torch.tensor([573, 1158, 2809])
    with torch.inference_mode():
        plain = denoiser.predict_noise(images, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = denoiser.predict_noise(images, t)
            copied.predict_noise(images, t)
    assert half.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_forward_images_that_the_network_does_not_take_are_refused() -> None:
    denoiser = OneShotDenoiser(Predictor(torch.zeros(1)))
    denoiser.check_images((1, 7, 5, 5))  # says nothing about itself
    deep = {
        "block_out_channels": (4,) * 6,
        "down_block_types": ("DownBlock2D",) * 6,
        "up_block_types": ("UpBlock2D",) * 6,
    }
    denoiser = build_denoiser({**trained_unet_config(3, 256), **deep})
    denoiser.check_images((3, 224, 224))  # as the reference runs ImageNet crops through the 256 network
    with pytest.raises(ModelError, match="takes images of 3 channels, got 1"):
        denoiser(torch.zeros(1, 1, 64, 64), torch.ones(1))
    with pytest.raises(ModelError, match="sides are multiples of 32, got 64x48"):
        denoiser(torch.zeros(1, 3, 64, 48), torch.ones(1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_class_embeds", 10, "num_class_embeds = 10, expected None"),
        ("time_embedding_type", "fourier", "time_embedding_type = 'fourier', expected 'positional'"),
        ("center_input_sample", True, "center_input_sample = True, expected False"),
        ("out_channels", 4, "1 input and 4 output channels, expected 1"),
    ],
)
def test_denoiser_unets_that_one_call_does_not_cover_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_denoiser({**trained_unet_config(1, 8), key: value})
