"""Reading weights: nothing in a file is run, and what is wrong with it is said."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.errors import ModelError
from core.models.classifiers import build_classifier
from core.models.small import SmallConvNet
from core.models.weights import read_weights
from tests.core.models.test_classifiers import resnet110

Weights = dict[str, Tensor]


class Creates:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_read_weights_pickles_with_code_or_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Creates(trap)}, tmp_path / "code.pt")
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(Creates(trap), file, protocol=2)
    torch.save(SmallConvNet(1, 8, 10), tmp_path / "module.pt")
    for name, message in (
        ("code.pt", r"asks for '(posix|os)\.system', an object or code rather than tensors: refused, nothing in it"),
        ("plain.pkl", "refused"),
        ("module.pt", r"asks for 'core\.models\.small\.SmallConvNet'.*save_file\(model\.state_dict\(\)"),
    ):
        with pytest.raises(ModelError, match=message):
            read_weights(tmp_path / name)
        with pytest.raises(ModelError, match="refused"):
            build_classifier(resnet110(str(tmp_path / name)), 10)
    assert not trap.exists()
    torch.load(tmp_path / "code.pt", weights_only=False)  # the trap is a real one
    assert trap.exists()


def test_read_weights_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(5000), "b": torch.zeros(3)}
    torch.save(weights, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "s.safetensors")
    for name, message in (
        ("zip.pt", "an archive of torch.save that is truncated or damaged"),
        ("old.pt", "truncated or damaged"),
        ("s.safetensors", "is truncated or not a readable safetensors file"),
    ):
        assert read_weights(tmp_path / name).keys() == {"a", "b"}
        whole = (tmp_path / name).read_bytes()
        for share in (0.5, 0.98):
            (tmp_path / f"cut_{name}").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ModelError, match=message):
                read_weights(tmp_path / f"cut_{name}")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_weights(tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="neither a safetensors file nor a state dict"):
        read_weights(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds a list, expected a state dict"):
        read_weights(tmp_path / "list.pt")
    torch.save({"epoch": 3, "weights": {"a": torch.zeros(1)}}, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"holds no state dict .*found 'epoch': int, 'weights': dict"):
        read_weights(tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="no checkpoint at"):
        read_weights(tmp_path / "none.pt")
