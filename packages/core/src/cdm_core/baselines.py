"""Classical densities on the same data: what a learned density has to beat.

A full-covariance Gaussian and a 10-component full-covariance Gaussian mixture (expectation-maximisation,
scikit-learn), fitted to the dequantised training split in model units, each with the ridge that does best on
the validation split, and scored on the same held-out draws as the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_core.errors import UserError

COMPONENTS = 10
# Added to every covariance's diagonal, squared model units (the range is [-1, 1]). Without it, pixels that
# happen to be constant in a component keep the variance of the dequantisation noise alone and the mixture
# overfits: 0.3 bits/dim worse on held-out digits.
RIDGES = (3e-4, 1e-3, 2e-3, 4e-3)
MAX_DIM = 1024  # EM over full covariances costs images * dim^2 * components an iteration
MAX_IMAGES = 20_000

Array = NDArray[np.float64]


def check_size(count: int, dim: int) -> None:
    """Raise UserError where a mixture cannot be fitted to `count` images in `dim` dimensions."""
    if dim > MAX_DIM:
        raise UserError(
            f"full-covariance baselines in {dim} dimensions take too long (the limit is {MAX_DIM})"
        )
    if count < 2 * COMPONENTS:
        raise UserError(f"{count} training images are too few to fit a mixture of {COMPONENTS} Gaussians")


def fit(train: Array, valid: Array, *, seed: int = 0) -> dict[str, Any]:
    """Fitted densities by name, `gaussian` and `gaussian_mixture`; `.score_samples(x)` gives (N,) nats.

    train, valid (N, d) float64 model units, as `check_size` allows; `.reg_covar`: the ridge that was chosen.
    """
    from sklearn.mixture import GaussianMixture

    fitted = {}
    for name, components in (("gaussian", 1), ("gaussian_mixture", COMPONENTS)):
        candidates = [
            GaussianMixture(components, reg_covar=ridge, random_state=seed, max_iter=200).fit(train)
            for ridge in RIDGES
        ]
        fitted[name] = max(candidates, key=lambda density: density.score(valid))
    return fitted
