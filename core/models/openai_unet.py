"""OpenAI's diffusion U-Nets as diffusers `UNet2DModel`s, exactly: every key is used, no weight is changed.

Two families: improved-diffusion (Nichol & Dhariwal 2021, arXiv 2102.09672; `cifar10_uncond_50M_500K.pt`), whose levels
end in a convolution that halves the image, and guided-diffusion with `resblock_updown` (Dhariwal & Nichol 2021, arXiv
2105.05233; `256x256_diffusion_uncond.pt`), whose levels end in a residual block that does. Of the latter the shapes
alone do not tell the last block of a level from the others; the places of the up-sampling blocks do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import ModelError
from core.models.denoiser import parse_schedule
from core.models.weights import misfits

__all__ = ["ConvertedUNet", "Family", "convert_openai_unet", "is_openai_unet", "published_unet"]

Family = Literal["improved-diffusion", "guided-diffusion"]

_ROOTS = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
_IMAGE_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
"""Image size by channel multipliers, as `create_model` of both repositories pairs them."""
_PUBLISHED: dict[tuple[Any, ...], tuple[str, int, str]] = {
    ("improved-diffusion", (128, 256, 256, 256), 3, (False, True, True, False), 3, 6, "scale_shift"): (
        "cifar10_uncond_50M_500K.pt", 64, "cosine-4000",
    ),
    ("improved-diffusion", (128, 128, 256, 256, 512, 512), 2, (False,) * 4 + (True, False), 3, 6, "default"): (
        "lsun_uncond_100M_2400K_bs64.pt", 512, "linear-1000",
    ),
    ("guided-diffusion", (256, 256, 512, 512, 1024, 1024), 2, (False,) * 3 + (True,) * 3, 3, 6, "scale_shift"): (
        "256x256_diffusion_uncond.pt", 64, "linear-1000",
    ),
}  # fmt: skip
"""Networks whose makers say in their READMEs what no state dict says, by what it does say: family, widths, blocks of a
level, levels with attention, channels in and out, time embedding -> name, channels of a head, noise schedule."""
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class ConvertedUNet:
    """A checkpoint in diffusers' terms.

    Attributes:
        schedule_arguments: of `OneShotDenoiser`, as given or published (the file does not say).
        published: the name of the published network that this is by its shapes, where nothing else was given.
    """

    family: Family
    config: dict[str, Any]
    weights: dict[str, Tensor]
    schedule_arguments: dict[str, Any]
    published: str | None


def is_openai_unet(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys look like one of these networks, whole or damaged."""
    return any(key.startswith(("input_blocks.", "output_blocks.")) for key in state)


def convert_openai_unet(
    state: Mapping[str, Tensor],
    *,
    head_dim: int | None = None,
    schedule: str | None = None,
    source: str = "the state dict",
) -> ConvertedUNet:
    """Convert a state dict of improved-diffusion or guided-diffusion.

    Widths, levels, residual blocks, attention, scale-shift and learned sigma are read from keys and shapes. Heads and
    noise schedule cannot be: they are known of the published networks alone, and asked for otherwise. q, k and v are
    taken in the order of both repositories' defaults.

    Args:
        state: the original state dict.
        head_dim: channels of an attention head (`num_head_channels`, or the width that attends / `num_heads`).
        schedule: the noise schedule that it was trained with, `linear-1000` or the like (`noise_schedule`,
            `diffusion_steps`).
        source: what messages call the state dict.

    Raises:
        ModelError: for another layout, a class-conditional network, or one that a `UNet2DModel` cannot represent;
            names the missing and unexpected keys. For one that is not published, unless both are given.
    """
    family = _family(state, source)
    levels, layers = _depth(state, family, source)
    first = [1 + level * (layers + 1) for level in range(levels)]
    channels = [_shape_of(state, f"input_blocks.{index}.0.out_layers.3.weight", source)[0] for index in first]
    attends = [any(key.startswith(f"input_blocks.{index}.1.") for key in state) for index in first]
    attended = [width for width, attention in zip(channels, attends, strict=True) if attention]
    embedded = state["input_blocks.1.0.emb_layers.1.weight"].shape[:1]
    shift = "scale_shift" if embedded == (2 * channels[0],) else "default"
    inputs = _shape_of(state, "input_blocks.0.0.weight", source)[1]
    outputs = _shape_of(state, "out.2.weight", source)[0]
    shape = (family, tuple(channels), layers, tuple(attends), inputs, outputs, shift)
    known, head_dim, schedule = _unseen(shape, [*attended, channels[-1]], head_dim, schedule, source)
    config, arguments = _described(shape, head_dim, schedule)
    return ConvertedUNet(family, config, _renamed(state, config, layers, head_dim, source), arguments, known)


def published_unet(name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Arguments of `UNet2DModel` and of `OneShotDenoiser` for one of the published networks, by the name of its file;
    None for another name.
    """
    for shape, (file, head_dim, schedule) in _PUBLISHED.items():
        if file == name:
            return _described(shape, head_dim, schedule)
    return None


def _described(shape: tuple[Any, ...], head_dim: int, schedule: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `published_unet` returns, of what a state dict says (see `_PUBLISHED`) and what it does not."""
    family, channels, layers, attends, inputs, outputs, shift = shape
    down, up = zip(*(_block_types(family, attention) for attention in attends), strict=True)
    how = "conv" if family == "improved-diffusion" else "resnet"
    config: dict[str, Any] = {
        "sample_size": _IMAGE_SIZES.get(tuple(width // channels[0] for width in channels)),
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": how,
        "upsample_type": how,
        "downsample_padding": 1,
        "resnet_time_scale_shift": shift,
        "attention_head_dim": head_dim,
        "norm_num_groups": 32,
        # With scale_shift, diffusers gives the middle attention a norm only where this says so.
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    arguments = parse_schedule(schedule)
    # Both repositories' defaults; at 1000 steps they are the same.
    arguments["rescale_timesteps"] = family == "improved-diffusion" or arguments["num_steps"] == 1000
    return config, arguments


def _family(state: Mapping[str, Tensor], source: str) -> Family:
    if any(key.startswith("label_emb.") for key in state):
        raise ModelError(
            f"{source} is a class-conditional network (it has 'label_emb.weight'); one-shot denoising needs an "
            "unconditional one"
        )
    needed = [
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.0.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "middle_block.1.qkv.weight",
        "output_blocks.0.0.in_layers.0.weight",
        "out.2.weight",
    ]
    missing = [key for key in needed if key not in state]
    foreign = [key for key in state if not key.startswith(_ROOTS)]
    families: list[Family] = []
    if any(re.match(r"input_blocks\.\d+\.0\.op\.", key) for key in state):
        families.append("improved-diffusion")
    if any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", key) for key in state):
        families.append("guided-diffusion")
    if missing or foreign or len(families) != 1:
        why = [
            f"missing: {', '.join(missing[:3])}" if missing else "",
            f"unexpected: {', '.join(foreign[:3])}" if foreign else "",
            ""
            if families
            else "missing: both input_blocks.N.0.op.weight (improved-diffusion) and "
            "output_blocks.N.2.in_layers.0.weight (guided-diffusion, resblock_updown)",
            "unexpected: input_blocks.N.0.op.weight beside output_blocks.N.2.in_layers.0.weight"
            if len(families) == 2
            else "",
        ]
        raise ModelError(
            f"{source} is no U-Net of improved-diffusion or guided-diffusion: {'; '.join(part for part in why if part)}"
        )
    return families[0]


def _depth(state: Mapping[str, Tensor], family: Family, source: str) -> tuple[int, int]:
    """Levels and residual blocks per level: upwards each level but the last ends in an up-sampling."""
    kind = "conv" if family == "improved-diffusion" else "in_layers"
    ends = {
        int(match[1]) for match in (re.match(rf"output_blocks\.(\d+)\.[12]\.{kind}\.", key) for key in state) if match
    }
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("output_blocks.")}
    per_level = min(ends, default=0) + 1
    levels = len(blocks) // per_level
    if per_level < 2 or ends != {level * per_level + per_level - 1 for level in range(levels - 1)}:
        raise ModelError(
            f"{source} has up-sampling in output blocks {sorted(ends)} of {len(blocks)}; expected one at the end of "
            "every level but the last, all levels of the same length"
        )
    return levels, per_level - 1


def _shape_of(state: Mapping[str, Tensor], key: str, source: str) -> torch.Size:
    """Shape of a convolution's weight."""
    if key not in state or state[key].ndim != 4:
        found = tuple(state[key].shape) if key in state else "missing"
        raise ModelError(f"{source} is no whole U-Net of OpenAI's: {key} is {found}, expected the weight of a Conv2d")
    return state[key].shape


def _unseen(
    shape: tuple[Any, ...], widths: list[int], head_dim: int | None, schedule: str | None, source: str
) -> tuple[str | None, int, str]:
    """What no shape shows: the published network that this is, channels of a head, noise schedule."""
    widths = sorted(set(widths))
    if shape[0] == "improved-diffusion" and len(widths) > 1:
        raise ModelError(
            f"{source} attends at widths {widths} with one number of heads; a UNet2DModel has one width of a head "
            "instead and cannot represent it"
        )
    name = None
    if (known := _PUBLISHED.get(shape)) and head_dim in (None, known[1]) and schedule in (None, known[2]):
        name, head_dim, schedule = known  # otherwise it is of that shape, and somebody else's
    if head_dim is None or schedule is None:
        published = ", ".join(each for each, *_ in _PUBLISHED.values())
        raise ModelError(
            f"{source} is none of the published networks ({published}), and no state dict says its attention heads and "
            "its noise schedule: give head_dim (--head-dim: num_head_channels, or "
            f"{' and '.join(map(str, widths))} / num_heads) and schedule (--schedule: noise_schedule and "
            "diffusion_steps, linear-1000 or cosine-4000 for example)"
        )
    if any(width % head_dim for width in widths):
        raise ModelError(f"{source} attends at widths {widths}, which heads of {head_dim} do not divide")
    return name, head_dim, schedule


def _block_types(family: Family, attention: bool) -> tuple[str, str]:
    if attention:
        return "AttnDownBlock2D", "AttnUpBlock2D"
    if family == "improved-diffusion":
        return "DownBlock2D", "UpBlock2D"
    return "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"


def _renamed(
    state: Mapping[str, Tensor], config: dict[str, Any], layers: int, head_dim: int, source: str
) -> dict[str, Tensor]:
    """The state dict under diffusers' names, checked key by key and shape by shape against the real network."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        with torch.device("meta"):
            expected = UNet2DModel(**config).state_dict()
    except ValueError as error:  # widths that 32 groups do not divide
        raise ModelError(f"{source} describes a U-Net that cannot be built: {error}") from error
    origin = {key: _original_name(key, layers, state) for key in expected}
    wanted = {name: torch.empty(_shape(name, expected[key]), device="meta") for key, name in origin.items()}
    problem = misfits(wanted, state)
    if problem:
        raise ModelError(f"{source} is not the U-Net that its blocks describe: {problem}")
    return {key: _converted(key, state[name].float(), head_dim) for key, name in origin.items()}


def _original_name(key: str, layers: int, state: Mapping[str, Tensor]) -> str:
    stem, _, kind = key.rpartition(".")
    for prefix, original in (
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if stem == prefix:
            return f"{original}.{kind}"
    parts = stem.split(".")
    if parts[0] == "mid_block":
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])]
        return f"middle_block.{place}.{_inner('.'.join(parts[3:]))}.{kind}"
    # down_blocks.LEVEL.resnets.INDEX.conv1 and the like
    side, level, group, index, inner = parts[0], int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    block = level * (layers + 1) + (layers if group.endswith("samplers") else index)
    root = f"input_blocks.{block + 1}" if side == "down_blocks" else f"output_blocks.{block}"
    if group == "resnets":
        return f"{root}.0.{_inner(inner)}.{kind}"
    if group == "attentions":
        return f"{root}.1.{_inner(inner)}.{kind}"
    if group == "downsamplers":
        return f"{root}.0.{'op' if inner == 'conv' else _inner(inner)}.{kind}"
    place = 2 if f"{root}.1.qkv.weight" in state else 1
    return f"{root}.{place}.{'conv' if inner == 'conv' else _inner(inner)}.{kind}"


def _inner(name: str) -> str:
    return _RESNET.get(name) or _ATTENTION[name]


def _shape(original: str, target: Tensor) -> tuple[int, ...]:
    """The shape of the original of a converted tensor: qkv are one tensor there, and 1x1 convolutions of a sequence."""
    shape = tuple(target.shape)
    if ".qkv." in original:
        shape = (3 * shape[0], *shape[1:])
    if original.endswith((".qkv.weight", ".proj_out.weight")):
        shape = (*shape, 1)
    return shape


def _converted(key: str, tensor: Tensor, head_dim: int) -> Tensor:
    parts = key.split(".")
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        if name in parts:
            # The legacy order: head by head, each with its q, k and v.
            heads = len(tensor) // (3 * head_dim)
            split = tensor.reshape(heads, 3, head_dim, -1)[:, place]
            return split.reshape(heads * head_dim, -1).contiguous() if parts[-1] == "weight" else split.flatten()
    return tensor.squeeze(-1) if key.endswith("to_out.0.weight") else tensor
