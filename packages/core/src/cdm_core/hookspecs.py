"""What a plugin can tell the runtime: nine things to register, three moments to watch.

A plugin is any module (or object) behind an entry point of the group `cdm_run`, with functions marked
`@hookimpl`. Registration hooks take no argument, must not import torch, and return an iterable of the frozen
records of `cdm_core.records`; observers watch a run and never change its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cdm_core import records
    from cdm_core.runs import RunFolder

PROJECT = "cdm_run"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_models() -> Iterable[records.Model]:
    """Networks that offer capabilities such as `denoise(x, sigma, y)`."""


@hookspec
def register_objectives() -> Iterable[records.Objective]:
    """Losses: what `train` minimises."""


@hookspec
def register_samplers() -> Iterable[records.Sampler]:
    """Functions from a denoiser and a grid of noise levels to samples."""


@hookspec
def register_adapters() -> Iterable[records.Adapter]:
    """Wrappers that turn one capability into another: guides, classifiers built from denoisers."""


@hookspec
def register_datasets() -> Iterable[records.Dataset]:
    """Data with their description: shape, classes, grey levels, splits."""


@hookspec
def register_metrics() -> Iterable[records.Metric]:
    """Figures that `evaluate` computes when the run's capabilities allow."""


@hookspec
def register_checkpoint_formats() -> Iterable[records.CheckpointFormat]:
    """How `convert` reads a foreign checkpoint."""


@hookspec
def register_recipes() -> Iterable[records.Recipe]:
    """Named, complete configurations; `default` is what `train` runs."""


@hookspec
def register_commands() -> Iterable[records.Command]:
    """Commands mounted as `cdm-run PLUGIN NAME`."""


@hookspec
def on_run_start(folder: RunFolder) -> None:
    """Training is about to take its first step in `folder` (also after a resume)."""


@hookspec
def on_log(folder: RunFolder, step: int, scalars: Mapping[str, float]) -> None:
    """A line was written to `metrics.jsonl`."""


@hookspec
def on_run_end(folder: RunFolder, step: int) -> None:
    """Training ended after `step` steps, its last checkpoint written."""
