"""A classifier's checkpoint: its weights under timm's names, and what its files say of pixels and classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from core.config import ClassifierConfig
from core.errors import ModelError
from core.models.hf_vit import is_hf_vit, to_timm
from core.models.hub import CLASSIFIER_WEIGHTS, local_path, weights_file
from core.models.stated import Stated, agreed, beside_weights, by_timm, by_transformers, in_buffers, label_map_of
from core.models.weights import read_checkpoint, read_json, unwrapped

__all__ = ["ClassifierFile", "check_normalisation", "outputs_by_name", "read_classifier"]


@dataclass
class ClassifierFile:
    """Weights under timm's names, and what is said about them."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    num_outputs: int | None = None
    prefix: str = ""
    """What all names began with."""
    said: Stated = field(default_factory=Stated)
    """By the configuration and the files together."""
    whence: dict[str, str] = field(default_factory=dict)
    """Which of them says what."""
    hf_config: Mapping[str, Any] | None = None
    """config.json of transformers, empty for a bare file; None for other weights."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""


def read_classifier(config: ClassifierConfig, own: Mapping[str, Any]) -> ClassifierFile:
    """What the configuration names: a checkpoint, timm's own weights, or none. `own` is what `describe_architecture`
    says.

    Raises:
        ModelError: for weights that cannot be read, and files that contradict each other or the architecture.
    """
    given, found = Stated(config.mean, config.std, config.input_size), ClassifierFile()
    if config.checkpoint is None:
        found.num_outputs = own["num_classes"] if config.pretrained else None
        imagenet = {"timm": Stated(labels=_imagenet())} if found.num_outputs == 1000 else {}
        found.said, found.whence = agreed(imagenet, given, repr(config.arch))
        return found
    name, path, said = config.checkpoint, local_path(config.checkpoint), dict[str, Stated]()
    plain: dict[str, Any] = {}
    if path.is_dir() or path.name in CLASSIFIER_WEIGHTS:  # what is said of such a file stands beside it
        folder = path if path.is_dir() else path.parent
        if (folder / "config.json").exists():
            plain = read_json(folder / "config.json")
            said["config.json"] = by_timm(plain, str(config.arch), f"{name}, config.json")
            said["config.json of transformers"] = beside_weights(plain, f"{name}, config.json")
        if (folder / "preprocessor_config.json").exists():
            processor = read_json(folder / "preprocessor_config.json")
            said["preprocessor_config.json"] = by_transformers(processor, f"{name}, preprocessor_config.json")
    path = weights_file(path)
    checkpoint = read_checkpoint(path, ema=config.ema)
    said["the file"] = beside_weights(checkpoint.beside, repr(str(path)))
    said["its normalising layer"], weights = in_buffers(checkpoint.weights, repr(str(path)))
    weights, more = unwrapped(weights)
    found.prefix = checkpoint.prefix + more
    found.said, found.whence = agreed(said, given, repr(name))
    if is_hf_vit(weights):
        weights, found.hf_config = to_timm(weights), plain
    last = weights.get(f"{own['head']}.weight")
    if last is None:
        foreign = "_conv_stem.weight" in weights
        hint = "; these are EfficientNet-PyTorch's names, which no architecture of timm's has" if foreign else ""
        raise ModelError(
            f"{str(path)!r} has no {own['head']}.weight, the last layer: it is no checkpoint of this architecture, or "
            f"one without a classifier; its first keys are {', '.join(list(weights)[:3])}{hint}"
        )
    if config.label_map is None and (labels := found.said.labels) is not None and len(labels) != len(last):
        raise ModelError(f"{name!r} names {len(labels)} classes, its last layer has {len(last)}: mend its files")
    found.weights, found.num_outputs = weights, len(last)
    facts = {
        "weights": ".".join(checkpoint.under) or "all of the file",
        "dropped_prefix": found.prefix,
        "own_resizing": found.said.geometry,
    }
    found.facts = {"checkpoint": name} | {key: value for key, value in facts.items() if value}
    return found


def _imagenet() -> tuple[str, ...]:
    """Names of the outputs of all networks with 1,000 that timm publishes: the folders of ImageNet."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def check_normalisation(found: ClassifierFile, config: ClassifierConfig, unpublished: bool) -> None:
    """Refuse a checkpoint whose mean and std neither it, nor the configuration, nor its architecture says.

    An `unpublished` architecture has no weights of its makers, whose normalisation would be the usual one.

    Raises:
        ModelError: says why they are not known.
    """
    if found.said.mean is not None and found.said.std is not None:
        return
    why = found.said.unsaid
    if any(part.isdigit() and part != "0" for part in found.prefix.split(".")):
        why = f"the names of its weights begin with {found.prefix!r}: a layer of code is in front of them"
    elif why is None and unpublished:
        why = f"{config.arch} has no published weights"
    if why is not None:
        raise ModelError(
            f"{config.checkpoint!r} does not say how its pixels are normalised ({why}): give mean and std, in the "
            "scale [0, 1] (Cohen et al. 2019: [0.4914, 0.4822, 0.4465] and [0.2023, 0.1994, 0.2010] for CIFAR-10, "
            "[0.485, 0.456, 0.406] and [0.229, 0.224, 0.225] for ImageNet; std: [1] for a layer that only centres, as "
            "one of Salman et al.'s does)"
        )


def outputs_by_name(
    found: ClassifierFile, classes: Sequence[str] | None, config: ClassifierConfig
) -> tuple[tuple[int, ...] | None, str]:
    """The output of each class of the data set (None: the same), and how it was found.

    Raises:
        ModelError: as `label_map_of`.
    """
    if config.label_map is not None:
        return config.label_map, "label_map of the configuration"
    labels, order = found.said.labels, "in the order of the data set's"
    if labels is None:
        return None, f"{order}; the checkpoint has no names"
    if classes is None:
        return None, f"{order}, which has no names"
    outputs = label_map_of(labels, classes, repr(config.checkpoint or config.arch))
    if outputs is None:
        return None, f"{order}; no name in common ({labels[0]!r} and {classes[0]!r} are the first)"
    if outputs == tuple(range(len(labels))):
        return None, f"by name ({found.whence['labels']}), in the same order"
    return outputs, f"by name ({found.whence['labels']}), outputs {list(outputs)}"
