"""What the engine runs: one denoiser (or none) and the heads that vote on its output."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import ConfigError, ModelError
from core.records import Draws

__all__ = ["Compile", "Denoiser", "Forward", "Head", "Module", "Network", "Precision", "set_tf32"]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""Of the arithmetic inside the networks; see `Forward`."""

Compile = bool | Literal["graphs"]
"""Whether and how networks are compiled; see `Forward`."""

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


@dataclass(frozen=True)
class Forward:
    """How the forward passes are computed. Each of these can move the last bits of a logit, hence a vote at a near-tie:
    another value is another base classifier.

    Attributes:
        precision: `float32`: nothing less, TF32 off; `tf32`: matrix products and convolutions of a CUDA device round
            their inputs to 10 bits of mantissa (a CPU computes as in `float32`); `bfloat16`, `float16`: autocast, TF32
            off for what stays float32. Noisy and denoised images, the timestep embedding and what is compared by argmax
            are float32 always. Logits that overflow in float16 are not finite and vote for no class. Half-precision
            logits tie more often; a tie goes to the class with the lower index.
        channels_last: weights and images in the memory order that convolutions on tensor cores want.
        compile: torch.compile, for static shapes and as one graph each; the first pass of a shape takes minutes.
            `graphs`: also recorded as CUDA graphs, which takes the launches of many small kernels off the host; on a
            CPU the same as True.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    compile: Compile = False


_HALF: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
        forward: precision, memory order and compilation. On CUDA each call sets the process's TF32 switches to what
            this says, and leaves them so.
    """

    def __init__(
        self,
        heads: Mapping[str, Head],
        denoiser: Denoiser | None = None,
        device: str | torch.device = "cpu",
        forward: Forward | None = None,
    ):
        self.heads = dict(heads)
        self.denoiser = denoiser
        self.device = torch.device(device)
        self.forward = forward or Forward()
        self.rows: Counter[str] = Counter()
        """Rows sent through the denoiser and through each head so far, padding included."""
        modules: list[Any] = [denoiser]
        for head in self.heads.values():
            modules.extend(head.module.values() if isinstance(head.module, Mapping) else [head.module])
        for module in modules:
            if isinstance(module, nn.Module):
                module.to(self.device).eval()
                if self.forward.channels_last:
                    module.to(memory_format=torch.channels_last)
        self._compiled: dict[int, Callable[..., Tensor]] = {}
        """Compiled modules by the id of the original, which `heads` and `denoiser` keep alive."""

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

        Returns:
            ``(B, num_outputs)`` by head, never of half precision.

        Raises:
            ModelError: when a head's output is not ``(B, num_outputs)``.
            ConfigError: when torch.compile cannot compile a network (`compute.compile`).
        """
        assert isinstance(lane, Lane)
        if self.device.type == "cuda":
            set_tf32(self.forward.precision == "tf32")
            if self.forward.compile == "graphs":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        half = _HALF.get(self.forward.precision)
        # Switched off too where it is not wanted: what is recorded is what was run, whatever surrounds the call.
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return self._logits(lane, noisy, sigma)

    def _logits(self, lane: Lane, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        if self.forward.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        denoised = noisy
        if self.denoiser is not None and any(self.heads[name].denoise for name in lane.heads):
            denoised = self._runner("denoiser", self.denoiser)(noisy, sigma)
            self.rows["denoiser"] += len(noisy)
        logits = {}
        for name in lane.heads:
            head = self.heads[name]
            module = head.module[lane.expert_sigma] if isinstance(head.module, Mapping) else head.module  # type: ignore[index]
            output = self._runner(name, module)(denoised if head.denoise else noisy)
            self.rows[name] += len(noisy)
            if output.shape != (len(noisy), head.num_outputs):
                raise ModelError(
                    f"the {name} returned logits of shape {tuple(output.shape)} for a batch of {len(noisy)}; "
                    f"expected ({len(noisy)}, {head.num_outputs}): check its number of classes"
                )
            if self.forward.compile == "graphs":
                output = output.clone()  # the next pass overwrites what a CUDA graph has returned
            logits[name] = output.float() if output.dtype in _HALF.values() else output
        return logits

    def _runner(self, name: str, module: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The module itself, or its compiled form."""
        if not self.forward.compile:
            return module
        if id(module) not in self._compiled:
            self._compiled[id(module)] = _compile(name, module, graphs=self.forward.compile == "graphs")
        return self._compiled[id(module)]


def _compile(name: str, module: Callable[..., Tensor], *, graphs: bool) -> Callable[..., Tensor]:
    """torch.compile whose failure is an error: without `fullgraph` it would run parts, or all, uncompiled."""
    compiled = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)

    def run(*inputs: Tensor) -> Tensor:
        try:
            return compiled(*inputs)
        except Exception as error:
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

            if not isinstance(error, TorchDynamoException | FailOnRecompileLimitHit):
                raise
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, torch.OutOfMemoryError):
                raise inner from error
            raise ConfigError(
                f"compute.compile: torch.compile cannot compile the {name} for a batch of {len(inputs[0])} "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); set compute.compile=false"
            ) from error

    return run


def set_tf32(allowed: bool) -> None:
    """Switch TF32 on or off for all matrix products and convolutions of this process on CUDA.

    PyTorch's own default is mixed (off for products, on for convolutions). Both of its interfaces are set: what is set
    in one of them alone makes the other raise when it is read.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    if hasattr(torch.backends.cudnn, "conv"):  # PyTorch 2.9 and later
        switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
