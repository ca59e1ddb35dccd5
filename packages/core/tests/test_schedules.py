"""Paths against their published formulas; conversions; grids."""

import math

import pytest
import torch

from cdm_core import schedules
from cdm_core.errors import UserError

PATHS = {
    "linear": schedules.linear(100),
    "cosine": schedules.cosine(100),
    "uniform": schedules.uniform(100),
    "ot": schedules.ot(100),
    "ot_official": schedules.ot_official(100),
    "constant_difficulty": schedules.constant_difficulty(100, floor=0.03),
}
VARIANCE_PRESERVING = ("linear", "cosine", "uniform", "constant_difficulty")


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def test_linear_is_the_product_of_the_betas():
    path = schedules.linear()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(path.alpha[1:-1] ** 2, alpha_bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma[1:-1] ** 2, 1 - alpha_bar, rtol=1e-11, atol=0)
    assert len(path) == 1002
    assert float(path.alpha[1000] ** 2) == pytest.approx(4.0358e-5, rel=1e-4)


def test_linear_keeps_the_digits_of_small_noise():
    # sigma_1^2 is beta_1 itself; 1 - (1 - beta) would have lost its last digits
    assert float(schedules.linear(10, 1e-13, 0.02).sigma[1] ** 2) == pytest.approx(1e-13, rel=1e-14)


def test_cosine_follows_its_formula_where_the_betas_are_not_clipped():
    path = schedules.cosine(1000)
    signal = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = torch.tensor(signal, dtype=torch.float64) / signal[0]
    torch.testing.assert_close(path.alpha[:999] ** 2, expected[:999], rtol=1e-9, atol=1e-15)
    beta_last = 1 - (path.alpha[1000] / path.alpha[999]) ** 2
    assert float(beta_last) == pytest.approx(0.999, rel=1e-9)


def test_uniform_and_straight_paths_follow_their_formulas():
    t = torch.arange(102, dtype=torch.float64)
    torch.testing.assert_close(PATHS["uniform"].sigma, t / 101)
    torch.testing.assert_close(PATHS["ot"].sigma, t[:101] / 100)
    torch.testing.assert_close(PATHS["ot"].alpha, 1 - t[:101] / 100)
    official = PATHS["ot_official"]
    torch.testing.assert_close(official.alpha, t[:100] / 99)
    torch.testing.assert_close(official.sigma, 1 - (1 - 1e-4) * t[:100] / 99)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_preserving_paths_preserve_variance(name):
    path = PATHS[name]
    torch.testing.assert_close(path.alpha**2 + path.sigma**2, torch.ones(102, dtype=torch.float64))


def test_constant_difficulty_spreads_the_log_variance_of_the_floor_evenly():
    path, floor = PATHS["constant_difficulty"], 0.03
    log_variance = torch.log(path.alpha**2 * floor**2 + path.sigma**2)
    expected = torch.linspace(2 * math.log(floor), 0, 102, dtype=torch.float64)
    torch.testing.assert_close(log_variance, expected, rtol=0, atol=1e-13)
    # near clean data this is log(floor^2 + sigma^2) uniform in the level
    low = torch.log(floor**2 + path.ve_sigma[:20] ** 2).diff()
    torch.testing.assert_close(low, low[:1].expand(19), rtol=1e-2, atol=0)


def test_constant_difficulty_has_no_chasm_where_the_linear_schedule_has_one():
    def adjacent_kl(path, floor, dim=3072):  # between N(0, v_t I) and N(0, v_{t+1} I), the most distant pair
        variance = path.alpha**2 * floor**2 + path.sigma**2
        ratio = variance[:-1] / variance[1:]
        return float((dim / 2 * (ratio - 1 - ratio.log())).max())

    assert adjacent_kl(schedules.linear(1000), 0.0023) > 1000
    assert adjacent_kl(schedules.constant_difficulty(1000, 0.0023), 0.0023) < 0.5


def test_a_path_knows_its_ends_and_its_levels(path):
    reference = path.reference
    noise_first = path is PATHS["ot_official"]
    assert (reference, path.clean) == ((0, 99) if noise_first else (len(path) - 1, 0))
    assert float(path.alpha[reference]) == 0
    assert float(path.sigma[reference]) == 1
    assert reference not in path.levels
    assert (
        path.clean in path.levels
    ) == noise_first  # only the official straight path never gets quite clean
    torch.testing.assert_close(path.ve_sigmas, (path.sigma / path.alpha)[path.levels])
    assert bool((path.ve_sigmas.diff() > 0).all())
    assert bool((path.ve_sigmas > 0).all())
    assert bool(path.ve_sigmas.isfinite().all())
    assert len(path.levels) == len(path) - (1 if noise_first else 2)


def test_a_path_without_pure_noise_has_no_reference():
    path = schedules.Path(torch.tensor([1.0, 0.5]).double(), torch.tensor([0.0, 0.9]).double())
    assert path.reference is None
    assert path.levels.tolist() == [1]
    assert path.nearest(torch.tensor([0.1, 50.0])).tolist() == [1, 1]


def test_nearest_is_the_identity_on_the_levels_also_after_float32(path):
    assert torch.equal(path.nearest(path.ve_sigmas), path.levels)
    assert torch.equal(path.nearest(path.ve_sigmas.float()), path.levels)


def test_nearest_is_nearest_in_log_sigma(path):
    sigma = torch.logspace(-3, 4, 200, dtype=torch.float64)
    distance = (sigma.log()[:, None] - path.ve_sigmas.log()).abs()
    chosen = (path.ve_sigma[path.nearest(sigma)].log() - sigma.log()).abs()
    torch.testing.assert_close(chosen, distance.min(1).values)
    assert torch.equal(path.nearest(sigma), path.nearest_log_snr(schedules.log_snr(sigma)))


def test_scale_turns_ve_into_the_path(path):
    sigma = path.ve_sigmas
    x = torch.randn(len(sigma), 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    scaled = path.scale(sigma)[:, None, None, None] * x
    torch.testing.assert_close(scaled, path.to_path(x, path.nearest(sigma)), rtol=0, atol=0)
    assert path.scale(sigma.float()).dtype == torch.float32


def test_noise_converts_and_comes_back(path):
    draw = torch.Generator().manual_seed(1)
    level = path.levels[torch.randint(len(path.levels), (64,), generator=draw)]
    x0, eps = torch.randn(2, 64, 3, 2, 2, generator=draw, dtype=torch.float64)
    x_t = path.noised(x0, level, eps)
    column = (-1, 1, 1, 1)
    torch.testing.assert_close(
        x_t, path.alpha[level].view(column) * x0 + path.sigma[level].view(column) * eps
    )
    x, sigma = path.to_ve(x_t, level)
    torch.testing.assert_close(x, x0 + sigma.view(column) * eps)
    torch.testing.assert_close(path.to_path(x, level), x_t)
    torch.testing.assert_close(path.x0_to_eps(x_t, x0, level), eps)
    torch.testing.assert_close(path.eps_to_x0(x_t, eps, level), x0)
    # the same quantities in VE: the noise is the same noise, the score is minus noise over sigma
    torch.testing.assert_close(schedules.x0_to_eps(x, x0, sigma), eps)
    torch.testing.assert_close(schedules.eps_to_x0(x, eps, sigma), x0)
    score = schedules.x0_to_score(x, x0, sigma)
    torch.testing.assert_close(score, -eps / sigma.view(column))
    torch.testing.assert_close(schedules.score_to_x0(x, score, sigma), x0)


def test_conversions_keep_the_dtype_of_x(path):
    level = path.levels[:1]
    x_t = torch.ones(1, 1, 1, 1)
    x, sigma = path.to_ve(x_t, level)
    assert {x.dtype, sigma.dtype, path.to_path(x, level).dtype} == {torch.float32}
    assert path.noised(x_t, level, x_t).dtype == torch.float32


def test_pure_noise_has_no_ve_form(path):
    x, sigma = path.to_ve(torch.ones(1, 1), torch.tensor([path.reference]))
    assert bool(x.isinf().all())
    assert bool(sigma.isinf().all())


def test_log_snr_goes_both_ways(path):
    torch.testing.assert_close(path.log_snr, torch.log(path.alpha**2 / path.sigma**2))
    torch.testing.assert_close(schedules.sigma_at(schedules.log_snr(path.ve_sigmas)), path.ve_sigmas)


def test_a_path_is_moved_once():
    path = schedules.linear(5)
    assert path.to("cpu") is path
    assert path.to("meta") is path.to("meta")
    assert path.to("meta").alpha.device.type == "meta"


@pytest.mark.parametrize("spacing", ["t", "quadratic", "logsnr", "rho"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 30, 50, 67, 97, 99])
def test_a_grid_is_exactly_the_levels_asked_for(path, steps, spacing):
    levels = schedules.grid(path.ve_sigmas, steps, spacing)
    assert len(levels) == steps
    assert levels.dtype == torch.float64
    assert set(levels.tolist()) <= set(path.ve_sigmas.tolist())
    assert bool((levels.diff() < 0).all())
    assert float(levels[0]) == float(path.ve_sigmas[-1])
    if steps > 1:
        assert float(levels[-1]) == float(path.ve_sigmas[0])


@pytest.mark.parametrize("spacing", ["t", "quadratic", "logsnr", "rho"])
def test_as_many_steps_as_levels_visit_every_level(path, spacing):
    assert torch.equal(schedules.grid(path.ve_sigmas, len(path.levels), spacing), path.ve_sigmas.flip(0))


def test_grids_are_uniform_in_what_they_say():
    path = schedules.linear(1000)
    sigmas = path.ve_sigmas

    def chosen(spacing):
        levels = schedules.grid(sigmas, 20, spacing)
        return torch.searchsorted(sigmas, levels).double(), levels

    straight = torch.linspace(999, 0, 20, dtype=torch.float64)
    assert float((chosen("t")[0] - straight).abs().max()) <= 0.5
    assert float((chosen("quadratic")[0] - (straight / 999) ** 2 * 999).abs().max()) <= 1
    for spacing, warp in (("logsnr", torch.log), ("rho", lambda s: s ** (1 / 7))):
        levels = warp(chosen(spacing)[1])
        wanted = torch.linspace(float(warp(sigmas[-1])), float(warp(sigmas[0])), 20, dtype=torch.float64)
        widest = float(warp(sigmas).diff().max())  # a level may be off by its distance to the next
        assert float((levels - wanted).abs().max()) <= widest


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_a_grid_of_no_or_too_many_steps_is_refused(steps):
    with pytest.raises(UserError, match=rf"steps must be from 1 to 100 .*not {steps}$"):
        schedules.grid(PATHS["linear"].ve_sigmas, steps)


def test_an_unknown_spacing_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown grid 'logsnrr'.*did you mean 'logsnr'\?"):
        schedules.grid(PATHS["linear"].ve_sigmas, 5, "logsnrr")


def test_rho_grid_is_the_published_one():
    levels = schedules.rho_grid(0.002, 80.0, 18)
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(levels, expected)
    assert (float(levels[0]), float(levels[-1])) == (80.0, 0.002)
    assert schedules.rho_grid(0.002, 80.0, 1).tolist() == [80.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.rho_grid(0.002, 80.0, 0),
        lambda: schedules.rho_grid(0.0, 80.0, 5),
        lambda: schedules.rho_grid(1.0, 1.0, 2),
        lambda: schedules.rho_grid(0.002, 80.0, 5, rho=0),
        lambda: schedules.linear(0),
        lambda: schedules.linear(10, 0.1, 0.01),
        lambda: schedules.uniform(0),
        lambda: schedules.cosine(0),
        lambda: schedules.ot(1),
        lambda: schedules.ot_official(1),
        lambda: schedules.ot_official(10, sigma_min=0),
        lambda: schedules.constant_difficulty(0, 0.1),
        lambda: schedules.constant_difficulty(10, 1.0),
    ],
)
def test_impossible_schedules_are_user_errors(call):
    with pytest.raises(UserError):
        call()
