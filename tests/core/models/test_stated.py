"""What checkpoints of the field say, or do not say, of their weights, pixels and classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import ClassifierConfig
from core.errors import ModelError
from core.models.classifiers import ImageClassifier, build_classifier
from core.models.stated import by_timm, by_transformers, label_map_of
from core.models.weights import read_checkpoint, read_json

Weights = dict[str, Tensor]
ARCH, SIZE = "test_efficientnet", 32
"""timm's smallest: 100 thousand parameters, mean .485 .456 .406."""
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """The network of ARCH with 4 outputs."""
    torch.manual_seed(0)
    return ImageClassifier(ARCH, 4).net.eval()


def built(path: Path, classes: Any = 4, **keys: Any) -> ImageClassifier:
    names = None if isinstance(classes, int) else classes
    config = ClassifierConfig(**{"arch": ARCH, "checkpoint": str(path), "input_size": SIZE, **keys})
    return build_classifier(config, classes if names is None else len(names), class_names=names)


def folder(path: Path, net: nn.Module, **files: Mapping[str, Any]) -> Path:
    """A folder with the weights and these JSON files."""
    path.mkdir(exist_ok=True)
    save_file(net.state_dict(), path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def logits(net: nn.Module, images: Tensor, mean: Any, std: Any) -> Tensor:
    """Normalise by plain loops over the channels, then the network."""
    planes = [(images[:, channel] - mean[channel]) / std[channel] for channel in range(3)]
    with torch.inference_mode():
        out: Tensor = net(torch.stack(planes, dim=1))
    return out


def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def same(model: ImageClassifier, net: nn.Module, mean: Any, std: Any) -> bool:
    with torch.inference_mode():
        return torch.allclose(model(images()), logits(net, images(), mean, std), atol=1e-5)


RAW, EMA = (
    {"a.weight": torch.zeros(1), "b.weight": torch.zeros(2)},
    {k: torch.ones(n) for k, n in (("a.weight", 1), ("b.weight", 2))},
)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net.", "0.", "model.", "backbone.", "model.module."]
)
def test_read_checkpoint_prefix_of_all_names_is_dropped_and_said(prefix: str, tmp_path: Path) -> None:
    save_file({f"{prefix}{key}": value for key, value in RAW.items()}, tmp_path / "c.safetensors")
    found = read_checkpoint(tmp_path / "c.safetensors")
    assert (found.prefix, found.weights.keys()) == (prefix, RAW.keys())


def test_build_classifier_prefix_of_some_names_is_named_in_the_refusal(net: nn.Module, tmp_path: Path) -> None:
    some = {f"net.{key}" if key.startswith("blocks") else key: value for key, value in net.state_dict().items()}
    torch.save(some, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"missing: blocks\.0.*unexpected: net\.blocks\.0"):
        built(tmp_path / "c.pt")
    torch.save({"_conv_stem.weight": torch.zeros(1), "_bn0.weight": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"no classifier\.weight.*EfficientNet-PyTorch's names"):
        built(tmp_path / "c.pt")


def test_build_classifier_cohens_files_want_the_normalisation_that_is_in_their_code(
    net: nn.Module, tmp_path: Path
) -> None:
    cohen = {"arch": "x", "state_dict": {f"1.module.{key}": value for key, value in net.state_dict().items()}}
    torch.save(cohen, tmp_path / "c.pth.tar")
    said = r"does not say how its pixels are normalised \(.* begin with '1\.module\.'.*\[0\.4914, 0\.4822, 0\.4465\]"
    for keys in ({}, {"mean": CIFAR[0]}):
        with pytest.raises(ModelError, match=said):
            built(tmp_path / "c.pth.tar", **keys)
    model = built(tmp_path / "c.pth.tar", mean=CIFAR[0], std=CIFAR[1])
    assert same(model, net, *CIFAR)
    assert not same(model, net, [0.5] * 3, [0.5] * 3)
    assert model.taken["dropped_prefix"] == "1.module."
    assert model.taken["mean"] == "[0.4914, 0.4822, 0.4465] (the configuration)"
    # Nobody publishes weights of resnet110, so there is no usual normalisation either.
    bare = ImageClassifier("resnet110", 10).net.state_dict()
    torch.save(bare, tmp_path / "r.pt")
    with pytest.raises(ModelError, match=r"normalised \(resnet110 has no published weights\)"):
        built(tmp_path / "r.pt", 10, arch="resnet110")


@pytest.mark.parametrize("names", [("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std")])
def test_build_classifier_normalising_layer_with_buffers_is_obeyed(
    names: tuple[str, str], net: nn.Module, tmp_path: Path
) -> None:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in CIFAR)
    weights = {f"module.1.{key}": value for key, value in net.state_dict().items()}
    torch.save({**weights, f"module.0.{names[0]}": mean, f"module.0.{names[1]}": std}, tmp_path / "c.pt")
    model = built(tmp_path / "c.pt")
    assert same(model, net, *CIFAR)
    assert "its normalising layer" in model.taken["mean"]
    with torch.device("meta"):  # names and shapes alone
        assert built(tmp_path / "c.pt").num_outputs == 4
    torch.save({**weights, "module.0.mean": 255 * mean, "module.0.std": 255 * std}, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"mean is 125\.307 in the pixel scale \[0, 1\]: give mean and std in that"):
        built(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "says",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False, "do_normalize": False},
        {
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.1] * 3,
            "image_std": 1.0,
        },
    ],
)
def test_by_transformers_normalises_as_image_processors_do(says: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5)).astype(np.float64)
    expected = pixels.copy()  # image_processing_utils: rescale bytes, then normalise, each where it is switched on
    if says.get("do_rescale", True):
        expected = expected * says.get("rescale_factor", 1 / 255)
    if says.get("do_normalize", True):
        mean, std = (np.broadcast_to(says[key], 3)[:, None, None] for key in ("image_mean", "image_std"))
        expected = (expected - mean) / std
    found = by_transformers(says, "x")
    assert found.mean is not None
    assert found.std is not None
    ours = (pixels / 255 - np.broadcast_to(found.mean, 3)[:, None, None]) / np.broadcast_to(found.std, 3)[:, None, None]
    assert np.allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("says", "size"),
    [
        ({"size": 32}, 32),
        ({"size": {"height": 32, "width": 32}}, 32),
        ({"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, 32),
        ({"size": {"shortest_edge": 36}, "do_center_crop": False, "crop_size": 32}, 36),
        ({"size": 48, "do_resize": False}, None),
        ({}, None),
    ],
)
def test_by_transformers_size_is_that_of_what_the_network_gets(says: dict[str, Any], size: int | None) -> None:
    assert by_transformers({"image_mean": 0.5, "image_std": 0.5, **says}, "x").input_size == size


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True, which no classifier of timm's does"),
        ({"rescale_offset": True}, "rescale_offset is True"),
        ({"image_mean": "imagenet", "image_std": 1}, "image_mean is 'imagenet', expected a number"),
        ({"size": {"height": 32, "width": 48}, "do_normalize": False}, "expected a square"),
        ({"rescale_factor": 0, "do_normalize": False}, "rescale_factor is 0, expected a positive number"),
        ({"auto_map": {"AutoImageProcessor": "code.Mine"}}, "names code of its own in 'auto_map', which is never run"),
        ({"image_mean": 0.5, "image_std": [0.5, 0.0, 0.5]}, r"std is 0 in the pixel scale \[0, 1\]"),
        ({"image_mean": 130.0, "image_std": 60.0}, r"mean is 130 in the pixel scale"),
        ({"image_std": [0.5] * 3}, r"not say how its pixels are normalised \(it has no image_mean and image_std\)"),
    ],
)
def test_build_classifier_preprocessing_that_cannot_be_obeyed_is_refused(
    says: dict[str, Any], message: str, net: nn.Module, tmp_path: Path
) -> None:
    path = folder(tmp_path / "f", net, preprocessor_config=says)
    with pytest.raises(ModelError, match=message):
        built(path)


def test_build_classifier_obeys_a_folder_and_states_it(net: nn.Module, tmp_path: Path) -> None:
    says = {
        "do_normalize": True, "image_mean": list(CIFAR[0]), "image_std": list(CIFAR[1]), "size": SIZE, "resample": 2,
    }  # fmt: skip
    path = folder(tmp_path / "f", net, preprocessor_config=says)
    model = built(path, input_size=None)
    assert same(model, net, *CIFAR)
    assert model.taken == {
        "checkpoint": str(path),
        "weights": "all of the file",
        "own_resizing": {"size": SIZE, "resample": 2},
        "labels": "in the order of the data set's; the checkpoint has no names",
        "mean": "[0.4914, 0.4822, 0.4465] (preprocessor_config.json)",
        "std": "[0.2023, 0.1994, 0.201] (preprocessor_config.json)",
        "input_size": f"{SIZE} (preprocessor_config.json)",
    }
    given = built(path, mean=[0.1], std=[0.2], input_size=48)
    assert (given.spec["mean"], given.spec["std"], given.input_size) == ([0.1] * 3, [0.2] * 3, 48)
    other = {"architecture": ARCH, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    folder(path, net, config=other)
    with pytest.raises(
        ModelError, match=r"config\.json and preprocessor_config\.json contradict each other about mean"
    ):
        built(path)
    assert built(path, mean=[0.1], std=[0.2]).spec["mean"] == [0.1] * 3
    folder(path, net, preprocessor_config={"image_mean": 0.5, "image_std": 0.5})
    assert built(path).spec["mean"] == [0.5] * 3  # the same number, for all channels and for each


def test_by_timm_obeys_config_json_and_refuses_another_network(net: nn.Module, tmp_path: Path) -> None:
    cfg = {"mean": list(CIFAR[0]), "std": list(CIFAR[1]), "input_size": [3, SIZE, SIZE], "crop_pct": 0.9}
    config = {"architecture": ARCH, "num_classes": 4, "label_names": list("dcba"), "pretrained_cfg": cfg}
    path = folder(tmp_path / "f", net, config=config)
    model = built(path, "abcd", input_size=None)
    assert model.input_size == SIZE
    with torch.inference_mode():
        assert torch.allclose(model(images()), logits(net, images(), *CIFAR)[:, [3, 2, 1, 0]], atol=1e-5)
    assert model.taken["labels"] == "by name (config.json), outputs [3, 2, 1, 0]"
    assert model.taken["own_resizing"] == {"crop_pct": 0.9}
    for change, message in (
        ({"architecture": "test_resnet"}, "architecture is 'test_resnet', arch is 'test_efficientnet'"),
        ({"model_args": {"act_layer": "relu"}}, "was built with model_args {'act_layer': 'relu'}, which is not"),
        ({"auto_map": {"AutoModel": "code.Mine"}}, "names code of its own in 'auto_map', which is never run"),
    ):
        folder(path, net, config={**config, **change})
        with pytest.raises(ModelError, match=message):
            built(path)
    assert by_timm({**config, "architecture": f"{ARCH}.r160_in1k"}, ARCH, "x").mean == CIFAR[0]


NAMES = ("cat", "dog", "Sea Lion", "Étoile")


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (NAMES, NAMES, (0, 1, 2, 3)),
        (NAMES, ("dog", "cat", "sea_lion", "E\u0301toile"), (1, 0, 2, 3)),
        (NAMES, ("sea-lion", "dog"), (2, 1)),
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), (0, 1, 3, 2)),
        (("crane", "crane"), ("crane", "crane"), (0, 1)),
        (NAMES, ("n01", "n02", "n03", "n04"), None),
    ],
)
def test_label_map_of_names_decide(labels: Any, classes: Any, expected: Any) -> None:
    assert label_map_of(labels, classes, "x") == expected


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (NAMES, ("cat", "dog", "sea lion", "star"), "the data set's 'star' is 0 times among them while others"),
        (("crane", "dog", "crane"), ("dog", "crane"), "the data set's 'crane' is 2 times among them"),
        (NAMES, ("cat", "Cat", "dog", "sea lion"), "the data set's 'cat' is 1 times among them"),
    ],
)
def test_label_map_of_names_that_leave_it_open_are_refused(labels: Any, classes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        label_map_of(labels, classes, "x")


def test_build_classifier_takes_outputs_by_name(net: nn.Module, tmp_path: Path) -> None:
    path = folder(tmp_path / "f", net, config={"id2label": {str(index): name for index, name in enumerate("bcda")}})
    whole = built(path)
    with torch.inference_mode():
        expected = whole(images())
        assert torch.equal(built(path, "abcd")(images()), expected[:, [3, 0, 1, 2]])
        assert torch.equal(built(path, "ca")(images()), expected[:, [1, 3]])  # a part of the classes
        assert torch.equal(built(path, "abcd", label_map=(0, 1, 2, 3))(images()), expected)  # the user's word
    assert whole.taken["labels"] == "in the order of the data set's, which has no names"
    with pytest.raises(ModelError, match="'x' is 0 times among them"):
        built(path, "abcx")
    assert "no name in common ('b' and '1' are the first)" in built(path, "1234").taken["labels"]
    for says, classes, labels in (
        ({"id2label": {str(index): f"LABEL_{index}" for index in range(4)}}, "abcd", "the checkpoint has no names"),
        ({"label2id": {"b": 0, "a": 1, "d": 2, "c": 3}}, "abcd", r"outputs [1, 0, 3, 2]"),
    ):
        folder(path, net, config=says)
        assert labels in built(path, classes).taken["labels"]
    for says, message in (
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes, its last layer has 4"),
        ({"id2label": {"0": "a", "1": "b", "2": "c", "4": "d"}}, "id2label does not number its classes from 0 to 3"),
    ):
        folder(path, net, config=says)
        with pytest.raises(ModelError, match=message):
            built(path)
    for key, value in (("class_to_idx", {"b": 0, "c": 1, "d": 2, "a": 3}), ("classes", list("bcda"))):
        torch.save({"state_dict": net.state_dict(), key: value, "mean": [0.1], "std": [0.2]}, tmp_path / "c.pt")
        model = built(tmp_path / "c.pt", "abcd")
        assert model.taken["labels"] == "by name (the file), outputs [3, 0, 1, 2]"
        assert model.taken["mean"] == "[0.1, 0.1, 0.1] (the file)"


def test_build_classifier_one_of_mean_and_std_is_not_half_of_them(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": net.state_dict(), "mean": [0.1]}, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"does not say how its pixels are normalised \(it has mean alone\)"):
        built(tmp_path / "c.pt")


def test_build_classifier_timms_own_weights_answer_in_imagenets_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda arch, pretrained, **keys: real(arch, **keys))
    folders = sorted(f"n{index:08d}" for index in range(1000))
    config = ClassifierConfig(arch=ARCH, pretrained=True)
    assert "no name in common" in build_classifier(config, 1000, class_names=folders).taken["labels"]
    model = build_classifier(config, 2, class_names=("n01443537", "n01440764"))  # goldfish, tench
    assert model.spec["label_map"] == [1, 0]


def test_read_json_code_from_elsewhere_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "code.py").write_text(f"open({str(trap)!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "code.Mine"}}))
    with pytest.raises(ModelError, match="never run here: give the network to the API"):
        read_json(tmp_path / "config.json")
    assert not trap.exists()


SAYS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def buffered(net: nn.Module, mean: Any = SAYS["mean"]) -> Weights:
    """With a normalising layer in front, in float32."""
    layer = {"norm.mean": torch.tensor(mean), "norm.std": torch.tensor(SAYS["std"])}
    return layer | {f"net.{key}": value for key, value in net.state_dict().items()}


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_build_classifier_float32_numbers_and_the_same_in_text_are_no_contradiction(
    net: nn.Module, where: str, tmp_path: Path
) -> None:
    """The check before a job reads no tensor: there they are not known, and no reason to refuse."""
    torch.save({"state_dict": buffered(net), **SAYS}, tmp_path / "both.pt")
    beside = {key: torch.tensor(value) for key, value in SAYS.items()}
    torch.save({"state_dict": net.state_dict(), **beside}, tmp_path / "tensors.pt")
    for name in ("both.pt", "tensors.pt"):
        with torch.device(where):
            model = built(tmp_path / name)
        if where == "cpu":
            assert same(model, net, SAYS["mean"], SAYS["std"])
    torch.save({"state_dict": buffered(net, [0.1, 0.2, 0.4]), **SAYS}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="the file and its normalising layer contradict each other about mean"):
        built(tmp_path / "other.pt")


@pytest.mark.parametrize("section", ["hyper_parameters", "args", "normalize", "meta"])
def test_build_classifier_obeys_the_sections_of_trainers(net: nn.Module, section: str, tmp_path: Path) -> None:
    inside = {**SAYS, "lr": 0.1, "classes": ["d", "c", "b", "a"]}
    torch.save({"state_dict": net.state_dict(), section: inside}, tmp_path / "last.ckpt")
    model = built(tmp_path / "last.ckpt", classes=["a", "b", "c", "d"])
    with torch.inference_mode():
        expected = logits(net, images(), SAYS["mean"], SAYS["std"])[:, [3, 2, 1, 0]]
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=0)
    torch.save({"state_dict": net.state_dict(), section: {"mean": 0.0, "std": 0.02}}, tmp_path / "init.ckpt")
    assert built(tmp_path / "init.ckpt").spec["mean"] == [0.485, 0.456, 0.406]


def test_build_classifier_a_file_of_a_hub_folder_is_taken_as_the_folder(net: nn.Module, tmp_path: Path) -> None:
    processor = {"image_mean": SAYS["mean"], "image_std": SAYS["std"], "rescale_factor": 1 / 255}
    labels = {"id2label": {str(index): name for index, name in enumerate("dcba")}}
    path = folder(tmp_path / "hub", net, preprocessor_config=processor, config=labels)
    one, two = (built(each, classes=["a", "b", "c", "d"]) for each in (path, path / "model.safetensors"))
    assert one.spec == two.spec
    assert two.spec["label_map"] == [3, 2, 1, 0]
    assert two.spec["mean"] == SAYS["mean"]
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"in shards \(model.safetensors.index.json\): save them as model.safetensors"):
        built(path)


def test_build_classifier_obeys_the_header_of_safetensors(net: nn.Module, tmp_path: Path) -> None:
    said = {"format": "pt", **{key: json.dumps(value) for key, value in SAYS.items()}}
    save_file(net.state_dict(), tmp_path / "net.safetensors", metadata=said)
    assert same(built(tmp_path / "net.safetensors"), net, SAYS["mean"], SAYS["std"])


def test_load_strictly_weights_of_a_diverged_training_are_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save({**net.state_dict(), "classifier.bias": torch.tensor([0, 0, torch.nan, 0])}, tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"weights in .*bias.* are not finite"):
        built(tmp_path / "net.pt")
