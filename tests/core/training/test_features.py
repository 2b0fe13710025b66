"""A head on features: computed once, to the same bits whenever; held-out samples; what is saved."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.config import EstimatorConfig, parse_config
from core.errors import ConfigError, ModelError
from core.models.checkpoints import load_model, save_model
from core.models.classifiers import ImageClassifier
from core.models.features import FeatureRouter, expert_place, new_router
from core.models.small import SmallConvNet
from core.training.estimator import EstimatorObjective, hold_out
from core.training.features import Features
from core.training.loop import Training
from core.training.radius_loss import largest_share, voted_radius
from core.training.samples import Samples
from tests.core.training.test_training import toy

PLAIN = {"sigmas": [0.25, 0.5], "report": {"radii": [0, 0.5]}}
SETTINGS = {
    "backbone": "features", "loss": "radius", "label_radius": "shrunk", "hidden": 8, "feature_copies": 5,
    "epochs": 4, "batch_size": 9,
    "lr": 0.01, "holdout": 0.3, "holdout_copies": 6,
}  # fmt: skip


def router(shape: tuple[int, ...] = (1, 8, 8), outputs: int = 2) -> FeatureRouter:
    torch.manual_seed(0)
    return new_router([SmallConvNet(1, 8, 2, width=4), SmallConvNet(1, 8, 2, width=8)], 1, shape, 8, outputs)


def training(whole: FeatureRouter, num: int = 40, **keys: Any) -> Training:
    data, radii = toy(num)
    config = EstimatorConfig.model_validate({**SETTINGS, **keys})
    objective = EstimatorObjective(data, radii / 2, 0.5, None, config, 3, extractor=whole.extractor)
    return Training(whole.head, objective)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def curve(one: Training, name: str) -> list[float]:
    return [record[name] for record in one.history]


def test_features_are_computed_once_and_do_not_depend_on_when() -> None:
    extractor, data = router().extractor, toy(12)[0]
    passes: list[Tensor] = []

    def extract(noisy: Tensor) -> Tensor:
        passes.append(noisy)
        return extractor(noisy)  # type: ignore[no-any-return]

    def kept() -> Features:
        return Features(Samples(data, np.arange(12), "t", 0), 0.5, 5, extract, extractor.width(data.shape))

    one, other = kept(), kept()
    first = one.batch(0, np.arange(12), 2).view(2, 12, -1)
    assert len(passes) == 12
    for number in reversed(range(12)):  # one by one, in another order, with other copies first
        other.batch(1, np.array([number]), 2)
    assert torch.equal(other.batch(0, np.arange(12), 2).view(2, 12, -1), first)
    assert torch.equal(one.batch(0, np.array([7, 2]), 2).view(2, 2, -1), first[:, [7, 2]])
    assert len(passes) == 24
    # Copies in turn: 0 1, 2 3, 4 0, and after five epochs again; each as the network itself sees it.
    noisy = Samples(data, np.arange(12), "t", 0).noisy(0, np.array([7]), [0.5], 5)
    expected = extractor(noisy).half()
    for epoch, copies in enumerate([(0, 1), (2, 3), (4, 0), (1, 2), (3, 4), (0, 1)]):
        assert torch.equal(one.batch(epoch, np.array([7]), 2), expected[list(copies)])
    assert (expected[0] != expected[1]).any()


def test_features_too_large_for_memory_or_for_float16_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples(toy(4)[0], np.arange(4), "t", 0)
    huge = Features(samples, 0.5, 2, lambda noisy: torch.full((2, 3), 1e6), 3)
    with pytest.raises(ModelError, match=r"features are not finite in float16; use another"):
        huge.batch(0, np.array([0]), 1)
    monkeypatch.setattr("os.sysconf", lambda name: 400 if name == "SC_PHYS_PAGES" else 1)
    with pytest.raises(ConfigError, match=r"features of 20 copies of 4 samples take .* lower estimator.feature_copies"):
        Features(samples, 0.5, 20, lambda noisy: noisy, 3)


def test_training_on_features_that_goes_on_from_any_batch_ends_with_the_same_bits() -> None:
    states, whole = [], training(router())
    for _ in whole.run():
        buffer = io.BytesIO()
        torch.save(whole.state(), buffer)
        states.append(buffer.getvalue())
    assert len(states) == 4 * 4  # 28 samples learnt from, in batches of 9
    assert len(curve(whole, "held_out")) == 4
    for content in states[::3]:
        torch.manual_seed(99)
        resumed = training(router())
        resumed.load_state(torch.load(io.BytesIO(content), weights_only=True))
        for _ in resumed.run():
            pass
        assert equal(weights(resumed.model), weights(whole.model))
        assert curve(resumed, "held_out") == curve(whole, "held_out")
        assert curve(resumed, "loss") == curve(whole, "loss")


def test_training_warms_up_with_the_expected_radius() -> None:
    record = training(router(), warmup=0.5)
    for _ in record.run():
        pass
    loss, expected, joint = (np.array(curve(record, name)) for name in ("loss", "expected_radius", "radius"))
    np.testing.assert_allclose(loss, -np.array([*expected[:2], *joint[2:]]), rtol=1e-12)


def test_training_with_held_out_samples_keeps_the_epoch_that_is_worth_most(monkeypatch: pytest.MonkeyPatch) -> None:
    worth = iter([0.1, 0.4, 0.4, 0.2])
    monkeypatch.setattr(
        EstimatorObjective,
        "worth",
        lambda self, model, chosen: torch.full((len(chosen),), next(worth), dtype=torch.float64),
    )
    seen, record = [], training(router())
    for ended in record.run():
        if ended:
            seen.append(weights(record.model))
    assert curve(record, "held_out") == pytest.approx([0.1, 0.4, 0.4, 0.2])
    assert equal(weights(record.model), seen[1])
    assert equal(record.state()["model"], seen[1])
    assert not equal(seen[1], seen[2])


def test_worth_is_what_the_votes_of_noisy_copies_promise_and_workers_share_the_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without features, against the networks themselves; each worker sums its part."""
    data, radii = toy(40)
    held = hold_out(40, 0.3, 3, "train_estimator")[1]
    sums: list[float] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: sums.append(total.item()))
    noisy = Samples(data, held, "train_estimator", 3).noisy(0, np.arange(12), [0.5] * 12, 6)
    for reads_features in (True, False):
        whole, plain = router(), SmallConvNet(1, 8, 2)
        extra: dict[str, Any] = {} if reads_features else {"backbone": None, "hidden": 128, "feature_copies": 16}
        config = EstimatorConfig.model_validate({**SETTINGS, **extra})
        extractor = whole.extractor if reads_features else None
        objective = EstimatorObjective(data, radii / 2, 0.5, None, config, 3, extractor=extractor)
        model: nn.Module = whole.head if reads_features else plain
        assert (len(objective), objective.num_held_out) == (28, 12)
        with torch.no_grad():
            seen = whole.extractor(noisy).half().float() if reads_features else noisy
            picked = model(seen).argmax(dim=1).view(6, 12)
        votes = torch.stack([(picked == level).sum(dim=0) for level in range(2)], dim=1)
        expected = voted_radius(votes, torch.from_numpy(radii[held] / 2), 0.5, largest_share(10_000, 0.0005))
        with torch.no_grad():
            found = objective.worth(model, np.arange(12))
        assert torch.allclose(found, expected, rtol=1e-6)
        assert expected.std() > 0
        sums.clear()
        for rank in range(5):
            Training(model, objective, rank, 5)._held_out()
        assert sum(sums) == pytest.approx(expected.sum().item(), rel=1e-6)


def test_hold_out_is_a_function_of_seed_and_name_and_refuses_to_leave_nothing() -> None:
    learnt, held = hold_out(50, 0.2, 0, "a")
    assert sorted([*learnt, *held]) == list(range(50))
    assert len(held) == 10
    assert np.array_equal(held, hold_out(50, 0.2, 0, "a")[1])
    assert not np.array_equal(held, hold_out(50, 0.2, 1, "a")[1])
    assert not np.array_equal(held, hold_out(50, 0.2, 0, "b")[1])
    assert np.array_equal(hold_out(7, 0.0, 0, "a")[0], np.arange(7))
    for num, share in ((4, 0.1), (3, 0.9)):
        with pytest.raises(ConfigError, match=r"estimator.holdout: .* labelled samples leaves"):
            hold_out(num, share, 0, "a")


def test_head_is_standardised_by_the_samples_learnt_from() -> None:
    whole = router()
    record = training(whole)
    next(record.run())
    objective = record.objective
    assert isinstance(objective, EstimatorObjective)
    values = objective._copies(0, np.arange(28), 5).double()
    np.testing.assert_allclose(whole.head._mean.double(), values.mean(dim=0), rtol=1e-5, atol=1e-6)
    variance = values.var(dim=0, correction=0)
    np.testing.assert_allclose(whole.head._scale.double() ** 2, variance + 0.01 * variance.mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["experts", "resnet110", "test_resnet", "test_vit"])
def test_router_saved_and_loaded_gives_the_same_logits_and_is_its_own(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool: list[SmallConvNet | ImageClassifier] = [SmallConvNet(1, 8, 10), SmallConvNet(1, 8, 10, width=4)]
    if kind != "experts":
        pool = [ImageClassifier(kind, 12, 1, 32 if kind == "resnet110" else None, label_map=[*range(9), 11])]
    pool = [module.eval() for module in pool]
    images = torch.rand(3, 1, 8, 8)
    with torch.inference_mode():
        features, logits = pool[-1].parts(images)
        assert torch.equal(logits, pool[-1](images))
        last = [module for module in pool[-1].modules() if isinstance(module, nn.Linear)][-1]
        picked = last(features) if kind == "experts" else last(features)[:, [*range(9), 11]]
        torch.testing.assert_close(picked, logits)
    whole = new_router(pool, len(pool) - 1, (1, 8, 8), 16, 3)
    save_model(whole, tmp_path / "router.safetensors")
    again = load_model(tmp_path / "router.safetensors")
    assert isinstance(again, FeatureRouter)
    with torch.inference_mode():
        before = whole(images)
        assert before.shape == (3, 3)
        assert torch.equal(again(images), before)
        for parameter in pool[0].parameters():
            parameter.add_(1.0)
        assert torch.equal(again(images), before)
        assert not torch.equal(whole(images), before)
    assert not any(module.training for module in again.train().extractor.modules())


def test_expert_place_is_the_nearest_level() -> None:
    assert expert_place([None], 0.7) == 0
    assert [expert_place([0.25, 0.5, 1.0], sigma) for sigma in (0.1, 0.375, 0.5, 0.76, 3.0)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=radius", "consistency_lambda=3"], "consistency_lambda: is set to 3.0, but loss: radius has no consis"),
        (["loss=expected_radius", "consistency_weight=weak"], "consistency_weight: is set to weak, but loss: expected"),
        (["temperature=0.1"], "temperature: is set to 0.1, but it belongs to loss: radius; remove it"),
        (["loss=expected_radius", "warmup=0.1"], "warmup: is set to 0.1, but it belongs to loss: radius"),
        (["loss=radius"], "label_radius: at_n does not say how far a wrong class is behind"),
        (["radii=[0.5]"], "radii: is set to .*but it belongs to loss: radius"),
        (["hidden=64"], "hidden: is set to 64, but it belongs to backbone: features"),
        (["holdout_copies=64"], "holdout_copies: is set to 64, but holdout is 0"),
        (["backbone={arch: features, checkpoint: a}"], "backbone: features takes no other keys"),
        (["backbone=features", "feature_copies=3", "num_copies=4"], "feature_copies: 3 copies are fewer than num_co"),
        (["backbone=feature"], "estimator.backbone"),
    ],
)
def test_config_keys_that_would_not_count_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(PLAIN, [f"estimator.{override}" for override in overrides])
    assert "\n" not in str(caught.value)


def test_config_features_backbone_survives_a_round_trip_and_old_fingerprints_stay() -> None:
    config = parse_config(
        PLAIN,
        [
            "estimator.backbone=features",
            "estimator.loss=radius",
            "estimator.label_radius=shrunk",
            "estimator.radii=[0.25]",
        ],
    )
    assert config.estimator.reads_features
    assert parse_config(config.model_dump(mode="json")) == config
    assert parse_config({**PLAIN, "noise_version": 1}).fingerprint() == "268c77f440ac15f7"
    assert config.fingerprint() != parse_config(PLAIN).fingerprint()
