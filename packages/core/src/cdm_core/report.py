"""The report of a run: one HTML page that needs nothing else, whatever the run's capabilities are."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdm_core import figures, images, metrics, page
from cdm_core.errors import UserError
from cdm_core.files import to_json, write_bytes
from cdm_core.runs import Run, RunFolder

GRID = 100  # samples shown
PAIRS = 12  # samples shown above their nearest training images
SCORED = 2000  # images of a split in the likelihood histogram
CHECKED = 256  # images that the density's own diagnostics see
CELL = 48  # pixels of a sample on the page, at least
CURVES = 6  # training curves shown at most
# What `metrics.jsonl` holds beside figures of the objective.
NOT_CURVES = {"step", "split", "lr", "images_per_second", "seconds"}
# Names of the baselines' figures in words.
DENSITIES = {"truth": "the true density", "gaussian": "Gaussian", "gaussian_mixture": "Gaussian mixture"}

Say = Callable[[str], None]


class Written(NamedTuple):
    """Where a report is, and its key figures: (label, value, remark)."""

    path: Path
    figures: list[tuple[str, str, str]]


def write_report(run: Run, out: Path | None = None, *, seed: int = 0, progress: Say | None = None) -> Written:
    """Write the report of a run folder to `out` (None: `report.html` in the folder).

    Evaluates the run on its test split first where `evaluation.json` is missing or of another checkpoint.
    """
    if run.path is None or not run.path.is_dir():
        raise UserError(f"{run.path or run.name} is not a run folder: only these have reports")
    folder = RunFolder(run.path)
    report = Report(run, folder, seed, progress or (lambda text: None))
    path = write_bytes(out or folder.report_path, report.html().encode())
    return Written(path, list(report.tiles()))


@dataclass
class Report:
    """The page and what it is made of; each section says what it lacks, or is left out."""

    run: Run
    folder: RunFolder
    seed: int
    say: Say

    def html(self) -> str:
        """The whole document."""
        run = self.run
        name = self.folder.path.resolve().name
        config = run.config
        made = f"{config.model.name} on {config.data.name}, recipe {config.recipe}" if config else run.name
        parts = [
            page.tiles(list(self.tiles())),
            page.section("Training", page.figures(self.curves())),
            self.samples(),
            self.neighbours(),
            self.likelihood(),
            self.classification(),
            self.evaluation(),
            self.diagnostics(),
            self.model_figures(),
            self.reproduction(),
        ]
        return page.page(f"Run {name}", f"{made}; checkpoint of step {run.step}", filter(None, parts))

    # -- what the sections share -----------------------------------------------------------------------------

    @cached_property
    def found(self) -> metrics.Evaluation:
        """The figures of `evaluation.json`, computed and written now where they are of another checkpoint."""
        path = self.folder.path / metrics.FILE
        kept = metrics.read(path)
        if kept is not None and kept.step == self.run.step:
            return kept
        self.say("evaluating the run")
        found = metrics.evaluate(self.run, seed=self.seed)
        write_bytes(path, to_json(found.to_dict()).encode())
        return found

    @cached_property
    def drawn(self) -> Tensor | None:
        """GRID samples, (GRID, C, H, W); None for a model that cannot denoise."""
        if "denoise" not in self.run.capabilities:
            return None
        self.say("drawing samples")
        return self.run.cached_samples(GRID, self.seed)

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        return self.folder.metrics()

    # -- sections --------------------------------------------------------------------------------------------

    def tiles(self) -> Iterator[tuple[str, str, str]]:
        """Key figures: (label, value, remark)."""
        yield from self.density_tiles()
        values = self.found.values
        if found := values.get("core/accuracy"):
            low, high = 100 * found["low"], 100 * found["high"]
            yield "accuracy", f"{100 * found['accuracy']:.1f}%", f"95% interval {low:.1f} to {high:.1f}%"
        if found := values.get("core/nearest-neighbour"):
            yield (
                "nearest-neighbour ratio",
                f"{found['median_ratio']:.2f}",
                "1: as held-out images; 0: copies",
            )
        if found := values.get("core/sliced-wasserstein"):
            remark = f"{found['floor']:.3f}: training to held-out data"
            yield "sliced Wasserstein", f"{found['distance']:.3f}", remark
        seconds = max((line.get("seconds", 0.0) for line in self.log), default=0.0)
        if seconds:
            yield "training", _duration(seconds), f"{self.run.step} steps"

    def density_tiles(self) -> Iterator[tuple[str, str, str]]:
        """The model's held-out likelihood beside the baselines'."""
        key, unit = self.unit
        found = self.found.values.get("core/nll")
        if found:
            yield f"held-out {unit}", f"{found[key]:.3f}", f"± {found[f'{key}_se']:.3f}, lower is better"
        if found := self.found.values.get("core/bound"):
            yield f"guaranteed {unit}", f"{found[key]:.3f}", f"± {found[f'{key}_se']:.3f}, by the sampler"
        for words, value in self.baselines().items():
            yield f"{words}, {unit}", f"{value:.3f}", "on the same images"

    @property
    def unit(self) -> tuple[str, str]:
        """How likelihoods are told, (key, words): continuous data have no bits of integers."""
        return ("nats_per_dim", "nats/dim") if self.run.info.levels is None else ("bits_per_dim", "bits/dim")

    def baselines(self) -> dict[str, float]:
        """Means of the classical densities, by name in words."""
        found = self.found.values.get("core/baselines", {})
        keys = {words: f"{name}_{self.unit[0]}" for name, words in DENSITIES.items()}
        return {words: found[key] for words, key in keys.items() if key in found}

    def curves(self) -> Iterator[str]:
        """The loss, then the objective's other figures, by split."""
        names = {name for line in self.log for name in line} - NOT_CURVES
        for name in sorted(names, key=lambda name: (name != "loss", name))[:CURVES]:
            series = {
                split: [
                    (line["step"], line[name]) for line in self.log if line["split"] == split and name in line
                ]
                for split in ("train", "valid")
            }
            shown = {split: points for split, points in series.items() if points}
            words = {"bits_per_dim": "bits/dim"}.get(name, name.replace("_", " "))
            yield page.figure(figures.curves(shown, words), words)

    def samples(self) -> str:
        """A grid of samples, or a scatter plot of points over held-out ones."""
        x0, run = self.drawn, self.run
        if x0 is None:
            return page.section("Samples", page.paragraph(f"{run.name} does not denoise: nothing to sample."))
        plan = run.plan()
        how = f"{plan.sampler.name}, {plan.settings.steps} steps, seed {self.seed}, not selected"
        if images.is_points(run.info):
            reference, _ = run.examples("test", metrics.first(run, "test", GRID * 10))
            many = run.cached_samples(GRID * 10, self.seed)
            shown = page.figure(images.scatter(many, reference), f"Samples over held-out data: {how}.")
        else:
            classes = run.classes
            columns = classes if classes and classes <= 20 else 10
            picture = images.picture(x0[: len(x0) // columns * columns], run.info, columns, cell=CELL)
            shown = page.figure(
                picture, f"{'One class a column' if classes == columns else 'Samples'}: {how}.", pixels=True
            )
        return page.section("Samples", page.figures([shown]))

    def neighbours(self) -> str:
        """The samples that are nearest to a training image, above these."""
        if self.drawn is None or images.is_points(self.run.info):
            return ""
        self.say("searching nearest training images")
        distance, index = metrics.nearest(self.run, metrics.comparable(self.run, self.drawn))
        worst = distance.argsort()[:PAIRS]
        pixels, _ = self.run.split("train").__getitems__(index[worst].tolist())
        top, bottom = (
            images.to_pixels(self.drawn[worst], self.run.info),
            images.from_data(pixels, self.run.info),
        )
        rows = images.tile(np.concatenate([top, bottom]), columns=len(worst), cell=CELL)
        share = self.found.values.get("core/nearest-neighbour", {}).get("share_closer")
        words = (
            f"Above: of {len(self.drawn)} samples, those nearest to a training image. "
            "Below: that training image. Copies would look the same."
        )
        if share is not None:
            words += (
                f" {100 * share:.1f}% of samples are nearer than 99% of held-out images are; 1% is expected."
            )
        return page.section(
            "Are samples copies?", page.figures([page.figure(images.png(rows), words, pixels=True)])
        )

    def likelihood(self) -> str:
        """Histogram of bits/dim by image, held-out against training, over the baselines' means."""
        run = self.run
        if "log_density" not in run.capabilities:
            return ""
        self.say("scoring images")
        key, unit = self.unit
        values = {}
        for split, words in (("test", "held-out images"), ("train", "training images")):
            scores = run.likelihood(split, seed=self.seed, limit=SCORED)
            values[words] = (
                scores.bits_per_dim if key == "bits_per_dim" else -scores.nats / scores.dim
            ).numpy()
        if not all(np.isfinite(scored).any() for scored in values.values()):
            return page.section("Likelihood", page.paragraph("No log-density is finite."))
        caption = f"{unit} of each image (lower is likelier); vertical lines are means."
        picture = figures.histogram(values, self.baselines(), unit)
        return page.section("Likelihood", page.figures([page.figure(picture, caption)]))

    def classification(self) -> str:
        """The confusion matrix on held-out images, where there are a classifier and labels."""
        if "core/accuracy" not in self.found.values:
            return ""
        x0, labels = self.run.examples("test", metrics.first(self.run, "test", SCORED), seed=self.seed)
        assert labels is not None
        logits = self.run.classify(x0)
        size = logits.shape[1]
        counts = torch.zeros(size, size).index_put_(
            (labels, logits.argmax(1)), torch.ones(len(labels)), accumulate=True
        )
        names = self.run.info.class_names or tuple(map(str, range(size)))
        caption = f"Confusion of classes on {len(labels)} held-out images."
        return page.section(
            "Classification", page.figures([page.figure(figures.confusion(counts.numpy(), names), caption)])
        )

    def evaluation(self) -> str:
        """Every figure of `evaluate`, and what it left out and why."""
        found = self.found
        rows = [
            (metric, name.replace("_", " "), _number(value))
            for metric, values in found.values.items()
            for name, value in values.items()
        ]
        table = page.table(["metric", "figure", "value"], rows, numbers=[2]) if rows else ""
        left_out = [page.paragraph(f"Left out: {name}. {reason}.") for name, reason in found.skipped.items()]
        where = page.paragraph(
            f"On the {found.split} split, seed {found.seed}; `_se`: standard error over images."
        )
        return page.section("Evaluation", where, table, *left_out)

    def diagnostics(self) -> str:
        """What the model says of its own density."""
        if "log_density" not in self.run.capabilities:
            return ""
        self.say("checking the density")
        values = self.run.diagnostics("test", seed=self.seed, limit=CHECKED)
        if values is None:
            return page.section(
                "Is the density a density?",
                page.paragraph(f"{self.run.name} offers no diagnostics of its likelihood."),
            )
        rows = [(name.replace("_", " "), _number(value)) for name, value in values.items()]
        return page.section("Is the density a density?", page.table(["check", "value"], rows, numbers=[1]))

    def model_figures(self) -> str:
        """What the model's own `report_figures(run) -> Iterable[(title, png, caption)]` shows."""
        method = getattr(self.run.model, "report_figures", None)
        if method is None:
            return ""
        self.say("drawing the model's own figures")
        try:
            items = [page.figure(png, f"{title}. {caption}") for title, png, caption in method(self.run)]
        except Exception as error:  # a plugin's picture must not cost the report
            return page.section("The model", page.paragraph(f"report_figures failed: {error!r}"))
        return page.section("The model", page.figures(items))

    def reproduction(self) -> str:
        """Commands, configuration, environment and plugins."""
        run = shlex.quote(str(self.folder.path))
        commands = [
            f"cdm-run train --config {run}/config.toml --out runs/again",
            f"cdm-run sample {run} --num {GRID} --seed {self.seed}",
            f"cdm-run evaluate {run} --seed {self.seed}",
            f"cdm-run report {run} --seed {self.seed}",
        ]
        parts = [page.folded("Commands", page.code("\n".join(commands)), opened=True)]
        if self.folder.config_path.is_file():
            parts.append(page.folded("config.toml", page.code(self.folder.config_path.read_text())))
        for name in ("environment.json", "plugins.json"):
            path = self.folder.path / name
            if path.is_file():
                parts.append(page.folded(name, page.code(path.read_text())))
        return page.section("Reproduce", *parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
