"""One-shot diffusion denoising (Carlini et al. 2022, arXiv 2206.10550).

The noise of smoothing, sigma in the pixel scale [0, 1], is 2 sigma on the [-1, 1] scale of diffusion models; after
scaling by sqrt(alpha_bar_t) it is the noise of the timestep t with sqrt((1 - alpha_bar_t) / alpha_bar_t) = 2 sigma. One
call of the noise predictor at that t removes it. The certificate depends on the noise added, never on t.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config.training import DenoiserTrainConfig
from core.errors import ConfigError, ModelError

__all__ = ["OneShotDenoiser", "Schedule", "alphas_cumprod", "parse_schedule", "trained_unet_config"]

Schedule = Literal["linear", "cosine"]

_SMALL = DenoiserTrainConfig()


def parse_schedule(text: str) -> dict[str, Any]:
    """`linear-1000` as the arguments `schedule` and `num_steps` of `OneShotDenoiser`.

    Raises:
        ModelError: for another text.
    """
    found = re.fullmatch(r"(linear|cosine)-([1-9]\d*)", text)
    if found is None or int(found[2]) < 2:
        raise ModelError(f"schedule {text!r}: expected linear-STEPS or cosine-STEPS, for example linear-1000")
    return {"schedule": found[1], "num_steps": int(found[2])}


def alphas_cumprod(
    schedule: Schedule, num_steps: int, beta_range: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    """alpha_bar_t for t = 0 .. num_steps - 1.

    `linear`: betas from 1e-4 to 0.02, scaled by 1000 / num_steps (Ho et al. 2020), or over `beta_range`. `cosine`:
    Nichol & Dhariwal 2021, betas capped at 0.999.
    """
    if schedule == "linear":
        scale = 1000 / num_steps
        betas = np.linspace(*(beta_range or (scale * 1e-4, scale * 0.02)), num_steps, dtype=np.float64)
    else:

        def bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - bar((t + 1) / num_steps) / bar(t / num_steps), 0.999) for t in range(num_steps)])
    return np.asarray(np.cumprod(1.0 - betas), np.float64)


class OneShotDenoiser(nn.Module):
    """x + delta -> the diffusion model's estimate of x, in one call.

    Args:
        unet: noise predictor, a diffusers `UNet2DModel` or a module of your own: ``(B, C, H, W)`` in the diffusion
            scale and ``(B,)`` timesteps
            -> noise ``(B, C or 2C, H, W)`` (the second half, a learned variance, is ignored).
        schedule: the noise schedule that the network was trained with.
        num_steps: its number of timesteps.
        beta_range: first and last beta of a linear schedule; see `alphas_cumprod`.
        rescale_timesteps: give the network t * 1000 / num_steps, in floating point, as improved-diffusion does; at 1000
            steps this is t. Off for networks trained by diffusers on another number of steps.

    Raises:
        ModelError: for a U-Net that takes more than an image and a timestep, or predicts something else than noise for
            each channel (and perhaps a variance).
    """

    _ratio: Tensor
    _signal: Tensor
    _noise: Tensor

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule = "linear",
        num_steps: int = 1000,
        beta_range: tuple[float, float] | None = None,
        rescale_timesteps: bool = True,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.num_steps = num_steps
        self.beta_range = beta_range
        self.rescale_timesteps = rescale_timesteps
        config: Mapping[str, Any] = getattr(unet, "config", {})
        _check_unet(config)
        self._channels: int | None = config.get("in_channels")
        self._stride = 2 ** (len(config.get("block_out_channels", (0,))) - 1)
        if isinstance(embedding := getattr(unet, "time_embedding", None), nn.Module):
            _keep_in_float32(embedding)
        self.unet = unet
        self.own: dict[str, Any] = {}
        """Of a network that is the user's own code: arguments of `core.models.checkpoints.build_own_denoiser`."""
        self.taken: dict[str, Any] = {}
        """What was taken from a checkpoint and what was found elsewhere: plain JSON for the manifest."""
        bar = alphas_cumprod(schedule, num_steps, beta_range)
        tables = {"_ratio": np.sqrt((1 - bar) / bar), "_signal": np.sqrt(bar), "_noise": np.sqrt(1 - bar)}
        for name, table in tables.items():
            dtype = torch.float64 if name == "_ratio" else torch.float32
            self.register_buffer(name, torch.from_numpy(table).to(dtype), persistent=False)

    def timestep(self, sigma: float) -> int:
        """The smallest t >= 1 whose noise is at least `sigma`.

        Raises:
            ModelError: when the schedule ends below `sigma`.
        """
        t = max(1, int(np.searchsorted(self._ratio.cpu().numpy(), 2 * sigma)))
        if t >= self.num_steps:
            raise ModelError(
                f"sigma={sigma} is above the schedule's largest noise level {float(self._ratio[-1]) / 2:.3g}; "
                "use a smaller sigma or another denoiser"
            )
        return t

    def timesteps(self, sigma: Tensor) -> Tensor:
        """`timestep` of each row: ``(B,)`` float levels -> ``(B,)`` int64, without leaving the device."""
        return torch.searchsorted(self._ratio, 2 * sigma.double()).clamp_(1, self.num_steps - 1)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Denoise.

        Args:
            noisy: ``(B, C, H, W)`` float32, pixel scale [0, 1] plus noise.
            sigma: ``(B,)`` noise level of each row.

        Returns:
            ``(B, C, H, W)`` float32 in [0, 1].

        Raises:
            ModelError: for images with other channels than the network's, or a size that it cannot halve as often as it
                does. Other sizes than it was trained on are taken: the reference runs 224-pixel crops through the 256
                network.
        """
        self.check_images(noisy.shape)
        t = self.timesteps(sigma)
        signal, noise = self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)
        scaled = signal * (2 * noisy - 1)
        predicted = self.predict_noise(scaled, t)
        clean = ((scaled - noise * predicted) / signal).clamp(-1, 1)
        return (clean + 1) / 2

    def check_images(self, shape: Sequence[int]) -> None:
        """Raise `ModelError` unless the network takes images ``(..., C, H, W)`` of this shape."""
        channels, height, width = shape[-3:]
        if self._channels is not None and channels != self._channels:
            raise ModelError(f"the denoiser takes images of {self._channels} channels, got {channels}: use another one")
        if height % self._stride or width % self._stride:
            raise ModelError(
                f"the denoiser takes images whose sides are multiples of {self._stride}, got {height}x{width}: "
                "use another one, or crop the images"
            )

    def diffuse(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict_noise` takes, of images in the pixel scale and noise of a standard deviation of 1."""
        signal, level = self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)
        return signal * (2 * images - 1) + level * noise

    def predict_noise(self, scaled: Tensor, t: Tensor) -> Tensor:
        """The noise that the network sees in diffusion-scale images at integer timesteps."""
        given = t.float() * (1000.0 / self.num_steps) if self.rescale_timesteps else t
        output = self.unet(scaled, given)
        predicted: Tensor = output if isinstance(output, Tensor) else output.sample
        return predicted[:, : scaled.shape[1]]


def _check_unet(config: Mapping[str, Any]) -> None:
    """Refuse what one call with an image and a timestep does not cover; `config` is that of a `UNet2DModel`."""
    for key, covered in (
        ("time_embedding_type", "positional"),
        ("class_embed_type", None),
        ("num_class_embeds", None),
        ("center_input_sample", False),
    ):
        if config.get(key, covered) != covered:
            raise ModelError(
                f"the U-Net has {key} = {config[key]!r}, expected {covered!r}: one-shot denoising needs an "
                "unconditional network on integer timesteps and pixels in [-1, 1]"
            )
    channels, outputs = config.get("in_channels"), config.get("out_channels")
    if channels is not None and outputs not in (channels, 2 * channels):
        raise ModelError(
            f"the U-Net has {channels} input and {outputs} output channels, expected {channels} (noise) or "
            f"{2 * channels} (noise and variance)"
        )


def _keep_in_float32(module: nn.Module) -> None:
    """Run `module` outside autocast, as guided-diffusion keeps its time embedding out of half precision.

    By its class, not by a hook or a wrapper: names in the state dict stay, and so do copies.
    """
    kind: Any = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return kind.forward(self, *args, **kwargs)

    if not getattr(kind, "in_float32", False):
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "in_float32": True})


def trained_unet_config(
    channels: int, size: int, train: DenoiserTrainConfig = _SMALL, head_dim: int | None = None
) -> dict[str, Any]:
    """Of the `UNet2DModel` that is trained here; the defaults have about 40 thousand parameters.

    Args:
        channels: of the images.
        size: their sides, in pixels.
        train: widths, depth, attention, normalisation.
        head_dim: channels of an attention head, 8 unless given.

    Raises:
        ConfigError: for attention at a size that no block has, or heads that do not divide the width that attends.
    """
    widths, head_dim = train.channels, head_dim or 8
    sides = [math.ceil(size / 2**level) for level in range(len(widths))]
    if absent := set(train.attention) - set(sides):
        raise ConfigError(
            f"base.denoiser.train.attention: blocks see images of {', '.join(map(str, sides))} pixels a side, got "
            f"{min(absent)}; name some of these"
        )
    attends = [side in train.attention for side in sides]
    # The middle, as wide as the last block, attends where any block does.
    attended = [width for width, each in zip(widths, attends, strict=True) if each] + [widths[-1]] * any(attends)
    if odd := [width for width in attended if width % head_dim]:
        raise ConfigError(f"base.denoiser.head_dim: {head_dim} does not divide {odd[0]}, the channels that attend")
    kinds = ["Attn" * each for each in attends]
    config: dict[str, Any] = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": train.layers,
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
        "norm_num_groups": train.groups,
        "dropout": train.dropout,
        "attention_head_dim": head_dim,
        "add_attention": any(attends),
    }
    # With scale_shift, diffusers gives the middle attention a norm only where this says so.
    shift = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": train.groups}
    return config | (shift if train.scale_shift else {})
