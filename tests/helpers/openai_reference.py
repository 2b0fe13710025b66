"""An independent, plain PyTorch implementation of OpenAI's U-Nets under their state-dict names: the tests' oracle.

Follows openai/improved-diffusion (improved_diffusion/unet.py) and openai/guided-diffusion (guided_diffusion/unet.py),
without their fp16 and checkpointing.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Arguments of `UNetModel`."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_at: tuple[int, ...]
    """Down-sampling rates with attention."""
    heads: int | None = None
    """improved-diffusion: heads everywhere; None takes `head_dim` channels a head, as guided-diffusion does."""
    head_dim: int = 64
    updown: bool = False
    """resblock_updown."""
    scale_shift: bool = True
    channels: int = 3
    learn_sigma: bool = True


CIFAR = Shape(128, (1, 2, 2, 2), 3, (2, 4), heads=4)
IMAGENET = Shape(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), updown=True)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    half = width // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32))
    angles = t.float()[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, embedding: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * width if scale_shift else width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resampled(act(norm(x))))
        e = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        out: Tensor = self.skip_connection(self.resampled(x)) + h
        return out


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        size, width, *sides = x.shape
        flat = x.reshape(size, width, -1)
        # Legacy order: heads first, then q, k, v within each.
        qkv = self.qkv(self.norm(flat)).reshape(size * self.heads, 3 * width // self.heads, -1)
        q, k, v = qkv.split(width // self.heads, dim=1)
        scale = (width // self.heads) ** -0.25
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(size, width, -1)
        out: Tensor = flat + self.proj_out(h)
        return out.reshape(size, width, *sides)


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        half: Tensor = self.op(x)
        return half


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        double: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return double


class Stem(nn.Conv2d):
    def forward(self, x: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class UNetModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = self.width = shape.width
        embedding = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def res(width_in: int, width: int, resample: str = "") -> nn.Module:
            return ResBlock(width_in, width, embedding, shape.scale_shift, resample)

        def attention(width: int) -> nn.Module:
            return Attention(width, shape.heads or width // shape.head_dim)

        ch = width * shape.multipliers[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(shape.channels, ch, 3, padding=1)])])
        skips, rate = [ch], 1
        last = len(shape.multipliers) - 1
        for level, multiplier in enumerate(shape.multipliers):
            for _ in range(shape.blocks):
                layers = [res(ch, multiplier * width)]
                ch = multiplier * width
                if rate in shape.attention_at:
                    layers.append(attention(ch))
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(ch)
            if level != last:
                self.input_blocks.append(nn.ModuleList([res(ch, ch, "down") if shape.updown else Down(ch)]))
                skips.append(ch)
                rate *= 2
        self.middle_block = nn.ModuleList([res(ch, ch), attention(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(shape.multipliers))):
            for index in range(shape.blocks + 1):
                layers = [res(ch + skips.pop(), multiplier * width)]
                ch = multiplier * width
                if rate in shape.attention_at:
                    layers.append(attention(ch))
                if level and index == shape.blocks:
                    layers.append(res(ch, ch, "up") if shape.updown else Up(ch))
                    rate //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        outputs = shape.channels * (2 if shape.learn_sigma else 1)
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time_embed(timestep_embedding(t, self.width))
        skips = []
        for block in self.input_blocks:
            for layer in block:  # type: ignore[attr-defined]
                x = layer(x, embedding)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, embedding)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:  # type: ignore[attr-defined]
                x = layer(x, embedding)
        noise: Tensor = self.out(x)
        return noise


def randomised(shape: Shape, seed: int = 0) -> UNetModel:
    """A network with every parameter drawn, those that training starts at zero or one too, and outputs of order one."""
    with torch.device("meta"):
        network = UNetModel(shape)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(parameter, mean=float(name == "weight"), std=0.2, generator=generator)
            else:
                std = parameter[0].numel() ** -0.5 if name == "weight" else 0.1
                nn.init.normal_(parameter, std=std, generator=generator)
    return network.eval()
