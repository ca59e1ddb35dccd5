"""Does it steer, and what does it cost? Samples judged by a classifier that had no part in making them.

For every way of sampling: the share of samples that the judge takes for the class asked for, its mean
probability of that class, and in its features the Fréchet distance from held-out images, precision and
recall. A guide that fools its own classifier but nobody else's shows here.

Training images are judged in the same way, against the same held-out ones: the Fréchet distance, which of
finitely many images is never 0, has there the size that perfect samples would have, as far as there are as
many. Their target rate is that of images that a judge of the same data was trained on: an upper end.
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
from cdm_core.data import DataInfo
from cdm_core.distances import Moments, frechet, precision_recall
from cdm_core.errors import UserError
from cdm_core.files import to_json, write_bytes
from cdm_core.runs import Run
from cdm_core.settings import Selection
from cdm_plugins_guidance.adapter_configs import GuidedConfig

FEWEST = 5  # images: precision and recall look at the third neighbour
WARM_UP = 3  # steps of the untimed samples
TRAINING, UNGUIDED, GUIDED, CONDITIONAL = "training images", "unguided", "guided", "class-conditional"

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
    skipped: int | None = None  # gradients of the guides, one an image and step, that were not finite


class Judge:
    """A classifier with `features(x)` (B, D) and `class_logits(x, sigma)`, on held-out images of its run.

    images (N, C, H, W) float32 in model units, the first `num` of the split or all; labels (N,) or None.
    """

    def __init__(self, run: Run, split: str, num: int) -> None:
        run.require(["class_logits"], "a judge")
        self.run, self.split = run, split
        self.images, self.labels = self.first(split, num)
        self.reference = run.features(self.images)
        self.moments = Moments.of(self.reference)

    def first(self, split: str, num: int) -> tuple[Tensor, Tensor | None]:
        """The first `num` images of a split, or all, and their labels; UserError where there are too few."""
        count = min(num, len(self.run.split(split)))
        if count < FEWEST:
            raise UserError(
                f"a judge needs {FEWEST} images or more to compare with, not {count} of {split!r}"
            )
        return self.run.examples(split, range(count))

    def real(self) -> tuple[Row, Tensor]:
        """Real images that the judge does not compare with, judged; as many as it compares with, or all.

        Of the training split; of the test split where the judge compares with the training split.
        """
        split, name = ("test", "test images") if self.split == "train" else ("train", TRAINING)
        x0, y = self.first(split, len(self.images))
        return self.row(name, x0, y), x0

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


def pictured(run: Run) -> DataInfo:
    """What the samples of `run` are once decoded; of latents that takes one pass of the decoder."""
    return run.decoded(torch.zeros(1, *run.info.shape))[1]


def check_alike(run: Run, other: Run, option: str) -> None:
    """Raise `UserError` unless both are of images, decoded, of one shape and number of classes."""
    ours, theirs = ((info.shape, info.num_classes) for info in map(pictured, (run, other)))
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
    """`num` samples of `run`, decoded, judged by the judge's classes in turn, and the samples.

    Setting up what is sampled from is not timed.
    """
    before = skipped(run)
    start = time.perf_counter()
    x0 = run.sample(num, seed=seed, labels=labels, callback=progress and _named(progress, name))
    x0, _ = run.decoded(x0)
    seconds = (time.perf_counter() - start) / num
    after = skipped(run)
    asked = torch.arange(num) % (court.run.info.num_classes or 1)
    left_out = None if before is None or after is None else after - before
    return replace(court.row(name, x0, asked, seconds), skipped=left_out), x0


def skipped(run: Run) -> int | None:
    """Gradients so far, of all guides of `run`, that were not finite and moved nothing; None: no guide."""
    terms = getattr(run.source(run.settings), "terms", None)
    return None if terms is None else sum(guide.skipped for _, guide in terms)


def unguided(run: Run) -> tuple[Run, Any]:
    """`run` without its guides, and the labels to sample it with.

    What the guides steer: told the classes where `run` tells its denoiser, which may know no "no class".
    """
    told = run.source(run.settings).conditional
    return run.sampled(replace(run.sampling, adapter=None)), None if told else "none"


def warm_up(run: Run, num: int, labels: Any) -> None:
    """Samples that nobody looks at: a batch, few steps; what a first call sets up is then there."""
    settings = run.settings
    few = min(WARM_UP, settings.steps)
    x0 = run.sample(min(num, settings.batch_size), labels=labels, steps=few)
    run.decoded(x0)


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
    """Real images, the run unguided and guided, and a class-conditional run by itself; all judged alike.

    Against the first `num` images of a split, or all. Returns the rows and, by their names, the samples:
    `num` of each, decoded, the classes asked for in turn; of real images as `Judge.real` has them. Unguided:
    the denoiser as the guide finds it, told the classes where it is.
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
    row, x0 = court.real()
    rows, samples = [row], {row.name: x0}
    ways: list[tuple[str, Run, Any]] = [(UNGUIDED, *unguided(run)), (GUIDED, run, None)]
    if conditional is not None:
        ways.append((CONDITIONAL, conditional, None))
    for name, source, labels in ways:
        warm_up(source, num, labels)
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
    classes, info = run.classes or 1, pictured(run)
    write_bytes(folder / "compare.json", to_json({"rows": as_dicts(rows), **settings}).encode())
    for name, x0 in samples.items():
        images.save_grid(folder / f"{name.replace(' ', '-')}.png", x0[: 10 * classes], info, classes)
    return folder
