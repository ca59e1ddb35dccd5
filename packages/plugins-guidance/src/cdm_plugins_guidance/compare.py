"""Does it steer, and what does it cost? Samples judged by a classifier that had no part in making them.

For every way of sampling: the share of samples that the judge takes for the class asked for, its mean
probability of that class, and in its features the Fréchet distance from held-out images, precision and
recall. A guide that fools its own classifier but nobody else's shows here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_core import images
from cdm_core.config import plain
from cdm_core.distances import Moments, frechet, precision_recall
from cdm_core.errors import UserError
from cdm_core.files import to_json, write_bytes
from cdm_core.runs import Run
from cdm_core.settings import Selection
from cdm_plugins_guidance.adapter_configs import GuidedConfig

FEWEST = 5  # images: precision and recall look at the third neighbour
HELD_OUT, UNGUIDED, GUIDED, CONDITIONAL = "held-out images", "unguided", "guided", "class-conditional"

Progress = Callable[[str, int, int], None]  # of what, done, in all


@dataclass(frozen=True)
class Row:
    """One way of sampling, judged. None: not measured."""

    name: str
    target_rate: float | None  # share that the judge takes for the class asked for
    confidence: float | None  # its mean probability of that class
    frechet: float  # inf where a sample is not finite
    precision: float
    recall: float
    seconds: float | None = None  # an image


class Judge:
    """A classifier with `features(x)` (B, D) and `class_logits(x, sigma)`, on held-out images of its run.

    images (N, C, H, W) float32 in model units, the first `num` of the split or all; labels (N,) or None.
    """

    def __init__(self, run: Run, split: str, num: int) -> None:
        run.require(["class_logits"], "a judge")
        self.run = run
        count = min(num, len(run.split(split)))
        if count < FEWEST:
            raise UserError(
                f"a judge needs {FEWEST} images or more to compare with, not {count} of {split!r}"
            )
        self.images, self.labels = run.examples(split, range(count))
        self.reference = run.features(self.images)
        self.moments = Moments.of(self.reference)

    def row(self, name: str, x0: Tensor, y: Tensor | None, seconds: float | None = None) -> Row:
        """Samples x0 (N, C, H, W), in model units, that were to be of classes y (N,), judged.

        Images are first clamped to [-1, 1]. Samples that are not finite hit no class and are infinitely far.
        """
        if not bool(x0.isfinite().all()):
            none = None if y is None else 0.0
            return Row(name, none, none, math.inf, 0.0, 0.0, seconds)
        x0 = x0 if self.run.info.levels is None else x0.clamp(-1, 1)
        features, rate, confidence = self.run.features(x0), None, None
        if y is not None:
            posterior = self.run.classify(x0).softmax(1)
            rate = float((posterior.argmax(1) == y).double().mean())
            confidence = float(posterior.gather(1, y[:, None]).double().mean())
        distance = max(frechet(self.moments, Moments.of(features)), 0.0)  # rounding may go below
        return Row(name, rate, confidence, distance, *precision_recall(self.reference, features), seconds)


def check_alike(run: Run, other: Run, option: str) -> None:
    """Raise `UserError` unless both are of images of one shape and number of classes."""
    ours, theirs = ((r.info.shape, r.info.num_classes) for r in (run, other))
    if ours != theirs:
        raise UserError(
            f"{option} {other.path} is of images {theirs[0]} in {theirs[1]} classes, {run.path} of {ours[0]} "
            f"in {ours[1]}"
        )


def check_judge(run: Run, judge: Run) -> None:
    """Raise `UserError` unless `judge` can tell what `run` was asked for, and had no part in the sampling."""
    check_alike(run, judge, "--judge")
    config = guide_settings(run)
    if run.classes != judge.info.num_classes:
        raise UserError(
            f"--judge {judge.path} knows {judge.info.num_classes} classes, the guide {run.classes}"
        )
    names = [term.classifier.name for term in (config, *config.others)]
    guides = [run.path, *(Path(name[4:]) for name in names if name.startswith("run:"))]
    if judge.path and judge.path.resolve() in {path.resolve() for path in guides if path}:
        raise UserError(
            f"--judge {judge.path} has a part in the sampling, and a guide cannot judge itself: give a run "
            "that was trained apart"
        )


def guide_settings(run: Run) -> GuidedConfig:
    """The settings of the guide that `run` is sampled through.

    UserError where there is none, or the adapter is another plugin's.
    """
    adapter = run.sampling.adapter
    if adapter is None or not isinstance(adapter.config, GuidedConfig):
        through = "no guide" if adapter is None else f"{adapter.name}, which is no guide"
        raise UserError(f"{run.path} is sampled through {through}: say --adapter NAME, e.g. --adapter elucd")
    return adapter.config


def with_guide(run: Run, config: GuidedConfig) -> Run:
    """`run`, its guide's settings replaced by `config`; UserError where they do not go together."""
    adapter = run.sampling.adapter
    assert adapter is not None
    try:
        config.check()
    except ValueError as error:
        raise UserError(f"adapter: {error}") from error
    return run.sampled(replace(run.sampling, adapter=replace(adapter, config=config)))


def sampled(
    court: Judge, name: str, run: Run, num: int, seed: int, *, labels: Any = None, progress: Progress | None
) -> tuple[Row, Tensor]:
    """`num` samples of `run`, judged by the classes in turn, and the samples; labels "none": unguided."""
    start = time.perf_counter()
    x0 = run.sample(num, seed=seed, labels=labels, callback=progress and _named(progress, name))
    seconds = (time.perf_counter() - start) / num
    asked = torch.arange(num) % (run.classes or 1)
    return court.row(name, x0, asked, seconds), x0


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def compare(
    run: Run,
    judge: Run,
    conditional: Run | None = None,
    *,
    split: str = "test",
    num: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Held-out images, the run unguided and guided, and a class-conditional run by itself; all judged alike.

    Returns the rows and, by their names, the samples: `num` of each, the classes asked for in turn; of the
    held-out images, which are also what the judge compares with, as many as there are.
    """
    check_judge(run, judge)
    if conditional is not None:
        check_alike(run, conditional, "--conditional")
        if not conditional.num_classes:
            raise UserError(
                f"--conditional {conditional.path} is an unconditional run: give one with classes"
            )
    check_num(num)
    court = Judge(judge, split, num)
    rows, samples = [court.row(HELD_OUT, court.images, court.labels)], {HELD_OUT: court.images}
    ways: list[tuple[str, Run, Any]] = [(UNGUIDED, run, "none"), (GUIDED, run, None)]
    if conditional is not None:
        ways.append((CONDITIONAL, conditional, None))
    for name, source, labels in ways:
        row, samples[name] = sampled(court, name, source, num, seed, labels=labels, progress=progress)
        rows.append(row)
    return rows, samples


def check_num(num: int) -> None:
    """Raise `UserError` where there are too few samples to judge."""
    if num < FEWEST:
        raise UserError(f"--num {num}: a judge needs {FEWEST} samples or more")


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values, for JSON."""
    return [asdict(row) for row in rows]


def sampling_of(run: Run) -> dict[str, Any]:
    """How `run` is sampled, as plain values."""

    def chosen(selection: Selection) -> dict[str, Any]:
        return {"name": selection.name, **({} if selection.config is None else plain(selection.config))}

    own = run.sampling
    adapter = None if own.adapter is None else chosen(own.adapter)
    return {"sampler": chosen(own.sampler), "sample": plain(own.sample), "adapter": adapter}


def save(folder: Path, run: Run, rows: Sequence[Row], samples: dict[str, Tensor], settings: Any) -> Path:
    """Write `compare.json` and a grid of ten samples a class for each way; returns the folder."""
    classes = run.classes or 1
    write_bytes(folder / "compare.json", to_json({"rows": as_dicts(rows), **settings}).encode())
    for name, x0 in samples.items():
        images.save_grid(folder / f"{name.replace(' ', '-')}.png", x0[: 10 * classes], run.info, classes)
    return folder
