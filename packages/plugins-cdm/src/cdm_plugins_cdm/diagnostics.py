"""Is the density really a density? What the noise levels say of it.

Nothing in the method normalises: the likelihood of Yadin et al. 2024, theorem 3.2, is exact for the optimal
classifier only, and a trained one can report any number, even less than the entropy of the data. These checks
bound how far it may be from the truth:

- mean posterior: over x from the mixture of all levels, E[p(t | x)] must be the prior p(t), uniform here; the
  constants that make it so move the log-density by `recalibrated_log_density` nats;
- adjacent ratio: over x ~ p_{t+1}, E[exp(F_t - F_{t+1})] must be p(t) / p(t+1) = 1 for every pair;
- continuity: -log p_t(x_t) must fall with the noise and tend to the clean level's (Theorem 3.2 at any t);
- normaliser: log of the integral of the model's density, by annealed importance sampling (Neal 2001) from the
  reference N(0, I) through the model's own levels. E[log of the estimate] <= log Z: a stochastic lower bound.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdm_core.random import Draws, fold

if TYPE_CHECKING:
    from cdm_plugins_cdm.model import NoiseLevelClassifier

BATCH = 256
LOWEST = 16  # noise levels above the clean one that are looked at one by one
PARTICLES = 128


def by_noise(model: NoiseLevelClassifier) -> list[int]:
    """Level indices from the clean end to the reference, whichever way the path counts."""
    levels = range(len(model.path.sigma))
    return list(levels if model.path.clean < model.reference else reversed(levels))


@torch.no_grad()
def noised_logits(model: NoiseLevelClassifier, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """F at x_t = alpha_t x0 + sigma_t noise, (N, K) float32.

    x0, noise (N, C, H, W) float32; level (N,) int64 level index.
    """
    parts = zip(x0.split(BATCH), level.split(BATCH), noise.split(BATCH), strict=True)
    return torch.cat([model.noise_level_logits(model.path.noised(x, t, e)) for x, t, e in parts])


def level_logits(model: NoiseLevelClassifier, x0: Tensor, draws: Draws, per_level: int = 8) -> Tensor:
    """F by true level, (K, per_level, K) float32: each level sees `per_level` images of x0, taken in turn."""
    levels = torch.arange(len(model.path.sigma), device=x0.device)
    rows = []
    for part in levels.split(max(1, BATCH // per_level)):
        level = part.repeat_interleave(per_level)
        images = x0[(torch.arange(len(level), device=x0.device) + int(part[0]) * per_level) % len(x0)]
        noise = Draws(fold(draws.seed, "level logits", int(part[0])), len(level), device=x0.device)
        logits = noised_logits(model, images, level, noise.normal(*x0.shape[1:]))
        rows.append(logits.unflatten(0, (-1, per_level)))
    return torch.cat(rows)


def confusion(logits: Tensor) -> Tensor:
    """Mean posterior p(t' | x_t) by true level t, (K, K) float32, of `level_logits`; rows sum to 1."""
    return logits.softmax(2).mean(1)


def recalibration(logits: Tensor, most: int = 200, tolerance: float = 1e-3) -> Tensor:
    """The constants b (K,) for which F + b has the prior as its mean posterior, those of least cross-entropy.

    logits: of `level_logits`. The log-density moves by b_clean - b_reference when they are added.
    """
    flat = logits.flatten(0, 1)
    b = torch.zeros_like(flat[0])
    for _ in range(most):  # each round lowers the cross-entropy: its derivative in b is mean - 1 / K
        excess = torch.log((flat + b).softmax(1).mean(0) * len(b))
        b = b - excess
        if excess.abs().max() < tolerance:
            break
    return b


def nats_by_level(model: NoiseLevelClassifier, x0: Tensor, draws: Draws, levels: list[int]) -> Tensor:
    """Mean of -log p_t(x_t) / d in variance-exploding units, (L,) float32: it rises with the noise."""
    values = []
    for t in levels:
        level = torch.full((len(x0),), t, device=x0.device)
        x, sigma = model.path.to_ve(model.path.noised(x0, level, draws.normal(*x0.shape[1:])), level)
        parts = zip(x.split(BATCH), sigma.float().split(BATCH), strict=True)
        with torch.no_grad():
            nats = torch.cat(
                [model.log_density(a, None, s if t != model.path.clean else None) for a, s in parts]
            )
        values.append(-nats.mean() / x0[0].numel())
    return torch.stack(values)


def adjacent_log_ratios(
    model: NoiseLevelClassifier, x0: Tensor, draws: Draws, cleaner: list[int], noisier: list[int]
) -> Tensor:
    """log E_{x ~ p_noisier}[exp(F_cleaner - F_noisier)] for each pair, (pairs,) float64; 0 if calibrated."""
    values = []
    for a, b in zip(cleaner, noisier, strict=True):
        level = torch.full((len(x0),), b, device=x0.device)
        logits = noised_logits(model, x0, level, draws.normal(*x0.shape[1:])).double()
        values.append(torch.logsumexp(logits[:, a] - logits[:, b], 0) - math.log(len(x0)))
    return torch.stack(values)


@torch.no_grad()
def level_errors(
    model: NoiseLevelClassifier, x0: Tensor, draws: Draws, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the noise estimate and its standard error, by level: two (L,) float32.

    x0 (N, C, H, W): every image at every level of `levels` (L,) int64, clean and reference levels excluded.
    The curve of the paper's figure 4.
    """
    means, errors = [], []
    for t in levels.tolist():
        noise = draws.normal(*x0.shape[1:])
        level = torch.full((len(x0),), t, device=x0.device)
        x_t = model.path.noised(x0, level, noise)
        x, sigma = model.path.to_ve(x_t, level)
        denoised = torch.cat(
            [model.denoise(a, s) for a, s in zip(x.split(BATCH), sigma.float().split(BATCH), strict=True)]
        )
        square = ((x - denoised) / sigma.float()[:, None, None, None] - noise).square().flatten(1).mean(1)
        means.append(square.mean())
        errors.append(square.std() / len(square) ** 0.5)
    return torch.stack(means), torch.stack(errors)


@dataclass(frozen=True)
class Normaliser:
    """An estimate of log Z, the log of the integral of the model's clean density."""

    log_z: float  # nats
    standard_error: float  # nats, over independent groups of particles
    effective_share: float  # effective sample size of the weights / particles
    acceptance: float  # mean acceptance of the Metropolis steps


def log_densities(model: NoiseLevelClassifier, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """log p_t(x) + (d / 2) log 2 pi at every level (N, K); the gradient at `level` (N, C, H, W)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model.noise_level_logits(x)
        log_p = logits - logits[:, [model.reference]] - x.square().flatten(1).sum(1, keepdim=True) / 2
        (grad,) = torch.autograd.grad(log_p[:, level].sum(), x)
    return log_p.detach(), grad


def annealed_log_normaliser(
    model: NoiseLevelClassifier, shape: torch.Size, draws: Draws, *, levels: int = 250
) -> Normaliser:
    """log Z of the model's clean density by annealed importance sampling (Neal 2001).

    `draws.total` particles start from N(0, I), whose normaliser is known, and visit `levels` of the model's
    noise levels, with one Metropolis-adjusted Langevin step at each. The step follows the acceptance.
    """
    order = by_noise(model)[::-1]
    visits = sorted({round(i * (len(order) - 1) / (levels - 1)) for i in range(levels)})
    x = draws.normal(*shape)
    log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    size, accepted = 0.5, []
    log_p, grad = log_densities(model, x, order[0])
    for before, after in itertools.pairwise(visits):
        level = order[after]
        log_w += (log_p[:, level] - log_p[:, order[before]]).double()
        log_p, grad = log_densities(model, x, level)
        if after == visits[-1]:
            break  # the clean level is only weighed: no step is taken there
        step = size * float(model.path.sigma[level]) ** 2
        ahead = x + step * grad + math.sqrt(2 * step) * draws.normal(*shape)
        log_q, grad_q = log_densities(model, ahead, level)
        forth = (ahead - x - step * grad).square().flatten(1).sum(1) / (4 * step)
        back = (x - ahead - step * grad_q).square().flatten(1).sum(1) / (4 * step)
        accept = draws.uniform().log() < log_q[:, level] - log_p[:, level] + forth - back
        keep = accept[:, None, None, None]
        x, log_p = torch.where(keep, ahead, x), torch.where(accept[:, None], log_q, log_p)
        accepted.append(accept.float().mean().item())
        size *= math.exp(0.2 * (accepted[-1] - 0.574))  # the optimal acceptance of Langevin proposals
    return _summary(log_w, sum(accepted) / len(accepted))


def _summary(log_w: Tensor, acceptance: float, groups: int = 8) -> Normaliser:
    log_z = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    parts = torch.stack([torch.logsumexp(part, 0) - math.log(len(part)) for part in log_w.chunk(groups)])
    weights = log_w.softmax(0)
    effective = 1 / (weights.square().sum() * len(weights))
    return Normaliser(log_z.item(), (parts.std() / groups**0.5).item(), effective.item(), acceptance)


def likelihood_diagnostics(model: NoiseLevelClassifier, x0: Tensor, draws: Draws) -> dict[str, float]:
    """The checks of this module as named figures; x0 (N, C, H, W) float32 held-out images in model units."""
    order, dim = by_noise(model), x0[0].numel()
    logits = level_logits(model, x0, draws)
    posterior = confusion(logits)
    mean = posterior.mean(0) * len(posterior)
    shift = recalibration(logits)
    ratios = adjacent_log_ratios(model, x0, draws, order[:LOWEST], order[1 : LOWEST + 1])
    shown = [0, *(2**i for i in range(LOWEST.bit_length()))]
    nats = nats_by_level(model, x0, draws, [order[i] for i in shown])
    particles = Draws(fold(draws.seed, "annealing"), PARTICLES, device=x0.device)
    normaliser = annealed_log_normaliser(model, x0.shape[1:], particles)
    return {
        "level_accuracy": posterior.diagonal().mean().item(),
        "mean_posterior_tv": (mean - 1).abs().mean().item() / 2,
        "mean_posterior_clean": mean[order[0]].item(),
        "recalibrated_log_density": (shift[model.path.clean] - shift[model.reference]).item(),
        "adjacent_log_ratio_first": ratios[0].item(),
        "adjacent_log_ratio_worst": ratios[ratios.abs().argmax()].item(),
        "adjacent_log_ratio_sum": ratios.sum().item(),
        **{f"nats_per_dim_level_{i}": value for i, value in zip(shown, nats.tolist(), strict=True)},
        "log_normaliser": normaliser.log_z,
        "log_normaliser_standard_error": normaliser.standard_error,
        "log_normaliser_effective_share": normaliser.effective_share,
        "log_normaliser_bits_per_dim": normaliser.log_z / (dim * math.log(2)),
    }
