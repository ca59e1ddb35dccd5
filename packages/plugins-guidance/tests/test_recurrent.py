"""Recurrence: what every sampler keeps to, the published renoising, and what it is for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core import samplers
from cdm_core.mixtures import GaussianMixture
from cdm_core.samplers import Conditional
from cdm_core.testing import SamplerConformance
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.apply_configs import GuidedConfig, RecurrentConfig, TermConfig
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.recurrent import recurrent

SIGMAS = torch.logspace(1, -1, 6, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestConformance(SamplerConformance):
    """With every kind of noise that it draws, and with none."""

    @pytest.fixture(
        params=[
            {"repeats": 1},
            {"repeats": 2},
            {"repeats": 2, "eta": 1.0},
            {"repeats": 3, "eta": 0.5, "sigma_min": 0.2, "sigma_max": 3.0},
        ],
        ids=["once", "twice", "ancestral", "interval"],
    )
    def sampler(self, request: Any) -> Any:
        config = RecurrentConfig(**request.param)
        config.check()
        return lambda *args, **kwargs: recurrent(*args, **kwargs, **vars(config))


def oracle() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.2], [0.9, 0.6]])
    return GaussianMixture(torch.tensor([0.5, 0.5]), means, 0.1 * torch.eye(2).expand(2, 2, 2)).eval()


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_once_is_ddim(eta):
    start, draws = 10 * normal(5, 2, 1, 1), normal(6, 5, 2, 1, 1, seed=1)

    def sample(sampler, **options):
        source = iter(draws)
        return sampler(oracle().denoise, start, SIGMAS, noise=lambda x: next(source), eta=eta, **options)

    assert torch.equal(sample(samplers.ddim), sample(recurrent, repeats=1))


def test_the_published_renoising_in_its_own_scale():
    """x_t = sqrt(a_t / a_s) x_s + sqrt(1 - a_t / a_s) n between goes, after DDIM's step each time."""
    exact, start, draws = oracle(), 10 * normal(4, 2, 1, 1), normal(20, 4, 2, 1, 1, seed=1)
    goes, source, used = 3, iter(draws), iter(draws)
    bounds = {"sigma_min": 0.2, "sigma_max": 5.0}
    found = recurrent(exact.denoise, start, SIGMAS, noise=lambda x: next(source), repeats=goes, **bounds)

    x = start
    for t, s in pairwise([*SIGMAS.tolist(), 0.0]):
        a_t, a_s = 1 / (1 + t**2), 1 / (1 + s**2)
        x_t = x * math.sqrt(a_t)
        for further in reversed(range(goes if 0.2 <= t <= 5.0 else 1)):
            x0 = exact.denoise(x_t / math.sqrt(a_t), t)
            eps = (x_t - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
            x_s = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * eps
            if further:
                x_t = math.sqrt(a_t / a_s) * x_s + math.sqrt(1 - a_t / a_s) * next(used)
        x = x_s / math.sqrt(a_s)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)
    assert len(list(source)) == len(list(used)) > 0


def test_every_go_is_guided_and_counted_as_the_same_step():
    seen = []

    class Watched:
        def denoise(self, x: Tensor, sigma: Tensor, y: Any = None) -> Tensor:
            raise AssertionError("asked without its step")

        def begin_step(self, x: Tensor, step: samplers.Step, y: Any) -> Tensor:
            seen.append(("begin", step.number))
            return x

        def predict_step(self, x: Tensor, step: samplers.Step, y: Any) -> samplers.Prediction:
            seen.append(("predict", step.number))
            return samplers.Prediction(torch.zeros_like(x))

    recurrent(Conditional(Watched()), normal(2, 2, 1, 1), SIGMAS[:2], repeats=2, sigma_max=9.0)
    expected = [0, 1, 1]
    assert seen == [(what, i) for i in expected for what in ("begin", "predict")]


def test_several_goes_let_weak_and_late_guidance_reach_its_class():
    """Guided when the sample has chosen its class already: recurrence lets it choose again."""
    exact = oracle()
    exact.num_classes = 2
    term = TermConfig(look="x0-through", scale=0.3, sigma_max=0.5)
    model = GuidedDenoiser(GuidedConfig(terms=(term,), condition=False), exact, [Guide(exact)])
    sigmas = torch.logspace(1, -1.5, 25, dtype=torch.float64)
    start, y = 10 * normal(600, 2, 1, 1), torch.arange(600) % 2

    def share(repeats: int) -> float:
        draws = torch.Generator().manual_seed(3)
        out = recurrent(
            Conditional(model, y),
            start,
            sigmas,
            noise=lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype),
            repeats=repeats,
            sigma_min=0.2,
            sigma_max=2.0,
        )
        return float((exact.class_logits(out, 0.0).argmax(1) == y).double().mean())

    once, often = share(1), share(8)
    assert once < 0.7
    assert often > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min <= sigma_max"),
        ({"eta": 1.5}, "eta must lie"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RecurrentConfig(**change).check()
