import itertools
import json
import math
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from core.agreement_records import AgreementVotes, Router, StageVotes
from core.config import TrainConfig, load_config, parse_config
from core.errors import ConfigError
from core.procedures.agreement import Agreement, agreement_from_votes
from core.records import Sampling, Stop

MINIMAL = {"sigmas": [0.25, 0.5], "certify": {"num_estimation": 10_000}, "report": {"radii": [0, 0.5]}}


def test_load_config_shipped_file_is_valid() -> None:
    config = load_config(Path("configs/digits.yaml"), ["seed=3", "certify.alpha=1e-4"])
    assert (config.seed, config.certify.alpha, config.estimator_sigma) == (3, 1e-4, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("certify.alpah=0.1", r"unknown key 'certify.alpah'; did you mean 'alpha'"),
        ("frobnicate=9", r"unknown key 'frobnicate'; known keys: seed, sigmas"),
        ("seed=x", r"'seed' is 'x': input should be a valid integer"),
        ("seed=1.5", r"'seed' is 1.5"),
        ("seed=true", r"'seed' is True"),
        ("sigmas=[0.25, -1]", r"'sigmas.1' is -1: input should be greater than 0"),
        ("sigmas=[.inf]", r"'sigmas.0' is inf: must be finite"),
        ("sigmas=[]", r"'sigmas' is \[\]"),
        ("sigmas=0.25", r"'sigmas' is 0.25: expected a list, for example \[0.25\]$"),
        ("report.radii=0.5", r"'report.radii' is 0.5: expected a list, for example \[0.5\]$"),
        ("sigmas=[0.5, 0.25]", r"sigmas: must be ascending and distinct, got \[0.5, 0.25\]; sort them"),
        ("sigma_e=0.3", r"sigma_e: must be at least max\(sigmas\) = 0.5, got 0.3.*leave it out, or use certify.claim"),
        ("certify={claim: agreement, alpha_split: full}", r"alpha_split: 'full' is for claim constant.*use halves"),
        ("certify.alpha=1.0", r"'certify.alpha' is 1.0: input should be less than 1"),
        ("certify.alpha=0", r"'certify.alpha' is 0: input should be greater than 0"),
        ("report.radii=[0.5, 0.1]", r"report.radii: must be ascending and distinct, got \[0.5, 0.1\]; sort them"),
        ("certify.num_estimation=3", r"certify.num_estimation: 3 draws"),
        ("labels.num_estimation=3", r"labels.num_estimation: 3 draws.*at least 10"),
        ("dataset.name=mnist", r"'dataset.name' is 'mnist': input should be 'digits'"),
        ("base.noise_range=[1, 0.1]", r"base.noise_range: is now base.denoiser.train.sigma and base.classifier.train."),
        ("base.classifier_width=4", r"base.classifier_width: is now base.classifier.width .*estimator.backbone: \{"),
        ("base.train_experts={0.25: 8}", r"base.train_experts: is now base.experts: \{SIGMA: \{width: WIDTH, train"),
        ("base.classifier.train.sigma=[1, 0.1]", r"base.classifier.train.sigma: .*low <= high, got \(1.0, 0.1\)"),
        ("base.classifier.train.momentum=0.5", r"train.momentum: is set to 0.5, but optimizer is adamw; remove it"),
        ("base.classifier.train.lr_step=5", r"train.lr_step: is set to 5, but schedule is one_cycle"),
        ("base.classifier.train.warmup=0.1", r"train.warmup: .* one_cycle has a warm-up of its own"),
        ("base.classifier.train.epoch=5", r"unknown key 'base.classifier.train.epoch'; did you mean 'epochs'"),
        ("base.classifier.train.loss=smothmix", r"'base.classifier.train.loss.name' is 'smothmix': input should be "),
        ("base.classifier.train.loss.epsilon=2", r"train.loss.epsilon: loss gaussian has no such number; it has cop"),
        ("base.classifier={arch: resnet110, width: 8, train: {}}", r"base.classifier.width: says nothing about resnet"),
        ("base.classifier={checkpoint: a, label_map: [1], train: {}}", r"classifier.label_map: what is trained here"),
        ("base.denoiser.train.channels=[6]", r"base.denoiser.train.channels: 6 is no multiple of groups = 4"),
        ("base.denoiser={checkpoint: a, train: {layers: 2}}", r"denoiser.train.layers: a has a network of its own"),
        ("base.denoiser={schedule: linear-10}", r"base.denoiser.checkpoint: is missing; give it, or arch, or train"),
        ("estimator.backbone={arch: resnet110, train: {}}", r"estimator.backbone.train: the estimator is trained as"),
        ("certify", r"override 'certify': expected key=value"),
        ("certify.alpha.x=1", r"'alpha' is a value, not a section"),
        ("seed=[", r"not valid YAML"),
        ("base.experts={0.25: {width: 6, train: {}}}", r"'base.experts.0.25.width' is 6"),
        ("certify.level_shares=[1.0]", r"certify.level_shares: .*one for each of 2 noise levels.*got \[1.0\]"),
        ("certify.level_shares=[0.9, 0.2]", r"certify.level_shares: .*at most 1 in all"),
        (
            "base.experts={0.25: {checkpoint: a}}",
            r"base.experts: has experts for \[0.25\], expected one for each of sigmas = \[0.25, 0.5\] and no other",
        ),
        ("base.experts={}", r"base.experts: has experts for \[\]"),
        ("base.experts={x: {checkpoint: a}}", r"'base.experts.x.\[key\]' is 'x': input should be a valid number"),
        ("base.experts={0.25: {chekpoint: a}}", r"unknown key 'base.experts.0.25.chekpoint'; did you mean 'check"),
        ("base.experts={0.25: {arch: resnet110}}", r"base.experts.0.25: resnet110 has no weights; give experts"),
        ("base={classifier: {checkpoint: a}, experts: {0.25: {checkpoint: a}}}", r"base.experts: goes without"),
        ("finetune.share=0", r"'finetune.share' is 0: input should be greater than 0"),
        ("finetune.epochs=-1", r"'finetune.epochs' is -1: input should be greater than or equal to 0"),
        ("base.denoiser={checkpoint: none, schedule: linear-10}", r"base.denoiser.schedule: .* which is none; remove"),
        ("base.denoiser={checkpoint: none, train: {}}", r"base.denoiser.train: says something .* which is none"),
        ("base.denoiser=false", r"'base.denoiser' is False: input should be a valid dictionary"),
    ],
)
def test_parse_config_bad_value_names_the_key_and_the_remedy(override: str, message: str) -> None:
    plain = {**MINIMAL, "certify": {"num_estimation": 10_000, "alpha": 0.001}}
    with pytest.raises(ConfigError, match=message):
        parse_config(plain, [override])


def test_parse_config_num_estimation_advice_is_enough_and_not_too_much() -> None:
    # All n draws agree: alpha^(1/n) > Phi(r / sigma), with alpha / 2 for a stage of Dual RS.
    needed = math.ceil(math.log(0.0005) / math.log(stats.norm.cdf(1.57 / 0.5)))
    with pytest.raises(ConfigError, match=f"at least {needed:,}") as caught:
        parse_config({**MINIMAL, "report": {"radii": [1.57]}, "certify": {"num_estimation": 100}}).check_radii()
    assert "1.57" in str(caught.value)
    parse_config({**MINIMAL, "report": {"radii": [1.57]}, "certify": {"num_estimation": needed}}).check_radii()


def test_parse_config_several_mistakes_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"'seed'(.|\n)*'certify.alpha'"):
        parse_config({**MINIMAL, "seed": -1, "certify": {"alpha": 2.0}})


def test_parse_config_missing_sigmas_says_so() -> None:
    with pytest.raises(ConfigError, match="'sigmas' is missing; add it"):
        parse_config({})
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        parse_config([1])


def test_load_config_missing_file_and_bad_yaml_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml'.*No such file"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("sigmas: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_load_config_evaluates_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("sigmas: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "evil.yaml")


def test_experts_keys_are_numbers_however_they_are_written() -> None:
    texts = ("{0.25: {checkpoint: a}, 0.5: {checkpoint: b}}", "{'0.5': {checkpoint: b}, '0.25': {checkpoint: a}}")
    one, other = (parse_config(MINIMAL, [f"base.experts={text}"]) for text in texts)
    assert one.fingerprint() == other.fingerprint() != parse_config(MINIMAL).fingerprint()
    assert parse_config(one.model_dump(mode="json")) == one
    assert one.classifiers == {"classifier-0.25": 0.25, "classifier-0.5": 0.5}
    assert parse_config(MINIMAL).classifiers == {"classifier": None}


def test_networks_of_a_configuration() -> None:
    pool = "base.experts={0.25: {train: {}}, 0.5: {train: {loss: macer, sigma: 0.3}}}"
    assert parse_config(MINIMAL).certified == {"denoiser": "denoiser", "classifier": "classifier_finetuned"}
    bare = parse_config(MINIMAL, ["base.denoiser=none", pool])
    assert bare.base_models == ("classifier-0.25", "classifier-0.5")
    assert [*bare.certified.values()] == ["classifier_finetuned-0.25", "classifier_finetuned-0.5"]
    assert parse_config(bare.model_dump(mode="json")) == bare
    (one, macer), both = (bare.training_of(role) for role in bare.classifiers), parse_config(MINIMAL)
    assert isinstance(one, TrainConfig)
    assert isinstance(macer, TrainConfig)
    assert (one.sigma, one.clean, macer.sigma, macer.clean) == ((0.25, 0.25), False, (0.3, 0.3), False)
    alone = both.training_of("classifier")
    assert isinstance(alone, TrainConfig)
    assert (alone.sigma, alone.clean) == ((0.05, 1.5), True)  # behind the denoiser
    assert parse_config(MINIMAL, ["base.classifier={checkpoint: a}"]).training_of("classifier") is None
    as_it_is = parse_config(MINIMAL, ["finetune.epochs=0"])
    assert as_it_is.certified == {"denoiser": "denoiser", "classifier": "classifier"}
    assert len({config.fingerprint() for config in (parse_config(MINIMAL), bare, as_it_is)}) == 3
    with pytest.raises(ConfigError, match=r"rounds: 2 rounds, but finetune.epochs is 0"):
        parse_config(MINIMAL, ["finetune.epochs=0", "rounds=2"])


def test_identity_changes_with_what_decides_a_count_and_with_nothing_else() -> None:
    base = parse_config(MINIMAL).fingerprint()
    for same in (
        "compute.max_replicas=7",
        "compute.shard_examples=3",
        "compute.executor=local",
        "report.radii=[0.1]",
        "rounds=3",
        "sigma_e=0.5",
        "certify.multiscale=true",
    ):
        assert parse_config(MINIMAL, [same]).fingerprint() == base
    for other in ("seed=1", "compute.batch_size=7", "compute.chunk_size=7", "certify.num_selection=7", "sigma_e=0.6",
                  "certify.level_shares=[0.5,0.5]", "base.experts={0.25: {train: {}}, 0.5: {train: {}}}"):  # fmt: skip
        assert parse_config(MINIMAL, [other]).fingerprint() != base


def test_fingerprint_is_that_of_what_differs_from_the_defaults() -> None:
    """A run made before a key existed goes on under a version that has it."""
    plain = parse_config(MINIMAL).model_dump(mode="json")
    spelled_out = parse_config(plain)
    assert spelled_out.fingerprint() == parse_config(MINIMAL).fingerprint()
    text = json.dumps(spelled_out._identity(exclude_defaults=True))
    assert "alpha_split" not in text
    assert "sigmas" in text
    grids = [
        parse_config(MINIMAL, ["certify.budget=grid", f"certify.grid={grid}"]) for grid in ("[0.1]", "[0.2]", "[]")
    ]
    assert len({config.fingerprint() for config in grids}) == 3


def test_check_radii_beyond_the_reach_is_refused_unless_another_curve_reaches_them() -> None:
    config = parse_config(MINIMAL, ["report.radii=[0, 5]"])
    assert config.reach == pytest.approx(0.5 * stats.norm.ppf(0.0005 ** (1 / 10_000)))
    with pytest.raises(
        ConfigError, match=r"but report.radii asks for 5; no number of draws certifies it at these sigmas, or"
    ):
        config.check_radii()
    with pytest.raises(ConfigError, match="asks for 5"):
        config.check_radii(4.9)
    config.check_radii(5.0)
    parse_config(MINIMAL).check_radii()


def test_reach_of_the_agreement_claim_is_what_the_sides_of_the_router_allow() -> None:
    """By the procedure itself on the best votes there are, for every level that the router may pick."""
    for sigma_e, router, num in itertools.product((0.12, 0.25, 0.4, 1.0), get_args(Router), (12, 60)):
        share = 0.5 if num == 12 else 0.2
        values = [
            f"certify.router_share={share}",
            f"sigma_e={sigma_e}",
            "certify.claim=agreement",
            f"certify.router={router}",
            "sigmas=[0.2, 0.3, 0.5]",
        ]
        config = parse_config(MINIMAL, [*values, f"certify.num_estimation={num}"])
        terms = Agreement(config.sigmas, sigma_e, Sampling(10, num, config.certify.alpha), router, router_share=share)
        best = 0.0
        for level in range(3):
            votes, stage = np.eye(3, dtype=np.int64)[level], StageVotes(np.array([num, 0]), num, Stop.FULL)
            routed = StageVotes(num * votes, num, Stop.FULL)
            given = AgreementVotes(10 * votes, np.array([10, 0]), routed, (stage,) * 3)
            best = max(best, agreement_from_votes(terms, given).radius)
        assert config.reach == pytest.approx(best, abs=1e-12)
        asked = f"report.radii=[{1.2 * best}]"
        with pytest.raises(ConfigError, match=f"and sigma_e = {sigma_e}") as caught:
            parse_config(config.model_dump(mode="json"), [asked]).check_radii()
        found = re.search(r"at least ([\d,]+)", str(caught.value))
        assert found is not None
        enough = int(found[1].replace(",", ""))
        parse_config(config.model_dump(mode="json"), [asked, f"certify.num_estimation={enough}"]).check_radii()
        with pytest.raises(ConfigError, match=r"report\.radii asks for"):
            parse_config(config.model_dump(mode="json"), [asked, f"certify.num_estimation={enough - 1}"]).check_radii()


def test_check_radii_far_beyond_every_level_is_refused_all_the_same() -> None:
    with pytest.raises(ConfigError, match="asks for 50"):
        parse_config(MINIMAL, ["report.radii=[50]"]).check_radii()


def test_claim_and_router_leave_the_fingerprint_of_older_runs_and_make_another_where_they_are_set() -> None:
    base = parse_config(MINIMAL)
    assert (base.certify.claim, base.certify.routed, base.certify.router) == ("constant", "dual", "median")
    assert "claim" not in json.dumps(base._identity(exclude_defaults=True))
    agreement = parse_config(MINIMAL, ["certify.claim=agreement"])
    assert agreement.certify.routed == "agreement"
    assert len({c.fingerprint() for c in (base, agreement, parse_config(MINIMAL, ["certify.router=plurality"]))}) == 3


def test_uncut_sigma_e_is_where_the_routers_reach_is_that_of_the_class() -> None:
    """With all n votes for it a stage reaches sigma Phi^-1(alpha^(1/n)): Clopper-Pearson's closed form."""
    terms = ["certify.claim=agreement", "certify.num_estimation=1000", "certify.router_share=0.1", "sigmas=[0.25,0.5]"]
    ratio = stats.norm.ppf(0.0009**1e-3) / stats.norm.ppf(0.0001**1e-3)
    wanted = math.ceil(100 * 0.5 * ratio) / 100
    assert parse_config(MINIMAL, terms).uncut_sigma_e == wanted == 0.53
    assert parse_config(MINIMAL, [*terms, "sigma_e=0.52"]).uncut_sigma_e == wanted
    assert parse_config(MINIMAL, [*terms, "sigma_e=0.53"]).uncut_sigma_e is None
    assert parse_config(MINIMAL, terms[1:2]).uncut_sigma_e is None
