"""The likelihood bound of a denoiser: what an ancestral sampler, a normalised density, guarantees.

With x_i = x0 + sigma_i n and sigma_1 < ... < sigma_N, the posterior q(x_{i-1} | x_i, x0) is a Gaussian with
mean x0 + r (x_i - x0) and variance v_i = sigma_{i-1}^2 (1 - r), r = (sigma_{i-1} / sigma_i)^2. The chain that
starts at N(0, s^2 I), moves with x0 replaced by D(x_i, sigma_i) and a variance w_i, and ends with
N(D(x_1), w_1 I) has (Ho et al. 2020, equation 5, in the variance-exploding form)

    -log p(x0) <= KL(N(x0, sigma_N^2) | N(0, s^2)) - E log N(x0; D(x_1), w_1)
                  + sum_{i >= 2} E 1/2 [d (v_i / w_i - 1 + log(w_i / v_i)) + (1 - r)^2 |x0 - D(x_i)|^2 / w_i].

It holds for any function D and any w: it is the figure to hold a one-pass density against, which nothing
normalises. The best w_i is v_i + (1 - r)^2 E |x0 - D(x_i)|^2 / d (Bao et al. 2022, Analytic-DPM); here the
expectation comes from the other half of the images, so that no image has a say in its own score.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cdm_core.random import Draws


@torch.no_grad()
def elbo(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    sigmas: Tensor,
    start: float,
    draws: Draws,
    *,
    pairs: int = 32,
) -> Tensor:
    """An unbiased estimate of the lower bound of log p(x0) in nats, (B,) float64; B at least 2.

    denoise: (x, sigma (B,)) -> E[x0 | x, sigma]; x0 (B, C, H, W) float32 clean images in model units;
    sigmas (N,) float64 ascending, > 0: the levels of the chain, data units; start: s, the std of its first
    state; pairs: (level, noise) pairs an image, at least 2. The sum over levels is estimated from strata of
    equal length in log sigma, where its terms are nearly equal; `draws` has one row an image.
    """
    if pairs < 2 or len(x0) < 2:
        raise ValueError(f"the bound needs at least 2 pairs and 2 images, not {pairs} and {len(x0)}")
    sigmas = sigmas.to(x0.device, torch.float64)
    dim = x0[0].numel()
    ratio = (sigmas[-1] / start) ** 2
    prior = 0.5 * (dim * (ratio - 1 - ratio.log()) + x0.double().square().flatten(1).sum(1) / start**2)
    error, expected = _errors(denoise, x0, sigmas[0].expand(len(x0)), draws)
    bound = -prior - 0.5 * (error / expected + dim * (2 * math.pi * expected).log())
    edges = (sigmas / sigmas[0]).log()  # level i >= 2 owns (edges[i-1], edges[i])
    for stratum in range(pairs - 1):
        place = (stratum + draws.uniform().double()) / (pairs - 1) * edges[-1]
        level = torch.bucketize(place, edges).clamp(1, len(sigmas) - 1)
        probability = (edges[level] - edges[level - 1]) / edges[-1]
        error, expected = _errors(denoise, x0, sigmas[level], draws)
        r = (sigmas[level - 1] / sigmas[level]) ** 2
        v = sigmas[level - 1] ** 2 * (1 - r)
        w = v + (1 - r) ** 2 * expected
        step = 0.5 * (dim * (v / w - 1 + (w / v).log()) + (1 - r) ** 2 * error / w)
        bound -= step / probability / (pairs - 1)
    return bound


def _errors(
    denoise: Callable[[Tensor, Tensor], Tensor], x0: Tensor, sigma: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """|x0 - D(x0 + sigma n)|^2 and what to expect of it a dimension, both (B,) float64; sigma (B,) float64.

    Expected is the mean of the other half (rows of the other parity), as a share of sigma^2.
    """
    noise = draws.normal(*x0.shape[1:]).to(x0.dtype)
    level = sigma.to(x0.dtype)
    x = x0 + level[:, None, None, None] * noise
    error = (x0 - denoise(x, level)).double().square().flatten(1).sum(1)
    share = error / sigma**2 / x0[0].numel()
    odd = torch.arange(len(x0), device=x0.device) % 2 == 1
    expected = torch.where(odd, share[~odd].mean(), share[odd].mean())
    return error, expected * sigma**2
