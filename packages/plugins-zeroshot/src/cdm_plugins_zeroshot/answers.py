"""Images in, answers out: any method on any images, written down as they come, concluded when all are there.

Raw answers (scores of classes, costs) depend on the image and the settings alone, and are kept by `results`.
What is fitted to held-out images, centring and temperature, is applied afterwards: `conclude`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cdm_core.commands.classify import read_folder
from cdm_core.config import to_dict
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.images import is_points
from cdm_core.random import fold
from cdm_core.runs import ImageDraws, Run
from cdm_plugins_zeroshot.calibration import Affine, Platt, fit_platt, fit_temperature
from cdm_plugins_zeroshot.exact_bayes import Centring, ExactBayes
from cdm_plugins_zeroshot.methods import Method
from cdm_plugins_zeroshot.pictures import (
    encoded_files,
    encoded_split,
    is_latent,
    listed_pictures,
    picture_shape,
)
from cdm_plugins_zeroshot.race import Race, Table, Verdict, cost_features
from cdm_plugins_zeroshot.results import WHOLE, Results, Row, Shard, digest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Progress = Callable[[int, int], None]

CHUNK = 64  # images that are read, or classified by exact Bayes, at a time
SECONDS = 5.0  # between two writes to the disk, at most while answers come


# -- images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images by number, 0 to N - 1, each the same whoever asks for it."""

    names: Sequence[str]
    labels: Integers | None  # (N,)
    load: Callable[[Sequence[int]], Tensor]  # (n, C, H, W) float32 in model units, on the CPU
    about: Mapping[str, Any]  # what tells them from others, ready for JSON

    def __len__(self) -> int:
        return len(self.names)

    def stream(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(number, x0 (C, H, W)), read a few at a time."""
        for start in range(0, len(numbers), CHUNK):
            part = numbers[start : start + CHUNK]
            yield from zip(part, self.load(part), strict=True)


def of_split(run: Run, name: str, *, limit: int | None = None, seed: int = 0) -> Images:
    """The first `limit` images of a split of the run's data, dequantised by draws of `seed`.

    Of a model that denoises latents: encoded, without noise.
    """
    split = run.split(name)
    count = len(split) if limit is None else min(limit, len(split))
    labels = None if split.labels is None else split.labels[:count].numpy()
    described = run.info if run.data is None else run.data.info
    data = described.to_dict() if run.config is None else to_dict(run.config)["data"]
    names, about = [f"{name}/{index}" for index in range(count)], {"data": data, "split": name, "seed": seed}
    if is_latent(run):
        return Images(names, labels, encoded_split(run, name), about)
    return Images(names, labels, lambda numbers: run.examples(name, list(numbers), seed=seed)[0], about)


def of_path(run: Run, path: Path, *, limit: int | None = None, seed: int = 0) -> Images:
    """The images of a folder, or of an `.npz` as `cdm-run sample` writes it; UserError on anything else.

    Of a model that denoises latents: a folder, whose subfolders may be the classes; read when needed.
    """
    if is_latent(run):
        listed = listed_pictures(path, run.info, limit)
        about = {"content": listed.digest(), "latents of": list(picture_shape(run))}
        return Images(listed.names, listed.labels, encoded_files(run, listed.files), about)
    if path.suffix == ".npz":
        x0, labels = _read_npz(run.info, path, seed)
        names = [f"{path.name}/{index}" for index in range(len(x0))]
    else:
        (names, x0), labels = read_folder(run, path, seed), None
    names, x0 = names[:limit], x0[:limit].contiguous()
    content = hashlib.blake2b(x0.numpy().tobytes(), digest_size=16).hexdigest()
    return Images(
        names=names,
        labels=None if labels is None else labels[:limit],
        load=lambda numbers: x0[list(numbers)],
        about={"content": content, "seed": seed},
    )


def _read_npz(info: DataInfo, path: Path, seed: int) -> tuple[Tensor, Integers | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            samples = file["samples"]
            labels = file["labels"].astype(np.int64) if "labels" in file else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"--input {path} is no .npz with an array `samples`: {error}") from error
    points = is_points(info)
    channels, height, width = info.shape
    shape, dtype = ((channels,), np.float32) if points else ((height, width, channels), np.uint8)
    if samples.shape[1:] != shape or samples.dtype != dtype or not len(samples):
        wanted = ", ".join(map(str, ("N", *shape)))
        raise UserError(
            f"--input {path}: samples are {samples.shape} {samples.dtype}, and the run's data are "
            f"({wanted}) {np.dtype(dtype)}, N at least 1"
        )
    if labels is not None and labels.shape != (len(samples),):
        raise UserError(f"--input {path}: {labels.shape} labels for {len(samples)} samples")
    if points or info.levels is None:
        rows = torch.from_numpy(samples).float()
        return (rows[:, :, None, None] if points else rows.permute(0, 3, 1, 2) / 127.5 - 1), labels
    pixels = (torch.from_numpy(samples).permute(0, 3, 1, 2).double() * (info.levels - 1) / 255).round()
    draws = ImageDraws(fold(seed, "dequantise", "input", 0), range(len(samples)))
    return info.to_model(pixels.to(torch.uint8), draws), labels


# -- answering -----------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass
class Desk:
    """Where questions about the images of one run are answered, each once: a folder of `Results`."""

    run: Run
    folder: Path
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        self._weights = fingerprint(self.run.model)

    def results(self, method: Method, images: Images, *, null: bool = False) -> Results:
        """The answers of a method to images; null: the class "no class" is asked about too, as the last."""
        settings = {
            "method": method.settings(),
            "images": dict(images.about),
            "weights": self._weights,
            "device": self.run.device.type,
            **({"null": True} if null else {}),
        }
        return Results(self.folder / f"{method.name}-{digest(settings)}", settings)

    def answer(
        self, method: Method, images: Images, *, null: bool = False, progress: Progress | None = None
    ) -> None:
        """Answer what this shard has not answered yet. progress(done, total) counts its images."""
        results, mine = self.results(method, images, null=null), self.shard.share(len(images))
        missing = results.missing(mine)
        writer, kept, since = results.writer(self.shard), list[Row](), time.perf_counter()
        done = len(mine) - len(missing)
        for row in self._rows(method, images, missing, null):
            kept.append(row)
            done += 1
            if progress:
                progress(done, len(mine))
            spent = time.perf_counter() - since
            if spent > SECONDS or done == len(mine):
                writer.add([{**row, "seconds": spent / len(kept)} for row in kept])
                kept, since = [], time.perf_counter()

    def _rows(self, method: Method, images: Images, missing: list[int], null: bool) -> Iterator[Row]:
        if not missing:
            return
        if method.exact:
            yield from self._by_density(method, images, missing)
            return
        model = self.run.model
        labels = [*range(model.num_classes), model.null_label] if null else None
        for verdict in self._race(method, labels)(images.stream(missing)):
            yield {**verdict.to_dict(), "prefixes": [] if verdict.table is None else _prefixes(verdict.table)}

    def _race(self, method: Method, labels: Sequence[int] | None = None) -> Race:
        self.run.require(["denoise"], f"--method {method.name}")
        return Race(
            self.run.model,
            method.estimator,
            method.elimination,
            self.run.info.shape,
            labels=labels,
            keep_table=method.name == "flat",
        )

    def _by_density(self, method: Method, images: Images, missing: list[int]) -> Iterator[Row]:
        bayes = self._bayes(method)
        for start in range(0, len(missing), CHUNK):
            numbers = missing[start : start + CHUNK]
            scores = bayes.scores(images.load(numbers), torch.tensor(numbers))
            for image, row in zip(numbers, scores, strict=True):
                yield {"image": image, "scores": row.tolist(), "evaluations": bayes.passes}

    def _bayes(self, method: Method) -> ExactBayes:
        run = self.run
        return ExactBayes(run.model, run.info, method.bayes, device=run.device, name=run.name)

    def check(self, method: Method) -> None:
        """Raise `UserError` unless the run can be classified by a method."""
        if method.exact:
            self._bayes(method)
        else:
            self._race(method)

    def allows(self, method: Method) -> str | None:
        """Why the run cannot be classified by a method; None where it can."""
        try:
            self.check(method)
        except UserError as error:
            return str(error)
        return None

    def rows(self, method: Method, images: Images, *, null: bool = False) -> list[Row] | None:
        """The answers to all images, in order; None as long as some are missing."""
        found = self.results(method, images, null=null).rows()
        if any(number not in found for number in range(len(images))):
            return None
        return [found[number] for number in range(len(images))]


def _prefixes(table: Table) -> list[list[int]]:
    """[n, class that the first n pairs choose] for n of 1, 2, 4, ... and all pairs: what fewer would say."""
    sums = table.losses.cumsum(1)
    total = sums.shape[1]
    counts = [1 << i for i in range(total.bit_length()) if 1 << i < total] + [total]
    return [[n, int(sums[:, n - 1].argmin())] for n in counts]


# -- concluding ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a method says of N images. Probabilities are there where labelled held-out images were."""

    method: Method
    scores: Floats  # (N, K), the higher the likelier
    predicted: Integers  # (N,)
    probabilities: Floats | None  # (N, K)
    right: Floats | None  # (N,) probability that the answer is right, by what it cost (Platt); of a race
    temperature: Affine | None
    centring: Centring | None  # of exact Bayes
    class_evaluations: Floats  # (N,) passes, one a class and pair; of exact Bayes one a class, level and draw
    evaluations: Floats  # (N,) the same in whole passes, what classes share counted once
    seconds: Floats  # (N,)
    undecided: Bools  # (N,) whether the two best classes are within their interval
    rows: Sequence[Row]


@dataclass(frozen=True)
class HeldOut:
    """Raw answers to held-out images, and their labels."""

    rows: Sequence[Row]
    labels: Integers | None


def conclude(method: Method, rows: Sequence[Row], held_out: HeldOut | None = None) -> Outcome:
    """Classes and probabilities from raw answers; held-out images make the latter, and centre exact Bayes.

    `UserError` where they are needed and are not there, or have no labels.
    """
    centring = None
    scores, known = _scores(rows), None if held_out is None else _scores(held_out.rows)
    labels = None if held_out is None else held_out.labels
    if method.exact:
        centring = Centring.fit(scores[:0] if known is None else known, labels, method.bayes.centre)
        scores, known = centring(scores), None if known is None else centring(known)
    temperature = right = None
    if known is not None and labels is not None:
        temperature = fit_temperature(known, labels)
        if method.name == "race" and held_out is not None:
            right = _platt(held_out.rows, known.argmax(1) == labels)(_costs(rows))
    return Outcome(
        method=method,
        scores=scores,
        predicted=scores.argmax(1),
        probabilities=None if temperature is None else np.exp(temperature(scores)),
        right=right,
        temperature=temperature,
        centring=centring,
        class_evaluations=_column(rows, "evaluations" if method.exact else "class_evaluations"),
        evaluations=_column(rows, "evaluations"),
        seconds=_column(rows, "seconds"),
        undecided=np.array([bool(row.get("undecided", False)) for row in rows]),
        rows=rows,
    )


def _scores(rows: Sequence[Row]) -> Floats:
    return np.array([row["scores"] for row in rows], dtype=np.float64)


def _column(rows: Sequence[Row], name: str) -> Floats:
    return np.array([row[name] for row in rows], dtype=np.float64)


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """The verdicts that rows of a Monte-Carlo method hold."""
    return [Verdict.from_dict({k: v for k, v in r.items() if k not in ("prefixes", "seconds")}) for r in rows]


def _costs(rows: Sequence[Row]) -> Floats:
    return cost_features(verdicts(rows))


def _platt(rows: Sequence[Row], hit: Bools) -> Platt:
    return fit_platt(_costs(rows), hit)
