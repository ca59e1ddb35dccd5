"""Noise levels of EDM's four preconditionings, the grids on which it samples, and its solvers in time.

Karras et al. 2022, table 1. A path x_t = s(t) (x0 + sigma(t) n) is the variance-exploding x = x_t / s with a
clock: which levels a sampler visits is one choice (`edm_grid`), and in what variable a step is straight is
another. The samplers of core are straight in sigma, which is what the paper recommends; `solve_in_time` is
straight in the time of the paths `vp` and `ve`, as these were sampled before.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cdm_core import schedules
from cdm_core.errors import UserError
from cdm_core.samplers import Denoise

GridName = Literal["edm", "vp", "ve", "iddpm"]

BETA_D, BETA_MIN = 19.9, 0.1  # of the published path `vp`
FIRST_TIME = 1e-3  # at which sampling on the path `vp` ends


def vp_sigma(t: Tensor, beta_d: float = BETA_D, beta_min: float = BETA_MIN) -> Tensor:
    """sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1): noise of the path `vp` at times t, VE units."""
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, beta_d: float = BETA_D, beta_min: float = BETA_MIN) -> Tensor:
    """The inverse of `vp_sigma`, with no difference of near numbers at low noise."""
    log = torch.log1p(sigma**2)
    return 2 * log / ((beta_min**2 + 2 * beta_d * log).sqrt() + beta_min)


def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> Tensor:
    """(M + 1,) float64, descending to 0: iDDPM's cosine schedule (Nichol & Dhariwal 2021).

    u_M = 0, u_{j-1}^2 = (u_j^2 + 1) / max(a_{j-1} / a_j, C_1) - 1, a_j = sin^2(pi j / (2 M (C_2 + 1))).
    """
    a = torch.sin(torch.arange(M + 1, dtype=torch.float64) * math.pi / (2 * M * (C_2 + 1))) ** 2
    log_ratio = (a[:-1] / a[1:]).clamp(min=C_1).log()
    # u_j^2 + 1 is the product of 1 / ratio over the steps after j; expm1 keeps its digits at low noise.
    return torch.cat([torch.expm1(-log_ratio.flip(0).cumsum(0)).sqrt().flip(0), a.new_zeros(1)])


# -- grids ---------------------------------------------------------------------------------------------------


class Limited(Protocol):
    """What a grid asks of a model."""

    @property
    def limits(self) -> tuple[float, float]:
        """Least and most noise that it takes, VE units."""
        ...

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The levels nearest to sigma (N,) at which it denoises."""
        ...


def edm_grid(kind: GridName, steps: int, model: Limited) -> Tensor:
    """The published noise levels of a sampler, (steps,) float64, descending, rounded to those of `model`.

    `vp` is uniform in that path's time, `ve` in log sigma, `iddpm` in the index of its levels, `edm` in
    sigma^(1/7). Each between its published ends, as far as the model takes them. UserError for fewer than 2
    steps.
    """
    if steps < 2:
        raise UserError(f"the grid {kind!r} needs at least 2 steps, not {steps}")
    low, high = _ends(kind, model)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "vp":
        levels = vp_sigma(1 + ramp * (FIRST_TIME - 1), *vp_betas(model))
    elif kind == "ve":
        levels = high * (low / high) ** ramp
    elif kind == "iddpm":
        every = iddpm_levels()
        every = every[(every >= low) & (every <= high)]
        levels = every[(ramp * (len(every) - 1)).round().long()]
    else:
        levels = schedules.rho_grid(low, high, steps)
    return model.round_sigma(levels)


def _ends(kind: GridName, model: Limited) -> tuple[float, float]:
    if kind == "vp":
        low, high = vp_sigma(torch.tensor([FIRST_TIME, 1.0], dtype=torch.float64)).tolist()
    else:
        low, high = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}[kind]
    return max(low, model.limits[0]), min(high, model.limits[1])


def vp_betas(model: Limited) -> tuple[float, float]:
    """beta_d and beta_min of the path whose noise at FIRST_TIME and at time 1 is that of the grid `vp`."""
    low, high = _ends("vp", model)
    early, late = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (late - early / FIRST_TIME) / (1 - FIRST_TIME)
    return beta_d, late - beta_d / 2


# -- solvers in time -----------------------------------------------------------------------------------------


class _Moment(NamedTuple):
    """A path at a time: sigma, its derivative, the scale s and the derivative of its logarithm."""

    time: float
    sigma: float
    rate: float
    scale: float
    scale_rate: float

    def slope(self, x: Tensor, x0: Tensor) -> Tensor:
        """d(s x)/dt = s (sigma'/sigma (x - x0) + s'/s x), from VE x and the prediction x0."""
        return self.scale * (self.rate / self.sigma * (x - x0) + self.scale_rate * x)


@torch.no_grad()
def solve_in_time(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    betas: tuple[float, float] | None = None,
    order: Literal[1, 2] = 2,
) -> Tensor:
    """Euler (order 1) or Heun in the time of a path, ending at time 0 (Karras et al. 2022, eq. 4, alg. 1).

    denoise(x, sigma): E[x0 | x]; x (B, ...) VE units at level sigmas[0]; sigmas (N,) float64, descending,
    > 0; betas: those of the path `vp` (`vp_betas`), None: the path `ve`. Returns (B, ...), VE units. Not one
    of the samplers to choose from: its last step is no prediction of the denoiser.
    """
    moments = [_moment(sigma, betas) for sigma in [*sigmas.tolist(), 0.0]]

    def slope(x: Tensor, now: _Moment) -> Tensor:
        return now.slope(x, denoise(x, x.new_full((len(x),), now.sigma)))

    for now, then in pairwise(moments):
        step, first = then.time - now.time, slope(x, now)
        ahead = (now.scale * x + step * first) / then.scale
        if order == 2 and then.sigma > 0:
            ahead = (now.scale * x + step / 2 * (first + slope(ahead, then))) / then.scale
        x = ahead
    return x


def _moment(sigma: float, betas: tuple[float, float] | None) -> _Moment:
    if sigma == 0:
        return _Moment(0.0, 0.0, math.inf, 1.0, 0.0)
    if betas is None:  # sigma = sqrt(t), s = 1
        return _Moment(sigma**2, sigma, 0.5 / sigma, 1.0, 0.0)
    time = float(vp_time(torch.tensor(sigma, dtype=torch.float64), *betas))
    beta_d, beta_min = betas
    rate = (beta_min + beta_d * time) / 2 * (sigma + 1 / sigma)
    return _Moment(time, sigma, rate, (1 + sigma**2) ** -0.5, -sigma * rate / (1 + sigma**2))
