"""Certify a torch model of your own: `python examples/certify_own_model.py` (seconds on a CPU).

The model here is a small network that is trained on scikit-learn's digits with noise; yours is any module or function
from images in [0, 1] plus noise to logits.
"""

import torch
from torch import nn

from core import SmoothedClassifier
from core.config import DatasetConfig
from core.data import load_dataset
from core.machine.cpu import settle

SIGMA = 0.25

# Your model and your images.
torch.manual_seed(0)
settle(1)
train, test = load_dataset(DatasetConfig(), "train"), load_dataset(DatasetConfig(), "test")
pixels, places = train.readable_pixels(range(len(train)))
labels = torch.from_numpy(train.labels[places])
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(200):
    loss = nn.functional.cross_entropy(model(pixels + SIGMA * torch.randn_like(pixels)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# Certificates: each holds with probability 0.999 over its own noise.
smoothed = SmoothedClassifier(model, num_classes=10, sigma=SIGMA, seed=0)
images, _ = test.readable_pixels(range(20))
certificates = smoothed.certify_many(images, num_estimation=1000, alpha=0.001, example_ids=test.example_ids[:20])
for name, label, certificate in zip(test.example_ids, test.labels, certificates, strict=False):
    said = "abstains" if certificate.abstained else f"class {certificate.prediction} within {certificate.radius:.3f}"
    print(f"{name}: label {label}, {said}")
right = sum(c.prediction == label and c.radius > 0.25 for c, label in zip(certificates, test.labels, strict=False))
print(f"certified accuracy beyond radius 0.25: {right} of {len(certificates)}")
