"""Linear probes against scikit-learn's, and where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cdm_core.errors import UserError
from cdm_plugins_joint.probe import ALL, HEAD, Probe, hits, labelled, levels_of, picture, probe


def blobs(classes: int = 3, rows: int = 150) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % classes
    means = torch.randn(classes, 4, generator=draw)
    return means[y] + torch.randn(rows, 4, generator=draw) * torch.tensor([1.0, 5.0, 0.1, 1.0]), y


def test_it_is_multinomial_regression() -> None:
    x, y = blobs()
    found = Probe.fit(x, y, 3, l2=0.01)
    standard = ((x.double() - x.double().mean(0)) / x.double().std(0)).numpy()
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=10_000).fit(standard, y.numpy())
    expected = torch.from_numpy(theirs.predict_log_proba(standard))
    torch.testing.assert_close(found.logits(x).log_softmax(1), expected, rtol=0, atol=1e-4)


def test_attributes_are_fitted_each_by_itself() -> None:
    x, y = blobs()
    attributes = torch.stack([y == 0, y < 2], dim=1).long()
    found = Probe.fit(x, attributes, 2, l2=0.01).logits(x)
    standard = ((x.double() - x.double().mean(0)) / x.double().std(0)).numpy()
    for k in range(2):
        theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=10_000)
        expected = theirs.fit(standard, attributes[:, k].numpy()).decision_function(standard)
        np.testing.assert_allclose(found[:, k].numpy(), expected, atol=1e-3)


def test_a_constant_feature_does_no_harm() -> None:
    x, y = blobs()
    plain = Probe.fit(x, y, 3, l2=0.01).logits(x)
    dead = Probe.fit(torch.cat([x, torch.ones(len(x), 1)], 1), y, 3, l2=0.01)
    torch.testing.assert_close(dead.logits(torch.cat([x, torch.ones(len(x), 1)], 1)), plain)


def test_hits_of_attributes_are_counted_one_by_one() -> None:
    right = hits(torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[1, 1], [0, 1]]))
    assert right.tolist() == [[True, False], [False, True]]


def test_levels_are_clean_then_evenly_spaced(exact_run: Any) -> None:
    run = exact_run()
    sigmas = run.model.sigmas
    assert levels_of(run, 0) == [(0.0, 0.0)]
    found = levels_of(run, 3)
    assert [sigma for _, sigma in found] == [0.0, *(float(sigmas[i]) for i in (33, 66, 99))]
    assert found[-1][0] == 1.0


def test_noise_hides_the_class_from_probe_and_head_alike(exact_run: Any) -> None:
    scores = probe(exact_run(), train=120, num=120, levels=2)
    assert [score.map for score in scores] == ["image", ALL, HEAD] * 3
    by_map = {name: [s.accuracy for s in scores if s.map == name] for name in ("image", ALL, HEAD)}
    assert by_map[HEAD][0] == 1.0
    assert by_map["image"][0] == 1.0
    assert by_map[HEAD][2] < by_map[HEAD][1] <= by_map[HEAD][0]
    assert by_map["image"] == by_map[ALL]  # there is one map
    for score in scores:
        assert score.low - 1e-9 <= score.accuracy <= score.high + 1e-9
        assert score.width == (0 if score.map == HEAD else 16)
    assert picture(scores).startswith(b"\x89PNG")


def test_figures_depend_on_no_batch(exact_run: Any) -> None:
    few, many = (probe(exact_run(batch_size=size), train=50, num=50, levels=1) for size in (7, 64))
    assert [s.accuracy for s in few] == [s.accuracy for s in many]


def test_images_without_a_label_are_left_out(exact_run: Any) -> None:
    run = exact_run()
    y = run.split("train").labels.clone()
    y[::2] = -1
    y[1] = -2 - y[1]
    run.split("train")._labels = y
    x0, found = labelled(run, "train", 10, 0)
    assert torch.equal(found, y[3:22:2])
    assert torch.equal(x0, run.examples("train", range(3, 22, 2))[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"levels": -1}, "--levels -1"), ({"train": 1}, "2 images or more"), ({"l2": 0.0}, "--l2 0: above 0")],
)
def test_what_cannot_be_is_refused(exact_run: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        probe(exact_run(), **options)
