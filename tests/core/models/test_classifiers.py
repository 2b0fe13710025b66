import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import ClassifierConfig, EstimatorConfig, parse_config
from core.errors import ConfigError, ModelError
from core.models import classifiers
from core.models.checkpoints import load_classifier, load_model, save_model
from core.models.classifiers import ImageClassifier, build_classifier
from core.models.resnet_cifar import ResNetCifar
from core.models.small import SmallConvNet

Weights = dict[str, Tensor]
TINY = "vit_tiny_patch16_224"
"""12 blocks of width 192 with 3 heads: used at 32 pixels, so a step of 4 patches and a class token."""


def hf_vit(width: int, depth: int, patch: int, size: int, classes: int, spelling: str, prefix: str = "vit.") -> Weights:
    """A random state dict of transformers' ViTForImageClassification."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, mean: float = 0.0, std: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, std or shape[-1] ** -0.5, generator=generator)

    weights = {
        f"{prefix}embeddings.cls_token": draw(1, 1, width),
        f"{prefix}embeddings.position_embeddings": draw(1, (size // patch) ** 2 + 1, width),
        f"{prefix}embeddings.patch_embeddings.projection.weight": draw(width, 3, patch, patch, std=0.05),
        f"{prefix}embeddings.patch_embeddings.projection.bias": draw(width, std=0.1),
        f"{prefix}layernorm.weight": draw(width, mean=1.0, std=0.2),
        f"{prefix}layernorm.bias": draw(width, std=0.1),
        "classifier.weight": draw(classes, width),
        "classifier.bias": draw(classes, std=0.1),
    }
    old = spelling == "old"
    for layer in range(depth):
        root = f"{prefix}encoder.layer.{layer}" if old else f"{prefix}layers.{layer}"
        linear = {
            "attention.attention.query" if old else "attention.q_proj": (width, width),
            "attention.attention.key" if old else "attention.k_proj": (width, width),
            "attention.attention.value" if old else "attention.v_proj": (width, width),
            "attention.output.dense" if old else "attention.o_proj": (width, width),
            "intermediate.dense" if old else "mlp.fc1": (4 * width, width),
            "output.dense" if old else "mlp.fc2": (width, 4 * width),
        }
        for name, shape in linear.items():
            weights[f"{root}.{name}.weight"] = draw(*shape)
            weights[f"{root}.{name}.bias"] = draw(shape[0], std=0.1)
        for name in ("layernorm_before", "layernorm_after"):
            weights[f"{root}.{name}.weight"] = draw(width, mean=1.0, std=0.2)
            weights[f"{root}.{name}.bias"] = draw(width, std=0.1)
    return weights


def hf_forward(weights: Weights, x: Tensor, depth: int, heads: int, eps: float) -> Tensor:
    """What transformers computes from old-style names, written out: normalised pixels -> logits."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    projection = "vit.embeddings.patch_embeddings.projection"
    patch = weights[f"{projection}.weight"].shape[-1]
    tokens = F.conv2d(x, weights[f"{projection}.weight"], weights[f"{projection}.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = torch.cat([weights["vit.embeddings.cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    h = tokens + weights["vit.embeddings.position_embeddings"]
    for layer in range(depth):
        root = f"vit.encoder.layer.{layer}"
        y = norm(f"{root}.layernorm_before", h)
        q, k, v = (
            linear(f"{root}.attention.attention.{name}", y).view(*y.shape[:2], heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weight = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        y = (weight @ v).transpose(1, 2).flatten(2)
        h = h + linear(f"{root}.attention.output.dense", y)
        y = linear(f"{root}.intermediate.dense", norm(f"{root}.layernorm_after", h))
        h = h + linear(f"{root}.output.dense", 0.5 * y * (1 + torch.erf(y / 2**0.5)))
    return linear("classifier", norm("vit.layernorm", h)[:, 0])


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            positive = name.endswith("running_var")
            value.normal_(std=0.1, generator=generator).add_(1.0 if positive else 0.0).abs_() if positive else (
                value.normal_(std=0.1, generator=generator)
            )
    return module.eval()


def vit_file(path: Path, **changes: Any) -> Weights:
    arguments: dict[str, Any] = {"width": 192, "depth": 12, "patch": 16, "size": 32, "classes": 10, "spelling": "old"}
    weights = hf_vit(**{**arguments, **changes})
    save_file(weights, path)
    return weights


@pytest.mark.parametrize(
    ("arch", "outputs", "count"),
    [
        ("vit_base_patch16_224", 10, 85_806_346),
        ("beit_large_patch16_512", 1000, 305_674_728),
        ("resnet50", 1000, 25_557_032),
        ("resnet110", 10, 1_730_714),
    ],
)
def test_architectures_have_the_published_numbers_of_parameters(arch: str, outputs: int, count: int) -> None:
    with torch.device("meta"):
        network = classifiers._network(arch, outputs, 3, pretrained=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("spelling", "kind"), [("old", "folder"), ("new", "folder"), ("old", "file"), ("old", "bin")])
def test_build_classifier_transformers_vit_computes_the_same(spelling: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.safetensors" if kind != "bin" else "pytorch_model.bin")
    reference = vit_file(tmp_path / "reference.safetensors")
    weights = hf_vit(192, 12, 16, 32, 10, spelling)
    weights["vit.pooler.dense.weight"] = torch.zeros(192, 192)
    if kind == "bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    eps = 1e-12
    mean, std = [0.5] * 3, [0.5] * 3
    if kind == "folder":
        eps, mean, std = 0.01, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
        config = {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": eps}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    source = str(path if kind == "file" else tmp_path)
    model = build_classifier(ClassifierConfig(arch=TINY, checkpoint=source, input_size=32), 10)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        expected, got = hf_forward(reference, normalised, 12, 3, eps), model(images)
    assert torch.allclose(got, expected, atol=1e-5)
    assert float(expected.std()) > 0.3
    save_model(model, tmp_path / "own.safetensors")  # the epsilon must survive too
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "own.safetensors")(images), got)


def test_build_classifier_transformers_config_that_contradicts_is_refused(tmp_path: Path) -> None:
    vit_file(tmp_path / "model.safetensors")
    config = ClassifierConfig(arch=TINY, checkpoint=str(tmp_path), input_size=32)
    for plain, message in (
        ({"num_attention_heads": 12}, "num_attention_heads is 12, the architecture has 3"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', the architecture has 'gelu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(plain))
        with pytest.raises(ModelError, match=message):
            build_classifier(config, 10)
    weights = vit_file(tmp_path / "model.safetensors")
    del weights["vit.encoder.layer.3.attention.attention.key.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"only \['q', 'v'\] of q, k, v for blocks\.3\.attn\.qkv\.weight"):
        build_classifier(config, 10)
    (tmp_path / "config.json").unlink()
    vit_file(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no fc\.weight, the last layer"):
        build_classifier(ClassifierConfig(arch="resnet50", checkpoint=str(tmp_path)), 10)


def test_image_classifier_resizes_with_antialias_normalises_and_does_not_clamp() -> None:
    model = ImageClassifier("resnet110", 4, input_size=16, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    seen: list[Tensor] = []
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).round()
    model.eval()(images)
    resized = F.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
    assert float(resized.min()) < 0  # bicubic overshoots, and stays so
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    assert torch.allclose(seen[0], (resized - mean) / std, rtol=0, atol=2e-6)
    plain = F.interpolate(images, size=(16, 16), mode="bicubic")
    assert float((plain - resized).abs().max()) > 0.1
    model(images[:, :, :16, :16])
    assert torch.equal(seen[1], (images[:, :, :16, :16] - mean) / std)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 224), (224, 224, 512), (28, 28, 63), (37, 53, 16), (31, 17, 17), (500, 333, 9)],
)
def test_resized_is_interpolate_to_rounding_up_and_down_at_odd_sizes(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    exact = F.interpolate(images.double(), size=(size, size), mode="bicubic", antialias=True)
    assert (classifiers._resized(images.double(), size) - exact).abs().max() < 1e-14
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        assert (classifiers._resized(given, size) - exact).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        inside = classifiers._resized(images, size)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, classifiers._resized(images, size)), "pixels are not rounded to half precision"


def test_image_classifier_that_resizes_is_compiled_exported_and_close_to_interpolate() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(TINY, 10, input_size=48).eval()
    images = torch.rand(3, 3, 32, 32)
    prepared = (F.interpolate(images, size=(48, 48), mode="bicubic", antialias=True) - model._mean) / model._std
    with torch.no_grad():
        expected, got = model.net(prepared), model(images)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(torch.compile(model, fullgraph=True, dynamic=False, backend="eager")(images), got)
        assert torch.equal(torch.export.export(model, (images,)).module()(images), got)
        model.to(memory_format=torch.channels_last)
        other = model(images.contiguous(memory_format=torch.channels_last))
        assert (other - expected).abs().max() < 1e-5 * expected.abs().max()


def test_image_classifier_defaults_are_the_architectures_own() -> None:
    spec = ImageClassifier("resnet50", 10).spec
    assert (spec["input_size"], spec["mean"], spec["std"]) == (224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    grey = ImageClassifier("resnet110", 10, channels=1)
    assert (grey.spec["input_size"], grey.spec["mean"]) == (None, [0.5])
    assert grey.eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)  # pooling takes any size
    with pytest.raises(ModelError, match="mean has 2 entries, expected 1 or 3"):
        ImageClassifier("resnet110", 10, mean=[0.5, 0.5])
    with pytest.raises(ModelError, match=r"no architecture 'resnet5O' in timm .*did you mean 'resnet50'"):
        ImageClassifier("resnet5O", 10)
    with pytest.raises(ModelError, match="no architecture 'hf-hub:someone/model'"):
        ImageClassifier("hf-hub:someone/model", 10)


def cifar_file(path: Path, num_classes: int = 10, wrap: Callable[[Weights], Any] = lambda weights: weights) -> Weights:
    weights = randomise(ResNetCifar(num_classes)).state_dict()
    torch.save(wrap(weights), path)
    return weights


def resnet110(checkpoint: str, **keys: Any) -> ClassifierConfig:
    return ClassifierConfig(arch="resnet110", checkpoint=checkpoint, **{"mean": (0.5,), "std": (0.5,), **keys})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "arch": "cifar_resnet110"},
        lambda w: {"net": {f"module.{key}": value for key, value in w.items()}, "acc": 0.5},
        lambda w: {"model": {f"1.module.{key}": value for key, value in w.items()}},  # Cohen et al.
        lambda w: {f"module.model.{key}": value for key, value in w.items()},
    ],
)
def test_build_classifier_nested_and_prefixed_state_dicts_load(wrap: Callable[[Weights], Any], tmp_path: Path) -> None:
    weights = cifar_file(tmp_path / "c.pt", wrap=wrap)
    model = build_classifier(resnet110(str(tmp_path / "c.pt")), 10)
    assert not model.training
    assert all(torch.equal(model.net.state_dict()[key], value) for key, value in weights.items())


def test_build_classifier_label_map_picks_the_logits(tmp_path: Path) -> None:
    cifar_file(tmp_path / "c.pt", num_classes=20)
    checkpoint = str(tmp_path / "c.pt")
    images = torch.rand(2, 3, 32, 32)
    whole = build_classifier(resnet110(checkpoint), 20)
    config = resnet110(checkpoint, label_map=(7, 0, 19))
    mapped = build_classifier(config, 3)
    assert mapped.num_outputs == 3
    save_model(mapped, tmp_path / "own.safetensors")
    with torch.inference_mode():
        assert torch.equal(mapped(images), whole(images)[:, [7, 0, 19]])
        assert torch.equal(load_model(tmp_path / "own.safetensors")(images), mapped(images))
    for label_map, classes, message in (
        (None, 3, "has 20 classes, 3 are needed: use another checkpoint, or say in 'label_map'"),
        ((7, 0, 19), 4, "label_map has 3 entries, the data set has 4 classes"),
        ((7, 0, 20), 3, "label_map names class 20, the checkpoint has classes 0 to 19"),
        ((7, 0, 7), 3, "label_map names class 7 of the checkpoint twice"),
    ):
        with pytest.raises(ModelError, match=message):
            build_classifier(config.model_copy(update={"label_map": label_map}), classes)


def test_build_classifier_new_head_keeps_everything_else(tmp_path: Path) -> None:
    weights = cifar_file(tmp_path / "c.pt")
    config = resnet110(str(tmp_path / "c.pt"))
    model = build_classifier(config, 3, new_head=True)
    assert model.new_head
    state = model.net.state_dict()
    assert state["fc.weight"].shape == (3, 64)
    assert all(torch.equal(state[key], value) for key, value in weights.items() if not key.startswith("fc."))
    assert not build_classifier(config, 10, new_head=True).new_head
    untrained = build_classifier(ClassifierConfig(arch="resnet110"), 3, new_head=True)
    assert not untrained.new_head
    assert untrained.num_outputs == 3


def test_build_classifier_wrong_architecture_names_the_first_keys_and_shapes(tmp_path: Path) -> None:
    weights = cifar_file(tmp_path / "c.pt")
    config = resnet110(str(tmp_path / "c.pt"))
    with pytest.raises(
        ModelError, match=r"as resnet110\) do not fit.*conv1\.weight is \(16, 3, 3, 3\), expected \(16, 1"
    ):
        build_classifier(config, 10, channels=1)
    other = copy.copy(weights)
    other["layer4.0.conv1.weight"] = other.pop("layer1.0.conv1.weight")
    torch.save(other, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"missing: layer1\.0\.conv1\.weight; unexpected: layer4\.0\.conv1\.weight$"):
        build_classifier(config, 10)
    with pytest.raises(ModelError, match=r"no head\.weight, the last layer.*its first keys are conv1\.weight"):
        build_classifier(config.model_copy(update={"arch": TINY}), 10)


def test_beit_checkpoints_of_the_original_repository_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold 'relative_position_index', which newer timm computes."""
    import timm

    def one_block(arch: str, num_outputs: int, channels: int, pretrained: bool) -> nn.Module:
        network: nn.Module = timm.create_model(arch, num_classes=num_outputs, depth=1, embed_dim=32, num_heads=2)
        return network

    monkeypatch.setattr(classifiers, "_network", one_block)
    model = ImageClassifier("beit_large_patch16_512", 7)
    weights = dict(randomise(model.net).state_dict())
    weights["blocks.0.attn.relative_position_index"] = torch.zeros(1025, 1025, dtype=torch.int64)
    torch.save({"model": weights}, tmp_path / "beit.pth")
    config = ClassifierConfig(arch="beit_large_patch16_512", checkpoint=str(tmp_path / "beit.pth"))
    loaded = build_classifier(config, 7)
    assert (loaded.spec["input_size"], loaded.spec["mean"], loaded.spec["std"]) == (512, [0.5] * 3, [0.5] * 3)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model.eval()(images))


def test_build_classifier_pretrained_without_a_network_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def no_network(*args: Any, **kwargs: Any) -> nn.Module:
        assert kwargs["pretrained"]
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ModelError, match=r"cannot get the weights of 'resnet50' \(Name or service.*'checkpoint'"):
        build_classifier(ClassifierConfig(arch="resnet50", pretrained=True), 1000)
    with pytest.raises(ModelError, match="resnet50 has 1000 classes, 10 are needed"):
        build_classifier(ClassifierConfig(arch="resnet50", pretrained=True), 10)
    with pytest.raises(ModelError, match="resnet110 has no published weights here"):
        build_classifier(ClassifierConfig(arch="resnet110", pretrained=True), 10)


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 32), (TINY, 48), ("resnet110", None)])
def test_classifiers_survive_our_own_format(arch: str, size: int | None, tmp_path: Path) -> None:
    model = ImageClassifier(arch, 12, channels=1, input_size=size, mean=[0.3], std=[0.7], label_map=[3, 1])
    randomise(model)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    images = torch.rand(2, 1, 40, 40)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec
    assert not loaded.training


def test_load_classifier_of_our_own_format_says_everything_itself(tmp_path: Path) -> None:
    path = str(tmp_path / "own.safetensors")
    save_model(SmallConvNet(1, 8, 10), tmp_path / "own.safetensors")
    assert isinstance(load_classifier(ClassifierConfig(checkpoint=path), 10, 1), SmallConvNet)
    with pytest.raises(ModelError, match="holds a SmallConvNet with 10 classes, expected 3"):
        load_classifier(ClassifierConfig(checkpoint=path), 3, 1)
    with pytest.raises(ConfigError, match="is of our own format and says its arch itself; remove the key"):
        load_classifier(ClassifierConfig(arch="resnet110", checkpoint=path), 10, 1)
    cifar_file(tmp_path / "c.pt")
    with pytest.raises(ModelError, match="name the architecture of the checkpoint in 'arch'"):
        load_classifier(ClassifierConfig(checkpoint=str(tmp_path / "c.pt")), 10)


def test_config_classifier_keys_are_checked_and_part_of_the_identity() -> None:
    plain = {"sigmas": [0.25, 0.5], "report": {"radii": [0, 0.5]}}
    for override, message in (
        ("base.classifier={}", r"base\.classifier.*arch: is missing"),
        ("base.classifier={arch: resnet50}", "resnet50 has no weights; give classifier.checkpoint"),
        ("base.classifier={arch: a, checkpoint: b, pretrained: true}", "give one of them"),
        ("base.classifier={arch: a, checkpoint: b, labelmap: [1]}", "unknown key .*did you mean 'label_map'"),
        ("base.classifier={arch: a, checkpoint: b, std: [0]}", "greater than 0"),
        ("estimator.backbone={arch: a, label_map: [1]}", "label_map: has no meaning for an estimator"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(plain, [override])
    config = parse_config(plain, ["base.classifier={arch: resnet50, checkpoint: c.pt, mean: [0.5, 0.5, 0.5]}"])
    assert config.base.classifier is not None
    assert config.base.classifier.mean == (0.5, 0.5, 0.5)
    assert parse_config(config.model_dump(mode="json")) == config
    default = parse_config(plain)
    changed = [["base.denoiser=d"], ["estimator.backbone={arch: resnet110}"]]
    prints = {parse_config(plain, overrides).fingerprint() for overrides in changed}
    assert len(prints | {default.fingerprint(), config.fingerprint()}) == 4
    assert "backbone" not in json.dumps(default._identity(exclude_defaults=True))
    assert EstimatorConfig().backbone is None
