"""How far samples are from data in the features of some network, with every choice stated.

Fréchet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), improved precision and recall
(Kynkaanniemi et al. 2019) and Inception score (Salimans et al. 2016), in float64 and without SciPy. They know
nothing of the network: features are (N, D). Published figures mean Inception's pool features (D = 2048) of
50,000 samples against statistics that came as `.npz` files with `mu` and `sigma`, which `Moments.read` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdm_core.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature vectors, float64, the covariance over count - 1."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, D), N >= 2."""
        if features.ndim != 2 or len(features) < 2:
            raise UserError(f"moments need features (N, D) of 2 images or more, not {tuple(features.shape)}")
        rows = features.double()
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean) / (len(rows) - 1))

    def __add__(self, other: Moments) -> Moments:
        """Those of both sets together (Chan et al. 1979), so that features can come in batches."""
        count, shift = self.count + other.count, other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter = scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter / (count - 1))

    @classmethod
    def read(cls, path: Path) -> Moments:
        """From an `.npz` with `mu` (D,) and `sigma` (D, D); their count is not written there: 0."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is not an .npz of statistics with `mu` and `sigma`: {error}") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: `mu` {tuple(mean.shape)} and `sigma` {tuple(covariance.shape)} differ")
        return cls(0, mean, covariance)


def frechet(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance of Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is
    symmetric: singular covariances, of fewer images than features, do no harm.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return float((a.mean - b.mean).square().sum() + spread)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 of features (N, D) and (M, D); N, M >= 2."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    within_a = (aa.sum() - aa.trace()) / (n * (n - 1))
    within_b = (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel(a, b).mean())


class PrecisionRecall(NamedTuple):
    """precision: share of samples among the data; recall: share of data among the samples."""

    precision: float
    recall: float


def precision_recall(data: Tensor, samples: Tensor, k: int = 3, chunk: int = 2048) -> PrecisionRecall:
    """Improved precision and recall of samples (M, D) against data (N, D), both more than k.

    A point is among a set if it lies within the distance of one of its points to that point's k-th neighbour.
    """
    if min(len(data), len(samples)) <= k:
        raise UserError(f"precision and recall need more than {k} images of each kind")

    def share(of: Tensor, among: Tensor) -> float:
        radius = torch.cat([torch.cdist(rows, among).kthvalue(k + 1).values for rows in among.split(chunk)])
        inside = [(torch.cdist(rows, among) <= radius).any(1) for rows in of.split(chunk)]
        return float(torch.cat(inside).double().mean())

    data, samples = data.double(), samples.double()
    return PrecisionRecall(share(samples, data), share(data, samples))


def inception_score(logits: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y))) of class logits (N, K): between 1 and K."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    entropy_of_all = -torch.special.xlogy(marginal, marginal).sum()
    return float((entropy_of_all + (p * log_p).sum(1).mean()).exp())
