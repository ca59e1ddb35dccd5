"""Samplers: plain functions from a denoiser and a grid of noise levels to samples.

Each is `sampler(denoise, x, sigmas, *, noise=None, callback=None, **options) -> x0`:

- denoise(x, sigma): E[x0 | x] where x = x0 + sigma n; x (B, ...), sigma (B,) of x's dtype, in data units.
- x: (B, ...), the start at level sigmas[0], x0 + sigmas[0] n or pure noise of that size. float32 or float64.
- sigmas: (N,) float64, descending, > 0. The samplers append 0, so the last step returns the denoiser's x0.
- noise(x): standard normal numbers like x; asked once a step by samplers that use any (at the last step too,
  where they come to nothing). None: `torch.randn_like`.
- callback(step, total, x, x0): once a step, from step 0; x is the state and x0 what was predicted from it.

A `Conditional`, which `denoise` may be, is asked in the light of the step: `predict(x, step)` instead of the
call, and `begin(x, step)` for the state that a step sets out from.

They run under `torch.no_grad`, never `inference_mode`: a denoiser may need autograd inside.
Formulas are in the variance-exploding currency, lambda = -log sigma; a published formula in (alpha, sigma)
becomes one of these when x_t is divided by alpha_t. A step goes from level t to level s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cdm_core.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]


class Step(NamedTuple):
    """What a prediction is for: step `number` of `total`, from level `sigma` to level `next` (0 at the last).

    Levels are noise std in data units, Python floats. correction: x is at level `next` already, and the
    prediction is the second one of a step of Heun's. grid: the levels of the whole walk, the last one 0;
    step i goes from grid[i], before any churn, to grid[i + 1].
    """

    number: int
    total: int
    sigma: float
    next: float
    correction: bool = False
    grid: tuple[float, ...] = ()

    @property
    def level(self) -> float:
        """The noise std of the x that comes with it."""
        return self.next if self.correction else self.sigma

    @property
    def small(self) -> float:
        """Variance of x_next given x and x0, in VE units: beta~ / alpha_next^2 (Ho et al. 2020, eq. 7)."""
        return self.next**2 * (1 - (self.next / self.sigma) ** 2)

    @property
    def large(self) -> float:
        """Variance of x_next given x for N(0, I) data, in VE units: beta / alpha_next^2 of a VP path."""
        return (1 + self.next**2) * (self.sigma**2 - self.next**2) / (1 + self.sigma**2)


class Prediction(NamedTuple):
    """x0 (B, ...): E[x0 | x]. variance (B, ...) or None: the learned one of the ancestral step.

    In [0, 1]: log variance = v log(large) + (1 - v) log(small) (Nichol & Dhariwal 2021, eq. 15).
    """

    x0: Tensor
    variance: Tensor | None = None


class Conditional:
    """What a sampler calls: `model.denoise` for the classes y (B,) int64, or None, and all that it may offer.

    Optional methods of a model: `predict(x, sigma, y) -> Prediction`, where it has learned its variance;
    `predict_step(x, step, y) -> Prediction` and `begin_step(x, step, y) -> x`, where it must know the step.
    """

    def __init__(self, model: Any, y: Tensor | None = None) -> None:
        self.model, self.y = model, y

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x, y]; x (B, ...), sigma (B,)."""
        return self.model.denoise(x, sigma, self.y)

    def predict(self, x: Tensor, step: Step) -> Prediction:
        """E[x0 | x, y] for a step, and the learned variance where there is one."""
        if hasattr(self.model, "predict_step"):
            return self.model.predict_step(x, step, self.y)
        return predicted(self.model, x, x.new_full((len(x),), step.level), self.y)

    def begin(self, x: Tensor, step: Step) -> Tensor:
        """The state that the step sets out from."""
        return self.model.begin_step(x, step, self.y) if hasattr(self.model, "begin_step") else x


def predicted(model: Any, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
    """What `model` says of x (B, ...) at level sigma (B,): its `predict` where it has one, else `denoise`."""
    if hasattr(model, "predict"):
        return model.predict(x, sigma, y)
    return Prediction(model.denoise(x, sigma, y))


def steps_over(sigmas: Tensor) -> list[Step]:
    """The steps of a sampler over the levels sigmas (N,), the last one to 0; UserError on levels of no walk.

    Their levels are Python floats: coefficients are float64.
    """
    levels = [*sigmas.tolist(), 0.0]
    if len(levels) < 2 or any(not t > s for t, s in pairwise(levels)) or math.isinf(levels[0]):
        raise UserError("sigmas must be finite, positive and descending, at least one of them")
    return [Step(i, len(levels) - 1, t, s, grid=tuple(levels)) for i, (t, s) in enumerate(pairwise(levels))]


def predict_at(denoise: Denoise, x: Tensor, step: Step) -> Prediction:
    """What `denoise` says of x for a step, told of the step where it wants to be."""
    if isinstance(denoise, Conditional):
        return denoise.predict(x, step)
    return Prediction(denoise(x, x.new_full((len(x),), step.level)))


def begin_at(denoise: Denoise, x: Tensor, step: Step) -> Tensor:
    """The state that a step sets out from: x, unless `denoise` moves it."""
    return denoise.begin(x, step) if isinstance(denoise, Conditional) else x


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
    steps = steps_over(sigmas)
    for step in steps:
        i, total, t, s, *_ = step
        x = begin_at(denoise, x, step)
        x0 = predict_at(denoise, x, step).x0
        if callback:
            callback(i, total, x, x0)
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
    variance: Literal["auto", "small", "large", "learned"] = "auto",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_s from q(x_s | x_t, x0), on any subset of levels.

    variance: of x_s given x_t, "small" as if the data were a point (beta~_t, what q has), "large" as if they
    were N(0, I) (beta_t): the two ends of Ho et al. section 3.2, with the betas of the levels visited;
    "learned" between the two, as a model has learned it; "auto" learned where it was, else small.
    """
    if variance not in ("auto", "small", "large", "learned"):
        raise UserError(f"variance must be 'auto', 'small', 'large' or 'learned', not {variance!r}")
    steps = steps_over(sigmas)
    for step in steps:
        i, total, t, s, *_ = step
        x = begin_at(denoise, x, step)
        x0, learned = predict_at(denoise, x, step)
        if callback:
            callback(i, total, x, x0)
        x = x0 + (s / t) ** 2 * (x - x0)
        fresh = (noise or torch.randn_like)(x)
        if s > 0:
            x = x + _spread(step, learned, variance) * fresh
    return x


def _spread(step: Step, learned: Tensor | None, variance: str) -> Tensor | float:
    """Standard deviation of an ancestral step's fresh noise."""
    if variance == "learned" and learned is None:
        raise UserError("variance 'learned': this model has not learned one; use 'small' or 'large'")
    if learned is None or variance not in ("auto", "learned"):
        return math.sqrt(step.large if variance == "large" else step.small)
    return math.sqrt(step.small) * (learned * (math.log(step.large / step.small) / 2)).exp()


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
    steps = steps_over(sigmas)
    before, h_before = None, 0.0
    for step in steps:
        i, total, t, s, *_ = step
        x = begin_at(denoise, x, step)
        x0 = predict_at(denoise, x, step).x0
        if callback:
            callback(i, total, x, x0)
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
    steps = steps_over(sigmas)
    before, h_before = None, 0.0
    for step in steps:
        i, total, t, s, *_ = step
        x = begin_at(denoise, x, step)
        x0 = predict_at(denoise, x, step).x0
        if callback:
            callback(i, total, x, x0)
        if s == 0:
            break
        h = math.log(t / s)
        ahead = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
        x = ahead + s / t * (x - ahead)
        before, h_before = x0, h
    return x0


def _churn(
    x: Tensor, step: Step, noise: Noise | None, options: tuple[float, float, float, float]
) -> tuple[Tensor, Step]:
    """Raise x from level t to t_hat with fresh noise (Karras et al. 2022, algorithm 2, lines 4-6)."""
    churn, churn_min, churn_max, churn_noise = options
    if churn == 0:
        return x, step
    t = step.sigma
    gamma = min(churn / step.total, math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0.0
    t_hat = t + gamma * t
    fresh = (noise or torch.randn_like)(x)
    return x + math.sqrt(t_hat**2 - t**2) * churn_noise * fresh, step._replace(sigma=t_hat)


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
    steps = steps_over(sigmas)
    for step in steps:
        x = begin_at(denoise, x, step)
        x, step = _churn(x, step, noise, (churn, churn_min, churn_max, churn_noise))
        i, total, t_hat, s, *_ = step
        x0 = predict_at(denoise, x, step).x0
        if callback:
            callback(i, total, x, x0)
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
    steps = steps_over(sigmas)
    for step in steps:
        x = begin_at(denoise, x, step)
        x, step = _churn(x, step, noise, (churn, churn_min, churn_max, churn_noise))
        i, total, t_hat, s, *_ = step
        x0 = predict_at(denoise, x, step).x0
        if callback:
            callback(i, total, x, x0)
        x_s = x0 + s / t_hat * (x - x0)
        if s > 0:
            slope, slope_s = (
                (x - x0) / t_hat,
                (x_s - predict_at(denoise, x_s, step._replace(correction=True)).x0) / s,
            )
            x_s = x + (s - t_hat) / 2 * (slope + slope_s)
        x = x_s
    return x
