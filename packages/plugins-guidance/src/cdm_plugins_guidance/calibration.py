"""Is a guide calibrated where it looks? The measure by which EluCD chose its design, as a tool.

Ma et al. 2024 (arXiv 2310.11311) argue that the gradient of log p(y | x) can be trusted as far as p(y | x)
can, and measure that by the expected calibration error. Of n held-out images x0 with classes y, at a level t,

    x = x0 + sigma_t n,  p = softmax(tau f(what the guide sees of x)),  conf = max p,  hit = [argmax f = y]
    ECE_t = sum_m |B_m| / n |acc(B_m) - conf(B_m)|

over M bins B_m of equal width, (m - 1) / M < conf <= m / M (Guo et al. 2017). The integral over the levels is
published as (1 / k) sum_{t = 0..k} ECE_t; here it is the trapezoid rule in the step number, scaled to length
1, which is that sum but for half of its two ends, and holds for levels that are left out.

What a guide sees (`look`, as in `apply_configs.TermConfig`): x0, the denoiser's prediction, from its label
too where the denoiser is told the classes when it is guided; rms, x / max(1, RMS(x)); x_t, x itself with its
level, for a classifier that knows noise.

ECE of few images is above 0 even for a perfect classifier. `floor` says by how much: of independent hits with
probabilities c the expectation of |sum (hit - c)| in a bin is sqrt(2 / pi) sqrt(sum c (1 - c)), n large.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.random import fold
from cdm_core.runs import ImageDraws, Run
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.compare import Progress, guide_settings, with_guide
from cdm_plugins_guidance.guide import Guide

BINS, LEVELS = 15, 12
LOOKS = ("x0", "rms", "x_t")

Look = Literal["x0", "rms", "x_t"]


@dataclass(frozen=True)
class Reliability:
    """Figures of one level; all but `margin` are of the class with the largest logit."""

    accuracy: float  # share of hits
    confidence: float  # mean probability
    ece: float
    floor: float  # what `ece` would be of a perfectly calibrated classifier, on as many images
    margin: float  # mean of p_y - max of the others


@dataclass(frozen=True)
class Level(Reliability):
    """`Reliability` at step `number` of the run's sampler, noise std sigma in data units."""

    number: int = 0
    sigma: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One classifier at one look: look, beta of its Softplus (inf: ReLU), tau, and its levels, from noise."""

    look: str
    softplus: float
    tau: float
    levels: tuple[Level, ...]

    def mean(self, figure: str) -> float:
        """The integral of a figure over the levels, of length 1."""
        return integral([level.number for level in self.levels], [getattr(p, figure) for p in self.levels])

    @property
    def integral_ece(self) -> float:
        """The integral of ECE_t."""
        return self.mean("ece")

    @property
    def name(self) -> str:
        """`x0, softplus 3, tau 1`."""
        smooth = "ReLU" if math.isinf(self.softplus) else f"softplus {self.softplus:g}"
        return f"{self.look}, {smooth}, tau {self.tau:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the integral of every figure, then the levels; softplus null: ReLU."""
        means = {f"integral_{f.name}": self.mean(f.name) for f in fields(Reliability)}
        return {**asdict(replace(self, levels=())), **means, "levels": [asdict(p) for p in self.levels]}


def reliability(logits: Tensor, y: Tensor, *, tau: float = 1.0, bins: int = BINS) -> Reliability:
    """Of logits (N, K) and classes y (N,) int64; tau >= 0, where 0 leaves the guess and conf = 1 / K."""
    f = logits.double()
    p = (tau * f).softmax(1)
    guess = f.argmax(1)
    confidence, hit = p.gather(1, guess[:, None])[:, 0], (guess == y).double()
    which = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.bincount(which, hit - confidence, minlength=bins)
    spread = torch.bincount(which, confidence * (1 - confidence), minlength=bins)
    others = p.scatter(1, y[:, None], -1.0).amax(1)
    return Reliability(
        accuracy=float(hit.mean()),
        confidence=float(confidence.mean()),
        ece=float(gaps.abs().sum()) / len(f),
        floor=math.sqrt(2 / math.pi) * float(spread.sqrt().sum()) / len(f),
        margin=float((p.gather(1, y[:, None])[:, 0] - others).mean()),
    )


def integral(positions: Sequence[float], values: Sequence[float]) -> float:
    """Trapezoid rule over ascending positions, divided by their length; of a single value, itself."""
    if len(values) == 1:
        return values[0]
    pairs = zip(pairwise(positions), pairwise(values), strict=True)
    return sum((b - a) * (u + v) / 2 for (a, b), (u, v) in pairs) / (positions[-1] - positions[0])


def levels_of(run: Run, count: int) -> list[tuple[int, float]]:
    """Up to `count` of the steps of the run's sampler, evenly spaced from first to last: (number, sigma)."""
    if count < 1:
        raise UserError(f"--levels {count}: ask for at least 1")
    sigmas = run.plan().sigmas
    last = len(sigmas) - 1
    numbers = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [(number, float(sigmas[number])) for number in sorted(numbers)]


def labelled(run: Run, split: str, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first `num` images of a split, or all, in model units (N, C, H, W), and their classes (N,)."""
    if num < 1:
        raise UserError(f"--num {num}: ask for at least 1 image")
    x0, y = run.examples(split, range(min(num, len(run.split(split)))), seed=seed)
    if y is None:
        raise UserError(f"calibration needs labelled data, and {run.info.name!r} has no labels")
    return x0, y


def guided_source(run: Run) -> GuidedDenoiser:
    """What `run` samples from: a denoiser within its guides; UserError where it is none."""
    guide_settings(run)
    source = run.source(run.settings)
    assert isinstance(source, GuidedDenoiser)
    return source


def smoothed_guide(run: Run, beta: float) -> Guide:
    """The run's first guide, the ReLUs of its classifier made Softplus of `beta` (inf: left as they are).

    UserError where that cannot be had, or its classes are not those of the data.
    """
    config = guide_settings(run)
    config = replace(config, classifier=replace(config.classifier, softplus=beta))
    guide: Guide = guided_source(with_guide(run, config)).terms[0][1]
    if guide.num_classes != run.info.num_classes:
        raise UserError(
            f"calibration needs labels of the guide's own classes: the guide has {guide.num_classes}, "
            f"{run.info.name!r} {run.info.num_classes}"
        )
    return guide


def calibrate(
    run: Run,
    *,
    looks: Sequence[Look] = ("x0", "rms"),
    softplus: Sequence[float],
    taus: Sequence[float] = (1.0,),
    split: str = "test",
    num: int = 1000,
    levels: int = LEVELS,
    bins: int = BINS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Curve]:
    """Curves of the run's denoiser and its first guide's classifier: every look, then beta, then tau.

    On the first `num` images of a split. Noise is keyed by (seed, sigma, image): an image is seen alike
    whatever else is asked for. Perturbed copies of the guide have no part in it.
    """
    _check(looks, softplus, taus, bins)
    x0, y = labelled(run, split, num, seed)
    guides = {beta: smoothed_guide(run, beta) for beta in softplus}
    if "x_t" in looks and not all(guide.noise_aware for guide in guides.values()):
        raise UserError("look 'x_t' needs a classifier that knows the noise level: use look 'x0', or 'rms'")
    chosen = levels_of(run, levels)
    found: dict[tuple[str, float, float], list[Level]] = {key: [] for key in product(looks, guides, taus)}
    for done, (number, sigma) in enumerate(chosen, 1):
        for look, beta, logits in _seen(run, guides, looks, (x0, y), sigma, seed):
            for tau in taus:
                figures = reliability(logits, y, tau=tau, bins=bins)
                found[look, beta, tau].append(Level(**asdict(figures), number=number, sigma=sigma))
        if progress:
            progress("calibration", done, len(chosen))
    return [Curve(*key, tuple(points)) for key, points in found.items()]


def _check(looks: Sequence[str], softplus: Sequence[float], taus: Sequence[float], bins: int) -> None:
    wrong = [look for look in looks if look not in LOOKS]
    if wrong:
        raise UserError(f"look {wrong[0]!r} is unknown: choose of {', '.join(LOOKS)}")
    if any(not beta > 0 for beta in softplus):
        raise UserError("softplus must be above 0 (inf: ReLU)")
    if any(not 0 <= tau < math.inf for tau in taus):
        raise UserError("tau must be finite and at least 0")
    if bins < 1:
        raise UserError(f"--bins {bins}: ask for at least 1")


@torch.no_grad()
def _seen(
    run: Run,
    guides: dict[float, Guide],
    looks: Sequence[str],
    examples: tuple[Tensor, Tensor],
    sigma: float,
    seed: int,
) -> Iterator[tuple[str, float, Tensor]]:
    """Logits (N, K) on the CPU of every guide at every look, at one level; (look, beta, logits)."""
    source, size, (x0, y) = guided_source(run), run.settings.batch_size, examples
    draws = ImageDraws(fold(seed, "calibration", repr(sigma)), range(len(x0)))
    x = x0 + sigma * draws.normal(*x0.shape[1:])

    def of(look: str, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        level = rows.new_full((len(rows),), sigma)
        if look == "x0":
            told = labels.to(run.device) if source.conditional else None
            return source.model.denoise(rows, level, told), None
        if look == "rms":
            rms = rows.flatten(1).square().mean(1).sqrt().clamp(min=1)
            return rows / rms.view(-1, *[1] * (rows.dim() - 1)), None
        return rows, level

    for look in looks:
        batches = zip(x.split(size), y.split(size), strict=True)
        views = [of(look, rows.to(run.device), labels) for rows, labels in batches]
        for beta, guide in guides.items():
            yield look, beta, torch.cat([guide.logits(*view).cpu() for view in views])


def picture(curves: Sequence[Curve]) -> bytes:
    """PNG: ECE and accuracy by noise level, a line a curve, and the floor of ECE of the first one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in curves:
        sigmas = [level.sigma for level in curve.levels]
        left.plot(sigmas, [level.ece for level in curve.levels], marker="o", ms=3, lw=1.2, label=curve.name)
        right.plot(sigmas, [level.accuracy for level in curve.levels], marker="o", ms=3, lw=1.2)
    floor = [(level.sigma, level.floor) for level in curves[0].levels]
    left.plot(*zip(*floor, strict=True), ls=":", color="#30343A", label="floor of the first")
    left.set(
        xscale="log", xlabel="noise std (data units)", ylabel="expected calibration error", ylim=(0, None)
    )
    right.set(xscale="log", xlabel="noise std (data units)", ylabel="accuracy", ylim=(0, 1.02))
    left.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
