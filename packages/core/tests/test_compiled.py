"""Compiled steps against eager ones: right in second order, or refused in one line."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from cdm_core import UserError, training
from cdm_core.checkpoints import RunFolder
from cdm_core.commands.common import Session
from cdm_core.commands.likelihood import likelihood
from cdm_core.commands.sample import sample
from cdm_core.commands.train import train as train_command
from cdm_core.compiled import CompiledModel, CompiledObjective, choose, same_masks
from cdm_core.config import resolve
from cdm_core.data import DataInfo
from cdm_core.data.configs import GaussianMixtureConfig
from cdm_core.data.mixture import load
from cdm_core.manager import Registry
from cdm_core.random import Draws
from cdm_core.runs import Run, load_run
from cdm_core.samplers import Prediction

PLUGINS = Path(__file__).parent / "plugins"
INFO = DataInfo("squares", (1, 4, 4), num_classes=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PLUGINS))
    return importlib.import_module("toy_plugin")


def images(rows: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).tanh()


def batch(rows: int = 6) -> tuple[Tensor, Tensor, Draws]:
    return images(rows), torch.arange(rows) % 2, Draws(5, rows)


def energy(toy: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return toy.energy(toy.ModelConfig(**settings), INFO).train()


def gradients(objective: Any, model: nn.Module, rows: int = 6) -> dict[str, Tensor | None]:
    """Of one step, the dropout masks always the same."""
    model.zero_grad()
    torch.manual_seed(3)
    objective(model, *batch(rows))["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def error(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Relative, of all gradients as one vector."""
    assert {k for k, v in found.items() if v is None} == {k for k, v in expected.items() if v is None}
    a, b = (
        torch.cat([v.double().flatten() for v in all_.values() if v is not None])
        for all_ in (found, expected)
    )
    return float((a - b).norm() / b.norm())


class InDouble:
    """An objective computed in float64."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def __call__(self, model: nn.Module, *args: Any) -> dict[str, Tensor]:
        prepared = self.objective.prepare(model, *args)
        return self.objective.loss(
            model,
            *(t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in prepared),
        )


class Split:
    """The least objective that can be compiled: `loss` is `function(model, x)` at a leaf x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, model: Any, x0: Tensor, y: Any, draws: Draws) -> dict[str, Tensor]:
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(self, model: Any, x0: Tensor, y: Any, draws: Draws) -> tuple[Tensor]:
        return ((x0 + draws.normal(*x0.shape[1:])).requires_grad_(),)

    def loss(self, model: Any, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.function(model, x)}


def slope(model: Any, x: Tensor) -> Tensor:
    """A loss of second order."""
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=torch.is_grad_enabled())
    return (gradient - 1).square().mean()


def quick(objective: Any, recipe: Any = "trace") -> CompiledObjective:
    """Traced as for the real compiler, and run in eager operations."""
    return CompiledObjective(objective, recipe, name="test/loss", backend="aot_eager")


RECIPES = ["trace", "whole"]


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_eager_in_float64(toy: Any, recipe: str, dropout: float) -> None:
    model = energy(toy, dropout=dropout)
    double = copy.deepcopy(model).double()
    compiled = quick(toy.Split(None), recipe)
    expected = gradients(InDouble(toy.Split(None)), double)
    for _ in range(2):  # the second call compiles nothing
        assert error(gradients(compiled, model), expected) < 2e-6
    assert compiled.error < 1e-6
    assert expected["unused"] is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_real_compiler_with_dropout(toy: Any, recipe: Any) -> None:
    model = energy(toy, dropout=0.4)
    compiled = CompiledObjective(toy.Split(None), recipe, name="test/loss")
    found = [gradients(compiled, model, rows) for rows in (6, 3)]  # two shapes, two steps
    expected = [gradients(toy.Split(None), model, rows) for rows in (6, 3)]
    assert error(found[0], expected[0]) < 1e-5
    assert error(found[1], expected[1]) < 1e-5


class Strided(nn.Module):
    """Dropout on a tensor in channels-last order: torch draws its mask in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(1, 3, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).contiguous(memory_format=torch.channels_last)
        return self.dropout(h.tanh()).square().sum((1, 2, 3))


@pytest.mark.parametrize(
    ("recipe", "backend"), [("trace", "aot_eager"), ("whole", "aot_eager"), ("whole", "inductor")]
)
def test_dropout_is_compared_whatever_the_layout(recipe: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = Strided()
    compiled = CompiledObjective(Split(slope), recipe, name="test/loss", backend=backend)
    compiled.compile(model, *batch())
    assert 0 <= compiled.error < 1e-5
    state, expected = torch.random.get_rng_state(), []
    for objective in (compiled, Split(slope)):
        torch.random.set_rng_state(state)
        with same_masks():
            expected.append(gradients(objective, model))
    assert error(*expected) < 1e-5
    masks = {float(compiled(model, *batch())["loss"].detach()) for _ in range(4)}
    assert len(masks) == 4, "the masks are always the same"


@pytest.mark.parametrize("recipe", RECIPES)
def test_under_autocast_the_casts_are_compiled_too(toy: Any, recipe: str) -> None:
    model = energy(toy)
    exact = gradients(toy.Split(None), model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = {
            name: v if v is None else v.clone() for name, v in gradients(toy.Split(None), model).items()
        }
        found = gradients(quick(toy.Split(None), recipe), model)
    exact = gradients(toy.Split(None), model)
    assert error(found, expected) < 1e-2
    assert 1e-4 < error(found, exact) < 5e-2


def test_two_precisions_are_two_steps(toy: Any) -> None:
    model, compiled = energy(toy), quick(toy.Split(None), "whole")
    with torch.autocast("cpu", torch.bfloat16):
        gradients(compiled, model)
    assert error(gradients(compiled, model), gradients(toy.Split(None), model)) < 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_else_of_a_step_is_eagers_too(toy: Any, recipe: str) -> None:
    """Scalars, buffers, and that a comparison leaves no trace: weights, generators, gradients."""
    model, other = energy(toy, dropout=0.4), energy(toy, dropout=0.4)
    nn.init.zeros_(model.read.bias)
    nn.init.zeros_(other.read.bias)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    compiled = quick(toy.Split(None), recipe)
    compiled.compile(model, *batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    for seed in range(3):
        found, expected = (
            objective(net, *batch())
            for objective, net in ((compiled, model), (toy.Split(None), other))
            if torch.manual_seed(seed)
        )
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
    assert model.calls == other.calls == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_add_up_and_scale(toy: Any, recipe: str) -> None:
    """Two micro-batches, each times its share, as the training loop has them."""
    model, compiled = energy(toy), quick(toy.Split(None), recipe)
    sums = []
    for objective in (compiled, toy.Split(None)):
        model.zero_grad()
        losses = [objective(model, images(4, seed), torch.arange(4) % 2, Draws(seed, 4)) for seed in (1, 2)]
        for share, scalars in zip((0.25, 0.75), losses, strict=True):  # both forward, then both backward
            (share * scalars["loss"]).backward()
        sums.append({name: v.grad for name, v in model.named_parameters()})
    assert error(*sums) < 1e-6


def test_a_third_derivative_is_refused_and_not_wrong(toy: Any) -> None:
    model, compiled = energy(toy), quick(toy.Split(None), "whole")
    loss = compiled(model, *batch())["loss"]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, model.conv.weight, create_graph=True)


def test_without_grad_the_objective_itself_is_called(toy: Any) -> None:
    model, compiled = energy(toy), quick(toy.Split(None))
    with torch.no_grad():
        loss = compiled(model, *batch())["loss"]
        assert torch.equal(loss, toy.Split(None)(model, *batch())["loss"])
    assert compiled._steps == {}


def test_whole_scales_what_float16_would_lose() -> None:
    """A gradient of 1e-9 is 0 in float16; a GradScaler's factor comes in time from the second step on."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    loss = Split(lambda model, x: 1e-9 * model(x.flatten(1)[:, :1]).float().mean())
    compiled = quick(loss, "whole")
    found = []
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            (compiled(model, *batch())["loss"] * 2.0**20).backward()
        found.append(float(model.weight.grad / 2.0**20))
    model.zero_grad()
    loss(model, *batch())["loss"].backward()
    assert found[0] == 0
    assert found[1:] == pytest.approx([float(model.weight.grad)] * 2, rel=1e-2)


# -- what is wrong is refused --------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """x^3, right in eager to any order. Traced, its backward is dropped where it is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Square.apply(x) * cotangent


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 3 * x**2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 6 * ctx.saved_tensors[0] * cotangent


class Cubic(nn.Module):
    """w . ((v x)^3 + (v x)^2), through `Cube`; with w = 0, as in a new one, no second derivative shows."""

    def __init__(self, new: bool = False) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(torch.linspace(0.5, 1, 16)), nn.Parameter(torch.linspace(1, 2, 16))
        if new:
            nn.init.zeros_(self.w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.v * x.flatten(1)
        return ((Cube.apply(x) + x**2) * self.w).sum(1)


@pytest.mark.parametrize("new", [False, True])
def test_a_function_that_tracing_breaks_in_silence_is_refused(new: bool) -> None:
    model = Cubic(new)
    with pytest.raises(UserError) as caught:
        quick(Split(slope), "trace")(model, *batch())
    message = str(caught.value)
    assert "'test/loss' is wrong: the gradient of the weights" in message
    assert message.endswith("and 0.0001 is allowed: train without --compile")
    assert "\n" not in message
    assert error(gradients(quick(Split(slope), "whole"), model), gradients(Split(slope), model)) < 1e-6


def test_what_was_taken_for_a_constant_is_found_out() -> None:
    """Numbers that leave torch and come back are those of the traced batch for ever."""

    def constant(model: Any, x: Tensor) -> Tensor:
        return slope(model, x) * torch.from_numpy(x.detach().numpy() ** 2).mean()

    with pytest.raises(UserError, match="'whole', the objective 'test/loss' is wrong: the loss differs"):
        quick(Split(constant), "whole")(Cubic(), *batch())


class Running(Cubic):
    """Replaces a buffer by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x)


def test_a_buffer_that_is_not_kept_up_is_found_out() -> None:
    with pytest.raises(UserError, match="the buffer 'mean' after a step differs"):
        quick(Split(slope), "whole")(Running(), *batch())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_branch_on_a_value_is_one_line(recipe: str) -> None:
    def branching(model: Any, x: Tensor) -> Tensor:
        return slope(model, x) * (2 if x.detach().mean() > 0 else 1)

    with pytest.raises(UserError, match=f"cannot be compiled by recipe '{recipe}'") as caught:
        quick(Split(branching), recipe)(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), *batch())
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("): train without --compile")


def test_a_compiler_that_is_missing_is_one_line(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError) as caught:
        CompiledObjective(toy.Split(None), "whole", name="test/loss")(energy(toy), *batch())
    assert "No working C++ compiler found" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_is_for_the_training_loop_to_say() -> None:
    def poisoned(model: Any, x: Tensor) -> Tensor:
        return slope(model, x) * float("nan")

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    assert bool(quick(Split(poisoned))(model, *batch())["loss"].isnan())


def test_recipes_that_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch, toy: Any) -> None:
    with pytest.raises(UserError, match="'cuda-graph' needs a GPU, and this runs on cpu: use 'auto'"):
        choose("cuda-graph", CPU)
    with pytest.raises(UserError, match="'toy/score' cannot be compiled, as it has no `prepare` and `loss`"):
        CompiledObjective(toy.score(toy.ObjectiveConfig()), "whole", name="toy/score")
    assert (choose("auto", CPU), choose("trace", CPU)) == ("whole", "trace")
    monkeypatch.setattr("cdm_core.compiled.can_trace", lambda: False)  # an older torch
    with pytest.raises(UserError, match=r"cannot trace torch\.autograd\.grad: use 'whole'"):
        choose("trace", CPU)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph needs one")


@gpu
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_recorded_step_is_eagers(toy: Any, dropout: float) -> None:
    model = energy(toy, dropout=dropout).cuda()
    compiled = CompiledObjective(toy.Split(None), "cuda-graph", name="test/loss")
    for seed in range(3):
        each = []
        for objective in (compiled, toy.Split(None)):
            model.zero_grad()
            torch.manual_seed(seed)
            draws = Draws(seed, 6, device="cuda")
            objective(model, images(6, seed).cuda(), torch.arange(6).cuda() % 2, draws)["loss"].backward()
            each.append({name: v.grad for name, v in model.named_parameters()})
        assert error(*each) < 1e-5
        with torch.no_grad():  # what is replayed reads the weights as they are
            model.conv.weight.mul_(1.1)


# -- models --------------------------------------------------------------------------------------------------


def compiled_model(model: Any, backend: str = "aot_eager") -> CompiledModel:
    return CompiledModel(model.eval().requires_grad_(False), hint="leave it", backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_denoises_and_scores_as_the_model_does(toy: Any, backend: str) -> None:
    """Batches smaller than the first are filled up, larger ones compile once more."""
    model = energy(toy)
    compiled = compiled_model(model, backend)
    for rows in (5, 2, 5, 1, 7, 6):
        x, sigma = images(rows, rows), torch.linspace(0.1, 10, rows)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled.denoise(x, sigma), model.denoise(x, sigma), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(compiled.log_density(x), model.log_density(x), rtol=1e-5, atol=1e-5)
    assert sorted((key[0], size) for key, (size, _) in compiled._compiled.items()) == [
        ("denoise", 7), ("log_density", 7)
    ]  # fmt: skip
    assert compiled.sigma_range == model.sigma_range


def test_a_compiled_model_has_the_learned_variance(toy: Any) -> None:
    model = energy(toy)
    assert compiled_model(model).predict(images(3), torch.ones(3)).variance is None
    model.predict = lambda x, sigma, y=None: Prediction(model.denoise(x, sigma, y), torch.sigmoid(x))
    with torch.no_grad():
        for rows in (4, 2):
            x, sigma = images(rows), torch.linspace(0.1, 10, rows)
            found = compiled_model(model).predict(x, sigma)
            torch.testing.assert_close(tuple(found), tuple(model.predict(x, sigma)), rtol=1e-5, atol=1e-5)


def test_with_grad_the_model_itself_is_called(toy: Any) -> None:
    compiled = compiled_model(energy(toy))
    x = images(3).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled.log_density(x).sum(), x)
    (expected,) = torch.autograd.grad(compiled.model.log_density(x).sum(), x)
    assert torch.equal(gradient, expected)
    assert compiled._compiled == {}


class Fixed(nn.Module):
    """Denoisers that cannot be compiled right."""

    sigma_range = (0.1, 10.0)

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        level = sigma if self.fault == "branch" else torch.from_numpy(sigma.numpy())
        factor = 2 if self.fault == "branch" and level[0] > 1 else 1
        return factor * x / (1 + level[:, None, None, None] ** 2)


@pytest.mark.parametrize(("fault", "message"), [("branch", "cannot be compiled"), ("constant", "is wrong")])
def test_a_model_that_compiles_wrong_is_refused(fault: str, message: str) -> None:
    compiled = compiled_model(Fixed(fault))
    # Two levels of which the second is the same for every row: what is baked in shows at another level only.
    with torch.no_grad(), pytest.raises(UserError, match=f"`denoise` of this model.*{message}") as caught:
        compiled.denoise(images(3), torch.full((3,), 4.0))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(": leave it")


class Bells(nn.Module):
    """One Gaussian a class, of unit variance; the last label is all of them as one."""

    sigma_range, num_classes, null_label = (0.01, 10.0), 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.linspace(-1, 1, 10).reshape(5, 2, 1, 1))

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.means[-1] if y is None else self.means[y]
        return mean + (x - mean) / (1 + sigma[:, None, None, None] ** 2)

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        mean = self.means[-1] if y is None else self.means[y]
        variance = torch.ones(len(x)) if sigma is None else 1 + sigma**2
        return -(x - mean).square().flatten(1).sum(1) / (2 * variance) - (2 * torch.pi * variance).log()


def test_a_compiled_run_guides_and_classifies_as_the_run_does() -> None:
    """The adapters of core call the compiled model: with doubled batches, and one pass a class."""
    data = load(GaussianMixtureConfig(components=4, std=0.2, test_points=30))
    runs = [Run(Bells(), data.info, data=data, registry=Registry.of({}), compile=on) for on in (False, True)]
    runs[1].model._backend = "aot_eager"
    options: dict[str, Any] = {"steps": 4, "guidance": 1.0, "batch_size": 4}
    torch.testing.assert_close(runs[1].sample(7, **options), runs[0].sample(7, **options))
    x0, y = runs[0].examples("test")
    torch.testing.assert_close(runs[1].classify(x0), runs[0].classify(x0))
    torch.testing.assert_close(runs[1].log_density(x0, y, sigma=0.3), runs[0].log_density(x0, y, sigma=0.3))
    assert runs[1].capabilities == runs[0].capabilities


@gpu
def test_a_recorded_model_denoises_as_the_model_does(toy: Any) -> None:
    model = energy(toy).cuda()
    compiled = compiled_model(model, "inductor")
    for rows in (5, 2, 5):
        x, sigma = images(rows, rows).cuda(), torch.linspace(0.1, 10, rows).cuda()
        with torch.no_grad():
            torch.testing.assert_close(
                compiled.denoise(x, sigma), model.denoise(x, sigma), rtol=1e-4, atol=1e-4
            )


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(toy: Any, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Runs of the toy, their steps compiled for eager operations."""
    monkeypatch.setattr(training, "CompiledObjective", partial(CompiledObjective, backend="aot_eager"))
    return Registry.of({"toy": toy})


def train(registry: Registry, out: Path, *overrides: str, quiet: bool = True) -> RunFolder:
    settings = ["train.steps=6", "objective.name=split", "model.dropout=0.3", *overrides]
    config = resolve(registry, plugins=["toy"], overrides=settings)
    return training.train(config, out, registry=registry, device="cpu", quiet=quiet)


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.metrics()]


def files(folder: RunFolder) -> dict[str, bytes]:
    checkpoint = folder.latest()
    assert checkpoint is not None
    names = ("model.safetensors", "ema.safetensors", "optimizer.pt")
    return {name: (checkpoint.path / name).read_bytes() for name in names}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("more", [["train.micro_batches=2"], ["train.precision=bf16"]])
def test_a_compiled_run_is_the_eager_one(
    registry: Registry, tmp_path: Path, recipe: str, more: list[str]
) -> None:
    """Micro-batches, a weight outside the loss, clipping, half precision, validation."""
    settings = ["train.clip_norm=0.5", *more]
    eager = train(registry, tmp_path / "eager", *settings)
    compiled = train(registry, tmp_path / "compiled", f"train.compile={recipe}", *settings)
    assert losses(compiled) == pytest.approx(losses(eager), rel=2e-2 if "bf16" in more[0] else 1e-5)
    for name, value in eager.checkpoints()[0].weights("model").items():
        torch.testing.assert_close(
            compiled.checkpoints()[0].weights("model")[name], value, rtol=0.05, atol=0.02
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_run_resumes_bit_for_bit_and_goes_on_without(
    registry: Registry, tmp_path: Path, recipe: str
) -> None:
    whole = train(registry, tmp_path / "whole", f"train.compile={recipe}")
    cut = train(registry, tmp_path / "cut", f"train.compile={recipe}", "train.steps=3")
    train(registry, tmp_path / "cut", f"train.compile={recipe}")
    assert files(cut) == files(whole)
    assert losses(cut)[:3] == losses(whole)[:3]
    train(registry, tmp_path / "cut", "train.steps=8")  # where there is no compiler, say
    assert cut.checkpoints()[0].step == 8


def test_progress_says_what_is_compiled_and_for_how_long(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(registry, tmp_path / "run", "train.compile=whole", quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling the training step, recipe whole"
    assert re.fullmatch(r"compiled in \d+\.\d s; gradients within \S+ of eager's", lines[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.name=score", "train.compile=auto"], "'toy/score' cannot be compiled"),
        (["train.compile=cuda-graph"], "needs a GPU"),
    ],
)
def test_what_cannot_be_compiled_leaves_nothing_behind(
    registry: Registry, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(registry, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_a_step_that_compiles_wrong_leaves_nothing_behind(
    registry: Registry, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Any, model: Any, x: Tensor, *rest: Any) -> dict[str, Tensor]:
        return {"loss": slope(lambda x: (Cube.apply(x) + x**2).sum() * model.conv.weight.sum(), x)}

    monkeypatch.setattr(toy.Split, "loss", wrong)
    with pytest.raises(UserError, match="'toy/split' is wrong"):
        train(registry, tmp_path / "run", "train.compile=trace")
    assert not (tmp_path / "run").exists()


def invoke(registry: Registry, command: Any, *arguments: object) -> Result:
    session = Session(plugins=("toy",))
    vars(session)["registry"] = registry
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(command, ["--device", "cpu", *words], obj=session, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_commands_compile(toy: Any, tmp_path: Path) -> None:
    """`train`, `sample` and `likelihood` with the real compiler."""
    registry, out = Registry.of({"toy": toy}), tmp_path / "run"
    settings = ["--set", "objective.name=split", "--set", "train.sample_every=0", "--steps", 3]
    invoke(registry, train_command, *settings, "--compile", "--out", out)
    assert 'compile = "auto"' in (out / "config.toml").read_text()
    drawn = []
    for flag in ([], ["--compile"]):
        folder = tmp_path / f"samples{len(flag)}"
        options = ["--num", 5, "--batch-size", 3, "--steps", 3, "--format", "npz", "--out", folder]
        invoke(registry, sample, out, *options, *flag)
        drawn.append(
            load_run(out, device="cpu", registry=registry, compile=bool(flag)).sample(5, batch_size=3)
        )
        with np.load(folder / "samples.npz") as kept:
            assert kept["samples"].shape == (5, 4, 4, 1)
    torch.testing.assert_close(*drawn)
    nats = [
        json.loads(invoke(registry, likelihood, out, "--split", "valid", "--json", *flag).stdout)["nats"]
        for flag in ([], ["--compile"])
    ]
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)
