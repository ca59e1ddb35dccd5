"""The conformance suites over everything that is installed, and over components broken on purpose."""

import os
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cdm_core import samplers, schedules
from cdm_core.data import Data, DataInfo, TensorSplit
from cdm_core.errors import UserError
from cdm_core.manager import load_registry
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_core.testing import (
    AdapterConformance,
    DatasetConformance,
    ModelConformance,
    ObjectiveConformance,
    SamplerConformance,
    all_components,
)
from cdm_core.testing.conformance import Case, randomise, three_classes


def needs_files(name):
    config = load_registry().find("dataset", name)[1].config
    return config is not None and "root" in {field.name for field in fields(config)}


ON_DISK = [name for name in all_components("dataset") if needs_files(name)]
EMBEDDED = [name for name in all_components("dataset") if name not in ON_DISK]
HAVE_FILES = "CDM_RUN_DATA" in os.environ


@pytest.mark.parametrize("component_name", all_components("model"))
class TestModels(ModelConformance):
    pass


@pytest.mark.parametrize("component_name", all_components("objective"))
class TestObjectives(ObjectiveConformance):
    pass


@pytest.mark.parametrize("component_name", all_components("sampler"))
class TestSamplers(SamplerConformance):
    pass


@pytest.mark.parametrize("component_name", all_components("adapter"))
class TestAdapters(AdapterConformance):
    pass


@pytest.mark.parametrize("component_name", EMBEDDED + (ON_DISK if HAVE_FILES else []))
class TestDatasets(DatasetConformance):
    pass


@pytest.mark.skipif(HAVE_FILES, reason="they are in TestDatasets")
def test_data_sets_on_disk():
    pytest.skip(f"set CDM_RUN_DATA to the folder that holds any of {', '.join(ON_DISK)}")


class TestImageFolder(DatasetConformance):
    component = "core/image-folder"

    @pytest.fixture
    def options(self, record, tmp_path):
        from PIL import Image

        draw = torch.Generator().manual_seed(0)
        for i in range(90):
            pixels = torch.randint(256, (8, 8, 3), generator=draw).to(torch.uint8).numpy()
            folder = tmp_path / ("cats" if i % 2 else "dogs")
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return record.config(root=str(tmp_path), size=8)


class TestAncestralDDIM(SamplerConformance):
    component = "core/ddim"
    config = {"eta": 1.0}  # noqa: RUF012


class TestLargeVarianceDDPM(SamplerConformance):
    component = "core/ddpm"
    config = {"variance": "large"}  # noqa: RUF012


class TestChurnedEuler(SamplerConformance):
    component = "core/euler"
    config = {"churn": 10.0}  # noqa: RUF012


class TestChurnedHeun(SamplerConformance):
    component = "core/heun"
    config = {"churn": 10.0}  # noqa: RUF012


class TestUnevenBayes(AdapterConformance):
    component = "core/bayes"
    config = {"prior": (1.0, 2.0, 3.0)}  # noqa: RUF012


# ---- Every check can fail: components with one fault each, and the check that must see it.

INFO = DataInfo("toy", (2, 2, 2), num_classes=10)


class Sound(nn.Module):
    """A small model without a fault, all capabilities at once, over the levels of a path."""

    capabilities = frozenset({"denoise", "log_density", "noise_level_logits"})
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.path = schedules.linear(20, 1e-3, 0.3)
        self.means = nn.Parameter(torch.zeros(11, 8))

    @property
    def sigmas(self):
        return self.path.ve_sigmas

    def scale(self, sigma):
        return self.path.scale(sigma)

    def _means(self, x, y):
        return self.means[torch.full((len(x),), 10) if y is None else self._checked(y)]

    def _checked(self, y):
        if int(y.min()) < 0:
            raise IndexError("negative class")
        return y

    def denoise(self, x, sigma, y=None):
        variance = self.path.ve_sigma[self.path.nearest(sigma)].float()[:, None] ** 2
        mean = self._means(x, y)
        return (mean + (x.flatten(1) - mean) / (1 + variance)).view_as(x)

    def _log_density(self, x_t, alpha, sigma, y):
        variance = alpha**2 + sigma**2
        square = (x_t.flatten(1) - alpha[:, None] * self._means(x_t, y)).square().sum(1)
        return -0.5 * (square / variance + 8 * torch.log(2 * torch.pi * variance))

    def log_density(self, x, y=None, sigma=None):
        level = torch.zeros(len(x)).long() if sigma is None else self.path.nearest(sigma)
        return self._log_density(x, torch.ones(len(x)), self.path.ve_sigma[level].float(), y)

    def noise_level_logits(self, x, y=None):
        alphas, sigmas = self.path.alpha.float(), self.path.sigma.float()
        columns = [
            self._log_density(x, a.expand(len(x)), s.expand(len(x)), y)
            for a, s in zip(alphas, sigmas, strict=True)
        ]
        return torch.stack(columns, 1)


class Talkative(Sound):
    def denoise(self, x, sigma, y=None):
        return super().denoise(x, sigma, y) + x.mean()


class Chancy(Sound):
    def denoise(self, x, sigma, y=None):
        return super().denoise(x, sigma, y) + 1e-3 * torch.randn_like(x)


class Careless(Sound):
    def denoise(self, x, sigma, y=None):
        with torch.enable_grad():
            out = super().denoise(x, sigma, y)
            out.sum().backward()
        return out.detach()


class InPlace(Sound):
    def denoise(self, x, sigma, y=None):
        return x.mul_(0.5)


class Overflowing(Sound):
    def denoise(self, x, sigma, y=None):
        return super().denoise(x, sigma, y) / (sigma < 1)[:, None, None, None]


class Continuous(Sound):
    def denoise(self, x, sigma, y=None):
        return x / (1 + sigma[:, None, None, None] ** 2)


class Unlabelled(Sound):
    def denoise(self, x, sigma, y=None):
        return super().denoise(x, sigma, None)


class Forgetful(Sound):
    def __init__(self):
        super().__init__()
        self.shift = torch.randn(())

    def denoise(self, x, sigma, y=None):
        return super().denoise(x, sigma, y) + self.shift


class Unscaled(Sound):
    def log_density(self, x, y=None, sigma=None):
        return super().log_density(x, y, sigma) + (0 if sigma is None else x.flatten(1).mean(1) * sigma)


class Descending(Sound):
    @property
    def sigmas(self):
        return self.path.ve_sigmas.flip(0)


def model_checks(model_class):
    suite, record = ModelConformance(), SimpleNamespace(provides=tuple(Sound.capabilities), name="toy")
    record.load = lambda: lambda config, info: model_class()
    model = model_class()
    randomise(model, 0.3)
    case = Case.of(model.eval(), INFO)
    return {
        "offers": lambda: suite.test_offers_what_its_record_says(record, case),
        "levels": lambda: suite.test_says_which_noise_levels_it_takes(case),
        "rounds": lambda: suite.test_rounds_to_its_own_levels(case),
        "finite": lambda: suite.test_is_finite_and_shaped_as_promised_over_the_whole_range(case),
        "rows": lambda: suite.test_rows_do_not_see_one_another(case),
        "trace": lambda: suite.test_leaves_no_trace_under_no_grad(case),
        "state": lambda: suite.test_the_state_dict_is_the_model(record, None, case),
        "seed": lambda: suite.test_initial_weights_are_a_function_of_the_seed(record, None, case),
        "labels": lambda: suite.test_labels_matter_and_are_checked(case),
        "story": lambda: suite.test_density_and_noise_levels_tell_the_same_story(case),
    }


def test_a_sound_model_passes_every_check():
    for check in model_checks(Sound).values():
        check()


@pytest.mark.parametrize(
    ("model_class", "check"),
    [
        (type("Boastful", (Sound,), {"capabilities": frozenset({"denoise", "class_logits"})}), "offers"),
        (Descending, "levels"),
        (Continuous, "rounds"),
        (Overflowing, "finite"),
        (Talkative, "rows"),
        (Chancy, "trace"),
        (Careless, "trace"),
        (InPlace, "trace"),
        (Forgetful, "state"),
        (Unlabelled, "labels"),
        (Unscaled, "story"),
    ],
)
def test_a_broken_model_is_caught(model_class, check):
    with pytest.raises(AssertionError):
        model_checks(model_class)[check]()


def test_a_model_with_random_weights_of_its_own_is_caught():
    seeds = iter(range(100))

    class Unseeded(Sound):
        def __init__(self):
            super().__init__()
            randomise(self, seed=next(seeds))

    with pytest.raises(AssertionError):
        model_checks(Unseeded)["seed"]()


def test_a_model_that_takes_any_label_is_caught():
    class Lenient(Sound):
        def _checked(self, y):
            return y % 11

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        model_checks(Lenient)["labels"]()


def sound_objective(model, x0, y, draws):
    noise = draws.normal(*x0.shape[1:])
    return {"loss": (model.denoise(x0 + noise, torch.ones(len(x0)), y) - x0).square().mean()}


def objective_checks(objective):
    suite, model = ObjectiveConformance(), Sound()
    randomise(model, 0.3)
    case = Case.of(model.eval(), INFO)
    case.x = case.x.tanh()
    return {
        "scalar": lambda: suite.test_is_a_finite_scalar(objective, case),
        "gradient": lambda: suite.test_its_gradient_is_finite_and_not_zero(objective, case),
        "chances": lambda: suite.test_takes_its_chances_from_draws_alone(objective, case),
        "mean": lambda: suite.test_is_a_mean_over_rows_however_they_are_split(objective, case),
        "lowers": lambda: suite.test_training_lowers_it(objective, case),
    }


def test_a_sound_objective_passes_every_check():
    for check in objective_checks(sound_objective).values():
        check()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (lambda loss, x0: loss * torch.tensor([1.0, 2.0]), "scalar"),
        (lambda loss, x0: loss / 0, "scalar"),
        (lambda loss, x0: loss * 0, "gradient"),
        (lambda loss, x0: loss + torch.rand(()), "chances"),
        (lambda loss, x0: loss.detach() * 0 + loss * 0, "chances"),
        (lambda loss, x0: loss * len(x0), "mean"),
        (lambda loss, x0: 2 * loss.detach() - loss, "lowers"),
    ],
)
def test_a_broken_objective_is_caught(fault, check):
    def broken(model, x0, y, draws):
        return {"loss": fault(sound_objective(model, x0, y, draws)["loss"], x0)}

    with pytest.raises(AssertionError):
        objective_checks(broken)[check]()


class Halves:
    """A split objective, of second order where the model's own derivative is asked for."""

    def __call__(self, model, x0, y, draws):
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(self, model, x0, y, draws):
        return (x0 + draws.normal(*x0.shape[1:])).requires_grad_(), torch.ones(len(x0)), y

    def loss(self, model, x, sigma, y):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model.denoise(x, sigma, y).square().sum(), x, create_graph=True)
        return {"loss": (slope - x).square().mean()}


class Other(Halves):
    """Whole and halves are two losses."""

    def __call__(self, model, x0, y, draws):
        return {"loss": 2 * super().__call__(model, x0, y, draws)["loss"]}


class Peeking(Halves):
    """Branches on a number."""

    def loss(self, model, x, sigma, y):
        factor = 2 if float(x.detach().mean()) > 0 else 1
        return {"loss": factor * super().loss(model, x, sigma, y)["loss"]}


class Smooth(nn.Module):
    """Something to differentiate twice, without a check that reads a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 4))

    def denoise(self, x, sigma, y=None):
        return torch.tanh(x * self.weight) / (1 + sigma[:, None, None, None] ** 2)


def halves_checks(objective):
    suite = ObjectiveConformance()
    x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    case = Case(Smooth().eval(), INFO, x, torch.ones(2), None)
    return {
        "halves": lambda: suite.test_its_halves_make_the_whole(objective, case),
        "trace": lambda: suite.test_its_compiled_gradients_are_its_own(objective, case, "trace"),
        "whole": lambda: suite.test_its_compiled_gradients_are_its_own(objective, case, "whole"),
    }


@pytest.mark.parametrize("check", ["halves", "trace", "whole"])
def test_a_split_objective_passes_every_check(check):
    halves_checks(Halves())[check]()
    halves_checks(sound_objective)[check]()  # nothing is asked of one that is not split


def test_halves_that_are_not_the_whole_are_caught():
    with pytest.raises(AssertionError, match="loss is not that of the two halves"):
        halves_checks(Other())["halves"]()


@pytest.mark.parametrize("check", ["trace", "whole"])
def test_a_split_objective_that_cannot_be_compiled_is_caught(check):
    with pytest.raises(UserError, match="cannot be compiled"):
        halves_checks(Peeking())[check]()


def sampler_checks(sampler):
    suite = SamplerConformance()
    oracle = GaussianMixture(torch.ones(1), torch.tensor([[0.6, -0.4]]), 0.5 * torch.eye(2)[None])
    return {
        "converge": lambda: suite.test_samples_converge_to_a_gaussian(sampler),
        "last": lambda: suite.test_the_last_step_returns_the_prediction(sampler, oracle),
        "callback": lambda: suite.test_the_callback_sees_every_step(sampler, oracle),
        "chances": lambda: suite.test_takes_its_chances_from_noise_alone(sampler, oracle),
        "global": lambda: suite.test_without_a_noise_function_the_global_generator_serves(sampler, oracle),
        "rows": lambda: suite.test_rows_do_not_see_one_another(sampler, oracle),
        "autograd": lambda: suite.test_a_denoiser_may_differentiate_inside(sampler, oracle),
    }


def too_little_noise(denoise, x, sigmas, *, noise=None, callback=None):
    draw = noise or torch.randn_like
    return samplers.ddpm(denoise, x, sigmas, noise=lambda like: 0.5 * draw(like), callback=callback)


def stops_short(denoise, x, sigmas, *, noise=None, callback=None):
    return samplers.ddim(denoise, x, sigmas, callback=callback) + 1e-3


def silent(denoise, x, sigmas, *, noise=None, callback=None):
    return samplers.ddim(denoise, x, sigmas)


def own_noise(denoise, x, sigmas, *, noise=None, callback=None):
    return samplers.ddpm(denoise, x, sigmas, callback=callback)


def drawn_for_nothing(denoise, x, sigmas, *, noise=None, callback=None):
    if noise:
        noise(x)
    return samplers.ddim(denoise, x, sigmas, callback=callback)


def whitens(denoise, x, sigmas, *, noise=None, callback=None):
    return samplers.ddim(denoise, x - x.mean(0), sigmas, callback=callback)


def inference(denoise, x, sigmas, *, noise=None, callback=None):
    with torch.inference_mode():
        return samplers.ddim(denoise, x.clone(), sigmas, callback=callback)


@pytest.mark.parametrize(
    ("sampler", "check", "error"),
    [
        (too_little_noise, "converge", AssertionError),
        (stops_short, "last", AssertionError),
        (silent, "callback", AssertionError),
        (own_noise, "chances", AssertionError),
        (drawn_for_nothing, "chances", AssertionError),
        (whitens, "rows", AssertionError),
        (inference, "autograd", RuntimeError),
    ],
)
def test_a_broken_sampler_is_caught(sampler, check, error):
    with pytest.raises(error):
        sampler_checks(sampler)[check]()


def data_checks(data, again=None):
    suite, record = DatasetConformance(), SimpleNamespace(load=lambda: lambda config: again or data)
    return {
        "batches": lambda: suite.test_batches_are_what_the_description_says(data),
        "labels": lambda: suite.test_labels_are_classes(data),
        "disjoint": lambda: suite.test_splits_share_no_image(data),
        "same": lambda: suite.test_is_the_same_every_time(record, None, data),
        "rows": lambda: suite.test_rows_come_as_asked(data),
        "range": lambda: suite.test_model_inputs_lie_in_range_and_turn_back_into_pixels(data),
        "json": lambda: suite.test_the_description_survives_json(data),
    }


def toy_data(info=None, seed=0, overlap=False, classes=4):
    info = info or DataInfo("toy", (1, 4, 4), num_classes=4, levels=16)

    def split(number):
        draws = Draws(seed if overlap else seed + number, 100)
        pixels = draws.integers(16, 1, 4, 4).to(torch.uint8)
        return TensorSplit(pixels, torch.arange(100) % classes)

    return Data(info, {name: (lambda n=n: split(n)) for n, name in enumerate(("train", "valid", "test"))})


class Truncating(DataInfo):
    def to_pixels(self, x0):
        return (super().to_pixels(x0).int() - 1).clamp(0).to(torch.uint8)


def test_sound_data_pass_every_check():
    for check in data_checks(toy_data()).values():
        check()


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (toy_data(DataInfo("toy", (1, 4, 4), num_classes=4, levels=8)), "batches"),
        (toy_data(DataInfo("toy", (1, 4, 8), num_classes=4, levels=16)), "batches"),
        (toy_data(classes=5), "labels"),
        (toy_data(classes=3), "labels"),
        (toy_data(overlap=True), "disjoint"),
        (toy_data(Truncating("toy", (1, 4, 4), num_classes=4, levels=16)), "range"),
    ],
)
def test_broken_data_are_caught(data, check):
    with pytest.raises(AssertionError):
        data_checks(data)[check]()


def test_data_that_change_from_time_to_time_are_caught():
    with pytest.raises(AssertionError):
        data_checks(toy_data(), toy_data(seed=9))["same"]()


class Adapted:
    """An adapter with what its keywords replace."""

    def __init__(self, model, **replaced):
        self.model, self.replaced = model, replaced

    def __getattr__(self, name):
        return self.replaced[name] if name in self.replaced else getattr(self.model, name)


@pytest.fixture
def oracle():
    return SimpleNamespace(requires=("denoise",), provides=("denoise",)), three_classes(("denoise",))


def adapter_checks(record, oracle, adapted):
    suite, case = AdapterConformance(), Case.of(adapted, DataInfo("points", (2, 1, 1), levels=None))
    return {
        "offers": lambda: suite.test_offers_what_its_record_says(record, case),
        "passes": lambda: suite.test_passes_the_rest_of_the_model_through(case, oracle),
        "finite": lambda: suite.test_is_finite_and_shaped_as_promised(record, case),
        "rows": lambda: suite.test_rows_do_not_see_one_another(record, case),
        "image": lambda: suite.test_a_prediction_at_almost_no_noise_is_the_image(record, case),
        "alone": lambda: suite.test_leaves_the_model_alone(case, oracle),
    }


def test_an_adapter_that_changes_nothing_passes_every_check(oracle):
    record, model = oracle
    for check in adapter_checks(record, model, Adapted(model)).values():
        check()


@pytest.mark.parametrize(
    ("replaced", "check"),
    [
        ({"capabilities": frozenset()}, "offers"),
        ({"sigma_range": (0.1, 1.0)}, "passes"),
        ({"denoise": lambda x, sigma, y=None: x / 0}, "finite"),
        ({"denoise": lambda x, sigma, y=None: x - x.mean(0)}, "rows"),
        ({"denoise": lambda x, sigma, y=None: 0.9 * x}, "image"),
    ],
)
def test_a_broken_adapter_is_caught(oracle, replaced, check):
    record, model = oracle
    with pytest.raises(AssertionError):
        adapter_checks(record, model, Adapted(model, **replaced))[check]()


def test_an_adapter_that_uses_more_than_it_requires_is_caught(oracle):
    record, model = oracle
    greedy = Adapted(model, denoise=lambda x, sigma, y=None: x * model.log_density(x).mean())
    with pytest.raises(AttributeError, match="uses `log_density`, which its record does not require"):
        adapter_checks(record, model, greedy)["finite"]()


def test_an_adapter_that_changes_its_model_is_caught(oracle):
    record, model = oracle

    def meddle(x, sigma, y=None):
        model.means.add_(0.1)
        return model.denoise(x, sigma, y)

    with pytest.raises(AssertionError):
        adapter_checks(record, model, Adapted(model, denoise=meddle))["alone"]()


def test_a_suite_without_a_component_says_so():
    with pytest.raises(AssertionError, match="component = 'plugin/name'"):
        ModelConformance()._name()


def test_the_oracle_of_adapters_knows_noise_levels_too():
    model = three_classes(("noise_level_logits", "log_density", "denoise"))
    case = Case.of(model, DataInfo("points", (2, 1, 1), levels=None))
    ModelConformance().test_density_and_noise_levels_tell_the_same_story(case)
    ModelConformance().test_rows_do_not_see_one_another(case)
