"""`train` in a section of `base`: how a denoiser or a classifier is trained here."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core.config.losses import LossConfig
from core.config.values import Augment, Count, NonNegative, Positive, Section, Share

__all__ = ["ALL_LEVELS", "NETWORK_KEYS", "DenoiserTrainConfig", "OptimisationConfig", "TrainConfig"]

NETWORK_KEYS = ("channels", "layers", "attention", "groups", "scale_shift", "dropout")
"""Of `DenoiserTrainConfig`: those that say what its network is."""

ALL_LEVELS = (0.05, 1.5)
"""`OptimisationConfig.sigma` of a network for all levels, unless given."""

Part = Annotated[float, Field(ge=0, lt=1)]


def _as_range(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class OptimisationConfig(Section):
    """What the trainings of base networks share: noise levels, batches, optimiser, rates."""

    sigma: Annotated[tuple[Positive, Positive], Field(strict=False), BeforeValidator(_as_range)] | None = None
    """Noise level, or [low, high] of a log-uniform draw for each image. Unless given: of an expert its own level,
    otherwise [0.05, 1.5]."""
    batch_size: Count = 128
    """Images of each step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Both decay weights as `weight_decay` says, AdamW apart from the gradient."""
    lr: Positive = 5e-3
    """Highest learning rate."""
    momentum: Part = 0.9
    """Of SGD."""
    weight_decay: NonNegative = 0.01
    """Of all parameters."""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "one_cycle"
    """`step`: the rate is multiplied by `lr_gamma` every `lr_step` epochs; `cosine`: falls to 0; `one_cycle`: rises
    from lr / 25 over 30% of the training and falls to almost nothing, both along a cosine."""
    lr_step: Count = 30
    """Epochs of a step."""
    lr_gamma: Share = 0.1
    """Factor of a step."""
    warmup: Part = 0.0
    """Share of the training in which the rate rises linearly from 0, ahead of the schedule; `one_cycle` has its own."""
    lr_every: Literal["batch", "epoch"] = "batch"
    """When the rate moves."""
    ema: Part | None = None
    """Decay of the exponential moving average of the weights, which is then what is kept (its ramp: the n-th step
    averages with at most n / (n + 9)); none unless given."""
    augment: Augment = "none"
    """Of each image in each epoch, before it is noised. `flip`; `crop_flip`: 4 pixels of padding, a crop, a flip
    (CIFAR); `resized_crop`: 8% to 100% of the image, resized, a flip (ImageNet)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's arithmetic, by autocast; weights, losses and averages stay float32."""
    compile: bool = False
    """Whether the network is compiled by torch.compile."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.sigma is not None and self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma: must be a level or (low, high) with low <= high, got {self.sigma}")
        where = {
            "momentum": (self.optimizer == "sgd", f"optimizer is {self.optimizer}"),
            "lr_step": (self.schedule == "step", f"schedule is {self.schedule}"),
            "lr_gamma": (self.schedule == "step", f"schedule is {self.schedule}"),
            "warmup": (self.schedule != "one_cycle", "schedule one_cycle has a warm-up of its own"),
        }
        for key, (counts, why) in where.items():
            if not counts and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: is set to {getattr(self, key)}, but {why}; remove it")
        return self


class TrainConfig(OptimisationConfig):
    """How a classifier is trained here."""

    loss: LossConfig = LossConfig()
    """Its name, or a section with its name and numbers."""
    label_smoothing: Part = 0.0
    """Share of the label's probability that is spread over all classes, in the cross-entropy."""
    clean: bool | None = None
    """Whether the cross-entropy of the clean image counts as much as the loss: clean images look like what a denoiser
    returns. Unless given: with loss gaussian behind a denoiser."""
    epochs: Count = 40
    """Passes over the training split."""


class DenoiserTrainConfig(OptimisationConfig):
    """How a denoiser is trained here, and its network: a `UNet2DModel` on images of the data set's own size."""

    objective: Literal["plain", "distilled"] = "plain"
    """`plain`: squared error of the predicted noise, at levels log-uniform over `sigma`; `distilled`: squared error of
    the image that one call returns, at the levels of the run (sigmas and sigma_e), which is how smoothing uses it."""
    timesteps: bool = False
    """Whether `plain` draws uniformly from all timesteps of the noise schedule, as published, instead of from `sigma`:
    more than one-shot denoising needs."""
    steps: Count = 800
    """Batches."""
    lr: Positive = 8e-3
    """Highest learning rate."""
    ema: Part | None = 0.995
    """Decay of the exponential moving average of the weights, which is then what is kept; null: none."""
    channels: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (8, 16)
    """Of each block, from the full size down; each block but the last halves the images."""
    layers: Count = 1
    """Residual layers of each block."""
    attention: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Sides of images, in pixels, at which blocks attend."""
    groups: Count = 4
    """Channels are normalised in so many groups."""
    scale_shift: bool = False
    """Whether the timestep scales and shifts what is normalised, as in improved-diffusion, instead of being added."""
    dropout: Part = 0.0
    """Of the residual layers."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if odd := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"channels: {odd[0]} is no multiple of groups = {self.groups}; change one of them")
        distilled = self.objective == "distilled"
        if self.timesteps and distilled:
            raise ValueError("timesteps: says nothing about objective distilled; remove one of the two")
        if self.sigma is not None and (self.timesteps or distilled):
            which = "all timesteps" if self.timesteps else "the levels of the run"
            raise ValueError(f"sigma: is set to {self.sigma}, but the noise is that of {which}; remove it")
        return self
