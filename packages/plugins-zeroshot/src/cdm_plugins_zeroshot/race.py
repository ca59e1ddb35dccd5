"""The race of classes: every image asks about the classes still in it, and all images share full batches.

An image gets (level, noise) pairs a block at a time; every class still in it is asked about each (common
random numbers), and the losses form its table of classes by pairs. At the end of a block classes are given
up by a rule (`EliminationConfig`): the published stages (Li et al. 2023), halving, or a race, in which
class c is dropped against the k-th best class l as soon as the differences D_i = L_c,i - L_l,i have

    mean(D) / se(D) > t_{1 - alpha}(df),

Student's quantile (Clark & Jaini 2023). With alpha = 0 nothing is ever dropped, and the result is that of the
flat estimator, bit for bit.

A class may have several wordings (a text-to-image model is asked by prompts): its loss is pooled from theirs
(`pooled`), and it is dropped with all of them or not at all.

What is random is keyed by (seed, image, pair), the network is always given `tile` rows, and sums are taken an
image at a time: a verdict depends on its image alone, not on what shares its batches, on shards or on
resumption. That a row of a batch does not feel the others is for the network to keep (in evaluation mode
every one here does).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from cdm_core.errors import UserError
from cdm_plugins_zeroshot.estimators import Estimator, Floats, Pairs, softmax
from cdm_plugins_zeroshot.factored import Factored, Features, factored, passes
from cdm_plugins_zeroshot.zeroshot_configs import EliminationConfig, EstimatorConfig

Integers = NDArray[np.int64]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# ---- Answers.


@dataclass(frozen=True)
class Verdict:
    """What was found about one image. One entry a class, in the order of the race's `labels`.

    `scores` are minus the mean weighted loss, the higher the likelier: with weight `elbo` nats, all but the
    terms of the bound that no class changes. That of a class given up is the score of the class that it was
    given up against, less the mean difference over the pairs both saw: a bound to report, not an estimate.
    """

    image: int
    label: int  # the best class
    top: tuple[int, ...]  # the `top_k` best classes, best first
    labels: tuple[int, ...]
    scores: tuple[float, ...]
    errors: tuple[float, ...]  # standard error of each score by itself
    gaps: tuple[float, ...]  # how far below the last of `top` each class is
    gap_errors: tuple[float, ...]  # standard error of each gap, from paired differences
    seen: tuple[int, ...]  # pairs that each class was asked about
    eliminated_at: tuple[int, ...]  # pairs after which a class was given up; -1: never
    margin: float  # gap of the best class that is not in `top`; inf where there is none
    margin_low: float  # its interval, of Student's t at `confidence`
    margin_high: float
    undecided: bool  # whether 0 lies in that interval
    pairs: int  # (level, noise) pairs
    class_evaluations: int  # (class, pair) evaluations, one a wording
    evaluations: float  # cost in whole passes of the network, what classes share counted once
    table: Table | None = field(default=None, compare=False, repr=False)  # only where it was asked for

    def posterior(self, temperature: float = 1.0) -> Floats:
        """p(y | x) under a uniform prior, softmax(scores / temperature), (K,)."""
        return softmax(np.asarray(self.scores) / temperature)

    def bootstrap_posterior(self, temperature: float = 1.0, draws: int = 200, seed: int = 0) -> Floats:
        """The posterior averaged over what other pairs might have said, (K,): softer where scores are noise.

        Resamples blocks of pairs, all classes alike, of the table that `keep_table` kept; `ValueError`
        without one.
        """
        if self.table is None:
            raise ValueError("the bootstrap resamples the table of losses: ask the race to keep it")
        return softmax(self.table.resampled(draws, seed) / temperature).mean(0)

    def to_dict(self) -> dict[str, Any]:
        """The fields but for the table, ready for JSON, which has no infinity: null."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "table"}
        return {name: _to_json(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """What `to_dict` wrote, exactly."""
        return cls(**{name: _from_json(name, value) for name, value in values.items()})


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value


_SIGN = {"margin_low": -math.inf}  # the only field that can be minus infinity


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(name, item) for item in value)
    return _SIGN.get(name, math.inf) if value is None else value


def cost_features(verdicts: Sequence[Verdict]) -> Floats:
    """(1, log class evaluations a class) of each image, (N, 2): how soon a race ended says how sure it is.

    Features of `Platt`, better calibrated on races than a temperature (Clark & Jaini 2023).
    """
    spent = [v.class_evaluations / len(v.labels) for v in verdicts]
    return np.stack([np.ones(len(spent)), np.log(spent)], 1)


class Table(NamedTuple):
    """The weighted losses of one image, and what each class was given up against."""

    losses: Floats  # (K, n), NaN where a class was not asked
    reference: Integers  # (K,) class that each was given up against, -1: never given up
    block: int

    def resampled(self, draws: int, seed: int) -> Floats:
        """Scores from blocks of pairs drawn anew, (draws, K). The last block may be a shorter one.

        A class given up, of whose blocks none was drawn, keeps its mean difference.
        """
        starts = np.arange(0, self.losses.shape[1], self.block)
        blocks = np.random.default_rng(seed).integers(len(starts), size=(draws, len(starts)))
        counts = (blocks[:, :, None] == np.arange(len(starts))).sum(1).astype(float)
        size = np.diff(np.append(starts, self.losses.shape[1]))
        seen = (~np.isnan(self.losses)).sum(1)
        scores = np.empty((draws, len(self.losses)))
        for c in by_reference(seen, self.reference):
            against = self.losses[self.reference[c]] if self.reference[c] >= 0 else 0.0
            values = (self.losses[c] - against)[: seen[c]]
            within = starts < seen[c]
            total = counts[:, within] @ np.add.reduceat(values, starts[within])
            drawn = counts[:, within] @ np.minimum(size, seen[c] - starts)[within]
            mean = np.where(drawn > 0, total / np.maximum(drawn, 1), values.mean())
            scores[:, c] = -mean + (scores[:, self.reference[c]] if self.reference[c] >= 0 else 0.0)
        return scores


def by_reference(seen: Integers, reference: Integers) -> Integers:
    """Classes in such an order that each comes after what it was given up against: the survivors first."""
    return np.lexsort((-seen, reference >= 0))


# ---- Standard errors.


def standard_error(
    values: Floats, estimator: EstimatorConfig, variance: str = "pooled"
) -> tuple[Floats, int]:
    """Standard error of the means over pairs, (A,), and its degrees of freedom; values (A, n).

    pooled: pairs of one place in their block are of one stratum of levels, and only what differs within a
    stratum is noise; blocks: from the means of whole blocks, as `systematic` places, shifted together, always
    are. Antithetic pairs count as one. inf without a degree of freedom.
    """
    step = 2 if estimator.antithetic else 1
    values = values[:, : values.shape[1] // step * step].reshape(len(values), -1, step).mean(2)
    count, strata = values.shape[1], estimator.block // step
    if variance == "blocks" or estimator.design == "systematic":
        values = values[:, : count // strata * strata].reshape(len(values), -1, strata).mean(2)
        count, strata = values.shape[1], 1
    elif estimator.design == "iid":
        strata = 1
    df = count - min(strata, count)
    if df < 1:
        return np.full(len(values), np.inf), 0
    parts = (values[:, first::strata] for first in range(min(strata, count)))
    squares = sum(
        (np.square(part - part.mean(1, keepdims=True)).sum(1) for part in parts), np.zeros(len(values))
    )
    return np.sqrt(squares / df / count), df


# ---- What one image is at.


class Job(NamedTuple):
    """Classes of one image to ask about some of its pairs."""

    image: int
    x0: Tensor  # (C, H, W)
    start: int
    stop: int
    classes: Integers  # (A,) indices into the labels, of all wordings of the classes


def pooled(losses: Floats, kind: str) -> Floats:
    """The losses of a class, (n,), from those of its wordings (W, n), pair by pair.

    mean: of the wordings. likelihood: the class is their mixture in equal parts, p(x | y) = 1/W sum_w
    p(x | w), so that of losses in nats L_y = -log 1/W sum_w exp(-L_w), L_w means over pairs; what a pair adds
    is then its first-order part, whose mean is L_y and whose spread is L_y's (the delta method).
    """
    if kind == "mean":
        return losses.mean(0)
    means = losses.mean(1)
    least = means.min()
    total = least - math.log(np.exp(least - means).mean())
    return softmax(-means) @ (losses - means[:, None]) + total


class Contest:
    """One image: its table of losses, and the classes still in it.

    owner (R,): which class each row of the table is of, in ascending order; None: a row a class.
    """

    def __init__(
        self,
        image: int,
        x0: Tensor,
        classes: int,
        estimator: EstimatorConfig,
        rule: EliminationConfig,
        owner: Integers | None = None,
    ) -> None:
        self.image, self.x0, self.estimator, self.rule = image, x0, estimator, rule
        self.looks = schedule(rule, classes, estimator.pairs)
        self.owner = np.arange(classes) if owner is None else owner
        self.losses = np.full((len(self.owner), estimator.pairs), np.nan, dtype=np.float32)
        self.weights = np.empty(estimator.pairs)
        self.n, self.alive = 0, np.arange(classes)
        self.seen = np.zeros(classes, dtype=np.int64)
        self.reference, self.eliminated_at = np.full((2, classes), -1)

    @property
    def wanted(self) -> int:
        """Classes to be left in the end."""
        return min(self.rule.top_k, len(self.seen))

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask."""
        separated = self.rule.rule != "none" and len(self.alive) <= self.wanted < len(self.seen)
        return self.n == self.estimator.pairs or separated

    def job(self) -> Job:
        """To the end of the block, or to the next look."""
        ahead = [n for n in self.looks if n > self.n]
        stop = min(
            (self.n // self.estimator.block + 1) * self.estimator.block, self.estimator.pairs, *ahead[:1]
        )
        return Job(self.image, self.x0, self.n, stop, self.rows)

    @property
    def rows(self) -> Integers:
        """Of the table, those of the classes still in it."""
        return np.flatnonzero(np.isin(self.owner, self.alive))

    @property
    def asked(self) -> int:
        """Rows by pairs that the network was asked about."""
        return int(self.seen[self.owner].sum())

    def add(self, losses: NDArray[np.float32], weights: Floats) -> None:
        """The answers to `job`, (A, n) losses and (n,) weights; then the rule has its say."""
        stop = self.n + losses.shape[1]
        self.losses[self.rows, self.n : stop] = losses
        self.weights[self.n : stop] = weights
        self.n = stop
        self.seen[self.alive] = stop
        if len(self.alive) > self.wanted:
            self._eliminate()

    def weighted(self, classes: Integers, n: int) -> Floats:
        """Losses of classes (A,) by their weights, (A, n) float64; NaN behind what a class has seen."""
        if len(self.owner) == len(self.seen):
            return self.losses[classes, :n].astype(np.float64) * self.weights[:n]
        values = np.full((len(classes), n), np.nan)
        for i, c in enumerate(classes):
            seen = min(n, int(self.seen[c]))
            said = self.losses[self.owner == c, :seen].astype(np.float64) * self.weights[:seen]
            values[i, :seen] = pooled(said, self.estimator.wordings)
        return values

    def _eliminate(self) -> None:
        if self.n in self.looks:
            keep = max(self.looks[self.n], self.wanted)
            means = self.weighted(self.alive, self.n).mean(1)
            order = np.argsort(means, kind="stable")
            self._drop(np.isin(np.arange(len(means)), order[keep:]), order[min(keep, len(order)) - 1])
        elif self.rule.rule == "race" and self.n >= self.rule.n_min and self.n % self.estimator.block == 0:
            values = self.weighted(self.alive, self.n)
            last = np.argsort(values.mean(1), kind="stable")[self.wanted - 1]
            difference = values - values[last]
            error, df = standard_error(difference, self.estimator, self.rule.variance)
            if df:
                with np.errstate(divide="ignore", invalid="ignore"):
                    t = difference.mean(1) / error
                self._drop(t > stdtrit(df, 1 - self.rule.alpha), last)

    def _drop(self, out: NDArray[np.bool_], against: int) -> None:
        dropped = self.alive[out]
        self.reference[dropped], self.eliminated_at[dropped] = self.alive[against], self.n
        self.alive = self.alive[~out]


def schedule(rule: EliminationConfig, classes: int, pairs: int) -> dict[int, int]:
    """After how many pairs to keep how many classes, whatever they say; empty for races and none.

    `UserError` where stages do not end with the last of `pairs`.
    """
    if rule.rule == "stages":
        if rule.stage_pairs[-1] != pairs:
            raise UserError(
                f"the last stage ends at {rule.stage_pairs[-1]} pairs and the estimator at {pairs}: "
                "make pairs and the last of stage_pairs equal"
            )
        return dict(zip(rule.stage_pairs, rule.stage_keep, strict=True))
    looks: dict[int, int] = {}
    n, keep = rule.first, classes
    while rule.rule == "halving" and keep > rule.top_k and n <= pairs:
        keep = max(math.ceil(keep / 2), rule.top_k)
        looks[n] = keep
        n *= 2
    return looks


def verdict(
    contest: Contest, labels: Sequence[int], shared_share: float, keep_table: bool = False
) -> Verdict:
    """What a contest says when it ends."""
    found = _Found(contest)
    # Classes still in it come first: where k > 1 are wanted, one that left early may have been nearer.
    order = np.lexsort((-found.scores, contest.eliminated_at >= 0))
    wanted = contest.wanted
    base = int(order[wanted - 1])
    gaps, gap_errors, df = found.against(base)
    margin, low, high = math.inf, math.inf, math.inf
    if wanted < len(labels):
        rival = int(min(order[wanted:], key=gaps.__getitem__))
        margin = float(gaps[rival])
        reach = math.inf
        if df[rival]:
            quantile = float(stdtrit(df[rival], (1 + contest.rule.confidence) / 2))
            reach = quantile * float(gap_errors[rival])
        low, high = margin - reach, margin + reach
    return Verdict(
        image=contest.image,
        label=labels[int(order[0])],
        top=tuple(labels[int(c)] for c in order[:wanted]),
        labels=tuple(labels),
        scores=_floats(found.scores),
        errors=_floats(found.errors),
        gaps=_floats(gaps),
        gap_errors=_floats(gap_errors),
        seen=tuple(contest.seen.tolist()),
        eliminated_at=tuple(contest.eliminated_at.tolist()),
        margin=margin,
        margin_low=low,
        margin_high=high,
        undecided=low <= 0,
        pairs=contest.n,
        class_evaluations=contest.asked,
        evaluations=passes(shared_share, contest.n, contest.asked),
        table=found.table() if keep_table else None,
    )


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


class _Found:
    """Scores of a contest, those of the classes given up by way of what they were given up against."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest
        self.scores, self.errors = np.empty((2, len(contest.seen)))
        self.order = by_reference(contest.seen, contest.reference)
        for c in self.order:
            values = contest.weighted(np.array([c]), contest.seen[c])
            self.errors[c] = self._error(values)[0]
            against = contest.reference[c]
            gap = self._difference(c, against).mean() if against >= 0 else values.mean()
            self.scores[c] = (self.scores[against] if against >= 0 else 0.0) - gap

    def _error(self, values: Floats) -> tuple[float, int]:
        error, df = standard_error(values, self.contest.estimator, self.contest.rule.variance)
        return float(error[0]), df

    def _difference(self, c: int, base: int) -> Floats:
        """(1, n), over the pairs that both saw."""
        n = min(self.contest.seen[c], self.contest.seen[base])
        values = self.contest.weighted(np.array([c, base]), n)
        return values[:1] - values[1:]

    def against(self, base: int) -> tuple[Floats, Floats, Integers]:
        """Gap of every class below `base`, its standard error and degrees of freedom, all (K,)."""
        gap_errors, df = np.zeros(len(self.scores)), np.zeros(len(self.scores), dtype=np.int64)
        for c in self.order:
            if c == base:
                continue
            step = self.contest.reference[c]
            error, df[c] = self._error(self._difference(c, base if step < 0 else step))
            gap_errors[c] = error if step < 0 else math.hypot(error, gap_errors[step])
        return self.scores[base] - self.scores, gap_errors, df

    def table(self) -> Table:
        """For the bootstrap."""
        contest = self.contest
        losses = contest.weighted(np.arange(len(self.scores)), contest.n)
        return Table(losses, contest.reference, contest.estimator.block)


# ---- Batches.


class Scorer:
    """Losses of many jobs at once, in calls of exactly `tile` rows; one transfer from the device a round."""

    def __init__(self, model: Factored, estimator: Estimator, labels: Sequence[int] | None) -> None:
        """labels: the classes that jobs index; None: a model without classes, asked as it is."""
        self.model, self.estimator = model, estimator
        self.device, self.tile = _device(model), estimator.config.tile
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def __call__(self, jobs: Sequence[Job]) -> list[tuple[NDArray[np.float32], Floats]]:
        """Of each job the losses (A, n) and the weights of its pairs (n,)."""
        pairs = [self.estimator.pairs(job.image, job.start, job.stop) for job in jobs]
        counts = [job.stop - job.start for job in jobs]
        first = np.cumsum([0, *counts])
        # Row r asks about pair `where[r]` and class `which[r]`; a job's rows are its table, row by row.
        spans = [np.arange(a, b) for a, b in pairwise(first)]
        where = np.concatenate([np.tile(span, len(j.classes)) for j, span in zip(jobs, spans, strict=True)])
        which = np.concatenate([np.repeat(j.classes, n) for j, n in zip(jobs, counts, strict=True)])
        with torch.no_grad():
            losses = self._losses(jobs, pairs, torch.from_numpy(where), torch.from_numpy(which))
        ends = np.cumsum([len(job.classes) * n for job, n in zip(jobs, counts, strict=True)])
        return [
            (part.reshape(len(job.classes), -1), pair.weight)
            for job, pair, part in zip(jobs, pairs, np.split(losses, ends[:-1]), strict=True)
        ]

    def _losses(
        self, jobs: Sequence[Job], pairs: list[Pairs], where: Tensor, which: Tensor
    ) -> NDArray[np.float32]:
        sigma = torch.cat([pair.sigma for pair in pairs]).to(self.device)
        owner = torch.repeat_interleave(torch.tensor([len(pair.sigma) for pair in pairs])).to(self.device)
        x0 = torch.stack([job.x0 for job in jobs]).to(self.device)[owner]
        x = x0 + sigma[:, None, None, None] * torch.cat([pair.noise for pair in pairs]).to(self.device)
        features = self._encoded(x, sigma)
        labels = None if self.labels is None else self._filled(self.labels[which]).to(self.device)
        rows, losses = self._filled(where).to(self.device), []
        for start in range(0, len(rows), self.tile):
            now = slice(start, start + self.tile)
            pair, y = rows[now], None if labels is None else labels[now]
            with self._precision():
                denoised = self.model.decode(features.rows(pair), sigma[pair], y)
            losses.append(self.estimator.losses(x0[pair], denoised, sigma[pair]))
        return _fetched(torch.cat(losses)[: len(where)])

    def _encoded(self, x: Tensor, sigma: Tensor) -> Features:
        x, sigma = self._filled(x), self._filled(sigma)
        parts = []
        for rows, level in zip(x.split(self.tile), sigma.split(self.tile), strict=True):
            with self._precision():
                parts.append(self.model.encode(rows, level))
        if len(parts) == 1:
            return parts[0]
        return Features(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _filled(self, rows: Tensor) -> Tensor:
        """With copies of row 0 behind, up to whole tiles."""
        missing = -len(rows) % self.tile
        return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES.get(self.estimator.config.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


def _fetched(losses: Tensor) -> NDArray[np.float32]:
    """The one place where a round waits for the device."""
    return cast(NDArray[np.float32], losses.cpu().numpy())


def _device(model: Any) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


# ---- The race.


class Race:
    """`race(images)` -> verdicts, for a model with labels, a `Factored` or any other denoiser.

    labels: the classes in it, None: all that the model knows (its `null_label` may be one more). A model may
    have `wordings`, one tuple a class of the labels that ask about it; without, a class asks for itself.
    `UserError` for a model that knows no classes; `ValueError` for one that is in training mode, where it
    would drop labels or normalise over the batch.
    """

    def __init__(
        self,
        model: Any,
        estimator: EstimatorConfig,
        rule: EliminationConfig,
        shape: tuple[int, ...],
        *,
        labels: Sequence[int] | None = None,
        keep_table: bool = False,
    ) -> None:
        estimator.check()
        rule.check()
        classes: int | None = getattr(model, "num_classes", None)
        if labels is None and not classes:
            raise UserError("a diffusion classifier needs a class-conditional model; this one has no labels")
        if getattr(model, "training", False):
            raise ValueError("the model is in training mode: call eval() first")
        self.labels = list(range(classes or 0)) if labels is None else list(labels)
        self.config, self.rule, self.keep_table = estimator, rule, keep_table
        schedule(rule, len(self.labels), estimator.pairs)
        self.estimator = Estimator.of(model, estimator, shape)
        self.model = factored(model)
        wordings: Sequence[tuple[int, ...]] = getattr(model, "wordings", ())
        asked = [wordings[label] if label < len(wordings) else (label,) for label in self.labels]
        self.owner = np.repeat(np.arange(len(asked)), [len(one) for one in asked])
        self.scorer = Scorer(self.model, self.estimator, [label for one in asked for label in one])

    def __call__(self, images: Iterable[tuple[int, Tensor]]) -> Iterator[Verdict]:
        """Verdicts as they are reached, not in order; images are (number, x0 (C, H, W) in model units).

        The number keys what is random: an image has the same in every shard.
        """
        source, going = iter(images), list[Contest]()
        while True:
            for image, x0 in islice(source, self.config.in_flight - len(going)):
                contest = Contest(image, x0, len(self.labels), self.config, self.rule, self.owner)
                going.append(contest)
            if not going:
                return
            answers = self.scorer([contest.job() for contest in going])
            for contest, (losses, weights) in zip(going, answers, strict=True):
                contest.add(losses, weights)
            for contest in going:
                if contest.finished:
                    yield verdict(contest, self.labels, self.model.shared_share, self.keep_table)
            going = [contest for contest in going if not contest.finished]
