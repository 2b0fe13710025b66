"""`labels`, `estimator`, `finetune`, `certify`, `report`: the steps of the method."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from core.agreement_records import Claim, Router
from core.config.compute import Compile, Precision
from core.config.models import ClassifierConfig
from core.config.values import Alpha, Augment, Count, NonNegative, Positive, Section, Share

__all__ = ["CertifyConfig", "EstimatorConfig", "FinetuneConfig", "LabelConfig", "ReferenceConfig", "ReportConfig"]

FEATURES = "features"
"""As `estimator.backbone`."""


class LabelConfig(Section):
    """The all-sigma certification of the training set (`jobs.build_dataset`)."""

    num_selection: Count = 100
    """Draws that choose the class, n0."""
    num_estimation: Count = 100
    """Fresh draws that bound its probability, n; 100 are enough for labels (arXiv 2512.01782). With
    `estimator.label_radius: shrunk`, which reads the true class in n0 + n, 10 and 56 cost a third; routers then keep
    more to one level (docs/performance.md)."""
    alpha: Alpha = 0.001
    """Failure probability of each certificate."""


class EstimatorConfig(Section):
    """The variance estimator (`jobs.train_estimator`)."""

    backbone: ClassifierConfig | None = None
    """Its network, with one output per sigma, trained from the weights given or from scratch; a checkpoint's last layer
    is replaced where it has another width. Unless given, `small_cnn`. `features`: a small head on what the classifier
    says before fine-tuning: log-probabilities (of every expert), and the features of the one nearest to sigma_e."""
    hidden: Count = 128
    """Width of that head's hidden layer."""
    feature_copies: Count = 16
    """Noisy copies of each sample that `features` computes once and keeps: the epochs go through them in turn."""
    loss: Literal["hard", "soft", "consistency", "expected_radius", "radius"] = "consistency"
    """`hard`: cross-entropy on the best sigma; `soft`: on softmax(radii); `consistency`: soft plus consistency.
    For the agreement claim (docs/design/training.md), without re-balancing: `expected_radius`, the radius of the level
    that a noisy copy picks; `radius`, the claim's own radius T."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the epochs in which `radius` trains with `expected_radius` first, so as not to fall into a constant."""
    temperature: Positive = 0.03
    """Of the smooth maximum and minimum in T, in units of sigma_e."""
    radii: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """`radius` maximises the share of these radii that T exceeds (each blurred by .05), rather than T itself."""
    consistency_weight: Literal["strong", "weak", "max_radius", "min_radius", "none"] = "strong"
    """w_r of the consistency term: R_c at the largest (strong) or smallest (weak) sigma that is predicted over the
    noisy copies; or the largest or smallest R_c over Sigma; or 1."""
    label_radius: Literal["at_n", "at_10k", "shrunk"] = "at_n"
    """Radii as certified; or those that the same share of votes would give with 10,000 draws; or `shrunk`: what
    `certify.num_estimation` draws would give the true class at half of `certify.alpha`, its share of all votes shrunk
    by a Beta prior that is fitted to the samples at that sigma."""
    consistency_lambda: NonNegative = 40.0
    """Weight of the KL term, lambda."""
    consistency_eta: NonNegative = 0.5
    """Weight of the entropy term, eta."""
    num_copies: Annotated[int, Field(ge=1)] = 2
    """Noisy copies of each sample in a step, m."""
    augment: Augment = "none"
    """Of each sample in each epoch, before it is noised; labels are those of the image as it is. `flip`; `crop_flip`: 4
    pixels of padding, a crop, a flip (CIFAR); `resized_crop`: 8% to 100% of the image, resized, a flip (ImageNet)."""
    denoiser: bool = True
    """Whether the estimator reads denoised images, as published, or the noisy ones: a denoiser-free, light one. Without
    `base.denoiser` it reads the noisy ones."""
    rebalance: bool = True
    """Weight samples by 1 / (share of samples with the same best sigma)."""
    epochs: Count = 90
    """Passes over the labelled samples."""
    batch_size: Count = 256
    """Samples of each step; the network sees `num_copies` times as many."""
    lr: Positive = 0.01
    """Learning rate of AdamW at the start."""
    weight_decay: NonNegative = 0.01
    """Of AdamW."""
    lr_step: Count = 30
    """The learning rate is multiplied by `lr_gamma` every so many epochs."""
    lr_gamma: Share = 0.5
    """See `lr_step`."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the labelled samples that is held out: the router's radius T on them is noted after each epoch, and the
    weights of the best epoch are kept."""
    holdout_copies: Count = 32
    """Noisy copies of each of those that vote."""

    @field_validator("backbone", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"arch": FEATURES} if value == FEATURES else value

    @property
    def reads_features(self) -> bool:
        """Whether it is a head on the classifier's features."""
        return self.backbone is not None and self.backbone.arch == FEATURES

    @property
    def claims_agreement(self) -> bool:
        """Whether its loss is one of the agreement claim."""
        return self.loss in ("expected_radius", "radius")

    @model_validator(mode="after")
    def _only_where_they_count(self) -> Self:
        where = {
            "consistency_": (not self.claims_agreement, f"loss: {self.loss} has no consistency term"),
            "warmup temperature radii": (self.loss == "radius", "it belongs to loss: radius"),
            "hidden feature_copies": (self.reads_features, "it belongs to backbone: features"),
            "holdout_copies": (self.holdout > 0, "holdout is 0"),
        }
        for keys, (counts, why) in where.items():
            for key, field in type(self).model_fields.items():
                if key.startswith(tuple(keys.split())) and not counts and getattr(self, key) != field.default:
                    raise ValueError(f"{key}: is set to {getattr(self, key)}, but {why}; remove it")
        if self.loss == "radius" and self.label_radius != "shrunk":
            raise ValueError(
                f"label_radius: {self.label_radius} does not say how far a wrong class is behind, which loss: radius "
                "asks for; set it to shrunk"
            )
        if self.reads_features and self.backbone != ClassifierConfig(arch=FEATURES):
            raise ValueError("backbone: features takes no other keys; its weights are those of the classifier")
        if self.reads_features and self.augment != "none":
            raise ValueError(
                f"augment: is {self.augment}, but backbone: features computes the copies of each sample once, from the "
                "image as it is; remove it"
            )
        if self.reads_features and self.feature_copies < self.num_copies:
            raise ValueError(
                f"feature_copies: {self.feature_copies} copies are fewer than num_copies = {self.num_copies}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _own_keys(self) -> Self:
        if self.backbone is not None and self.backbone.train is not None:
            raise ValueError("backbone.train: the estimator is trained as the keys of estimator say; remove it")
        if self.backbone is not None and self.backbone.label_map is not None:
            raise ValueError(
                "backbone.label_map: has no meaning for an estimator, its classes are the sigmas; remove it"
            )
        return self


class FinetuneConfig(Section):
    """Fine-tuning of the classifier at the estimated sigmas (`jobs.finetune_classifier`)."""

    share: Share = 1.0
    """A random share of the training split, drawn with the run's seed: fine-tuning reads no other image."""
    epochs: Annotated[int, Field(ge=0)] = 15
    """Passes over that share; with 0 there is no such step, and the classifier is certified as it is."""
    batch_size: Count = 128
    """Samples of each step."""
    lr: Positive = 2e-5
    """Learning rate of AdamW."""
    weight_decay: NonNegative = 0.01
    """Of AdamW."""
    augment: Augment = "none"
    """As `estimator.augment`; the sigma of a sample is that of the image as it is."""
    num_sigma_draws: Count = 100
    """Noisy copies over which the estimator's majority picks the sigma of a training sample."""


class ReferenceConfig(Section):
    """The network that is deployed, where `compute` describes a faster one that stands in for it (docs/guarantees.md).

    It sees the first `num_draws` of the estimation draws too. Radii are for it, less what the two may disagree by.
    """

    precision: Precision = "float32"
    """As `compute.precision`."""
    compile: Compile = False
    """As `compute.compile`."""
    batch_size: Count | None = None
    """Rows of its passes, for example 1; `compute.batch_size` unless given."""
    num_draws: Count = 1000
    """Estimation draws of each stage that it sees. They limit the radius: it cannot be shown to agree more often."""
    alpha_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each stage's alpha for how often the two disagree."""


class CertifyConfig(Section):
    """Test-time certification (`jobs.certify`)."""

    num_selection: Count = 100
    """Draws of each stage that choose the class or the noise level, n0."""
    num_estimation: Count = 10_000
    """Fresh draws of each stage that bound its probability, n. They set the largest radius that can be certified."""
    alpha: Alpha = 0.001
    """Total failure probability."""
    alpha_split: Literal["halves", "full"] = "halves"
    """`halves`: Dual RS spends half of alpha on each stage, as published; `full`: all of it on each, for the same claim
    (see docs/guarantees.md; not for claim `agreement`)."""
    claim: Claim = "constant"
    """What Dual RS says of its ball. `constant`: noise level and class stay, as published (`certificates/dual`);
    `agreement`: the class stays, whatever level the router picks (`certificates/agreement`)."""
    router: Router = "median"
    """Of claim `agreement`, how the estimator's votes pick a level: `median`, levels being ordered; or `plurality`, as
    published."""
    router_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of alpha that the router spends under claim `agreement`, the class the rest. Where the router is sure the
    class decides the radius, so a small share costs little and gives the class more."""
    bound: Literal["clopper_pearson", "randomized"] = "clopper_pearson"
    """Lower confidence bound of a probability. `randomized`: it fails with alpha exactly, so radii are a little larger
    (docs/guarantees.md); the row keeps the random number, a function of the noise's key. For budget `fixed` and claim
    `constant`."""
    reference: ReferenceConfig | None = None
    """The network that certificates are for, where it is not the one that `compute` computes: the same weights in
    another precision, compiled or not, or in passes of other rows. For budget `fixed` and claim `constant`."""
    budget: Literal["fixed", "sequential", "grid"] = "fixed"
    """`fixed`: all draws, the field's standard; `sequential`: the same radii, each stage of Dual RS stops as soon as
    it cannot change what is reported; `grid`: only which radii of `grid` are exceeded."""
    multiscale: bool = False
    """Whether `jobs.pipeline` certifies the Multiscale baseline too; not part of a run's identity. It takes at most as
    many draws as standard RS. `jobs.recertify` derives it without any, for `budget: fixed`."""
    level_shares: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """Multiscale's shares of alpha, one for each of `sigmas`, at most 1 in all: what is spent where that level decides.
    Equal unless given."""
    grid: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """Radii that `budget: grid` decides; `report.radii` unless given."""
    look_every: Count = 100
    """Draws between two looks of a sequential budget."""
    early_share: Annotated[float, Field(gt=0, lt=0.49)] = 0.1
    """Share of alpha for stopping early; the rest is for the look at the last draw."""
    futility_z: Annotated[float, Field(gt=0)] = 3.0
    """`grid` gives up on the next radius when it is so many standard deviations out of reach: smaller saves draws and
    loses more radii (never the guarantee), .inf gives up only on what cannot be reached."""

    @model_validator(mode="after")
    def _both_stages(self) -> Self:
        if self.claim == "agreement" and self.alpha_split != "halves":
            raise ValueError(
                f"alpha_split: {self.alpha_split!r} is for claim constant; under agreement an error of either stage is "
                "enough, use halves"
            )
        odd = "reference" if self.reference else "bound" if self.bound != "clopper_pearson" else None
        others = {"budget": self.budget != "fixed", "claim": self.claim != "constant", "multiscale": self.multiscale}
        for key in (key for key, is_set in others.items() if odd and is_set):
            raise ValueError(
                f"{odd}: is for budget fixed and claim constant, without multiscale, but {key} is "
                f"{getattr(self, key)}; change one of them"
            )
        if self.bound == "randomized" and self.alpha >= 0.5:
            raise ValueError(f"bound: randomized needs alpha below 1/2, got {self.alpha}; lower alpha")
        if self.reference and self.reference.num_draws > self.num_estimation:
            raise ValueError(
                f"reference.num_draws: {self.reference.num_draws} draws of num_estimation = {self.num_estimation}; "
                "lower it"
            )
        return self

    @property
    def routed(self) -> Literal["dual", "agreement"]:
        """The method that certifies what is claimed."""
        return "dual" if self.claim == "constant" else "agreement"


class ReportConfig(Section):
    """The report (`jobs.report`); changing it needs no new run."""

    radii: Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Radii of the table, pixel scale [0, 1], in the norm of the noise: l2 for Gaussian noise."""
    strict: bool = True
    """Count radius > r (the Dual RS authors) rather than radius >= r (older scripts)."""
    gallery: Annotated[int, Field(ge=0)] = 4
    """So many examples with the largest certificates, the smallest, and routed wrong are shown noisy and denoised."""
