"""What a user sees when something that was given is broken: one message, an exit code, and nothing lost."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distributed.execution.replica as replica_module
from core.data import Dataset
from core.errors import ConfigError, ModelError
from core.files import file_sha256
from core.machine.engine import Engine
from core.models.checkpoints import build_denoiser, load_model, save_model
from core.models.denoiser import trained_unet_config
from core.models.small import SmallConvNet
from distributed.execution.launch import certify_store
from distributed.execution.replica import Facts, Replica
from jobs import build_dataset, report
from jobs.train_base import clean_accuracy
from tests.helpers import miniatures
from tests.helpers.tiny import run_main, tiny_run


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Good files, and the overrides that name them."""
    return {
        "dataset__path": str(miniatures.cifar10_pickles(tmp_path / "data")),
        **miniatures.openai_unet(tmp_path / "unet.pt"),
        "base__classifier": miniatures.vit_folder(tmp_path / "vit"),
    }


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a job's command line on configs/cifar10.yaml: exit code and error output."""

    def call(name: str, out: Path, *more: str, **keys: Any) -> tuple[int, str]:
        arguments = ["--out", str(out), "--config", str(miniatures.ROOT / "configs" / "cifar10.yaml"), *more]
        monkeypatch.setattr("sys.argv", [name, *arguments, *miniatures.overrides(**keys)])
        code = import_module(f"jobs.{name}").main()
        return code, capsys.readouterr().err

    return call


class _Code:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.proof}",))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_network(path: Path) -> None:
    shutil.copy(path.parent / "vit" / "model.safetensors", path)


def _with_code(path: Path) -> None:
    torch.save({"state_dict": _Code(path.parent / "proof")}, path)


def _whole_module(path: Path) -> None:
    torch.save(SmallConvNet(3, 32, 10), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "unet.pt' is an archive of torch.save that is truncated or damaged ("),
        (_other_network, "unet.pt' is no U-Net of improved-diffusion or guided-diffusion"),
        (_with_code, "unet.pt' is a pickle that asks for 'posix.system', an object or code"),
        (_whole_module, "unet.pt' is a pickle that asks for 'core.models.small.SmallConvNet'"),
        (Path.unlink, "no checkpoint at "),
    ],
)
def test_train_base_broken_denoiser_is_one_message_and_its_repair_is_enough(
    damage: Callable[[Path], None], message: str, given: dict[str, Any], job: Any, tmp_path: Path
) -> None:
    good = tmp_path / "good.pt"
    shutil.copy(tmp_path / "unet.pt", good)
    damage(tmp_path / "unet.pt")
    code, said = job("train_base", tmp_path / "run", **given)
    assert (code, said.count("error: "), "Traceback" in said) == (3, 1, False)
    assert message in said
    assert not (tmp_path / "proof").exists()
    shutil.copy(good, tmp_path / "unet.pt")  # the same command goes on
    assert job("train_base", tmp_path / "run", **given)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "resnet50"}, "has no fc.weight, the last layer: it is no checkpoint of this architecture"),
        ({"arch": "vit_small_patch16_224"}, "num_attention_heads is 3, the architecture has 6: name another one"),
        ({"arch": "vit_tiny_patch16_223"}, "did you mean 'vit_tiny_patch16_224'?"),
        ({"classes": 7}, "has 7 classes, 10 are needed: use another checkpoint, or say in 'label_map'"),
        ({"label_map": [0, 1, 2]}, "label_map has 3 entries, the data set has 10 classes"),
    ],
)
def test_train_base_classifier_that_does_not_fit_is_one_message(
    change: dict[str, Any], message: str, given: dict[str, Any], job: Any, tmp_path: Path
) -> None:
    if classes := change.pop("classes", None):
        given["base__classifier"] = miniatures.vit_folder(tmp_path / "other", classes=classes)
    given["base__classifier"] |= change
    code, said = job("train_base", tmp_path / "run", **given)
    assert (code, said.count("error: "), "Traceback" in said) == (3, 1, False)
    assert message in said


def test_train_base_broken_expert_is_named_and_the_others_do_not_matter(
    given: dict[str, Any], job: Any, tmp_path: Path
) -> None:
    del given["base__classifier"]
    experts = {sigma: miniatures.resnet_file(tmp_path / f"{sigma}.pt", 3) for sigma in (0.25, 0.5, 1.0)}
    _truncate(tmp_path / "0.5.pt")
    code, said = job("train_base", tmp_path / "run", base__classifier=None, base__experts=experts, **given)
    assert code == 3
    assert "0.5.pt' is an archive of torch.save that is truncated or damaged" in said
    del experts[0.5]
    code, said = job("train_base", tmp_path / "new", base__classifier=None, base__experts=experts, **given)
    assert code == 2
    assert "base.experts: has experts for [0.25, 1.0], expected one for each of sigmas = [0.25, 0.5, 1.0]" in said


def _spoil(file: Path, value: float) -> None:
    network = load_model(file)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = value
    save_model(network, file)


@pytest.mark.parametrize(
    ("role", "value", "message"),
    [
        ("denoiser", float("nan"), "'{tmp}/spoilt.safetensors': 1 of the 216 weights in 'unet.conv_in"),
        ("classifier", float("inf"), "'{tmp}/spoilt.safetensors': 1 of the 216 weights in 'layers.0"),
    ],
)
def test_train_base_weights_that_are_not_finite_are_one_message(
    role: str, value: float, message: str, given: dict[str, Any], job: Any, tmp_path: Path
) -> None:
    network = SmallConvNet(3, 32, 10, 8) if role == "classifier" else build_denoiser(trained_unet_config(3, 32))
    save_model(network, tmp_path / "spoilt.safetensors")
    _spoil(tmp_path / "spoilt.safetensors", value)
    spoilt = str(tmp_path / "spoilt.safetensors")
    given[f"base__{role}"] = {"checkpoint": spoilt}  # a denoiser of ours says its schedule itself
    code, said = job("train_base", tmp_path / "run", **given)
    assert (code, said.count("error: "), "Traceback" in said) == (3, 1, False)
    assert message.format(tmp=tmp_path) in said


def test_certify_store_estimator_that_is_not_finite_is_named(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    _spoil(run.model("estimator"), float("nan"))
    run.finish("train_estimator", read={}, wrote={"estimator": file_sha256(run.model("estimator"))}, facts={})
    with pytest.raises(ModelError, match=r"estimator\.safetensors.*: 1 of the \d+ weights in .* not finite"):
        certify_store(run, "certificates/dual-base")


def test_certify_store_logits_that_overflow_are_counted_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "dataset.train.first=3")
    network = load_model(run.model("classifier"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e30)
    save_model(network, run.model("classifier"))
    run.finish(
        "train_base", read={}, wrote={n: file_sha256(run.model(n)) for n in ("denoiser", "classifier")}, facts={}
    )
    certify_store(run, "dataset")
    said = capsys.readouterr().out
    assert "dataset: 480 of 480 votes (100%) had non-finite logits; they count against every class (networks: " in said


def test_clean_accuracy_counts_non_finite_logits_as_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    class Lost(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = torch.eye(2)[[0] * len(x)]
            logits[1::2] = torch.nan  # whose largest is said to be the first
            return logits

    data = Dataset("x", tuple("abcd"), np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64), 2)
    assert clean_accuracy("classifier", Lost(1, 1), data, 4) == 0.5
    assert "50.0% of 4 clean test images; 2 have non-finite logits, which count as wrong" in capsys.readouterr().out


def test_certify_store_folder_that_is_taken_away_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local", "dataset.train.first=3", "compute.shard_examples=1")
    commit = Replica.commit

    def taken_away(self: Replica, shard: Any) -> Facts:
        shutil.rmtree(run.path, ignore_errors=True)
        return commit(self, shard)

    monkeypatch.setattr(Replica, "commit", taken_away)
    with pytest.raises(ConfigError, match=r"run' cannot be seen on .*, or its manifest.json is gone"):
        certify_store(run, "dataset")
    assert not run.path.exists()


def test_report_folder_that_cannot_be_written_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path)
    (run.path / "report").touch()  # rights would not stop root
    assert run_main(report, "--out", str(run.path)) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write to '{run.path}/report'")


def test_build_dataset_network_that_hangs_ends_with_one_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, hangs, end = tiny_run(tmp_path, "compute.executor=local", "dataset.train.first=3"), Event(), Event()
    vote = Engine.run

    def hang(self: Engine, tasks: Any) -> Any:
        hangs.set()
        end.wait(30)
        yield from vote(self, tasks)

    def interrupt() -> None:
        hangs.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Engine, "run", hang)
    monkeypatch.setattr(replica_module, "CLOSE_S", 0.2)
    Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    try:
        assert run_main(build_dataset, "--out", str(run.path)) == 130
        assert time.monotonic() - begun < 20
    finally:
        end.set()
    assert not (run.path / "lock.json").exists()
