"""Noise levels: the one place where conventions meet.

A Gaussian path noises data as x_t = alpha_t x0 + sigma_t eps. Divided by alpha_t it is x = x0 + sigma n with
sigma = sigma_t / alpha_t, the variance-exploding (VE) currency in which everything else is written. `Path`
holds the coefficients of one path and converts; `grid` and `rho_grid` choose the levels that a sampler
visits. All coefficients are float64.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdm_core.errors import UserError


def _rows(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1) in the dtype of `like`, to multiply (B, ...)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _midpoints(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


@dataclass(frozen=True, eq=False)
class Path:
    """A discrete Gaussian path, by level index: x_t = alpha_t x0 + sigma_t eps.

    alpha, sigma: (K,) float64, data units. The level order is the path's own (a path may start at its noise).
    Tensor arguments `level` are (B,) int64 level indices; `x` is (B, ...).
    """

    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str) -> Path:
        """The same path with its coefficients on `device`; the moved path is kept for the next call."""
        device = torch.empty(0, device=device).device
        if device == self.alpha.device:
            return self
        if device not in self._moved:
            self._moved[device] = Path(self.alpha.to(device), self.sigma.to(device))
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, Path]:
        return {}

    @cached_property
    def ve_sigma(self) -> Tensor:
        """(K,) float64: sigma / alpha of every level; infinite at pure noise."""
        return self.sigma / self.alpha

    @cached_property
    def log_snr(self) -> Tensor:
        """(K,) float64: log(alpha^2 / sigma^2) of every level; +inf when clean, -inf at pure noise."""
        return log_snr(self.ve_sigma)

    @cached_property
    def clean(self) -> int:
        """Index of the least noisy level."""
        return int(self.ve_sigma.argmin())

    @cached_property
    def reference(self) -> int | None:
        """Index of the level that is exactly N(0, I), alpha = 0 and sigma = 1; None where there is none."""
        index = ((self.alpha == 0) & (self.sigma == 1)).nonzero()
        return int(index[0]) if len(index) else None

    @cached_property
    def levels(self) -> Tensor:
        """(N,) int64: the levels at which one can denoise, 0 < sigma / alpha < inf, from clean to noisy."""
        inside = ((self.ve_sigma > 0) & self.ve_sigma.isfinite()).nonzero().squeeze(1)
        return inside[self.ve_sigma[inside].argsort()]

    @cached_property
    def ve_sigmas(self) -> Tensor:
        """(N,) float64, ascending: sigma / alpha of `levels`, what a model offers as `sigmas`."""
        return self.ve_sigma[self.levels]

    @cached_property
    def _between(self) -> Tensor:
        """(N - 1,) float64: log sigma half-way between neighbouring `levels`."""
        return _midpoints(self.ve_sigmas.log())

    def nearest(self, sigma: Tensor) -> Tensor:
        """Index of the level of `levels` nearest in log sigma; sigma (B,) in VE units -> (B,) int64."""
        path = self.to(sigma.device)
        return path.levels[torch.bucketize(sigma.double().log(), path._between)]

    def nearest_log_snr(self, value: Tensor) -> Tensor:
        """Index of the level of `levels` nearest in log-SNR; (B,) -> (B,) int64."""
        return self.nearest(sigma_at(value.double()))

    def scale(self, sigma: Tensor) -> Tensor:
        """alpha of the level nearest to sigma, such that x_t = alpha x; (B,) VE -> (B,), same dtype."""
        return self.to(sigma.device).alpha[self.nearest(sigma)].to(sigma.dtype)

    def _at(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        path = self.to(level.device)
        return _rows(path.alpha[level], like), _rows(path.sigma[level], like)

    def noised(self, x0: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps."""
        alpha, sigma = self._at(level, x0)
        return alpha * x0 + sigma * eps

    def to_path(self, x: Tensor, level: Tensor) -> Tensor:
        """From VE, x = x0 + sigma n, to the path's own scale, x_t."""
        return self._at(level, x)[0] * x

    def to_ve(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """From the path's own scale to VE: x (B, ...) and its sigma (B,), both of the dtype of x_t.

        Pure noise has no VE form (alpha = 0): both are infinite.
        """
        sigma = self.to(level.device).ve_sigma[level].to(x_t.dtype)
        return x_t / self._at(level, x_t)[0], sigma

    def eps_to_x0(self, x_t: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """E[x0 | x_t] = (x_t - sigma_t E[eps | x_t]) / alpha_t."""
        alpha, sigma = self._at(level, x_t)
        return (x_t - sigma * eps) / alpha

    def x0_to_eps(self, x_t: Tensor, x0: Tensor, level: Tensor) -> Tensor:
        """E[eps | x_t] = (x_t - alpha_t E[x0 | x_t]) / sigma_t."""
        alpha, sigma = self._at(level, x_t)
        return (x_t - alpha * x0) / sigma


def log_snr(sigma: Tensor) -> Tensor:
    """log(1 / sigma^2) of VE noise levels."""
    return -2 * sigma.log()


def sigma_at(log_snr: Tensor) -> Tensor:
    """VE noise level at a log-SNR."""
    return (-log_snr / 2).exp()


def x0_to_eps(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """VE: E[n | x] = (x - E[x0 | x]) / sigma; x, x0 (B, ...), sigma (B,)."""
    return (x - x0) / _rows(sigma, x)


def eps_to_x0(x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """VE: E[x0 | x] = x - sigma E[n | x]."""
    return x - _rows(sigma, x) * eps


def x0_to_score(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """VE, Tweedie's formula: grad log p(x; sigma) = (E[x0 | x] - x) / sigma^2."""
    return (x0 - x) / _rows(sigma, x) ** 2


def score_to_x0(x: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
    """VE, Tweedie's formula: E[x0 | x] = x + sigma^2 grad log p(x; sigma)."""
    return x + _rows(sigma, x) ** 2 * score


# ---- Paths. T is the number of levels strictly between clean data and pure noise, unless said otherwise.


def _check_levels(levels: int) -> None:
    if levels < 1:
        raise UserError(f"a path needs at least 1 noise level, not {levels}")


def _variance_preserving(beta: Tensor) -> Path:
    """Levels 0 (clean), 1..T with prod(1 - beta) left of the signal's variance, T + 1 (pure noise)."""
    log_signal = torch.log1p(-beta).cumsum(0)  # in logs: 1 - prod(1 - beta) keeps its digits at low noise
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    alpha = torch.cat([one, (log_signal / 2).exp(), zero])
    return Path(alpha, torch.cat([zero, (-torch.expm1(log_signal)).sqrt(), one]))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Path:
    """DDPM's linear variance schedule (Ho et al. 2020), T + 2 levels: 0 clean, T + 1 pure noise."""
    _check_levels(T)
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(f"need 0 < beta_start <= beta_end < 1, not {beta_start} and {beta_end}")
    return _variance_preserving(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def cosine(T: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Path:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17), T + 2 levels: 0 clean, T + 1 pure noise."""
    _check_levels(T)
    t = torch.arange(T + 1, dtype=torch.float64) / T
    signal = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return _variance_preserving((1 - signal[1:] / signal[:-1]).clamp(max=beta_max))


def uniform(T: int = 1000) -> Path:
    """Variance preserving, sigma_t = t / (T + 1) (Rhodes et al. 2020), T + 2 levels: 0 clean, T + 1 noise."""
    _check_levels(T)
    sigma = torch.arange(T + 2, dtype=torch.float64) / (T + 1)
    return Path((1 - sigma**2).sqrt(), sigma)


def ot(T: int = 1000) -> Path:
    """The straight path of flow matching, x_t = (T - t)/T x0 + t/T eps, T + 1 levels: 0 clean, T noise."""
    _check_levels(T - 1)
    sigma = torch.arange(T + 1, dtype=torch.float64) / T
    return Path(sigma.flip(0), sigma)


def ot_official(T: int = 1000, sigma_min: float = 1e-4) -> Path:
    """The straight path as released code has it: T levels, index 0 pure noise, the last one sigma_min.

    x_u = u x0 + (1 - (1 - sigma_min) u) eps, u = linspace(0, 1, T) (Lipman et al. 2023, eq. 20-22).
    """
    _check_levels(T - 1)
    if not 0 < sigma_min < 1:
        raise UserError(f"sigma_min must lie in (0, 1), not {sigma_min}")
    u = torch.linspace(0, 1, T, dtype=torch.float64)
    return Path(u, 1 - (1 - sigma_min) * u)


def constant_difficulty(T: int, floor: float) -> Path:
    """Variance preserving, neighbours equally hard to tell apart, T + 2 levels: 0 clean, T + 1 pure noise.

    Data whose least varied directions have standard deviation `floor` (data units; for dequantised grey
    levels at least the width of a level over sqrt(12)) have in them, at level t, the variance
    v_t = alpha_t^2 floor^2 + sigma_t^2. Its logarithm is uniform in t, from log floor^2 when clean to 0 at
    pure noise, so that noise energy tells neighbours apart equally well everywhere: no chasm between two.
    The noisiest level but one keeps an alpha^2 of about 2 log(1 / floor) / (T + 1).
    """
    _check_levels(T)
    if not 0 < floor < 1:
        raise UserError(f"floor must lie in (0, 1), not {floor}")
    progress = torch.arange(T + 2, dtype=torch.float64) / (T + 1)
    span = -2 * math.log(floor)
    # sigma^2 = (v - floor^2) / (1 - floor^2), alpha^2 = (1 - v) / (1 - floor^2); expm1 keeps small ones exact
    sigma2 = torch.expm1(span * progress) / math.expm1(span)
    alpha2 = torch.expm1(-span * (1 - progress)) / math.expm1(-span)
    return Path(alpha2.sqrt(), sigma2.sqrt())


# ---- Grids: the levels that a sampler visits, noisy first.


def grid(sigmas: Tensor, steps: int, spacing: str = "t") -> Tensor:
    """`steps` of a model's own levels, both ends included: (steps,) float64, descending.

    sigmas (N,) ascending; spacing: uniform in the level's index ("t"), in its square root ("quadratic", DDIM
    section D.2), in log-SNR ("logsnr") or in sigma^(1/7) ("rho", EDM). One step: the noisiest level.
    Exactly `steps` distinct levels: where the spacing asks twice for one level, the next free ones are taken.
    """
    sigmas = sigmas.detach().to("cpu", torch.float64)
    index = torch.arange(len(sigmas), dtype=torch.float64)
    warps = {"t": index, "quadratic": index.sqrt(), "logsnr": sigmas.log(), "rho": sigmas ** (1 / 7)}
    if spacing not in warps:
        near = difflib.get_close_matches(spacing, warps, n=1)
        raise UserError(
            f"unknown grid {spacing!r}{f': did you mean {near[0]!r}?' if near else ''} ({', '.join(warps)})"
        )
    if not 1 <= steps <= len(sigmas):
        raise UserError(f"steps must be from 1 to {len(sigmas)} (the model's noise levels), not {steps}")
    if steps == 1:
        return sigmas[-1:].clone()
    warp = warps[spacing]
    wanted = torch.linspace(float(warp[0]), float(warp[-1]), steps, dtype=torch.float64)
    chosen = torch.bucketize(wanted, _midpoints(warp))
    order = torch.arange(steps)
    # chosen - order never falls where the levels are distinct; the cap leaves room for those still to come
    slack = (chosen - order).cummax(0).values.clamp(max=len(sigmas) - steps)
    return sigmas[slack + order].flip(0)


def rho_grid(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """Levels uniform in sigma^(1/rho) (Karras et al. 2022, eq. 5), (steps,) float64, sigma_max first.

    For denoisers that take any sigma. One step: sigma_max.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if not (0 < sigma_min < sigma_max < math.inf or (steps == 1 and 0 < sigma_max < math.inf)):
        raise UserError(f"need 0 < sigma_min < sigma_max < inf, not {sigma_min} and {sigma_max}")
    if rho <= 0:
        raise UserError(f"rho must be positive, not {rho}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    levels[0] = sigma_max
    if steps > 1:
        levels[-1] = sigma_min  # exactly, whatever the rounding of the powers
    return levels
