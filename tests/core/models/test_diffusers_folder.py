"""Denoisers in diffusers' own format, and what is refused of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import ConfigError, ModelError
from core.models.checkpoints import build_denoiser, load_denoiser, save_model
from core.models.denoiser import OneShotDenoiser, alphas_cumprod, trained_unet_config
from core.models.diffusers_folder import describe_schedule, write_folder
from core.models.small import SmallConvNet
from tests.core.models.test_models import DDPM_CIFAR10, LINEAR, SIGMAS
from tests.helpers.openai_reference import CIFAR, randomised


def tiny_denoiser(**arguments: Any) -> OneShotDenoiser:
    torch.manual_seed(0)
    config = {
        **trained_unet_config(1, 8),
        "add_attention": True,
        "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    denoiser = build_denoiser(config, **arguments).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser


def same(first: nn.Module, second: nn.Module) -> bool:
    torch.manual_seed(1)
    images = torch.rand(3, 1, 8, 8)
    with torch.inference_mode():
        return torch.equal(first(images, SIGMAS[1:]), second(images, SIGMAS[1:]))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"schedule": "cosine", "num_steps": 4000},
        {"schedule": "linear", "num_steps": 500, "rescale_timesteps": False},
        {"schedule": "linear", "num_steps": 1000, "beta_range": (1e-4, 0.05)},
    ],
)
def test_denoisers_survive_a_folder_and_our_own_format(arguments: dict[str, Any], tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    denoiser = tiny_denoiser(**arguments)
    write_folder(denoiser, tmp_path / "folder")
    loaded = load_denoiser(str(tmp_path / "folder"))
    assert same(denoiser, loaded)
    assert not loaded.training
    save_model(loaded, tmp_path / "own.safetensors")
    again = load_denoiser(tmp_path / "own.safetensors")
    assert same(denoiser, again)
    names = ("schedule", "num_steps", "rescale_timesteps")
    assert [getattr(again, name) for name in names] == [getattr(denoiser, name) for name in names]
    theirs = UNet2DModel.from_pretrained(tmp_path / "folder", use_safetensors=True)
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in denoiser.unet.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "own.safetensors"]


def test_load_denoiser_untrained_needs_a_folder_without_its_weights_only(tmp_path: Path) -> None:
    denoiser = tiny_denoiser(schedule="cosine", num_steps=4000)
    write_folder(denoiser, tmp_path / "folder")
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").unlink()
    found = load_denoiser(str(tmp_path / "folder"), untrained=True)
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (denoiser, found)]
    assert shapes[0] == shapes[1]
    assert (found.schedule, found.num_steps) == ("cosine", 4000)
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*config.json"):
        load_denoiser(str(tmp_path / "folder"), untrained=True)
    with pytest.raises(ModelError, match=r"owner/name' is missing, and neither a config.json nor a published name"):
        load_denoiser("owner/name", untrained=True)


@pytest.mark.parametrize("layout", ["pipeline", "unet of a pipeline", "old names"])
def test_load_denoiser_other_layouts_of_a_folder_give_the_same(layout: str, tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    write_folder(denoiser, tmp_path / "unet")
    source = tmp_path
    if layout == "old names":
        file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            weights = {key.replace(f".{new}.", f".{old}."): value for key, value in weights.items()}
        save_file(weights, file)
        assert any("proj_attn" in key for key in weights)
    else:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "unet" / "scheduler_config.json").rename(tmp_path / "scheduler" / "scheduler_config.json")
        source = tmp_path / "unet" if layout.startswith("unet") else tmp_path
    assert same(denoiser, load_denoiser(str(source)))


def test_google_ddpm_cifar10_config_builds_the_published_network(tmp_path: Path) -> None:
    with torch.device("meta"):
        config = {key: value for key, value in DDPM_CIFAR10.items() if not key.startswith("_")}
        from diffusers.models.unets.unet_2d import UNet2DModel

        unet = UNet2DModel(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    # What its scheduler_config.json says, keys that do not matter here included.
    described = describe_schedule({**LINEAR, "clip_sample": True, "variance_type": "fixed_large"}, "x")
    denoiser = OneShotDenoiser(unet, **described)
    assert [denoiser.timestep(float(sigma)) for sigma in SIGMAS] == [70, 145, 259, 396]
    denoiser.check_images((3, 32, 32))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prediction_type", "v_prediction", "prediction_type is 'v_prediction', one-shot denoising covers 'epsilon'"),
        ("prediction_type", "sample", "prediction_type is 'sample'"),
        ("beta_schedule", "sigmoid", "beta_schedule is 'sigmoid', expected one of linear, squaredcos_cap_v2"),
        ("trained_betas", [0.1, 0.2], "trained_betas"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr is True"),
        ("num_train_timesteps", "many", "is no number"),
        ("beta_end", 2.0, "expected num_train_timesteps >= 2 and 0 < beta_start"),
    ],
)
def test_load_denoiser_schedules_that_are_not_covered_are_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    write_folder(tiny_denoiser(), tmp_path / "d")
    (tmp_path / "d" / "scheduler_config.json").write_text(json.dumps({**LINEAR, key: value}))
    with pytest.raises(ModelError, match=message):
        load_denoiser(tmp_path / "d")


SAMPLERS = (
    *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"),
    *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("DEISMultistep", "UniPCMultistep"),
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_describe_schedule_samplers_that_are_taken_have_its_alphas(name: str) -> None:
    """Against diffusers' own class, for a schedule that is nobody's default."""
    import diffusers

    for plain in (
        {"beta_schedule": "linear", "num_train_timesteps": 500, "beta_start": 3e-4, "beta_end": 0.03},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000},
    ):
        theirs = getattr(diffusers, f"{name}Scheduler")(**plain)
        described = describe_schedule({**plain, "_class_name": f"{name}Scheduler"}, "x")
        bar = alphas_cumprod(described["schedule"], described["num_steps"], described["beta_range"])
        # Theirs are float32; KDPM2 and UniPC may keep the last one away from 0.
        assert np.allclose(theirs.alphas_cumprod.numpy()[:-1], bar[:-1], rtol=2e-3, atol=1e-6)
        assert described["rescale_timesteps"] is False


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, r"scheduler_config\.json: _class_name is None, whose network is not known to be trained as DDPM's"),
        *(
            ({**LINEAR, "_class_name": name}, f"_class_name is '{name}', whose network is not known")
            for name in (
                *("CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"),
                *("KarrasVeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "LCMScheduler", "MyScheduler"),
            )
        ),
        ({"_class_name": "DDPMScheduler"}, "beta_schedule, num_train_timesteps missing, and no network tells what"),
        ({**LINEAR, "beta_end": None}, "beta_end missing, .*: add it, for example"),
        ({**LINEAR, "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is 'cont"),
        ({**LINEAR, "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({**LINEAR, "prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({**LINEAR, "predict_epsilon": False}, "predict_epsilon is False, one-shot denoising covers True only"),
        ({**LINEAR, "auto_map": {"x": "code.Mine"}}, "names code of its own in 'auto_map'"),
    ],
)
def test_load_denoiser_schedulers_that_do_not_say_a_ddpm_are_refused(
    plain: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folder(tiny_denoiser(), tmp_path / "d")
    (tmp_path / "d" / "scheduler_config.json").write_text(json.dumps(plain))
    with pytest.raises(ModelError, match=message):
        load_denoiser(tmp_path / "d")


def test_load_denoiser_two_schedules_in_a_folder_are_refused_where_they_differ(tmp_path: Path) -> None:
    write_folder(tiny_denoiser(), tmp_path / "d")
    (tmp_path / "d" / "scheduler").mkdir()
    second = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    second.write_bytes((tmp_path / "d" / "scheduler_config.json").read_bytes())
    load_denoiser(tmp_path / "d")
    second.write_text(json.dumps({**LINEAR, "beta_end": 0.5}))
    with pytest.raises(ModelError, match=r"scheduler_config\.json' contradict each other: remove the wrong one"):
        load_denoiser(tmp_path / "d")


def test_load_denoiser_says_where_its_schedule_is_from(tmp_path: Path) -> None:
    write_folder(tiny_denoiser(), tmp_path / "d")
    loaded = load_denoiser(tmp_path / "d")
    schedule = "linear-1000 (scheduler_config.json)"
    assert loaded.taken == {"checkpoint": str(tmp_path / "d"), "schedule": schedule, "predicts": "noise"}
    save_model(loaded, tmp_path / "own.safetensors")
    assert load_denoiser(tmp_path / "own.safetensors").taken["schedule"] == "linear-1000 (the file)"
    for given, message in (
        ({"schedule": "linear-1000"}, "says its noise schedule itself; remove schedule"),
        ({"head_dim": 8}, "says its attention heads itself; remove head_dim"),
    ):
        for source in ("d", "own.safetensors"):
            with pytest.raises(ConfigError, match=message):
                load_denoiser(tmp_path / source, **given)
    (tmp_path / "d" / "scheduler_config.json").unlink()
    given_it = load_denoiser(tmp_path / "d", schedule="linear-500")
    assert (given_it.num_steps, given_it.rescale_timesteps) == (500, False)
    assert given_it.taken["schedule"] == "linear-500 (the configuration)"
    network = randomised(replace(CIFAR, width=32, multipliers=(1, 2), blocks=1, attention_at=(2,)))
    torch.save({"net": network.state_dict(), "ema": network.state_dict()}, tmp_path / "net.pt")
    taken = load_denoiser(tmp_path / "net.pt", head_dim=16, schedule="linear-1000").taken
    assert (taken["schedule"], taken["heads"]) == ("linear-1000 (the configuration)", "the configuration")
    assert taken["weights"] == "ema"


def test_load_denoiser_folders_with_two_networks_or_a_latent_space_are_refused(tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    for name in ("unet", "unet_ema"):
        write_folder(denoiser, tmp_path / name)
    with pytest.raises(ModelError, match=r"has unet/ and their moving average unet_ema/: name one of the two"):
        load_denoiser(tmp_path)
    config = json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    (tmp_path / "unet_ema" / "config.json").write_text(json.dumps({**config, "decay": 0.999, "optimization_step": 7}))
    assert same(denoiser, load_denoiser(tmp_path / "unet_ema"))
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"], "vqvae": ["x", "y"]}))
    with pytest.raises(ModelError, match=r"is a latent diffusion model \(it has a vqvae\)"):
        load_denoiser(tmp_path)


def test_load_denoiser_bad_folders_say_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_folder(tiny_denoiser(), folder)
    scheduler, config, file = (
        folder / name for name in ("scheduler_config.json", "config.json", "diffusion_pytorch_model.safetensors")
    )
    with pytest.raises(ModelError, match="holds the bare weights of a diffusers model: give the folder"):
        load_denoiser(file)
    scheduler.unlink()
    with pytest.raises(ModelError, match=r"no scheduler_config\.json, so its noise schedule is unknown: give schedule"):
        load_denoiser(folder)
    assert load_denoiser(folder, schedule="cosine-4000").num_steps == 4000
    scheduler.write_text(json.dumps(LINEAR))
    good = json.loads(config.read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "describes a 'UNet2DConditionModel', expected a 'UNet2DModel'"),
        ({"breadth": 3}, "diffusers cannot build: .*breadth"),
        ({"block_out_channels": [8, 24]}, r"do not fit their architecture: .*of another shape: .* expected \("),
        ({"layers_per_block": 2}, "do not fit their architecture: missing: down_blocks"),
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(ModelError, match=message):
            load_denoiser(folder)
    config.write_text("[1]")
    with pytest.raises(ModelError, match="holds a list, expected a JSON object"):
        load_denoiser(folder)
    config.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*config\.json': No such file"):
        load_denoiser(folder)
    config.write_text(json.dumps(good))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ModelError, match="is truncated or not a readable safetensors file"):
        load_denoiser(folder)
    file.unlink()
    with pytest.raises(ModelError, match=r"no checkpoint at .*diffusion_pytorch_model\.safetensors"):
        load_denoiser(folder)


def test_load_denoiser_other_sources_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be fetched \(.+\): fetch it where .* and name the folder"):
        load_denoiser("google/no-such-ddpm-in-any-cache")
    with pytest.raises(ModelError, match=r"no checkpoint at 'models/net\.pt'"):
        load_denoiser("models/net.pt")
    with pytest.raises(ModelError, match="no checkpoint at '/no/such/folder'"):
        load_denoiser("/no/such/folder")
    save_model(SmallConvNet(1, 8, 10), tmp_path / "c.safetensors")
    with pytest.raises(ModelError, match="holds a SmallConvNet, expected a denoiser"):
        load_denoiser(tmp_path / "c.safetensors")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(ModelError, match=r"no U-Net of .*missing: time_embed\.0\.weight"):
        load_denoiser(tmp_path / "f.safetensors")
