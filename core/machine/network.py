"""What the engine runs: one denoiser (or none) and the heads that vote on its output."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import ConfigError, ModelError
from core.machine.row_check import FEW, check_levels, check_rows
from core.machine.user_modules import Traits, evaluating, only_tensor, submodules, traits
from core.records import ESTIMATOR, Draws

__all__ = ["Compile", "Denoiser", "Forward", "Head", "Module", "Network", "Precision", "set_tf32"]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""Of the arithmetic inside the networks; see `Forward`."""

Compile = bool | Literal["graphs"]
"""Whether and how networks are compiled; see `Forward`."""

Module = Callable[[Tensor], Any]
"""A torch module or function: ``(B, C, H, W)``, pixel scale [0, 1] -> logits ``(B, num_outputs)``, or what holds them
(`core.machine.user_modules.only_tensor`). What is required of it: "Your network" in docs/guarantees.md."""

Denoiser = Callable[[Tensor, Tensor], Any]
"""``(B, C, H, W)`` noisy images and ``(B,)`` float32 noise levels -> denoised ``(B, C, H, W)``, pixel scale [0, 1]."""


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

    def autocast(self, device: str) -> torch.autocast:
        """Around a pass on this kind of device; switches autocast off where none is wanted, whatever surrounds it."""
        half = _HALF.get(self.precision)
        return torch.autocast(device, dtype=half, enabled=half is not None)


_log = logging.getLogger(__name__)
_DENOISER = "denoiser"
_DENOISER_KEY: tuple[str, float | None] = (_DENOISER, None)
_AS_THEY_ARE = (torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
"""Types of logits that are compared as they are; half precision and bool are made float32."""
_HALF: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Lane:
    """Draws that may share a forward pass: they ask the same heads, and the same experts of those."""

    heads: tuple[str, ...]
    expert_sigma: float | None


class Network:
    """Denoiser and heads on one device, each called in evaluation mode on images of its own.

    Args:
        heads: voters by name.
        denoiser: runs before every head; None for networks that take the noisy image itself.
        device: where torch modules are moved to, as by their own `to`; functions are not.
        forward: precision, memory order and compilation. On CUDA each call sets the process's TF32 switches to what
            this says, and leaves them so.

    Raises:
        ConfigError: for a head of fewer than two outputs (the estimator: fewer than one), or what cannot be called.
    """

    may_split = True
    """Whether passes may become smaller on the way, when memory runs out."""

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
        """Rows sent through the denoiser and through each head so far, padding included, without those of `check`."""
        self._calls = dict(_named_calls(self.heads, denoiser))
        for (name, _), call in self._calls.items():
            if not callable(call):
                raise ConfigError(f"the {name} is a {type(call).__name__}, expected a torch module or a function")
            if isinstance(call, type):
                raise ConfigError(
                    f"the {name} is the class {call.__name__}, expected an instance: {call.__name__}(...)"
                )
            if isinstance(call, nn.Module):
                call.to(self.device)
                if self.forward.channels_last:
                    call.to(memory_format=torch.channels_last)
        for name, head in self.heads.items():
            _check_width(name, head.num_outputs)
        self._checked: set[tuple[str, float | None]] = set()
        self._traits: dict[tuple[str, float | None], Traits] = {}
        self._compiled: dict[int, Callable[..., Any]] = {}
        """Compiled modules by the id of the original, which `heads` and `denoiser` keep alive."""
        self._modules: list[nn.Module] = []
        self.look()

    def look(self) -> None:
        """Find anew the torch modules inside the networks, and the types that these take.

        Some may have been replaced since, or hung on a module unregistered, and all are then checked anew. Those that
        cannot be seen (`user_modules.submodules`) keep their mode; if that is training mode, `check` refuses what they
        do.

        Raises:
            ConfigError: for a module without weights.
        """
        modules = submodules(*self._calls.values())
        if set(map(id, modules)) != set(map(id, self._modules)):
            self._checked.clear()
        self._modules = modules
        self._traits = {key: traits(call) for key, call in self._calls.items()}
        for (name, _), known in self._traits.items():
            if not known.materialised:
                raise ConfigError(
                    f"the {name} has parameters without values (a lazy module, or the meta device): run it once, or "
                    "load its weights, before"
                )

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
            ModelError: when a network's output has another shape than it must have.
            ConfigError: when torch.compile cannot compile a network (`compute.compile`).
        """
        assert isinstance(lane, Lane)
        outputs = self._outputs(lane, noisy, sigma)
        self.rows.update(dict.fromkeys(outputs, len(noisy)))
        outputs.pop(_DENOISER, None)
        return outputs

    @torch.inference_mode()
    def check(
        self, lane: Hashable, noisy: Tensor, sigma: Tensor, logits: Mapping[str, Tensor], num: int, shape: int
    ) -> None:
        """Once for each network, on the first batch that it votes on: is it a function of each row alone? And once more
        for the denoiser, on the first batch of several noise levels.

        Takes two passes of a few rows, or of `shape` rows where a network may know no other shape.

        Args:
            lane: of the batch.
            noisy: ``(B, C, H, W)``.
            sigma: ``(B,)``, on the host.
            logits: what this network returned for them.
            num: of the rows hold noisy images; the others are padding.
            shape: rows of a pass.

        Raises:
            ModelError: for a network that is random, or whose votes for a row depend on other rows.
        """
        assert isinstance(lane, Lane)
        asked = {(name, self._expert(name, lane)) for name in lane.heads}
        if self._denoises(lane) and bool((sigma != sigma[0]).any()):
            asked.add(_DENOISER_KEY)
        if asked <= self._checked:
            return
        if self._any_batch(asked):
            try:
                self._checked |= self._check(lane, noisy, sigma, logits, num, min(shape, FEW), asked)
                return
            except ModelError:
                raise
            except Exception as error:  # its code may know one shape after all; otherwise it fails below as well
                if shape <= FEW:
                    raise
                _log.debug("a pass of %d rows failed (%s): checking with %d", FEW, error, shape)
        self._checked |= self._check(lane, noisy, sigma, logits, num, shape, asked)

    def any_batch(self, lane: Hashable) -> bool:
        """Whether another number of rows costs nothing but the pass; not where a network may know one shape only."""
        assert isinstance(lane, Lane)
        return self._any_batch({(name, self._expert(name, lane)) for name in lane.heads})

    def _any_batch(self, asked: set[tuple[str, float | None]]) -> bool:
        known = [self._traits[key] for key in asked | {_DENOISER_KEY} if key in self._traits]
        return not self.forward.compile and all(each.any_batch for each in known)

    def _check(
        self,
        lane: Lane,
        noisy: Tensor,
        sigma: Tensor,
        logits: Mapping[str, Tensor],
        num: int,
        shape: int,
        asked: set[tuple[str, float | None]],
    ) -> set[tuple[str, float | None]]:
        """`check` with passes of `shape` rows; returns what of `asked` has been looked at."""
        if whole := shape >= len(noisy):
            rows = torch.arange(len(noisy))
        else:
            rows, num = torch.linspace(0, num - 1, shape).long(), shape
        levels, places = sigma[rows], rows.to(noisy.device)
        votes = {name: values[places] for name, values in logits.items()}

        def ask(images: Tensor, levels: Tensor) -> dict[str, Tensor]:
            return self._outputs(lane, images, levels)

        check_rows(ask, noisy[places], levels.to(noisy.device), num, votes, same_batch=whole)
        if _DENOISER_KEY not in asked or bool((levels == levels[0]).all()):
            return asked - {_DENOISER_KEY}
        check_levels(ask, noisy[places], levels.to(noisy.device))
        return asked

    def _denoises(self, lane: Lane) -> bool:
        return self.denoiser is not None and any(self.heads[name].denoise for name in lane.heads)

    def _outputs(self, lane: Lane, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Denoised images, where there are any, and the logits of each head of the lane."""
        if self.device.type == "cuda":
            set_tf32(self.forward.precision == "tf32")
            if self.forward.compile == "graphs":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        autocast = self.forward.autocast(self.device.type)
        # Not in inference mode: what a network keeps (a table of positions) could not be trained with afterwards, and
        # a function that wants a gradient of its own (purification) could not get one.
        with evaluating(self._modules), autocast, torch.inference_mode(False), torch.no_grad():
            if self.forward.channels_last:
                noisy = noisy.contiguous(memory_format=torch.channels_last)
            outputs, images = {}, noisy
            if self._denoises(lane):
                shape = tuple(noisy.shape)
                denoised = self._ask(_DENOISER_KEY, "sample", shape, noisy, sigma.clone())
                outputs[_DENOISER] = images = denoised.to(self.device, torch.float32)
            for name in lane.heads:
                head, shape = self.heads[name], (len(noisy), self.heads[name].num_outputs)
                given = images if head.denoise else noisy
                found = self._ask((name, self._expert(name, lane)), "logits", shape, given)
                # A copy: the next pass may overwrite what this one has returned, as CUDA graphs do.
                dtype = found.dtype if found.dtype in _AS_THEY_ARE else torch.float32
                outputs[name] = found.to(self.device, dtype, copy=True)
        return outputs

    def _ask(
        self, which: tuple[str, float | None], key: str, shape: tuple[int, ...], images: Tensor, *more: Tensor
    ) -> Tensor:
        """The output of one network, of the expected shape, for a copy of the images: it may write into them."""
        given = images.to(self._traits[which].dtype, copy=True)
        return only_tensor(self._runner(which[0], self._calls[which])(given, *more), which[0], key, shape)

    def _expert(self, name: str, lane: Lane) -> float | None:
        return lane.expert_sigma if isinstance(self.heads[name].module, Mapping) else None

    def _runner(self, name: str, module: Callable[..., Any]) -> Callable[..., Any]:
        """The network itself, or its compiled form."""
        if not self.forward.compile:
            return module
        if id(module) not in self._compiled:
            self._compiled[id(module)] = _compile(name, module, graphs=self.forward.compile == "graphs")
        return self._compiled[id(module)]


def _named_calls(
    heads: Mapping[str, Head], denoiser: Denoiser | None
) -> Iterator[tuple[tuple[str, float | None], Any]]:
    """Every network by its name and, for experts, noise level."""
    if denoiser is not None:
        yield _DENOISER_KEY, denoiser
    for name, head in heads.items():
        pool = head.module if isinstance(head.module, Mapping) else {None: head.module}
        for sigma, module in pool.items():
            yield (name, sigma), module


def _check_width(name: str, num_outputs: object) -> None:
    least = 1 if name == ESTIMATOR else 2  # a single candidate sigma is a choice of one; a single class is no vote
    if not isinstance(num_outputs, Integral) or isinstance(num_outputs, bool) or num_outputs < least:
        raise ConfigError(
            f"the {name} has {num_outputs!r} classes, expected at least {least}: the only class would win every vote; "
            "of a network with one logit z make two, torch.cat([-z, z], dim=1)"
        )


def _compile(name: str, module: Callable[..., Any], *, graphs: bool) -> Callable[..., Any]:
    """torch.compile whose failure is an error: without `fullgraph` it would run parts, or all, uncompiled."""
    compiled = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)

    def run(*inputs: Tensor) -> Any:
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
