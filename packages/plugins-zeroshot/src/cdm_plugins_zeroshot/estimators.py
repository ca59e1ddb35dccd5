"""Errors of eps that tell classes apart: which (level, noise) pairs, which loss, which weight.

With x = x0 + sigma n the error of eps is r = (x0 - D(x, sigma, y)) / sigma, and a class is scored by

    L_y = sum_t w_t E_n loss(r) ~= 1/I sum_i w_{t_i} / q_{t_i} loss(r_i),    t_i ~ q,

the loss a mean over pixels (Li et al. 2023, arXiv 2303.16203, equation 5: w uniform, loss r^2). All classes
of an image see the same pairs, as only differences count. The weight of the likelihood bound of d pixels is
w_t = d / 2 (sigma_t^2 / sigma_{t-1}^2 - 1) (Kingma et al. 2021, equation 14, variance beta~); the heuristic
exp(-7 t) (Clark & Jaini 2023, arXiv 2303.15233) is one of the error of x0, sigma^2 r^2.

Everything random is a function of (seed, image, pair): it depends on no batch, order, shard or resumption.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.random import Draws, fold
from cdm_plugins_zeroshot.zeroshot_configs import EstimatorConfig

Floats = NDArray[np.float64]


class Pairs(NamedTuple):
    """Some pairs of one image, in order."""

    level: Tensor  # (n,) int64, index into the levels, 0 the least noisy
    sigma: Tensor  # (n,) float32, VE units
    weight: Floats  # (n,) what a loss counts: a mean of weight * loss is the score
    noise: Tensor  # (n, C, H, W) float32, standard normal


def van_der_corput(count: int) -> Floats:
    """The first numbers of the base-2 sequence, 0, 1/2, 1/4, 3/4, ...: binary digits behind the point."""
    index, value, digit = np.arange(count), np.zeros(count), 0.5
    while index.any():
        value += digit * (index & 1)
        index, digit = index >> 1, digit / 2
    return value


def levels_of(model: Any, config: EstimatorConfig) -> Tensor:
    """The noise levels of a model, (N,) float64 ascending, VE units: its own, else those of `config`."""
    own: Tensor | None = getattr(model, "sigmas", None)
    if own is not None:
        return own.detach().to("cpu", torch.float64)
    ends = torch.tensor([config.sigma_min, config.sigma_max], dtype=torch.float64)
    low, high = ends.log() if config.spacing == "log" else ends
    levels = low + (high - low) * torch.linspace(0, 1, config.levels, dtype=torch.float64)
    return levels.exp() if config.spacing == "log" else levels


def elbo_weights(sigmas: Tensor, sigma_clean: float = 0.0) -> Floats:
    """1/2 (sigma_t^2 / sigma_{t-1}^2 - 1) of every level, (N,): its sum with |eps error|^2 is in nats.

    sigmas (N,) float64 ascending; sigma_clean: the level below the first, 0: none, so that its weight is 0.
    `UserError` where sigma_clean is not below the first level.
    """
    if sigma_clean and not sigma_clean < float(sigmas[0]):
        raise UserError(
            f"sigma_clean must lie below the lowest level, {float(sigmas[0]):g}, not {sigma_clean:g}"
        )
    before = np.concatenate([[sigma_clean or float(sigmas[0])], sigmas[:-1].double().numpy()])
    return 0.5 * np.expm1(2 * np.log(sigmas.double().numpy() / before))


def spread(table: tuple[float, ...], levels: int) -> Floats:
    """A step function of so many equal parts of [0, 1), at the middle of each of `levels`; (levels,)."""
    place = (np.arange(levels) + 0.5) / levels
    return np.asarray(table, dtype=np.float64)[(place * len(table)).astype(np.int64)]


class Estimator:
    """The pairs of every image, and what an error counts.

    sigmas (N,) float64 ascending, VE units; shape (C, H, W) of images; sigma_clean as in `EstimatorConfig`.
    `weights` (N,) is w_t of the levels, such that the score is its sum with the mean losses.
    """

    def __init__(
        self, config: EstimatorConfig, sigmas: Tensor, shape: tuple[int, ...], sigma_clean: float = 0.0
    ) -> None:
        self.config, self.sigmas, self.shape = config, sigmas.detach().to("cpu", torch.float64), shape
        self.sigma_clean = config.sigma_clean or sigma_clean  # 0: the chain ends at the lowest level
        self.weights = self._weights()
        self.share = self._share()  # q
        count = len(sigmas)
        even = np.arange(1, count) / count  # a sum of 1 / count would miss places on the border of two levels
        edges = even if config.importance == "uniform" else self.share.cumsum()[:-1]
        self._edges = torch.from_numpy(edges)
        self.step = 2 if config.antithetic else 1  # pairs that share a level
        self._units = config.pairs // self.step
        self._order = van_der_corput(self._units)
        if config.design in ("grid", "stratified"):
            # Ranks of the sequence: whatever the number of parts, a prefix takes them evenly, each once.
            self._order = self._order.argsort().argsort().astype(np.float64)

    @classmethod
    def of(cls, model: Any, config: EstimatorConfig, shape: tuple[int, ...]) -> Estimator:
        """For the levels of `model`."""
        return cls(config, levels_of(model, config), shape, getattr(model, "sigma_clean", 0.0))

    def _weights(self) -> Floats:
        count, kind = len(self.sigmas), self.config.weight
        if kind == "elbo":
            return int(np.prod(self.shape)) * elbo_weights(self.sigmas, self.sigma_clean)
        if kind == "heuristic":
            t = (np.arange(count) + 1) / count
            return np.exp(-self.config.rate * t) * self.sigmas.numpy() ** 2 / count
        return (spread(self.config.bins, count) if kind == "learned" else np.ones(count)) / count

    def _share(self) -> Floats:
        count = len(self.sigmas)
        if self.config.importance == "uniform":
            return np.full(count, 1 / count)
        table = self.config.importance == "table"
        share = spread(self.config.proposal, count) if table else np.abs(self.weights)
        if self.config.weight == "elbo":
            share = np.where(self.weights > 0, share, 0)
        return share / share.sum()

    # -- pairs -----------------------------------------------------------------------------------------------

    def place(self, image: int, index: int) -> float:
        """Where on the scale of levels pair `index` of an image lies, in [0, 1)."""
        unit, design = index // self.step, self.config.design
        if design == "iid":
            return self._uniform("level", image, unit)
        if design == "grid":
            return (self._order[unit] + 0.5) / self._units
        if design == "stratified":
            return (self._order[unit] + self._uniform("level", image, unit)) / self._units
        if design == "vdc":
            return (self._order[unit] + self._uniform("shift", image)) % 1.0
        count = self.config.block // self.step
        block, member = divmod(unit, count)
        return (member + self._uniform("shift", image, block)) / count

    def _uniform(self, *key: int | str) -> float:
        return (fold(self.config.seed, *key) >> 10) / 2**53  # 53 bits: never rounded up to 1

    def levels(self, image: int, start: int, stop: int) -> Tensor:
        """Levels of the pairs start .. stop - 1 of an image, (n,) int64."""
        places = [self.place(image, index) for index in range(start, stop)]
        return torch.bucketize(torch.tensor(places, dtype=torch.float64), self._edges, right=True)

    def noise(self, image: int, index: int) -> Tensor:
        """Standard normal numbers of a pair, (C, H, W) float32."""
        unit, mirrored = divmod(index, self.step)
        drawn = Draws(fold(self.config.seed, "noise", image, unit), 1).normal(*self.shape)[0]
        return -drawn if mirrored else drawn

    def pairs(self, image: int, start: int, stop: int) -> Pairs:
        """The pairs start .. stop - 1 of the image of that number."""
        level = self.levels(image, start, stop)
        noise = torch.stack([self.noise(image, index) for index in range(start, stop)])
        return Pairs(level, self.sigmas[level].float(), self.pair_weights(level), noise)

    def pair_weights(self, level: Tensor) -> Floats:
        """w_t / q_t of levels (n,) int64."""
        index = level.numpy()
        return self.weights[index] / self.share[index]

    # -- losses ----------------------------------------------------------------------------------------------

    def losses(self, x0: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """Loss of every row, a mean over its pixels, (R,) float32, whatever the precision of the network.

        x0 clean and denoised D(x, sigma, y), both (R, C, H, W), sigma (R,).
        """
        with torch.autocast(x0.device.type, enabled=False):
            error = ((x0.float() - denoised.float()).flatten(1)) / sigma.float()[:, None]
            if self.config.loss == "l2":
                return error.square().mean(1)
            if self.config.loss == "l1":
                return error.abs().mean(1)
            size = error.abs()
            return torch.where(size < 1, 0.5 * size.square(), size - 0.5).mean(1)


# ---- What measurements say about designs and weights.


def bin_means(losses: Floats, level: Tensor, levels: int, bins: int = 20) -> Floats:
    """Mean loss of every class in equal parts of the levels, (K, bins); losses (K, n), level (n,) int64.

    `UserError` where a part has no pair: its mean would be invented.
    """
    part = (level.numpy() + 0.5) / levels * bins
    inside = part.astype(np.int64)[:, None] == np.arange(bins)
    if not inside.any(0).all():
        raise UserError(f"{len(level)} pairs leave some of {bins} bins of levels empty: use more pairs")
    return losses @ (inside / inside.sum(0))


def fit_bins(means: Floats, labels: NDArray[np.int64], ridge: float = 1e-3, steps: int = 100) -> Floats:
    """Weights of the bins with which the mean losses classify best, (bins,): logistic regression.

    means (M, K, bins) of M labelled images, labels (M,). Minimises the mean of -log softmax_y(-sum_b w_b
    means_b) + ridge |scale w|^2 / 2 by Newton's method, scale the std of a bin's differences between classes;
    convex, hence one answer. `UserError` where it is not found.
    """
    centred = means - means.mean(1, keepdims=True)
    scale = centred.std((0, 1))
    if not (scale > 0).all():
        raise UserError("a bin of levels has no differences between classes: nothing to fit its weight to")
    x = -centred / scale
    rows, eye = np.arange(len(x)), ridge * np.eye(x.shape[2])
    w = np.zeros(x.shape[2])
    for _ in range(steps):
        p = softmax(x @ w)
        expected = np.einsum("mk,mkb->mb", p, x)
        gradient = (expected - x[rows, labels]).mean(0) + ridge * w
        if np.abs(gradient).max() < 1e-10:
            return w / scale
        second = np.einsum("mk,mkb,mkc->bc", p, x, x) - expected.T @ expected
        step = np.linalg.solve(second / len(x) + eye, gradient)
        w = w - _halved(x, rows, labels, w, step, gradient, ridge) * step
    raise UserError(f"the weights of {len(scale)} bins did not converge on {len(x)} images: raise the ridge")


def _halved(
    x: Floats,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    w: Floats,
    step: Floats,
    gradient: Floats,
    ridge: float,
) -> float:
    """How much of Newton's step lowers the objective by what it must (Armijo's rule)."""

    def objective(w: Floats) -> float:
        logits = x @ w
        top = logits.max(1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return float((total - logits[rows, labels]).mean() + ridge * w @ w / 2)

    size, start, slope = 1.0, objective(w), float(gradient @ step)
    while objective(w - size * step) > start - 1e-4 * size * slope and size > 1e-8:
        size /= 2
    return size


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def best_proposal(weights: Floats, deviation: Floats, floor: float = 0.05) -> tuple[float, ...]:
    """Densities of equal parts of the levels with which the variance is least: q proportional to w sd.

    weights, deviation (bins,): mean weight and std of the losses (of their paired differences, to tell
    classes apart) in each; floor: least density, in means, so that a mismeasured part is still visited.
    """
    density = np.abs(weights) * deviation
    return tuple(float(q) for q in np.maximum(density / density.mean(), floor))
