"""A trained run, ready to use: sample it, score with it, classify with it.

    run = cdm_core.load_run("runs/digits")
    images = run.sample(64, seed=0)
    nats = run.log_density(images)

Image i of a sample depends only on (seed, i): not on the batch size, the number of images or of processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cdm_core import capabilities, components, schedules
from cdm_core.checkpoints import RunFolder
from cdm_core.commands.common import pick_device
from cdm_core.compiled import CompiledModel
from cdm_core.config import from_toml, resolve_sampling
from cdm_core.data import Data, DataInfo, Split
from cdm_core.errors import UserError
from cdm_core.manager import Registry, load_registry
from cdm_core.random import Draws, fold
from cdm_core.samplers import Conditional
from cdm_core.settings import RunConfig, SampleConfig, Sampling, Selection

__all__ = ["ImageDraws", "Likelihood", "Run", "RunFolder", "SamplePlan", "load_run"]

CHAIN = 1000  # levels of the chain that bounds the likelihood of a model without levels of its own

Labels = int | Sequence[int] | Literal["none"] | None
Progress = Callable[[int, int], None]
Weights = Literal["ema", "model"]


class ImageDraws(Draws):
    """Draws for the images `indices`: row i depends only on (seed, indices[i]), whatever batch it is in."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed, self.total, self.rows, self.device = seed, len(indices), slice(0, len(indices)), device
        self._images = [Draws(fold(seed, index), 1) for index in indices]

    def normal(self, *shape: int) -> Tensor:
        return torch.cat([image.normal(*shape) for image in self._images]).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.cat([image.uniform(*shape) for image in self._images]).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.cat([image.integers(high, *shape) for image in self._images]).to(self.device)


@dataclass(frozen=True)
class SamplePlan:
    """How a sample is drawn: sigmas (steps,) float64 descending; noise * start is the first state."""

    sampler: Selection
    function: Callable[..., Tensor]
    settings: SampleConfig
    sigmas: Tensor
    start: float

    def walk(
        self, model: Any, y: Tensor | None, draws: Draws, shape: tuple[int, ...], callback: Progress | None
    ) -> Tensor:
        """One batch from noise to x0 (B, *shape) float32; y (B,) int64 or None."""
        noise = draws.normal(*shape)

        def observe(step: int, total: int, x: Tensor, x0: Tensor) -> None:
            if callback:
                callback(step + 1, total)

        with torch.no_grad():  # not inference_mode: a model may need autograd inside
            return self.function(
                Conditional(model, y),
                noise * self.start,
                self.sigmas.to(noise.device),
                noise=lambda x: draws.normal(*shape).to(x.dtype),
                callback=observe,
                **components.options(self.sampler.config),
            )


@dataclass(frozen=True)
class Likelihood:
    """Log-density of a split, per image, averaged over dequantisation draws.

    nats (N,) float64, log p(x); bits_per_dim (N,) float64, of the integer data where there are grey levels;
    labels: "none" for log p(x), "data" for log p(x | its class).
    """

    split: str
    draws: int
    seed: int
    labels: str
    dim: int
    nats: Tensor
    bits_per_dim: Tensor

    def summary(self) -> dict[str, float]:
        """Means with their standard errors (`_se`) over images; a single image has none, nan."""
        root = math.sqrt(len(self.nats))
        nats, nats_se = float(self.nats.mean()), float(self.nats.std()) / root
        return {
            "nats": nats,
            "nats_se": nats_se,
            "nats_per_dim": nats / self.dim,
            "nats_per_dim_se": nats_se / self.dim,
            "bits_per_dim": float(self.bits_per_dim.mean()),
            "bits_per_dim_se": float(self.bits_per_dim.std()) / root,
            "n": float(len(self.nats)),
        }


class Run:
    """A model with its data description and configuration; made by `load_run`.

    model: nn.Module in evaluation mode on `device`; info: DataInfo; data: Data, or None where a converted
    file's were not named; config: RunConfig, or None for a converted file; path: the run folder or file;
    sampling: how it is sampled, the configuration's own by default; compile: `denoise` and `log_density` are
    compiled at their first use (`cdm_core.compiled`).
    """

    def __init__(
        self,
        model: nn.Module,
        info: DataInfo,
        *,
        config: RunConfig | None = None,
        data: Data | None = None,
        sampling: Sampling | None = None,
        device: torch.device | str = "cpu",
        registry: Registry | None = None,
        path: Path | None = None,
        step: int | None = None,
        name: str = "the model",
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        if compile:
            self.model = CompiledModel(self.model, hint="leave --compile (or compile=True) out")
        self.info, self.data, self.config = info, data, config
        self.registry = registry if registry is not None else load_registry()
        self.path, self.step, self.name = path, step, name
        self.sampling = sampling or (config.sampling if config else Sampling())
        self._sources: dict[str, Any] = {}
        self._samples: dict[int, Tensor] = {}

    # -- what it can do --------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int | None:
        """Classes that the model can be conditioned on; None: unconditional."""
        return getattr(self.model, "num_classes", None) or None

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model offers, by itself or through core's adapters."""
        own = capabilities.offered(self.model)
        bayes = self.num_classes and "log_density" in own
        return own | {"class_logits"} if bayes else own

    def require(self, names: Sequence[str], user: str) -> None:
        """Raise `UserError`, naming who could supply them, unless the run has every capability in `names`."""
        missing = [name for name in names if name not in self.capabilities]
        hint = self.registry.hint(missing)
        capabilities.require(self.model, missing, user=user, model_name=self.name, hint=hint)

    @property
    def settings(self) -> SampleConfig:
        """The run's own settings of `sample`."""
        return self.sampling.sample

    @property
    def classes(self) -> int | None:
        """Classes that `sample` takes: those of the model, or of the adapter that it is sampled through."""
        return getattr(self.source(self.settings), "num_classes", None) or None

    # -- sampling --------------------------------------------------------------------------------------------

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        labels: Labels = None,
        sampler: str | None = None,
        steps: int | None = None,
        grid: str | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        callback: Progress | None = None,
        first: int = 0,
    ) -> Tensor:
        """Samples x0 (num, C, H, W) float32 in model units, on the CPU: images `first` to `first + num - 1`.

        labels: classes that the images cycle through; None: all classes that there are (`classes`); "none":
        no class. sampler, steps, grid (`t`, `logsnr`, `quadratic`, `rho`), guidance (weight w of
        classifier-free guidance), batch_size: None takes the run's own. callback(done, total) counts
        denoising steps over all batches. Raises UserError on anything out of range or unknown.
        """
        if num < 1:
            raise UserError(f"cannot draw {num} samples: ask for at least 1")
        plan = self.plan(sampler=sampler, steps=steps, grid=grid, guidance=guidance, batch_size=batch_size)
        y = self.labels_for(range(first, first + num), labels)
        if plan.settings.guidance and y is None:
            weight = plan.settings.guidance
            raise UserError(f"guidance {weight:g} needs a class-conditional model and labels: use guidance 0")
        model = self.source(plan.settings)
        parts, size = [], plan.settings.batch_size
        for start in range(0, num, size):
            indices = range(first + start, first + min(start + size, num))
            draws = ImageDraws(fold(seed, "sample"), indices, self.device)
            batch = None if y is None else y[start : start + size].to(self.device)
            report = _overall(callback, start // size, math.ceil(num / size))
            parts.append(plan.walk(model, batch, draws, self.info.shape, report).float().cpu())
        return torch.cat(parts)

    def decoded(self, x0: Tensor) -> tuple[Tensor, DataInfo]:
        """Samples x0 (N, C, H, W) as images to look at, with their description.

        Latents go through the model's `to_images`, in batches; others are images already.
        """
        decode = getattr(self.model, "to_images", None)
        if decode is None:
            return x0, self.info
        images = self._batched(lambda x, y: decode(x).clamp(-1, 1), x0, None, None)
        _, channels, height, width = images.shape
        return images, replace(self.info, shape=(channels, height, width), levels=256, dequantise=False)

    def plan(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        grid: str | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
    ) -> SamplePlan:
        """The sampler, its settings and its noise levels, checked; None takes the run's own."""
        self.require(["denoise"], "sampling")
        settings = _updated(self.settings, steps=steps, grid=grid, guidance=guidance, batch_size=batch_size)
        for name, value in (("steps", settings.steps), ("batch size", settings.batch_size)):
            if value < 1:
                raise UserError(f"{name} {value} is out of range: it must be at least 1")
        selection, function = self._sampler(sampler)
        sigmas, start = self._levels(settings, asked=grid)
        return SamplePlan(selection, function, settings, sigmas, start)

    def _sampler(self, name: str | None) -> tuple[Selection, Callable[..., Tensor]]:
        own = self.sampling.sampler
        full, record = self.registry.find("sampler", name or own.name, [own.name.partition("/")[0], "core"])
        settings = own.config if full == own.name else None
        if settings is None and record.config:
            settings = record.config()
        return Selection(full, settings), record.load()

    def _levels(self, settings: SampleConfig, *, asked: str | None) -> tuple[Tensor, float]:
        """Noise levels (steps,) float64, descending, and the factor that turns noise into the first state."""
        if hasattr(self.model, "sigmas"):
            sigmas = schedules.grid(self.model.sigmas, settings.steps, settings.grid)
            return sigmas, 1 / float(self.model.scale(sigmas[:1].to(self.device)))
        # Without levels there is no index to be uniform in; only an explicit wish for it is an error.
        if asked not in (None, "rho"):
            raise UserError(f"grid {asked!r} needs a model trained on discrete levels: use grid 'rho'")
        low, high = map(float, self.model.sigma_range)
        sigmas = schedules.rho_grid(low, high, settings.steps)
        return sigmas, float(sigmas[0])

    def chain(self) -> tuple[Tensor, float]:
        """All noise levels (N,) float64, ascending, and the std of the first state of a walk over them."""
        if hasattr(self.model, "sigmas"):
            sigmas = self.model.sigmas
            return sigmas, 1 / float(self.model.scale(sigmas[-1:].to(self.device)))
        low, high = map(float, self.model.sigma_range)
        return schedules.rho_grid(low, high, CHAIN).flip(0), high

    def labels_for(self, indices: Sequence[int], labels: Labels = None) -> Tensor | None:
        """The class of each image index, (N,) int64: `labels` cycled; None where no class is wanted."""
        if labels == "none" or (labels is None and not self.classes):
            return None
        if labels is None:
            labels = range(self.classes or 0)
        chosen = [labels] if isinstance(labels, int) else [int(label) for label in labels]
        if not chosen:
            raise UserError('no labels given: name at least one class, or "none"')
        self._check_labels(chosen, self.classes)
        return torch.tensor([chosen[index % len(chosen)] for index in indices])

    def check_labels(self, labels: Sequence[int]) -> None:
        """Raise `UserError` unless the model is conditional and every label is one of its classes."""
        self._check_labels(labels, self.num_classes)

    def _check_labels(self, labels: Sequence[int], classes: int | None) -> None:
        if not classes:
            raise UserError(f"{self.name} is unconditional: it takes no labels")
        wrong = [label for label in labels if not 0 <= label < classes]
        if wrong:
            raise UserError(f"label {wrong[0]} is out of range: the classes are 0 to {classes - 1}")

    def sampled(self, sampling: Sampling) -> Run:
        """The same run, sampled otherwise."""
        other = copy.copy(self)
        other.sampling, other._samples, other._sources = sampling, {}, {}
        return other

    def source(self, settings: SampleConfig) -> Any:
        """What is sampled from: the model, with classifier-free guidance, clipped, through the adapter."""
        key = repr((settings.guidance, settings.clip, self.sampling.adapter))
        if key not in self._sources:
            sampling = replace(self.sampling, sample=settings)
            self._sources[key] = components.sampled(sampling, self.model, self.info, self.registry)
        return self._sources[key]

    def cached_samples(self, num: int, seed: int = 0) -> Tensor:
        """`sample(num, seed=seed)` with the run's own settings, drawn once for all who ask."""
        known = self._samples.get(seed)
        have = 0 if known is None else len(known)
        if have < num:
            more = self.sample(num - have, seed=seed, first=have)
            known = self._samples[seed] = more if known is None else torch.cat([known, more])
        assert known is not None
        return known[:num]

    # -- scoring ---------------------------------------------------------------------------------------------

    def log_density(
        self,
        x0: Tensor,
        y: Tensor | None = None,
        *,
        sigma: float | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Log-density in nats, (N,) float32 on the CPU, of x0 (N, C, H, W) in model units.

        y (N,) int64 classes or None; sigma: score x0 + sigma n instead, data units; None: clean images.
        """
        self.require(["log_density"], "log_density")
        if y is not None:
            self.check_labels(y.tolist())

        def score(x: Tensor, y: Tensor | None) -> Tensor:
            level = None if sigma is None else torch.full((len(x),), float(sigma), device=x.device)
            return self.model.log_density(x, y, level)

        return self._batched(score, x0, y, batch_size)

    def features(self, x0: Tensor, *, batch_size: int | None = None) -> Tensor:
        """What the model's `features(x)` makes of images x0 (N, C, H, W) in model units, (N, D) on the CPU.

        UserError where it has none.
        """
        if not callable(getattr(self.model, "features", None)):
            raise UserError(f"{self.path or self.name}: {self.name} has no `features` of clean images")
        return self._batched(lambda x, y: self.model.features(x), x0, None, batch_size)

    def classify(
        self, x0: Tensor, *, sigma: float = 0.0, seed: int = 0, batch_size: int | None = None
    ) -> Tensor:
        """Class logits (N, num_classes) float32 on the CPU of clean images x0 (N, C, H, W) in model units.

        By the model's own `class_logits`, else by Bayes' rule from its class-conditional log-density.
        sigma: std in data units of noise added first, keyed by (seed, image): a model may know its densities
        better at a noisy level.
        """
        if not 0 <= sigma < math.inf:
            raise UserError(f"sigma {sigma:g} is out of range: a finite noise std of at least 0 is wanted")
        classifier = self.classifier

        def score(x: Tensor, y: Tensor | None) -> Tensor:
            return classifier.class_logits(x, x.new_full((len(x),), sigma))

        if sigma > 0:
            noise = ImageDraws(fold(seed, "classify"), range(len(x0))).normal(*x0.shape[1:])
            x0 = x0 + sigma * noise
        return self._batched(score, x0, None, batch_size)

    @cached_property
    def classifier(self) -> Any:
        """What offers `class_logits`: the model or Bayes' rule around it; UserError where neither does."""
        own = capabilities.offered(self.model)
        if "class_logits" in own:
            return self.model
        if "log_density" in own and not self.num_classes:
            raise UserError(
                f"classification needs `class_logits`, or `log_density` with labels: {self.name} "
                "has a density but is unconditional; train a class-conditional recipe"
            )
        self.require(["class_logits"], "classification")
        _, record = self.registry.find("adapter", "core/bayes")
        return record.load()(record.config(), self.model)

    def _batched(
        self,
        score: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        y: Tensor | None,
        batch_size: int | None,
    ) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self.info.shape) or len(x) == 0:
            shape = ", ".join(map(str, self.info.shape))
            raise UserError(f"images of shape {tuple(x.shape)}: {self.name} takes (N, {shape}) with N >= 1")
        size = batch_size or self.settings.batch_size
        labels = [None] * len(x) if y is None else y.to(self.device).split(size)
        with torch.no_grad():
            parts = [score(rows.to(self.device), labels[i]).cpu() for i, rows in enumerate(x.split(size))]
        return torch.cat(parts)

    # -- data ------------------------------------------------------------------------------------------------

    def split(self, name: str) -> Split:
        """A split of the run's data; UserError where there are none."""
        if self.data is None:
            raise UserError(
                f"{self.path or self.name} does not say which data it is for: name them with --data"
            )
        return self.data.split(name)

    def examples(
        self, split: str, indices: Sequence[int] | None = None, *, seed: int = 0, draw: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Images of a split as the model sees them, and their labels; indices None: all of them.

        x0 (N, C, H, W) float32 in model units, dequantised with noise keyed by (seed, draw, image);
        labels (N,) int64 or None.
        """
        images = self.split(split)
        chosen = list(range(len(images)) if indices is None else indices)
        if not chosen:
            raise UserError(f"split {split!r} of {self.info.name!r} is empty")
        pixels, labels = images.__getitems__(chosen)
        return self.info.to_model(pixels, ImageDraws(fold(seed, "dequantise", split, draw), chosen)), labels

    def likelihood(
        self,
        split: str = "test",
        *,
        draws: int = 1,
        seed: int = 0,
        labels: Literal["auto", "none", "data"] = "auto",
        limit: int | None = None,
        batch_size: int | None = None,
        callback: Progress | None = None,
    ) -> Likelihood:
        """Log-density of the first `limit` images of a split, averaged over `draws` dequantisation draws.

        labels: "none", log p(x); "data", log p(x | its class); "auto": "data" only where a conditional model
        was trained without a "no class" label. callback(done, total) counts images over all draws.
        """
        if draws < 1:
            raise UserError(f"cannot average over {draws} draws: ask for at least 1")
        if labels == "auto":
            bound = self.num_classes and getattr(self.model, "null_label", None) is None
            labels = "data" if bound else "none"
        # Without dequantisation every draw is the same.
        draws = draws if self.info.dequantise and self.info.levels is not None else 1
        count = len(self.split(split)) if limit is None else min(limit, len(self.split(split)))
        size = batch_size or self.settings.batch_size
        scores = torch.zeros(draws, count, dtype=torch.float64)
        for draw in range(draws):
            for start in range(0, count, size):
                rows = range(start, min(start + size, count))
                x0, y = self.examples(split, rows, seed=seed, draw=draw)
                if labels == "data" and y is None:
                    raise UserError(f"data set {self.info.name!r} has no labels to condition on")
                given = y if labels == "data" else None
                scores[draw, rows.start : rows.stop] = self.log_density(x0, given, batch_size=size).double()
                if callback:
                    callback(draw * count + rows.stop, draws * count)
        nats = scores.mean(0)
        return Likelihood(split, draws, seed, labels, self.info.dim, nats, self.info.bits_per_dim(nats))

    def diagnostics(self, split: str = "test", *, seed: int = 0, limit: int = 512) -> dict[str, float] | None:
        """What the model says of its own density on the first `limit` images; None without such a method.

        The method is `likelihood_diagnostics(x0, draws) -> {name: float}`; x0 (N, C, H, W) float32 in model
        units, draws of N rows.
        """
        method = getattr(self.model, "likelihood_diagnostics", None)
        if method is None:
            return None
        x0, _ = self.examples(split, range(min(limit, len(self.split(split)))), seed=seed)
        draws = Draws(fold(seed, "diagnostics"), len(x0), device=self.device)
        with torch.no_grad():
            return {name: float(value) for name, value in method(x0.to(self.device), draws).items()}

    def evaluate(
        self, split: str = "test", metrics: Sequence[str] | None = None, *, seed: int = 0
    ) -> dict[str, dict[str, float]]:
        """Figures by metric, of every registered metric that the run allows or of those named."""
        from cdm_core.metrics import evaluate

        return evaluate(self, split=split, names=metrics, seed=seed).values


def _updated(own: SampleConfig, **given: Any) -> SampleConfig:
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def _overall(callback: Progress | None, batch: int, batches: int) -> Progress | None:
    if callback is None:
        return None
    return lambda done, total: callback(batch * total + done, batches * total)


# -- loading -------------------------------------------------------------------------------------------------


def load_run(
    path: str | Path,
    *,
    device: str = "auto",
    weights: Weights = "ema",
    data: str | None = None,
    registry: Registry | None = None,
    compile: bool = False,
    plugins: Sequence[str] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """The run in a folder made by `train` (its newest whole checkpoint) or in a converted `.safetensors`.

    device: `auto`, `cpu`, `cuda` or a torch device; weights: the moving average (`ema`) or the plain `model`;
    data: the data set (by name, with its default settings) of a converted file; compile: as `Run` has it;
    recipe, overrides (bare names from `plugins` first): how to sample it instead, by a recipe's sampling
    tables and by texts such as `adapter.scale=2`.
    Raises UserError when there is no run or checkpoint, or where the weights do not fit the model.
    """
    path = Path(path)
    registry = registry if registry is not None else load_registry()
    if weights not in ("ema", "model"):
        raise UserError(f"unknown weights {weights!r}: choose 'ema' or 'model'")
    if path.is_file():
        run = _from_file(path, data, device=pick_device(device), registry=registry, compile=compile)
    elif data is not None:
        raise UserError(f"{path} is a run folder, which names its own data: --data is for converted files")
    else:
        run = _from_folder(
            RunFolder(path), weights, device=pick_device(device), registry=registry, compile=compile
        )
    run.sampling = resolve_sampling(
        registry, run.sampling, recipe=recipe, overrides=overrides, plugins=plugins
    )
    return run


def _from_folder(folder: RunFolder, weights: Weights, *, registry: Registry, **given: Any) -> Run:
    if not folder.config_path.is_file():
        what = "has no config.toml" if folder.path.is_dir() else "does not exist"
        raise UserError(
            f"{folder.path} is not a run: it {what}; `cdm-run train --out {folder.path}` makes one"
        )
    config = from_toml(folder.config_path.read_text(), registry)
    checkpoint = folder.latest()
    if checkpoint is None:
        raise UserError(f"run {folder.path} has no usable checkpoint yet: train it first, or a little longer")
    data = components.build_data(config, registry)
    model = components.build_model(config, registry, data.info)
    name = f"the model {config.model.name!r}"
    _fill(model, checkpoint.weights(weights), f"checkpoint {checkpoint.path}", name)
    given |= {"config": config, "data": data, "step": checkpoint.step, "path": folder.path}
    return Run(model, data.info, registry=registry, name=name, **given)


def _from_file(path: Path, data_name: str | None, *, registry: Registry, **given: Any) -> Run:
    from cdm_core.formats import load_converted

    model, about = load_converted(path, registry)
    data = None
    if data_name is not None:
        full, record = registry.find("dataset", data_name)
        data = record.load()(record.config() if record.config else None)
        ours, theirs = ((info.shape, info.levels) for info in (about.info, data.info))
        if ours != theirs:
            raise UserError(
                f"--data {full}: {path} was trained on (C, H, W) {ours[0]} with {ours[1]} grey levels, "
                f"not {theirs[0]} with {theirs[1]}"
            )
    # The file says how its model was fed, dequantised or not; the data set only brings the images.
    name = f"the model {about.model.name!r}"
    return Run(model, about.info, data=data, registry=registry, path=path, name=name, **given)


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split()[:40])
        raise UserError(f"{source} does not fit {name}: {problem}") from error
