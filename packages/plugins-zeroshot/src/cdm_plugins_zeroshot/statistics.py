"""How sure a figure is: McNemar's test, the paired bootstrap, and error as a function of the pairs spent.

Intervals of a share are `cdm_core.metrics.wilson`. Two classifiers that saw the same images are compared
image by image: their difference is far surer than the overlap of two intervals suggests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdm_core.errors import UserError
from cdm_core.random import fold

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 2000
CHUNK = 2**22  # draws of a bootstrap at a time: it bounds its memory


class McNemar(NamedTuple):
    """Images that only one of two classifiers got right, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Bools, second: Bools) -> McNemar:
    """Are two classifiers equally often right (McNemar 1947)? first, second (N,): hits on the same images.

    Exact: of n images that they differ on, each is right on a half by a fair coin.
    """
    _check_pairs(len(first), len(second))
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return McNemar(b, c, min(1.0, 2 * tail / 2 ** (b + c)))


class Difference(NamedTuple):
    """A mean difference over images and the interval that bootstrap resamples of the images give it."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    first: Floats, second: Floats, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Difference:
    """Mean of second - first over images, with its percentile interval (Efron 1979); first, second (N,).

    Any figure of an image will do: a hit, a cost, a log-loss. Deterministic in `seed`.
    """
    _check_pairs(len(first), len(second))
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    generator = np.random.default_rng(fold(seed, "bootstrap"))
    size = max(1, CHUNK // len(gaps))
    parts = [
        gaps[generator.integers(len(gaps), size=(min(size, resamples - done), len(gaps)))].mean(1)
        for done in range(0, resamples, size)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(gaps.mean()), float(low), float(high))


def _check_pairs(first: int, second: int) -> None:
    if first != second or not first:
        raise UserError(f"a paired comparison needs the same images on both sides, not {first} and {second}")


class ErrorFit(NamedTuple):
    """error(N) = asymptote + slope / N: what is left with endless pairs, and what their number costs.

    1 / N rather than its root: flips of images to the right and to the wrong cancel in first order, what
    remains is the variance of a margin, 1 / N, times the slope of the margins' density at 0.
    """

    asymptote: float
    slope: float
    residual: float  # largest deviation from a point, as errors are counted

    def at(self, pairs: float) -> float:
        """The error with so many pairs an image."""
        return self.asymptote + self.slope / pairs

    def pairs_for(self, error: float) -> float:
        """Pairs an image for an error; inf where the asymptote does not allow it."""
        return self.slope / (error - self.asymptote) if error > self.asymptote else math.inf


def fit_error(pairs: Sequence[float], errors: Sequence[float]) -> ErrorFit:
    """Least squares through errors measured at two or more numbers of pairs an image."""
    if len(set(pairs)) < 2 or len(pairs) != len(errors) or min(pairs) <= 0:
        raise UserError(
            "error(N) is fitted to errors at two or more numbers of pairs above 0, "
            f"not to {len(errors)} at {list(pairs)}"
        )
    inverse, y = 1 / np.asarray(pairs, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    centred = inverse - inverse.mean()
    slope = float(centred @ y / (centred @ centred))
    asymptote = float(y.mean() - slope * inverse.mean())
    return ErrorFit(asymptote, slope, float(np.abs(y - asymptote - slope * inverse).max()))
