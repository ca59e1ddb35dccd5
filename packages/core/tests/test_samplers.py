"""Samplers against closed forms, published formulas and their published orders.

Everything is float64. For Gaussian data the probability-flow ODE is solved in closed form, and every sampler
is an affine map of its start and its noise: means and variances are computed exactly, not estimated.
"""

import math
from itertools import pairwise

import pytest
import torch

from cdm_core import samplers, schedules
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture

DETERMINISTIC = {
    "ddim": (samplers.ddim, 1),
    "euler": (samplers.euler, 1),
    "dpm_solver": (samplers.dpm_solver, 2),
    "dpm_solver_pp": (samplers.dpm_solver_pp, 2),
    "heun": (samplers.heun, 2),
}
MEAN, STD = torch.tensor([0.7, -0.3, 0.1]).double(), torch.tensor([0.2, 0.5, 1.5]).double()


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(mean, std):
    """E[x0 | x] of N(mean, diag(std^2)); x (B, d)."""

    def denoise(x, sigma):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        return mean + std**2 / (std**2 + sigma[:, None] ** 2) * (x - mean)

    return denoise


def flow(x, start, stop):
    """The probability-flow ODE of the Gaussian, exactly: from level start to level stop."""
    return MEAN + torch.sqrt((STD**2 + stop**2) / (STD**2 + start**2)) * (x - MEAN)


def log_grid(high, low, steps):
    return torch.logspace(math.log10(high), math.log10(low), steps, dtype=torch.float64)


def draws(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(coarse, fine):
    """Order of convergence from the errors of one grid and of another with twice the steps."""
    assert fine < coarse
    return math.log2(coarse / fine)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_to_the_closed_form(name):
    sampler, published = DETERMINISTIC[name]
    denoise = gaussian(MEAN, STD)
    x = draws((8, 3)) * 20
    low = torch.full((8,), 0.05, dtype=torch.float64)
    exact = denoise(flow(x, 20.0, 0.05), low)
    errors = [
        float((sampler(denoise, x, log_grid(20.0, 0.05, n)) - exact).abs().max()) for n in (64, 128, 256)
    ]
    assert order(*errors[:2]) == pytest.approx(published, abs=0.25)
    assert order(*errors[1:]) == pytest.approx(published, abs=0.12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_on_a_mixture(name):
    sampler, published = DETERMINISTIC[name]
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.2, -1.0]])
    mixture = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]), means, 0.3 * torch.eye(2).expand(3, 2, 2).clone()
    )
    x = draws((4, 2, 1, 1), seed=3) * 10
    out = [sampler(mixture.denoise, x, log_grid(10.0, 0.1, n)) for n in (40, 80, 160)]
    coarse, fine = (float((a - b).abs().max()) for a, b in pairwise(out))
    assert order(coarse, fine) == pytest.approx(published, abs=0.25)
    # to the same limit as Heun, from which the finest is not further than it still moved, times a safety of 2
    limit = samplers.heun(mixture.denoise, x, log_grid(10.0, 0.1, 160))
    assert float((out[-1] - limit).abs().max()) < 2 * fine + 1e-3


def test_second_order_beats_first_order_by_far():
    denoise, x = gaussian(MEAN, STD), draws((8, 3)) * 20
    exact = denoise(flow(x, 20.0, 0.05), torch.full((8,), 0.05, dtype=torch.float64))
    error = {
        name: float((sampler(denoise, x, log_grid(20.0, 0.05, 100)) - exact).abs().max())
        for name, (sampler, _) in DETERMINISTIC.items()
    }
    assert max(error[n] for n in ("dpm_solver", "dpm_solver_pp", "heun")) < error["ddim"] / 5
    assert error["ddim"] == pytest.approx(error["euler"], rel=1e-9)


# ---- Distributions, exactly: run the sampler on unit vectors to read off its affine map.


def moments(sampler, sigmas, mean=0.4, std=0.5, **options):
    """Exact mean and variance of samples of N(mean, std^2) data, started from their exact noisy distribution.

    Also the number of draws, and the variance of the state at every level.
    """
    total, states = len(sigmas), []
    denoise = gaussian(*torch.tensor([mean, std], dtype=torch.float64))
    x = torch.full((total + 2, 1), mean, dtype=torch.float64)
    x[1] += 1  # row 0: all noise off; row 1: unit change of the start; row 2 + k: unit noise at call k
    calls = []

    def noise(like):
        unit = torch.zeros_like(like)
        unit[2 + len(calls)] = 1
        calls.append(0)
        return unit

    def callback(step, total, x, x0):
        states.append(x[:, 0])

    out = sampler(denoise, x, sigmas, noise=noise, callback=callback, **options)[:, 0]
    spread = torch.ones(total + 1, dtype=torch.float64)
    spread[0] = std**2 + sigmas[0] ** 2
    variance, *before = [float(((s[1:] - s[0]) ** 2 * spread).sum()) for s in (out, *states)]
    return float(out[0]), variance, len(calls), before


def test_strided_ddpm_has_the_right_mean_and_variance():
    sigmas = schedules.linear(1000).ve_sigmas
    errors = []
    for steps in (25, 50, 100, 200):
        mean, variance, calls, _ = moments(samplers.ddpm, schedules.grid(sigmas, steps, "logsnr"))
        assert calls == steps  # the last step's draw included
        assert mean == pytest.approx(0.4, abs=1e-12)
        errors.append(1 - variance / 0.25)
    assert errors[-1] < 0.05
    assert [order(*pair) for pair in pairwise(errors)] == pytest.approx([1, 1, 1], abs=0.2)


@pytest.mark.parametrize(("t", "s"), [(1000, 1), (981, 961), (500, 20), (41, 21), (2, 1)])
def test_a_stride_of_ddpm_of_any_length_loses_only_the_spread_of_x0(t, s):
    """Var(x_s) is the exact std^2 + s^2 less (1 - s^2/t^2)^2 Var(x0 | x_t): "small" takes x0 for its mean."""
    high, low = (float(schedules.linear(1000).ve_sigma[level]) for level in (t, s))
    *_, states = moments(samplers.ddpm, torch.tensor([high, low], dtype=torch.float64))
    lost = (1 - low**2 / high**2) ** 2 * (0.25 * high**2 / (0.25 + high**2))
    assert states[1] == pytest.approx(0.25 + low**2 - lost, rel=1e-9)


@pytest.mark.parametrize(("std", "variance"), [(0.0, "small"), (1.0, "large")])
def test_each_variance_of_ddpm_is_exact_for_its_data(std, variance):
    """At every level visited the state has the variance std^2 + sigma^2, however few the steps."""
    sigmas = log_grid(50.0, 0.01, 7)
    *_, states = moments(samplers.ddpm, sigmas, std=std, variance=variance)
    torch.testing.assert_close(torch.tensor(states, dtype=torch.float64), std**2 + sigmas**2)


def test_large_variance_is_larger_than_small_and_both_converge():
    coarse, fine = log_grid(50.0, 0.01, 20), log_grid(50.0, 0.01, 800)
    small, large = (moments(samplers.ddpm, coarse, variance=v)[1] for v in ("small", "large"))
    assert small < 0.25 < large
    for variance in ("small", "large"):
        assert moments(samplers.ddpm, fine, variance=variance)[1] == pytest.approx(0.25, rel=0.04)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_of_any_eta_samples_the_data(eta):
    mean, variance, calls, _ = moments(samplers.ddim, log_grid(50.0, 0.01, 800), eta=eta)
    assert mean == pytest.approx(0.4, abs=1e-12)
    assert variance == pytest.approx(0.25, rel=0.015)
    assert calls == (0 if eta == 0 else 800)


@pytest.mark.parametrize(("sampler", "tolerance"), [(samplers.heun, 1e-3), (samplers.euler, 0.06)])
@pytest.mark.parametrize("churn", [0.0, 5.0, 80.0])
def test_churn_samples_the_data(sampler, tolerance, churn):
    mean, variance, calls, _ = moments(sampler, log_grid(50.0, 0.01, 800), churn=churn)
    assert mean == pytest.approx(0.4, abs=1e-12)
    assert variance == pytest.approx(0.25, rel=tolerance)
    assert calls == (0 if churn == 0 else 800)


def test_churned_heun_is_nearer_than_churned_euler():
    grid = schedules.rho_grid(0.01, 50.0, 60)
    heun, euler = (moments(s, grid, churn=20.0)[1] for s in (samplers.heun, samplers.euler))
    assert abs(heun - 0.25) < abs(euler - 0.25) / 4


def test_churn_acts_between_its_bounds_only_and_scales_its_noise():
    grid = schedules.rho_grid(0.01, 50.0, 20)
    plain = moments(samplers.heun, grid)[1]
    outside = moments(samplers.heun, grid, churn=20.0, churn_min=60.0, churn_max=70.0)
    assert outside[1:3] == (
        pytest.approx(plain, rel=1e-12),
        20,
    )  # drawn, as published, and multiplied by zero
    inside = moments(samplers.heun, grid, churn=20.0, churn_min=0.05, churn_max=1.0)[1]
    assert abs(inside / plain - 1) > 1e-6
    assert moments(samplers.heun, grid, churn=20.0, churn_noise=1.1)[1] > 1.02 * plain


# ---- Published formulas, in the variables of their papers.


def crooked(x, sigma):
    """A smooth non-linear denoiser, no distribution's."""
    return torch.tanh(x / (1 + sigma.view(-1, 1) ** 2)) + 0.1 * torch.sin(3 * x / (1 + sigma.view(-1, 1)))


class Published:
    """x_t of a variance-preserving path, eps and x0 predictions there, by level."""

    def __init__(self, steps, path):
        self.bar = path.alpha**2
        self.levels = torch.linspace(len(path) - 2, 1, steps).round().long().tolist()
        self.sigmas = path.ve_sigma[self.levels]
        self.noise = draws((steps, 5, 4), seed=7)
        self.start = draws((5, 4), seed=8)

    def x0(self, x, t):
        alpha = self.bar[t].sqrt()
        return crooked(x / alpha, ((1 - self.bar[t]).sqrt() / alpha).expand(len(x)))

    def eps(self, x, t):
        return (x - self.bar[t].sqrt() * self.x0(x, t)) / (1 - self.bar[t]).sqrt()

    def run(self, step):
        """Apply x_s = step(i, x_t, t, s) down the levels; the last step returns x0."""
        x = self.start
        for i, (t, s) in enumerate(zip(self.levels[:-1], self.levels[1:], strict=True)):
            x = step(i, x, t, s)
        return self.x0(x, self.levels[-1])

    def ours(self, sampler, **options):
        supply = iter(self.noise)
        x = self.start / self.bar[self.levels[0]].sqrt()
        return sampler(crooked, x, self.sigmas, noise=lambda like: next(supply), **options)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_over_every_level_is_the_published_one(variance):
    path = schedules.linear(60, 1e-4, 0.1)
    published = Published(60, path)
    bar = published.bar
    beta = torch.cat([torch.zeros(1).double(), 1 - bar[1:] / bar[:-1]])

    def step(i, x, t, s):
        assert s == t - 1
        tilde = (1 - bar[s]) / (1 - bar[t]) * beta[t]
        mean = bar[s].sqrt() * beta[t] / (1 - bar[t]) * published.x0(x, t)
        mean = mean + (1 - beta[t]).sqrt() * (1 - bar[s]) / (1 - bar[t]) * x
        return mean + (tilde if variance == "small" else beta[t]).sqrt() * published.noise[i]

    ours = published.ours(samplers.ddpm, variance=variance)
    torch.testing.assert_close(ours, published.run(step), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_published_one(eta):
    published = Published(9, schedules.cosine(200))
    bar = published.bar

    def step(i, x, t, s):
        sigma = eta * ((1 - bar[s]) / (1 - bar[t]) * (1 - bar[t] / bar[s])).sqrt()
        along = (1 - bar[s] - sigma**2).sqrt() * published.eps(x, t)
        return bar[s].sqrt() * published.x0(x, t) + along + sigma * published.noise[i]

    ours = published.ours(samplers.ddim, eta=eta)
    torch.testing.assert_close(ours, published.run(step), rtol=1e-10, atol=1e-10)


def test_ancestral_ddim_is_ddpm():
    published = Published(11, schedules.linear(100, 1e-4, 0.1))
    torch.testing.assert_close(published.ours(samplers.ddim, eta=1.0), published.ours(samplers.ddpm))


def test_dpm_solver_is_the_published_one():
    published = Published(12, schedules.linear(300, 1e-4, 0.05))
    alpha, sigma = published.bar.sqrt(), (1 - published.bar).sqrt()
    lam = torch.log(alpha / sigma)
    past = []

    def step(i, x, t, s):
        m0, h = published.eps(x, t), lam[s] - lam[t]
        new = alpha[s] / alpha[t] * x - sigma[s] * (h.exp() - 1) * m0
        if past:
            before, m1 = past[-1]
            new = new - sigma[s] * (h.exp() - h - 1) * (m0 - m1) / (lam[t] - lam[before])
        past.append((t, m0))
        return new

    torch.testing.assert_close(
        published.ours(samplers.dpm_solver), published.run(step), rtol=1e-10, atol=1e-10
    )


def test_dpm_solver_pp_is_the_published_one():
    published = Published(12, schedules.linear(300, 1e-4, 0.05))
    alpha, sigma = published.bar.sqrt(), (1 - published.bar).sqrt()
    lam = torch.log(alpha / sigma)
    past = []

    def step(i, x, t, s):
        x0, h = published.x0(x, t), lam[s] - lam[t]
        ahead = x0
        if past:
            before, x0_before = past[-1]
            r = (lam[t] - lam[before]) / h
            ahead = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        past.append((t, x0))
        return sigma[s] / sigma[t] * x - alpha[s] * ((-h).exp() - 1) * ahead

    torch.testing.assert_close(
        published.ours(samplers.dpm_solver_pp), published.run(step), rtol=1e-10, atol=1e-10
    )


def test_heun_is_algorithm_2():
    sigmas, noise, x = schedules.rho_grid(0.05, 20.0, 9), draws((9, 5, 4), seed=5), 20 * draws((5, 4), seed=6)
    options = {"churn": 4.0, "churn_min": 0.1, "churn_max": 8.0, "churn_noise": 1.01}
    supply = iter(noise)
    ours = samplers.heun(crooked, x, sigmas, noise=lambda like: next(supply), **options)

    t = [*sigmas.tolist(), 0.0]
    for i in range(9):
        gamma = min(4.0 / 9, math.sqrt(2) - 1) if 0.1 <= t[i] <= 8.0 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * 1.01 * noise[i]
        d = (x_hat - crooked(x_hat, torch.full((5,), t_hat, dtype=torch.float64))) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - crooked(x, torch.full((5,), t[i + 1], dtype=torch.float64))) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


# ---- What every sampler keeps to.

EVERY = {
    **{name: (sampler, {}) for name, (sampler, _) in DETERMINISTIC.items()},
    "ddim_ancestral": (samplers.ddim, {"eta": 1.0}),
    "ddpm": (samplers.ddpm, {}),
    "ddpm_large": (samplers.ddpm, {"variance": "large"}),
    "euler_churn": (samplers.euler, {"churn": 10.0}),
    "heun_churn": (samplers.heun, {"churn": 10.0}),
}


@pytest.mark.parametrize("name", EVERY)
def test_one_step_is_one_prediction(name):
    sampler, options = EVERY[name]
    if "churn" in options:
        options = {"churn": 10.0, "churn_max": 1.0}  # not at this level
    x = draws((3, 2))
    out = sampler(crooked, x, torch.tensor([2.0]).double(), **options)
    torch.testing.assert_close(out, crooked(x, torch.full((3,), 2.0).double()), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", EVERY)
def test_the_callback_sees_every_step_and_its_prediction(name):
    sampler, options = EVERY[name]
    sigmas, seen = log_grid(10.0, 0.1, 6), []

    def callback(step, total, x, x0):
        assert not x.requires_grad
        seen.append((step, total, x.clone(), x0.clone()))

    out = sampler(crooked, draws((3, 2)) * 10, sigmas, callback=callback, **options)
    assert [(step, total) for step, total, *_ in seen] == [(i, 6) for i in range(6)]
    torch.testing.assert_close(out, seen[-1][3], rtol=1e-14, atol=1e-14)
    if not options:  # a state's own level is known only without churn
        for sigma, (*_, x, x0) in zip(sigmas, seen, strict=True):
            torch.testing.assert_close(x0, crooked(x, sigma.expand(3)))


@pytest.mark.parametrize("name", EVERY)
def test_float32_follows_float64(name):
    sampler, options = EVERY[name]
    start, sigmas, noise = draws((4, 3)) * 10, log_grid(10.0, 0.05, 20), draws((20, 4, 3), seed=2)

    def run(dtype):
        supply = iter(noise.to(dtype))
        return sampler(crooked, start.to(dtype), sigmas, noise=lambda like: next(supply), **options)

    assert run(torch.float32).dtype == torch.float32
    torch.testing.assert_close(run(torch.float32).double(), run(torch.float64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_a_denoiser_may_use_autograd_inside(name):
    sampler, options = EVERY[name]

    def energy_denoise(x, sigma):  # E[x0 | x] = x + sigma^2 grad log p, of a unit Gaussian
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = -0.5 * (x**2 / (1 + sigma[:, None] ** 2)).sum()
            (score,) = torch.autograd.grad(log_p, x)
        return x.detach() + sigma[:, None] ** 2 * score

    unit = gaussian(torch.zeros(1).double(), torch.ones(1).double())
    start, sigmas = draws((3, 2)) * 10, log_grid(10.0, 0.1, 5)
    outs = []
    for denoise in (energy_denoise, unit):
        supply = iter(draws((5, 3, 2), seed=9))
        outs.append(sampler(denoise, start, sigmas, noise=lambda like, s=supply: next(s), **options))
    torch.testing.assert_close(*outs)
    assert not outs[0].is_inference()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "sigmas", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [math.inf, 1.0], [math.nan], [1.0, -1.0]]
)
def test_levels_that_make_no_sense_are_refused(name, sigmas):
    sampler, options = EVERY[name]
    with pytest.raises(UserError, match="sigmas must be finite, positive and descending"):
        sampler(crooked, draws((2, 2)), torch.tensor(sigmas).double(), **options)


def test_an_unknown_variance_is_refused():
    with pytest.raises(UserError, match="'small', 'large' or 'learned', not 'medium'"):
        samplers.ddpm(crooked, draws((2, 2)), torch.tensor([1.0]).double(), variance="medium")


def test_without_a_noise_function_the_global_generator_is_used():
    x, sigmas = draws((3, 2)), log_grid(5.0, 0.1, 4)
    torch.manual_seed(0)
    first = samplers.ddpm(crooked, x, sigmas)
    torch.manual_seed(0)
    assert torch.equal(samplers.ddpm(crooked, x, sigmas), first)
    assert not torch.equal(samplers.ddpm(crooked, x, sigmas), first)


# ---- What a sampler tells a model of its steps.


class Aware:
    """Data N(0.4, 0.25) by a model that records what it is asked, and may nudge states."""

    def __init__(self, variance=None, nudge=0.0):
        self.plain = gaussian(*torch.tensor([0.4, 0.5], dtype=torch.float64))
        self.nudge, self.steps, self.begun, self.variance = nudge, [], [], variance

    def denoise(self, x, sigma, y=None):
        raise AssertionError("the sampler did not tell of its step")

    def predict_step(self, x, step, y):
        self.steps.append(step)
        variance = None if self.variance is None else torch.full_like(x, self.variance)
        return samplers.Prediction(self.plain(x, x.new_full((len(x),), step.level)), variance)

    def begin_step(self, x, step, y):
        self.begun.append(step)
        return x + self.nudge


@pytest.mark.parametrize("name", EVERY)
def test_every_step_is_told_once(name):
    sampler, options = EVERY[name]
    model, sigmas = Aware(), log_grid(10.0, 0.1, 4)
    sampler(samplers.Conditional(model), draws((3, 2)), sigmas, noise=draws_like, **options)
    levels = [*sigmas.tolist(), 0.0]
    assert [(s.number, s.total, s.sigma, s.next) for s in model.begun] == [
        (i, 4, levels[i], levels[i + 1]) for i in range(4)
    ]
    first = [step for step in model.steps if not step.correction]
    assert [(s.number, s.total, s.next) for s in first] == [(s.number, s.total, s.next) for s in model.begun]
    corrections = [step for step in model.steps if step.correction]
    assert [step.level for step in corrections] == (levels[1:4] if sampler is samplers.heun else [])


def draws_like(x):
    return torch.zeros_like(x)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_sets_out_from_where_the_model_says(name):
    """A shift of a Gaussian's state is carried to the end by the same linear map as the state itself."""
    sampler, options = EVERY[name]
    start, sigmas = draws((3, 1)), torch.tensor([2.0], dtype=torch.float64)
    nudged = sampler(samplers.Conditional(Aware(nudge=0.3)), start, sigmas, noise=draws_like, **options)
    shifted = sampler(samplers.Conditional(Aware()), start + 0.3, sigmas, noise=draws_like, **options)
    torch.testing.assert_close(nudged, shifted)


@pytest.mark.parametrize(("learned", "named"), [(0.0, "small"), (1.0, "large"), (None, "small")])
def test_a_learned_variance_lies_between_small_and_large(learned, named):
    sigmas, start = log_grid(10.0, 0.1, 4), draws((3, 2))

    def run(model, variance):
        return samplers.ddpm(
            samplers.Conditional(model), start, sigmas, noise=lambda x: draws(x.shape, 7), variance=variance
        )

    torch.testing.assert_close(run(Aware(learned), "auto"), run(Aware(), named))


def test_half_a_learned_variance_is_the_geometric_mean():
    sigmas = torch.tensor([2.0, 0.5], dtype=torch.float64)
    states = []
    for variance in (0.0, 0.5, 1.0):
        seen = []
        samplers.ddpm(
            samplers.Conditional(Aware(variance)),
            draws((1, 1)),
            sigmas,
            noise=torch.ones_like,
            callback=lambda i, n, x, x0, seen=seen: seen.append(x),
        )
        states.append(float(seen[1]))
    plain = []
    samplers.ddpm(
        samplers.Conditional(Aware()),
        draws((1, 1)),
        sigmas,
        noise=torch.zeros_like,
        callback=lambda i, n, x, x0: plain.append(x),
    )
    low, middle, high = (state - float(plain[1]) for state in states)
    assert low == pytest.approx(math.sqrt(0.25 * (1 - 1 / 16)))
    assert high == pytest.approx(math.sqrt(1.25 * 3.75 / 5))
    assert middle == pytest.approx(math.sqrt(low * high))


def test_a_variance_that_was_not_learned_is_refused():
    with pytest.raises(UserError, match="variance 'learned': this model has not learned one"):
        samplers.ddpm(crooked, draws((2, 2)), torch.tensor([2.0, 1.0]).double(), variance="learned")
