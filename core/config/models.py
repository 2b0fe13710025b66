"""`base`: the denoiser and the classifiers, taken from files or trained here."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from core.config.values import Count, Positive, Section

__all__ = ["NO_DENOISER", "BaseModelsConfig", "ClassifierConfig"]

NO_DENOISER = "none"
"""As `base.denoiser`; a folder of that name is ./none."""

Width = Annotated[int, Field(ge=4, multiple_of=4)]
"""Channels of the small CNN's first layer: its normalisation takes them in groups of four."""


class ClassifierConfig(Section):
    """An image classifier: an architecture and where its weights are."""

    arch: str | None = None
    """A timm architecture such as `vit_base_patch16_224`, or `resnet110`; none for a checkpoint of our own format."""
    checkpoint: str | None = None
    """File or folder with its weights: timm's, transformers' (ViT), a plain state dict, or our own format."""
    pretrained: bool = False
    """Whether to take timm's weights, from its cache or the network."""
    input_size: Count | None = None
    """Height and width that images are resized to (bicubic, antialias); the architecture's own unless given."""
    mean: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] | None = None
    """By channel, in the pixel scale [0, 1]; what the checkpoint or timm's architecture says unless given."""
    std: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = None
    """By channel, likewise; divides what is left of the pixels after `mean`."""
    label_map: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] | None = None
    """Class index of the checkpoint for each class of the data set; by name where both name them, none where they are
    the same."""
    ema: bool = True
    """Of a checkpoint with raw weights and their moving average, take the average, as timm does."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained: give one of them, both name weights")
        if self.arch is None and self.checkpoint is None:
            raise ValueError("arch: is missing; only a checkpoint of our own format says it itself")
        return self


class BaseModelsConfig(Section):
    """The base models (`jobs.train_base`): trained here, or models of your own, of which nothing is trained."""

    denoiser: str | None = None
    """A denoiser of your own: a diffusers folder, an OpenAI checkpoint (.pt), a file of our own format (.safetensors),
    or a name on the Hugging Face hub; `none`: the networks read the noisy image itself. Unless given, a small one is
    trained."""
    denoiser_schedule: Annotated[str, Field(pattern=r"^(linear|cosine)-[1-9]\d*$")] | None = None
    """Noise schedule that it was trained with and its number of timesteps, `linear-1000` or `cosine-4000`, where it
    does not say so itself: an OpenAI checkpoint that is none of the published ones, a folder without a scheduler."""
    denoiser_head_dim: Count | None = None
    """Channels of an attention head of such an OpenAI checkpoint: num_head_channels, or the width that attends divided
    by num_heads."""
    classifier: ClassifierConfig | None = None
    """A classifier of your own. Unless given, a small one is trained."""
    experts: dict[Annotated[Positive, Field(strict=False)], ClassifierConfig] | None = None
    """Instead of `classifier`: a classifier of your own for each sigma, and each exactly once. The estimator routes."""
    train_experts: dict[Annotated[Positive, Field(strict=False)], Width] | None = None
    """Instead of `classifier` and `experts`: a pool that is trained here, a small CNN for each sigma on images at that
    sigma alone, {sigma: channels of its first layer}. The estimator routes."""
    denoiser_steps: Count = 800
    """Steps of AdamW in training the small denoiser."""
    denoiser_batch: Count = 128
    """Images of each step."""
    denoiser_lr: Positive = 8e-3
    """Highest learning rate of its one-cycle schedule."""
    denoiser_ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the weights."""
    noise_range: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.05, 1.5)
    """What is trained here sees noise levels drawn log-uniformly from this range."""
    classifier_epochs: Count = 40
    """Passes over the training split in training the small classifier."""
    classifier_batch: Count = 128
    """Images of each step."""
    classifier_lr: Positive = 5e-3
    """Highest learning rate of its one-cycle schedule."""
    classifier_width: Width = 16
    """Channels of the small CNN's first layer (the estimator uses the same)."""

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if sum(given is not None for given in (self.classifier, self.experts, self.train_experts)) > 1:
            raise ValueError("experts: goes without base.classifier and base.train_experts; give one of them")
        for key in ("denoiser_schedule", "denoiser_head_dim"):
            if self.denoiser is None and getattr(self, key) is not None:
                raise ValueError(f"{key}: says something about base.denoiser, which is not given")
        for key, field in type(self).model_fields.items():
            if self.denoiser == NO_DENOISER and key.startswith("denoiser_") and getattr(self, key) != field.default:
                raise ValueError(f"{key}: says something about base.denoiser, which is none; remove one of the two")
        experts = {f"experts.{sigma}": expert for sigma, expert in (self.experts or {}).items()}
        for key, own in {"classifier": self.classifier, **experts}.items():
            if own is not None and own.checkpoint is None and not own.pretrained:
                raise ValueError(f"{key}: {own.arch} is not trained here; give {key}.checkpoint or {key}.pretrained")
        return self
