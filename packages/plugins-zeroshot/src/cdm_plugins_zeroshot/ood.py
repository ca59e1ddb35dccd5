"""Does an image belong to the data at all? Scores of a generative classifier, and how well they tell.

The larger a score, the more the image is like the data:

- `gap`, E loss(no class) - min_y E loss(y), what knowing the class is worth. An image of a class is explained
  better by it; one of no class is not. It costs a classifier one more "class".
- `bound`, the likelihood bound of `discrete_elbo` without a class, and `density`, log p(x) where the model
  knows it: simple images score high whatever they show (Nalisnick et al. 2019), which
- `corrected` mends: `density` plus the length in nats of the image's lossless code (Serrà et al. 2020, arXiv
  1909.11480, equation 3), here that of zlib.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_zeroshot.answers import Desk, Images
from cdm_plugins_zeroshot.discrete_elbo import class_free
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.methods import Method, varied
from cdm_plugins_zeroshot.results import Row

Floats = NDArray[np.float64]
SCORES = ("gap", "bound", "density", "corrected")


# -- scores --------------------------------------------------------------------------------------------------


def method_of(score: str, flat: Method, bayes: Method) -> Method:
    """What answers the question of a score, from the settings of two methods.

    gap: `flat` as it is; bound: with the bound's weights, levels drawn by them, in shifted blocks; density,
    corrected: `bayes` on clean images.
    """
    if score in ("density", "corrected"):
        return replace(bayes, bayes=replace(bayes.bayes, sigmas=(0.0,), centre="none"))
    if score == "gap":
        return flat
    return varied(
        flat, loss="l2", weight="elbo", bins=(), importance="weight", proposal=(), design="systematic"
    )


def needs_null(score: str) -> bool:
    """Whether "no class" is asked about as well."""
    return score in ("gap", "bound")


def allows(desk: Desk, score: str, method: Method) -> str | None:
    """Why the run has no such score; None where it has."""
    run = desk.run
    if needs_null(score) and getattr(run.model, "null_label", None) is None:
        return f'score {score!r} needs a model trained with "no class" among its labels; {run.name} was not'
    if score == "corrected" and run.info.levels is None:
        return f"score 'corrected' needs images with grey levels; {run.info.name!r} has none"
    return desk.allows(method)


def score_of(score: str, desk: Desk, method: Method, images: Images, rows: Sequence[Row]) -> Floats:
    """One number an image, (N,), from the answers to all images in order; nats but for `gap`."""
    raw = np.array([row["scores"] for row in rows], dtype=np.float64)
    if score == "gap":
        return null_gap(-raw[:, :-1], -raw[:, -1])
    run, numbers = desk.run, list(range(len(images)))
    if score == "bound":
        estimator = Estimator.of(run.model, method.estimator, run.info.shape)
        parts = torch.arange(len(images)).split(256)
        free = torch.cat([class_free(run.model, estimator, images.load(p.tolist()), None) for p in parts])
        return raw[:, -1] - free.numpy()
    density = np.logaddexp.reduce(raw[:, 0], axis=1) - math.log(raw.shape[2])
    if score == "density":
        return density
    return corrected(density, run.info.to_pixels(images.load(numbers)).numpy())


def null_gap(losses: Floats, null: Floats) -> Floats:
    """Loss without a class less that of the best class, (N,); losses (N, K), null (N,), of the same pairs."""
    return null - losses.min(1)


def on_data(run: Run, name: str) -> Run:
    """The run with the images of another data set, by name; UserError where they do not fit its model."""
    full, record = run.registry.find("dataset", name)
    data = record.load()(record.config() if record.config else None)
    ours, theirs = ((info.shape, info.levels) for info in (run.info, data.info))
    if ours != theirs:
        raise UserError(
            f"--against {full}: the run takes (C, H, W) {ours[0]} with {ours[1]} grey levels, "
            f"not {theirs[0]} with {theirs[1]}"
        )
    other = copy.copy(run)
    other.data, other.config = data, None
    return other


def code_nats(pixels: NDArray[np.uint8]) -> Floats:
    """Length of every image's code by zlib at its best, in nats, (N,); pixels (N, C, H, W)."""
    return np.array([len(zlib.compress(image.tobytes(), 9)) for image in pixels]) * (8 * math.log(2))


def corrected(log_density: Floats, pixels: NDArray[np.uint8]) -> Floats:
    """Log-density (N,) in nats of images whose pixels (N, C, H, W) are given, less what simplicity adds."""
    return log_density + code_nats(pixels)


# -- how well they tell --------------------------------------------------------------------------------------


class Detection(NamedTuple):
    """How well a score tells images of the data from others."""

    auroc: float  # probability that an image of the data scores higher than another; ties count half
    auroc_se: float
    fpr95: float  # share of others that are let in where 95% of the data are


def detection(inside: Floats, outside: Floats) -> Detection:
    """Of scores (N,) of the data and (M,) of other images, the larger the more like the data."""
    auroc = area(inside, outside)
    return Detection(auroc, _standard_error(auroc, inside, outside), false_positives(inside, outside))


def area(inside: Floats, outside: Floats) -> float:
    """Area under the receiver operating characteristic: Mann & Whitney's statistic over its maximum."""
    _check(inside, outside)
    ordered = np.sort(outside)
    below, up_to = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(outside))


def _standard_error(auroc: float, inside: Floats, outside: Floats) -> float:
    """Standard error of `area` (DeLong et al. 1988), from the spread of either side's placements."""
    variance = 0.0
    for ours, theirs in ((inside, outside), (outside, inside)):
        ordered = np.sort(theirs)
        placed = sum(np.searchsorted(ordered, ours, side) for side in ("left", "right")) / 2 / len(theirs)
        variance += float(np.var(placed, ddof=1)) / len(ours) if len(ours) > 1 else math.nan
    return math.sqrt(variance)


def false_positives(inside: Floats, outside: Floats, kept: float = 0.95) -> float:
    """Share of `outside` at or above the threshold that at least a share `kept` of `inside` reaches."""
    _check(inside, outside)
    rank = len(inside) - math.ceil(kept * len(inside))
    return float((outside >= np.sort(inside)[rank]).mean())


def _check(inside: Floats, outside: Floats) -> None:
    for name, scores in (("of the data", inside), ("others", outside)):
        if len(scores) == 0 or np.isnan(scores).any():
            raise UserError(f"images {name}: {len(scores)} scores, all of which must be numbers, 1 at least")
