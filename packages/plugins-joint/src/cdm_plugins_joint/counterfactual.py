"""Counterfactuals: an image as it would be, were it of another class.

As Deja et al. 2023 show and their repository cannot: noise the image to a level s, x_s = x0 + sigma_s n, and
sample from there, steered to the class wanted. What noise of size sigma_s leaves of an image stays as it was;
the lower s, the more that is, and the harder the class is to change.

Four ways are measured alike, so that each is seen against what it should beat:

                    steered             not steered
    from x_s        counterfactual      and back
    from noise      resampled           sampled

A counterfactual should be of its class as often as what is resampled, and nearer to its image; what the noise
alone does shows in "and back". Nearness: RMSE over pixels, and the Euclidean distance of features, both of
the same pair (image i, output i).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cdm_core import components, images, schedules
from cdm_core.errors import UserError
from cdm_core.random import fold
from cdm_core.runs import ImageDraws, Run, SamplePlan
from cdm_core.samplers import Conditional
from cdm_core.settings import Selection

STEERED, BACK, RESAMPLED, SAMPLED = "counterfactual", "and back", "resampled", "sampled"
WAYS = (STEERED, BACK, RESAMPLED, SAMPLED)

Target = int | Literal["next", "second"]
Progress = Callable[[str, int, int], None]  # of what, done, in all


class Wish(NamedTuple):
    """What is asked of N images: y as the guide takes it; column (N,) int64, the class or attribute that is
    wanted, or, where value (N,) is False, not wanted."""

    y: Tensor
    column: Tensor
    value: Tensor


@dataclass(frozen=True)
class Counterfactuals:
    """N images x0 (N, C, H, W) in model units, as noised, and the outputs of each way; all on the CPU.

    figures: by way, every figure of every image, (N,); sigma: the level that the images were noised to.
    """

    indices: tuple[int, ...]
    labels: Tensor | None
    wish: Wish
    sigma: float
    x0: Tensor
    noised: Tensor
    outputs: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    figures: Mapping[str, Mapping[str, Tensor]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean of every figure, by way, with its standard error `_se`; `hit` becomes `rate`.

        flip_rate: of the images that the classifier did not take for the target before.
        """
        return {
            way: {"n": float(len(self.x0)), **self._means(figures)} for way, figures in self.figures.items()
        }

    def _means(self, figures: Mapping[str, Tensor]) -> dict[str, float]:
        means = {}
        for name, values in figures.items():
            who, _, what = name.rpartition("_")
            if what == "answer":
                continue
            if what != "hit":
                means[name] = float(values.double().mean())
                means[f"{name}_se"] = float(values.double().std(correction=0)) / math.sqrt(len(values))
                continue
            rate, old = float(values.double().mean()), ~self.before[name]
            means[f"{who}_rate"] = rate
            means[f"{who}_rate_se"] = math.sqrt(rate * (1 - rate) / len(values))
            means[f"{who}_flip_rate"] = float(values[old].double().mean()) if bool(old.any()) else math.nan
        return means

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary an image, keys the same for all of them."""
        rows = []
        for i, index in enumerate(self.indices):
            row: dict[str, Any] = {"image": index}
            if self.labels is not None and self.labels.ndim == 1:
                row["label"] = int(self.labels[i])
            row |= {"target": int(self.wish.column[i]), "wanted": bool(self.wish.value[i])}
            row |= {f"before_{name}": values[i].item() for name, values in self.before.items()}
            for way, figures in self.figures.items():
                key = way.replace(" ", "_")
                row |= {f"{key}_{name}": values[i].item() for name, values in figures.items()}
            rows.append(row)
        return rows


# ---- What is asked for


def steerable(run: Run) -> Run:
    """`run` as it is sampled where that takes classes, else through this plugin's own guide."""
    if run.classes:
        return run
    _, record = run.registry.find("adapter", "representations", ["joint"])
    selection = Selection("joint/representations", record.config() if record.config else None)
    return run.sampled(replace(run.sampling, adapter=selection))


def chosen(run: Run, split: str, num: int, target: Target) -> list[int]:
    """The first `num` images of a split, or all, that are not of the class asked for already."""
    if num < 1:
        raise UserError(f"--num {num}: ask for at least 1 image")
    labels = run.split(split).labels
    indices = list(range(len(run.split(split))))
    if isinstance(target, int) and labels is not None and labels.ndim == 1:
        indices = (labels != target).nonzero()[:, 0].tolist()
    if not indices:
        raise UserError(f"split {split!r} has no image of another class than {target}")
    return indices[:num]


def wished(run: Run, x0: Tensor, labels: Tensor | None, target: Target) -> Wish:
    """What is asked of the images x0 (N, C, H, W).

    A number: that class. next: the one after an image's own, or after the head's answer where there are no
    labels. second: the head's second choice. Of attributes a number alone: that one is turned over, the
    others are to stay as the head sees them.
    """
    classes = run.classes or 0
    if isinstance(target, int) and not 0 <= target < classes:
        raise UserError(f"--target {target} is out of range: the classes are 0 to {classes - 1}")
    logits = run.classify(x0)
    if _attributes(run):
        if not isinstance(target, int):
            raise UserError(f"--target {target}: of a model of attributes name one, 0 to {classes - 1}")
        y = (logits > 0).float()
        y[:, target] = 1 - y[:, target]
        return Wish(y, torch.full((len(x0),), target), y[:, target] > 0)
    if isinstance(target, int):
        column = torch.full((len(x0),), target)
    elif target == "second":
        if classes < 2:
            raise UserError("--target second: the head knows one class only")
        column = logits.topk(2, dim=1).indices[:, 1]
    else:
        guess = logits.argmax(1)  # a training image may have lost its label, and have a negative number
        own = guess if labels is None else torch.where(labels < 0, guess, labels)
        column = (own + 1) % classes
    return Wish(column, column, torch.ones(len(x0), dtype=torch.bool))


def _attributes(run: Run) -> bool:
    return bool(getattr(run.model, "multi_label", False))


def levels_below(run: Run, start: float, steps: int | None) -> Tensor:
    """Levels from that share of all of them down, (steps,) float64, descending; steps None: the run's own."""
    if not 0 < start <= 1:
        raise UserError(f"--start {start:g}: a share of the noise levels is wanted, above 0 and at most 1")
    settings, sigmas = run.settings, run.model.sigmas
    count = max(1, round(start * len(sigmas)))
    if steps is not None and not 1 <= steps <= count:
        raise UserError(f"--steps {steps}: from --start {start:g} there are 1 to {count}")
    return schedules.grid(
        sigmas[:count], min(settings.steps, count) if steps is None else steps, settings.grid
    )


# ---- How it is made


@dataclass(frozen=True)
class _Walks:
    """The walks of one seed over the images `indices`: image i sees the same noise whichever way it goes."""

    plan: SamplePlan
    indices: Sequence[int]
    seed: int
    device: torch.device
    progress: Progress | None

    def from_image(
        self, name: str, source: Any, y: Tensor | None, x0: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x0 (N, C, H, W) noised to sigmas[0], and what is sampled from there over `sigmas`."""

        def start(rows: slice, noise: Tensor) -> Tensor:
            return x0[rows].to(self.device) + float(sigmas[0]) * noise

        return self._walk(name, source, y, tuple(x0.shape[1:]), sigmas, start)

    def from_noise(self, name: str, source: Any, y: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Samples (N, *shape)."""
        plan = self.plan
        return self._walk(name, source, y, shape, plan.sigmas, lambda rows, noise: noise * plan.start)[1]

    @torch.no_grad()
    def _walk(
        self,
        name: str,
        source: Any,
        y: Tensor | None,
        shape: tuple[int, ...],
        sigmas: Tensor,
        start: Callable[[slice, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        size, total, plan = self.plan.settings.batch_size, len(self.indices), self.plan
        starts, ends = [], []
        for first in range(0, total, size):
            rows = slice(first, min(first + size, total))
            draws = ImageDraws(fold(self.seed, "counterfactual"), self.indices[rows], self.device)
            x = start(rows, draws.normal(*shape))
            label = None if y is None else y[rows].to(self.device)
            end = plan.function(
                Conditional(source, label),
                x,
                sigmas.to(self.device),
                noise=_from(draws, shape),
                **components.options(plan.sampler.config),
            )
            starts.append(x.float().cpu())
            ends.append(end.float().cpu())
            if self.progress:
                self.progress(name, rows.stop, total)
        return torch.cat(starts), torch.cat(ends)


def _from(draws: ImageDraws, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: draws.normal(*shape).to(x.dtype)


def counterfactuals(
    run: Run,
    judge: Run | None = None,
    *,
    split: str = "test",
    num: int = 100,
    target: Target = "next",
    start: float = 0.25,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Counterfactuals:
    """`num` images of a split changed to the classes asked for, and the three other ways beside it.

    judge: a classifier that was trained apart; without one the head judges itself, and features are its own.
    start: the share of all noise levels that an image is noised to. UserError where the run cannot be steered
    or the judge is of other images.
    """
    run = steerable(run)
    _check_judge(run, judge)
    indices, sigmas = chosen(run, split, num, target), levels_below(run, start, steps)
    x0, labels = run.examples(split, indices, seed=seed)
    wish = wished(run, x0, labels, target)
    source = run.source(run.settings)
    plain = run.sampled(replace(run.sampling, adapter=None))
    bare, shape = plain.source(plain.settings), tuple(x0.shape[1:])
    walks = _Walks(run.plan(), indices, seed, run.device, progress)
    noised, steered = walks.from_image(STEERED, source, wish.y, x0, sigmas)
    outputs = {
        STEERED: steered,
        BACK: walks.from_image(BACK, bare, None, x0, sigmas)[1],
        RESAMPLED: walks.from_noise(RESAMPLED, source, wish.y, shape),
        SAMPLED: walks.from_noise(SAMPLED, bare, None, shape),
    }
    court = _Court(run, judge, x0, wish)
    figures = {way: court.figures(x) for way, x in outputs.items()}
    return Counterfactuals(
        tuple(indices), labels, wish, float(sigmas[0]), x0, noised, outputs, court.answers(x0), figures
    )


# ---- How it is judged


class _Court:
    """The head and, where there is one, the judge, on images x0 of which `wish` was asked."""

    def __init__(self, run: Run, judge: Run | None, x0: Tensor, wish: Wish) -> None:
        self.judges = {"head": run} | ({"judge": judge} if judge else {})
        self.wish, self.x0, self.featured = wish, x0, judge or run
        self.features = self.featured.features(x0)

    def answers(self, x: Tensor) -> dict[str, Tensor]:
        """Of every judge: `_answer`, the class it takes x for (of attributes: whether it sees the one that
        was asked for); `_hit`, whether that is as wished; `_p`, its probability of the wish."""
        found: dict[str, Tensor] = {}
        for name, run in self.judges.items():
            logits = run.classify(x).double()
            column = self.wish.column[:, None]
            if _attributes(run):
                asked = logits.gather(1, column)[:, 0]
                answer, p = asked > 0, torch.where(self.wish.value, asked.sigmoid(), (-asked).sigmoid())
                hit = answer == self.wish.value
            else:
                answer, p = logits.argmax(1), logits.softmax(1).gather(1, column)[:, 0]
                hit = answer == self.wish.column
            found |= {f"{name}_answer": answer, f"{name}_hit": hit, f"{name}_p": p}
        return found

    def figures(self, x: Tensor) -> dict[str, Tensor]:
        """The answers, `rmse` over pixels in model units and `feature_distance` from x0, (N,) each.

        Images are clamped to [-1, 1] first.
        """
        x = x if self.featured.info.levels is None else x.clamp(-1, 1)
        rmse = (x - self.x0).double().square().flatten(1).mean(1).sqrt()
        distance = (self.featured.features(x) - self.features).double().norm(dim=1)
        return {**self.answers(x), "rmse": rmse, "feature_distance": distance}


def _check_judge(run: Run, judge: Run | None) -> None:
    run.require(["class_logits"], "a counterfactual")
    if judge is None:
        return
    judge.require(["class_logits"], "a judge")
    ours, theirs = ((r.info.shape, r.info.num_classes) for r in (run, judge))
    if ours != theirs:
        raise UserError(
            f"--judge {judge.path} is of images {theirs[0]} in {theirs[1]} classes, {run.path} of {ours[0]} "
            f"in {ours[1]}"
        )
    if judge.path and run.path and judge.path.resolve() == run.path.resolve():
        raise UserError(f"--judge {judge.path}: the head cannot be its own independent judge")


# ---- How it is shown


def picture(found: Counterfactuals, run: Run, columns: int = 10) -> bytes:
    """PNG: input, noised and output of the first images, a column each; the answers are the last judge's."""
    from matplotlib.figure import Figure

    count = min(columns, len(found.x0))
    who = list(found.before)[-1].rpartition("_")[0]
    scale = float(run.model.scale(torch.tensor([found.sigma])))
    rows = [found.x0, scale * found.noised, found.outputs[STEERED]]
    captions = [found.before, None, found.figures[STEERED]]
    names = run.info.class_names or tuple(str(k) for k in range(run.info.num_classes or 0))
    figure = Figure(figsize=(1.05 * count + 0.9, 4.2), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    for row, label in enumerate(("input", f"noised, σ = {found.sigma:.2g}", "output")):
        shown = images.to_pixels(rows[row][:count], run.info)
        for i in range(count):
            axes, answers = grid[row][i], captions[row]
            axes.imshow(
                shown[i].squeeze(-1) if shown.shape[-1] == 1 else shown[i], cmap="gray", vmin=0, vmax=255
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if answers:
                seen, p = _named(answers[f"{who}_answer"][i], names), float(answers[f"{who}_p"][i])
                axes.set_xlabel(f"{seen}; wish {100 * p:.0f}%", fontsize=7)
        grid[row][0].set_ylabel(label, fontsize=8)
    for i in range(count):
        wanted = names[int(found.wish.column[i])]
        grid[0][i].set_title(f"to {'' if bool(found.wish.value[i]) else 'not '}{wanted}", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def _named(answer: Tensor, names: Sequence[str]) -> str:
    """A class by its name; of an attribute, yes or no."""
    return ("no", "yes")[int(answer)] if answer.dtype == torch.bool else names[int(answer)]
