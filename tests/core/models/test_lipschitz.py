"""Proven Lipschitz constants: against 40-digit singular values, operators' matrices, exact rounding, and attacks."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from core.errors import ModelError
from core.models.lipschitz import MaxMin, VerifiedNetwork, gram_bound, layer_bound, steepest_ratio


def largest_singular_value(matrix: NDArray[Any]) -> Any:
    """In 40 digits, of the float64 numbers as they are."""
    with mpmath.workdps(40):
        exact = mpmath.matrix([[mpmath.mpc(complex(value)) for value in row] for row in matrix])
        return max(mpmath.svd(exact, compute_uv=False))


@pytest.mark.parametrize("scale", [1.0, 1e-120, 1e140])
@pytest.mark.parametrize("kind", ["square", "wide", "complex", "rank one", "orthogonal", "nearly equal", "graded"])
def test_gram_bound_is_above_the_exact_norm_and_close(kind: str, scale: float) -> None:
    random = np.random.default_rng(0)
    matrix: NDArray[Any] = random.normal(size=(4, 4))
    if kind == "wide":
        matrix = random.normal(size=(2, 7))
    elif kind == "complex":
        matrix = matrix + 1j * random.normal(size=(4, 4))
    elif kind == "rank one":
        matrix = np.outer(matrix[0], matrix[1])
    elif kind == "orthogonal":
        matrix = np.linalg.qr(matrix)[0]
    elif kind == "nearly equal":
        matrix = np.diag([1, 1 - 1e-9, 1 - 1e-12, 0.5]) @ np.linalg.qr(matrix)[0]
    elif kind == "graded":
        matrix = matrix * np.logspace(0, -150, 4)[:, None]
    exact, bound = largest_singular_value(matrix * scale), gram_bound(matrix * scale)
    assert exact <= bound <= exact * (1 + 1e-6)


def test_gram_bound_of_many_is_that_of_the_largest_and_of_nothing_is_tiny() -> None:
    many = np.random.default_rng(0).normal(size=(3, 5, 4, 6))
    assert gram_bound(many) == max(gram_bound(matrix) for matrix in many.reshape(15, 4, 6))
    assert 0.0 <= gram_bound(np.zeros((3, 3))) < 1e-100


CONVOLUTIONS: list[tuple[dict[str, Any], float]] = [
    ({"kernel_size": 3, "padding": 1}, 1.1),
    ({"kernel_size": 3}, 1.15),
    ({"kernel_size": 3, "padding": "same"}, 1.1),
    ({"kernel_size": (3, 1), "padding": (2, 0)}, 1.1),
    ({"kernel_size": 4, "stride": 2, "padding": 1}, 1.15),
    ({"kernel_size": 5, "stride": (2, 3), "padding": 2}, 1.2),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, 1.1),
    # Where patches do not overlap, or on a torus, nothing is given away.
    ({"kernel_size": 2, "stride": 2}, 1 + 1e-6),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, 1 + 1e-6),
    ({"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"}, 1 + 1e-6),
]


@pytest.mark.parametrize(("how", "loose"), CONVOLUTIONS)
def test_layer_bound_of_a_convolution_is_above_the_norm_of_its_whole_matrix(how: dict[str, Any], loose: float) -> None:
    torch.manual_seed(3)
    shape, conv = (4, 6, 8), nn.Conv2d(4, 6, **how).double()
    inputs = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        columns = conv(inputs) - conv(torch.zeros_like(inputs))
    exact = np.linalg.norm(columns.reshape(len(inputs), -1).numpy(), 2)
    assert exact * (1 - 1e-12) <= layer_bound(conv, shape) <= exact * loose


def test_layer_bound_of_zero_padding_is_not_that_of_the_torus_of_the_image() -> None:
    """x[i - 1] - x[i + 1] of six pixels: 2 cos(pi / 7), but on their torus, which has no quarter wave, sqrt(3)."""
    conv = nn.Conv2d(1, 1, (3, 1), padding=(1, 0), bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 0.0, -1.0]).reshape(1, 1, 3, 1))
    assert math.sqrt(3) < 2 * math.cos(math.pi / 7) < layer_bound(conv, (1, 6, 1)) < 2 + 1e-6


def small_network(seed: int = 0) -> nn.Sequential:
    """Of every layer that is known."""
    torch.manual_seed(seed)
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), MaxMin(), nn.PixelUnshuffle(2), nn.Conv2d(16, 6, 2))
    head = nn.Sequential(orthogonal(nn.Linear(6, 4)), MaxMin(), nn.Linear(4, 3))
    return nn.Sequential(convolutions, nn.ReLU(), nn.Identity(), nn.Flatten(), head)


def test_verified_network_evaluates_the_network_and_keeps_its_copy() -> None:
    network, inputs = small_network(), torch.rand(5, 1, 4, 4)
    verified = VerifiedNetwork(network, (1, 4, 4))
    torch.testing.assert_close(verified(inputs).float(), network(inputs))
    before = verified(inputs)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    assert torch.equal(verified(inputs), before)


def linear(*rows: list[float], bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=torch.float64))
        layer.bias.fill_(bias)
    return layer


KNOWN = [
    (nn.Sequential(linear([3.0, 0.0], [0.0, 1.0])), 3.0),
    (nn.Sequential(linear([1.0, 1.0], [1.0, -1.0])), math.sqrt(2)),
    # |z| and -|z| of z = 2 x_0: both move, each by 2.
    (nn.Sequential(linear([2.0, 0.0], [-2.0, 0.0]), MaxMin()), 2 * math.sqrt(2)),
    (nn.Sequential(linear([0.0, 5.0], [1.0, 0.0]), nn.ReLU(), linear([1.0, 0.0], [0.0, 1.0])), 5.0),
]


@pytest.mark.parametrize(("network", "constant"), KNOWN)
def test_verified_network_of_known_constant_is_bounded_closely_and_attacks_reach_it(
    network: nn.Module, constant: float
) -> None:
    verified = VerifiedNetwork(network, (2,))
    assert constant <= verified.lipschitz <= constant * (1 + 1e-6)
    assert constant * 0.999 < steepest_ratio(verified, torch.randn(16, 2)) <= constant * (1 + 1e-9)


def exactly(layers: nn.Sequential, x: Tensor) -> list[Any]:
    """Linear layers and MaxMin in 60 digits."""
    values = [mpmath.mpf(float(value)) for value in x]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [mpmath.fdot(row, values) + bias for row, bias in rows]
        else:
            pairs = list(zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True))
            values = [max(pair) for pair in pairs] + [min(pair) for pair in pairs]
    return values


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e15])
def test_rounding_is_above_what_float64_loses(shift: float) -> None:
    """A large bias that the next layer takes away again: the digits are gone."""
    torch.manual_seed(0)
    first = nn.Linear(6, 8)
    torch.nn.init.uniform_(first.bias, shift - 1, shift + 1)
    layers = nn.Sequential(first, MaxMin(), nn.Linear(8, 3)).double()
    verified, worst = VerifiedNetwork(layers, (6,)), 0.0
    with mpmath.workdps(60):
        for x in torch.rand(20, 6):
            exact = exactly(layers, x)
            off = [float(a - mpmath.mpf(b)) for a, b in zip(exact, verified(x[None])[0].tolist(), strict=True)]
            worst = max(worst, math.hypot(*off))
            assert math.hypot(*off) <= verified.rounding(float(x.double().norm()))
    assert 0 < worst < verified.rounding(math.sqrt(6)) < 1e4 * worst


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), "BatchNorm1d is not known here"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(16, 2)), "Flatten is not known here"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2)), "dilation"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "reflect"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=2, padding_mode="circular"), nn.Flatten()), "twice"),
        (nn.Conv2d(1, 2, 3), "expected logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "expected logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), MaxMin()), "even number of channels"),
        (nn.Sequential(nn.Linear(4, 3), nn.Flatten()), "Flatten"),
        (nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(16, 2))), "hooks"),
        (nn.Sequential(nn.Flatten(), linear([math.nan] * 16, [0.0] * 16)), "not finite"),
    ],
)
def test_verified_network_of_what_has_no_known_constant_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        VerifiedNetwork(network, (1, 4, 4))


def test_verified_network_of_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    with pytest.raises(ModelError, match="Twice is not known"):
        VerifiedNetwork(nn.Sequential(Twice(2, 2)), (2,))
    plain = nn.Linear(2, 2)
    vars(plain)["forward"] = torch.neg
    with pytest.raises(ModelError, match="hooks"):
        VerifiedNetwork(nn.Sequential(plain), (2,))

    class Doubled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
            return 2 * super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]

    class Called(nn.Linear):
        def __call__(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().__call__(input)  # type: ignore[no-any-return]

    for layer, shape in ((Doubled(1, 2, 3), (1, 3, 3)), (Called(2, 2), (2,))):
        with pytest.raises(ModelError, match=f"{type(layer).__name__} is not known"):
            VerifiedNetwork(nn.Sequential(layer, nn.Flatten()), shape)


def test_rounding_and_constant_do_not_underflow() -> None:
    """Weights whose squares, and a product of layers whose norms, are no float64."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6))).double()
    with torch.no_grad():
        for place, layer in enumerate(layers):
            layer.weight.copy_(torch.eye(4, dtype=torch.float64) * (1e-170 if place < 3 else 1e170))  # type: ignore[operator]
    two = VerifiedNetwork(layers[2:4], (4,))
    assert 1e-16 < two.rounding(1.0) < 1e-12
    assert 1.0 <= two.lipschitz < 1.001
    assert VerifiedNetwork(layers, (4,)).lipschitz >= 1.0
