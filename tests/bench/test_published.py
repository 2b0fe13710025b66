"""The bench of the published networks: they are the published ones, counts are right, and what fails is a line."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import published
from bench.pairs import Pair, cifar, imagenet, resnet110
from bench.replicas import _prepare
from bench.settings import Settings
from bench.timing import Line, as_markdown, spread, write_json
from core.machine.engine import Engine
from core.machine.network import Forward, Precision
from core.models.openai_unet import convert_openai_unet
from core.models.small import SmallConvNet
from core.records import CLASSIFIER
from distributed.execution.launch import work_of
from distributed.execution.work import build_network
from distributed.files.datasets import load_dataset
from tests.core.models.test_openai_unet import state_on_meta
from tests.helpers import openai_reference as openai


def small(**more: Any) -> Pair:
    torch.manual_seed(0)
    return Pair("small", None, SmallConvNet(1, 8, 10).eval(), (1, 8, 8), (0.25, 0.5), 4, **more)


@pytest.mark.parametrize(("make", "shape"), [(cifar, openai.CIFAR), (imagenet, openai.IMAGENET)])
def test_full_size_u_nets_are_those_of_the_published_checkpoints(make: Any, shape: Any) -> None:
    with torch.device("meta"):
        ours = make().denoiser.unet
        theirs = UNet2DModel(**convert_openai_unet(state_on_meta(shape)).config)
    one, two = ({**net.config, "_use_default_values": None} for net in (ours, theirs))
    assert one == two
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_count_is_twice_the_multiply_adds_of_each_layer() -> None:
    table = published._Table()
    total = published._count(table, small(anchors={"classifier": 0.00045}), "cpu")
    by_hand = 2 * (9 * 1 * 16 * 64 + 9 * 16 * 32 * 16 + 9 * 32 * 32 * 16 + 512 * 10) / 1e9
    assert total == pytest.approx(by_hand, rel=1e-12)
    (line,) = table.lines
    assert line.value == spread([by_hand / 0.00045])
    assert line.met == "no", "4.7% more than the anchor"


@pytest.mark.slow
@pytest.mark.parametrize("make", [cifar, resnet110, imagenet])
def test_count_of_the_published_pairs_is_the_anchors(make: Any) -> None:
    table, pair = published._Table(), make()
    published._count(table, pair, "cpu", FakeTensorMode(allow_non_fake_inputs=True))
    assert [line.met for line in table.lines if line.wanted] == ["yes"] * len(pair.anchors)


def test_attempt_that_fails_is_a_line_that_says_why(tmp_path: Path) -> None:
    table = published._Table()

    def hungry() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nmore")

    assert table.attempt("big pair", hungry) is None
    assert table.attempt("small pair", lambda: 3.0) == 3.0
    (line,) = table.lines
    assert line.what == "big pair: not measured (OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB.)"
    assert (line.value, line.met, line.number) == (None, "", "")
    assert "80 GiB" in as_markdown([line, Line("part", "other", spread([1.0, 2.0]), beside={"GiB": 2.5})])
    write_json(tmp_path / "lines.json", [line], "cpu")
    assert json.loads((tmp_path / "lines.json").read_text())["lines"][0]["value"] is None


def test_bench_of_a_precision_that_the_device_refuses_goes_on_with_the_others() -> None:
    class NoHalf(SmallConvNet):
        def forward(self, images: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no bfloat16 here")
            return super().forward(images)

    table = published._Table()
    pair = Pair("small", None, NoHalf(1, 8, 10).eval(), (1, 8, 8), (0.25, 0.5), 4)
    published._Bench(Settings(tiny=True), pair, table, {"bfloat16": 1.0, "float32": 1.0}).run()
    refused = [line.what for line in table.lines if line.value is None]
    assert len(refused) == 2, "both memory orders"
    assert all("bfloat16" in what and "RuntimeError: no bfloat16 here" in what for what in refused)
    timed = [line for line in table.lines if line.unit == "1/s"]
    assert [line.what.split(", ")[1] for line in timed] == ["float32", "float32"]
    assert timed[1].beside["votes unlike float32's"] == 0
    assert timed[0].beside["of the product's"] == pytest.approx(timed[0].beside["TFLOP/s"] / 1.0)
    assert sum("engine / bare passes" in line.what for line in table.lines) == 2


def test_bench_compiles_in_the_faster_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    table = published._Table()
    bench = published._Bench(Settings(tiny=True, forward=Forward(compile=True)), small(), table, {"float32": 1.0})
    seen: list[Forward] = []

    def timed(forward: Forward, batch: int) -> float:
        seen.append(forward)
        bench_timed(forward, batch)
        return 2.0 if forward.channels_last else 1.0

    bench_timed = bench.timed
    monkeypatch.setattr(bench, "timed", timed)
    bench.run()
    assert seen == [Forward(), Forward(channels_last=True), Forward(channels_last=True, compile=True)]
    assert all(line.value is not None for line in table.lines), [line.what for line in table.lines]


def test_floor_runs_the_bare_networks_in_the_precision_and_order_that_is_asked_for() -> None:
    pair, seen = small(), list[tuple[torch.dtype, bool]]()
    conv: Any = list(pair.classifier.modules())[5]

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((output.dtype, conv.weight.is_contiguous(memory_format=torch.channels_last)))

    assert conv.weight.shape == (32, 16, 3, 3)
    conv.register_forward_hook(note)
    for forward in (Forward("bfloat16", channels_last=True), Forward()):
        assert pair.floor(pair.network("cpu", forward), 2, 3)() == 6
    assert seen == [(torch.bfloat16, True)] * 3 + [(torch.float32, False)] * 3


def test_picks_is_the_choice_whatever_the_network_says() -> None:
    network, images = SmallConvNet(1, 8, 3).eval(), torch.rand(5, 1, 8, 8)
    for choice in range(3):
        assert published._Picks(network, choice)(images).argmax(1).tolist() == [choice] * 5


def test_dual_runs_twice_the_passes_of_standard_unless_the_estimator_picks_sigma_e(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines: list[Engine] = []

    class Seen(Engine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            engines.append(self)

    monkeypatch.setattr(published, "Engine", Seen)
    table, pair = published._Table(), small(estimator=SmallConvNet(1, 8, 2).eval())
    published._Bench(Settings(tiny=True), pair, table, {}).dual(Forward(), 1.0, 2)
    one = 2 + 16  # selection and estimation of the only certificate of a turn
    assert [engine.rows_run for engine in engines] == [one, one, 2 * one]
    assert [line.what.rpartition("picks ")[2] for line in table.lines] == ["sigma_e", "another level"]


def test_replicas_on_cuda_take_half_a_gpu_each_and_images_for_their_networks(tmp_path: Path) -> None:
    run = _prepare(tmp_path, Settings("cuda", tiny=True, forward=Forward("bfloat16", channels_last=True)))
    compute = run.config.compute
    assert (compute.device, compute.gpus_per_replica, compute.min_replicas, compute.max_replicas) == ("cuda", 0.5, 2, 2)
    assert (compute.precision, compute.channels_last, compute.compile) == ("bfloat16", True, False)
    assert compute.batch_size == 256
    work, _ = work_of(run, "dataset")
    data = load_dataset(run.config.dataset, "train")
    assert (len(data), data.shape, data.num_classes) == (1000, (3, 32, 32), 10)
    network = build_network(work.model_files(), run.config, data.num_classes, "cpu")
    assert network.heads[CLASSIFIER].num_outputs == 10


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_published_tiny_measures_everything(device: str) -> None:
    lines = published.published(Settings(device, tiny=True))
    assert not [line.what for line in lines if line.value is None]
    for precision in get_args(Precision):
        of = [line for line in lines if re.search(rf"\b{precision}\b", line.what)]
        assert sum(line.unit == "TFLOP/s" for line in of) == 1
        # Two pairs in two memory orders; on a GPU also compiled, and as graphs.
        assert sum(line.unit == "1/s" for line in of) == (4 if device == "cpu" else 8)
        assert sum("engine / bare passes" in line.what for line in of) == 4
    same = [line.beside for line in lines if ", tf32" in line.what and "trained" in line.what and line.unit == "1/s"]
    assert device == "cuda" or same[0]["votes unlike float32's"] == 0, "a CPU has no TF32"
    assert sum("Dual RS / standard RS" in line.what for line in lines) == 2
