"""What is checked before any device is asked for: everything that a job will need, and all of what is wrong at once."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from core.addresses import is_address
from core.config import ClassifierConfig, Config, DenoiserConfig
from core.data import Dataset, Split
from core.errors import ConfigError, DataError, DualRSError, ModelError
from core.models.checkpoints import build_own_denoiser, load_model
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser
from distributed.checks.estimate import Part, count_parts, size
from distributed.checks.published import published_data
from distributed.checks.steps import steps_of
from distributed.cluster.cluster import check_gpus, train_device, training_place
from distributed.cluster.joining import check_cluster
from distributed.cluster.upload import check_upload
from distributed.files.models import has_weights
from distributed.store.run_directory import RunDirectory
from distributed.store.sources import base_model, local_models, model_key
from distributed.store.track import check_tracker
from distributed.views.exchange import imported_logs

__all__ = ["Found", "check", "check_place", "count_found", "refuse", "unfinished"]


@dataclass
class Found:
    """What a check found.

    Attributes:
        steps: those that are still to be run.
        problems: what would keep them from it, each with a remedy.
        facts: what is there, by topic.
        data: the splits that could be loaded.
        networks: on the meta device (without weights), by name, those that could be built.
        absent: by the key of the configuration, the problem of each data set and network whose files are missing; what
            is known of it without them is among `data` and `networks`.
    """

    steps: list[str] = field(default_factory=list)
    problems: list[DualRSError] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    data: dict[Split, Dataset] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    absent: dict[str, DualRSError] = field(default_factory=dict)

    @contextmanager
    def collect(self, key: str = "") -> Iterator[None]:
        """Note an error (of this key or network) and go on behind the block."""
        try:
            yield
        except DualRSError as error:
            named = error if str(error).startswith(key) else type(error)(f"{key}: {error}")
            if str(named) not in map(str, self.problems):
                self.problems.append(named)
        except OSError as error:
            self.problems.append(DataError(str(error)))


def check(directory: RunDirectory, steps: Sequence[str], here: bool = True) -> Found:
    """Look at everything that the steps need, without running a network.

    Nothing is written but a probe that removes itself. Weights of a hub are fetched into its cache.

    Args:
        directory: the run, which may not be there yet (`dry`).
        steps: names as in the manifest, in their order; those that are finished need nothing.
        here: whether this machine is the one that will run them, so that it needs the devices.

    Raises:
        ConfigError: as `check_upload`, where the rest would only follow from it.
    """
    config = directory.config
    found, plan = Found(), steps_of(config)
    found.steps = unfinished(directory, steps, found)
    if here and found.steps:
        check_upload(config, found.steps, directory.folder)  # before all others: they would follow from it
    check_place(config, found, here)
    before = len(found.problems)
    with found.collect():
        directory.folder.check_writable()
    writable = len(found.problems) == before
    for split in ("train", "test"):
        if any(split in plan[step].splits for step in found.steps):
            with found.collect():
                found.data[split] = _check_split(directory, split, found)
            where = getattr(config.dataset, split).path or config.dataset.path
            if split not in found.data and where and not is_address(where) and not Path(where).exists():
                found.absent[f"dataset.{split}"] = found.problems[-1]
                if (data := published_data(config, split)) is not None and all(data.shape):
                    found.data[split] = data
                    shape = "x".join(map(str, data.shape))
                    found.facts.append((f"{split} data", f"missing; as published, {len(data):,} images {shape}"))
    with found.collect():
        check_tracker(config)
    with found.collect():
        _check_pair(found.data)
    _check_models(directory, found)
    if writable:
        with found.collect():
            _check_room(directory, found)
    reach, asked, num = config.reach, max(config.report.radii), config.certify.num_estimation
    found.facts.append(("radii", f"{num:,} draws reach {reach:.3f}, up to {asked:g} are asked for"))
    if (level := config.uncut_sigma_e) is not None:
        found.facts.append(
            (
                "router",
                f"excludes no level as far out as the class reaches; it would with sigma_e={level:g} (or more draws)",
            )
        )
    with found.collect():
        if found.steps:
            logs = imported_logs(directory.folder).values()
            config.check_radii(max((float(log.radius.max()) for log in logs), default=0.0))
    return found


def refuse(problems: Sequence[DualRSError]) -> None:
    """Raise all problems as one error; nothing happens when there are none.

    Raises:
        ConfigError: when there is one among them; otherwise the kind of the first.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    kind = next((type(problem) for problem in problems if isinstance(problem, ConfigError)), type(problems[0]))
    names = {ConfigError: "configuration", DataError: "data", ModelError: "model"}
    lines = [f"{names[type(problem)]}: {problem}".replace("\n", "\n    ") for problem in problems]
    raise kind(f"{len(problems)} problems\n" + "\n".join(f"  {line}" for line in lines))


def check_place(config: Config, found: Found, here: bool) -> None:
    """Whether the cluster that is named, or the GPUs that are asked for, are there; `here` as for `check`."""
    compute = config.compute
    if any(steps_of(config)[step].trains for step in found.steps):
        with found.collect():
            found.facts.append(("training", training_place(compute, here)))
    elif here and "train_base" in found.steps and not compute.train_workers:
        with found.collect():
            train_device(compute)  # for the clean accuracy
    if not here:
        return
    replicas = any(step.startswith(("build_dataset", "certify")) for step in found.steps)
    if compute.executor == "ray" and (replicas or compute.train_workers):
        with found.collect():
            check_cluster()
    if replicas:
        with found.collect():
            check_gpus(compute)


def unfinished(directory: RunDirectory, steps: Sequence[str], found: Found) -> list[str]:
    """The steps that are not done, or read a model that one of those will write."""
    plan, left = steps_of(directory.config), list[str]()
    changed: set[str] = set()
    for name in steps:
        if name not in plan:
            raise ConfigError(
                f"finetune.epochs: is 0, so there is no step {name}: the classifier is certified as it is; set it in "
                "another --out"
            )
        record = directory.manifest["steps"].get(name)
        done = False
        if record is not None and not changed & set(plan[name].reads):
            with found.collect():
                done = directory.is_done(name, sorted(record["read"]), sorted(record["wrote"]))
        if not done:
            left.append(name)
            changed |= set(plan[name].writes)
    return left


def _check_split(directory: RunDirectory, split: Split, found: Found) -> Dataset:
    data = directory.data(split)
    if not len(data):
        raise DataError(f"dataset.{split}: the {split} split of {data.name} is empty; look at its part and its path")
    if data.num_classes < 2:
        raise DataError(
            f"dataset.{split}: {data.name} has {data.num_classes} class, expected at least 2 (every certificate would "
            "be right of itself); look at its path, or name all classes in dataset.class_file"
        )
    broken: list[DataError] = []
    places = sorted({0, len(data) // 2, len(data) - 1})
    for index in places:
        try:
            data.image(index)
        except DataError as error:  # one such image becomes an error row, a set of them is a mistake
            broken.append(error)
    if len(broken) == len(places):
        raise broken[0]
    found.facts += [(f"{split} data", f"warning: {error}") for error in broken]
    there = len(set(data.labels.tolist()))
    some = "" if there == data.num_classes else f" ({there} of them have examples)"
    shape = "x".join(map(str, data.shape))
    found.facts.append(
        (f"{split} data", f"{data.name}, {len(data):,} images {shape}, {data.num_classes} classes{some}")
    )
    return data


def _check_pair(data: Mapping[Split, Dataset]) -> None:
    if len(data) < 2:
        return
    train, test = data["train"], data["test"]
    if train.num_classes != test.num_classes:
        raise DataError(
            f"the training split of {train.name} has {train.num_classes} classes, the test split {test.num_classes}; "
            "set dataset.num_classes or dataset.class_file, or look at the splits' paths"
        )
    if train.shape != test.shape:
        raise DataError(
            f"images of the training split have shape {train.shape}, those of the test split {test.shape}; set "
            "dataset.resize and dataset.crop, or look at the splits' paths"
        )


def _check_models(directory: RunDirectory, found: Found) -> None:
    """The networks that the steps read from the run, take from elsewhere, or will train."""
    data = next(iter(found.data.values()), None)
    made: set[str] = set()
    missing: list[str] = []
    plan = steps_of(directory.config)
    for step in found.steps:
        needed = [name for name in plan[step].reads if name not in made and name not in found.networks]
        for name in needed:
            written = any(name in record["wrote"] for record in directory.manifest["steps"].values())
            if not written or not directory.models.exists(f"{name}.safetensors"):
                missing.append(name)
                continue
            with found.collect(), torch.device("meta"):
                directory.model_hashes([name])
                found.networks[name] = load_model(directory.model(name), directory.config.own_code.values())
        if step == "train_base":
            _check_base(directory, data, found)
        if step == "train_estimator":
            _check_backbone(directory, data, found)
            if "build_dataset" not in {*directory.manifest["steps"], *found.steps}:
                missing.append("the dataset")
        made |= set(plan[step].writes)
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        found.problems.append(
            ConfigError(f"{str(directory.folder)!r}: {names} not there yet: run the earlier steps (jobs.pipeline)")
        )
    for name, network in found.networks.items():
        num = sum(tensor.numel() for tensor in network.state_dict().values())
        whence = _source(directory.config, name) if name in made else "in the run"
        if name in made and model_key(name) in found.absent:
            whence = whence.replace("from ", "random weights instead of ")
        found.facts.append((name, f"{whence}, {num:,} parameters"))
        with found.collect(name):
            _check_network(directory.config, name, network, data)


def _check_base(directory: RunDirectory, data: Dataset | None, found: Found) -> None:
    """What `jobs.train_base` takes from files, or trains."""
    config = directory.config
    classes, names = (data.num_classes, data.class_names) if data else (config.dataset.known_classes, None)
    for role in config.base_models:
        denoises = role in config.denoisers
        own = config.denoiser if denoises else config.classifier(role)
        assert own is not None, "a role of the configuration"
        if data is None and own.checkpoint is None:
            continue
        if classes is None and not denoises:  # the data are missing too
            with found.collect(model_key(role)):
                local_models(directory, model_key(role))
            continue
        _build(found, role, own, partial(base_model, directory, role, _shape(config, data), classes or 0, names))


def _check_backbone(directory: RunDirectory, data: Dataset | None, found: Found) -> None:
    from core.training.estimator import new_estimator

    config, backbone = directory.config, directory.config.estimator.backbone
    if data is None and (backbone is None or config.estimator.reads_features):
        return
    if config.estimator.reads_features and any(
        model_key(role) in found.absent and role not in found.networks for role in config.classifiers
    ):
        return
    shape, classes, names = _shape(config, data), *((data.num_classes, data.class_names) if data else (0, None))

    def estimator(absent: Collection[str] = ()) -> nn.Module:
        absent = (*absent, *found.absent)
        local = local_models(directory, "estimator", absent)
        return new_estimator(local, shape, lambda role: base_model(directory, role, shape, classes, names, absent))

    _build(found, "estimator", backbone, estimator)


def _build(
    found: Found, name: str, own: DenoiserConfig | ClassifierConfig | None, network: Callable[..., nn.Module]
) -> None:
    """Build a network on the meta device; where its files are missing, note that and what is known without them."""
    key = model_key(name)
    # timm's own weights do not load without their tensors.
    place = torch.device("cpu" if getattr(own, "pretrained", False) else "meta")
    with found.collect(key), place:
        found.networks[name] = network()
    if name in found.networks or not isinstance(found.problems[-1], ModelError):
        return
    if own is None or own.checkpoint is None or has_weights(own.checkpoint):
        return
    found.absent[key] = found.problems[-1]
    try:
        with place:
            found.networks[name] = network(absent=[key])
    except DualRSError as error:
        found.facts.append((name, f"{error}: nothing is measured of it"))


def _shape(config: Config, data: Dataset | None) -> tuple[int, int, int]:
    """Of the images; where they are missing, at least their channels are known."""
    return data.shape if data else (1 if config.dataset.grey else 3, 32, 32)


def _check_network(config: Config, name: str, network: nn.Module, data: Dataset | None) -> None:
    """Whether a network takes the images (and the noise levels) and has the outputs that are needed."""
    if name == "denoiser":
        if not isinstance(network, OneShotDenoiser):
            raise ModelError(f"is a {type(network).__name__}, expected a denoiser; start another --out")
        network.timestep(max(*config.sigmas, config.estimator_sigma))
        if data:
            network.check_images(data.shape)
            if network.own:
                _pass(build_own_denoiser(**network.own), data.shape, "cpu", torch.full((2,), config.sigmas[0]))
    if name == "denoiser" or data is None:
        return
    outputs = len(config.sigmas) if name == "estimator" else data.num_classes
    if isinstance(network, ImageClassifier) and network.spec["arch"] in config.own_code.values():
        logits = _pass(ImageClassifier(**network.spec), data.shape, "cpu")  # own code may do what needs numbers
    else:
        logits = _pass(network, data.shape, "meta")
    if logits is not None and tuple(logits.shape) != (2, outputs):
        raise ModelError(f"returns {tuple(logits.shape)[1:]} logits an image, expected {outputs}; use another network")


def _pass(network: nn.Module, shape: Sequence[int], place: str, *more: torch.Tensor) -> torch.Tensor | None:
    """What a network says of two images; None where that cannot be told without weights."""
    try:
        with torch.inference_mode():
            output: torch.Tensor = network.to(place).eval()(torch.zeros((2, *shape), device=place), *more)
            return output
    except NotImplementedError:  # an operation that cannot be run without data
        return None
    except Exception as error:  # networks have words of their own for a shape that they do not take
        raise ModelError(
            f"does not take images of shape {tuple(shape)}: {str(error).strip().partition(chr(10))[0]}; use another "
            "network, set its input_size, or dataset.resize and dataset.crop"
        ) from error


def _source(config: Config, name: str) -> str:
    """Where a network that a step writes is from."""
    if name == "denoiser":
        own = config.denoiser and (config.denoiser.checkpoint or config.denoiser.arch)
        return f"from {own}" if own else "trained here"
    named = config.classifier(name) if name in config.classifiers else config.estimator.backbone
    return f"from {named.checkpoint or named.arch}" if named else "trained here"


def _check_room(directory: RunDirectory, found: Found) -> None:
    """Whether what the steps write finds room on the disk."""
    folder = directory.folder.local
    if folder is None:
        found.facts.append(("output", f"{directory.folder} (an object store, writable)"))
        return
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    # What a step joins into larger files is there twice for a moment.
    needed = 2 * sum(part.stored_bytes for part in count_found(directory, found, 1))
    found.facts.append(("output", f"{folder}, {size(free)} free"))
    if needed > free:
        raise ConfigError(
            f"{str(there)!r} has {size(free)} of room, the run writes up to {size(needed)}; make room, or use another "
            "--out"
        )


def count_found(directory: RunDirectory, found: Found, replicas: int) -> list[Part]:
    """The steps whose data could be loaded."""
    plan = steps_of(directory.config)
    steps = [step for step in found.steps if set(plan[step].splits) <= found.data.keys()]
    num_bytes = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        for name, network in found.networks.items()
    }
    return count_parts(directory, steps, found.data, num_bytes, replicas)
