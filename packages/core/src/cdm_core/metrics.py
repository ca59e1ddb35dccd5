"""Figures of a run that need no other network: functions `(config, run, *, split, seed) -> {name: float}`.

All are computed on the named split with draws keyed by the seed: two runs are compared on the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_core import baselines as densities
from cdm_core.elbo import elbo
from cdm_core.errors import UserError
from cdm_core.random import Draws, fold
from cdm_core.runs import Likelihood, Run

FILE = "evaluation.json"  # in the run folder: what `evaluate` found last
SAMPLES = 256  # images that the sample-based metrics share
HELD_OUT = 2048  # held-out images whose nearest neighbours are sought
PROJECTIONS = 512
BOUNDED = 1024  # images whose likelihood is bounded
PAIRS = 32  # (level, noise) pairs an image that the bound is estimated from
CHUNK = 2048  # training images compared at a time


def nll(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """Negative log-likelihood per image and per dimension, with standard errors over images."""
    scores = run.likelihood(split, seed=seed).summary()
    negated = {key: -scores[key] for key in ("nats", "nats_per_dim")}
    return scores | negated


def bound(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """What the ancestral sampler over all noise levels guarantees of the likelihood (`cdm_core.elbo`).

    Names as in `nll`, with standard errors over images. A one-pass density far below it is not normalised.
    """
    x0, _ = run.examples(split, first(run, split, BOUNDED), seed=seed)
    sigmas, start = run.chain()
    draws = Draws(fold(seed, "bound"), len(x0), device=run.device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        size = run.settings.batch_size
        parts = zip(x.split(size), sigma.split(size), strict=True)
        return torch.cat([run.model.denoise(*part) for part in parts])

    nats = elbo(denoise, x0.to(run.device), sigmas, start, draws, pairs=PAIRS).cpu()
    scores = Likelihood(split, 1, seed, "none", run.info.dim, nats, run.info.bits_per_dim(nats)).summary()
    return scores | {key: -scores[key] for key in ("nats", "nats_per_dim")}


def baselines(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """The densities of `cdm_core.baselines` on the very draws that `nll` scores; the true one where known.

    Names as in `nll`, after the density's own: `gaussian`, `gaussian_mixture`, `truth`.
    """
    densities.check_size(len(run.split("train")), run.info.dim)
    train, valid, held_out = (
        run.examples(name, first(run, name, densities.MAX_IMAGES), seed=seed)[0].flatten(1).double()
        for name in ("train", "valid", split)
    )
    fitted = densities.fit(train.numpy(), valid.numpy(), seed=seed)
    values = {"n_train": float(len(train)), "n": float(len(held_out))}
    for name, density in fitted.items():
        values |= _described(name, run, torch.from_numpy(density.score_samples(held_out.numpy())))
        values[f"{name}_ridge"] = density.reg_covar
    truth = getattr(run.data, "mixture", None)
    return values if truth is None else values | _described("truth", run, truth.log_density(held_out))


def _described(name: str, run: Run, nats: Tensor) -> dict[str, float]:
    bits = run.info.bits_per_dim(nats)
    return {
        f"{name}_nats_per_dim": -float(nats.mean()) / run.info.dim,
        f"{name}_bits_per_dim": float(bits.mean()),
        f"{name}_bits_per_dim_se": float(bits.std()) / math.sqrt(len(bits)),
    }


def nearest_neighbour(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """Are samples copies? Distances to the nearest training image, against those of held-out images.

    median_ratio: of the two medians; about 1 for images as new as the held-out ones, towards 0 for copies.
    share_closer: of samples, nearer to a training image than all but 1% of held-out images; 0.01 if as new.
    """
    samples = run.cached_samples(SAMPLES, seed)
    ours, _ = nearest(run, comparable(run, samples))
    held_out, _ = run.examples(split, first(run, split, HELD_OUT), seed=seed)
    theirs, _ = nearest(run, comparable(run, held_out))
    return {
        "median_ratio": float(ours.median() / theirs.median()),
        "share_closer": float((ours < theirs.quantile(0.01)).float().mean()),
        "n": float(len(ours)),
        "n_held_out": float(len(theirs)),
    }


def sliced_wasserstein(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """Sliced 2-Wasserstein distance of samples to held-out data, beside that of training to held-out data.

    The floor is what an ideal sampler would get at this number of images. Model units.
    """
    held_out, _ = run.examples(split, first(run, split, SAMPLES), seed=seed)
    train, _ = run.examples("train", first(run, "train", SAMPLES), seed=seed)
    count = min(len(held_out), len(train))
    samples = run.cached_samples(SAMPLES, seed)[:count]
    distance, floor = (sliced_distance(x, held_out[:count], seed=seed) for x in (samples, train[:count]))
    return {"distance": distance, "floor": floor, "n": float(count)}


def accuracy(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """Share of images whose class is predicted, with its 95% interval (Wilson 1927)."""
    x0, labels = run.examples(split, seed=seed)
    if labels is None:
        raise UserError(f"data set {run.info.name!r} has no labels to compare with")
    right = int((run.classify(x0).argmax(1) == labels).sum())
    low, high = wilson(right, len(labels))
    return {"accuracy": right / len(labels), "low": low, "high": high, "n": float(len(labels))}


# -- their parts ---------------------------------------------------------------------------------------------


def first(run: Run, split: str, limit: int) -> range:
    """Indices of the first `limit` images of a split."""
    return range(min(limit, len(run.split(split))))


def comparable(run: Run, x0: Tensor) -> Tensor:
    """Images (N, d) float32 as distances see them: grey levels, without dequantisation noise."""
    if run.info.levels is None:
        return x0.flatten(1).float()
    return run.info.to_pixels(x0).flatten(1).float() * 2 / (run.info.levels - 1)


def nearest(run: Run, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest training image and its index, (N,) float32 and (N,) int64.

    queries (N, d) as `comparable` gives them. Where training flips images, so does the search.
    """
    best = torch.full((len(queries),), math.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start, images in _training_chunks(run):
        for view in [images, images.flip(-1)] if run.info.flip else [images]:
            rows = comparable(run, view)
            found = torch.cdist(queries, rows).argmin(1)
            distance = (queries - rows[found]).norm(dim=1)  # cdist cancels where distances are small
            closer = distance < best
            best[closer], index[closer] = distance[closer], found[closer] + start
    return best, index


def _training_chunks(run: Run) -> Iterator[tuple[int, Tensor]]:
    split = run.split("train")
    for start in range(0, len(split), CHUNK):
        indices = list(range(start, min(start + CHUNK, len(split))))
        pixels, _ = split.__getitems__(indices)
        yield start, run.info.to_model(pixels, Draws(fold(0, "nearest", start), len(indices)))


def sliced_distance(a: Tensor, b: Tensor, *, seed: int = 0, projections: int = PROJECTIONS) -> float:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) of two samples of equal size, (N, ...) each."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    directions = Draws(fold(seed, "projections"), projections).normal(a.shape[1]).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    gaps = (a @ directions.T).sort(0).values - (b @ directions.T).sort(0).values
    return float(gaps.square().mean().sqrt())


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927); never leaves [0, 1]."""
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


# -- all of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: values[metric][figure], and why a metric was left out."""

    split: str
    seed: int
    step: int | None
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def read(path: Path) -> Evaluation | None:
    """What a JSON file of `Evaluation.to_dict` holds; None where there is none or it is damaged."""
    try:
        return Evaluation(**json.loads(path.read_text(), object_hook=_with_nan))
    except (OSError, ValueError, TypeError):
        return None


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    # A figure that was not finite is null in JSON. The fields of Evaluation itself may well be None.
    return values if "values" in values else {k: math.nan if v is None else v for k, v in values.items()}


def evaluate(
    run: Run,
    *,
    split: str = "test",
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Compute the metrics `names`; None: every registered one, noting those that the run does not allow.

    A metric that was asked for by name and cannot be computed raises UserError.
    """
    registry = run.registry
    if names:
        records = dict(registry.find("metric", name) for name in names)
    else:
        records = registry.components("metric")
    result = Evaluation(split, seed, run.step)
    for name, record in sorted(records.items()):
        if progress:
            progress(name)
        try:
            run.require(record.requires, f"metric {name!r}")
            config = record.config() if record.config else None
            result.values[name] = dict(record.load()(config, run, split=split, seed=seed))
        except UserError as error:
            if names:
                raise
            result.skipped[name] = str(error)
    return result
