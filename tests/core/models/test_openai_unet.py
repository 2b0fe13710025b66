import resource
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import ModelError
from core.models.checkpoints import assemble_denoiser, load_denoiser
from core.models.denoiser import OneShotDenoiser
from core.models.openai_unet import convert_openai_unet, is_openai_unet
from tests.helpers.openai_reference import CIFAR, IMAGENET, Shape, UNetModel, randomised

LSUN = Shape(128, (1, 1, 2, 2, 4, 4), 2, (16,), heads=1, scale_shift=False)
"""improved-diffusion's, as its README gives the flags: --num_channels 128 --num_res_blocks 2 --num_heads 1
--attention_resolutions 16 --use_scale_shift_norm False --learn_sigma True, linear, 1000 steps."""
SMALL_CIFAR = replace(CIFAR, width=32)  # attends at 64 channels with 4 heads: 16 a head
SMALL_IMAGENET = replace(IMAGENET, width=32, head_dim=16)


def state_on_meta(shape: Shape) -> dict[str, Tensor]:
    with torch.device("meta"):
        return UNetModel(shape).state_dict()


def difference(shape: Shape, size: int, head_dim: int | None, seed: int = 0) -> tuple[float, float]:
    """Largest difference of the converted network from the original at mixed, fractional timesteps; the scale."""
    network = randomised(shape, seed)
    num_original = sum(parameter.numel() for parameter in network.parameters())
    converted = convert_openai_unet(
        network.state_dict(), head_dim=head_dim, schedule="linear-1000" if head_dim else None
    )
    denoiser = assemble_denoiser(converted.config, converted.weights, converted.schedule_arguments, "x")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == num_original
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(2, shape.channels, size, size).normal_(generator=generator)
    t = torch.tensor([12.25, 701.5])
    with torch.inference_mode():
        expected, got = network(x, t), denoiser.unet(x, t).sample
    assert got.shape == expected.shape
    return float((got - expected).abs().max()), float(expected.std())


@pytest.mark.parametrize(
    ("shape", "count", "config"),
    [
        (
            CIFAR,
            52_546_438,
            {
                "sample_size": 32,
                "block_out_channels": (128, 256, 256, 256),
                "layers_per_block": 3,
                "out_channels": 6,
                "attention_head_dim": 64,
                "downsample_type": "conv",
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            },
        ),
        (
            IMAGENET,
            552_814_086,
            {
                "sample_size": 256,
                "block_out_channels": (256, 256, 512, 512, 1024, 1024),
                "layers_per_block": 2,
                "out_channels": 6,
                "attention_head_dim": 64,
                "downsample_type": "resnet",
                "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
                "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
            },
        ),
    ],
    ids=["cifar10", "imagenet"],
)
def test_convert_published_shapes_give_the_published_architecture(
    shape: Shape, count: int, config: dict[str, Any]
) -> None:
    state = state_on_meta(shape)
    assert sum(tensor.numel() for tensor in state.values()) == count
    converted = convert_openai_unet(state)
    assert sum(tensor.numel() for tensor in converted.weights.values()) == count
    assert {key: converted.config[key] for key in config} == config
    steps = ("linear", 1000) if shape is not CIFAR else ("cosine", 4000)
    assert tuple(converted.schedule_arguments.values()) == (*steps, True)
    assert converted.published is not None
    with torch.device("meta"):  # by its name alone
        named = load_denoiser(f"nowhere/{converted.published}", untrained=True)
    shapes = {key: tensor.shape for key, tensor in converted.weights.items()}
    assert {key: tensor.shape for key, tensor in named.unet.state_dict().items()} == shapes
    assert (named.schedule, named.num_steps) == steps
    assert is_openai_unet(state)
    assert not is_openai_unet(converted.weights)


@pytest.mark.parametrize(
    ("shape", "size", "head_dim"),
    [
        (SMALL_CIFAR, 32, 16),
        (SMALL_IMAGENET, 64, 16),
        (replace(SMALL_CIFAR, multipliers=(1, 2), blocks=1, attention_at=(2,), scale_shift=False, heads=1), 8, 64),
        (replace(SMALL_CIFAR, multipliers=(1, 1, 2), attention_at=(), channels=1, learn_sigma=False, heads=2), 8, 32),
        (replace(SMALL_IMAGENET, multipliers=(1, 2, 3), blocks=1, attention_at=(1, 4)), 16, 16),
        (replace(SMALL_IMAGENET, multipliers=(2, 2), attention_at=(2,), scale_shift=False), 8, 16),
    ],
)
def test_convert_shrunk_networks_compute_the_same(shape: Shape, size: int, head_dim: int) -> None:
    if shape.multipliers[0] != 1:
        with pytest.raises(ModelError, match=r"of another shape: .*time_embed\.0\.weight"):
            difference(shape, size, head_dim)  # the embedding is narrower than the first level: diffusers has one width
        return
    largest, scale = difference(shape, size, head_dim)
    assert largest < 2e-5
    assert scale > 0.3


def test_convert_another_head_dim_is_another_network() -> None:
    """The comparison above would see what no shape shows."""
    assert difference(SMALL_CIFAR, 16, 32)[0] > 1e-2


def test_convert_what_a_state_dict_does_not_say_is_asked_for() -> None:
    said = r"is none of the published networks \(cifar10_.*give head_dim .*64 / num_heads\) and sch"
    lsun_like = replace(SMALL_CIFAR, heads=1)  # another number of heads and another schedule: the same shapes
    for shape in (SMALL_CIFAR, lsun_like):
        state = state_on_meta(shape)
        for given in ({}, {"head_dim": 16}, {"schedule": "linear-1000"}):
            with pytest.raises(ModelError, match=said):
                convert_openai_unet(state, **given)
    with pytest.raises(ModelError, match="is none of the published"):
        convert_openai_unet(state_on_meta(SMALL_IMAGENET))
    with pytest.raises(ModelError, match="which heads of 48 do not divide"):
        convert_openai_unet(state, head_dim=48, schedule="linear-1000")
    with pytest.raises(ModelError, match="schedule 'linear': expected linear-STEPS or cosine-STEPS"):
        convert_openai_unet(state, head_dim=16, schedule="linear")
    uneven = state_on_meta(replace(SMALL_CIFAR, multipliers=(1, 2, 3), attention_at=(2, 4)))
    with pytest.raises(ModelError, match=r"attends at widths \[64, 96\] with one number of heads"):
        convert_openai_unet(uneven, head_dim=16, schedule="linear-1000")


def test_convert_published_lsun_network_has_one_head_and_the_linear_schedule() -> None:
    state = state_on_meta(LSUN)
    assert sum(tensor.numel() for tensor in state.values()) == 113_676_678  # "100M"
    converted = convert_openai_unet(state)
    assert converted.published == "lsun_uncond_100M_2400K_bs64.pt"
    assert (converted.config["attention_head_dim"], converted.config["resnet_time_scale_shift"]) == (512, "default")
    denoiser = OneShotDenoiser(torch.nn.Identity(), **converted.schedule_arguments)
    assert denoiser.timestep(0.5) == 259
    # Of the published shape and with another word: somebody else's, of whom nothing else is known.
    with pytest.raises(ModelError, match="is none of the published"):
        convert_openai_unet(state, schedule="cosine-4000")
    theirs = convert_openai_unet(state, schedule="cosine-4000", head_dim=128)
    assert (theirs.published, theirs.config["attention_head_dim"]) == (None, 128)
    assert OneShotDenoiser(torch.nn.Identity(), **theirs.schedule_arguments).timestep(0.5) == 1984


@pytest.mark.parametrize(
    ("shape", "rescales"), [(SMALL_CIFAR, True), (SMALL_IMAGENET, False)], ids=["improved", "guided"]
)
def test_convert_timesteps_beyond_1000_are_rescaled_as_the_repository_does(shape: Shape, rescales: bool) -> None:
    for schedule, expected in (("cosine-4000", rescales), ("linear-1000", True)):
        converted = convert_openai_unet(state_on_meta(shape), head_dim=16, schedule=schedule)
        assert converted.schedule_arguments["rescale_timesteps"] == expected


@pytest.mark.parametrize("shape", [SMALL_CIFAR, SMALL_IMAGENET], ids=["improved", "guided"])
def test_convert_uses_every_key_and_needs_every_key(shape: Shape) -> None:
    state = state_on_meta(shape)
    for key in list(state)[::9]:
        with pytest.raises(ModelError, match=r"the file.*missing"):
            convert_openai_unet(
                {k: v for k, v in state.items() if k != key}, head_dim=16, schedule="linear-1000", source="the file"
            )
    for extra in ("input_blocks.1.9.norm.weight", "output_blocks.0.9.conv.weight", "out.3.weight", "ema.weight"):
        with pytest.raises(ModelError, match=r"unexpected: .*" + extra.replace(".", r"\.")):
            convert_openai_unet({**state, extra: torch.zeros(1)}, head_dim=16, schedule="linear-1000")


def test_convert_foreign_state_dicts_are_refused() -> None:
    state = state_on_meta(SMALL_CIFAR)
    with pytest.raises(ModelError, match=r"class-conditional network \(it has 'label_emb\.weight'\)"):
        convert_openai_unet({**state, "label_emb.weight": torch.zeros(10, 128)})
    with pytest.raises(ModelError, match=r"no U-Net of .*missing: time_embed\.0\.weight.*unexpected: fc\.weight"):
        convert_openai_unet({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ModelError, match="missing: both"):
        convert_openai_unet({key: value for key, value in state.items() if ".op." not in key})
    wide = {**state, "out.0.weight": torch.zeros(7)}
    with pytest.raises(ModelError, match=r"of another shape: out\.0\.weight is \(7,\), expected \(32,\)"):
        convert_openai_unet(wide, head_dim=16, schedule="linear-1000")
    flat = {**state, "out.2.weight": torch.zeros(7)}
    with pytest.raises(ModelError, match=r"out\.2\.weight is \(7,\), expected the weight of a Conv2d"):
        convert_openai_unet(flat, head_dim=16, schedule="linear-1000")


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "size"), [(CIFAR, 32), (IMAGENET, 64)], ids=["cifar10", "imagenet"])
def test_convert_full_size_networks_compute_the_same(shape: Shape, size: int) -> None:
    start = time.perf_counter()
    largest, scale = difference(shape, size, None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"largest difference {largest:.2e} at scale {scale:.2f}, {time.perf_counter() - start:.0f} s, {peak:.1f} GiB")
    assert largest < 1e-4
    assert scale > 0.3
