"""The judge and the comparison, on mixtures where rates and distances are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_guidance.compare import (
    CONDITIONAL,
    GUIDED,
    TRAINING,
    UNGUIDED,
    Judge,
    check_alike,
    check_judge,
    compare,
    guide_settings,
    sampled,
    sampling_of,
    save,
    skipped,
    unguided,
    with_guide,
)

Load = Callable[..., Run]
EXACT = ("adapter.name=guide", "adapter.look=x_t")  # with the exact noisy classifier: samples p(x0 | y)


def test_a_row_of_the_true_distribution(load: Load) -> None:
    """Rate: the exact accuracy, by which the mean probability of the class also goes; distances: small."""
    judge = load("judge")
    court = Judge(judge, "test", 4000)
    x0, y = judge.examples("test", range(4000, 8000))
    row = court.row("fresh", x0, y, 0.5)
    posterior = judge.model.mixture.class_logits(judge.examples("valid")[0], 0.0).exp()
    accuracy = float(posterior.amax(1).mean())
    assert row.target_rate == pytest.approx(accuracy, abs=4 * math.sqrt(accuracy * (1 - accuracy) / 4000))
    assert row.confidence == pytest.approx(float(posterior.square().sum(1).mean()), abs=0.02)
    assert 0 <= row.frechet < 0.005
    assert min(row.precision, row.recall) > 0.95
    assert (row.name, row.seconds) == ("fresh", 0.5)


def test_a_shift_is_the_distance_of_its_square(load: Load) -> None:
    court = Judge(load("judge"), "test", 500)
    shift = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    row = court.row("shifted", court.images + shift, None)
    assert row.frechet == pytest.approx(25.0, rel=1e-5)
    assert (row.target_rate, row.confidence) == (None, None)


def test_samples_that_are_not_finite_are_infinitely_far(load: Load) -> None:
    court = Judge(load("judge"), "test", 50)
    x0 = court.images.clone()
    x0[3, 0] = math.nan
    row = court.row("broken", x0, court.labels)
    assert (row.target_rate, row.confidence, row.frechet) == (0.0, 0.0, math.inf)
    assert court.row("broken", x0, None).target_rate is None


def test_images_are_clamped_before_they_are_judged_and_points_are_not(load: Load) -> None:
    judge = load("judge")
    court = Judge(judge, "test", 50)
    far = court.images * 10
    points = court.row("points", far, None)
    judge.info = DataInfo("images", (2, 1, 1), num_classes=4)
    assert court.row("images", far, None).frechet == court.row("images", far.clamp(-1, 1), None).frechet
    assert points.frechet > 10 * court.row("images", far, None).frechet


def test_the_comparison(load: Load) -> None:
    """Unguided: the classes asked for come by chance. Guided exactly: as often as by a denoiser told them."""
    run, known, seen = load("ring", *EXACT), load("known"), []
    rows, samples = compare(run, load("judge"), known, num=800, progress=lambda *given: seen.append(given))
    training, plain, guided, told = rows
    assert [row.name for row in rows] == list(samples) == [TRAINING, UNGUIDED, GUIDED, CONDITIONAL]
    assert plain.target_rate == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 800))
    court = Judge(load("judge"), "test", 800)
    real = court.row("held-out images", court.images, court.labels)
    assert real.target_rate is not None
    assert guided.target_rate == pytest.approx(real.target_rate, abs=0.06)
    assert guided.target_rate == told.target_rate  # one and the same denoiser, from the same noise
    torch.testing.assert_close(samples[GUIDED], samples[CONDITIONAL], atol=1e-3, rtol=0)
    assert 1e-4 < training.frechet < 0.5  # 50 other images: neither itself nor far
    assert torch.equal(samples[TRAINING], run.examples("train")[0])
    assert all(row.frechet < 0.03 for row in rows[1:])
    assert [row.skipped for row in rows] == [None, None, 0, None]
    assert all(row.seconds and row.seconds > 0 for row in rows[1:])
    assert {name for name, _, _ in seen} == {UNGUIDED, GUIDED, CONDITIONAL}
    assert torch.equal(samples[UNGUIDED], load("ring").sample(800))
    assert torch.equal(
        sampled(Judge(load("judge"), "test", 9), "g", run, 800, 0, progress=None)[1], samples[GUIDED]
    )


def test_real_images_are_others_than_those_compared_with(load: Load) -> None:
    """Judged against itself, a set would be at distance 0."""
    row, x0 = Judge(load("judge"), "train", 40).real()
    assert (row.name, len(x0)) == ("test images", 40)
    assert torch.equal(x0, load("judge").examples("test", range(40))[0])
    assert row.frechet > 1e-4


def test_a_denoiser_that_must_be_told_the_classes(load: Load) -> None:
    """Unguided, too, it is told them; nobody asks it without."""
    run, classes = load("known", *EXACT), []
    exact = run.model.mixture

    def denoise(x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise UserError("no class of its own for none")
        classes.append(set(y.tolist()))
        return exact.denoise(x, sigma, y)

    run.model.denoise = denoise
    rows, samples = compare(run, load("judge"), num=40)
    assert classes
    assert all(seen == {0, 1, 2, 3} for seen in classes)
    plain, labels = unguided(run)
    assert (plain.sampling.adapter, labels) == (None, None)
    assert torch.equal(samples[UNGUIDED], load("known").sample(40))
    assert rows[1].target_rate is not None
    assert rows[1].target_rate > 0.7
    assert unguided(load("ring", *EXACT))[1] == "none"


def test_setting_up_is_not_charged(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that first calls alone move, by a second each."""
    run, known, now = load("ring", *EXACT), load("known"), [0.0]
    monkeypatch.setattr("cdm_plugins_guidance.compare.time.perf_counter", lambda: now[0])

    def slow_at_first(owner: object, name: str) -> None:
        own, calls = getattr(owner, name), []

        def call(*given: object) -> object:
            now[0] += 0.0 if calls else 1.0
            calls.append(name)
            return own(*given)

        setattr(owner, name, call)

    for owner, name in ((run, "source"), (run.model, "denoise"), (run.model, "class_logits")):
        slow_at_first(owner, name)
    slow_at_first(known, "source")
    slow_at_first(known.model, "denoise")
    rows, _ = compare(run, load("judge"), known, num=8)
    assert now == [5.0]
    assert [row.seconds for row in rows] == [None, 0.0, 0.0, 0.0]


def test_gradients_that_are_not_finite_are_counted(load: Load) -> None:
    """Those of the timed samples alone: at one step of four, one image of eight."""
    run = load("ring", *EXACT, "sample.steps=4")
    exact = run.model.class_logits

    def broken(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        logits = exact(x, sigma)
        wrong = (sigma == sigma.new_tensor(10.0)) & (torch.arange(len(x)) == 3)
        return logits * torch.where(wrong, math.nan, 1.0)[:, None]

    run.model.class_logits = broken
    rows, _ = compare(run, load("judge"), num=8)
    assert rows[2].skipped == 1
    assert skipped(run) == 2  # and of the samples before them
    assert skipped(load("ring")) is None


def test_latents_are_judged_once_decoded(load: Load) -> None:
    """Latents of (2, 2, 1) whose upper half is the image, doubled."""
    run, judge = load("ring", *EXACT), load("judge")
    exact = run.model.denoise

    def denoise(x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return exact(x[:, :, :1], sigma, y).expand(-1, -1, 2, -1)

    run.model.denoise, run.model.to_images = denoise, lambda latents: latents[:, :, :1] / 2
    run.model.class_logits = lambda x, sigma: judge.model.class_logits(x[:, :, :1], sigma)
    run.info = DataInfo("latents", (2, 2, 1), levels=None, num_classes=4)
    check_alike(run, judge, "--judge")
    rows, samples = compare(run, judge, num=40)
    assert all(len(x0[0].flatten()) == 2 for x0 in samples.values())
    again = Judge(judge, "test", 40).row(GUIDED, samples[GUIDED], torch.arange(40) % 4)
    assert rows[2].frechet == again.frechet
    run.model.to_images = lambda latents: latents
    with pytest.raises(UserError, match=r"--judge .* is of images \(2, 1, 1\) in 4 classes, .* \(2, 2, 1\)"):
        check_alike(run, judge, "--judge")


def test_what_is_saved(load: Load, tmp_path: Path) -> None:
    run = load("ring", *EXACT)
    rows, samples = compare(run, load("judge"), num=40)
    folder = save(tmp_path / "out", run, rows, samples, {"sampling": sampling_of(run)})
    found = json.loads((folder / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == [TRAINING, UNGUIDED, GUIDED]
    assert found["rows"][0]["seconds"] is None
    assert found["sampling"]["adapter"]["look"] == "x_t"
    assert found["sampling"]["sampler"]["name"] == "core/ddpm"
    pictures = {path.name: path.read_bytes()[:4] for path in folder.glob("*.png")}
    assert pictures == dict.fromkeys(["training-images.png", "unguided.png", "guided.png"], b"\x89PNG")


def test_settings_are_replaced_and_the_run_stays(load: Load) -> None:
    from dataclasses import replace

    run = load("ring", *EXACT)
    own = guide_settings(run)
    other = with_guide(run, replace(own, scale=3.0))
    assert (guide_settings(run).scale, guide_settings(other).scale) == (1.0, 3.0)
    assert not torch.equal(run.sample(4), other.sample(4))
    with pytest.raises(UserError, match="adapter: gamma, variance and peak belong to rule 'mean'"):
        with_guide(run, replace(own, gamma=1.0))


def test_who_may_not_judge(load: Load, runs: Path) -> None:
    run = load("ring", *EXACT)
    with pytest.raises(UserError, match="ring has a part in the sampling, and a guide cannot judge itself"):
        check_judge(run, load("ring"))
    named = load("ring", "adapter.name=guide", f"adapter.classifier.name=run:{runs / 'judge'}")
    with pytest.raises(UserError, match="judge has a part in the sampling"):
        check_judge(named, load("judge"))
    with pytest.raises(UserError, match=r"line-judge is of images \(1, 1, 1\) in 2 classes"):
        check_judge(run, load("line-judge"))
    with pytest.raises(UserError, match="is sampled through no guide"):
        check_judge(load("ring"), load("judge"))


def test_bad_input_is_explained(load: Load) -> None:
    run, judge = load("ring", *EXACT), load("judge")
    with pytest.raises(UserError, match="--num 4: a judge needs 5 samples or more"):
        compare(run, judge, num=4)
    with pytest.raises(UserError, match=r"--conditional .* is an unconditional run"):
        compare(run, judge, load("ring"), num=8)
    with pytest.raises(UserError, match="a judge needs 5 images or more to compare with, not 3 of 'test'"):
        Judge(judge, "test", 3)
