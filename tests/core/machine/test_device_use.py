"""Precision, memory order, compilation, running out of memory, and the batch size that a step settles on."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config import parse_config
from core.errors import ConfigError
from core.machine.engine import Engine, Task
from core.machine.network import Forward, Head, Module, Network, Precision, set_tf32
from core.machine.noise import GaussianNoise
from core.models.checkpoints import build_denoiser
from core.models.denoiser import trained_unet_config
from core.models.small import SmallConvNet
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Certificate, Draws, Phase, Sampling
from distributed.checks.audit import audit
from distributed.store.shards import ShardStore
from jobs import build_dataset
from tests.helpers.oracles import HalfSpace, axis
from tests.helpers.tiny import tiny_run

SAMPLING = Sampling(100, 250, 0.01)


def sign_count(images: Tensor) -> Tensor:
    """How many pixels are above 0.4, against how many are not: small integers, exact in every precision."""
    above = (images.flatten(1) > 0.4).float() @ torch.ones(images[0].numel(), 1)
    return torch.cat([images[0].numel() - above, above], dim=1)


def run(
    module: Module, batch_size: int = 64, forward: Forward | None = None, num: int = 4
) -> dict[tuple[int, float], Certificate]:
    engine = Engine(
        Network({CLASSIFIER: Head(module, 2)}, forward=forward), GaussianNoise(3), batch_size=batch_size, max_live=5
    )
    return certify_all(engine, num)


def certify_all(engine: Engine, num: int = 4) -> dict[tuple[int, float], Certificate]:
    generator = torch.Generator().manual_seed(7)
    images = [torch.rand(1, 4, 4, generator=generator) for _ in range(num)]
    tasks = (
        Task((index, sigma), f"x{index}", image, certify(sigma, SAMPLING))
        for index, image in enumerate(images)
        for sigma in (0.25, 0.5)
    )
    return {finished.key: finished.result for finished in engine.run(tasks)}


# --- precision


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_run_votes_of_an_integer_network_are_those_of_float32(precision: Precision) -> None:
    plain = run(sign_count)
    assert run(sign_count, forward=Forward(precision)) == plain
    assert any(0 < result.counts_estimation[1] < 250 for result in plain.values())


def test_run_votes_of_a_far_half_space_are_those_of_float32() -> None:
    module = HalfSpace(axis(16, 2), -20.0)  # 40 standard deviations away
    result = run(module, forward=Forward("bfloat16"))
    assert result == run(module)
    assert all(each.counts_estimation.tolist() == [0, 250] for each in result.values())


@pytest.mark.parametrize(("precision", "inside"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_network_only_the_inside_is_of_the_precision_whatever_surrounds_it(
    precision: Precision, inside: torch.dtype
) -> None:
    linear, seen = nn.Linear(16, 2), {}

    def head(images: Tensor) -> Tensor:
        seen["images"], seen["logits"] = images.dtype, linear(images.flatten(1)).dtype
        return linear(images.flatten(1))  # type: ignore[no-any-return]

    network = Network({CLASSIFIER: Head(head, 2)}, forward=Forward(precision))
    lane = network.lane(Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION))
    with torch.autocast("cpu", torch.float16):
        logits = network(lane, torch.rand(3, 1, 4, 4), torch.ones(3))
    assert seen == {"images": torch.float32, "logits": inside}
    assert logits[CLASSIFIER].dtype == torch.float32


def test_network_denoiser_in_bfloat16_gives_float32_images_and_a_float32_time_embedding() -> None:
    torch.manual_seed(0)
    denoiser, seen = build_denoiser(trained_unet_config(1, 8)), {}

    def head(images: Tensor) -> Tensor:
        seen["images"] = images
        return images.flatten(1)[:, :2]

    embedding: Any = denoiser.unet.time_embedding
    embedding.register_forward_hook(lambda _, args, out: seen.update(time=out))
    noisy, sigma = torch.rand(4, 1, 8, 8), torch.full((4,), 0.25)
    with torch.inference_mode():
        network = Network({CLASSIFIER: Head(head, 2)}, denoiser, forward=Forward("bfloat16"))
        network(network.lane(Draws(0.25, 1, (CLASSIFIER,), Phase.SELECTION)), noisy, sigma)
        assert (seen["images"].dtype, seen["time"].dtype) == (torch.float32, torch.float32)
        plain = denoiser(noisy, sigma)
    assert 0 < (seen["images"] - plain).abs().max() < 0.05


def test_run_logits_that_overflow_in_float16_vote_for_no_class() -> None:
    linear = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[1, 0] = 60_000.0  # infinite in float16 where the first pixel is above 1.09

    def head(images: Tensor) -> Tensor:
        return linear(images.flatten(1))  # type: ignore[no-any-return]

    for key, half in run(head, forward=Forward("float16")).items():
        full = run(head)[key]
        assert half.num_non_finite > 0 == full.num_non_finite
        assert half.counts_estimation[0] <= full.counts_estimation[0]
        assert half.counts_estimation[1] < full.counts_estimation[1]


@pytest.fixture
def _switches() -> Iterator[None]:
    yield
    set_tf32(False)


@pytest.mark.usefixtures("_switches")
def test_set_tf32_sets_every_switch_in_both_directions() -> None:
    for allowed in (True, False, True):
        set_tf32(allowed)
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
        assert {matmul.fp32_precision, cudnn.conv.fp32_precision} == {"tf32" if allowed else "ieee"}


# --- memory order and compilation


def test_network_channels_last_reaches_weights_and_images() -> None:
    module, seen = SmallConvNet(3, 8, 2), []
    plain = Network({CLASSIFIER: Head(copy.deepcopy(module), 2)})
    network = Network({CLASSIFIER: Head(module, 2)}, forward=Forward(channels_last=True))
    module.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lane = network.lane(Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION))
    images = torch.rand(5, 3, 8, 8)
    with torch.inference_mode():
        logits, expected = (each(lane, images, torch.ones(5))[CLASSIFIER] for each in (network, plain))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert module.layers[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    torch.testing.assert_close(logits, expected)


def test_network_compiler_that_fails_is_an_error_that_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError

    def network(error: Exception) -> Any:
        def compiled(*_: Tensor) -> Tensor:
            raise error

        monkeypatch.setattr(torch, "compile", lambda module, **options: compiled)
        network = Network({CLASSIFIER: Head(sign_count, 2)}, forward=Forward(compile=True))
        lane = network.lane(Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION))
        return network(lane, torch.rand(3, 1, 4, 4), torch.ones(3))

    with pytest.raises(ConfigError, match=r"compute\.compile: .* the classifier for a batch of 3 \(Internal.*: no\)"):
        network(InternalTorchDynamoError("no\nat all"))
    with pytest.raises(ValueError, match="of the network itself"):
        network(ValueError("of the network itself"))
    with pytest.raises(torch.OutOfMemoryError):  # a smaller batch may help
        network(BackendCompilerFailed(sign_count, torch.OutOfMemoryError("tuning"), None))


def test_network_whose_output_the_next_pass_overwrites_keeps_every_batch_s_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = []

    def compiled(module: Any, **options: Any) -> Any:
        modes.append(options["mode"])
        kept: dict[int, Tensor] = {}

        def run(images: Tensor) -> Tensor:  # as a CUDA graph: one place for the result of all passes
            return kept.setdefault(len(images), torch.empty(len(images), 2)).copy_(module(images))

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    images, levels = torch.randn(8, 1, 4, 4), torch.ones(8)
    for forward in (Forward(compile="graphs"), Forward(compile=True)):
        network = Network({CLASSIFIER: Head(sign_count, 2)}, forward=forward)
        lane = network.lane(Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION))
        parts = [network(lane, part, levels[:2])[CLASSIFIER] for part in torch.split(images, 2)]
        assert torch.equal(torch.cat(parts), sign_count(images))
    assert modes == ["reduce-overhead", None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_build_dataset_compiled_has_the_votes_of_a_run_that_is_not(tmp_path: Path) -> None:
    # Another network in the seventh decimal place; on these 15,520 votes the same.
    tables = []
    for name, overrides in (("compiled", ("compute.compile=true",)), ("plain", ())):
        directory = tiny_run(tmp_path / name, "compute.executor=local", *overrides)
        build_dataset.run(directory)
        tables.append(ShardStore(directory.path, "dataset").read())
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_network_that_cannot_be_one_graph_is_refused() -> None:
    def head(images: Tensor) -> Tensor:
        return sign_count(images if images.mean().item() > 0 else -images)

    with pytest.raises(ConfigError, match=r"compute\.compile: torch\.compile cannot compile the classifier"):
        run(head, forward=Forward(compile=True))


# --- out of memory


@dataclasses.dataclass
class Small:
    """A device on which `module` fits up to `most` rows."""

    module: Module
    most: int
    shapes: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate {len(images)} rows")
        self.shapes.append(len(images))
        logits: Tensor = self.module(images)
        return logits


@pytest.mark.parametrize(("batch_size", "most", "micro"), [(64, 16, 16), (77, 20, 20), (333, 200, 167), (5, 1, 1)])
def test_run_out_of_memory_goes_on_in_micro_batches_with_the_same_results(
    batch_size: int, most: int, micro: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = Small(sign_count, most)
    engine = Engine(Network({CLASSIFIER: Head(device, 2)}), GaussianNoise(3), batch_size=batch_size, max_live=5)
    with caplog.at_level(logging.WARNING):
        results = certify_all(engine)
    assert results == run(sign_count, batch_size)
    assert engine.micro_batch == micro
    assert set(device.shapes) == {micro}, "one shape"
    (record,) = caplog.records
    passes = -(-batch_size // micro)
    assert f"a batch of {batch_size} rows runs as {passes} passes of {micro}" in record.message


def test_run_out_of_memory_rows_keep_their_levels() -> None:
    def votes(most: int) -> dict[Any, list[int]]:
        def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
            if len(noisy) > most:
                raise torch.OutOfMemoryError(f"tried to allocate {len(noisy)} rows")
            return noisy / sigma.view(-1, 1, 1, 1)

        def bright(images: Tensor) -> Tensor:
            return torch.stack([images.flatten(1).mean(dim=1), torch.ones(len(images))], dim=1)

        engine = Engine(Network({CLASSIFIER: Head(bright, 2)}, denoiser), GaussianNoise(3), batch_size=64)
        image, sampling = torch.full((1, 4, 4), 0.5), Sampling(30, 70, 0.01)
        tasks = [Task((n, sigma), f"x{n}", image, certify(sigma, sampling)) for n in range(5) for sigma in (0.4, 0.6)]
        return {each.key: each.result.counts_estimation.tolist() for each in engine.run(tasks)}

    expected = votes(64)
    assert all(first > 35 if sigma == 0.4 else first < 35 for (_, sigma), (first, _) in expected.items())
    assert votes(20) == expected


def test_run_memory_that_runs_out_half_way_is_seen_once_more(caplog: pytest.LogCaptureFixture) -> None:
    device = Small(sign_count, 64)

    def source() -> Iterator[Task[Certificate]]:
        generator = torch.Generator().manual_seed(7)
        for index in range(4):
            device.most = 64 >> index  # another process takes more and more
            image = torch.rand(1, 4, 4, generator=generator)
            for sigma in (0.25, 0.5):
                yield Task((index, sigma), f"x{index}", image, certify(sigma, SAMPLING))

    engine = Engine(Network({CLASSIFIER: Head(device, 2)}), GaussianNoise(3), batch_size=64, max_live=1)
    assert {each.key: each.result for each in engine.run(source())} == run(sign_count)
    assert engine.micro_batch == 8
    assert len(caplog.records) == 3


def test_run_out_of_memory_at_one_row_goes_up() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 rows") as caught:
        run(Small(sign_count, 0))
    assert caught.value.__notes__ == ["not even a forward pass of one row fits: use a device with more memory"]


def test_build_dataset_in_micro_batches_says_so_in_shards_and_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_run(tmp_path, "compute.executor=local")
    real = Network.__call__

    def call(self: Network, lane: Any, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        if len(noisy) > 20:
            raise torch.OutOfMemoryError("too large")
        return real(self, lane, noisy, sigma)

    monkeypatch.setattr(Network, "__call__", call)
    build_dataset.run(directory)
    step = directory.manifest["steps"]["build_dataset"]
    assert step["devices"] == ["cpu (micro-batch 16 of 64)"]
    assert (step["batch_size"], step["error_rows"]) == (64, 0)
    assert audit(directory)[0] == []


# --- configuration


def test_identity_new_keys_change_it_and_their_defaults_do_not() -> None:
    plain = {"sigmas": [0.25, 0.5], "noise_version": 1}  # as all runs were when this hash was written down
    before = "268c77f440ac15f7"
    assert parse_config(plain).fingerprint() == before
    defaults = ("batch_size=500", "precision=float32", "channels_last=false", "compile=false")
    assert parse_config(plain, [f"compute.{text}" for text in defaults]).fingerprint() == before
    others = (
        "batch_size=auto",
        "precision=tf32",
        "precision=bfloat16",
        "channels_last=true",
        "compile=true",
        "compile=graphs",
    )
    assert len({parse_config(plain, [f"compute.{text}"]).fingerprint() for text in others} | {before}) == 7
    for text in ("batch_size=most", "batch_size=0", "precision=fp8", "compile=1", "compile=graph"):
        with pytest.raises(ConfigError, match=r"compute\."):
            parse_config(plain, [f"compute.{text}"])
