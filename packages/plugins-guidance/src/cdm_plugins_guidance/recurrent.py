"""Recurrence, or time travel: each step taken several times, with fresh noise in between.

Universal guidance (Bansal et al. 2023, arXiv 2302.07121, section 3.3) and FreeDoM (Yu et al. 2023, arXiv
2303.09833, section 4.3): guidance that fights the denoiser gets several chances to agree with it at a level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.samplers import Callback, Denoise, Noise, begin_at, predict_at, steps_over


@torch.no_grad()
def recurrent(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    repeats: int = 4,
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
    eta: float = 0.0,
) -> Tensor:
    """DDIM whose steps from levels t in [sigma_min, sigma_max] are each taken `repeats` times.

    Between two goes at a step the state is noised back, x_t = x_s + sqrt(t^2 - s^2) n: published as x_t =
    sqrt(a_t / a_s) x_s + sqrt(1 - a_t / a_s) n. callback: once a step, at its last go.
    """
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, not {repeats}")
    draw = noise or torch.randn_like
    for step in steps_over(sigmas):
        i, total, t, s, *_ = step
        goes = repeats if sigma_min <= t <= sigma_max else 1
        fresh = eta * s * math.sqrt(1 - (s / t) ** 2)
        for go in range(goes):
            x = begin_at(denoise, x, step)
            x0 = predict_at(denoise, x, step).x0
            if callback and go == goes - 1:
                callback(i, total, x, x0)
            x = x0 + math.sqrt(s**2 - fresh**2) / t * (x - x0)
            if eta > 0:
                x = x + fresh * draw(x)
            if go < goes - 1:
                x = x + math.sqrt(t**2 - s**2) * draw(x)
    return x
