"""The metric `classifier`: how good the head is, how well it knows that, and what noise does to it.

For `cdm-run evaluate`, beside core's accuracy of clean images. Of classes: negative log-likelihood and Brier
score, top-5 accuracy, expected calibration error in 15 bins of equal width (Guo et al. 2017), and accuracy by
noise level. Of attributes: accuracy over images and attributes, the macro averages of average precision and
F1, the error of calibration over all answers, and accuracy by noise level.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_joint.probe import hits, labelled, levels_of, pooled

BINS = 15
LEVELS = 5  # noise levels beside clean images


def classifier(config: Any, run: Run, *, split: str, seed: int) -> dict[str, float]:
    """The figures of the head on a split; `accuracy_t0.40`: at that share of the noise levels, 0: clean."""
    x0, y = labelled(run, split, None, seed)
    logits = run.classify(x0)
    figures = of_classes(logits, y) if y.ndim == 1 else of_attributes(logits, y)
    for t, sigma in levels_of(run, LEVELS):
        noisy = pooled(run, x0, sigma, (seed, split))[1]
        figures[f"accuracy_t{t:.2f}"] = float(hits(noisy, y).double().mean())
    return {**figures, "n": float(len(y))}


def of_classes(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Of logits (N, K) and classes y (N,) int64; nll in nats."""
    f = logits.double()
    p, classes = f.softmax(1), f.shape[1]
    confidence, guess = p.max(1)
    figures = {
        "nll": float(F.cross_entropy(f, y)),
        "brier": float((p - F.one_hot(y, classes)).square().sum(1).mean()),
        "ece": calibration_error(confidence, guess == y),
        "confidence": float(confidence.mean()),
    }
    if classes > 5:
        top = f.topk(5, dim=1).indices
        figures["top5"] = float((top == y[:, None]).any(1).double().mean())
    return figures


def of_attributes(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Of logits (N, K) and attributes y (N, K) in {0, 1}; nll in nats, a mean over images and attributes."""
    f, q = logits.double(), y.double()
    p, guess, wanted = f.sigmoid(), f > 0, q > 0.5
    both = (guess & wanted).sum(0).double()
    f1 = 2 * both / (guess.sum(0) + wanted.sum(0)).clamp(min=1)
    return {
        "nll": float(F.binary_cross_entropy_with_logits(f, q)),
        "accuracy": float((guess == wanted).double().mean()),
        "map": float(
            torch.stack([average_precision(f[:, k], wanted[:, k]) for k in _present(wanted)]).mean()
        ),
        "f1": float(f1[_present(wanted)].mean()),
        "ece": calibration_error(torch.maximum(p, 1 - p).flatten(), (guess == wanted).flatten()),
    }


def _present(wanted: Tensor) -> list[int]:
    """Attributes that some image has: of the others nothing can be found."""
    found: list[int] = wanted.any(0).nonzero()[:, 0].tolist()
    if not found:
        raise UserError("no image has any attribute: there is nothing to find")
    return found


def calibration_error(confidence: Tensor, hit: Tensor, bins: int = BINS) -> float:
    """sum_m |B_m| / n |acc(B_m) - conf(B_m)|, bins (m - 1) / M < conf <= m / M; both (n,)."""
    which = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.bincount(which, hit.double() - confidence, minlength=bins)
    return float(gaps.abs().sum()) / len(confidence)


def average_precision(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the wanted of the precision among all that score at least as high; both (n,), one wanted."""
    found = scores[wanted]

    def at_least(among: Tensor) -> Tensor:
        return len(among) - torch.searchsorted(among.sort().values, found)

    return (at_least(found).double() / at_least(scores)).mean()
