"""From scores to probabilities, and whether they can be believed.

Scores of a diffusion classifier are means over pixels and pairs: their softmax says next to nothing, and that
of the log-densities of hundreds of pixels is certain of everything. What mends both is fitted to labelled
images that are not to be classified:

- `fit_temperature`: p = softmax(a f), the a of least log-loss (Guo et al. 2017, one over their temperature);
- `fit_offsets`: p = softmax(a f - b), with a number b_y a class (Alexandari et al. 2020): densities that are
  known up to a factor of each class's own, log f_y = log p(x | y) + b_y, are put right by it;
- `fit_platt`: the probability that an answer is right, from any features of it (Platt 1999): from what a race
  cost, `race.cost_features`, better than from its scores (Clark & Jaini 2023).

All are convex, solved by Newton's method, and finite whatever the images say. Besides the N labelled ones
they see two imaginary ones of the median margin, one right and one wrong (Laplace's rule); for offsets, one
of each class with equal scores, which draw the offsets to 0 where there are few images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdm_core.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

BINS = 15
LEAST = 1e-3  # of a scale, in inverse median margins: scores that tell nothing become flat, in their order
STEPS = 200


def log_softmax(logits: Floats) -> Floats:
    """Over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# -- how good probabilities are ------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Answers of about one confidence."""

    n: int
    confidence: float  # their mean
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Figures of probabilities (N, K) and labels."""

    n: int
    accuracy: float
    confidence: float  # mean probability of the answer
    ece: float  # expected calibration error: sum of |accuracy - confidence| over bins of equal width
    floor: float  # what `ece` would be, on as many images, if every confidence were true
    nll: float  # mean of -log p_y, nats
    brier: float  # mean of sum_k (p_k - [k = y])^2
    bins: tuple[Bin, ...]  # those with answers in them, by confidence


def reliability(probabilities: Floats, labels: Integers, bins: int = BINS) -> Reliability:
    """Of probabilities (N, K), rows that sum to 1, and labels (N,); bins: `confidence_bins`.

    `UserError` where they do not fit together.
    """
    n, classes = probabilities.shape
    if labels.shape != (n,) or not n or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"reliability needs one label of 0 .. {classes - 1} for each of {n} images")
    rows, guess = np.arange(n), probabilities.argmax(1)
    confidence, hit = probabilities[rows, guess], guess == labels
    onehot = np.arange(classes) == labels[:, None]
    found = confidence_bins(confidence, hit, bins)
    with np.errstate(divide="ignore"):
        nll = -np.log(probabilities[rows, labels]).mean()
    return Reliability(
        n=n,
        accuracy=float(hit.mean()),
        confidence=float(confidence.mean()),
        ece=sum(b.n * abs(b.accuracy - b.confidence) for b in found) / n,
        floor=_floor(confidence, bins),
        nll=float(nll),
        brier=float(np.square(probabilities - onehot).sum(1).mean()),
        bins=found,
    )


def confidence_bins(confidence: Floats, hit: Bools, bins: int = BINS) -> tuple[Bin, ...]:
    """Answers in bins (m - 1) / M < confidence <= m / M (Guo et al. 2017), those that have any."""
    which = _which(confidence, bins)
    chosen = ((confidence[which == m], hit[which == m]) for m in range(bins))
    return tuple(Bin(len(c), float(c.mean()), float(h.mean())) for c, h in chosen if len(c))


def _which(confidence: Floats, bins: int) -> Integers:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _floor(confidence: Floats, bins: int) -> float:
    """Of many independent hits of probabilities c, E |sum (hit - c)| = sqrt(2 / pi sum c (1 - c))."""
    spread = np.bincount(_which(confidence, bins), confidence * (1 - confidence))
    return float(math.sqrt(2 / math.pi) * np.sqrt(spread).sum() / len(confidence))


class RiskCoverage(NamedTuple):
    """What errors remain if only the surest answers are given."""

    coverage: Floats  # (N,) share answered, ascending to 1
    risk: Floats  # (N,) share of errors among them
    area: float  # mean risk: the smaller the better confidence sorts answers


def risk_coverage(confidence: Floats, hit: Bools) -> RiskCoverage:
    """Of confidences (N,), in any unit, and hits (N,); equal confidences are answered together."""
    order = np.argsort(-confidence, kind="stable")
    ordered, wrong = confidence[order], ~hit[order]
    last = np.searchsorted(-ordered, -ordered, side="right")
    risk = wrong.cumsum()[last - 1] / last
    return RiskCoverage(np.arange(1, len(hit) + 1) / len(hit), risk, float(risk.mean()))


def diagram(curves: Mapping[str, Reliability]) -> bytes:
    """Reliability diagram, PNG: accuracy against confidence, a line a classifier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ls=":", color="#8A8F98", label="calibrated")
    for name, curve in curves.items():
        points = [(b.confidence, b.accuracy) for b in curve.bins]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.2, label=f"{name}, ECE {curve.ece:.3f}")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# -- from scores to probabilities ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """p = softmax(scale f - offsets): how scores (N, K) become log-probabilities."""

    scale: float
    offsets: tuple[float, ...] = ()  # one a class, of mean 0; empty: none

    def __call__(self, scores: Floats) -> Floats:
        """log p (N, K) of scores (N, K)."""
        return log_softmax(self.scale * scores - (np.asarray(self.offsets) if self.offsets else 0.0))


def fit_temperature(scores: Floats, labels: Integers) -> Affine:
    """The scale of least log-loss on scores (N, K), the higher the likelier, and labels (N,)."""
    return _fit(scores, labels, offsets=False)


def fit_offsets(scores: Floats, labels: Integers) -> Affine:
    """The scale and the offsets of least log-loss on scores (N, K), the higher the likelier, and labels (N,).

    The offsets also learn how frequent the classes are among the labels.
    """
    return _fit(scores, labels, offsets=True)


def _fit(scores: Floats, labels: Integers, *, offsets: bool) -> Affine:
    unit = _median_margin(scores, labels)
    f, rows = (scores - scores.mean(1, keepdims=True)) / unit, np.arange(len(scores))
    onehot = (np.arange(f.shape[1]) == labels[:, None]).astype(np.float64)
    n, classes = f.shape

    def value(theta: Floats) -> float:
        a, b = theta[0], theta[1:]
        total = -log_softmax(a * f - b)[rows, labels].sum() + np.logaddexp(0, a) + np.logaddexp(0, -a)
        return float(total - log_softmax(-b).sum() + b.sum() ** 2 / 2) / n

    def slopes(theta: Floats) -> tuple[Floats, Floats]:
        a, b = theta[0], theta[1:]
        p, q, s = np.exp(log_softmax(a * f - b)), np.exp(log_softmax(-b)), math.exp(-np.logaddexp(0, -a))
        expected = (p * f).sum(1)
        gradient = np.concatenate(
            [[((p - onehot) * f).sum() + 2 * s - 1], (onehot - p).sum(0) + 1 - classes * q]
        )
        gradient[1:] += b.sum()
        second = np.empty((classes + 1, classes + 1))
        second[0, 0] = (p * f**2).sum() - expected @ expected + 2 * s * (1 - s)
        second[0, 1:] = second[1:, 0] = -(p * (f - expected[:, None])).sum(0)
        second[1:, 1:] = np.diag(p.sum(0)) - p.T @ p + classes * (np.diag(q) - np.outer(q, q)) + 1
        return gradient / n, second / n

    free = slice(None) if offsets else slice(1)
    theta = np.zeros(classes + 1)
    theta = _newton(value, slopes, theta, free)
    scale = max(float(theta[0]), LEAST) / unit
    return Affine(scale, tuple((theta[1:] - theta[1:].mean()).tolist()) if offsets else ())


def _median_margin(scores: Floats, labels: Integers) -> float:
    """Median gap between the two best scores of an image: the natural unit of scores."""
    n, classes = scores.shape
    if labels.shape != (n,) or classes < 2 or not n or labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"a fit needs one label of 0 .. {classes - 1}, 2 classes at least, for each of {n} images"
        )
    if not np.isfinite(scores).all():
        raise UserError("a fit needs finite scores: some are infinite or no numbers")
    top = np.sort(scores, 1)[:, -2:]
    margin = float(np.median(top[:, 1] - top[:, 0]))
    if not margin > 0:
        raise UserError(
            "the two best classes of half of the labelled images have equal scores: nothing to fit"
        )
    return margin


@dataclass(frozen=True)
class Platt:
    """p(right) = 1 / (1 + exp(-features . weights))."""

    weights: tuple[float, ...]

    def __call__(self, features: Floats) -> Floats:
        """p (N,) of features (N, F)."""
        return np.exp(-np.logaddexp(0, -(features @ np.asarray(self.weights))))


def fit_platt(features: Floats, hit: Bools) -> Platt:
    """Logistic regression of hits (N,) on features (N, F), one of them constant, with Platt's targets.

    (n+ + 1) / (n+ + 2) for the n+ hits and 1 / (n- + 2) for the others: finite even if all are hits. Features
    that say the same share their weight.
    """
    n, right = len(hit), int(hit.sum())
    if features.shape[:1] != (n,) or not n or not np.isfinite(features).all():
        raise UserError(f"Platt's fit needs finite features of each of {n} images, one at least")
    target = np.where(hit, (right + 1) / (right + 2), 1 / (n - right + 2))
    x, unmix = _independent(features)

    def value(w: Floats) -> float:
        return float((np.logaddexp(0, x @ w) - target * (x @ w)).mean())

    def slopes(w: Floats) -> tuple[Floats, Floats]:
        p = np.exp(-np.logaddexp(0, -(x @ w)))
        return x.T @ (p - target) / n, (x.T * (p * (1 - p))) @ x / n

    return Platt(tuple((unmix @ _newton(value, slopes, np.zeros(x.shape[1]), slice(None))).tolist()))


def _independent(features: Floats) -> tuple[Floats, Floats]:
    """An orthonormal basis (N, R) of what the columns span, times sqrt(N), and the map from it back."""
    u, s, v = np.linalg.svd(features, full_matrices=False)
    kept = s > s[0] * 1e-10
    root = math.sqrt(len(features))
    return u[:, kept] * root, v[kept].T / s[kept] * root


def _newton(
    value: Callable[[Floats], float],
    slopes: Callable[[Floats], tuple[Floats, Floats]],
    theta: Floats,
    free: slice,
) -> Floats:
    """The minimum of a convex function over the entries `free` of theta, the others as they are."""
    for _ in range(STEPS):
        gradient, second = (part[free] for part in slopes(theta))
        if np.abs(gradient).max() < 1e-10:
            return theta
        step = np.zeros_like(theta)
        step[free] = np.linalg.solve(second[:, free] + 1e-12 * np.eye(len(gradient)), gradient)
        size, now, slope = 1.0, value(theta), float(gradient @ step[free])
        while value(theta - size * step) > now - 1e-4 * size * slope and size > 1e-9:
            size /= 2
        if size * np.abs(step).max() < 1e-12 * (1 + np.abs(theta).max()):  # as near as rounding allows
            return theta
        theta = theta - size * step
    raise UserError(f"a calibration did not converge in {STEPS} steps: use more labelled images")
