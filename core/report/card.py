"""The card of a run's base networks: what was trained, on what, how, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config, DenoiserTrainConfig, TrainConfig
from core.config.training import NETWORK_KEYS, OptimisationConfig
from core.progress import clock
from core.report.pages import Block, Heading, Table, Text, markdown_page

__all__ = ["run_card"]

_ALWAYS = ("batch_size", "optimizer", "lr", "weight_decay", "schedule", "augment", "precision")


def run_card(config: Config, manifest: Mapping[str, Any], certified: Sequence[Block] = ()) -> str:
    """Markdown that holds nothing but what the run itself says, once `train_base` is finished; `certified` is what the
    report says of certified accuracy, nothing before there is a certificate.
    """
    step, data = manifest["steps"]["train_base"], manifest["data"]
    splits = " and ".join(
        f"{data[split]['examples']:,} {word} images (digest {data[split]['digest']})"
        for split, word in (("train", "training"), ("test", "test"))
        if split in data
    )
    versions = manifest["versions"]
    code = f"dual-rs {versions['dual-rs']}" + (
        f", revision {manifest['git_revision']}" * bool(manifest["git_revision"])
    )
    levels = ", ".join(f"{sigma:g}" for sigma in config.sigmas)
    blocks: list[Block] = [
        Text(f"Data set {config.dataset.name}: {splits}. Noise: {config.noise}, levels {levels}."),
        Text(f"Seed {config.seed}; {code}, torch {versions['torch']}; finished {step['finished']}."),
    ]
    accuracy = step["clean_accuracy"]
    for role in config.base_models:
        rows = list(_network(config, role, step))
        clean = accuracy.get(role) if isinstance(accuracy, Mapping) else accuracy
        if role in config.classifiers and clean is not None:
            rows.append(("accuracy on clean test images", f"{100 * clean:.2f}%"))
        blocks += [Heading(role), Table(("", "value"), tuple(rows))]
    blocks.append(Heading("Certified accuracy"))
    blocks += certified or [Text("Not certified yet.")]
    return markdown_page(f"Base networks of {config.dataset.name}", blocks, None)


def _network(config: Config, role: str, step: Mapping[str, Any]) -> list[tuple[str, str]]:
    own = config.denoiser if role in config.denoisers else config.classifier(role)
    assert own is not None, "a role of the configuration"
    facts, train = step["networks"][role], own.train
    rows = [("architecture", getattr(own, "arch", None) or "UNet2DModel" * (train is not None) or "the checkpoint's")]
    if rows[0][1] == "small_cnn":
        rows = [("architecture", f"small_cnn, width {config.classifier(role).width}")]
    rows.append(("parameters", f"{facts['parameters']:,}"))
    rows += [(f"taken: {key}", str(value)) for key, value in step.get("taken", {}).get(role, {}).items()]
    if train is None:
        return [*rows, ("trained", "elsewhere, taken as it is")]
    rows += _settings(train, facts["numbers"])
    place = f"{facts['workers']} workers of Ray Train" if facts["workers"] else "the driver's process"
    rows += [
        ("trained for", f"{clock(facts['seconds'])} on {facts['device']}, in {place}"),
        ("loss of the first and of the last epoch", f"{facts['loss'][0]:.4f}, {facts['loss'][-1]:.4f}"),
    ]
    return rows


def _settings(train: OptimisationConfig, numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    low, high = train.sigma or (0.0, 0.0)
    rows: list[tuple[str, Any]] = []
    if isinstance(train, DenoiserTrainConfig):
        rows += [("objective", train.objective), *((key, getattr(train, key)) for key in NETWORK_KEYS)]
        rows.append(("steps", f"{train.steps:,}"))
    elif isinstance(train, TrainConfig):
        said = (f"{key} {'as published for the nearest sigma' if v is None else v}" for key, v in numbers.items())
        rows += [
            ("loss", f"{train.loss.name} ({', '.join(said)})"),
            ("clean images too", "yes" if train.clean else "no"),
        ]
        rows.append(("epochs", f"{train.epochs:,}"))
    if not (isinstance(train, DenoiserTrainConfig) and (train.timesteps or train.objective == "distilled")):
        rows.append(("noise levels", f"{low:g}" if low == high else f"log-uniform over [{low:g}, {high:g}]"))
    for key, field in OptimisationConfig.model_fields.items():
        value = getattr(train, key)
        if key != "sigma" and (key in _ALWAYS or value != field.default):
            rows.append((key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)))
    return [(key, str(value)) for key, value in rows]
