"""What the engine runs: one denoiser (or none) and the heads that vote on its output."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, ModelError
from core.records import Draws

__all__ = ["Denoiser", "Head", "Module", "Network"]

Module = Callable[[Tensor], Tensor]
"""A torch module or function: ``(B, C, H, W)`` float32, pixel scale [0, 1] -> logits ``(B, num_outputs)``."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(B, C, H, W)`` noisy images and ``(B,)`` noise levels -> denoised ``(B, C, H, W)``, pixel scale [0, 1]."""


@dataclass(frozen=True)
class Head:
    """A voter.

    Attributes:
        module: one network, or a pool of experts by noise level.
        num_outputs: width of its logits.
        denoise: whether it reads denoised images (where there is a denoiser), or the noisy ones themselves.
    """

    module: Module | Mapping[float, Module]
    num_outputs: int
    denoise: bool = True


@dataclass(frozen=True, slots=True)
class Lane:
    """Draws that may share a forward pass: they ask the same heads, and the same experts of those."""

    heads: tuple[str, ...]
    expert_sigma: float | None


class Network:
    """Denoiser and heads on one device.

    Args:
        heads: voters by name.
        denoiser: runs before every head; None for networks that take the noisy image itself.
        device: where everything is moved to; modules are put in evaluation mode.
    """

    def __init__(self, heads: Mapping[str, Head], denoiser: Denoiser | None = None, device: str | torch.device = "cpu"):
        self.heads = dict(heads)
        self.denoiser = denoiser
        self.device = torch.device(device)
        self.rows: Counter[str] = Counter()
        """Rows sent through the denoiser and through each head so far, padding included."""
        modules: list[Any] = [denoiser]
        for head in self.heads.values():
            modules.extend(head.module.values() if isinstance(head.module, Mapping) else [head.module])
        for module in modules:
            if isinstance(module, nn.Module):
                module.to(self.device).eval()

    def lane(self, draws: Draws) -> Hashable:
        """The lane of a request.

        Raises:
            ConfigError: for a head that is not there, or a noise level without an expert.
        """
        expert_sigma = None
        for name in draws.heads:
            if name not in self.heads:
                raise ConfigError(f"no network named {name!r}; there are {sorted(self.heads)}")
            module = self.heads[name].module
            if isinstance(module, Mapping):
                if draws.sigma not in module:
                    raise ConfigError(
                        f"no {name} expert for sigma={draws.sigma}; there are experts for {sorted(module)}"
                    )
                expert_sigma = draws.sigma
        return Lane(draws.heads, expert_sigma)

    def __call__(self, lane: Hashable, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Logits of each head of the lane.

        Args:
            lane: as returned by `lane`.
            noisy: ``(B, C, H, W)`` float32.
            sigma: ``(B,)`` float32 noise level of each row.

        Raises:
            ModelError: when a head's output is not ``(B, num_outputs)``.
        """
        assert isinstance(lane, Lane)
        denoised = noisy
        if self.denoiser is not None and any(self.heads[name].denoise for name in lane.heads):
            denoised = self.denoiser(noisy, sigma)
            self.rows["denoiser"] += len(noisy)
        logits = {}
        for name in lane.heads:
            head = self.heads[name]
            module = head.module[lane.expert_sigma] if isinstance(head.module, Mapping) else head.module  # type: ignore[index]
            output = module(denoised if head.denoise else noisy)
            self.rows[name] += len(noisy)
            if output.shape != (len(noisy), head.num_outputs):
                raise ModelError(
                    f"the {name} returned logits of shape {tuple(output.shape)} for a batch of {len(noisy)}; "
                    f"expected ({len(noisy)}, {head.num_outputs}): check its number of classes"
                )
            logits[name] = output
        return logits
