"""What answers are worth: accuracy, calibration and cost, a line a method, and methods against each other.

Cost has three units. `class_evaluations`: the network asked about one image, one (level, noise) pair and one
class, or for one density of one class. `evaluations`: that in whole passes, what classes share counted once.
`seconds`: of this machine, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_core.metrics import wilson
from cdm_plugins_zeroshot.answers import Outcome
from cdm_plugins_zeroshot.calibration import Reliability, confidence_bins, reliability, risk_coverage
from cdm_plugins_zeroshot.methods import RULES, Method, varied
from cdm_plugins_zeroshot.statistics import (
    Difference,
    ErrorFit,
    McNemar,
    fit_error,
    mcnemar,
    paired_bootstrap,
)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """One method on N labelled images; means over images."""

    n: int
    accuracy: float
    low: float  # its 95% interval (Wilson 1927)
    high: float
    class_evaluations: float
    evaluations: float
    seconds: float
    undecided: float  # share of images whose two best classes are within their interval
    calibration: Reliability | None  # of probabilities by temperature
    selective: float | None  # mean error over all coverages, the surest answers first
    ece_by_cost: float | None  # of the probability to be right that a race's cost gives
    error_fit: ErrorFit | None  # error(N), of `flat`

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values = asdict(self)
        if self.calibration is not None:
            values["calibration"]["bins"] = [b._asdict() for b in self.calibration.bins]
        if self.error_fit is not None:
            values["error_fit"] = self.error_fit._asdict()
        return values


def line(outcome: Outcome, labels: Integers) -> Line:
    """The figures of an outcome on images with labels (N,)."""
    hit = outcome.predicted == labels
    right, n = int(hit.sum()), len(hit)
    low, high = wilson(right, n)
    p = outcome.probabilities
    return Line(
        n=n,
        accuracy=right / n,
        low=low,
        high=high,
        class_evaluations=float(outcome.class_evaluations.mean()),
        evaluations=float(outcome.evaluations.mean()),
        seconds=float(outcome.seconds.mean()),
        undecided=float(outcome.undecided.mean()),
        calibration=None if p is None else reliability(p, labels),
        selective=None if p is None else risk_coverage(p.max(1), hit).area,
        ece_by_cost=None if outcome.right is None else _ece(outcome.right, hit),
        error_fit=_error_fit(outcome, labels),
    )


def _ece(confidence: NDArray[np.float64], hit: NDArray[np.bool_]) -> float:
    return sum(b.n * abs(b.accuracy - b.confidence) for b in confidence_bins(confidence, hit)) / len(hit)


def _error_fit(outcome: Outcome, labels: Integers) -> ErrorFit | None:
    """Through the errors of the later half, on a logarithmic scale, of the numbers of pairs."""
    if outcome.method.name != "flat":
        return None
    counts = [n for n, _ in outcome.rows[0]["prefixes"]]
    said = np.array([[label for _, label in row["prefixes"]] for row in outcome.rows])
    later = slice(len(counts) // 2, None)
    if len(counts[later]) < 2:
        return None
    return fit_error(counts[later], (said != labels[:, None]).mean(0).tolist()[later])


@dataclass(frozen=True)
class Contrast:
    """Two methods on the same images."""

    first: str
    second: str
    test: McNemar
    gain: Difference  # in accuracy, of the second over the first

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = {"first": self.first, "second": self.second}
        return {**names, **self.test._asdict(), "gain": self.gain._asdict()}


def contrast(outcomes: Mapping[str, Outcome], labels: Integers, *, seed: int = 0) -> list[Contrast]:
    """Every two of the outcomes, in their order."""
    hits = {name: outcome.predicted == labels for name, outcome in outcomes.items()}
    return [
        Contrast(a, b, mcnemar(hits[a], hits[b]), paired_bootstrap(hits[a] * 1.0, hits[b] * 1.0, seed=seed))
        for a, b in combinations(hits, 2)
    ]


def techniques(base: Method) -> dict[str, Method]:
    """What `ablate` puts side by side, by name; `base`, a method `stages`, gives all other settings.

    The first is the estimator of the re-implementation for MNIST: independent levels, and no class given up.
    """
    unstaged = replace(base.elimination, rule="none", stage_pairs=(), stage_keep=())
    flat = varied(
        replace(base, name="flat", elimination=unstaged),
        antithetic=False,
        loss="l2",
        weight="simple",
        importance="uniform",
        wordings="mean",
        bins=(),
        proposal=(),
    )
    vdc = varied(flat, design="vdc")
    found = {
        "independent levels": varied(flat, design="iid"),
        "grid of levels": varied(flat, design="grid"),
        "stratified levels": varied(flat, design="stratified"),
        "van der Corput (vdC)": vdc,
        "vdC, loss l1": varied(vdc, loss="l1"),
        "vdC, heuristic weights": varied(vdc, weight="heuristic"),
        "vdC, the bound's weights": varied(vdc, weight="elbo"),
    }
    if vdc.estimator.pairs % 2 == 0:
        found["vdC, antithetic noise"] = varied(
            vdc, antithetic=True, block=vdc.estimator.block + vdc.estimator.block % 2
        )
    for rule in ("halving", "race"):
        found[f"vdC, {rule}"] = replace(vdc, name=rule, elimination=replace(unstaged, rule=RULES[rule]))
    return found | {"vdC, stages": replace(vdc, name="stages", elimination=base.elimination)}
