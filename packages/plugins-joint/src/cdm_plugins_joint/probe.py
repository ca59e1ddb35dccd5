"""Linear probes: how much of the class lies open in the frozen features, at which noise and in which map.

Of every noise level and every map of the encoder, pooled over the image: multinomial logistic regression
(logistic, of attributes) on noised training images, its accuracy on noised held-out ones. Deja et al. 2023
look at features so; Xiang et al. 2023 (DDAE, arXiv 2303.09769) find the best ones at little noise. Beside the
maps: all of them together, and the network's own head.

An image has one noise for all levels, keyed by (seed, image): curves over levels are smooth.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.metrics import wilson
from cdm_core.random import fold
from cdm_core.runs import ImageDraws, Run

ALL, HEAD = "all maps", "head"
ITERATIONS = 200  # of L-BFGS

Progress = Callable[[str, int, int], None]  # of what, done, in all


@dataclass(frozen=True)
class Score:
    """Accuracy of one probe, or of the head; share t of the levels (0: clean), sigma in VE units."""

    map: str
    t: float
    sigma: float
    width: int  # features; of the head, 0
    accuracy: float
    low: float  # 95% interval (Wilson 1927), over held-out images
    high: float


@dataclass(frozen=True)
class Probe:
    """Multinomial or, of attributes, logistic regression on standardised features; all float64.

    mean, scale (D,); weight (D, K); bias (K,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, y: Tensor, classes: int, l2: float) -> Probe:
        """Of features (N, D) and y (N,) int64, or (N, K) attributes in [0, 1].

        Minimises the mean negative log-likelihood in nats plus l2 / 2 |weight|^2: strictly convex in the
        weights for l2 > 0.
        """
        if len(features) < 2:
            raise UserError(f"a probe is fitted to 2 images or more, not {len(features)}")
        x = features.double()
        mean, scale = x.mean(0), x.std(0)
        scale = scale.where(scale > 0, 1.0)  # a constant feature says nothing, and stays 0
        x, y = (x - mean) / scale, y if y.ndim == 1 else y.double()
        weight, bias = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
        optimizer = torch.optim.LBFGS(
            [weight.requires_grad_(), bias.requires_grad_()],
            max_iter=ITERATIONS,
            tolerance_grad=1e-8,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = x @ weight + bias
            fit = F.cross_entropy(logits, y) if y.ndim == 1 else _attribute_loss(logits, y)
            total = fit + l2 / 2 * weight.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(mean, scale, weight.detach(), bias.detach())

    def logits(self, features: Tensor) -> Tensor:
        """(N, K) float64 of features (N, D)."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias


def _attribute_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1).mean()


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """Right answers, bool: of classes y (N,), (N,); of attributes y (N, K), (N, K)."""
    return logits.argmax(1) == y if y.ndim == 1 else (logits > 0) == (y > 0.5)


def levels_of(run: Run, count: int) -> list[tuple[float, float]]:
    """Clean and `count` more, evenly over the run's noise levels up to the last: (share, sigma)."""
    if count < 0:
        raise UserError(f"--levels {count}: ask for 0 (clean images alone) or more")
    sigmas = run.model.sigmas
    places = sorted({round(i * (len(sigmas) - 1) / max(count, 1)) for i in range(1, count + 1)})
    return [(0.0, 0.0), *((place / max(len(sigmas) - 1, 1), float(sigmas[place])) for place in places)]


def probe(
    run: Run,
    *,
    split: str = "test",
    train: int = 2000,
    num: int = 1000,
    levels: int = 6,
    l2: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores of every map, of all together and of the head, from clean images to the noisiest.

    Fitted to the first `train` labelled images of the training split, scored on the first `num` of `split`.
    """
    if min(train, num) < 2:
        raise UserError("--train and --num: ask for 2 images or more of each")
    if not l2 > 0:
        raise UserError(f"--l2 {l2:g}: above 0 is wanted")
    run.require(["class_logits", "representations"], "a linear probe")
    asked = (("train", train), (split, num))
    parts = [(name, *labelled(run, name, count, seed)) for name, count in asked]
    places, scores = levels_of(run, levels), []
    for done, (t, sigma) in enumerate(places, 1):
        scores += list(_at_level(run, parts, t, sigma, l2, seed))
        if progress:
            progress("probing", done, len(places))
    return scores


def labelled(run: Run, split: str, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The first `limit` images of a split that have their label, or all of them: x0 and y as fits `hits`.

    UserError where there are none. A training image may have lost its label, and have a negative number.
    """
    labels = run.split(split).labels
    if labels is None:
        raise UserError(f"data set {run.info.name!r} has no labels to compare with")
    known = (labels >= 0).view(len(labels), -1).all(1).nonzero()[:, 0].tolist()
    if not known:
        raise UserError(f"no image of split {split!r} has its label")
    x0, y = run.examples(split, known[:limit], seed=seed)
    assert y is not None
    return x0, y


def _at_level(
    run: Run, parts: Sequence[tuple[str, Tensor, Tensor]], t: float, sigma: float, l2: float, seed: int
) -> Iterator[Score]:
    (_, _, y_train), (_, _, y_held) = parts
    (train, _), (held, logits) = (pooled(run, x0, sigma, (seed, split)) for split, x0, _ in parts)
    names = tuple(run.model.level_names)

    def score(name: str, width: int, found: Tensor) -> Score:
        return scored(name, t, sigma, width, found, y_held)

    for name, a, b in [
        *zip(names, train, held, strict=True),
        (ALL, torch.cat(train, 1), torch.cat(held, 1)),
    ]:
        fitted = Probe.fit(a, y_train, run.model.classes, l2)
        yield score(name, a.shape[1], fitted.logits(b))
    yield score(HEAD, 0, logits)


def scored(name: str, t: float, sigma: float, width: int, logits: Tensor, y: Tensor) -> Score:
    """The `Score` of logits (N, K) on classes or attributes y."""
    right = hits(logits, y)
    accuracy = float(right.double().mean())
    # Attributes of one image are not independent of one another: the interval is over images.
    low, high = wilson(round(accuracy * len(y)), len(y))
    return Score(name, t, sigma, width, accuracy, low, high)


@torch.no_grad()
def pooled(run: Run, x0: Tensor, sigma: float, key: tuple[int, str]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every map of the noised images x0 (N, C, H, W), pooled, (N, C_i) each, and the head's logits (N, K).

    On the CPU. sigma, VE units; key: seed and split, of the noise of an image.
    """
    network, size = run.model, run.settings.batch_size
    found, logits = [], []
    for start in range(0, len(x0), size):
        rows = x0[start : start + size]
        draws = ImageDraws(fold(key[0], "probe", key[1]), range(start, start + len(rows)), run.device)
        x = rows.to(run.device)
        x = x + sigma * draws.normal(*x.shape[1:]) if sigma else x
        level = x.new_full((len(x),), sigma)
        z = network.representations(x, level)
        found.append([part.float().cpu() for part in network.pooled(z)])
        logits.append(network.head(z, level).float().cpu())
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True)), torch.cat(logits)


def picture(scores: Sequence[Score]) -> bytes:
    """PNG: accuracy by share of the noise levels, a line a map, the head dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves: dict[str, list[Score]] = {}
    for score in scores:
        curves.setdefault(score.map, []).append(score)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    maps = [name for name in curves if name not in (ALL, HEAD)]
    for name, points in curves.items():
        place = maps.index(name) / max(len(maps) - 1, 1) if name in maps else 0.0
        style: dict[str, Any] = {"color": colormaps["viridis"](0.9 * place), "lw": 1.0}
        if name not in maps:
            style = {"color": "black", "lw": 1.6, "ls": "--" if name == HEAD else "-"}
        axes.plot([p.t for p in points], [p.accuracy for p in points], marker="o", ms=3, label=name, **style)
    axes.set(xlabel="share of the noise levels (0: clean)", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(fontsize=6, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
