"""Certificates of Lipschitz networks: closed forms, every point of small balls, and planted errors."""

import math

import pytest
import torch
from torch import Tensor, nn

from core import ABSTAIN, LipschitzClassifier, MaxMin, RoutedCertificate, deterministic, route
from core.errors import ConfigError, DataError, ModelError
from core.models import lipschitz
from core.procedures import composition
from tests.core.models.test_lipschitz import linear

TURNED = torch.tensor([[math.cos(1), math.sin(1)], [-math.sin(1), math.cos(1)]], dtype=torch.float64)


def isometry() -> nn.Sequential:
    """Two classes in the plane, whose certified radius is the distance to the boundary: nothing is given away."""
    return nn.Sequential(linear(*TURNED.tolist()))


def free(network: nn.Module, size: int = 2, constant: float | None = None) -> LipschitzClassifier:
    return LipschitzClassifier(network, (size,), lipschitz=constant, value_range=None)


def random_network(seed: int, classes: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), MaxMin(), nn.Linear(width, width), MaxMin(), nn.Linear(width, classes))


def disc(radius: float, rays: int = 360, rings: int = 12) -> Tensor:
    """Points of the open disc, most of them at its edge."""
    angle = torch.arange(rays, dtype=torch.float64) * 2 * math.pi / rays
    at = radius * torch.cat([torch.linspace(0.1, 0.99, rings - 1), torch.tensor([1 - 1e-6])]).double()
    return (torch.stack([angle.cos(), angle.sin()], -1) * at[:, None, None]).reshape(-1, 2)


def violations(classifier: LipschitzClassifier, inputs: Tensor) -> int:
    """Inputs with a point inside their certified disc where the network's largest logit is another."""
    found = 0
    for x, c in zip(inputs, classifier.certify_many(inputs), strict=True):
        around = classifier.network(x.double() + disc(c.radius))
        found += bool(not c.abstained and (around.argmax(1) != c.prediction).any())
    return found


# Closed forms


def test_certify_linear_network_gives_the_distance_to_the_boundary() -> None:
    inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for x, c in zip(inputs, free(isometry()).certify_many(inputs), strict=True):
        logits = TURNED @ x.double()
        distance = float((logits[0] - logits[1]).abs()) / math.sqrt(2)
        assert distance * (1 - 1e-6) < c.radius < distance
        assert (c.prediction, c.alpha, c.num_draws, c.norm) == (int(logits.argmax()), 0.0, 0, "l2")
        assert c.excluded[c.prediction] == 0.0
        assert c.excluded[1 - c.prediction] == c.radius


def test_certify_distance_function_gives_the_distance() -> None:
    """The larger of x and -x beside the smaller: 2 |x| apart, with a constant of sqrt(2)."""
    network = nn.Sequential(linear([1.0, 0.0], [-1.0, 0.0]), MaxMin())
    for x in (0.25, -0.7, 3.0):
        c = free(network).certify(torch.tensor([x, 1.0]))
        assert abs(x) * (1 - 1e-6) < c.radius < abs(x)
        assert c.prediction == 0
    assert free(network).certify(torch.tensor([0.0, 1.0])).abstained


def test_certify_excluded_classes_are_each_at_their_own_distance() -> None:
    c = free(nn.Sequential(linear([1.0, 0.0], [0.0, 1.0], [0.0, 0.0], bias=0.5))).certify(torch.tensor([0.75, 0.25]))
    assert c.excluded == pytest.approx((0.0, 0.5 / math.sqrt(2), 0.75 / math.sqrt(2)), rel=1e-6)
    assert (c.as_router().choice, c.as_router().excluded, c.as_router().alpha) == (0, c.excluded, 0.0)


# Every point of the ball


def test_certify_small_networks_no_point_of_the_ball_is_of_another_class() -> None:
    inputs = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    certified = 0
    for seed in range(4):
        classifier = free(random_network(seed))
        assert violations(classifier, inputs) == 0
        certified += sum(c.radius > 0.01 for c in classifier.certify_many(inputs))
    assert certified > 20
    assert violations(free(isometry()), inputs) == 0


def routed_at(router: LipschitzClassifier, experts: list[LipschitzClassifier], points: Tensor) -> Tensor:
    answers = torch.stack([expert.network(points).argmax(1) for expert in experts])
    return answers.gather(0, router.network(points).argmax(1)[None])[0]


def routing_violations(pairs: int = 3) -> tuple[int, int]:
    """Of routed networks: false certificates, and those that hold beyond the experts' common radius."""
    inputs, false, further = torch.randn(20, 2, generator=torch.Generator().manual_seed(2)), 0, 0
    for seed in range(pairs):
        router = free(random_network(seed + 50))
        experts = [free(isometry()), free(isometry()), free(random_network(seed))]
        for x in inputs:
            answers = [expert.certify(x) for expert in experts]
            c: RoutedCertificate = route(router.certify(x).as_router(), answers)
            assert (c.alpha, c.num_draws) == (0.0, 0)
            around = routed_at(router, experts, x.double() + disc(c.radius))
            false += bool(not c.abstained and (around != c.prediction).any())
            further += c.radius > min(c.answered)
    return false, further


def test_route_deterministic_networks_no_point_of_the_ball_is_of_another_class() -> None:
    false, further = routing_violations()
    assert false == 0
    assert further > 5


def test_route_where_router_and_expert_turn_in_one_direction_is_exact() -> None:
    """The other expert is picked from x_0 = b on and answers otherwise from x_0 = d on: wrong beyond the larger."""
    for b, d in ((0.5, 0.2), (0.2, 0.5)):
        router = free(nn.Sequential(_half_plane(b)))
        experts = [free(nn.Sequential(_half_plane(9.0))), free(nn.Sequential(_half_plane(d)))]
        x = torch.zeros(2)
        c = route(router.certify(x).as_router(), [expert.certify(x) for expert in experts])
        assert max(b, d) * (1 - 1e-6) < c.radius < max(b, d)
        assert routed_at(router, experts, torch.tensor([[max(b, d) + 1e-6, 0.0]]).double()) != c.prediction


def _half_plane(at: float) -> nn.Linear:
    """Class 0 where x_0 < at, with scores that are sqrt(2) times as far apart as x is from there."""
    layer = linear([-math.sqrt(0.5), 0.0], [math.sqrt(0.5), 0.0])
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([math.sqrt(0.5) * at, -math.sqrt(0.5) * at]))
    return layer


# Rounding


def test_certify_where_float64_has_lost_the_margin_certifies_nothing() -> None:
    """Logits near 1e16 stand two apart, whatever x is: of the computed margin nothing is true."""
    for bias in (1e15, 1e16):
        c = free(nn.Sequential(linear([1.0, 0.0], [0.0, 1.0], bias=bias))).certify(torch.tensor([1.6, 0.9]))
        assert (c.prediction, c.radius) == (ABSTAIN, 0.0)


def test_certify_non_finite_logits_certifies_nothing() -> None:
    network = nn.Sequential(linear([1e200, 0.0], [0.0, 1.0]), linear([1e200, 0.0], [0.0, 1.0]))
    assert free(network).certify(torch.tensor([1.0, 0.0])).abstained


# What is refused


def test_constructor_claimed_constant_that_is_too_small_is_refused() -> None:
    assert free(isometry(), constant=1.0).lipschitz == pytest.approx(1.0)
    doubled = nn.Sequential(linear(*(2 * TURNED).tolist()))
    with pytest.raises(ModelError, match=r"said to have Lipschitz constant 1, .* which refutes it"):
        free(doubled, constant=1.0)
    slack = nn.Sequential(linear([1.0, 0.0], [0.0, 0.0]), linear([0.0, 0.0], [0.0, 1.0]))
    with pytest.raises(ModelError, match="which does not refute it"):
        free(slack, constant=0.5)


def test_certify_what_does_not_fit_is_refused() -> None:
    classifier = LipschitzClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (1, 4, 4))
    with pytest.raises(DataError, match=r"image 1 has shape \(1, 5, 5\), expected \(1, 4, 4\)"):
        classifier.certify_many([torch.rand(1, 4, 4), torch.rand(1, 5, 5)])
    with pytest.raises(DataError, match="image 0"):
        classifier.certify(torch.full((1, 4, 4), 1.5))
    with pytest.raises(ConfigError, match="batch_size"):
        classifier.certify_many(torch.rand(2, 1, 4, 4), batch_size=0)
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    assert classifier.certify_many(images, batch_size=2) == [classifier.certify(image) for image in images]
    assert "num_classes=3" in repr(classifier)


# Planted errors


INPUTS = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))


def test_violations_finds_a_forgotten_root_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = free(isometry())
    assert violations(classifier, INPUTS) == 0
    monkeypatch.setattr(deterministic, "_ROOT", 1.0)
    assert violations(classifier, INPUTS) == 20


def test_violations_finds_a_constant_that_is_too_small() -> None:
    classifier = free(isometry())
    classifier.lipschitz *= 0.99
    assert violations(classifier, INPUTS) == 20


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.99])
def test_constructor_finds_a_proof_that_is_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as power iteration that stopped too soon: two inputs refute it."""
    real = lipschitz.layer_bound
    monkeypatch.setattr(lipschitz, "layer_bound", lambda layer, shape: factor * real(layer, shape))
    with pytest.raises(ModelError, match="the proof is wrong"):
        free(isometry())


def test_routing_violations_finds_reach_and_answer_of_different_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = composition.compose
    monkeypatch.setattr(composition, "compose", lambda reach, stay: real(reach, [stay[0], *stay[:-1]]))
    assert routing_violations()[0] > 0
