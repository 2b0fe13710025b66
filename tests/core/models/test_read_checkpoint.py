"""What lies in a checkpoint: which weights are taken, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.models.weights import read_checkpoint
from tests.core.models.test_stated import EMA, RAW

Weights = dict[str, Tensor]


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("content", "under"),
    [
        (RAW, ""),
        ({"state_dict": RAW, "epoch": 3, "optimizer": OPTIMIZER}, "state_dict"),
        ({"model": RAW}, "model"),
        ({"net": RAW, "acc": 0.9}, "net"),
        ({"model_state_dict": RAW}, "model_state_dict"),
        ({"model": {"state_dict": RAW}}, "model.state_dict"),
        ({"state_dict": RAW, "state_dict_ema": EMA}, "state_dict_ema"),
        ({"state_dict_ema": EMA, "state_dict": RAW}, "state_dict_ema"),
        ({"model": RAW, "model_ema": EMA}, "model_ema"),
        ({"net": RAW, "ema": EMA}, "ema"),
        ({"params_ema": EMA}, "params_ema"),
        ({"model": RAW, "model_ema": None}, "model"),
        ({"model": RAW, "ema_decay": 0.999}, "model"),
        ({"state_dict": RAW, "model": {"depth": 3}}, "state_dict"),
        ({"state_dict": RAW, "ema_config": {"decay": 0.999}, "callbacks": {"EMA": {"decay": 0.9}}}, "state_dict"),
    ],
)
def test_read_checkpoint_takes_the_average_as_timm_does_and_says_so(content: Any, under: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    found = read_checkpoint(tmp_path / "c.pt")
    assert ".".join(found.under) == under
    assert float(found.weights["b.weight"].sum()) == (2 if "ema" in under else 0)
    if any(key in content for key in ("state_dict", "model", "net")):
        raw = read_checkpoint(tmp_path / "c.pt", ema=False)
        assert float(raw.weights["b.weight"].sum()) == 0
        assert not any("ema" in key for key in raw.under)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": RAW, "teacher": EMA}, r"several networks \('model', 'teacher'\) and does not say which is meant"),
        ({"state_dict": RAW, "swa_state_dict": EMA}, "several networks"),
        ({"state_dict": RAW, "model": EMA}, "several networks"),
        ({"model": RAW, "ema_0.999": EMA, "model_ema": EMA}, "several networks"),
        ({"model": RAW, "ema": {"decay": 0.9, "shadow": EMA}}, "no state dict .* under 'ema': found 'decay': float"),
        ({"model": RAW, "ema": [torch.zeros(1)]}, "holds a list under 'ema'"),
    ],
)
def test_read_checkpoint_two_networks_in_a_file_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("average", [EMA, [torch.ones(1), torch.ones(2)]], ids=["state dict", "list"])
def test_read_checkpoint_average_inside_a_callback_is_not_passed_over(average: Any, tmp_path: Path) -> None:
    """Lightning keeps what its callbacks save under their names."""
    torch.save({"state_dict": RAW, "callbacks": {"EMA": {"ema_state_dict": average}}}, tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match=r"several networks \('state_dict', 'callbacks.EMA.ema_state_dict'\)"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt", ema=False).under == ("state_dict",)


def test_read_checkpoint_torchscript_is_refused_as_code(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="is a TorchScript archive, which holds code: refused"):
        read_checkpoint(tmp_path / "net.pt")
