"""Networks of the user's own: how they are named, built, saved and refused; programs of torch.export."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import ClassifierConfig, DenoiserConfig, parse_config
from core.errors import ConfigError, ModelError
from core.models.checkpoints import load_classifier, load_denoiser, load_model, save_model
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser, alphas_cumprod
from core.models.features import FeatureExtractor
from core.models.weights import read_checkpoint
from core.training.denoising import new_denoiser
from tests.helpers.tiny import PLAIN

SOURCE = """
import torch
from torch import nn

class Normalise(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.tensor(0.5)  # as Cohen's layer: in no state dict

    def forward(self, images):
        return (images - self.mean) / 0.25

class Noise(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, images, t):
        return self.layer(images) * t.view(-1, 1, 1, 1)

def net(num_classes, channels=3):
    return nn.Sequential(Normalise(), nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, num_classes)))

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def noise(channels):
    return Noise(channels)

def broken(num_classes):
    raise KeyError("no weights here")

def number():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`own_nets`, a module of the user's own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    (tmp_path / "own_nets.py").write_text(SOURCE)
    importlib.invalidate_caches()
    return tmp_path


def edit(module: Path) -> None:
    """Another file under the same name, in a process that has not imported it yet."""
    (module / "own_nets.py").write_text(SOURCE + "\n# another one\n")
    del sys.modules["own_nets"]
    importlib.invalidate_caches()


def own(function: str, **keys: object) -> ImageClassifier:
    network = load_classifier(ClassifierConfig(arch=f"own_nets:{function}", **keys), 10, 1)  # type: ignore[arg-type]
    assert isinstance(network, ImageClassifier)
    return network


def test_own_network_takes_pixels_as_they_are_or_normalised(module: Path) -> None:
    images = torch.rand(3, 1, 8, 8)
    plain = own("bare")
    assert torch.equal(plain(images), plain.net(images))
    scaled = own("bare", mean=(0.2,), std=(0.5,), input_size=8)
    torch.testing.assert_close(scaled(images), scaled.net((images - 0.2) / 0.5))
    assert own("net").num_outputs == 10


def test_own_network_takes_a_state_dict_under_whatever_wraps_it(module: Path) -> None:
    network = own("net")
    state = network.net.state_dict()
    wrapped = {f"1.module.{key.removeprefix('1.')}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, module / "weights.pt")
    again = own("net", checkpoint=str(module / "weights.pt"))
    assert all(torch.equal(value, state[key]) for key, value in again.net.state_dict().items())
    assert again.taken["weights"] == "state_dict"
    torch.save({"1.1.bias": torch.zeros(10)}, module / "weights.pt")
    with pytest.raises(ModelError, match=r"do not fit their architecture: missing: 1.1.weight"):
        own("net", checkpoint=str(module / "weights.pt"))


def test_own_network_is_loaded_only_where_the_configuration_names_it(module: Path) -> None:
    network = own("net")
    file = module / "saved.safetensors"
    save_model(network, file)
    with pytest.raises(ModelError, match=r"names code, 'own_nets:net': no code is run because a file names it"):
        load_model(file)
    with pytest.raises(ModelError, match="names code"):
        load_classifier(ClassifierConfig(checkpoint=str(file)), 10, 1)
    images = torch.rand(2, 1, 8, 8)
    for again in (load_model(file, ["own_nets:net"]), own("net", checkpoint=str(file))):
        assert torch.equal(again(images), network(images))
    with torch.device("meta"):
        assert next(load_model(file, ["own_nets:net"]).parameters()).is_meta
    edit(module)
    with pytest.raises(ModelError, match=r"own_nets.py on .* has SHA-256 .*, but .*saved.safetensors' was made with"):
        load_model(file, ["own_nets:net"])


def test_nothing_is_imported_for_a_file_that_names_code(module: Path) -> None:
    file = module / "saved.safetensors"
    save_model(own("net"), file)
    del sys.modules["own_nets"]
    (module / "own_nets.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ModelError, match="names code"):
        load_model(file)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("own_nets:nothing", r"own_nets.py has no function 'nothing'"),
        ("own_nets:broken", r"the function failed \(KeyError: 'no weights here'\)"),
        ("own_nets:number", r"the function returned a int, expected a torch module"),
        ("no_such_nets:net", r"cannot import 'no_such_nets' on \S+ \(ModuleNotFoundError: .*working directory"),
    ],
)
def test_own_network_that_cannot_be_had_is_one_line(arch: str, message: str, module: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_classifier(ClassifierConfig(arch=arch), 10, 1)
    assert "\n" not in str(caught.value)


def test_own_denoiser_predicts_noise_at_integer_timesteps(module: Path) -> None:
    denoiser = new_denoiser(DenoiserConfig(arch="own_nets:noise", schedule="cosine-4000"), (2, 8, 8))
    weight, bias = denoiser.unet.parameters()
    nn.init.constant_(weight, 1e-4)
    nn.init.zeros_(bias)
    noisy, sigma = torch.rand(3, 2, 8, 8), torch.tensor([0.25, 0.5, 1.0])
    bar = alphas_cumprod("cosine", 4000)
    for row, level in enumerate(sigma.tolist()):
        t = next(t for t in range(1, 4000) if (1 - bar[t]) / bar[t] >= 4 * level**2)
        scaled = bar[t] ** 0.5 * (2 * noisy[row] - 1)
        predicted = 1e-4 * t * scaled.sum(dim=0, keepdim=True)
        clean = ((scaled - (1 - bar[t]) ** 0.5 * predicted) / bar[t] ** 0.5).clamp(-1, 1)
        torch.testing.assert_close(denoiser(noisy, sigma)[row], ((clean + 1) / 2).float(), atol=1e-4, rtol=1e-4)
    file = module / "denoiser.safetensors"
    save_model(denoiser, file)
    with pytest.raises(ModelError, match="names code"):
        load_denoiser(file)
    again = load_denoiser(file, code=["own_nets:noise"])
    assert isinstance(again, OneShotDenoiser)
    assert torch.equal(again(noisy, sigma), denoiser(noisy, sigma))


def test_router_reads_the_answers_of_an_own_network_without_features(module: Path) -> None:
    network = own("net")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(FeatureExtractor([network], 0)(images), network(images).log_softmax(dim=1))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base.classifier={arch: 'hf-hub:a/b', checkpoint: x}", "expected a name, or module:function"),
        ("base.classifier={arch: 'a:b', pretrained: true}", "pretrained: says nothing about a:b"),
        ("base.classifier={arch: 'a:b', label_map: [0]}", "label_map: says nothing about a:b"),
        ("base.denoiser={arch: 'a:b'}", "schedule: a:b needs it"),
        ("base.denoiser={arch: unet, schedule: linear-1000}", "expected module:function"),
    ],
)
def test_own_code_keys_that_do_not_fit_are_refused(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(PLAIN, [key])


def test_configuration_says_which_code_may_run() -> None:
    keys = ["base.denoiser={arch: 'a:d', schedule: linear-1000}", "estimator.backbone={arch: 'a:e'}"]
    config = parse_config(
        PLAIN, [*keys, "base.experts={0.25: {arch: 'a:x'}, 0.5: {arch: resnet110, checkpoint: r.pt}}"]
    )
    assert config.own_code == {
        "base.denoiser.arch": "a:d", "base.experts.0.25.arch": "a:x", "estimator.backbone.arch": "a:e",
    }  # fmt: skip


def test_program_of_torch_export_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 2), (torch.rand(2, 4),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=r"is a program of torch.export: refused, for reading it may run code"):
        read_checkpoint(tmp_path / "net.pt2")
