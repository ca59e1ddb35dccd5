"""The rules by which classes are given up, and that a verdict depends on its image alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_core import schedules
from cdm_core.backbones.adm import UNet
from cdm_core.backbones.adm_configs import ADMConfig
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser
from cdm_core.errors import UserError
from cdm_core.testing.conformance import randomise
from cdm_plugins_zeroshot import race as module
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig
from cdm_plugins_zeroshot.race import Contest, Race, Verdict, cost_features, pooled, standard_error, verdict
from cdm_plugins_zeroshot.zeroshot_configs import OFFICIAL_STAGES, EliminationConfig, EstimatorConfig

SHAPE = (1, 8, 8)
INFO = DataInfo("test", SHAPE, num_classes=10)
IMAGES = torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
SMALL = EstimatorConfig(pairs=16, tile=16, in_flight=4)
HASTY = EliminationConfig(alpha=0.3)  # networks of random weights hardly tell classes apart


class ADM(DiscreteDenoiser, UNet):
    """Group normalisation and attention; a whole pass a class."""

    def __init__(self) -> None:
        config = ADMConfig(32, (1, 2), 1, (2,), num_head_channels=16)
        super().__init__(config, 1, 1, 11)
        self.set_process(schedules.linear(20), num_classes=10, null_label=10)


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ContextUnet(ContextUnetConfig.small(), INFO) if name == "context" else ADM()
    randomise(model, 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=["context", "adm"])
def model(request) -> nn.Module:
    return build(request.param)


def run(model, config=SMALL, rule=HASTY, images=None, **settings) -> list[Verdict]:
    chosen = enumerate(IMAGES) if images is None else ((i, IMAGES[i]) for i in images)
    found = Race(model, config, rule, SHAPE, **settings)(chosen)
    return sorted(found, key=lambda v: v.image)


def contest(losses, rule, config=None, classes=None) -> Contest:
    """A contest over losses (K, n) that are known, to its end."""
    config = config or EstimatorConfig(pairs=losses.shape[1])
    rule.check()
    played = Contest(0, torch.zeros(SHAPE), classes or len(losses), config, rule)
    while not played.finished:
        job = played.job()
        assert job.stop > job.start
        answers = losses[job.classes, job.start : job.stop].astype(np.float32)
        played.add(answers, np.ones(job.stop - job.start))
    return played


def synthetic(classes: int, pairs: int, seed: int = 0, gap: float = 0.3) -> np.ndarray:
    """Losses with a noise that all classes share; class 0 the best by `gap`."""
    rng = np.random.default_rng(seed)
    means = np.concatenate([[0.0], gap * (1 + rng.random(classes - 1))])
    return means[:, None] + 5 * rng.random(pairs) + rng.normal(size=(classes, pairs)) * 0.5


# ---- One image, any batch.


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}])
def test_verdicts_are_the_same_bits_in_any_batch(model, settings) -> None:
    config = replace(SMALL, **settings)
    reference = run(model, config)
    assert len({v.seen for v in reference}) > 3  # a ragged race
    for in_flight in (1, 3, 7):
        assert run(model, replace(config, in_flight=in_flight)) == reference
    assert sorted(run(model, config, images=[5, 2, 6, 0, 4, 1, 3]), key=lambda v: v.image) == reference
    shards = [*run(model, config, images=[0, 2, 4, 6]), *run(model, config, images=[1, 3, 5])]
    assert sorted(shards, key=lambda v: v.image) == reference


def test_a_row_does_not_feel_where_in_the_batch_it_is(model) -> None:
    """What the above rests on; a library that rounded by position would fail here, and say so plainly."""
    scorer = Race(model, SMALL, EliminationConfig(), SHAPE).scorer
    jobs = [module.Job(i, IMAGES[i], 0, 4, np.arange(10)) for i in range(7)]
    together = [losses for losses, _ in scorer(jobs)]
    for shuffled in ([6, 0, 3], [1], [5, 4, 2, 6, 1, 0, 3]):
        for i, (losses, _) in zip(shuffled, scorer([jobs[i] for i in shuffled]), strict=True):
            assert np.array_equal(losses, together[i])
    few = replace_classes(jobs[3], [7, 2])
    assert np.array_equal(scorer([jobs[0], few])[1][0], together[3][[7, 2]])


def replace_classes(job, classes):
    return job._replace(classes=np.array(classes))


SCRIPT = """
import os, signal, sys, torch
sys.path[:0] = [{folder!r}]
from test_race import *
done = {{json.loads(line)["image"] for line in open({out!r})}}
race = Race(build("context"), SMALL, HASTY, SHAPE)
with open({out!r}, "a") as out:
    for written, found in enumerate(race((i, IMAGES[i]) for i in range(7) if i not in done)):
        if written == {limit}:
            os.kill(os.getpid(), signal.SIGKILL)
        out.write(json.dumps(found.to_dict()) + "\\n")
        out.flush()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path) -> None:
    out = tmp_path / "verdicts.jsonl"
    out.touch()
    folder = os.path.dirname(__file__)
    for limit, code in ((2, -signal.SIGKILL), (3, -signal.SIGKILL), (-1, 0)):
        script = textwrap.dedent(SCRIPT).format(folder=folder, out=str(out), limit=limit)
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
    found = [Verdict.from_dict(json.loads(line)) for line in out.read_text().splitlines()]
    assert sorted(found, key=lambda v: v.image) == run(build("context"))


def test_alpha_0_is_the_flat_estimator_bit_for_bit(model) -> None:
    flat = run(model, rule=EliminationConfig(rule="none"))
    assert run(model, rule=EliminationConfig(rule="race", alpha=0.0)) == flat
    assert all(v.seen == (16,) * 10 for v in flat)


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_flat_estimator_is_the_mean_error_of_eps(model, loss) -> None:
    """Written out for one image: a loop over classes, the pairs the same for each."""
    race = Race(model, replace(SMALL, loss=loss), EliminationConfig(rule="none"), SHAPE)
    (found,) = race([(4, IMAGES[4])])
    level, sigma, weight, noise = race.estimator.pairs(4, 0, 16)
    assert np.allclose(weight, 1)
    t = model.nearest(sigma)
    assert torch.equal(model.path.ve_sigma[t], model.sigmas[level])
    x_t = model.path.to_path(IMAGES[4] + sigma[:, None, None, None] * noise, t)
    for y in range(10):
        with torch.no_grad():
            error = model.eps(x_t, t, torch.full((16,), y)) - noise
        mean = float(error.square().mean() if loss == "l2" else error.abs().mean())
        assert found.scores[y] == pytest.approx(-mean, rel=2e-5)
    assert found.label == int(np.argmax(found.scores))


def test_classes_are_asked_about_the_same_pairs_and_inputs_stay_as_they_were() -> None:
    """Bugs that could return: noise of their own for classes, labels turned to null, arguments changed."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Module):
        num_classes, null_label = 3, 3
        sigmas = torch.tensor([0.5, 1.0], dtype=torch.float64)

        def denoise(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
            seen.append((x.clone(), y.clone()))
            x.zero_(), y.zero_()
            return torch.zeros_like(x)

    before = IMAGES.clone()
    config = EstimatorConfig(pairs=4, tile=12)
    found = run(Spy().eval(), config, EliminationConfig(rule="none"), images=[0, 1])
    assert torch.equal(IMAGES, before)
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert y.tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 2  # every class, and never the null one
    x = x.view(2, 3, 4, -1)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert [v.scores.index(max(v.scores)) for v in found] == [v.label for v in found]


def test_a_round_waits_for_the_device_once(model, monkeypatch) -> None:
    """Not once an image, a class or a pair: no scalar is read in between."""
    fetched, read = [], []
    real = module._fetched
    monkeypatch.setattr(module, "_fetched", lambda losses: fetched.append(len(losses)) or real(losses))

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                read.append(func)
            return func(*args, **(kwargs or {}))

    race = Race(model, replace(SMALL, in_flight=7), EliminationConfig(rule="none"), SHAPE)
    with Reads():
        list(race(enumerate(IMAGES)))
    assert fetched == [7 * 4 * 10] * 4
    assert not read


def test_calls_of_the_network_are_full_and_all_alike() -> None:
    sizes = []

    class Spy(ADM):
        def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            sizes.append(len(x_t))
            return super().forward(x_t, t, y)

    spy = Spy()
    randomise(spy, 0.1)
    found = run(spy.eval())
    rows = sum(v.class_evaluations for v in found)
    assert set(sizes) == {16}
    rounds = max(v.pairs for v in found)  # at most one call a round is not full
    assert rows / 16 <= len(sizes) <= rows / 16 + 2 * rounds


# ---- Rules.


@pytest.mark.parametrize(
    ("data", "classes", "cost"),
    [
        ("cifar10", 10, 2750),
        ("stl10", 10, 3000),
        ("pets", 37, 2050),
        ("food", 101, 5120),
        ("aircraft", 100, 5100),
        ("flowers", 102, 5140),
        ("objectnet", 113, 13400),
        ("imagenet", 1000, 100000),
    ],
)
def test_official_stages_cost_what_nested_stages_cost(data, classes, cost) -> None:
    """As released, grids of stages are not nested, and imagenet takes 124,500."""
    pairs, keep = OFFICIAL_STAGES[data]
    config = EstimatorConfig(pairs=pairs[-1], design="grid", block=max(pairs))
    rule = EliminationConfig(rule="stages", stage_pairs=pairs, stage_keep=keep)
    played = contest(synthetic(classes, pairs[-1]), rule, config)
    assert played.seen.sum() == cost
    assert played.alive.tolist() == [0]


@pytest.mark.parametrize(("first", "cost"), [(1, 5564), (2, 11128), (4, 22256)])
def test_halving_a_thousand_classes(first, cost) -> None:
    losses = synthetic(1000, 512 * first, gap=2.0)
    played = contest(losses, EliminationConfig(rule="halving", first=first))
    assert played.seen.sum() == cost
    assert played.n == 512 * first
    assert played.alive.tolist() == [0]


def test_stages_keep_the_best_of_all_pairs_so_far() -> None:
    losses = synthetic(6, 12, gap=0.05)
    rule = EliminationConfig(rule="stages", stage_pairs=(4, 12), stage_keep=(3, 1))
    played = contest(losses, rule)
    kept = set(np.argsort(losses[:, :4].mean(1))[:3])
    assert {c for c in range(6) if played.seen[c] == 12} == kept
    assert played.alive.tolist() == [min(kept, key=lambda c: losses[c].mean())]


def test_more_classes_may_be_kept_than_there_are() -> None:
    rule = EliminationConfig(rule="stages", stage_pairs=(4, 8), stage_keep=(5, 1))
    assert contest(synthetic(3, 8), rule).seen.tolist() == [8, 8, 8]


def test_a_race_drops_what_a_paired_t_test_rejects() -> None:
    """With independent pairs, exactly scipy's one-sided test of related samples."""
    losses = synthetic(8, 64, gap=0.1).astype(np.float32).astype(np.float64)
    config = EstimatorConfig(pairs=64, design="iid")
    played = contest(losses, EliminationConfig(alpha=0.01, n_min=8), config)
    alive, expected = np.arange(8), np.full(8, -1)
    for n in range(8, 65, 4):
        best = alive[losses[alive, :n].mean(1).argmin()]
        rivals = [c for c in alive if c != best]
        out = [
            c
            for c in rivals
            if ttest_rel(losses[c, :n], losses[best, :n], alternative="greater").pvalue < 0.01
        ]
        expected[out] = n
        alive = np.setdiff1d(alive, out)
        if len(alive) == 1:
            break
    assert played.eliminated_at.tolist() == expected.tolist()
    assert len(set(expected)) > 2


def test_a_race_ends_with_one_class_or_at_the_cap() -> None:
    clear = verdict(contest(synthetic(5, 64, gap=3.0), EliminationConfig()), range(5), 0.0)
    assert (clear.label, clear.undecided) == (0, False)
    assert clear.pairs < 64
    tie = synthetic(5, 64, gap=3.0)
    tie[1] = tie[0] + np.random.default_rng(5).normal(size=64) * 0.01
    close = verdict(contest(tie, EliminationConfig()), range(5), 0.0)
    assert close.pairs == 64
    assert close.undecided
    assert close.margin_low <= 0 <= close.margin_high
    assert close.eliminated_at[:2] == (-1, -1)
    assert all(n > 0 for n in close.eliminated_at[2:])


def test_no_look_before_n_min_nor_within_a_block() -> None:
    losses = synthetic(5, 60, gap=50.0)
    for n_min, block, expected in ((8, 4, 8), (10, 4, 12), (2, 10, 20)):
        config = EstimatorConfig(pairs=60, block=block)
        played = contest(losses, EliminationConfig(n_min=n_min), config)
        assert set(played.eliminated_at[1:]) == {expected}


@pytest.mark.parametrize("k", [2, 3])
def test_the_best_k_are_kept_until_they_are_separated(k) -> None:
    means = np.array([0.0, 0.01, 0.02, 2.0, 2.5, 3.0])
    losses = means[:, None] + np.random.default_rng(0).normal(size=(6, 128)) * 0.3
    played = contest(losses, EliminationConfig(top_k=k))
    found = verdict(played, range(6), 0.0)
    assert len(found.top) == k
    assert set(found.top) <= {0, 1, 2}
    assert found.label == found.top[0]
    if k == 3:
        assert played.alive.tolist() == [0, 1, 2]
        assert played.n < 128
        assert not found.undecided
    else:
        assert found.undecided
    assert found.margin == pytest.approx(min(found.gaps[c] for c in range(6) if c not in found.top))


def test_equal_losses_are_never_dropped() -> None:
    """A variance of 0, and differences of 0: no division by it decides."""
    played = contest(np.ones((3, 16)), EliminationConfig())
    assert played.alive.tolist() == [0, 1, 2]
    found = verdict(played, range(3), 0.0)
    assert found.label == 0
    assert found.undecided


# ---- What is reported.


def test_scores_errors_and_margin_of_a_flat_contest() -> None:
    losses = synthetic(4, 40, gap=0.1).astype(np.float32).astype(np.float64)
    config = EstimatorConfig(pairs=40, design="iid")
    found = verdict(contest(losses, EliminationConfig(rule="none"), config), range(10, 14), 0.25)
    assert found.labels == (10, 11, 12, 13)
    assert found.scores == pytest.approx(-losses.mean(1))
    assert found.errors == pytest.approx(losses.std(1, ddof=1) / np.sqrt(40))
    best, second = np.argsort(losses.mean(1))[:2]
    assert found.label == 10 + best
    difference = losses[second] - losses[best]
    error = difference.std(ddof=1) / np.sqrt(40)
    assert found.gaps[second] == found.margin == pytest.approx(difference.mean())
    assert found.gap_errors[second] == pytest.approx(error)
    low, high = student.interval(0.95, 39, difference.mean(), error)
    assert (found.margin_low, found.margin_high) == pytest.approx((low, high))
    assert found.class_evaluations == 160
    assert found.evaluations == 0.25 * 40 + 0.75 * 160


def test_a_class_given_up_is_bounded_by_what_it_was_given_up_against() -> None:
    """Common pairs only: the pairs that it did not see cannot flatter it."""
    losses = synthetic(6, 64, seed=2, gap=0.2)
    losses[:, 32:] += 100  # later pairs are harder for all
    config = EstimatorConfig(pairs=64, design="iid")
    played = contest(losses, EliminationConfig(), config)
    found = verdict(played, range(6), 0.0)
    assert found.label == played.alive[0]
    for c in range(6):
        against = played.reference[c]
        if against < 0:
            continue
        n = played.eliminated_at[c]
        gap = (losses[c, :n] - losses[against, :n]).mean()
        assert found.scores[against] - found.scores[c] == pytest.approx(gap, rel=1e-5)
        assert found.scores[c] < found.scores[found.label]
    assert found.scores[found.label] < -50  # it did see them
    assert found.posterior(0.1)[found.label] == max(found.posterior(0.1))


@pytest.mark.parametrize("seed", range(20))
def test_the_label_is_the_best_of_those_left(seed) -> None:
    losses = synthetic(6, 64, seed=seed, gap=0.1)
    played = contest(losses, EliminationConfig(alpha=0.05))
    found = verdict(played, range(6), 0.0)
    assert found.label in played.alive
    assert min(found.gaps) == 0
    assert found.posterior().argmax() == found.label


def test_pooled_variance_takes_out_the_strata() -> None:
    rng = np.random.default_rng(0)
    config = EstimatorConfig(pairs=40, block=4)
    strata = np.tile([0.0, 10.0, 20.0, 30.0], 10)
    noise = rng.normal(size=(3, 40))
    error, df = standard_error(strata + noise, config)
    within = noise.reshape(3, 10, 4)
    assert df == 36
    assert error == pytest.approx(np.sqrt(within.var(axis=1, ddof=1).mean(1) / 40))
    blocks, df = standard_error(strata + noise, config, "blocks")
    assert df == 9
    assert blocks == pytest.approx(within.mean(2).std(1, ddof=1) / np.sqrt(10))
    assert standard_error(noise[:, :4], config)[1] == 0
    assert np.isinf(standard_error(noise[:, :4], config)[0]).all()


def test_antithetic_pairs_count_as_one() -> None:
    """Opposite noise cancels: taken as independent, pairs would seem to be noisier than they are."""
    noise = np.random.default_rng(0).normal(size=(1, 20)).repeat(2, axis=1) * np.tile([1, -1], 20)
    config = EstimatorConfig(pairs=40, design="iid", antithetic=True)
    error, df = standard_error(noise, config)
    assert df == 19
    assert error == pytest.approx([0.0], abs=1e-12)


def test_a_verdict_survives_json(model) -> None:
    for rule in (EliminationConfig(), EliminationConfig(rule="none")):
        found = run(model, replace(SMALL, pairs=2), rule, images=[1])[0]
        assert np.isinf(found.margin_low)  # 2 pairs of a block of 4: no variance
        assert Verdict.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_the_bootstrap_softens_what_noise_sharpened(model) -> None:
    """Of a flat contest it averages the softmax of resampled means; it needs the table."""
    found = run(model, rule=EliminationConfig(rule="none"), images=[0], keep_table=True)[0]
    table = found.table
    scores = table.resampled(4000, seed=1)
    assert scores.mean(0) == pytest.approx(found.scores, abs=6 * max(found.errors) / np.sqrt(4000) + 0.01)
    blocks = table.losses.reshape(10, 4, 4).mean(2)
    assert scores.std(0) == pytest.approx(blocks.std(1) / 2, rel=0.1)
    sharp = found.posterior(1e-3)
    soft = found.bootstrap_posterior(1e-3)
    assert soft.sum() == pytest.approx(1)
    assert soft.max() <= sharp.max()
    with pytest.raises(ValueError, match="keep it"):
        run(model, images=[0])[0].bootstrap_posterior()


def test_the_bootstrap_of_a_race_goes_by_way_of_the_reference() -> None:
    played = contest(synthetic(6, 64, seed=3, gap=0.2), EliminationConfig())
    found = verdict(played, range(6), 0.0, keep_table=True)
    scores = found.table.resampled(2000, seed=0)
    gaps = scores[:, [found.label]] - scores
    assert gaps.mean(0) == pytest.approx(found.gaps, abs=0.05)
    assert found.bootstrap_posterior(0.1).argmax() == found.label


def test_cost_is_a_feature_of_confidence() -> None:
    clear = verdict(contest(synthetic(5, 64, gap=3.0), EliminationConfig()), range(5), 0.0)
    features = cost_features([clear])
    assert features.tolist() == [[1.0, pytest.approx(np.log(clear.class_evaluations / 5))]]


# ---- Classes of several wordings.


def test_a_mixture_of_wordings_has_the_likelihood_of_a_mixture() -> None:
    """Its mean is -log of the mean likelihood, its spread that of the mean over fresh pairs."""
    rng = np.random.default_rng(0)
    means = np.array([[0.0], [1.0], [4.0]])

    def loss(pairs: int) -> np.ndarray:
        shared = rng.normal(size=pairs)
        return means + shared + 0.5 * rng.normal(size=(3, pairs))

    said = pooled(loss(400), "likelihood")
    again = [pooled(loss(400), "likelihood").mean() for _ in range(400)]
    assert said.std() / np.sqrt(400) == pytest.approx(np.std(again), rel=0.1)
    losses = loss(50)
    total = -np.log(np.exp(-losses.mean(1)).mean())
    assert pooled(losses, "likelihood").mean() == pytest.approx(total)
    assert pooled(losses, "mean") == pytest.approx(losses.mean(0))
    far = pooled(losses + np.array([[0.0], [2000.0], [3000.0]]), "likelihood").mean()
    assert far == pytest.approx(losses[0].mean() + np.log(3))  # and no overflow


@pytest.mark.parametrize("wordings", ["mean", "likelihood"])
def test_alike_wordings_are_one(wordings) -> None:
    """Classes of which each is said twice in the same words: verdicts are those of saying it once."""
    losses = synthetic(5, 64, gap=0.0) + np.array([[0.0], [0.2], [0.4], [0.7], [1.4]])
    config = EstimatorConfig(pairs=64, weight="elbo", wordings=wordings)
    rule = EliminationConfig(alpha=0.01)
    owner = np.repeat(np.arange(5), [1, 2, 3, 1, 2])
    played = Contest(0, torch.zeros(SHAPE), 5, config, rule, owner)
    while not played.finished:
        job = played.job()
        answers = losses[owner][job.classes, job.start : job.stop].astype(np.float32)
        played.add(answers, np.ones(job.stop - job.start))
    once, several = verdict(contest(losses, rule, config), range(5), 0.0), verdict(played, range(5), 0.0)
    assert several.scores == pytest.approx(once.scores)
    assert several.gap_errors == pytest.approx(once.gap_errors)
    assert several.eliminated_at == once.eliminated_at
    assert len(set(several.seen)) > 2
    counts = np.bincount(owner)
    assert several.class_evaluations == (np.array(several.seen) * counts).sum()


# ---- Refusals.


def test_a_model_in_training_mode_is_refused() -> None:
    """There labels are dropped and batch normalisation sees the batch."""
    with pytest.raises(ValueError, match="training mode"):
        Race(build("context").train(), SMALL, EliminationConfig(), SHAPE)


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match="no labels"):
        Race(nn.Identity().eval(), SMALL, EliminationConfig(), SHAPE)


def test_stages_must_end_with_the_pairs(model) -> None:
    rule = EliminationConfig(rule="stages", stage_pairs=(4, 8), stage_keep=(2, 1))
    with pytest.raises(UserError, match="the last stage ends at 8 pairs and the estimator at 16"):
        Race(model, SMALL, rule, SHAPE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": "stages"}, "as many entries"),
        ({"rule": "stages", "stage_pairs": (4, 4), "stage_keep": (2, 1)}, "must ascend"),
        ({"rule": "stages", "stage_pairs": (4, 8), "stage_keep": (2, 2)}, "descend to top_k"),
        ({"stage_pairs": (4,), "stage_keep": (1,)}, "belong to rule = stages"),
        ({"n_min": 1}, "no variance"),
        ({"alpha": 0.5}, "alpha must lie"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"confidence": 1.0}, "confidence must lie"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says) -> None:
    with pytest.raises(ValueError, match=says):
        replace(EliminationConfig(), **settings).check()
