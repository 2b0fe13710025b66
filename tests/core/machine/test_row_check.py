"""Networks that are random or mix rows are refused, and no others."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import DualSmoothedClassifier, SmoothedClassifier
from core.errors import ModelError
from core.machine.engine import Engine, Task
from core.machine.network import Forward, Head, Network
from core.machine.noise import GaussianNoise
from core.models.small import SmallConvNet
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Sampling
from tests.core.machine.test_user_modules import IMAGE, PLANE, certified

# --- random networks, and rows that are mixed


def hidden(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function in which nobody finds the module."""
    holder = iter(itertools.repeat(model))
    return lambda x: next(holder)(x)


def test_certify_hidden_dropout_is_refused_as_random() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3)).train()
    with pytest.raises(ModelError, match="the classifier is not a function of its images"):
        certified(hidden(model), 3)
    with pytest.raises(ModelError, match="the classifier is not a function of its images"):
        certified(lambda x: torch.nn.functional.dropout(PLANE(x), 0.1, training=True))
    certified(hidden(model.eval()), 3)


def norm_then_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3))


def shifted(images: Tensor) -> Tensor:
    """Adds a hundredth of the batch's mean."""
    return PLANE(images + 0.01 * images.mean(dim=0))


def neighbour(images: Tensor) -> Tensor:
    return PLANE(0.9 * images + 0.1 * images.roll(1, 0))


def halves(images: Tensor) -> Tensor:
    one, two = images.chunk(2)
    return PLANE(torch.cat([one + two, one + two]) / 2) if len(one) == len(two) else PLANE(images)


def by_place(images: Tensor) -> Tensor:
    """One fixed noise for each place in the batch."""
    return PLANE(images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


def first_row(images: Tensor) -> Tensor:
    return PLANE(images - 0.1 * images[:1])


def last_row(images: Tensor) -> Tensor:
    return PLANE(images - 0.1 * images[-1:])


def int8(images: Tensor) -> Tensor:
    """Rounded with the scale of the whole batch, coarsely."""
    scale = images.abs().max() / 7
    return PLANE((images / scale).round() * scale)


class Mixing(nn.Module):
    """A plain module, which the check asks with a few rows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


@pytest.mark.parametrize("batch_size", [2, 34, 1000])
@pytest.mark.parametrize("kind", [lambda function: function, Mixing], ids=["function", "module"])
@pytest.mark.parametrize(
    "mixes",
    [shifted, neighbour, halves, by_place, first_row, last_row, int8, norm_then_linear()],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_certify_a_network_that_mixes_rows_is_refused(mixes: Any, kind: Any, batch_size: int) -> None:
    with pytest.raises(ModelError, match="the classifier mixes the rows of a batch"):
        certified(kind(mixes), 3 if isinstance(mixes, nn.Module) else 2, batch_size=batch_size)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_certify_networks_that_do_not_mix_rows_pass_in_any_precision(precision: Any) -> None:
    torch.manual_seed(0)
    for module in (SmallConvNet(1, 4, 2), nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)), PLANE):
        for size in (1, 2, 7, 100):
            network = Network({CLASSIFIER: Head(module, 2)}, forward=Forward(precision))
            engine = Engine(network, GaussianNoise(3), batch_size=size)
            (done,) = engine.run([Task(0, "x", IMAGE, certify(0.5, Sampling(10, 20, 0.01)))])
            assert done.error is None


def test_certify_a_network_of_hard_votes_or_without_finite_logits_is_no_suspect() -> None:
    hard = certified(lambda x: torch.nn.functional.one_hot(PLANE(x).argmax(1), 2).float())
    assert hard == certified(PLANE)
    assert certified(lambda x: torch.full((len(x), 2), torch.nan)).counts_estimation.tolist() == [0, 0]
    assert certified(lambda x: torch.zeros(len(x), 2)).counts_estimation.tolist() == [350, 0]


def test_certify_the_denoiser_is_named_where_it_mixes() -> None:
    with pytest.raises(ModelError, match="the denoiser mixes the rows"):
        certified(PLANE, denoiser=lambda noisy, sigma: noisy - noisy.mean(dim=0))
    with pytest.raises(ModelError, match="the denoiser is not a function"):
        certified(PLANE, denoiser=lambda noisy, sigma: noisy + 0.1 * torch.randn_like(noisy))


LEVELS: dict[str, Callable[[Tensor], Any]] = {
    "first": lambda sigma: sigma[0],
    "last": lambda sigma: sigma[-1],
    "mean": lambda sigma: sigma.mean(),
    "max": lambda sigma: sigma.max(),
    "min": lambda sigma: sigma.min(),
}


@pytest.mark.parametrize("taken", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("batch_size", [7, 100, 1000])
def test_dual_certify_a_denoiser_that_takes_one_level_for_all_rows_is_refused(taken: Any, batch_size: int) -> None:
    """It denoises images of another level wrongly as soon as two levels are in a batch."""

    def dual(denoiser: Any) -> list[int]:
        g = DualSmoothedClassifier(PLANE, PLANE, (0.25, 0.5), 0.6, 2, denoiser=denoiser, denoise_estimator=False)
        images = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 1.0) * 3])
        results = g.certify_many(images, num_selection=50, num_estimation=163, batch_size=batch_size)
        assert {result.sigma for result in results} == {0.25, 0.5}
        return [result.prediction for result in results]

    assert dual(lambda noisy, sigma: noisy * (1 - 0.1 * sigma.view(-1, 1, 1, 1))) == [0, 1] * 3
    with pytest.raises(ModelError, match="the denoiser mixes the noise levels of a batch"):
        dual(lambda noisy, sigma: noisy * (1 - 0.1 * taken(sigma)))
    # With a single level it is right, padding included.
    honest = certified(PLANE, batch_size=batch_size, denoiser=lambda noisy, sigma: noisy * 0.95)
    assert certified(PLANE, batch_size=batch_size, denoiser=lambda noisy, sigma: noisy * (1 - 0.1 * taken(sigma))) == (
        honest
    )


@pytest.mark.parametrize("offset", [20.0, -200.0])
def test_certify_what_all_logits_have_in_common_hides_no_mixing(offset: float) -> None:
    for mixes in (norm_then_linear(), by_place):
        with pytest.raises(ModelError, match="the classifier mixes the rows of a batch"):
            certified(lambda x, mixes=mixes: mixes(x) + offset, 3 if isinstance(mixes, nn.Module) else 2)
    assert certified(lambda x: PLANE(x) + offset).prediction == certified(PLANE).prediction


def test_certify_a_network_that_was_replaced_is_looked_at_again() -> None:
    holder: dict[str, Any] = {"net": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    g = SmoothedClassifier(lambda x: holder["net"](x), 3, 0.5)
    g.certify(IMAGE, num_estimation=100)
    holder["net"] = norm_then_linear()
    with pytest.raises(ModelError, match="the classifier mixes the rows of a batch"):
        g.certify(IMAGE, num_estimation=100)


def test_certify_a_module_that_knows_one_batch_shape_is_checked_with_that() -> None:
    class Fixed(Mixing):
        def forward(self, images: Tensor) -> Tensor:
            return self.function(images.view(100, 1, 4, 4))

    def fixed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        module = Fixed(function)
        return lambda images: module(images)

    # A function's batches are filled up to one shape; a module's follow the work.
    assert certified(fixed(PLANE)) == certified(PLANE)
    with pytest.raises(ModelError, match="the classifier mixes the rows of a batch"):
        certified(fixed(shifted))
    for network, size in ((Fixed(PLANE), 1000), (fixed(PLANE), 33)):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            certified(network, batch_size=size)


def test_certify_a_network_that_changes_from_pass_to_pass_is_refused() -> None:
    passes = itertools.count()
    with pytest.raises(ModelError, match="the classifier is not a function"):
        certified(lambda x: PLANE(x) * (1 if next(passes) % 2 else -1))

    class Warms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, images: Tensor) -> Tensor:
            self.passes += 1
            return PLANE(images) * (1 if self.passes > 1 else -1)

    with pytest.raises(ModelError, match="the classifier votes otherwise for the same images"):
        certified(Warms())


def test_certify_checks_each_network_once_and_draws_nothing_of_the_process() -> None:
    shapes: list[int] = []

    class Counts(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            shapes.append(len(images))
            return PLANE(images)

    torch.manual_seed(5)
    g = SmoothedClassifier(Counts(), 2, 0.5)
    for _ in range(2):
        g.certify(IMAGE, num_selection=100, num_estimation=100, batch_size=100)
    assert shapes == [100, 32, 32, 100, 100, 100]
    assert g._network.rows == {CLASSIFIER: 400}
    expected = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
