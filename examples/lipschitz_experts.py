"""Smoothed and deterministic experts in one pool: `python examples/lipschitz_experts.py` (a minute on a CPU).

A 1-Lipschitz network certifies without a single noisy copy, a smoothed one reaches what no such network can. A router,
which may be of either kind itself, picks one for each input, and the composition certifies whatever it picks. Here on
scikit-learn's digits, with the smoothed expert that the checkout holds. An argument says how many test images to take.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from core import LipschitzClassifier, MaxMin, RouterCertificate, SmoothedClassifier, Unasked, route, smoothed_router
from core.data.digits import read_digits
from core.models.checkpoints import load_model
from core.procedures.composition import Answer
from core.procedures.confidence import bound_and_radius
from core.procedures.smoothing import certificate
from core.records import Certificate, Sampling

ALPHA, NUM, SIGMA = 0.001, 1000, 0.25
SHAPE, RADII = (1, 8, 8), (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)

train, test = read_digits("train", 500, 0), read_digits("test", 500, 0)
size = int(sys.argv[1]) if len(sys.argv) > 1 else 100
images, labels = test.images[:size], test.labels[:size]
pixels, classes = torch.from_numpy(train.images).float() / 255, torch.from_numpy(train.labels)
ROUTED = 400  # training images that the Lipschitz expert does not see: the routers learn from these


def lipschitz(width: int, num_outputs: int) -> nn.Sequential:
    """Orthogonal layers and MaxMin: 1-Lipschitz by construction, which `LipschitzClassifier` proves anew."""
    inner = (orthogonal(nn.Linear(a, width), orthogonal_map="cayley") for a in (64, width))
    layers = [layer for linear in inner for layer in (linear, MaxMin())]
    return nn.Sequential(nn.Flatten(), *layers, orthogonal(nn.Linear(width, num_outputs), orthogonal_map="cayley"))


def fit(network: nn.Module, loss: Callable[[Tensor], Tensor], places: Tensor, epochs: int, lr: float) -> None:
    """Minimise the mean of a loss of samples, given by their places."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in places[torch.randperm(len(places))].split(128):
            optimizer.zero_grad()
            loss(batch).mean().backward()
            optimizer.step()
        schedule.step()


# The experts. Cross-entropy of logits from which a margin of 1 was taken: wide margins are all that counts.
torch.manual_seed(0)
network = lipschitz(128, 10)


def margin_loss(batch: Tensor) -> Tensor:
    """Cross-entropy at a temperature of 1/5, the true class's logit lowered by 1."""
    logits = network(pixels[batch]) - F.one_hot(classes[batch], 10)
    return F.cross_entropy(5 * logits, classes[batch], reduction="none")


fit(network, margin_loss, torch.arange(ROUTED, len(pixels)), epochs=20, lr=5e-3)
sure = LipschitzClassifier(network, SHAPE, lipschitz=1.0)  # refused if it were more
denoiser, classifier = (load_model(f"models/digits/models/{name}.safetensors") for name in ("denoiser", "classifier"))
noisy = SmoothedClassifier(classifier, 10, SIGMA, denoiser=denoiser)

# What each is worth on the routers' images: its radius where it is right, 0 where it is wrong. 150 votes stand for NUM.
few = noisy.certify_many(train.images[:ROUTED], num_selection=1, num_estimation=150)
shares = [(int(c.counts_estimation[y]) + 0.5) / 151 for c, y in zip(few, train.labels, strict=False)]
worth = torch.tensor(
    [
        (c.radius * (c.prediction == y), bound_and_radius(int(share * NUM), NUM, ALPHA, SIGMA)[1])
        for c, y, share in zip(sure.certify_many(train.images[:ROUTED]), train.labels, shares, strict=False)
    ]
).float()

# Two routers, trained on what they may expect; the deterministic one then on the certified radius itself, which from
# scratch only finds the better of the experts.
keen = lipschitz(32, 2)
plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def routed_radius(batch: Tensor) -> Tensor:
    """Less min over j of max(E_j, R_j), with E_j = (largest score - score j) / sqrt(2)."""
    scores = keen(pixels[batch])
    reach = (scores.max(1, keepdim=True).values - scores) / 2**0.5
    return -torch.maximum(reach, worth[batch]).min(1).values


def expected(batch: Tensor) -> Tensor:
    """Less what the expert that the scores pick is worth."""
    return -((5 * keen(pixels[batch])).softmax(1) * worth[batch]).sum(1)


def expected_of_copies(batch: Tensor) -> Tensor:
    """The same of noisy copies."""
    copies = pixels[batch] + SIGMA * torch.randn(len(batch), *SHAPE)
    return -(plain(copies).softmax(1) * worth[batch]).sum(1)


places = torch.arange(ROUTED)
fit(keen, expected, places, epochs=60, lr=1e-2)
fit(keen, routed_radius, places, epochs=60, lr=2e-3)
fit(plain, expected_of_copies, places, epochs=300, lr=2e-3)

# Certificates of all four, and what becomes of them together.
of_noisy = noisy.certify_many(images, num_estimation=NUM, alpha=ALPHA)
of_sure = sure.certify_many(images)
of_keen = [c.as_router() for c in LipschitzClassifier(keen, SHAPE, lipschitz=1.0).certify_many(images)]
votes = SmoothedClassifier(plain, 2, SIGMA).certify_many(images, num_estimation=NUM, alpha=ALPHA / 2)
of_plain = [smoothed_router(each) for each in votes]


def at(alpha: float, c: Certificate) -> Certificate:
    """What the same votes show at another failure probability."""
    sampling = Sampling(c.num_selection, c.num_estimation, alpha)
    return certificate(c.counts_selection, c.counts_estimation, c.sigma, sampling)


def together(router: RouterCertificate, place: int) -> tuple[float, int]:
    """Radius where the class is right, and draws; the smoothed expert is asked only where it can matter."""
    alpha = ALPHA - router.alpha
    needed = router.choice == 1 or router.excluded[1] < of_sure[place].radius
    c = route(router, [of_sure[place], at(alpha, of_noisy[place]) if needed else Unasked(alpha)])
    assert c.alpha <= ALPHA
    return c.radius * (c.prediction == labels[place]), c.num_draws


def alone(c: Answer, place: int) -> tuple[float, int]:
    """The same of one expert."""
    return c.radius * (c.prediction == labels[place]), c.num_draws


rows = {
    "smoothed expert": [alone(c, place) for place, c in enumerate(of_noisy)],
    "Lipschitz expert": [alone(c, place) for place, c in enumerate(of_sure)],
    "both, smoothed router": [together(router, place) for place, router in enumerate(of_plain)],
    "both, Lipschitz router": [together(router, place) for place, router in enumerate(of_keen)],
}
best = [(max(a[0], b[0]), 0) for a, b in zip(rows["smoothed expert"], rows["Lipschitz expert"], strict=True)]
print(f"{size} test images, proven constant {sure.lipschitz:.8f}; share certified beyond each radius")
print(f"{'':24}" + "".join(f"{r:>6}" for r in RADII) + "   mean radius   draws per image")
for name, values in {**rows, "best in hindsight": best}.items():
    radius, draws = np.array(values).T
    shares = "".join(f"{(radius > r).mean():6.2f}" for r in RADII)
    print(f"{name:24}{shares}{radius.mean():14.4f}{draws.mean():18.0f}")
picked = [sum(router.choice == 0 for router in each) / size for each in (of_plain, of_keen)]
print(f"the Lipschitz expert is picked for {picked[0]:.0%} (smoothed router) and {picked[1]:.0%} (Lipschitz router)")
