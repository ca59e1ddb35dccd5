"""A run around an exact Gaussian mixture: what it draws, scores and refuses."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdm_core import UserError, hookimpl, load_run, schedules
from cdm_core.adapter_configs import CFGConfig
from cdm_core.checkpoints import RunFolder, safetensors_bytes
from cdm_core.config import resolve, to_toml
from cdm_core.data.configs import GaussianMixtureConfig
from cdm_core.data.mixture import load
from cdm_core.manager import Registry
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import fold
from cdm_core.records import Model, Objective, Recipe
from cdm_core.runs import ImageDraws, Run
from cdm_core.settings import SampleConfig, Selection

DATA = GaussianMixtureConfig(components=4, std=0.2, train_points=600, valid_points=50, test_points=300)
PATH = schedules.linear(200, 1e-4, 0.05)


class Oracle(nn.Module):
    """The exact model of a mixture, with a weight so that checkpoints mean something: it shifts the means."""

    def __init__(self, mixture: GaussianMixture, num_classes: int | None = None) -> None:
        super().__init__()
        self.mixture, self.num_classes = mixture, num_classes
        self.null_label = num_classes
        self.shift = nn.Parameter(torch.zeros(()))

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        plain = None if y is None else y.clamp(max=(self.num_classes or 0) - 1)
        found = self.mixture.denoise(x - self.shift, sigma, plain) + self.shift
        if y is not None and bool((y == self.null_label).any()):
            free = self.mixture.denoise(x - self.shift, sigma) + self.shift
            found = torch.where((y == self.null_label)[:, None, None, None], free, found)
        return found

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        return self.mixture.log_density(x - self.shift, y, sigma)


class WithLevels(Oracle):
    sigmas = PATH.ve_sigmas

    def scale(self, sigma: Tensor) -> Tensor:
        return PATH.scale(sigma)


class Continuous(Oracle):
    sigma_range = (0.002, 20.0)


def make_run(kind: type[Oracle] = WithLevels, num_classes: int | None = None) -> Run:
    data = load(DATA)
    assert data.mixture is not None
    return Run(kind(data.mixture, num_classes), data.info, data=data, registry=Registry.of({}))


# -- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_image_depends_on_seed_and_index_alone(sampler: str) -> None:
    run = make_run()
    whole = run.sample(7, seed=3, sampler=sampler, steps=6)
    assert torch.allclose(whole, run.sample(7, seed=3, sampler=sampler, steps=6, batch_size=2), atol=1e-6)
    assert torch.allclose(whole[:2], run.sample(2, seed=3, sampler=sampler, steps=6), atol=1e-6)
    assert torch.allclose(whole[5:], run.sample(2, seed=3, sampler=sampler, steps=6, first=5), atol=1e-6)
    assert not torch.allclose(whole, run.sample(7, seed=4, sampler=sampler, steps=6), atol=1e-2)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)


@pytest.mark.parametrize("kind", [WithLevels, Continuous])
def test_samples_follow_the_distribution(kind: type[Oracle]) -> None:
    run = make_run(kind)
    x0 = run.sample(2000, seed=0, sampler="ddpm", steps=100, batch_size=2000)
    truth, _ = run.examples("train")
    component = run.data.mixture.class_logits(x0, 0.0).argmax(1).bincount(minlength=4) / 2000  # type: ignore[union-attr]
    assert torch.allclose(component, torch.full((4,), 0.25), atol=0.04)
    assert torch.allclose(x0.var(0), truth.var(0), atol=0.06)


def test_pure_noise_starts_at_the_scale_of_the_first_level() -> None:
    run = make_run()
    plan = run.plan(steps=5)
    alpha = PATH.alpha[PATH.levels[-1]]
    assert plan.start == pytest.approx(1 / float(alpha), rel=1e-6)
    assert len(plan.sigmas) == 5
    assert float(plan.sigmas[0]) == float(PATH.ve_sigmas[-1])
    continuous = make_run(Continuous).plan(steps=5)
    assert continuous.start == 20.0
    assert float(continuous.sigmas[-1]) == 0.002


def test_labels_cycle_and_guide() -> None:
    run = make_run(num_classes=4)
    x0 = run.sample(12, labels=[2, 0], steps=20)
    assert run.data.mixture.class_logits(x0, 0.0).argmax(1).tolist() == [2, 0] * 6  # type: ignore[union-attr]
    assert run.labels_for(range(6)).tolist() == [0, 1, 2, 3, 0, 1]  # type: ignore[union-attr]
    assert run.labels_for(range(2, 5), [3, 1]).tolist() == [3, 1, 3]  # type: ignore[union-attr]
    assert run.labels_for(range(3), "none") is None
    plain, guided = (run.sample(400, labels=1, steps=20, guidance=w) for w in (0.0, 2.0))
    mean = run.data.mixture.means[1].view(2, 1, 1).float()  # type: ignore[union-attr]
    # Away from the other classes, beyond the mean of its own.
    assert (guided.mean(0) * mean).sum() > (plain.mean(0) * mean).sum() + 0.01


def test_an_adapter_is_sampled_through() -> None:
    run = make_run(num_classes=4)
    plain = run.sample(8, steps=10)
    run.sampling = replace(run.sampling, adapter=Selection("core/cfg", CFGConfig(2.0)))
    through = run.sample(8, steps=10)
    run.sampling = replace(run.sampling, adapter=None)
    assert torch.equal(through, run.sample(8, steps=10, guidance=2.0))
    assert not torch.allclose(through, plain, atol=1e-2)


def test_guidance_of_an_unconditional_model_is_refused_whatever_is_around_it() -> None:
    with pytest.raises(UserError, match=r"guidance 2: the model is unconditional"):
        make_run().source(SampleConfig(guidance=2.0))


def test_clipping_is_for_images() -> None:
    run = make_run()
    run.sampling = replace(run.sampling, sample=replace(run.settings, clip=True))
    with pytest.raises(UserError, match=r"sample\.clip: the data 'gaussian-mixture' are no images"):
        run.sample(2, steps=3)
    with torch.no_grad():
        run.model.shift += 0.9
    run.info = replace(run.info, levels=256)
    assert float(run.sample(64, steps=3).abs().max()) == 1
    run.sampling = replace(run.sampling, sample=replace(run.settings, clip=False))
    assert float(run.sample(64, steps=3).abs().max()) > 1.2


def test_progress_counts_every_step_once() -> None:
    seen: list[tuple[int, int]] = []
    make_run().sample(5, steps=3, batch_size=2, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_cached_samples_are_those_of_sample() -> None:
    run = make_run()
    few = run.cached_samples(3, seed=1)
    more = run.cached_samples(8, seed=1)
    assert torch.equal(few, more[:3])
    assert torch.allclose(more, run.sample(8, seed=1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 10_000}, "steps"),
        ({"batch_size": 0}, "batch size 0"),
        ({"num": 0}, "0 samples"),
        ({"sampler": "ddmp"}, "did you mean core/ddpm"),
        ({"grid": "logsrn"}, "logsnr"),
        ({"labels": [1]}, "unconditional"),
        ({"guidance": 1.0}, "guidance 1"),
    ],
)
def test_sampling_refuses_with_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_run().sample(**{"num": 2, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_refusals() -> None:
    conditional = make_run(num_classes=4)
    with pytest.raises(UserError, match="label 4 is out of range: the classes are 0 to 3"):
        conditional.sample(2, labels=[0, 4])
    with pytest.raises(UserError, match="name at least one class"):
        conditional.sample(2, labels=[])
    with pytest.raises(UserError, match="discrete levels"):
        make_run(Continuous).sample(2, grid="t")
    with pytest.raises(UserError, match=r"takes \(N, 2, 1, 1\)"):
        conditional.log_density(torch.zeros(3, 1, 1, 1))
    with pytest.raises(UserError, match="unconditional"):
        make_run().classify(torch.zeros(1, 2, 1, 1))
    with pytest.raises(UserError, match="`denoise`"):
        Run(nn.Identity(), load(DATA).info, registry=Registry.of({})).sample(1)


# -- scoring -------------------------------------------------------------------------------------------------


def test_log_density_is_the_truth_in_any_batching() -> None:
    run = make_run(num_classes=4)
    x0, y = run.examples("test")
    truth = run.data.mixture  # type: ignore[union-attr]
    assert torch.allclose(run.log_density(x0, batch_size=7), truth.log_density(x0), atol=1e-5)
    assert torch.allclose(run.log_density(x0, y), truth.log_density(x0, y), atol=1e-5)
    assert torch.allclose(run.log_density(x0, sigma=0.5), truth.log_density(x0, sigma=0.5), atol=1e-5)


def test_classify_by_bayes_rule() -> None:
    run = make_run(num_classes=4)
    x0, y = run.examples("test")
    logits = run.classify(x0).log_softmax(1)
    assert torch.allclose(logits, run.data.mixture.class_logits(x0, 0.0), atol=1e-4)  # type: ignore[union-attr]
    assert (logits.argmax(1) == y).float().mean() > 0.95


def test_classify_at_a_noise_level_is_exact_there() -> None:
    run = make_run(num_classes=4)
    x0, _ = run.examples("test")
    noise = ImageDraws(fold(3, "classify"), range(len(x0))).normal(*x0.shape[1:])
    truth = run.data.mixture.class_logits(x0 + 0.7 * noise, 0.7)  # type: ignore[union-attr]
    for batch_size in (7, 1000):
        logits = run.classify(x0, sigma=0.7, seed=3, batch_size=batch_size)
        assert torch.allclose(logits.log_softmax(1), truth, atol=1e-4)
    with pytest.raises(UserError, match="sigma -1"):
        run.classify(x0, sigma=-1.0)


def test_likelihood_summary_and_conditioning() -> None:
    run = make_run(num_classes=4)
    x0, y = run.examples("test")
    nats = run.data.mixture.log_density(x0).double()  # type: ignore[union-attr]
    found = run.likelihood("test", draws=5)
    summary = found.summary()
    assert found.draws == 1  # continuous data: all draws are the same
    assert found.labels == "none"
    assert summary["nats"] == pytest.approx(float(nats.mean()), abs=1e-5)
    assert summary["nats_se"] == pytest.approx(float(nats.std()) / math.sqrt(300), rel=1e-4)
    assert summary["bits_per_dim"] == pytest.approx(-float(nats.mean()) / (2 * math.log(2)), abs=1e-5)
    conditional = run.likelihood("test", labels="data").nats
    assert torch.allclose(conditional.float(), run.data.mixture.log_density(x0, y), atol=1e-5)  # type: ignore[union-attr]
    run.model.null_label = None  # never trained without a class: the class is needed
    assert run.likelihood("test").labels == "data"


def test_dequantisation_noise_is_keyed_by_image_and_draw() -> None:
    from cdm_core.data.configs import DigitsConfig
    from cdm_core.data.digits import load as digits

    data = digits(DigitsConfig())
    run = Run(nn.Identity(), data.info, data=data, registry=Registry.of({}))
    few, _ = run.examples("test", range(3, 6), seed=1)
    many, _ = run.examples("test", range(20), seed=1)
    assert torch.equal(few, many[3:6])
    assert not torch.equal(run.examples("test", range(3, 6), seed=1, draw=1)[0], few)
    assert not torch.equal(run.examples("test", range(3, 6), seed=2)[0], few)
    assert torch.equal(run.info.to_pixels(few), data.split("test").__getitems__([3, 4, 5])[0])


def test_image_draws_do_not_depend_on_the_batch() -> None:
    one, all_ = ImageDraws(5, [2]), ImageDraws(5, range(4))
    assert torch.equal(one.normal(3), all_.normal(3)[2:3])
    assert torch.equal(one.uniform(), all_.uniform()[2:3])
    assert torch.equal(one.integers(100, 5), all_.integers(100, 5)[2:3])


# -- loading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OracleConfig:
    conditional: bool = False


class Plugin:
    """An in-memory plugin: the oracle as a model, and a recipe for it."""

    @hookimpl
    def register_models(self) -> list[Model]:
        return [Model("exact", "The truth", "oracle_for_tests:model", OracleConfig, provides=("denoise",))]

    @hookimpl
    def register_objectives(self) -> list[Objective]:
        return [Objective("none", "Nothing to learn", "oracle_for_tests:objective")]

    @hookimpl
    def register_recipes(self) -> list[Recipe]:
        tables = {
            "model": {"name": "oracle/exact"},
            "objective": {"name": "oracle/none"},
            "data": {"name": "core/gaussian-mixture", "components": 4, "std": 0.2, "test_points": 300},
            "sampler": {"name": "core/ddim"},
            "sample": {"steps": 7},
        }
        return [Recipe("default", "The truth", tables)]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = types.ModuleType("oracle_for_tests")
    module.model = lambda config, info: WithLevels(load(DATA).mixture, 4 if config.conditional else None)  # type: ignore[attr-defined]
    module.objective = lambda config: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "oracle_for_tests", module)
    return Registry.of({"oracle": Plugin()})


@pytest.fixture
def folder(tmp_path: Path, registry: Registry) -> RunFolder:
    """A run with two checkpoints: the newer averaged weights shift by 2, the plain ones by 3."""
    config = resolve(registry, plugins=["oracle"], recipe="default", config_file=None, overrides=[])
    folder = RunFolder(tmp_path / "run")
    folder.write_text("config.toml", to_toml(config))
    for step, ema in ((1, 1.0), (2, 2.0)):
        state = make_run().model.state_dict()
        files = {
            f"{name}.safetensors": safetensors_bytes({**state, "shift": torch.tensor(value)})
            for name, value in (("ema", ema), ("model", 3.0))
        }
        folder.save(step, files, config="", seconds=1.0, valid={})
    return folder


def test_load_run_takes_the_newest_whole_checkpoint(folder: RunFolder, registry: Registry) -> None:
    run = load_run(folder.path, device="cpu", registry=registry)
    assert (run.step, float(run.model.shift)) == (2, 2.0)
    assert float(load_run(folder.path, device="cpu", weights="model", registry=registry).model.shift) == 3.0
    assert run.plan().settings == replace(SampleConfig(), steps=7)
    assert run.plan().sampler.name == "core/ddim"
    newest = folder.checkpoints()[0].path / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        older = load_run(folder.path, device="cpu", registry=registry)
    assert (older.step, float(older.model.shift)) == (1, 1.0)


def test_load_run_refuses(folder: RunFolder, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_run(tmp_path / "absent", registry=registry)
    with pytest.raises(UserError, match=r"has no config\.toml"):
        load_run(tmp_path, registry=registry)
    with pytest.raises(UserError, match="choose 'ema' or 'model'"):
        load_run(folder.path, weights="best", registry=registry)  # type: ignore[arg-type]
    state = {**make_run().model.state_dict(), "shift": torch.zeros(3)}
    files = {"ema.safetensors": safetensors_bytes(state)}
    folder.save(3, files, config="", seconds=1.0, valid={})
    with pytest.raises(UserError, match=r"does not fit the model 'oracle/exact'.*shift"):
        load_run(folder.path, device="cpu", registry=registry)
    for checkpoint in folder.checkpoints():
        (checkpoint.path / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match="no usable checkpoint yet"),
    ):
        load_run(folder.path, device="cpu", registry=registry)
