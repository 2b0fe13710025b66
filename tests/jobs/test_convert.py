from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.models.checkpoints import load_denoiser
from jobs import convert
from tests.helpers.openai_reference import CIFAR, IMAGENET, Shape, UNetModel, randomised

IMPROVED = replace(CIFAR, width=32, multipliers=(1, 2), blocks=1, attention_at=(2,))
GUIDED = replace(IMAGENET, width=32, multipliers=(1, 1, 2), blocks=1, attention_at=(4,), head_dim=64)


def convert_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return convert.main()


def saved(shape: Shape, path: Path) -> UNetModel:
    network = randomised(shape)
    torch.save(network.state_dict(), path)
    return network


@pytest.mark.parametrize(
    ("shape", "options", "said", "steps"),
    [
        (IMPROVED, ["--head-dim", "16", "--schedule", "cosine-4000"], "improved-diffusion: ", ("cosine", 4000)),
        (GUIDED, ["--head-dim", "64", "--schedule", "linear-1000"], "guided-diffusion: ", ("linear", 1000)),
        (GUIDED, ["--head-dim", "64", "--schedule", "cosine-2000"], "guided-diffusion: ", ("cosine", 2000)),
    ],
)
def test_convert_writes_a_folder_and_checks_it(
    shape: Shape,
    options: list[str],
    said: str,
    steps: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = saved(shape, tmp_path / "net.pt")
    target = tmp_path / "new" / "folder"
    assert convert_main(monkeypatch, tmp_path / "net.pt", target, *options) == 0
    out = capsys.readouterr().out
    count, keys = sum(p.numel() for p in network.parameters()), len(network.state_dict())
    assert f"{said}{count:,} parameters ({count:,} in the source), all {keys} keys used; {steps[0]}" in out
    assert "in memory: 0, at " in out
    names = {"config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"}
    assert {path.name for path in target.iterdir()} == names
    denoiser = load_denoiser(target)
    assert (denoiser.schedule, denoiser.num_steps) == steps
    x, t = torch.rand(1, 3, 16, 16), torch.tensor([100.5])
    with torch.inference_mode():
        assert torch.allclose(denoiser.unet(x, t).sample, network(x, t), atol=2e-5)


def test_convert_errors_are_one_message_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(GUIDED, tmp_path / "net.pt")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert convert_main(monkeypatch, tmp_path / "net.pt", taken) == 2
    assert "taken' is there already: name a new folder, or remove it" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for source, message in (
        (tmp_path / "none.pt", "no checkpoint at"),
        (tmp_path / "other.pt", "is no U-Net of"),
        (tmp_path / "net.pt", "is none of the published networks"),
    ):
        assert convert_main(monkeypatch, source, tmp_path / "target") == 3
        assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    said = ["--head-dim", "64", "--schedule", "linear-1000"]
    assert convert_main(monkeypatch, tmp_path / "net.pt", empty, *said) == 0
