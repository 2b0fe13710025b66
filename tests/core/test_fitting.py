"""A router for experts that are each right on one half of the images: what to pick is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core import DualSmoothedClassifier, SmoothedClassifier, fit_router
from core.errors import ConfigError, DataError
from core.fitting import ROUTER

SIGMAS = (0.25, 0.5)


class HalfRight(nn.Module):
    """Says class 1 where the image is bright (sign 1) or dark (sign -1), class 0 elsewhere: half-spaces."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, images: Tensor) -> Tensor:
        margin = 4.0 * self.sign * (images - 0.5).sum((1, 2, 3)) / 16**0.5
        return torch.stack([-margin, margin], 1)


def images_of(num: int) -> np.ndarray:
    """Half of them dark, half bright: .6 from the plane, in a unit ball of noise."""
    level = np.where(np.arange(num) % 2, 0.65, 0.35)
    return np.tile(np.rint(255 * level).astype(np.uint8)[:, None, None, None], (1, 1, 4, 4))


def test_fit_router_learns_which_expert_is_right_and_certifies_what_neither_can(
    capsys: pytest.CaptureFixture[str],
) -> None:
    experts = {0.25: HalfRight(-1.0), 0.5: HalfRight(1.0)}
    config = ROUTER.model_copy(update={"epochs": 12, "batch_size": 64})
    images, labels = images_of(300), np.ones(300)
    router = fit_router(images, labels, experts, SIGMAS, 2, num_votes=40, config=config, sigma_e=0.25)
    assert all(expert.training and expert.sign.requires_grad for expert in experts.values()), "they are the caller's"
    said = capsys.readouterr().err
    assert "votes: 600/600" in said
    assert "held-out radius" in said
    again = fit_router(images, labels, experts, SIGMAS, 2, num_votes=40, config=config, sigma_e=0.25, progress=False)
    assert capsys.readouterr().err == ""
    assert all(
        torch.equal(a, b) for a, b in zip(router.state_dict().values(), again.state_dict().values(), strict=True)
    )

    dual = DualSmoothedClassifier(router, experts, SIGMAS, 0.25, 2)
    certificates = dual.certify_many(images_of(20), claim="agreement", num_estimation=1000)
    assert all(each.prediction == 1 and each.radius > 0.2 for each in certificates)
    assert [each.sigma for each in certificates] == [0.25, 0.5] * 10
    for sigma, expert in experts.items():
        alone = SmoothedClassifier(expert, 2, sigma).certify_many(images_of(20), num_estimation=1000)
        assert sum(each.prediction == 1 for each in alone) == 10


def test_fit_router_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ConfigError, match="ascending"):
        fit_router(images_of(4), [1] * 4, HalfRight(1.0), (0.5, 0.25), 2)
    with pytest.raises(ConfigError, match=r"no expert for sigma \[0.5\]"):
        fit_router(images_of(4), [1] * 4, {0.25: HalfRight(1.0)}, SIGMAS, 2)
    with pytest.raises(ConfigError, match="'features'"):
        fit_router(images_of(4), [1] * 4, HalfRight(1.0), SIGMAS, 2, config=type(ROUTER)())
    with pytest.raises(DataError, match="expected 3 images"):
        fit_router(images_of(4), [1] * 3, HalfRight(1.0), SIGMAS, 2)
    with pytest.raises(DataError, match="radius 0 at every sigma"):
        fit_router(images_of(4)[::2], [1] * 2, HalfRight(1.0), SIGMAS, 2, progress=False)
