"""A user's network is called in evaluation mode, on images of its own, and left as it was."""

import copy
import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distributed.execution.work as work_module
from core import Certificate, DualSmoothedClassifier, SmoothedClassifier
from core.errors import ConfigError, ModelError
from core.machine.engine import Engine, Task
from core.machine.network import Head, Network
from core.machine.noise import GaussianNoise
from core.machine.user_modules import submodules
from core.models.checkpoints import load_model
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, ESTIMATOR, Draws, Phase, Sampling
from distributed.store.shards import ShardStore
from jobs import build_dataset
from tests.helpers.oracles import HalfSpace, axis
from tests.helpers.tiny import tiny_run

PLANE = HalfSpace(axis(16, 0), 0.5)
IMAGE = torch.full((1, 4, 4), 0.6)
GLOBAL: list[nn.Module] = []


def certified(module: Any, num_classes: int = 2, *, batch_size: int = 100, **options: Any) -> Certificate:
    g = SmoothedClassifier(module, num_classes, 0.5, seed=1, **options)
    return g.certify(IMAGE, num_selection=50, num_estimation=350, batch_size=batch_size)


def lane(network: Network, *heads: str) -> Any:
    return network.lane(Draws(0.5, 1, heads or (CLASSIFIER,), Phase.SELECTION))


# --- in place


class Overwrites(nn.Module):
    """The half-space behind a first layer that writes into its input, by one of many ways."""

    def __init__(self, how: str, plane: HalfSpace = PLANE) -> None:
        super().__init__()
        self.how, self.plane, self.calls = how, plane, 0

    def forward(self, images: Tensor, sigma: Tensor | None = None) -> Tensor:
        self.calls += 1
        logits = self.plane(images)
        if self.how == "numpy":
            images.numpy()[:] = -3.0
        elif self.how == "data":
            images.data.fill_(-3.0)
        elif self.how == "sometimes" and self.calls % 3 == 0:
            images.fill_(-3.0)
        elif self.how == "method":
            images.sub_(100.0)
        if sigma is not None:
            sigma.fill_(0.001)
        return logits


@pytest.mark.parametrize("how", ["method", "numpy", "data", "sometimes"])
def test_dual_certify_networks_that_write_into_their_input_change_nothing_for_the_other(how: str) -> None:
    # The classifier is right of 0.5 in pixel 0, the estimator picks the second sigma right of 0.3 in pixel 1.
    def dual(wrap: Callable[[HalfSpace], Any]) -> Any:
        g = DualSmoothedClassifier(wrap(HalfSpace(axis(16, 1), 0.3)), wrap(PLANE), (0.25, 0.5), 0.5, 2, seed=3)
        return g.certify_many(torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)), num_estimation=500)

    assert dual(lambda plane: Overwrites(how, plane)) == dual(lambda plane: plane)


def test_certify_denoiser_that_writes_into_images_and_levels_changes_nothing_for_a_light_estimator() -> None:
    def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
        denoised = noisy * 1.0
        noisy.zero_()
        sigma.zero_()
        return denoised

    options: Any = {"sigmas": (0.25, 0.5), "sigma_e": 0.5, "num_classes": 2, "denoise_estimator": False}
    plain = DualSmoothedClassifier(PLANE, PLANE, **options, denoiser=lambda noisy, sigma: noisy)
    writes = DualSmoothedClassifier(PLANE, PLANE, **options, denoiser=denoiser)
    assert writes.certify(IMAGE, num_estimation=300) == plain.certify(IMAGE, num_estimation=300)


def test_run_micro_batches_that_overlap_do_not_see_what_a_network_wrote() -> None:
    def results(module: Any) -> Any:
        engine = Engine(Network({CLASSIFIER: Head(module, 2)}), GaussianNoise(3), batch_size=77)
        engine.micro_batch = 20  # the last of four passes begins at row 57, not at 60
        (done,) = engine.run([Task(0, "x", IMAGE, certify(0.5, Sampling(100, 250, 0.01)))])
        return done.result

    assert results(Overwrites("method")) == results(PLANE)


def test_network_outputs_that_are_views_of_the_input_or_reused_are_kept() -> None:
    buffer = torch.empty(8, 2)
    network = Network(
        {
            ESTIMATOR: Head(lambda x: x.flatten(1)[:, :2], 2),
            CLASSIFIER: Head(lambda x: buffer.copy_(x.flatten(1)[:, 2:4]), 2),
        }
    )
    images = [torch.rand(8, 1, 4, 4) for _ in range(2)]
    with torch.inference_mode():
        found = [network(lane(network, ESTIMATOR, CLASSIFIER), each, torch.ones(8)) for each in images]
        for each in images:
            each.zero_()
    assert not torch.equal(found[0][CLASSIFIER], found[1][CLASSIFIER])
    assert found[0][ESTIMATOR].any()


# --- evaluation mode


def noisy_in_training(num_outputs: int = 3) -> nn.Sequential:
    """Dropout and batch statistics: another network in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, num_outputs))


class Holder:
    """An object with a model, a list of models and slots."""

    __slots__ = ("hidden",)

    def __init__(self, model: nn.Module) -> None:
        self.hidden = {"models": [model]}

    def __call__(self, images: Tensor) -> Tensor:
        return self.hidden["models"][0](images)  # type: ignore[no-any-return]

    def logits(self, images: Tensor) -> Tensor:
        return self(images)


class Unregistered(nn.Module):
    """A module whose submodule is in a plain list, where `eval()` does not look."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.models = [model]

    def forward(self, images: Tensor) -> Tensor:
        return self.models[0](images)  # type: ignore[no-any-return]


def through_a_global(images: Tensor) -> Tensor:
    logits: Tensor = [each(images) for each in GLOBAL][-1]
    return logits


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(images: Tensor) -> Tensor:
        return function(images)  # type: ignore[no-any-return]

    return wrapper


def in_a_namespace(model: nn.Module) -> Callable[[Tensor], Tensor]:
    space = SimpleNamespace(net=model)
    return lambda x: space.net(x)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda model: model,
    "lambda": lambda model: lambda x: model(x),
    "forward": lambda model: model.forward,
    "partial": lambda model: functools.partial(model),
    "partial of a function": lambda model: functools.partial(lambda net, x: net(x), model),
    "default": lambda model: lambda x, net=model: net(x),
    "object": Holder,
    "method of an object": lambda model: Holder(model).logits,
    "unregistered": Unregistered,
    "global": lambda model: through_a_global,
    "decorated": lambda model: decorated(lambda x: model(x)),
    "no_grad": lambda model: torch.no_grad()(lambda x: model(x)),
    "in a namespace": in_a_namespace,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_certify_a_network_in_training_mode_is_that_in_evaluation_mode_and_stays_as_it_was(
    wrap: Callable[[nn.Module], Any],
) -> None:
    model = noisy_in_training()
    expected = certified(copy.deepcopy(model).eval(), 3)
    GLOBAL[:] = [model]
    model.train()
    model[2].eval()  # each module's own flag comes back
    before = copy.deepcopy(model.state_dict())
    assert certified(wrap(model), 3) == expected
    assert 0 < expected.counts_estimation.max() < 350
    assert [module.training for module in model] == [True, True, False, True]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_certify_a_network_put_in_training_mode_after_wrapping_and_a_replaced_one() -> None:
    model = noisy_in_training()
    box = {"net": model}
    g = SmoothedClassifier(lambda x: box["net"](x), 3, 0.5, seed=1)
    options = {"num_selection": 50, "num_estimation": 350, "batch_size": 100}
    first = g.certify(IMAGE, **options)  # type: ignore[arg-type]
    model.train()
    assert g.certify(IMAGE, **options) == first  # type: ignore[arg-type]
    box["net"] = copy.deepcopy(model).train()
    assert g.certify(IMAGE, **options) == first  # type: ignore[arg-type]


@pytest.mark.parametrize("registered", [True, False])
def test_certify_a_network_of_which_a_part_was_replaced(registered: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = noisy_in_training() if registered else None
            self.others = [] if registered else [noisy_in_training()]

        def forward(self, x: Tensor) -> Any:
            return (self.inner or self.others[0])(x)

    model = Outer()
    g = SmoothedClassifier(model, 3, 0.5, seed=1)
    options = {"num_selection": 50, "num_estimation": 350, "batch_size": 100}
    first = g.certify(IMAGE, **options)  # type: ignore[arg-type]
    if registered:
        model.inner = copy.deepcopy(model.inner).train()  # type: ignore[union-attr]
    else:
        model.others[0] = copy.deepcopy(model.others[0]).train()
    assert g.certify(IMAGE, **options) == first  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", ["in a list", "as its forward"])
def test_certify_a_network_that_was_hung_on_a_module_later(kept: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = noisy_in_training().eval()
            self.others: list[nn.Module] = []

        def forward(self, x: Tensor) -> Any:
            return (self.others or [self.inner])[-1](x)

    model = Outer()
    g = SmoothedClassifier(model, 3, 0.5, seed=1)
    options = {"num_selection": 50, "num_estimation": 350, "batch_size": 100}
    first = g.certify(IMAGE, **options)  # type: ignore[arg-type]
    later = copy.deepcopy(model.inner).train()
    if kept == "in a list":
        model.others.append(later)
    else:
        model.forward = lambda x: later(x)  # type: ignore[method-assign]
    assert g.certify(IMAGE, **options) == first  # type: ignore[arg-type]


def test_certify_the_network_that_fails_is_put_back_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).train()
    with pytest.raises(ModelError, match=r"logits of shape \(100, 5\)"):
        certified(model, 3)
    assert model.training


def test_submodules_of_cycles_and_data_end() -> None:
    model = nn.Linear(2, 2)
    loop: dict[str, Any] = {"model": model, "data": list(range(100_000))}
    loop["self"] = loop
    assert submodules(loop) == [model]
    assert submodules(PLANE, len, None) == []


# --- types and outputs

Named = namedtuple("Named", ["logits", "other"])


class ModelOutput(OrderedDict[str, Any]):
    """As transformers has it: a mapping whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda z: (z,),
    "tuple with features": lambda z: (z, torch.zeros(len(z), 7)),
    "list": lambda z: [torch.zeros(len(z), 7), z],
    "dictionary": lambda z: {"logits": z, "aux": -z},
    "model output": lambda z: ModelOutput(loss=None, logits=z),
    "named tuple": lambda z: Named(z, -z),
    "attribute": lambda z: SimpleNamespace(logits=z),
    "other key": lambda z: {"out": z, "features": torch.zeros(len(z), 7)},
    "half": lambda z: z.half(),
    "bfloat16": lambda z: z.bfloat16(),
    "double": lambda z: z.double(),
    "integers": lambda z: torch.nn.functional.one_hot(z.argmax(1), 2),
    "bool": lambda z: z > 0,
    "sparse": lambda z: z.to_sparse(),
    "with a gradient": lambda z: torch.zeros(1, requires_grad=True) + z.clone(),
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_certify_takes_the_logits_wherever_they_are(output: Callable[[Tensor], Any]) -> None:
    assert certified(lambda x: output(PLANE(x))) == certified(PLANE)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: (z, -z), r"the classifier returned a tuple in which no tensor, or more than one"),
        (lambda z: {"a": z, "b": -z}, "returned a dict"),
        (lambda z: z.numpy(), "returned a ndarray"),
        (lambda z: None, "returned a NoneType"),
        (lambda z: (z[:, :1],), "returned a tuple"),
        (lambda z: z[:, 0], r"logits of shape \(100,\)"),
        (lambda z: torch.complex(z, z), "complex logits"),
        (lambda z: {"logits": z.T}, r"logits of shape \(2, 100\)"),
    ],
)
def test_certify_logits_that_cannot_be_told_are_refused_in_a_line(output: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        certified(lambda x: output(PLANE(x)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model.forward, functools.partial])
def test_certify_modules_of_another_type_are_fed_theirs_and_stay_theirs(dtype: torch.dtype, wrap: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0] = torch.tensor([-1.0, 1.0])
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
    model = nn.Sequential(nn.Flatten(), linear).to(dtype)
    found, expected = certified(wrap(model)), certified(PLANE)
    assert linear.weight.dtype == dtype
    assert abs(found.counts_estimation - expected.counts_estimation).max() <= 2  # a pixel rounds onto the plane
    seen: list[torch.dtype] = []
    denoiser = nn.Conv2d(1, 1, 1).to(dtype)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = denoiser

        def forward(self, noisy: Tensor, sigma: Tensor) -> Any:
            seen.extend((noisy.dtype, sigma.dtype))
            return SimpleNamespace(sample=self.conv(noisy) * 0 + noisy)

    behind = certified(wrap(model), denoiser=Denoiser())
    assert (seen[0], seen[1]) == (dtype, torch.float32)
    assert abs(behind.counts_estimation - found.counts_estimation).max() <= 2


def test_certify_denoiser_of_another_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the denoiser returned images of shape \(100, 2, 4, 4\)"):
        certified(PLANE, denoiser=lambda noisy, sigma: noisy.repeat(1, 2, 1, 1))


@pytest.mark.filterwarnings("ignore")
def test_certify_exported_and_scripted_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    expected = certified(model)
    fixed = torch.export.export(model, (torch.rand(100, 1, 4, 4),)).module()  # takes 100 rows and no other number
    with pytest.raises(NotImplementedError):
        fixed.eval()
    assert certified(fixed) == expected
    assert certified(torch.jit.script(model)) == expected
    assert certified(torch.jit.freeze(torch.jit.script(model))) == expected
    training = noisy_in_training()
    scripted = torch.jit.script(training)
    assert certified(scripted, 3) == certified(training, 3)


# --- what is refused from the start


@pytest.mark.parametrize("num_classes", [1, 0, -3, 2.0, True, None])
def test_constructors_fewer_than_two_classes_raise(num_classes: Any) -> None:
    with pytest.raises(ConfigError, match=r"the classifier has .* classes, expected at least 2"):
        SmoothedClassifier(PLANE, num_classes, 0.5)
    with pytest.raises(ConfigError, match=r"the classifier has .* classes, expected at least 2"):
        DualSmoothedClassifier(PLANE, PLANE, (0.25, 0.5), 0.5, num_classes)
    with pytest.raises(ConfigError, match=r"the classifier has .* classes, expected at least 2"):
        Network({CLASSIFIER: Head(PLANE, num_classes)})


def test_dual_certify_one_sigma_needs_an_estimator_of_one_output() -> None:
    g = DualSmoothedClassifier(lambda x: x.flatten(1)[:, :1], PLANE, (0.5,), 0.5, 2)
    result = g.certify(torch.full((1, 4, 4), 0.9), num_estimation=500)
    assert (result.sigma, result.prediction) == (0.5, 1)


def test_certify_what_a_network_keeps_and_derives_is_as_outside() -> None:
    """A table made in the first pass can be trained with later; a gradient inside is there."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.table: Tensor | None = None

        def forward(self, images: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(2)
            return PLANE(images) * self.table * self.weight

    def purified(images: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            (slope,) = torch.autograd.grad(images.square().sum() / 2, images)
        return PLANE(images.detach() - 0.5 * (slope - images.detach()))

    model = Table()
    assert certified(model) == certified(purified) == certified(PLANE)
    model(IMAGE[None]).sum().backward()
    assert model.weight.grad is not None


def test_constructors_modules_without_weights_are_refused_and_stay_so() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    for model in (lazy, empty):
        with pytest.raises(ConfigError, match="the classifier has parameters without values"):
            SmoothedClassifier(model, 2, 0.5)
    assert isinstance(lazy[1].weight, nn.UninitializedParameter)


def test_constructors_a_class_instead_of_a_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the classifier is the class Flatten, expected an instance: Flatten\(...\)"):
        SmoothedClassifier(nn.Flatten, 2, 0.5)  # type: ignore[arg-type]


def test_constructors_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="the classifier is a dict, expected a torch module or a function"):
        Network({CLASSIFIER: Head({0.5: {}}, 2)})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="the denoiser is a str"):
        SmoothedClassifier(PLANE, 2, 0.5, denoiser="unet")  # type: ignore[arg-type]


def test_constructors_a_device_that_the_network_is_not_on_is_refused_and_nothing_is_moved() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match=r"the classifier is on cpu, expected all networks on meta: move it yourself"):
        SmoothedClassifier(model, 2, 0.5, device="meta")
    assert model[1].weight.device.type == "cpu"
    torch.testing.assert_close(model[1].weight, model[1].weight.clone())


# --- in jobs


def test_replica_of_a_network_that_mixes_rows_fails_its_shards_and_one_that_writes_in_place_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_run(tmp_path / "plain", "compute.executor=local")
    build_dataset.run(directory)
    expected = ShardStore(directory.path, "dataset").read()

    class Around(nn.Module):
        def __init__(self, model: nn.Module, before: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.model, self.before = model, before

        def forward(self, images: Tensor, *more: Tensor) -> Tensor:
            output: Tensor = self.model(self.before(images), *more)
            images.fill_(7.0)
            return output

    def run(name: str, before: Callable[[Tensor], Any]) -> ShardStore:
        other = tiny_run(tmp_path / name, "compute.executor=local")
        monkeypatch.setattr(work_module, "load_model", lambda *given: Around(load_model(*given), before).train())
        build_dataset.run(other)
        return ShardStore(other.path, "dataset")

    assert run("in place", lambda images: images.clone()).read().equals(expected)
    with pytest.raises(ModelError, match="the denoiser mixes the rows of a batch"):
        run("mixing", lambda images: images - 0.1 * images.mean(dim=0))


def test_certify_a_function_beside_an_object_that_raises_when_it_is_looked_at() -> None:
    class Touchy:
        def __getattr__(self, name: str) -> Any:
            raise ValueError(name)

    touchy, inside = Touchy(), noisy_in_training(2)
    object.__setattr__(touchy, "model", inside)
    result = certified(lambda images: object.__getattribute__(touchy, "model")(images))
    assert result == certified(inside)
    assert inside.training
