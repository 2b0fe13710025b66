"""Image classifiers of the field behind one face: pixels in [0, 1] in, logits of the data set's classes out.

timm's architectures (ViT, BEiT, ResNet-50, ...) and ResNet-110 for CIFAR, with timm's own weights, with a checkpoint of
timm's, of transformers' ViT or of the original repositories, or untrained.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ClassifierConfig
from core.config.models import is_own_code
from core.errors import ModelError
from core.models.classifier_files import check_normalisation, outputs_by_name, read_classifier
from core.models.hf_vit import check_hf_config
from core.models.own_code import build_own, described, load_own
from core.models.resnet_cifar import ResNetCifar
from core.models.weights import load_strictly
from core.own_function import source_of

__all__ = ["ImageClassifier", "build_classifier"]

_OWN: dict[str, dict[str, Any]] = {
    "resnet110": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": None, "head": "fc", "num_classes": 10}
}
"""Architectures of this project, with what timm's `pretrained_cfg` says of its own."""


class ImageClassifier(nn.Module):
    """Resizes (bicubic, antialiased, not clamped afterwards), normalises, classifies, picks classes.

    Args:
        arch: a timm architecture, `resnet110`, or `module:function` (`core.models.own_code`): that is run.
        num_outputs: width of the network's own output.
        channels: of the images.
        input_size: height and width that the network gets; the architecture's own unless given (`resnet110`: as the
            images are). Images of that size already are not resized.
        mean: by channel, subtracted from the pixels; the architecture's own unless given.
        std: by channel, divides them afterwards; likewise.
        label_map: index of the output for each class of the data set; None where they are the same.
        norm_eps: epsilon of all layer norms, where it is not the architecture's.
        pretrained: load timm's weights (needs the network, or its cache).
        source: of `module:function` in a file of our own format: what it was made with (`own_code.check_named`).

    Attributes:
        spec: the arguments above, as plain JSON with the defaults filled in.
        num_outputs: logits that `forward` returns.

    Raises:
        ModelError: for an unknown architecture, a mean or std that does not fit, or a label map that is out of range or
            names an output twice.
    """

    _mean: Tensor
    _std: Tensor
    _label_map: Tensor | None

    def __init__(
        self,
        arch: str,
        num_outputs: int,
        channels: int = 3,
        input_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        label_map: Sequence[int] | None = None,
        norm_eps: float | None = None,
        pretrained: bool = False,
        source: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        own = describe_architecture(arch)
        self.input_size: int | None = input_size or own["input_size"]
        mean = _by_channel("mean", mean or own["mean"], channels)
        std = _by_channel("std", std or own["std"], channels)
        _check_label_map(label_map, num_outputs)
        net: Any = _network(arch, num_outputs, channels, pretrained)
        if self.input_size != own["input_size"] and hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(self.input_size, self.input_size))
        self.net: nn.Module = net
        self.register_buffer("_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        index = None if label_map is None else torch.tensor(label_map, dtype=torch.int64)
        self.register_buffer("_label_map", index, persistent=False)
        self.num_outputs = num_outputs if label_map is None else len(label_map)
        self.spec: dict[str, Any] = {
            "arch": arch,
            "num_outputs": num_outputs,
            "channels": channels,
            "input_size": self.input_size,
            "mean": list(mean),
            "std": list(std),
            "label_map": None if label_map is None else list(label_map),
            "norm_eps": None,
        }
        if is_own_code(arch):
            self.spec["source"] = source_of(arch) if source is None else dict(source)
        if norm_eps is not None:
            self.set_norm_eps(norm_eps)
        self.new_head = False
        """Whether the last layer is an untrained one in place of the checkpoint's."""
        self.taken: dict[str, Any] = {}
        """What was taken from a checkpoint and what was found elsewhere: plain JSON for the manifest."""

    def set_norm_eps(self, eps: float) -> None:
        """Give all layer norms this epsilon."""
        self.spec["norm_eps"] = eps
        for module in self.net.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_outputs)``."""
        return self._picked(self.net(self._prepared(images)))

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer reads, ``(B, D)``, and the logits."""
        net: Any = self.net
        body = net.forward_features(self._prepared(images))
        return net.forward_head(body, pre_logits=True), self._picked(net.forward_head(body))

    def _prepared(self, images: Tensor) -> Tensor:
        size = self.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = _resized(images, size)
        return (images - self._mean) / self._std

    def _picked(self, logits: Tensor) -> Tensor:
        return logits if self._label_map is None else logits.index_select(1, self._label_map)


def _resized(images: Tensor, size: int) -> Tensor:
    """`F.interpolate` (bicubic, antialias) to ``(B, C, size, size)`` as two matrix products, with what it makes of an
    identity in float64 as weights. More exact in float32, and twice as fast for images of 32 pixels.
    """

    def weights(side: int) -> Tensor:
        identity = torch.eye(side, dtype=torch.float64, device=images.device)[None, None]
        return F.interpolate(identity, size=(size, side), mode="bicubic", antialias=True)[0, 0].to(images.dtype)

    height, width = images.shape[-2:]
    rows = weights(height)
    columns = rows if width == height else weights(width)
    # No autocast (the meta device has none): pixels stay float32 in half precision; tf32 rounds them, as any product.
    with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
        return rows @ (images @ columns.mT)


def build_classifier(
    config: ClassifierConfig,
    num_classes: int,
    channels: int = 3,
    *,
    new_head: bool = False,
    class_names: Sequence[str] | None = None,
) -> ImageClassifier:
    """The classifier that the configuration asks for, in evaluation mode.

    Args:
        config: architecture, weights, input and label map.
        num_classes: logits that are needed: the data set's classes, or the candidate sigmas.
        channels: of the images.
        new_head: take a checkpoint with another number of classes all the same, with an untrained last layer
            (`ImageClassifier.new_head` says whether it came to that).
        class_names: of the data set, in order: a checkpoint that names its outputs is taken by name.

    Raises:
        ModelError: for a checkpoint that cannot be read safely, does not fit the architecture, has other classes, or
            leaves open how its pixels are normalised.
    """
    if config.arch is None:
        raise ModelError(
            "name the architecture of the checkpoint in 'arch': a timm name, resnet110, or module:function of your own"
        )
    if is_own_code(config.arch):
        return _own_classifier(config, num_classes, channels)
    own = describe_architecture(config.arch)
    found = read_classifier(config, own)
    outputs, label_map, replaced = found.num_outputs, config.label_map, False
    if outputs is None or (new_head and outputs != num_classes):
        replaced, outputs = outputs is not None, num_classes
    else:
        if not new_head:
            label_map, found.facts["labels"] = outputs_by_name(found, class_names, config)
        _check_classes(outputs, num_classes, label_map, config)
    model = ImageClassifier(
        config.arch,
        outputs,
        channels,
        found.said.input_size,
        found.said.mean,
        found.said.std,
        label_map,
        pretrained=config.pretrained,
    )
    _check_pixel_scale(model.spec, config)
    if config.checkpoint is not None:
        if found.hf_config is not None:
            _fit_hf(model, found.hf_config, config.checkpoint)
        weights = {key: value for key, value in found.weights.items() if not key.endswith(".relative_position_index")}
        if replaced:
            state, head = model.net.state_dict(), f"{own['head']}."
            weights = {key: value for key, value in weights.items() if not key.startswith(head)}
            weights |= {key: value for key, value in state.items() if key.startswith(head)}
        load_strictly(model.net, weights, f"{config.checkpoint!r} (as {config.arch})")
        check_normalisation(found, config, unpublished=config.arch in _OWN)
    model.new_head = replaced
    inputs = ("mean", "std", "input_size")
    whence = {name: found.whence.get(name, "the architecture's") for name in inputs}
    model.taken = found.facts | {name: f"{model.spec[name]} ({whence[name]})" for name in inputs}
    return model.eval()


def _own_classifier(config: ClassifierConfig, num_classes: int, channels: int) -> ImageClassifier:
    """What a function of the user's own returns, with the weights of the checkpoint, if one is named."""
    assert config.arch is not None
    model = ImageClassifier(config.arch, num_classes, channels, config.input_size, config.mean, config.std)
    _check_pixel_scale(model.spec, config)
    model.taken = {"code": described(config.arch, model.spec["source"])}
    if config.checkpoint is not None:
        model.taken |= load_own(model.net, config.checkpoint, config.arch, config.ema)
    return model.eval()


def describe_architecture(arch: str) -> dict[str, Any]:
    """What an architecture is made for: `input_size`, `mean`, `std`, `head` (its last layer) and `num_classes`.

    Raises:
        ModelError: for a name that neither timm nor this project knows.
    """
    if arch in _OWN:
        return _OWN[arch]
    if is_own_code(arch):  # takes pixels as they are
        return {"mean": (0.0,), "std": (1.0,), "input_size": None, "head": None, "num_classes": None}
    import timm

    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*timm.list_models(), *_OWN], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see timm.list_models()"
        raise ModelError(f"no architecture {arch!r} in timm {timm.__version__}, nor is it {', '.join(_OWN)}; {hint}")
    cfg = timm.get_pretrained_cfg(arch)
    head = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
    return {
        "mean": cfg.mean,
        "std": cfg.std,
        "input_size": cfg.input_size[-1],
        "head": head,
        "num_classes": cfg.num_classes,
    }


def _network(arch: str, num_outputs: int, channels: int, pretrained: bool) -> nn.Module:
    if arch in _OWN:
        if pretrained:
            raise ModelError(f"{arch} has no published weights here; give a checkpoint")
        return ResNetCifar(num_outputs, channels)
    if is_own_code(arch):
        return build_own(arch, num_outputs, channels)
    import timm

    try:
        network: nn.Module = timm.create_model(arch, pretrained=pretrained, num_classes=num_outputs, in_chans=channels)
    except Exception as error:
        if not pretrained:  # an architecture that does not take these numbers
            raise ModelError(
                f"timm cannot build {arch!r} with {num_outputs} outputs, {channels} channels: {error}"
            ) from error
        raise ModelError(
            f"timm cannot get the weights of {arch!r} ({str(error).partition(chr(10))[0]}): fetch them where there is "
            "a network (https://huggingface.co/timm), and name the file in 'checkpoint' with pretrained: false"
        ) from error
    return network


def _check_pixel_scale(spec: Mapping[str, Any], config: ClassifierConfig) -> None:
    on_meta = torch.get_default_device().type == "meta"  # where NaN stands for the numbers in tensors
    means, stds = ([v for v in spec[key] if not (on_meta and math.isnan(v))] for key in ("mean", "std"))
    wrong = [f"mean is {mean:g}" for mean in means if not 0 <= mean <= 1]
    wrong += [f"std is {std:g}" for std in stds if not 0 < std < math.inf]
    if wrong:
        raise ModelError(
            f"{config.checkpoint or config.arch!r}: {wrong[0]} in the pixel scale [0, 1]: give mean and std in that "
            "scale (those of 0..255 divided by 255)"
        )


def _fit_hf(model: ImageClassifier, hf_config: Mapping[str, Any], checkpoint: str) -> None:
    """Take over from transformers what the weights do not say."""
    blocks: Any = getattr(model.net, "blocks", None)
    if blocks is None:
        raise ModelError(
            f"{checkpoint!r} holds a ViT of transformers, {model.spec['arch']} is none: name another 'arch'"
        )
    model.set_norm_eps(check_hf_config(hf_config, blocks[0].attn.num_heads, checkpoint))


def _check_classes(outputs: int, num_classes: int, label_map: Sequence[int] | None, config: ClassifierConfig) -> None:
    of = repr(config.checkpoint) if config.checkpoint is not None else config.arch
    if label_map is None:
        if outputs != num_classes:
            raise ModelError(
                f"{of} has {outputs} classes, {num_classes} are needed: use another checkpoint, or say in 'label_map' "
                "which of its classes each class of the data set is"
            )
    elif len(label_map) != num_classes:
        raise ModelError(f"label_map has {len(label_map)} entries, the data set has {num_classes} classes")


def _check_label_map(label_map: Sequence[int] | None, outputs: int) -> None:
    if label_map is None:
        return
    outside = [index for index in label_map if not 0 <= index < outputs]
    if outside:
        raise ModelError(f"label_map names class {outside[0]}, the checkpoint has classes 0 to {outputs - 1}")
    twice = [index for index in label_map if list(label_map).count(index) > 1]
    if twice:
        raise ModelError(f"label_map names class {twice[0]} of the checkpoint twice; each class needs its own")


def _by_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return (float(values[0]),) * channels
    if channels == 1:  # an architecture made for colour, on grey images
        return (sum(values) / len(values),)
    if len(values) != channels:
        raise ModelError(f"{name} has {len(values)} entries, expected 1 or {channels}, one per channel")
    return tuple(float(value) for value in values)
