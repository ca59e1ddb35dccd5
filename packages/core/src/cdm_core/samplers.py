"""Samplers: plain functions from a denoiser and a grid of noise levels to samples.

Each is `sampler(denoise, x, sigmas, *, noise=None, callback=None, **options) -> x0`:

- denoise(x, sigma): E[x0 | x] where x = x0 + sigma n; x (B, ...), sigma (B,) of x's dtype, in data units.
- x: (B, ...), the start at level sigmas[0], x0 + sigmas[0] n or pure noise of that size. float32 or float64.
- sigmas: (N,) float64, descending, > 0. The samplers append 0, so the last step returns the denoiser's x0.
- noise(x): standard normal numbers like x; asked once a step by samplers that use any (at the last step too,
  where they come to nothing). None: `torch.randn_like`.
- callback(step, total, x, x0): once a step, from step 0; x is the state and x0 what was predicted from it.

They run under `torch.no_grad`, never `inference_mode`: a denoiser may need autograd inside.
Formulas are in the variance-exploding currency, lambda = -log sigma; a published formula in (alpha, sigma)
becomes one of these when x_t is divided by alpha_t. A step goes from level t to level s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cdm_core.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step, the last one to 0; Python floats: coefficients are float64."""
    levels = [*sigmas.tolist(), 0.0]
    if len(levels) < 2 or any(not t > s for t, s in pairwise(levels)) or math.isinf(levels[0]):
        raise UserError("sigmas must be finite, positive and descending, at least one of them")
    return list(pairwise(levels))


def _predict(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, x.new_full((len(x),), sigma))


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); order 1. eta=0 deterministic, eta=1 ancestral (`ddpm`, small).

    Published fresh noise eta sqrt((1-a_s)/(1-a_t)) sqrt(1 - a_t/a_s), over sqrt(a_s), is the `fresh` below.
    """
    steps = _steps(sigmas)
    for i, (t, s) in enumerate(steps):
        x0 = _predict(denoise, x, t)
        if callback:
            callback(i, len(steps), x, x0)
        fresh = eta * s * math.sqrt(1 - (s / t) ** 2)
        x = x0 + math.sqrt(s**2 - fresh**2) / t * (x - x0)
        if eta > 0:
            x = x + fresh * (noise or torch.randn_like)(x)
    return x


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    variance: Literal["small", "large"] = "small",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_s from q(x_s | x_t, x0), on any subset of levels.

    variance: of x_s given x_t, "small" as if the data were a point (beta~_t, what q has), "large" as if they
    were N(0, I) (beta_t): the two ends of Ho et al. section 3.2, with the betas of the levels visited.
    """
    if variance not in ("small", "large"):
        raise UserError(f"variance must be 'small' or 'large', not {variance!r}")
    steps = _steps(sigmas)
    for i, (t, s) in enumerate(steps):
        x0 = _predict(denoise, x, t)
        if callback:
            callback(i, len(steps), x, x0)
        ratio = (s / t) ** 2
        spread = s**2 * (1 - ratio) if variance == "small" else (1 + s**2) * (t**2 - s**2) / (1 + t**2)
        x = x0 + ratio * (x - x0)
        fresh = (noise or torch.randn_like)(x)
        if s > 0:
            x = x + math.sqrt(spread) * fresh
    return x


@torch.no_grad()
def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver, multistep, noise prediction (Lu et al. 2022); order 2, one prediction a step.

    The solver that Yadin et al. 2024 sample with: exponential Adams-Bashforth in lambda on m = E[n | x],
    x_s = x - s (e^h - 1) m - s (e^h - h - 1) (m - m_before) / h_before. First step DDIM, last step x0.
    """
    steps = _steps(sigmas)
    before, h_before = None, 0.0
    for i, (t, s) in enumerate(steps):
        x0 = _predict(denoise, x, t)
        if callback:
            callback(i, len(steps), x, x0)
        if s == 0:
            break
        m, h = (x - x0) / t, math.log(t / s)
        x = x - s * math.expm1(h) * m
        if before is not None:
            x = x - s * (math.expm1(h) - h) / h_before * (m - before)
        before, h_before = m, h
    return x0


@torch.no_grad()
def dpm_solver_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): data prediction; order 2, one prediction a step.

    x_s = (s/t) x + (1 - s/t) (x0 + h / (2 h_before) (x0 - x0_before)). First step DDIM, last step x0.
    """
    steps = _steps(sigmas)
    before, h_before = None, 0.0
    for i, (t, s) in enumerate(steps):
        x0 = _predict(denoise, x, t)
        if callback:
            callback(i, len(steps), x, x0)
        if s == 0:
            break
        h = math.log(t / s)
        ahead = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
        x = ahead + s / t * (x - ahead)
        before, h_before = x0, h
    return x0


def _churn(
    x: Tensor, t: float, total: int, noise: Noise | None, options: tuple[float, float, float, float]
) -> tuple[Tensor, float]:
    """Raise x from level t to t_hat with fresh noise (Karras et al. 2022, algorithm 2, lines 4-6)."""
    churn, churn_min, churn_max, churn_noise = options
    if churn == 0:
        return x, t
    gamma = min(churn / total, math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0.0
    t_hat = t + gamma * t
    fresh = (noise or torch.randn_like)(x)
    return x + math.sqrt(t_hat**2 - t**2) * churn_noise * fresh, t_hat


@torch.no_grad()
def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Euler on dx/dsigma = (x - D) / sigma with EDM's churn (Karras et al. 2022); order 1.

    Without churn this is DDIM with eta=0: in this currency the two are one formula.
    """
    steps = _steps(sigmas)
    for i, (t, s) in enumerate(steps):
        x, t_hat = _churn(x, t, len(steps), noise, (churn, churn_min, churn_max, churn_noise))
        x0 = _predict(denoise, x, t_hat)
        if callback:
            callback(i, len(steps), x, x0)
        x = x0 + s / t_hat * (x - x0)
    return x


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """EDM's sampler (Karras et al. 2022, algorithm 2): Heun with churn; order 2.

    Two predictions a step, one at the last.
    """
    steps = _steps(sigmas)
    for i, (t, s) in enumerate(steps):
        x, t_hat = _churn(x, t, len(steps), noise, (churn, churn_min, churn_max, churn_noise))
        x0 = _predict(denoise, x, t_hat)
        if callback:
            callback(i, len(steps), x, x0)
        x_s = x0 + s / t_hat * (x - x0)
        if s > 0:
            slope, slope_s = (x - x0) / t_hat, (x_s - _predict(denoise, x_s, s)) / s
            x_s = x + (s - t_hat) / 2 * (slope + slope_s)
        x = x_s
    return x
