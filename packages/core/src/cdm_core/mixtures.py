"""Gaussian mixtures: the distribution of which everything is known exactly, and so the oracle of the tests.

Noised by a Gaussian path, x_t = alpha x0 + sigma n, component k of a mixture stays Gaussian,
N(alpha mu_k, alpha^2 C_k + sigma^2 I), and the eigenvectors of C_k serve every noise level. All is computed
in float64 and returned in the dtype of x, and autograd goes through all of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cdm_core.random import Draws

if TYPE_CHECKING:
    from cdm_core.schedules import Path


class GaussianMixture(nn.Module):
    """sum_k w_k N(mu_k, C_k) in d dimensions; its classes are its components.

    Points x are (B, d), or (B, C, H, W) with C * H * W = d; points that come back have the shape of x. sigma,
    noise std in data units: a number, () or (B,), with x = x0 + sigma n. y (B,) int64: the component.
    """

    capabilities = frozenset({"denoise", "class_logits", "log_density"})
    weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        """weights (K,) > 0, normalised here; means (K, d); covariances (K, d, d) symmetric positive definite.

        Raises `ValueError` on anything else.
        """
        super().__init__()
        weights, means, covariances = (t.detach().double() for t in (weights, means, covariances))
        _check_parameters(weights, means, covariances)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        if not bool((eigenvalues > 0).all()):
            raise ValueError("covariances must be positive definite")
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("eigenvalues", eigenvalues)  # (K, d)
        self.register_buffer("eigenvectors", eigenvectors)  # (K, d, d), one a column

    @property
    def components(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[1]

    @property
    def covariances(self) -> Tensor:
        """(K, d, d) float64."""
        return (self.eigenvectors * self.eigenvalues[:, None]) @ self.eigenvectors.mT

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | float | None = None) -> Tensor:
        """log p_sigma(x | y) (B,), nats; y None: of the mixture; sigma None: of clean data."""
        one = x.new_ones(())
        parts = self._log_components(x, one, one * 0 if sigma is None else sigma)
        return self._of_class(parts, y).to(x.dtype)

    def class_logits(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log p(k | x at noise sigma) (B, K), normalised."""
        joint = self._log_components(x, x.new_ones(()), sigma) + self.weights.log()
        return joint.log_softmax(-1).to(x.dtype)

    def denoise(self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma n = x, y], of the shape of x."""
        centred, variance = self._eigen_coordinates(x, x.new_ones(()), sigma)
        shrunk = centred * self.eigenvalues / variance
        per_component = self.means + torch.einsum("kde,bke->bkd", self.eigenvectors, shrunk)
        return self._expect(per_component, x, sigma, y)

    def score(self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None) -> Tensor:
        """grad_x log p_sigma(x | y), of the shape of x; sigma 0 is allowed."""
        centred, variance = self._eigen_coordinates(x, x.new_ones(()), sigma)
        per_component = -torch.einsum("kde,bke->bkd", self.eigenvectors, centred / variance)
        return self._expect(per_component, x, sigma, y)

    def noise_level_logits(self, x: Tensor, path: Path, y: Tensor | None = None) -> Tensor:
        """log p(x | t, y) of every level t of `path`, (B, levels).

        For a uniform p(t) that is log p(t | x, y) up to a constant of x: the exact noise-level classifier.
        x is in the path's own scale, x_t = alpha_t x0 + sigma_t n.
        """
        batch, levels = len(x), len(path.alpha)
        alpha, sigma = (t.to(x.device).repeat(batch) for t in (path.alpha, path.sigma))
        parts = self._log_components(x.repeat_interleave(levels, 0), alpha, sigma)
        labels = None if y is None else y.repeat_interleave(levels)
        return self._of_class(parts, labels).view(batch, levels).to(x.dtype)

    def on_path(self, path: Path) -> MixtureOnPath:
        """The same mixture as a model with the capability `noise_level_logits`, over the levels of `path`."""
        return MixtureOnPath(self, path)

    def sample(self, n: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """n clean points (n, d, 1, 1) float32 and their components (n,) int64, one row of `draws` each.

        Draws one uniform number, then d normal ones. `ValueError` when `draws` has another number of rows.
        """
        uniform = draws.uniform().double()
        if len(uniform) != n:
            raise ValueError(f"asked for {n} points with draws of {len(uniform)} rows")
        edges = self.weights.cumsum(0)[:-1].to(uniform.device)
        y = torch.bucketize(uniform, edges, right=True)
        normal = draws.normal(self.dim).double()
        scaled = normal * self.eigenvalues.to(normal.device)[y].sqrt()
        points = self.means.to(y.device)[y] + (self.eigenvectors.to(y.device)[y] @ scaled[..., None])[..., 0]
        return points.float().view(n, self.dim, 1, 1), y

    def _eigen_coordinates(self, x: Tensor, alpha: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """x - alpha mu_k in the eigenvectors of C_k, and its variances there, both (B, K, d) float64."""
        point = x.flatten(1).double()
        if point.shape[1] != self.dim:
            raise ValueError(f"a mixture in {self.dim} dimensions got points of shape {tuple(x.shape[1:])}")
        alpha, noise = (
            torch.as_tensor(v, dtype=torch.float64, device=x.device).reshape(-1, 1, 1) for v in (alpha, sigma)
        )
        centred = torch.einsum("kde,bkd->bke", self.eigenvectors, point[:, None] - alpha * self.means)
        return centred, (alpha**2 * self.eigenvalues + noise**2).expand_as(centred)

    def _log_components(self, x: Tensor, alpha: Tensor, sigma: Tensor | float) -> Tensor:
        """log N(x; alpha mu_k, alpha^2 C_k + sigma^2 I) (B, K) float64."""
        centred, variance = self._eigen_coordinates(x, alpha, sigma)
        return -0.5 * (centred**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)

    def _of_class(self, parts: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return torch.logsumexp(parts + self.weights.log(), -1)
        return parts.gather(1, self._checked(y)[:, None])[:, 0]

    def _expect(self, per_component: Tensor, x: Tensor, sigma: Tensor | float, y: Tensor | None) -> Tensor:
        """Posterior mean over the components, (B, K, d) -> the shape and dtype of x."""
        if y is None:
            posterior = self.class_logits(x.double(), sigma).exp()
            point = torch.einsum("bk,bkd->bd", posterior, per_component)
        else:
            point = per_component[torch.arange(len(x), device=x.device), self._checked(y)]
        return point.view_as(x).to(x.dtype)

    def _checked(self, y: Tensor) -> Tensor:
        if y.dtype != torch.int64 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.components):
            raise ValueError(
                f"y holds components 0 .. {self.components - 1} as int64, got {y.dtype} {y.tolist()}"
            )
        return y


class MixtureOnPath(nn.Module):
    """A `GaussianMixture` with the exact classifier over the noise levels of one path."""

    def __init__(self, mixture: GaussianMixture, path: Path) -> None:
        super().__init__()
        self.mixture, self.path = mixture, path

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """As `GaussianMixture.denoise`."""
        return self.mixture.denoise(x, sigma, y)

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As `GaussianMixture.class_logits`."""
        return self.mixture.class_logits(x, sigma)

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """As `GaussianMixture.log_density`."""
        return self.mixture.log_density(x, y, sigma)

    def noise_level_logits(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As `GaussianMixture.noise_level_logits`, x in the scale of the path."""
        return self.mixture.noise_level_logits(x, self.path, y)


def _check_parameters(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    if means.ndim != 2:
        raise ValueError(f"means must be (K, d), got {tuple(means.shape)}")
    k, d = means.shape
    if tuple(weights.shape) != (k,) or tuple(covariances.shape) != (k, d, d):
        raise ValueError(
            f"means {tuple(means.shape)} go with weights ({k},) and covariances ({k}, {d}, {d}), "
            f"got {tuple(weights.shape)} and {tuple(covariances.shape)}"
        )
    if not bool((weights > 0).all()):
        raise ValueError("weights must be > 0")
    if not torch.allclose(covariances, covariances.mT):
        raise ValueError("covariances must be symmetric")
