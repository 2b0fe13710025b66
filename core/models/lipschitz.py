"""Networks with a proven Lipschitz constant (l2), evaluated in float64 with all rounding accounted for.

A constant that is too small is a false certificate, so none is believed: `VerifiedNetwork` takes a copy of plain layers
and bounds each from its weights. Power iteration approaches a spectral norm from below and proves nothing. The Gram
iteration (Delattre et al. 2023, arXiv 2305.16173) approaches it from above, ||A||^(2^k) <= ||(A A^T)^(2^(k-1))||_F,
and here each of its products carries a bound of its rounding. How the network was trained does not matter: with
`torch.nn.utils.parametrizations.orthogonal`, by a library, with a penalty, or with nothing.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.errors import ModelError

__all__ = ["MaxMin", "VerifiedNetwork", "gram_bound", "layer_bound", "steepest_ratio"]

_K = TypeVar("_K", nn.Linear, nn.Conv2d)

_UNIT = 2.0**-53
_TINY = 1e-280
"""Far above what underflow can lose in a product of matrices that are scaled to a norm of about 1."""
_ROUNDS = 24
"""Squarings: a bound is then at most rank^(1/2^25) of the norm too large, 4e-7 of it for a rank of a million."""
_UP = 1.0 + 8 * _UNIT
_KEEPING = (nn.Identity, nn.Flatten, nn.PixelUnshuffle)
"""Layers that only move numbers; with `MaxMin` and ReLU they are 1-Lipschitz, exact, and take 0 to 0."""
_COMPUTING = {"forward", "_conv_forward", "__call__"}
"""What a layer computes by; a subclass or an object with one of its own is another function than its weights say."""


class MaxMin(nn.Module):
    """The larger and the smaller of each pair of channels (GroupSort of 2, Anil et al. 2019), 1-Lipschitz.

    Channel i of the first half is paired with channel i of the second: ``(B, 2C, ...)`` -> ``(B, 2C, ...)``. It only
    sorts, so it keeps norms, where ReLU loses half of what passes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


class VerifiedNetwork:
    """A frozen float64 copy of a network on the CPU, with what is proven of it.

    Args:
        network: a torch module made of `Sequential`, `Linear`, `Conv2d` (zero padding, or circular), `MaxMin`, `ReLU`,
            `Flatten`, `PixelUnshuffle` and `Identity`, parametrised or not. Its weights as they are now.
        shape: of one input, without the batch.

    Attributes:
        lipschitz: no less than the l2 Lipschitz constant of the whole map, in exact arithmetic.
        num_outputs: width of the logits.

    Raises:
        ModelError: for a layer whose constant is not known, hooks, or weights that are not finite.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        self._layers = [_plain(layer) for layer in _flat(network)]
        self._terms: list[tuple[float, float, float, float]] = []
        x, self.lipschitz = torch.zeros(1, *shape, dtype=torch.float64), 1.0
        for layer in self._layers:
            before, x = tuple(x.shape[1:]), _applied(layer, x)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                norm = layer_bound(layer, before)
                self.lipschitz = max(self.lipschitz * norm * _UP, _TINY)  # what underflows, a later layer may stretch
                self._terms.append((norm, *_size(layer, x[0, 0].numel())))
        if x.ndim != 2 or x.shape[1] < 2:
            raise ModelError(
                f"the network gives {tuple(x.shape[1:])} for one input, expected logits of at least 2 classes"
            )
        self.num_outputs = x.shape[1]

    def __call__(self, inputs: Tensor) -> Tensor:
        """``(B, ...)`` float -> logits ``(B, num_outputs)``, float64."""
        x = inputs.double().cpu()
        for layer in self._layers:
            x = _applied(layer, x)
        return x

    def rounding(self, norm: float) -> float:
        """How far (l2) the logits of an input of at most this norm may be from those in exact arithmetic.

        Each product of n terms is off by at most gamma_n of what it would be with all signs positive, in whatever order
        it is summed (Higham 2002, section 3.1); the layers after it stretch that by their constants.
        """
        error = 0.0
        for constant, absolute, bias, gamma in self._terms:
            error = (constant * error + gamma * (absolute * (norm + error) + bias)) * _UP + _TINY
            norm = (constant * norm + bias) * _UP + _TINY
        return error


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The layers, in order."""
    if module._forward_hooks or module._forward_pre_hooks or _COMPUTING & vars(module).keys():
        raise ModelError(f"a {type(module).__name__} has forward hooks: remove them, what they do is not known here")
    if type(module) is nn.Sequential:
        for layer in module:
            yield from _flat(layer)
    else:
        yield module


def _plain(layer: nn.Module) -> nn.Module:
    """A copy in float64 that no parametrisation, subclass or later training can change."""
    if _computes_as(layer, nn.Linear):
        return _with_weights(nn.Linear(layer.in_features, layer.out_features, layer.bias is not None), layer)
    if _computes_as(layer, nn.Conv2d):
        if layer.dilation != (1, 1) or layer.padding_mode not in ("zeros", "circular"):
            raise ModelError(
                f"a convolution with dilation {layer.dilation} and padding_mode {layer.padding_mode!r} has no known "
                "bound, expected dilation 1 and padding_mode 'zeros' or 'circular'"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "padding_mode")
        same = {name: getattr(layer, name) for name in names}
        return _with_weights(nn.Conv2d(**same, bias=layer.bias is not None), layer)
    if type(layer) in (*_KEEPING, MaxMin, nn.ReLU) and getattr(layer, "start_dim", 1) == 1:
        return nn.ReLU() if type(layer) is nn.ReLU else copy.deepcopy(layer)
    raise ModelError(
        f"the Lipschitz constant of {type(layer).__name__} is not known here, expected Sequential, Linear, Conv2d, "
        "MaxMin, ReLU, Flatten from dimension 1, PixelUnshuffle or Identity"
    )


def _computes_as(layer: nn.Module, kind: type[_K]) -> TypeGuard[_K]:
    """Whether it is one of these, or a subclass that only makes its weights in another way."""
    same = (getattr(type(layer), name, None) is getattr(kind, name, None) for name in _COMPUTING)
    return isinstance(layer, kind) and all(same)


def _with_weights(plain: nn.Linear | nn.Conv2d, layer: nn.Linear | nn.Conv2d) -> nn.Module:
    plain = plain.double().requires_grad_(False)
    for name in ("weight", "bias"):
        if (value := getattr(layer, name)) is not None:
            getattr(plain, name).copy_(value.detach())
            if not torch.isfinite(value).all():
                raise ModelError(f"the {name} of {layer} is not finite")
    return plain


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    if type(layer) is MaxMin and x.shape[1] % 2:
        raise ModelError(f"MaxMin needs an even number of channels, got {x.shape[1]}")
    if (wanted := {nn.Linear: 2, nn.Conv2d: 4}.get(type(layer), x.ndim)) != x.ndim:
        raise ModelError(
            f"{layer} reads inputs of shape {tuple(x.shape[1:])}, expected {wanted - 1} dimensions: Flatten?"
        )
    result: Tensor = layer(x)
    return result


def _gamma(terms: int) -> float:
    """Relative rounding of a sum of so many products, complex ones included: 8 times what real ones need."""
    return 8 * (terms + 8) * _UNIT


def _size(layer: nn.Linear | nn.Conv2d, places: int) -> tuple[float, float, float]:
    """For `rounding`: a bound of the norm of |W|, the norm of the bias at all places, and gamma of one output."""
    weight = layer.weight.abs().reshape(*layer.weight.shape[:2], -1)
    rows, columns = weight.sum((1, 2)).max(), weight.sum((0, 2)).max()
    bias = 0.0 if layer.bias is None else math.sqrt(places) * float(layer.bias.norm())
    up = 1 + _gamma(weight.numel())
    return math.sqrt(float(rows)) * math.sqrt(float(columns)) * up, bias * up, _gamma(weight[0].numel() + 1)


def layer_bound(layer: nn.Linear | nn.Conv2d, shape: Sequence[int]) -> float:
    """No less than the l2 operator norm of a layer on inputs of this shape, its bias aside.

    A convolution with zero padding is a circular one on the torus of the padded input, of which it reads a part and
    keeps a part: neither raises the norm. A stride is one of 1 on the input whose s x s blocks are stacked as channels.
    A circular convolution is block-diagonal in the Fourier basis, so its norm is the largest of one small matrix for
    each frequency. For zero padding that is slightly more than the norm, never less.

    Raises:
        ModelError: for circular padding of more than half of the kernel, or a stride with it that does not divide the
            size.
    """
    weight = layer.weight.detach().numpy()
    if isinstance(layer, nn.Linear):
        return gram_bound(weight)
    torus = []
    for axis, (size, stride, kernel) in enumerate(zip(shape[1:], layer.stride, layer.kernel_size, strict=True)):
        padding = layer.padding
        both = 2 * padding[axis] if isinstance(padding, tuple) else {"same": kernel - 1, "valid": 0}[padding]
        if layer.padding_mode == "circular":
            if both >= kernel or size % stride:
                raise ModelError(f"circular padding of {layer} on {tuple(shape)} reads pixels twice: no bound is known")
            both = 0
        torus.append(math.ceil((size + both) / stride))
        fill = [(0, 0)] * 4
        fill[2 + axis] = (0, -kernel % stride)
        weight = np.pad(weight, fill)
    (high, wide), (down, across) = torus, layer.stride
    out, channels, rows, columns = weight.shape
    blocks = weight.reshape(out, channels, rows // down, down, columns // across, across)
    blocks = blocks.transpose(0, 1, 3, 5, 2, 4).reshape(
        layer.groups, out // layer.groups, -1, rows // down, columns // across
    )
    # What rounding adds to a frequency's matrix: of angles (below 2 pi), of their sines, and of the sums.
    slack = _gamma(sum(blocks.shape[3:]) + 16) * float(np.sqrt((np.abs(blocks).sum((3, 4)) ** 2).sum((1, 2))).max())
    by_row = blocks @ _waves(wide, blocks.shape[4]).T
    bound = 0.0
    for wave in _waves(high, blocks.shape[3])[: high // 2 + 1]:  # the others are complex conjugates
        bound = max(bound, gram_bound(np.einsum("a,gijaw->wgij", wave, by_row)))
    return (bound + slack) * _UP


def _waves(size: int, taps: int) -> NDArray[np.complex128]:
    """exp(-2 pi i f t / size), for f < size and t < taps."""
    turns = (np.arange(size)[:, None] * np.arange(taps)) % size / size
    return np.asarray(np.exp(-2j * np.pi * turns))


def gram_bound(matrices: NDArray[np.float64] | NDArray[np.complex128]) -> float:
    """No less than the largest singular value of any of these matrices, shape ``(..., m, n)``.

    With G_0 = A and G_(i+1) = G_i G_i^H: ||G_i||^2 = ||G_(i+1)||, and the Frobenius norm bounds the last one. The
    computed product is off by at most gamma_n ||G_i||_F^2, which is added on the way back. Each G_i is first scaled by
    a power of two.
    """
    a = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.swapaxes(-1, -2)
    scales, errors = [], []
    for _ in range(_ROUNDS):
        scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(a).max((-2, -1)), _TINY))))
        a = a / scale[..., None, None]
        scales.append(scale)
        errors.append(_gamma(a.shape[-1]) * _frobenius(a) ** 2 + _TINY)
        a = a @ a.conj().swapaxes(-1, -2)
    bound = _frobenius(a)
    for scale, error in zip(reversed(scales), reversed(errors), strict=True):
        bound = scale * np.sqrt((bound + error) * _UP) * _UP
    return float(bound.max())


def _frobenius(a: NDArray[np.float64] | NDArray[np.complex128]) -> NDArray[np.float64]:
    """The Frobenius norm, rounded up."""
    return np.asarray(np.linalg.norm(a, axis=(-2, -1)) * (1 + _gamma(a.shape[-1] * a.shape[-2])))


def steepest_ratio(network: Callable[[Tensor], Tensor], starts: Tensor, steps: int = 100, lr: float = 0.02) -> float:
    """The largest ||f(x) - f(y)|| / ||x - y|| that gradient ascent over pairs finds: no Lipschitz constant is below it.

    It proves a claimed constant wrong, and never right. Networks of others that `VerifiedNetwork` does not know can be
    tried with it.

    Args:
        network: differentiable, ``(B, ...)`` -> ``(B, K)``, row by row.
        starts: ``(B, ...)``, where the pairs begin: the more, and the more different, the better.
        steps: of Adam.
        lr: its rate, in the units of the inputs.
    """
    x = starts.detach().double().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    y = (x.detach() + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)).requires_grad_()
    optimizer = torch.optim.Adam([x, y], lr=lr)
    largest = 0.0
    with torch.enable_grad():
        for _ in range(steps):
            apart = (x - y).flatten(1).norm(dim=1).clamp_min(1e-6)
            ratio = (network(x) - network(y)).norm(dim=1) / apart
            largest = max(largest, float(ratio.detach().max()))
            optimizer.zero_grad()
            (-ratio.clamp_min(1e-300).log().sum()).backward()
            optimizer.step()
    return largest
