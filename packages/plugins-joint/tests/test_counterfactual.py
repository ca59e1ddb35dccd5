"""Counterfactuals of images around a few patterns, by a model that knows them exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_joint import counterfactual as making
from cdm_plugins_joint.counterfactual import BACK, RESAMPLED, SAMPLED, STEERED, WAYS, counterfactuals

SAFE: dict[str, Any] = {"through": "decoder", "scale": 3.0, "schedule": "sqrt-noise"}


@pytest.fixture
def run(exact_run: Any) -> Run:
    return exact_run(**SAFE)


def test_the_class_changes_and_the_rest_stays(run: Run, exact_run: Any) -> None:
    """Noised enough to lose the pixel that tells the class, not the twelve that are nothing to it."""
    found = counterfactuals(run, exact_run(), num=60, start=0.25)
    means = found.summary()
    assert list(means) == list(WAYS)
    assert means[STEERED]["judge_rate"] > 0.9
    assert means[STEERED]["judge_flip_rate"] == means[STEERED]["judge_rate"]  # none was so before
    assert means[RESAMPLED]["judge_rate"] > 0.9
    assert means[BACK]["judge_rate"] < 0.35
    assert means[SAMPLED]["judge_rate"] < 0.45
    below = {way: x[:, :, 1:].mean((1, 2, 3)).sign() for way, x in found.outputs.items()}
    kept = {
        way: float((sign == found.x0[:, :, 1:].mean((1, 2, 3)).sign()).double().mean())
        for way, sign in below.items()
    }
    assert kept[STEERED] > 0.9
    assert kept[RESAMPLED] < 0.65
    for figure in ("rmse", "feature_distance"):
        assert means[BACK][figure] < means[STEERED][figure] < 0.7 * means[RESAMPLED][figure]


def test_figures_are_what_they_say(run: Run) -> None:
    found = counterfactuals(run, num=10, start=0.5)
    x0, output = found.x0, found.outputs[STEERED].clamp(-1, 1)
    figures = found.figures[STEERED]
    gap = (output - x0).double().flatten(1)
    torch.testing.assert_close(figures["rmse"], gap.square().mean(1).sqrt())
    torch.testing.assert_close(figures["feature_distance"], gap.norm(dim=1))  # its features are the pixels
    posterior = run.classify(output).double().softmax(1)
    assert torch.equal(figures["head_answer"], posterior.argmax(1))
    torch.testing.assert_close(figures["head_p"], posterior.gather(1, found.wish.column[:, None])[:, 0])
    assert found.sigma == pytest.approx(float(run.model.sigmas[49]))
    spread = (found.noised - x0).square().mean().sqrt()
    assert float(spread) == pytest.approx(found.sigma, rel=0.2)


def test_an_image_does_not_depend_on_the_others(run: Run, exact_run: Any) -> None:
    few, many = (counterfactuals(r, num=n) for r, n in ((exact_run(batch_size=2, **SAFE), 5), (run, 9)))
    for way in WAYS:
        torch.testing.assert_close(few.outputs[way], many.outputs[way][:5])
    assert few.indices == many.indices[:5]


def test_rows_say_it_all(run: Run) -> None:
    found = counterfactuals(run, num=4)
    rows = found.rows()
    assert all(list(row) == list(rows[0]) for row in rows)
    assert rows[2]["image"] == 2
    assert rows[2]["target"] == (rows[2]["label"] + 1) % 3
    assert rows[1]["counterfactual_rmse"] == float(found.figures[STEERED]["rmse"][1])
    assert rows[1]["and_back_head_answer"] == int(found.figures[BACK]["head_answer"][1])


def test_targets(run: Run) -> None:
    x0, y = run.examples("test", range(20))
    assert torch.equal(making.wished(run, x0, y, "next").y, (y + 1) % 3)
    logits = run.classify(x0)
    assert torch.equal(making.wished(run, x0, None, "next").y, (logits.argmax(1) + 1) % 3)
    assert torch.equal(making.wished(run, x0, y, "second").y, logits.argsort(1)[:, -2])
    assert torch.equal(making.wished(run, x0, y, 1).y, torch.ones(20, dtype=torch.int64))
    with pytest.raises(UserError, match="--target 3 is out of range: the classes are 0 to 2"):
        making.wished(run, x0, y, 3)
    labels = run.split("test").labels
    indices = making.chosen(run, "test", 50, 1)
    assert len(indices) == 50
    assert not bool((labels[indices] == 1).any())


def test_an_attribute_is_turned_over(exact_run: Any) -> None:
    run = exact_run(multi_label=True, **SAFE)
    found = counterfactuals(run, num=30, target=1, start=0.6)
    seen = run.classify(found.x0) > 0
    assert torch.equal(found.wish.value, ~seen[:, 1])
    assert torch.equal(found.wish.y[:, 0] > 0, seen[:, 0])
    assert found.summary()[STEERED]["head_rate"] > 0.7
    assert found.summary()[BACK]["head_rate"] < found.summary()[STEERED]["head_rate"] - 0.3
    with pytest.raises(UserError, match="--target next: of a model of attributes name one, 0 to 1"):
        making.wished(run, found.x0, None, "next")


def test_levels(run: Run) -> None:
    sigmas = run.model.sigmas
    assert torch.equal(making.levels_below(run, 0.2, None), sigmas[:20].flip(0))  # no more than there are
    assert torch.equal(making.levels_below(run, 1.0, 2), sigmas[[99, 0]])
    assert len(making.levels_below(run, 1.0, None)) == 40
    assert len(making.levels_below(run, 1e-6, None)) == 1
    with pytest.raises(UserError, match=r"--steps 21: from --start 0\.2 there are 1 to 20"):
        making.levels_below(run, 0.2, 21)
    with pytest.raises(UserError, match="a share of the noise levels is wanted, above 0 and at most 1"):
        making.levels_below(run, 1.5, None)


def test_a_flip_rate_of_nothing_is_nan(run: Run) -> None:
    """Every image was of the target already."""
    found = counterfactuals(run, num=3, target="second")
    found.before["head_hit"][:] = True
    assert math.isnan(found.summary()[STEERED]["head_flip_rate"])


def test_a_run_without_a_guide_gets_the_plugins_own(run: Run) -> None:
    from dataclasses import replace

    bare = run.sampled(replace(run.sampling, adapter=None))
    steered = making.steerable(bare)
    assert steered.sampling.adapter is not None
    assert steered.sampling.adapter.name == "joint/representations"
    assert making.steerable(run) is run


def test_a_judge_of_other_images_is_refused(run: Run, exact_run: Any) -> None:
    from dataclasses import replace

    judge = exact_run()
    judge.info = replace(judge.info, shape=(1, 5, 5))
    with pytest.raises(UserError, match=r"is of images \(1, 5, 5\) in 3 classes"):
        counterfactuals(run, judge)


def test_the_picture_shows_as_many_columns_as_asked(run: Run) -> None:
    import io

    from PIL import Image

    found = counterfactuals(run, num=5)
    narrow, wide = (Image.open(io.BytesIO(making.picture(found, run, n))) for n in (2, 50))
    assert narrow.height == wide.height
    assert wide.width - narrow.width == pytest.approx(3 * 1.05 * 130, abs=5)
