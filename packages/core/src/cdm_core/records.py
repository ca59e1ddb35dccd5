"""Typed records that plugins register. They hold no heavy object: `target` is imported only when used.

A component is known everywhere as `plugin/name`; the bare name will do where it is unique or where the
plugin named by `--plugin` has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cdm_core.errors import UserError


@dataclass(frozen=True)
class Component:
    """Something a plugin offers by name.

    `target` is `"module:attribute"`; `config` is the dataclass of its settings (None: no settings);
    `provides` and `requires` name capabilities (`cdm_core.capabilities`).
    """

    kind: ClassVar[str] = "component"

    name: str
    summary: str
    target: str
    config: type | None = None
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import and return the target."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self.kind} {self.name!r}: cannot load {self.target!r}: {error}") from error


class Model(Component):
    """`target(config, info: DataInfo) -> torch.nn.Module` with the capabilities it `provides`."""

    kind = "model"


class Objective(Component):
    """`target(config) -> objective(model, x0, y, draws) -> {"loss": Tensor, ...}`, scalars all.

    x0 (B, C, H, W) float32 in model units; y (B,) int64 or None; draws: `cdm_core.random.Draws`. Validation
    calls it under `torch.no_grad`: an objective that differentiates inside enables grad for that itself.

    It can be compiled if it is split, `objective(model, x0, y, draws) == loss(model, *prepare(...))`:

    - `prepare(model, x0, y, draws) -> tuple[Tensor | None, ...]`: all that is random, all checks, and the
      leaves (`requires_grad_()`) that the loss differentiates in;
    - `loss(model, *prepared) -> {"loss": Tensor, ...}`: tensor operations alone; no draw but the model's own
      dropout, no number read out of a tensor, no leaf made inside.
    """

    kind = "objective"


class Sampler(Component):
    """`target(denoise, x, sigmas, *, noise, callback, **config) -> x0`, as in `cdm_core.samplers`."""

    kind = "sampler"


class Adapter(Component):
    """`target(config, model) -> model`: turns the capabilities it `requires` into those it `provides`.

    Where its settings decide, their own attribute `requires` says what it takes.
    """

    kind = "adapter"


class Dataset(Component):
    """`target(config) -> cdm_core.data.Data`."""

    kind = "dataset"


class Metric(Component):
    """`target(config, run, *, split: str, seed: int) -> {name: float}`; `requires` of the run's model."""

    kind = "metric"


class CheckpointFormat(Component):
    """`target(path, overrides) -> cdm_core.formats.Foreign`, or None when the file is of another format."""

    kind = "checkpoint format"


@dataclass(frozen=True)
class Recipe:
    """A named, complete configuration; the one called `default` is what `train` runs."""

    kind: ClassVar[str] = "recipe"

    name: str
    summary: str
    values: Mapping[str, Any] = field(default_factory=dict)


class Command(Component):
    """`target`: a `click.Command`, mounted as `cdm-run PLUGIN NAME`."""

    kind = "command"
