"""What only a CUDA device can show: `make test-gpu`. Votes are compared where the network is exact in any precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.config import FinetuneConfig
from core.data import Dataset
from core.machine.batch_size import DeviceProbe, choose_batch_size
from core.machine.engine import Engine, Task
from core.machine.exact_noise import ExactNoise
from core.machine.network import Compile, Forward, Head, Network, Precision
from core.machine.noise import Copies, GaussianNoise, Noise
from core.models.checkpoints import build_denoiser
from core.models.denoiser import trained_unet_config
from core.models.small import SmallConvNet
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Certificate, Draws, Phase, Sampling
from core.training.finetune import FinetuneObjective
from core.training.loop import Training
from distributed.checks.audit import audit, replay
from distributed.store.shards import ShardStore
from jobs import build_dataset
from tests.core.machine.test_device_use import sign_count
from tests.helpers.tiny import tiny_run

pytestmark = pytest.mark.gpu


def on_device(images: Tensor) -> Tensor:
    """`sign_count` with its ones where the images are."""
    above = (images.flatten(1) > 0.4).float() @ torch.ones(images[0].numel(), 1, device=images.device)
    return torch.cat([images[0].numel() - above, above], dim=1)


def run(engine: Engine, num: int = 20) -> dict[int, Certificate]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (num, 1, 8, 8), generator=generator) / 255.0
    tasks = (Task(i, f"x{i}", images[i], certify(0.5, Sampling(100, 1000, 0.001))) for i in range(num))
    return {finished.key: finished.result for finished in engine.run(tasks)}


def real_network(forward: Forward | None = None, device: str = "cuda") -> Network:
    """Random weights of the digits' architectures."""
    torch.manual_seed(0)
    return Network(
        {CLASSIFIER: Head(SmallConvNet(1, 8, 10), 10)}, build_denoiser(trained_unet_config(1, 8)), device, forward
    )


def logits_of(network: Network, images: Tensor) -> Tensor:
    lane = network.lane(Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION))
    with torch.inference_mode():
        return network(lane, images.cuda(), torch.full((len(images),), 0.5).cuda())[CLASSIFIER].cpu()


@pytest.mark.parametrize("noise", [GaussianNoise(3), ExactNoise(3)], ids=["gaussian", "exact"])
def test_cuda_noise_does_not_depend_on_the_batch(noise: Noise) -> None:
    network = Network({CLASSIFIER: Head(on_device, 2)}, device="cuda")
    results = [run(Engine(network, noise, batch_size=size, max_live=live)) for size, live in ((64, 7), (333, 4096))]
    assert results[0] == results[1]
    assert any(0 < result.counts_estimation[1] < 1000 for result in results[0].values())


@pytest.mark.parametrize("noise", [GaussianNoise(3), ExactNoise(3)], ids=["gaussian", "exact"])
def test_cuda_noise_and_votes_are_those_of_the_cpu(noise: Noise) -> None:
    image = torch.randint(0, 256, (3, 31, 17), generator=torch.Generator().manual_seed(0)) / 255.0
    copies = [Copies(image, f"x{n}", Phase.ESTIMATION, 0.12 * (n + 1), 2**n - 1, 100 + n) for n in range(40)]
    out = torch.empty(sum(each.num for each in copies), *image.shape)
    noise.corrupt(out, copies)
    on_gpu = torch.empty_like(out, device="cuda")
    noise.corrupt(on_gpu, [replace(each, image=image.cuda()) for each in copies])
    assert torch.equal(on_gpu.cpu(), out)
    votes = [run(Engine(Network({CLASSIFIER: Head(on_device, 2)}, device=d), noise)) for d in ("cpu", "cuda")]
    assert votes[0] == votes[1]


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_cuda_votes_of_an_integer_network_are_those_of_float32(precision: Precision) -> None:
    plain, other = (
        run(Engine(Network({CLASSIFIER: Head(on_device, 2)}, device="cuda", forward=forward), GaussianNoise(3)))
        for forward in (Forward(), Forward(precision))
    )
    assert plain == other


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_cuda_autocast_is_close_to_float32_and_not_equal(precision: Precision, most: float) -> None:
    images = torch.rand(256, 1, 8, 8)
    plain, half = logits_of(real_network(), images), logits_of(real_network(Forward(precision)), images)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < most * plain.abs().max()


def test_cuda_tf32_rounds_and_float32_does_not_whatever_was_set_before() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no TF32 on this device")
    linear, conv = nn.Linear(1024, 512), nn.Conv2d(16, 64, 3, padding=1)

    def head(images: Tensor) -> Tensor:
        return torch.cat([linear(images.flatten(1)), conv(images.view(-1, 16, 8, 8)).flatten(1)], dim=1)

    images = torch.rand(128, 1, 32, 32)
    with torch.inference_mode():
        exact = head(images).double()
    linear.cuda()
    conv.cuda()
    width = exact.shape[1]
    errors = {}
    for precision in ("tf32", "float32", "tf32", "float32"):
        network = Network({CLASSIFIER: Head(head, width)}, device="cuda", forward=Forward(precision))
        difference = (logits_of(network, images).double() - exact).abs()
        errors[precision] = (float(difference[:, :512].max()), float(difference[:, 512:].max()))
    assert max(errors["float32"]) < 2e-5
    assert min(errors["tf32"]) > 5e-5, "products and convolutions, both"


def test_cuda_forward_passes_are_queued_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine._launch

    def launch(self: Engine, lane: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # raises where PyTorch waits for the stream
        try:
            return real(self, lane)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Engine, "_launch", launch)
    engine = Engine(real_network(), GaussianNoise(3), batch_size=256)
    engine.warm_up((1, 8, 8), [Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION)])
    assert len(run(engine)) == 20


def test_cuda_batch_that_is_too_large_runs_in_micro_batches() -> None:
    def hungry(images: Tensor) -> Tensor:
        """2 GiB a row while it runs."""
        scratch = torch.empty((len(images), 2**31), dtype=torch.uint8, device=images.device)
        del scratch
        return on_device(images)

    free, _ = torch.cuda.mem_get_info()
    rows = 2 * max(1, free // 2**31)
    engine = Engine(Network({CLASSIFIER: Head(hungry, 2)}, device="cuda"), GaussianNoise(3), batch_size=int(rows))
    plain = Engine(Network({CLASSIFIER: Head(on_device, 2)}, device="cuda"), GaussianNoise(3), batch_size=int(rows))
    assert run(engine, 2) == run(plain, 2)
    assert 1 <= engine.micro_batch < rows


def test_cuda_auto_batch_size_fits_with_room_to_spare() -> None:
    network = real_network()
    probe = DeviceProbe(network, (1, 8, 8), [Draws(0.5, 1, (CLASSIFIER,), Phase.SELECTION)], share=1.0)
    size = choose_batch_size(probe)
    assert size > 8
    engine = Engine(network, GaussianNoise(3), batch_size=size)
    run(engine)
    assert engine.micro_batch == size


@pytest.mark.parametrize("overrides", [(), ("compute.precision=bfloat16", "compute.channels_last=true")])
def test_cuda_run_with_auto_batch_size_can_be_drawn_again(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    directory = tiny_run(
        tmp_path, "compute.executor=local", "compute.device=cuda", "compute.batch_size=auto", *overrides
    )
    build_dataset.run(directory)
    plan = ShardStore(directory.path, "dataset").read_plan()
    assert plan is not None
    assert plan.device == "cuda"
    assert plan.batch_size == directory.manifest["steps"]["build_dataset"]["batch_size"]
    assert audit(directory)[0] == []
    assert replay(directory, 40, 0) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [True, "graphs"])
def test_cuda_compiled_network_is_close_pass_after_pass(how: Compile) -> None:
    network, plain = real_network(Forward(compile=how)), real_network()
    batches = [torch.rand(256, 1, 8, 8) for _ in range(4)]
    found = [logits_of(network, images) for images in batches]  # a graph is recorded at the second or third pass
    for logits, images in zip(found, batches, strict=True):
        torch.testing.assert_close(logits, logits_of(plain, images), rtol=1e-3, atol=1e-3)


def test_on_device_is_sign_count() -> None:
    images = torch.rand(50, 1, 4, 4)
    assert torch.equal(on_device(images.cuda()).cpu(), sign_count(images))


def test_training_on_cuda_is_close_to_the_cpu() -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), np.uint8)
    data = Dataset("random", tuple(map(str, range(64))), images, np.arange(64) % 10, 10)
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = SmallConvNet(1, 8, 10).to(device)
        config = FinetuneConfig(epochs=3, batch_size=16, lr=1e-3)
        training = Training(model, FinetuneObjective(data, np.arange(64), np.full(64, 0.25), None, config, 0))
        for _ in training.run():
            pass
        losses.append([record["loss"] for record in training.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
