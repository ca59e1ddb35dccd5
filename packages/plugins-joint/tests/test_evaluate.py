"""The metric of the head, figure by figure against scikit-learn or by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from cdm_plugins_joint.evaluate import (
    average_precision,
    calibration_error,
    classifier,
    of_attributes,
    of_classes,
)


def test_classes_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    figures = of_classes(p.log(), torch.tensor([0, 2]))
    assert figures["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2, rel=1e-6)
    assert figures["brier"] == pytest.approx((0.09 + 0.04 + 0.01 + 0.01 + 0.36 + 0.49) / 2, rel=1e-6)
    assert figures["ece"] == pytest.approx((0.3 + 0.6) / 2, rel=1e-6)
    assert figures["confidence"] == pytest.approx(0.65, rel=1e-6)
    assert "top5" not in figures


def test_the_five_best_of_more_classes() -> None:
    logits = torch.arange(7.0).expand(7, 7)
    assert of_classes(logits, torch.arange(7))["top5"] == pytest.approx(5 / 7)


def test_a_calibrated_classifier_has_no_error_and_a_boaster_has() -> None:
    hit = torch.arange(100) < 80
    assert calibration_error(torch.full((100,), 0.8, dtype=torch.float64), hit) == pytest.approx(0, abs=1e-9)
    assert calibration_error(torch.ones(100, dtype=torch.float64), hit) == pytest.approx(0.2)


def test_average_precision_with_and_without_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = torch.rand(60, generator=draw) < 0.3
    for scores in (torch.randn(60, generator=draw), torch.randint(6, (60,), generator=draw)):
        expected = average_precision_score(wanted, scores)
        assert float(average_precision(scores.double(), wanted)) == pytest.approx(expected)


def test_attributes() -> None:
    draw = torch.Generator().manual_seed(1)
    logits, y = torch.randn(80, 4, generator=draw), torch.randint(2, (80, 4), generator=draw)
    y[:, 3] = 0  # of an attribute that nobody has nothing can be found
    figures = of_attributes(logits, y)
    assert figures["f1"] == pytest.approx(f1_score(y[:, :3], logits[:, :3] > 0, average="macro"))
    expected = average_precision_score(y[:, :3], logits[:, :3].double(), average="macro")
    assert figures["map"] == pytest.approx(expected)
    assert figures["accuracy"] == pytest.approx(float(((logits > 0) == (y > 0)).double().mean()))


def test_the_metric_of_an_exact_head(exact_run: Any) -> None:
    figures = classifier(None, exact_run(), split="test", seed=0)
    accuracies = [value for name, value in figures.items() if name.startswith("accuracy_t")]
    assert len(accuracies) == 6
    assert accuracies[0] == 1.0
    assert accuracies == sorted(accuracies, reverse=True)
    assert figures["n"] == 120
    assert figures["nll"] < 1e-3
