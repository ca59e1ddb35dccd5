"""Networks on discrete levels as denoisers: against the exact prediction for a Gaussian mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm_core import samplers, schedules
from cdm_core.denoisers import DiscreteDenoiser, respaced
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture

PATHS = {"linear": schedules.linear(60, 1e-3, 0.2), "cosine": schedules.cosine(60), "ot": schedules.ot(60)}


def mixture() -> GaussianMixture:
    means = torch.tensor([[-0.8, 0.1], [0.5, 0.9]])
    covariances = torch.tensor([[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]])
    return GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances)


class Exact(nn.Module):
    """Predicts exactly what a perfect network would, of its own kind, for the class y or none (label 2)."""

    def __init__(self, path: schedules.Path, predicts: str, variance: float | None = None) -> None:
        super().__init__()
        self.mixture, self.levels, self.kind, self.extra = mixture(), path, predicts, variance
        self.asked: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.asked.append(t)
        level = self.levels.levels[t]
        x, sigma = self.levels.to_ve(x_t, level)
        x0 = self.mixture.denoise(x, sigma)
        if y is not None:
            known = y < 2
            x0 = torch.where(known.view(-1, 1, 1, 1), self.mixture.denoise(x, sigma, y.clamp(max=1)), x0)
        eps = self.levels.x0_to_eps(x_t, x0, level)
        alpha, noise = (c[level].view(-1, 1, 1, 1) for c in (self.levels.alpha, self.levels.sigma))
        value = {"eps": eps, "x0": x0, "v": alpha * eps - noise * x0}[self.kind]
        return value if self.extra is None else torch.cat([value, torch.full_like(value, self.extra)], 1)


class Model(DiscreteDenoiser, Exact):
    def __init__(
        self, name: str = "linear", predicts: Any = "eps", variance: float | None = None, **process: Any
    ) -> None:
        super().__init__(PATHS[name], predicts, variance)
        self.set_process(PATHS[name], predicts=predicts, learned_variance=variance is not None, **process)


def points(sigma: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(len(sigma), 2, 1, 1).double() * (1 + sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", PATHS)
def test_every_kind_of_network_denoises(name: str, predicts: str) -> None:
    model = Model(name, predicts)
    sigma = model.sigmas
    x = points(sigma)
    torch.testing.assert_close(model.denoise(x, sigma), mixture().denoise(x, sigma), rtol=1e-8, atol=1e-8)
    assert torch.equal(model.asked[-1], torch.arange(len(sigma)))  # clean to noisy, from 0
    prediction = model.predict(x, sigma)
    assert prediction.variance is None
    t = torch.arange(len(sigma))
    x_t = model.path.to_path(x, t)
    x0 = mixture().denoise(x, sigma)
    torch.testing.assert_close(model.eps(x_t, t), (x - x0) / sigma.view(-1, 1, 1, 1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", PATHS)
def test_the_target_gives_back_the_clean_image(name: str, predicts: str) -> None:
    model = Model(name, predicts)
    t = torch.arange(len(model.path))
    x0, eps = torch.randn(2, len(t), 2, 1, 1).double()
    x_t, target = model.path.noised(x0, t, eps), model.target(x0, eps, t)
    torch.testing.assert_close(model.to_x0(target, x_t, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.to_eps(target, x_t, t), eps, rtol=1e-9, atol=1e-9)


def test_sigma_is_rounded_to_the_nearest_level_in_its_logarithm() -> None:
    model = Model("linear", timesteps=(4, 20, 50))
    low, middle, high = (float(sigma) for sigma in model.sigmas)
    wanted = torch.tensor([0.0, low / 9, (low * middle) ** 0.5 * 1.001, middle, high * 1e6]).double()
    assert model.nearest(wanted).tolist() == [4, 4, 20, 20, 50]
    torch.testing.assert_close(model.scale(wanted), PATHS["linear"].alpha[1:][model.nearest(wanted)])
    torch.testing.assert_close(model.sigmas, PATHS["linear"].ve_sigma[[5, 21, 51]])
    x = points(wanted[1:])
    torch.testing.assert_close(
        model.denoise(x, wanted[1:]),
        model.denoise(x, model.sigmas[torch.tensor([0, 1, 1, 2])]),
        rtol=0,
        atol=0,
    )


def test_a_learned_variance_is_the_share_between_the_bounds() -> None:
    model = Model("linear", variance=0.5)
    sigma = model.sigmas[[3, 40]]
    x0, variance = model.predict(points(sigma), sigma)
    assert torch.equal(variance, torch.full_like(x0, 0.75))
    torch.testing.assert_close(x0, mixture().denoise(points(sigma), sigma))


def test_the_ancestral_sampler_of_a_learned_variance_meets_both_ends() -> None:
    """o = -1 is the posterior's variance, o = 1 that of the forward step."""
    start = torch.randn(64, 2, 1, 1, dtype=torch.float64)
    for extra, name in ((-1.0, "small"), (1.0, "large")):
        model = Model("linear", variance=extra)
        sigmas = schedules.grid(model.sigmas, 10)
        draws = torch.randn(10, *start.shape, dtype=torch.float64)
        outs = []
        for variance in ("learned", name):
            noise = iter(draws)
            x = start * sigmas[0]
            call = samplers.Conditional(model)
            outs.append(samplers.ddpm(call, x, sigmas, noise=lambda x, n=noise: next(n), variance=variance))
        torch.testing.assert_close(*outs)


def test_labels_are_spelt_out_and_checked() -> None:
    sigma = torch.tensor([0.3, 2.0]).double()
    x, y = points(sigma), torch.tensor([0, 1])
    free = Model("linear", num_classes=2, null_label=2)
    torch.testing.assert_close(free.denoise(x, sigma, y), mixture().denoise(x, near(free, sigma), y))
    torch.testing.assert_close(free.denoise(x, sigma), mixture().denoise(x, near(free, sigma)))
    bound = Model("linear", num_classes=2)
    torch.testing.assert_close(bound.denoise(x, sigma, y), free.denoise(x, sigma, y))
    with pytest.raises(UserError, match=r'without "no class": give it labels \(0 to 1\)'):
        bound.denoise(x, sigma)
    with pytest.raises(UserError, match="not class-conditional"):
        Model("linear").denoise(x, sigma, y)


def near(model: DiscreteDenoiser, sigma: Tensor) -> Tensor:
    return model.path.ve_sigma[model.nearest(sigma)]


def test_the_networks_state_dict_stays_its_own() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

    class Wrapped(DiscreteDenoiser, Network):
        def __init__(self) -> None:
            super().__init__()
            self.set_process(PATHS["linear"], timesteps=(3, 9))

    assert Wrapped().state_dict().keys() == Network().state_dict().keys()


def test_the_prediction_is_differentiable_in_x() -> None:
    model = Model("linear", "v")
    sigma = model.sigmas[[10, 30]]
    x = points(sigma).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.denoise(x, sigma), (x,), eps=1e-6, atol=1e-6)


def test_respacings_are_the_official_ones() -> None:
    assert respaced(100, "") == tuple(range(100))
    assert respaced(100, "10") == (0, 11, 22, 33, 44, 55, 66, 77, 88, 99)
    assert respaced(100, "ddim10") == (0, 10, 20, 30, 40, 50, 60, 70, 80, 90)
    assert respaced(1000, "250")[:4] == (0, 4, 8, 12)
    assert respaced(1000, "250")[-1] == 999
    assert respaced(300, "10,15,20")[:2] == (0, 11)
    assert len(set(respaced(300, "10,15,20"))) == 45
    assert respaced(10, "2,1,3") == (0, 3, 4, 7, 8, 9)  # sections of 4, 3 and 3


@pytest.mark.parametrize("spacing", ["ddim3,4", "x", "0", "ddim", "-3", "4,,5", "60,50"])
def test_other_respacings_are_refused(spacing: str) -> None:
    with pytest.raises(UserError, match="timestep_respacing"):
        respaced(100, spacing)


def test_no_stride_takes_every_number_of_steps() -> None:
    with pytest.raises(UserError, match="no whole stride takes 60 of 100"):
        respaced(100, "ddim60")


@pytest.mark.parametrize("timesteps", [(), (3, 3), (-1, 4), (2, 60)])
def test_levels_that_are_not_there_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"timesteps must ascend within 0 \.\. 59"):
        Model("linear", timesteps=timesteps)


def test_unknown_kinds_of_network_are_refused() -> None:
    with pytest.raises(UserError, match="eps, x0, v, not 'score'"):
        Model("linear", "score")
