"""From a run's configuration to its live parts: the one place where names become objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import Clipped
from cdm_core.capabilities import offered, require
from cdm_core.data import Data, DataInfo
from cdm_core.errors import UserError
from cdm_core.random import fold
from cdm_core.settings import RunConfig, Sampling, Selection

if TYPE_CHECKING:
    from cdm_core.manager import Registry

Objective = Callable[..., dict[str, Tensor]]


class Parts(NamedTuple):
    """What a run trains, how, and on what."""

    model: nn.Module
    objective: Objective
    data: Data


def build(config: RunConfig, registry: Registry) -> Parts:
    """The data, model and objective of `config`, checked to fit one another before anything is heavy."""
    data = build_data(config, registry)
    model = build_model(config, registry, data.info)
    check_objective(config, registry, model)
    return Parts(model, build_objective(config, registry), data)


def build_data(config: RunConfig, registry: Registry) -> Data:
    """The data set that `config.data` names."""
    _, record = registry.find("dataset", config.data.name)
    return record.load()(config.data.config)


def build_model(config: RunConfig, registry: Registry, info: DataInfo) -> nn.Module:
    """The model that `config.model` names, on the CPU; its first weights depend on `config.seed` alone."""
    _, record = registry.find("model", config.model.name)
    target = record.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, "init"))
        return target(config.model.config, info)


def build_objective(config: RunConfig, registry: Registry) -> Objective:
    """The loss that `config.objective` names: `objective(model, x0, y, draws) -> {"loss": ...}`."""
    _, record = registry.find("objective", config.objective.name)
    return record.load()(config.objective.config)


def build_sampler(selection: Selection, registry: Registry) -> Callable[..., Tensor]:
    """The sampler that `selection` names, its settings bound as keywords."""
    _, record = registry.find("sampler", selection.name)
    return partial(record.load(), **options(selection.config))


def adapt(selection: Selection, model: Any, registry: Registry) -> Any:
    """`model` within the adapter that `selection` names, checked to offer what the adapter needs."""
    full, record = registry.find("adapter", selection.name)
    config = selection.config
    if config is None and record.config is not None:
        config = record.config()
    wanted = getattr(config, "requires", record.requires)
    missing = [capability for capability in wanted if capability not in offered(model)]
    hint = registry.hint(missing)
    require(model, wanted, user=f"the adapter {full!r}", model_name="the model", hint=hint)
    return record.load()(config, model)


def sampled(sampling: Sampling, model: Any, info: DataInfo, registry: Registry) -> Any:
    """What is sampled from: `model`, with classifier-free guidance, clipped, through the adapter.

    In this order: a classifier that guides sees the prediction as it would be without it. `UserError` where
    one of them does not fit.
    """
    weight = sampling.sample.guidance
    if weight:
        if not getattr(model, "num_classes", None):
            raise UserError(
                f"guidance {weight:g}: the model is unconditional and knows no classes to be guided to; "
                "use guidance 0"
            )
        model = adapt(Selection("core/cfg", CFGConfig(weight)), model, registry)
    if sampling.sample.clip:
        if info.levels is None:
            raise UserError(f"sample.clip: the data {info.name!r} are no images in [-1, 1]")
        model = Clipped(model)
    return adapt(sampling.adapter, model, registry) if sampling.adapter else model


def options(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass by name (not recursively); {} for None."""
    return {} if settings is None else dict(vars(settings))


def check_objective(config: RunConfig, registry: Registry, model: object) -> None:
    """Raise `UserError` unless `model` offers what the objective requires; name who would."""
    name, record = registry.find("objective", config.objective.name)
    missing = [capability for capability in record.requires if capability not in offered(model)]
    require(
        model,
        record.requires,
        user=f"the objective {name!r}",
        model_name=f"the model {config.model.name!r}",
        hint=registry.hint(missing),
    )
