"""What every component keeps to, as pytest classes to subclass: one suite a kind.

A subclass says which component, `component = "plugin/name"`, and, where its defaults are too big or too
special for a test, `config = {...}`, fields of its settings to change; settings with a classmethod `small()`
start from that. To run a suite over many components, parametrise `component_name` (see `all_components`).

Models are tested with every weight moved at random: an untrained one may hide its faults behind zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.capabilities import METHODS, offered
from cdm_core.compiled import CompiledObjective, SplitObjective, can_trace
from cdm_core.data import Data, DataInfo, Split
from cdm_core.errors import MissingPackage, UserError
from cdm_core.manager import load_registry
from cdm_core.mixtures import GaussianMixture, MixtureOnPath
from cdm_core.random import Draws
from cdm_core.samplers import Conditional, Step

# Small data that models are built for, in this order: the first that a model does not refuse.
IMAGES = DataInfo("test-images", (1, 8, 8), num_classes=10)
POINTS = DataInfo("test-points", (2, 1, 1), num_classes=10, levels=None, dequantise=False)
ROWS = 4


def all_components(kind: str) -> list[str]:
    """Full names of all installed components of a kind ("model", "sampler", ...), to parametrise a suite."""
    return list(load_registry().components(kind))


def settings(record: Any, overrides: Mapping[str, Any]) -> Any:
    """The settings of a component under test: `small()` where its dataclass has it, with `overrides`."""
    if record.config is None:
        assert not overrides, f"{record.name} has no settings to override"
        return None
    base = getattr(record.config, "small", record.config)()
    config = replace(base, **overrides)
    if hasattr(config, "check"):
        config.check()
    return config


def build_model(
    record: Any, config: Any, info: DataInfo | None = None, seed: int = 0
) -> tuple[Any, DataInfo]:
    """The model and its data: `info`, or the first of `IMAGES` and `POINTS` that it does not refuse."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if info is None:
            try:
                return record.load()(config, IMAGES), IMAGES
            except MissingPackage as error:
                pytest.skip(str(error))
            except UserError:
                info = POINTS
        return record.load()(config, info), info


def randomise(model: nn.Module, scale: float = 0.05, seed: int = 0) -> None:
    """Move every parameter, those initialised to zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that leave the global generator alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal up to `tolerance` times the largest of the expected numbers, or 1."""
    error, size = (t.detach().abs().max() for t in (actual - expected, expected))
    return float(error) <= tolerance * max(1.0, float(size))


def noise_levels(model: Any) -> Tensor:
    """(ROWS,) float32: noise levels over the range in which `model` denoises."""
    if hasattr(model, "sigmas"):
        sigmas = model.sigmas.cpu()
        return sigmas[torch.linspace(0, len(sigmas) - 1, ROWS).long()].float()
    low, high = model.sigma_range if "denoise" in offered(model) else (0.01, 10.0)
    return torch.logspace(math.log10(low), math.log10(high), ROWS)


@dataclass
class Case:
    """A model to test and what to call it with: x (ROWS, C, H, W) at sigma (ROWS,), classes y or None."""

    model: Any
    info: DataInfo
    x: Tensor
    sigma: Tensor
    y: Tensor | None

    @classmethod
    def of(cls, model: Any, info: DataInfo) -> Case:
        """Noisy random data over the model's range."""
        sigma = noise_levels(model)
        x0 = torch.tanh(normal(ROWS, *info.shape, seed=1))
        x = x0 + sigma[:, None, None, None] * normal(ROWS, *info.shape, seed=2)
        classes = getattr(model, "num_classes", None)
        return cls(model, info, x, sigma, torch.arange(ROWS) % classes if classes else None)

    def calls(self) -> Iterator[tuple[str, Callable[[slice], Tensor]]]:
        """Every capability that the model offers, as a function of the rows to ask for."""
        model, x, sigma, y = self.model, self.x, self.sigma, self.y
        highest = float(sigma.max())

        def label(rows: slice) -> Tensor | None:
            return None if y is None else y[rows]

        every: dict[str, list[Callable[[slice], Tensor]]] = {
            "denoise": [
                lambda r: denoised(model, x[r], sigma[r], label(r), highest),
                lambda r: denoised(model, x[r], sigma[r], None, highest),
            ],
            "class_logits": [
                lambda r: model.class_logits(x[r], sigma[r]),
                lambda r: model.class_logits(x[r], 0 * sigma[r]),
            ],
            "log_density": [
                lambda r: model.log_density(x[r], label(r)),
                lambda r: model.log_density(x[r], label(r), sigma[r]),
            ],
            "noise_level_logits": [lambda r: model.noise_level_logits(x[r], label(r))],
        }
        for name in sorted(offered(model) & every.keys()):
            for call in every[name]:
                yield name, call


def denoised(model: Any, x: Tensor, sigma: Tensor, y: Tensor | None, level: float) -> Tensor:
    """E[x0 | x, sigma, y]; of a model that must know the step for the first of two from `level` instead."""
    if not hasattr(model, "predict_step"):
        return model.denoise(x, sigma, y)
    step = Step(0, 2, level, level / 2, grid=(level, level / 2, 0.0))
    return Conditional(model, y).predict(x, step).x0


ALL = slice(None)


class _Suite:
    """What the suites share."""

    kind: ClassVar[str]
    component: ClassVar[str] = ""
    config: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Small tensors: threads would cost more than they give."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def component_name(self) -> str:
        """Full name of the component under test; parametrise it to test many."""
        return self._name()

    def _name(self) -> str:
        assert self.component, f"{type(self).__name__} must say which: component = 'plugin/name'"
        return self.component

    @pytest.fixture
    def record(self, component_name: str) -> Any:
        """The registered record of the component."""
        return load_registry().find(self.kind, component_name)[1]

    @pytest.fixture
    def options(self, record: Any) -> Any:
        """The component's settings, or None."""
        return settings(record, self.config)


class ModelConformance(_Suite):
    """A model keeps the promises of `cdm_core.capabilities`; `info`: the data to build it for, if special."""

    kind = "model"
    info: ClassVar[DataInfo | None] = None

    @pytest.fixture
    def case(self, record: Any, options: Any) -> Case:
        """The model in evaluation mode, its weights moved, with noisy data."""
        model, info = build_model(record, options, self.info)
        randomise(model)
        return Case.of(model.eval(), info)

    def test_offers_what_its_record_says(self, record: Any, case: Case) -> None:
        assert set(record.provides) == offered(case.model)

    def test_says_which_noise_levels_it_takes(self, case: Case) -> None:
        if "denoise" not in offered(case.model):
            return
        if not hasattr(case.model, "sigmas"):
            low, high = case.model.sigma_range
            assert 0 < low < high < float("inf")
            return
        sigmas = case.model.sigmas
        assert sigmas.dtype == torch.float64
        assert bool((sigmas > 0).all())
        assert bool(sigmas.isfinite().all())
        assert bool((sigmas.diff() > 0).all()), "sigmas must ascend"
        scale = case.model.scale(case.sigma)
        assert scale.shape == case.sigma.shape
        assert bool(((scale > 0) & scale.isfinite()).all())

    def test_rounds_to_its_own_levels(self, case: Case) -> None:
        if "denoise" not in offered(case.model) or not hasattr(case.model, "sigmas"):
            return
        near = case.sigma * 1.0001
        assert torch.equal(
            case.model.denoise(case.x, near, case.y), case.model.denoise(case.x, case.sigma, case.y)
        )

    def test_is_finite_and_shaped_as_promised_over_the_whole_range(self, case: Case) -> None:
        shapes = {"denoise": case.x.shape, "log_density": (ROWS,)}
        for name, call in case.calls():
            out = call(ALL)
            assert bool(out.isfinite().all()), f"{name} is not finite"
            assert out.dtype == torch.float32
            assert tuple(out.shape) == tuple(shapes.get(name, (ROWS, out.shape[-1])))

    def test_rows_do_not_see_one_another(self, case: Case) -> None:
        for name, call in case.calls():
            alone = torch.cat([call(slice(i, i + 1)) for i in range(ROWS)])
            assert close(alone, call(ALL)), f"{name} of a row depends on the rest of the batch"

    def test_leaves_no_trace_under_no_grad(self, case: Case) -> None:
        before, state = case.x.clone(), torch.random.get_rng_state()
        for name, call in case.calls():
            with torch.no_grad():
                first, second = call(ALL), call(ALL)
            assert not first.requires_grad, f"{name} keeps a graph under no_grad"
            assert torch.equal(first, second), f"{name} differs from call to call in evaluation mode"
        assert torch.equal(case.x, before), "the input was changed in place"
        assert not case.x.requires_grad
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert all(p.grad is None for p in case.model.parameters()), "a gradient was left on a parameter"
        assert all(p.requires_grad for p in case.model.parameters()), "a parameter was frozen"

    def test_the_state_dict_is_the_model(self, record: Any, options: Any, case: Case) -> None:
        outputs = [call(ALL).detach() for _, call in case.calls()]
        saved = safetensors.torch.save({k: v.contiguous() for k, v in case.model.state_dict().items()})
        other, _ = build_model(record, options, case.info, seed=1)
        fresh = Case(other.eval(), case.info, case.x, case.sigma, case.y)
        if next(other.parameters(), None) is not None:
            before = [call(ALL).detach() for _, call in fresh.calls()]
            assert not all(map(torch.equal, before, outputs)), "no output depends on the weights"
        other.load_state_dict(safetensors.torch.load(saved))
        for (name, call), output in zip(fresh.calls(), outputs, strict=True):
            assert torch.equal(call(ALL), output), f"{name} is not restored by the state dict"

    def test_initial_weights_are_a_function_of_the_seed(self, record: Any, options: Any, case: Case) -> None:
        first, second = (build_model(record, options, case.info)[0].state_dict() for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_labels_matter_and_are_checked(self, case: Case) -> None:
        if case.y is None or "denoise" not in offered(case.model):
            return
        classes = case.model.num_classes
        plain = case.model.denoise(case.x, case.sigma, case.y)
        assert not torch.equal(plain, case.model.denoise(case.x, case.sigma, (case.y + 1) % classes))
        assert not torch.equal(plain, case.model.denoise(case.x, case.sigma))
        for wrong in (-1, classes + 1):  # classes itself may be the label for "no class"
            with pytest.raises(Exception):  # noqa: B017, PT011 - UserError, or the index error of an embedding
                case.model.denoise(case.x, case.sigma, torch.full_like(case.y, wrong))

    def test_density_and_noise_levels_tell_the_same_story(self, case: Case) -> None:
        """log p(t | x) - log p_t(x), in the path's scale, is the same at every level t but for log p(t)."""
        model = case.model
        if not {"log_density", "noise_level_logits"} <= offered(model) or not hasattr(model, "sigmas"):
            return
        logits = model.noise_level_logits(case.x, case.y).detach().double()
        scales = model.scale(model.sigmas)
        columns = []
        for sigma, scale in zip(model.sigmas, scales, strict=True):
            row = sigma.float().expand(ROWS)
            density = model.log_density(case.x / scale.float(), case.y, row).detach().double()
            columns.append(density - case.x[0].numel() * scale.log())
        density = torch.stack(columns, 1)
        assert _fit(logits, density) <= 1e-4 * float(density.abs().max()), (
            "the two disagree at every matching"
        )


def _fit(logits: Tensor, density: Tensor) -> float:
    """Mismatch of (B, K) logits and (B, N) log-densities, for the N neighbouring levels that match best."""
    best = float("inf")
    for candidate in (logits, logits.flip(1)):
        for window in candidate.unfold(1, density.shape[1], 1).unbind(1):
            gap = window - density
            gap = gap - gap.mean(1, keepdim=True)  # log p(x) over all levels
            gap = gap - gap.mean(0, keepdim=True)  # log p(t)
            best = min(best, float(gap.abs().max()))
    return best


class ObjectiveConformance(_Suite):
    """A loss is finite, trains, and is a mean over rows that takes its chances from `draws` alone.

    `model`: full name of the model to train, with `model_config`; else the first that provides what the
    objective requires and that it takes, of its own plugin if there is one.
    """

    kind = "objective"
    model: ClassVar[str] = ""
    model_config: ClassVar[Mapping[str, Any]] = {}
    info: ClassVar[DataInfo | None] = None

    @pytest.fixture
    def objective(self, record: Any, options: Any) -> Callable[..., dict[str, Tensor]]:
        """The objective."""
        return record.load()(options)

    @pytest.fixture
    def case(self, component_name: str, record: Any, objective: Any) -> Case:
        """A model to train and a batch: x holds clean data."""
        refusals = []
        for name in [self.model] if self.model else _models_for(component_name, record):
            model_record = load_registry().find("model", name)[1]
            model, info = build_model(model_record, settings(model_record, self.model_config), self.info)
            randomise(model, 0.01)
            x0 = torch.tanh(normal(2 * ROWS, *info.shape, seed=1))
            case = Case(model.eval(), info, x0, torch.zeros(2 * ROWS), torch.arange(2 * ROWS) % 10)
            if self.model:
                return case
            try:
                objective(case.model, case.x, case.y, Draws(0, len(case.x)))
            except UserError as error:
                refusals.append(str(error))
                continue
            return case
        said = "; ".join(dict.fromkeys(refusals))
        plugin = component_name.partition("/")[0]
        own = [n for n in _models_for(component_name, record) if n.partition("/")[0] == plugin]
        assert not own, f"it takes none of its own plugin's models: {said}"
        pytest.skip(f"no installed model is one for it: {said}")

    def test_is_a_finite_scalar(self, objective: Any, case: Case) -> None:
        before = case.x.clone()
        out = objective(case.model, case.x, case.y, Draws(0, len(case.x)))
        assert "loss" in out
        for name, value in out.items():
            assert value.shape == (), f"{name} is not a scalar"
            assert bool(value.isfinite()), f"{name} is not finite"
        assert torch.equal(case.x, before), "the data were changed in place"

    def test_its_gradient_is_finite_and_not_zero(self, objective: Any, case: Case) -> None:
        objective(case.model, case.x, case.y, Draws(0, len(case.x)))["loss"].backward()
        gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients), "no parameter is trained"

    def test_takes_its_chances_from_draws_alone(self, objective: Any, case: Case) -> None:
        case.model.train()  # what is random may be random in training alone
        state = torch.random.get_rng_state()
        first, again, other = (
            objective(case.model, case.x, case.y, Draws(seed, len(case.x)))["loss"] for seed in (0, 0, 1)
        )
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_is_a_mean_over_rows_however_they_are_split(self, objective: Any, case: Case) -> None:
        total = len(case.x)
        whole = objective(case.model, case.x, case.y, Draws(0, total))["loss"]
        parts = []
        for start in (0, total // 2):
            rows = slice(start, start + total // 2)
            draws = Draws(0, total, rows.start, rows.stop)
            y = None if case.y is None else case.y[rows]
            parts.append(objective(case.model, case.x[rows], y, draws)["loss"])
        assert close(torch.stack(parts).mean(), whole, 1e-5)

    def test_training_lowers_it(self, objective: Any, case: Case) -> None:
        case.model.train()
        optimizer = torch.optim.Adam(case.model.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same dropout at every step
                loss = objective(case.model, case.x, case.y, Draws(0, len(case.x)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]

    def test_its_halves_make_the_whole(self, objective: Any, case: Case) -> None:
        """Where it is split (`cdm_core.compiled.SplitObjective`): calling it is `loss` of `prepare`."""
        if not isinstance(objective, SplitObjective):
            return
        rows = len(case.x)
        whole = objective(case.model, case.x, case.y, Draws(0, rows))
        state = torch.random.get_rng_state()
        halves = objective.loss(case.model, *objective.prepare(case.model, case.x, case.y, Draws(0, rows)))
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert whole.keys() == halves.keys()
        for name, value in whole.items():
            assert torch.equal(halves[name], value), f"{name} is not that of the two halves"

    @pytest.mark.parametrize("recipe", ["trace", "whole"])
    def test_its_compiled_gradients_are_its_own(self, objective: Any, case: Case, recipe: Any) -> None:
        """Where it is split: by every recipe that this torch has, in eager operations."""
        if not isinstance(objective, SplitObjective) or (recipe == "trace" and not can_trace()):
            return
        model = case.model.train()
        compiled = CompiledObjective(objective, recipe, name="under test", backend="aot_eager")
        gradients = []
        for step in (objective, compiled):
            model.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same dropout
                step(model, case.x, case.y, Draws(1, len(case.x)))["loss"].backward()
            gradients.append([p.grad for p in model.parameters()])
        for own, found in zip(*gradients, strict=True):
            assert (own is None) == (found is None)
            assert own is None or close(found, own), "a gradient differs"


def _models_for(objective: str, record: Any) -> list[str]:
    """Models that provide what the objective requires, those of its own plugin first."""
    models = load_registry().components("model")
    plugin = objective.partition("/")[0]
    able = [name for name, model in models.items() if set(record.requires) <= set(model.provides)]
    if not able:
        pytest.skip(f"no installed model provides {', '.join(record.requires)}")
    return sorted(able, key=lambda name: (name.partition("/")[0] != plugin, name))


class SamplerConformance(_Suite):
    """A sampler turns the exact denoiser of a Gaussian into samples, and keeps to `cdm_core.samplers`."""

    kind = "sampler"
    many: ClassVar[Tensor] = torch.logspace(1.5, -2, 400, dtype=torch.float64)
    few: ClassVar[Tensor] = torch.logspace(1, -1, 6, dtype=torch.float64)

    @pytest.fixture
    def sampler(self, record: Any, options: Any) -> Callable[..., Tensor]:
        """The sampler with its settings bound."""
        function, chosen = record.load(), dict(vars(options)) if options else {}
        return lambda *args, **kwargs: function(*args, **kwargs, **chosen)

    @pytest.fixture
    def oracle(self) -> GaussianMixture:
        """A correlated Gaussian in two dimensions."""
        covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.4]]])
        return GaussianMixture(torch.ones(1), torch.tensor([[0.6, -0.4]]), covariance)

    def test_samples_converge_to_a_gaussian(self, sampler: Any) -> None:
        mean, std = torch.tensor([[0.6, -0.4], [0.2, 1.2]], dtype=torch.float64)[:, :, None, None]

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return mean + std**2 / (std**2 + sigma[0] ** 2) * (x - mean)

        start, wrong = normal(4096, 2, 1, 1, dtype=torch.float64) * self.many[0], []
        for sigmas in (self.many[::57], self.many):
            x0 = sampler(denoise, start, sigmas, noise=_Noise())
            gaps = (x0.mean(0) - mean) / std, x0.std(0) / std - 1, x0.flatten(1).T.corrcoef()[0, 1]
            wrong.append(max(float(gap.abs().max()) for gap in gaps))
        assert wrong[1] < 0.06, "wrong mean, standard deviation or correlation"
        assert wrong[1] < max(wrong[0], 0.03), "more steps did not come nearer"

    def test_the_last_step_returns_the_prediction(self, sampler: Any, oracle: GaussianMixture) -> None:
        predictions = []

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            assert sigma.shape == (len(x),)
            assert sigma.dtype == x.dtype
            assert bool((sigma > 0).all())
            predictions.append(oracle.denoise(x, sigma))
            return predictions[-1]

        for sigmas in (self.few, self.few[:1]):
            predictions.clear()
            out = sampler(denoise, normal(3, 2, 1, 1), sigmas, noise=_Noise())
            assert out.dtype == torch.float32
            assert close(out, predictions[-1], 1e-6)

    def test_the_callback_sees_every_step(self, sampler: Any, oracle: GaussianMixture) -> None:
        seen: list[tuple[int, int]] = []

        def callback(step: int, total: int, x: Tensor, x0: Tensor) -> None:
            assert x.shape == x0.shape == (3, 2, 1, 1)
            seen.append((step, total))

        sampler(oracle.denoise, normal(3, 2, 1, 1), self.few, noise=_Noise(), callback=callback)
        assert seen == [(i, len(self.few)) for i in range(len(self.few))]

    def test_takes_its_chances_from_noise_alone(self, sampler: Any, oracle: GaussianMixture) -> None:
        state, start = torch.random.get_rng_state(), normal(3, 2, 1, 1)
        noises = [_Noise(), _Noise(), _Noise(seed=1)]
        first, again, other = (sampler(oracle.denoise, start, self.few, noise=n) for n in noises)
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (noises[0].calls == 0), (
            "noise was drawn for nothing, or not drawn"
        )

    def test_without_a_noise_function_the_global_generator_serves(
        self, sampler: Any, oracle: GaussianMixture
    ) -> None:
        outs = []
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outs.append(sampler(oracle.denoise, normal(3, 2, 1, 1), self.few))
        assert torch.equal(*outs)

    def test_rows_do_not_see_one_another(self, sampler: Any, oracle: GaussianMixture) -> None:
        start = normal(ROWS, 2, 1, 1)
        together = sampler(oracle.denoise, start, self.few, noise=_Noise(rows=range(ROWS)))
        alone = [sampler(oracle.denoise, start[[i]], self.few, noise=_Noise(rows=[i])) for i in range(ROWS)]
        assert close(torch.cat(alone), together, 1e-5)

    def test_a_denoiser_may_differentiate_inside(self, sampler: Any, oracle: GaussianMixture) -> None:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (score,) = torch.autograd.grad(oracle.log_density(x, None, sigma).sum(), x)
            return schedules.score_to_x0(x.detach(), score, sigma)

        start = normal(3, 2, 1, 1, dtype=torch.float64)
        outs = [sampler(d, start, self.few, noise=_Noise()) for d in (denoise, oracle.denoise)]
        assert close(outs[0], outs[1], 1e-8)
        assert not outs[0].requires_grad
        assert not outs[0].is_inference()


class _Noise:
    """A source of standard normal numbers, each row its own; counts how often it was asked."""

    def __init__(self, seed: int = 0, rows: Any = None) -> None:
        self.seed, self.rows, self.calls = seed, rows, 0

    def __call__(self, like: Tensor) -> Tensor:
        self.calls += 1
        if self.rows is None:
            return normal(*like.shape, seed=1000 * self.calls + self.seed, dtype=like.dtype)
        rows = [normal(*like.shape[1:], seed=1000 * self.calls + i, dtype=like.dtype) for i in self.rows]
        return torch.stack(rows)


class _Oracle(GaussianMixture):
    """A mixture that looks like a class-conditional model."""

    @property
    def num_classes(self) -> int:
        return self.components

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.01, 20.0


class _OracleOnPath(MixtureOnPath):
    """The same with the exact classifier over the levels of a path."""

    num_classes = 3

    @property
    def sigmas(self) -> Tensor:
        return self.path.ve_sigmas

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])

    @property
    def means(self) -> Tensor:
        return self.mixture.means

    def scale(self, sigma: Tensor) -> Tensor:
        return self.path.scale(sigma)


class _Only:
    """`model` with no other capabilities than `names`."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        self._model, self.capabilities = model, frozenset(names)

    def __getattr__(self, name: str) -> Any:
        if name in METHODS and name not in self.capabilities:
            raise AttributeError(f"the adapter uses `{name}`, which its record does not require")
        return getattr(self._model, name)


def three_classes(capabilities: tuple[str, ...]) -> Any:
    """A mixture of three well-separated classes in two dimensions, with no other capabilities than these.

    With `noise_level_logits` it is over the levels of a path of 50.
    """
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    covariances = torch.tensor([[0.1, 0.0], [0.0, 0.2]]).expand(3, 2, 2)
    mixture = _Oracle(torch.tensor([0.3, 0.3, 0.4]), means, covariances)
    if "noise_level_logits" in capabilities:
        return _Only(_OracleOnPath(mixture, schedules.linear(50, 1e-3, 0.2)), capabilities)
    return _Only(mixture, capabilities)


class AdapterConformance(_Suite):
    """An adapter makes what it provides out of what it requires, on a mixture of three known classes."""

    kind = "adapter"

    @pytest.fixture
    def oracle(self, record: Any, options: Any) -> Any:
        """Three well-separated classes; of a capability that a plugin has made up, the plugin has its own."""
        required = getattr(options, "requires", record.requires)
        if unknown := set(required) - set(METHODS):
            pytest.skip(f"there is no oracle of {', '.join(sorted(unknown))}: override the fixture `oracle`")
        return three_classes(required)

    @pytest.fixture
    def case(self, record: Any, options: Any, oracle: Any) -> Case:
        """The adapted oracle with noisy points."""
        return Case.of(record.load()(options, oracle), POINTS)

    def test_offers_what_its_record_says(self, record: Any, case: Case) -> None:
        assert set(record.provides) <= offered(case.model)

    def test_passes_the_rest_of_the_model_through(self, case: Case, oracle: Any) -> None:
        assert case.model.num_classes == oracle.num_classes
        assert case.model.sigma_range == oracle.sigma_range
        with pytest.raises(AttributeError):
            _ = case.model.no_such_thing

    def test_is_finite_and_shaped_as_promised(self, record: Any, case: Case) -> None:
        shapes = {"denoise": case.x.shape, "log_density": (ROWS,), "class_logits": (ROWS, 3)}
        for name, call in case.calls():
            if name in record.provides:
                out = call(ALL)
                assert bool(out.isfinite().all()), f"{name} is not finite"
                assert tuple(out.shape) == tuple(shapes.get(name, out.shape))

    def test_rows_do_not_see_one_another(self, record: Any, case: Case) -> None:
        for name, call in case.calls():
            if name in record.provides:
                alone = torch.cat([call(slice(i, i + 1)) for i in range(ROWS)])
                assert close(alone, call(ALL)), f"{name} of a row depends on the rest of the batch"

    def test_a_prediction_at_almost_no_noise_is_the_image(self, record: Any, case: Case) -> None:
        """A score term g moves the prediction by sigma^2 g only, whatever the guidance."""
        if "denoise" in record.provides:
            sigma = torch.full((ROWS,), 0.01)
            x0 = torch.tensor([[-2.0, 0.1], [2.0, 0.1], [0.1, 2.0], [-2.0, 0.3]])[:, :, None, None]
            assert float((denoised(case.model, x0, sigma, case.y, 0.01) - x0).abs().max()) < 0.02

    def test_a_classifier_knows_clear_cases(self, record: Any, case: Case, oracle: Any) -> None:
        if "class_logits" in record.provides:
            y = torch.tensor([0, 1, 2, 1])
            x0 = oracle.means.float()[y][:, :, None, None]
            for sigma in (0.0, 0.1):
                assert torch.equal(case.model.class_logits(x0, torch.full((ROWS,), sigma)).argmax(1), y)

    def test_leaves_the_model_alone(self, case: Case, oracle: Any) -> None:
        before = {key: value.clone() for key, value in oracle.state_dict().items()}
        for _, call in case.calls():
            with torch.no_grad():
                assert not call(ALL).requires_grad
        assert all(torch.equal(before[key], value) for key, value in oracle.state_dict().items())


@lru_cache(maxsize=4)
def _dataset(load: Callable[[Any], Data], config: Any) -> Data:
    return load(config)


class DatasetConformance(_Suite):
    """A data set describes itself truly, and its splits are disjoint and the same every time.

    Nothing is downloaded: a set whose files are not there is skipped.
    """

    kind = "dataset"
    splits: ClassVar[tuple[str, str, str]] = ("train", "valid", "test")

    @pytest.fixture
    def options(self, record: Any) -> Any:
        """The settings, with downloads off."""
        overrides = dict(self.config)
        if record.config and "download" in {field.name for field in fields(record.config)}:
            overrides.setdefault("download", False)
        return settings(record, overrides)

    @pytest.fixture
    def data(self, record: Any, options: Any) -> Data:
        """The data set."""
        try:
            data = _dataset(record.load(), options)
            data.split("train")
        except UserError as error:
            pytest.skip(f"its files are not here: {error}")
        return data

    def test_batches_are_what_the_description_says(self, data: Data) -> None:
        dtype = torch.float32 if data.info.levels is None else torch.uint8
        for name in self.splits:
            split = data.split(name)
            pixels, labels = split.__getitems__(_first(split))
            assert tuple(pixels.shape[1:]) == data.info.shape
            assert pixels.dtype == dtype
            assert (labels is None) == (data.info.num_classes is None)
            if data.info.levels is None:
                assert bool(pixels.isfinite().all())
            else:
                assert int(pixels.max()) < data.info.levels
                assert int(pixels.max()) > int(pixels.min()), "every pixel has the same value"

    def test_labels_are_classes(self, data: Data) -> None:
        if data.info.num_classes is None:
            assert all(data.split(name).labels is None for name in self.splits)
            return
        assert not data.info.class_names or len(data.info.class_names) == data.info.num_classes
        for name in self.splits:
            split = data.split(name)
            labels, (_, first) = split.labels, split.__getitems__(_first(split))
            assert labels is not None
            assert first is not None
            assert labels.dtype == torch.int64
            assert len(labels) == len(split)
            assert torch.equal(labels[: len(first)], first)
            assert set(labels.tolist()) <= set(range(data.info.num_classes))
            if name == "train":
                assert len(labels.unique()) == data.info.num_classes, "a class has no images"

    def test_splits_share_no_image(self, data: Data) -> None:
        """Up to 1%: real sets hold a few images twice."""
        train, valid, test = ([_key(image) for image in _images(data.split(name))] for name in self.splits)
        for held_out, other in ((valid, train), (test, train), (test, valid)):
            known = set(other)
            shared = sum(key in known for key in held_out)
            assert shared <= 0.01 * len(held_out), f"{shared} of {len(held_out)} images are in another split"

    def test_is_the_same_every_time(self, record: Any, options: Any, data: Data) -> None:
        again = record.load()(options)
        assert again.info == data.info
        for name in self.splits:
            first, second = data.split(name), again.split(name)
            assert len(first) == len(second)
            rows = _first(first)
            assert torch.equal(first.__getitems__(rows)[0], second.__getitems__(rows)[0])

    def test_rows_come_as_asked(self, data: Data) -> None:
        split = data.split("train")
        wanted = [3, 0, 2, 2]
        pixels, _ = split.__getitems__(wanted)
        assert torch.equal(pixels, torch.cat([split.__getitems__([i])[0] for i in wanted]))

    def test_model_inputs_lie_in_range_and_turn_back_into_pixels(self, data: Data) -> None:
        split = data.split("test")
        pixels, _ = split.__getitems__(_first(split))
        x, other = (data.info.to_model(pixels, Draws(seed, len(pixels))) for seed in (0, 1))
        assert x.dtype == torch.float32
        assert torch.equal(data.info.to_pixels(x), pixels)
        if data.info.levels is not None:
            assert bool((x.abs() <= 1).all())
            assert torch.equal(x, other) != data.info.dequantise

    def test_the_description_survives_json(self, data: Data) -> None:
        assert DataInfo.from_dict(json.loads(json.dumps(data.info.to_dict()))) == data.info


def _first(split: Split, count: int = 64) -> list[int]:
    return list(range(min(count, len(split))))


def _images(split: Split, chunk: int = 1024) -> Iterator[Tensor]:
    for start in range(0, len(split), chunk):
        yield from split.__getitems__(list(range(start, min(start + chunk, len(split)))))[0]


def _key(image: Tensor) -> bytes:
    return image.numpy().tobytes()
