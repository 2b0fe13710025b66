"""`base`: the denoiser and the classifiers, taken from files or trained here."""

import re
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from core.config.training import NETWORK_KEYS, DenoiserTrainConfig, TrainConfig
from core.config.values import Count, Positive, Section

__all__ = ["NO_DENOISER", "SMALL_CNN", "BaseModelsConfig", "ClassifierConfig", "DenoiserConfig", "is_own_code"]

NO_DENOISER = "none"
"""As `base.denoiser`; a folder of that name is ./none."""

SMALL_CNN = "small_cnn"
"""As `arch`: `core.models.small.SmallConvNet`."""

_OWN_CODE = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")

Width = Annotated[int, Field(ge=4, multiple_of=4)]
"""Channels of the small CNN's first layer: its normalisation takes them in groups of four."""

_MOVED = {
    "denoiser_schedule": "denoiser.schedule",
    "denoiser_head_dim": "denoiser.head_dim",
    "denoiser_steps": "denoiser.train.steps",
    "denoiser_batch": "denoiser.train.batch_size",
    "denoiser_lr": "denoiser.train.lr",
    "denoiser_ema": "denoiser.train.ema",
    "noise_range": "denoiser.train.sigma and base.classifier.train.sigma",
    "classifier_epochs": "classifier.train.epochs",
    "classifier_batch": "classifier.train.batch_size",
    "classifier_lr": "classifier.train.lr",
    "classifier_width": "classifier.width (the estimator's: estimator.backbone: {arch: small_cnn, width: WIDTH})",
    "train_experts": "experts: {SIGMA: {width: WIDTH, train: {}}}",
}
"""Keys of earlier versions, and what says it now."""


def is_own_code(arch: str | None) -> bool:
    """Whether an architecture is `module:function`, code of the user's own."""
    return arch is not None and _OWN_CODE.fullmatch(arch) is not None


class ClassifierConfig(Section):
    """An image classifier: an architecture and where its weights are."""

    arch: str | None = None
    """A timm architecture such as `vit_base_patch16_224`, `resnet110`, or `small_cnn` (three convolutions); none for a
    checkpoint of our own format. `module:function`: a function of your own that returns a torch module, called with
    num_classes and channels where it takes them; it is run on the driver and on every node, and gets pixels in [0, 1]
    unless mean and std are given. What is trained here is `small_cnn` unless given."""
    width: Width = 16
    """Channels of the first layer of `small_cnn`."""
    checkpoint: str | None = None
    """File or folder with its weights: timm's, transformers' (ViT), a plain state dict, or our own format. A path, an
    address (s3://, gs://, ...), or a name on the Hugging Face hub. Nothing in it is run."""
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

    train: TrainConfig | None = None
    """How it is trained here: from its weights, where it has some, or from scratch."""

    @model_validator(mode="before")
    @classmethod
    def _small(cls, value: Any) -> Any:
        """What is trained here is a small CNN unless it says otherwise."""
        trained = isinstance(value, dict) and value.get("train") is not None
        if trained and value.get("arch") is None and value.get("checkpoint") is None:
            return {**value, "arch": SMALL_CNN}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        small, code = self.arch == SMALL_CNN, is_own_code(self.arch)
        if self.arch is not None and ":" in self.arch and not code:
            raise ValueError(f"arch: is {self.arch!r}, expected a name, or module:function such as my_models:resnet")
        for key, field in type(self).model_fields.items():
            unfit = key not in ("arch", "width", "train") if small else key == "width"
            unfit = unfit or (code and key in ("pretrained", "label_map"))
            if unfit and getattr(self, key) != field.default:
                raise ValueError(
                    f"{key}: says nothing about {self.arch or 'a checkpoint of our own format'}; remove it"
                )
        if self.train is not None and self.label_map is not None:
            raise ValueError("label_map: what is trained here has the classes of the data set; remove it")
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained: give one of them, both name weights")
        if self.arch is None and self.checkpoint is None:
            raise ValueError("arch: is missing; only a checkpoint of our own format says it itself")
        return self


class DenoiserConfig(Section):
    """A denoiser: where its weights are, or how it is trained here."""

    arch: str | None = None
    """`module:function`, a function of your own that returns a noise predictor: a torch module that takes images of the
    diffusion scale at integer timesteps, ``(B, C, H, W)`` and ``(B,)``, and returns their noise. Called with channels
    where it takes it, on the driver and on every node; needs `schedule`."""
    checkpoint: str | None = None
    """A diffusers folder, an OpenAI checkpoint (.pt), a file of our own format (.safetensors), or a name on the Hugging
    Face hub; with `arch` a state dict. A path or an address (s3://, gs://, ...); nothing in it is run. `none`: no
    denoiser, the networks read the noisy image itself."""
    schedule: Annotated[str, Field(pattern=r"^(linear|cosine)-[1-9]\d*$")] | None = None
    """Noise schedule that it is trained with (`linear-1000` unless given), or was trained with where it does not say so
    itself (an OpenAI checkpoint that is none of the published ones, a folder without a scheduler), and the number of
    its timesteps."""
    head_dim: Count | None = None
    """Channels of an attention head: of such an OpenAI checkpoint num_head_channels, or the width that attends divided
    by num_heads; of one that is trained here 8 unless given."""
    train: DenoiserTrainConfig | None = None
    """How it is trained here: from the weights of `checkpoint`, where given, or from scratch."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        for key in ("schedule", "head_dim", "train"):
            if self.checkpoint == NO_DENOISER and getattr(self, key) is not None:
                raise ValueError(f"{key}: says something about base.denoiser, which is none; remove one of the two")
        if self.arch is not None and (not is_own_code(self.arch) or self.checkpoint == NO_DENOISER):
            raise ValueError(
                f"arch: is {self.arch!r}, expected module:function such as my_models:unet, with a denoiser"
            )
        if self.arch is not None and (self.schedule is None or self.head_dim is not None):
            raise ValueError(f"schedule: {self.arch} needs it (linear-1000), and no head_dim: nothing else says it")
        if self.checkpoint is None and self.train is None and self.arch is None:
            raise ValueError("checkpoint: is missing; give it, or arch, or train")
        own = self.arch or self.checkpoint
        for key in NETWORK_KEYS if own is not None and self.train is not None else ():
            if getattr(self.train, key) != DenoiserTrainConfig.model_fields[key].default:
                raise ValueError(f"train.{key}: {own} has a network of its own; remove it")
        return self


class BaseModelsConfig(Section):
    """The base models (`jobs.train_base`): trained here, or models of your own."""

    denoiser: DenoiserConfig | None = None
    """Its checkpoint, or a section; `none`: the networks read the noisy image itself. Unless given, a small one is
    trained."""
    classifier: ClassifierConfig | None = None
    """The classifier. Unless given, a small one is trained."""
    experts: dict[Annotated[Positive, Field(strict=False)], ClassifierConfig] | None = None
    """Instead of `classifier`: one for each sigma, and each exactly once. The estimator routes."""

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, value: Any) -> Any:
        for key, now in _MOVED.items() if isinstance(value, dict) else ():
            if key in value:
                raise ValueError(f"{key}: is now base.{now}")
        return value

    @field_validator("denoiser", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if self.classifier is not None and self.experts is not None:
            raise ValueError("experts: goes without base.classifier; give one of them")
        experts = {f"experts.{sigma}": expert for sigma, expert in (self.experts or {}).items()}
        for key, own in {"classifier": self.classifier, **experts}.items():
            if own is not None and not (own.checkpoint or own.pretrained or own.train or is_own_code(own.arch)):
                raise ValueError(
                    f"{key}: {own.arch} has no weights; give {key}.checkpoint or {key}.pretrained, or {key}.train"
                )
        return self
