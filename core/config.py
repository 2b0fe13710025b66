"""The configuration: one YAML file per setting, validated before anything runs.

Every model below refuses unknown keys and wrong types. `Config.identity` is the part that decides the numbers of a
run: two runs with the same identity and the same seed hold the same counts.
"""

import copy
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.confidence import draws_needed, largest_radius
from core.errors import ConfigError
from core.records import CLASSIFIER

__all__ = [
    "BaseModelsConfig",
    "CertifyConfig",
    "ClassifierConfig",
    "ComputeConfig",
    "Config",
    "DatasetConfig",
    "EstimatorConfig",
    "FinetuneConfig",
    "LabelConfig",
    "ReportConfig",
    "SplitConfig",
    "load_config",
    "parse_config",
    "parse_values",
]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Count = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, lt=1, description="failure probability")]
Share = Annotated[float, Field(gt=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class SplitConfig(_Section):
    """Where one split of the data set is, and which part of it is taken.

    `every`, then `first`, then `share` narrow the split; or `ids_file` alone names the examples.
    """

    path: str | None = None
    """Where this split is, if not below `dataset.path`. Not part of a run's identity: data may move."""
    split: str | None = None
    """What the files call this split: its folder, or how the names of its Parquet files begin. `train` and `test`
    unless given; ImageNet's test images are in `val` (folders) or `validation` (Parquet)."""
    every: Count = 1
    """Every so many-th example, from the first on (`--skip` of Cohen et al.)."""
    first: Count | None = None
    """So many examples from the beginning."""
    share: Share = 1.0
    """A random share, drawn with `seed`; the order stays."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of `share`."""
    ids_file: str | None = None
    """Text file of example ids, one per line; the order stays that of the data set."""


# Keys of `dataset` that only some data sets have.
_CIFAR, _IMAGENET, _CORRUPTED = ("cifar10", "cifar10-c"), ("imagenet", "imagenet-c"), ("cifar10-c", "imagenet-c")
_OWN = ("folder", "parquet")
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("test_size", "split_seed"), ("digits",)),
    "path": (*_CIFAR, *_IMAGENET, *_OWN),
    "layout": (*_CIFAR, *_IMAGENET),
    **dict.fromkeys(("corruption", "severity"), _CORRUPTED),
    **dict.fromkeys(("resize", "crop", "interpolation", "num_classes", "class_file"), (*_IMAGENET, *_OWN)),
    "color": _OWN,
    **dict.fromkeys(("image_column", "label_column", "id_column"), (*_CIFAR, *_IMAGENET, "parquet")),
}


class DatasetConfig(_Section):
    """Which images."""

    name: Literal["digits", "cifar10", "cifar10-c", "imagenet", "imagenet-c", "folder", "parquet"] = "digits"
    """`digits`: 1,797 real 8x8 grey images that scikit-learn ships, 10 classes; `folder` and `parquet`: a set of your
    own, <split>/<class>/<image> or Parquet files with an image and a label column."""
    path: str | None = None
    """Where it is: a folder, or an address such as s3://bucket/folder. Not part of a run's identity: data may move."""
    layout: Literal["original", "parquet"] = "original"
    """`original`: as the authors publish it (CIFAR-10's Python pickles, ImageNet's folders of JPEGs); `parquet`: as the
    Hugging Face hub keeps it."""
    test_size: Annotated[int, Field(ge=10, le=1700)] = 500
    """Digits held out for the test-time certificates; the rest is the training split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle that splits the digits."""
    corruption: str | None = None
    """Which corruption of CIFAR-10-C or ImageNet-C, for example `gaussian_noise`. Only the test split is corrupted; for
    training, `train.path` names the clean set."""
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """How severe a corruption, 1 to 5."""
    resize: Annotated[int, Field(ge=0)] | None = None
    """Length of the shorter side before the crop, 0 for none; 256 for ImageNet unless given, otherwise 0."""
    crop: Annotated[int, Field(ge=0)] | None = None
    """Side of the square cut from the centre, 0 for none; 224 for ImageNet unless given, otherwise 0."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of `resize`; `bilinear` is torchvision's default and what Cohen et al. and Carlini et al. used."""
    color: Literal["rgb", "grey"] = "rgb"
    """What images are converted to."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; otherwise known, counted (folders), or read from the Parquet files' description."""
    class_file: str | None = None
    """Text file of class names (those of the folders, or the labels where these are text), one per line in the order of
    the labels; otherwise folders are numbered by name."""
    image_column: str | None = None
    """Parquet column of the images; `image` unless given, `img` for CIFAR-10."""
    label_column: str | None = None
    """Parquet column of the labels; `label` unless given."""
    id_column: str | None = None
    """Parquet column of the example ids; made from the row number unless given."""
    train: SplitConfig = SplitConfig()
    test: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, names in _ONLY_FOR.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"dataset.{key}: means nothing for {self.name}, only for {', '.join(names)}; drop it")
        for key, part in (("train", self.train), ("test", self.test)):
            if self.name == "digits" and (part.path or part.split):
                raise ValueError(f"dataset.{key}: digits have neither path nor split; drop them")
            if part.split and self.name in _CIFAR and self.layout == "original":
                raise ValueError(f"dataset.{key}.split: means nothing for CIFAR-10's pickles; drop it")
            if part.ids_file is not None and (part.every, part.first, part.share) != (1, None, 1.0):
                raise ValueError(f"dataset.{key}: ids_file goes without every, first and share; drop one or the other")
        if self.name != "digits" and self.path is None and self.train.path is None and self.test.path is None:
            raise ValueError(f"dataset.path: is missing; set it to where {self.name} is on this machine")
        if self.train.path is not None and (self.train.path, self.train.split) == (self.test.path, self.test.split):
            raise ValueError(
                "dataset.test.path: train and test would be the same images; give each its own path or split"
            )
        if self.name.endswith("-c") and (self.corruption is None or self.severity is None):
            raise ValueError(f"dataset.corruption: {self.name} needs it (fog, say), and dataset.severity (1 to 5)")
        resize, crop = self.resize_crop
        if resize and crop > resize:
            raise ValueError(
                f"dataset.crop: {crop} is more than dataset.resize = {resize}; lower one or raise the other"
            )
        if self.layout == "original" and self.name != "parquet":
            for key in ("image_column", "label_column", "id_column"):
                if getattr(self, key) is not None:
                    raise ValueError(f"dataset.{key}: needs dataset.layout=parquet")
        return self

    @property
    def resize_crop(self) -> tuple[int, int]:
        """What `resize` and `crop` come to; ImageNet as published (Cohen et al. 2019): 256 and 224."""
        resize, crop = (256, 224) if self.name == "imagenet" else (0, 0)
        return resize if self.resize is None else self.resize, crop if self.crop is None else self.crop


class ClassifierConfig(_Section):
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
    """By channel, in the pixel scale [0, 1]; what the checkpoint or the architecture says unless given."""
    std: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = None
    label_map: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] | None = None
    """Class index of the checkpoint for each class of the data set; none where they are the same."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained: give one of them, both name weights")
        if self.arch is None and self.checkpoint is None:
            raise ValueError("arch: is missing; only a checkpoint of our own format says it itself")
        return self


class BaseModelsConfig(_Section):
    """The base models (`jobs.train_base`): trained here, or models of your own, of which nothing is trained."""

    denoiser: str | None = None
    """A denoiser of your own: a diffusers folder, an OpenAI checkpoint (.pt), a file of our own format (.safetensors),
    or a name on the Hugging Face hub. Unless given, a small one is trained."""
    classifier: ClassifierConfig | None = None
    """A classifier of your own. Unless given, a small one is trained."""
    experts: dict[Annotated[Positive, Field(strict=False)], ClassifierConfig] | None = None
    """Instead of `classifier`: a classifier of your own for each sigma, and each exactly once. The estimator routes."""
    denoiser_steps: Count = 800
    denoiser_batch: Count = 128
    denoiser_lr: Positive = 8e-3
    denoiser_ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the weights."""
    noise_range: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.05, 1.5)
    """The denoiser sees noise levels drawn log-uniformly from this range."""
    classifier_epochs: Count = 40
    classifier_batch: Count = 128
    classifier_lr: Positive = 5e-3
    classifier_width: Count = 16
    """Channels of the small CNN's first layer (the estimator uses the same)."""

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if self.classifier is not None and self.experts is not None:
            raise ValueError("experts: goes without base.classifier; give one of them")
        experts = {f"experts.{sigma}": expert for sigma, expert in (self.experts or {}).items()}
        for key, own in {"classifier": self.classifier, **experts}.items():
            if own is not None and own.checkpoint is None and not own.pretrained:
                raise ValueError(f"{key}: {own.arch} is not trained here; give {key}.checkpoint or {key}.pretrained")
        return self


class LabelConfig(_Section):
    """The all-sigma certification of the training set (`jobs.build_dataset`, METHOD step 1)."""

    num_selection: Count = 100
    num_estimation: Count = 100
    alpha: Alpha = 0.001


class EstimatorConfig(_Section):
    """The variance estimator (`jobs.train_estimator`, METHOD step 2)."""

    backbone: ClassifierConfig | None = None
    """Its network, with one output per sigma, trained from the weights given or from scratch; a checkpoint's last layer
    is replaced where it has another width. Unless given, the small CNN."""
    loss: Literal["hard", "soft", "consistency"] = "consistency"
    """`hard`: cross-entropy on the best sigma; `soft`: on softmax(radii); `consistency`: soft plus consistency."""
    consistency_weight: Literal["strong", "weak", "max_radius", "min_radius", "none"] = "strong"
    """w_r of the consistency term: R_c at the largest (strong) or smallest (weak) sigma that is predicted over the
    noisy copies; or the largest or smallest R_c over Sigma; or 1."""
    label_radius: Literal["at_n", "at_10k"] = "at_n"
    """Radii as certified, or those that the same share of votes would give with 10,000 draws."""
    consistency_lambda: NonNegative = 40.0
    """Weight of the KL term, lambda."""
    consistency_eta: NonNegative = 0.5
    """Weight of the entropy term, eta."""
    num_copies: Annotated[int, Field(ge=1)] = 2
    """Noisy copies of each sample in a step, m."""
    denoiser: bool = True
    """Whether the estimator reads denoised images, as published, or the noisy ones: a denoiser-free, light one."""
    rebalance: bool = True
    """Weight samples by 1 / (share of samples with the same best sigma)."""
    epochs: Count = 90
    batch_size: Count = 256
    lr: Positive = 0.01
    weight_decay: NonNegative = 0.01
    lr_step: Count = 30
    """The learning rate is multiplied by `lr_gamma` every so many epochs."""
    lr_gamma: Share = 0.5

    @model_validator(mode="after")
    def _no_labels(self) -> Self:
        if self.backbone is not None and self.backbone.label_map is not None:
            raise ValueError(
                "backbone.label_map: has no meaning for an estimator, its classes are the sigmas; remove it"
            )
        return self


class FinetuneConfig(_Section):
    """Fine-tuning of the classifier at the estimated sigmas (`jobs.finetune_classifier`, METHOD step 3)."""

    share: Share = 1.0
    """A random share of the training split, drawn with the run's seed: fine-tuning reads no other image."""
    epochs: Count = 15
    batch_size: Count = 128
    lr: Positive = 2e-5
    weight_decay: NonNegative = 0.01
    num_sigma_draws: Count = 100
    """Noisy copies over which the estimator's majority picks the sigma of a training sample."""


class CertifyConfig(_Section):
    """Test-time certification (`jobs.certify`)."""

    num_selection: Count = 100
    num_estimation: Count = 10_000
    alpha: Alpha = 0.001
    """Total failure probability."""
    alpha_split: Literal["halves", "full"] = "halves"
    """`halves`: Dual RS spends half of alpha on each stage, as published; `full`: all of it on each, for the same claim
    (see docs/guarantees.md)."""
    budget: Literal["fixed", "sequential", "grid"] = "fixed"
    """`fixed`: all draws, the field's standard; `sequential`: the same radii, each stage of Dual RS stops as soon as
    it cannot change what is reported; `grid`: only which radii of `grid` are exceeded."""
    grid: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """Radii that `budget: grid` decides; `report.radii` unless given."""
    look_every: Count = 100
    """Draws between two looks of a sequential budget."""
    early_share: Annotated[float, Field(gt=0, lt=0.49)] = 0.1
    """Share of alpha for stopping early; the rest is for the look at the last draw."""
    futility_z: Annotated[float, Field(gt=0)] = 3.0
    """`grid` gives up on the next radius when it is so many standard deviations out of reach: smaller saves draws and
    loses more radii (never the guarantee), .inf gives up only on what cannot be reached."""


class ReportConfig(_Section):
    """The report (`jobs.report`); changing it needs no new run."""

    radii: Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """l2 radii of the table, pixel scale [0, 1]."""
    strict: bool = True
    """Count radius > r (the Dual RS authors) rather than radius >= r (older scripts)."""


class ComputeConfig(_Section):
    """How it runs. Of these, only `batch_size`, `precision`, `channels_last`, `compile`, `chunk_size`, `device` and, in
    the last bits, thread counts can touch a count.
    """

    executor: Literal["ray", "local"] = "ray"
    """`ray`: replicas on Ray actors; `local`: the reference, one replica in this process, without Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU."""
    batch_size: Literal["auto"] | Count = 500
    """Rows of every forward pass. `auto` measures, once, before a step's plan is written: doubled while two batches fit
    the memory and rows per second still grow. The plan keeps the number, for all replicas and every resumption."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic in denoiser and heads when certificates are made: `tf32` on CUDA's tensor cores; `bfloat16`,
    `float16` by autocast. Noise, images, the timestep embedding and votes stay float32. Training is float32 always."""
    channels_last: bool = False
    """Memory order that convolutions on tensor cores want (+4 to +12% on a CPU)."""
    compile: bool = False
    """torch.compile of denoiser and heads, in every replica: minutes before its first pass."""
    chunk_size: Count = 100
    """Draws that share one noise key."""
    min_replicas: Count = 1
    """Replicas that the pool keeps at least, where `max_replicas` is given."""
    max_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas at most: the pool asks an autoscaling cluster for so many. 0 takes what the cluster has room for now."""
    gpus_per_replica: Positive = 1.0
    """Share of a GPU that a replica takes; 0.5 puts two on one."""
    threads_per_replica: Count = 1
    """CPU threads of a replica."""
    train_device: Literal["cpu", "cuda"] = "cpu"
    """Where the estimator is trained and the classifier fine-tuned: in the driver's process, on this device of it."""
    train_threads: Count = 1
    """CPU threads of the training jobs; another number may change the last bits of the weights, and does not pay for
    networks as small as the digits'."""
    shard_examples: Literal["auto"] | Count = "auto"
    """Examples per Parquet shard, the unit of work and of what a crash can lose; `auto` measures the rate first."""
    shard_seconds: Positive = 20.0
    """What a shard should take one replica, for `shard_examples: auto`."""
    part_rows: Count = 1_000_000
    """Rows of the files into which shards are joined when a step is finished."""
    max_errors: Annotated[int, Field(ge=0)] = 100
    """A step gives up when more examples than this cannot be run."""
    max_attempts: Count = 20
    """A step gives up on a shard that so many replicas have begun and none has finished."""
    progress_interval_s: Positive = 10.0
    """Seconds between two progress lines where there is no terminal."""

    @property
    def training_batch_size(self) -> int:
        """Rows of the forward passes of the training jobs, where `auto` is 500: no weight hangs on a measurement."""
        return 500 if self.batch_size == "auto" else self.batch_size


class Config(_Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all noise and all training."""
    sigmas: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    """Sigma, the candidate noise levels: standard deviations in the pixel scale [0, 1], ascending."""
    sigma_e: Positive | None = None
    """Noise level of the estimator; max(sigmas) unless given, never below it."""
    noise: Literal["gaussian", "exact"] = "gaussian"
    """`gaussian`: float32 normal noise, as everybody does it; `exact`: integer noise on the 8-bit grid, for which the
    certificate holds in exact arithmetic too (Voracek & Hein 2023)."""
    dataset: DatasetConfig = DatasetConfig()
    base: BaseModelsConfig = BaseModelsConfig()
    labels: LabelConfig = LabelConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    certify: CertifyConfig = CertifyConfig()
    report: ReportConfig = ReportConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.sigmas) != sorted(set(self.sigmas)):
            raise ValueError(f"sigmas: must be ascending and distinct, got {list(self.sigmas)}; sort them")
        top = max(self.sigmas)
        if self.sigma_e is not None and self.sigma_e < top:
            raise ValueError(
                f"sigma_e: must be at least max(sigmas) = {top}, got {self.sigma_e}: a smaller one caps every radius; "
                "raise it or leave it out"
            )
        experts = self.base.experts
        if experts is not None and sorted(experts) != list(self.sigmas):
            raise ValueError(
                f"base.experts: has experts for {sorted(experts)}, expected one for each of sigmas = "
                f"{list(self.sigmas)} and no other; add or drop some, or change sigmas"
            )
        asked, certify = max(self.report.radii), self.certify
        half = certify.alpha / 2 if certify.alpha_split == "halves" else certify.alpha
        reach = largest_radius(top, certify.num_estimation, half)
        if asked >= reach:
            raise ValueError(
                f"certify.num_estimation: {certify.num_estimation} draws at {half:g} a stage certify radii below "
                f"{reach:.3f} at sigma = {top}, but report.radii asks for {asked:g}; set certify.num_estimation to at "
                f"least {draws_needed(asked, top, half):,}, or lower report.radii"
                if asked > 0
                else f"certify.num_estimation: {certify.num_estimation} draws at {half:g} a stage cannot certify "
                f"anything, every input would abstain; set it to at least {draws_needed(0.0, top, half):,}"
            )
        labels = self.labels
        if largest_radius(top, labels.num_estimation, labels.alpha) <= 0:
            raise ValueError(
                f"labels.num_estimation: {labels.num_estimation} draws at alpha = {labels.alpha:g} cannot certify "
                f"anything; set it to at least {draws_needed(0.0, top, labels.alpha):,}"
            )
        radii = list(self.report.radii)
        if radii != sorted(set(radii)):
            raise ValueError(f"report.radii: must be ascending and distinct, got {radii}; sort them")
        grid = list(certify.grid)
        if grid != sorted(set(grid)):
            raise ValueError(f"certify.grid: must be ascending and distinct, got {grid}; sort them")
        compute = self.compute
        if compute.max_replicas and compute.min_replicas > compute.max_replicas:
            raise ValueError(
                f"compute.min_replicas: {compute.min_replicas} is above compute.max_replicas = {compute.max_replicas}"
            )
        low, high = self.base.noise_range
        if low >= high:
            raise ValueError(f"base.noise_range: must be (low, high) with low < high, got ({low}, {high})")
        return self

    @property
    def classifiers(self) -> dict[str, float | None]:
        """The networks that classify: `classifier` at every sigma (None), or an expert for each, `classifier-0.25`."""
        if self.base.experts is None:
            return {CLASSIFIER: None}
        return {f"{CLASSIFIER}-{sigma}": sigma for sigma in self.sigmas}

    def own_classifier(self, role: str) -> ClassifierConfig | None:
        """Which file or architecture a network of `classifiers` is taken from; None where it is trained here."""
        sigma = self.classifiers[role]
        return self.base.classifier if self.base.experts is None or sigma is None else self.base.experts[sigma]

    @property
    def grid_radii(self) -> tuple[float, ...]:
        """The radii that `budget: grid` decides."""
        return self.certify.grid or self.report.radii

    @property
    def estimator_sigma(self) -> float:
        """The noise level of the estimator, sigma_e."""
        return max(self.sigmas) if self.sigma_e is None else self.sigma_e

    def identity(self) -> dict[str, Any]:
        """The part that decides a run's numbers, as plain JSON: all but the report and where things run."""
        return self._identity(exclude_defaults=False)

    def fingerprint(self) -> str:
        """Short hash of what differs from the defaults in `identity`, so that a later version may add keys."""
        text = json.dumps(self._identity(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _identity(self, exclude_defaults: bool) -> dict[str, Any]:
        # Data may move; what they hold is for `Dataset.digest` to say.
        where: dict[str, Any] = {"path": True, "train": {"path": True}, "test": {"path": True}}
        plain = self.model_dump(
            mode="json", exclude={"report": True, "dataset": where}, exclude_defaults=exclude_defaults
        )
        for split in ("train", "test"):
            if plain.get("dataset", {}).get(split) == {}:  # nothing but its path differed from the defaults
                del plain["dataset"][split]
        compute = plain.pop("compute", {})
        # `batch_size: auto` stands here as "auto", not as the number that it came to: that is found per step, on a
        # device, long after the fingerprint has been written into the manifest, and a resumption has to arrive at the
        # same fingerprint without a device. The number is the plan's (`distributed.shards.Plan.batch_size`), written
        # before the first row and never changed: whoever goes on, replays or audits takes it from there. So two runs
        # with one fingerprint hold the same counts if their plans name the same number; one that is given always is.
        keys = ("batch_size", "precision", "channels_last", "compile", "chunk_size", "train_threads")
        plain["compute"] = {key: compute[key] for key in keys if key in compute}
        plain["sigma_e"] = self.estimator_sigma
        if self.certify.budget == "grid":
            plain["certify"]["grid"] = list(self.grid_radii)
        return plain


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people who write alpha: 1e-3 mean the number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    try:
        return float(loader.construct_scalar(node))
    except ValueError:
        return float(loader.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and validate a configuration file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` texts, values in YAML.

    Raises:
        ConfigError: for a missing or malformed file, an unknown key, a wrong type or value: names key and remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from error
    return parse_config(_yaml(text, str(path)), overrides, source=str(path))


def parse_config(plain: object, overrides: Iterable[str] = (), source: str = "the configuration") -> Config:
    """Validate a configuration given as plain data; see `load_config`."""
    if not isinstance(plain, dict):
        raise ConfigError(f"{source}: expected `key: value` lines at the top level, got {type(plain).__name__}")
    plain = copy.deepcopy(plain)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example certify.num_estimation=1000")
        _set(plain, key.split("."), _yaml(value, f"override {override!r}"), override)
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, source) for detail in error.errors())) from None


def parse_values(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as a flat mapping, values in YAML.

    Raises:
        ConfigError: for a text without "=" or a value that is not YAML.
    """
    values = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r}: expected key=value, for example alpha=1e-4")
        values[key] = _yaml(value, repr(override))
    return values


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def _set(plain: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for key in path[:-1]:
        plain = plain.setdefault(key, {})
        if not isinstance(plain, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    plain[path[-1]] = value


def _explain(detail: Mapping[str, Any], source: str) -> str:
    """One line of a validation error: file, key, what was got, what was expected."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key {key!r}; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}"
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):  # of a section: it names its key itself
        return f"{source}: {message}" if message.startswith(key) else f"{source}: {key}.{message}"
    if detail["type"] == "missing":
        return f"{source}: {key!r} is missing; add it"
    return f"{source}: {key!r} is {detail['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: Iterable[str | int]) -> list[str]:
    section: type[BaseModel] = Config
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        if mapping := next((c for c in candidates if get_origin(c) is dict), None):
            candidates = list(get_args(mapping))
            next(parts, None)  # its key
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
