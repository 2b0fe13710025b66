"""What a checkpoint says about its inputs and outputs: normalisation, size, names of the classes."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from core.errors import ModelError

__all__ = ["Stated", "agreed", "beside_weights", "by_timm", "by_transformers", "in_buffers", "label_map_of"]

_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
"""Of an image processor of transformers; all others would change the pixels in a way of their own."""
_GEOMETRY = ("do_resize", "size", "do_center_crop", "crop_size", "crop_pct", "crop_mode", "resample", "interpolation")
_BUFFERS = {"mean": "std", "_mean": "_std", "mu": "sigma", "new_mean": "new_std", "pixel_mean": "pixel_std"}
_LABELS = (
    *("label_names", "class_names", "classes", "CLASSES", "categories", "id2label", "idx_to_class", "label2id"),
    "class_to_idx",
)
_SECTIONS = ("hyper_parameters", "hparams", "args", "config", "meta", "dataset_meta", "normalize", "normalization")
"""Where trainers (Lightning, timm, OpenMMLab) put all of that, beside the state dict."""


@dataclass(frozen=True)
class Stated:
    """What a file says; None where it does not.

    Attributes:
        mean, std: of pixels in [0, 1], by channel.
        input_size: height and width that the network was made for.
        labels: names of the outputs, in order.
        geometry: how it resized and cropped, as the file has it. The data set crops here, and the classifier resizes in
            its own way, so this is for the record.
        unsaid: why the normalisation is not known, where it is not the architecture's either.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = None
    labels: tuple[str, ...] | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    unsaid: str | None = None


def agreed(statements: Mapping[str, Stated], given: Stated, source: str) -> tuple[Stated, dict[str, str]]:
    """What several files say together, and which of them says what; where the configuration says it (`given`) they fall
    silent.

    Raises:
        ModelError: where two files contradict each other.
    """
    names = ("mean", "std", "input_size", "labels")
    found: dict[str, Any] = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    whence = dict.fromkeys(found, "the configuration")
    for where, stated in statements.items():
        for name in (each.name for each in fields(Stated)):
            value = getattr(stated, name)
            if value is None or value == {} or whence.get(name) == "the configuration":
                continue
            if name in names and name in found:
                if not _same(found[name], value):
                    why = f"{whence[name]} and {where} contradict each other about {name}"
                    raise ModelError(f"{source}: {why}: mend one")
                continue
            found[name] = value
            whence.setdefault(name, where)
    return Stated(**found), whence


def by_transformers(processor: Mapping[str, Any], source: str) -> Stated:
    """preprocessor_config.json of transformers, whose image processors scale bytes, subtract and divide.

    Raises:
        ModelError: for a step that is not covered, or numbers that are none.
    """
    strange = [key for key, value in processor.items() if key.startswith("do_") and value and key not in _STEPS]
    strange += ["rescale_offset"] if processor.get("rescale_offset") else []
    if strange:
        raise ModelError(
            f"{source}: {strange[0]} is {processor[strange[0]]!r}, which no classifier of timm's does: put the step "
            "into a network of your own and use the API (core.SmoothedClassifier)"
        )
    factor = 255.0 * _numbers(processor.get("rescale_factor", 1 / 255), "rescale_factor", source)[0]
    if not processor.get("do_rescale", True):
        factor = 255.0
    factor = 1.0 if math.isclose(factor, 1.0) else factor
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = 0.0, 1.0
    if factor <= 0:
        raise ModelError(f"{source}: rescale_factor is {factor / 255:g}, expected a positive number")
    if processor.get("do_center_crop"):
        size = _side(processor.get("crop_size"), "crop_size", source)
    else:
        size = _side(processor.get("size"), "size", source) if processor.get("do_resize", True) else None
    geometry = {key: processor[key] for key in _GEOMETRY if key in processor}
    if mean is None or std is None:
        return Stated(input_size=size, geometry=geometry, unsaid="it has no image_mean and image_std")
    # (255 f x - mean) / std = (x - mean / 255 f) / (std / 255 f)
    mean, std = _numbers(mean, "image_mean", source), _numbers(std, "image_std", source)
    return Stated(tuple(m / factor for m in mean), tuple(s / factor for s in std), size, None, geometry)


def by_timm(config: Mapping[str, Any], arch: str, source: str) -> Stated:
    """config.json of timm: `architecture`, `pretrained_cfg` and the names of the classes.

    Raises:
        ModelError: for another architecture than `arch`, arguments of it that no shape shows, or numbers that are none.
    """
    named = str(config.get("architecture", arch)).partition(".")[0]
    if named != arch.partition(".")[0]:
        raise ModelError(f"{source}: architecture is {named!r}, arch is {arch!r}: name the one of the checkpoint")
    shapes = ("img_size", "in_chans", "num_classes")
    built = {key: value for key, value in (config.get("model_args") or {}).items() if key not in shapes}
    if built:
        raise ModelError(f"{source}: the network was built with model_args {built}, which is not covered: use the API")
    said = config.get("pretrained_cfg") or (config if "architecture" in config else {})
    mean, std, unsaid = _pair(said, source)
    size = said.get("input_size")
    geometry = {key: said[key] for key in _GEOMETRY if key in said}
    labels = config.get("label_names") or said.get("label_names") or said.get("labels")
    return Stated(
        mean,
        std,
        None if size is None else _side(list(size)[-2:], "input_size", source),
        None if labels is None else _names("label_names", labels, source),
        geometry,
        unsaid,
    )


def beside_weights(beside: Mapping[str, Any], source: str) -> Stated:
    """What lies beside a state dict in its file, or is the config.json of transformers: names of classes, mean, std.

    Raises:
        ModelError: for numbers or names that are none.
    """
    beside = _with_sections(beside)
    mean, std, unsaid = _pair(beside, source)
    given = [key for key in _LABELS if isinstance(beside.get(key), Mapping | list | tuple) and beside[key]]
    labels = _names(given[0], beside[given[0]], source) if given else None
    if labels and all(name == f"LABEL_{index}" for index, name in enumerate(labels)):  # transformers' own numbers
        labels = None
    size = _side(beside["image_size"], "image_size", source) if "image_size" in beside else None
    return Stated(mean, std, size, labels, unsaid=unsaid)


def in_buffers(weights: Mapping[str, Tensor], source: str) -> tuple[Stated, dict[str, Tensor]]:
    """The numbers of a normalising layer that keeps them in the state dict, and the weights without them.

    Without numbers, on the meta device, NaN stands for them.
    """
    stated, taken = Stated(), set[str]()
    for key in weights:
        root, dot, name = key.rpartition(".")
        other = f"{root}{dot}{_BUFFERS.get(name)}"
        if other in weights and weights[key].shape == weights[other].shape and weights[key].numel() in (1, 3):
            if stated.mean is not None:  # not one layer in front of the network
                return Stated(), dict(weights)
            stated = Stated(_numbers(weights[key], key, source), _numbers(weights[other], other, source))
            taken = {key, other}
    return stated, {key: value for key, value in weights.items() if key not in taken}


def label_map_of(labels: Sequence[str], classes: Sequence[str], source: str) -> tuple[int, ...] | None:
    """Which output of a checkpoint each class of the data set is, by name.

    Names are compared without regard to case, spaces, hyphens, underscores and Unicode's normal form.

    Returns:
        The output of each class; None where no name is in both, so that only their order is left.

    Raises:
        ModelError: when some classes are among the outputs and some are not, or one is there twice.
    """
    named, wanted = list(map(_plain, labels)), list(map(_plain, classes))
    if named == wanted:
        return tuple(range(len(named)))
    times = {plain: named.count(plain) for plain in wanted}
    if not any(times.values()):
        return None
    for name, plain in zip(classes, wanted, strict=True):
        if times[plain] != 1 or wanted.count(plain) > 1:
            raise ModelError(
                f"{source} names its classes {', '.join(map(repr, labels[:3]))}, ...: the data set's {name!r} is "
                f"{times[plain]} times among them while others are there: say in 'label_map' which of its outputs each "
                "class of the data set is"
            )
    return tuple(named.index(plain) for plain in wanted)


def _same(one: Any, other: Any) -> bool:
    """Whether two files say the same: one number or one for each channel, as text or in float32, or not known (NaN)."""
    if not isinstance(one, tuple) or isinstance(one[0], str):
        return bool(one == other)
    width = max(len(one), len(other))
    pairs = zip(*(values * width if len(values) == 1 else values for values in (one, other)), strict=False)
    return len(one) in (1, width) and all(math.isnan(a + b) or math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)


def _with_sections(beside: Mapping[str, Any]) -> dict[str, Any]:
    """With what is in the sections of trainers; one number there may be of anything (`std` of an initialisation)."""
    found: dict[str, Any] = {}
    for section in _SECTIONS:
        if isinstance(inner := beside.get(section), Mapping):
            inner = _with_sections(inner)
            found |= {
                k: v for k, v in inner.items() if k not in ("mean", "std") or isinstance(v, list | tuple | Tensor)
            }
    return found | dict(beside)


def _pair(
    said: Mapping[str, Any], source: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, str | None]:
    """Both numbers, or why one of them alone says nothing."""
    there = [key for key in ("mean", "std") if said.get(key) is not None]
    if len(there) == 1:
        return None, None, f"it has {there[0]} alone"
    mean, std = (_numbers(said[key], key, source) for key in there) if there else (None, None)
    return mean, std, None


def _plain(name: str) -> str:
    return "".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())


def _numbers(value: Any, name: str, source: str) -> tuple[float, ...]:
    if isinstance(value, Tensor):
        if value.is_meta:
            return (math.nan,) * value.numel()
        value = value.flatten().tolist()
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        raise ModelError(f"{source}: {name} is {value!r}, expected a number, or one for each channel")
    return tuple(float(each) for each in values)


def _side(value: Any, name: str, source: str) -> int | None:
    """The side of a square: 224, [224, 224], {height: 224, width: 224} or {shortest_edge: 256}."""
    if isinstance(value, Mapping):
        value = [value[key] for key in ("height", "width", "shortest_edge") if value.get(key) is not None]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if sides in (set(), {None}):
        return None
    if len(sides) > 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ModelError(f"{source}: {name} is {value!r}, expected a square: only those are covered")
    return side


def _names(key: str, value: Any, source: str) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        pairs = value.items() if key not in ("label2id", "class_to_idx") else ((v, k) for k, v in value.items())
        try:
            numbered = {int(index): str(name) for index, name in pairs}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) != list(range(len(value))):
            raise ModelError(f"{source}: {key} does not number its classes from 0 to {len(value) - 1}: mend the file")
        return tuple(numbered[index] for index in range(len(value)))
    return tuple(map(str, value))
