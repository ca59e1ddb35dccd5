"""Recipes resolve, and those of the paper have the paper's figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cdm_core.config import resolve
from cdm_core.manager import load_registry
from cdm_core.schedules import grid
from cdm_core.settings import LRFactor, RunConfig
from cdm_plugins_cdm.model import make_path
from cdm_plugins_cdm.recipes import RECIPES

NAMES = [recipe.name for recipe in RECIPES]
PAPER = [name for name in NAMES if name.startswith(("cifar10", "celeba"))]


def resolved(name: str) -> RunConfig:
    return resolve(load_registry(), plugins=("cdm",), recipe=f"cdm/{name}")


def test_the_recipes_that_scripts_rely_on_are_there() -> None:
    promised = {
        "default",
        "digits",
        "digits-bayes",
        "digits-cond",
        "mixture-2d",
        "cifar10",
        "cifar10-cond",
        "cifar10-uniform",
    }
    assert set(NAMES) == promised | {"cifar10-ot", "celeba64"}
    assert dataclasses.replace(resolved("default"), recipe="cdm/digits") == resolved("digits")


@pytest.mark.parametrize("name", NAMES)
def test_sampling_visits_levels_that_the_model_has(name: str) -> None:
    config = resolved(name)
    path = make_path(config.model.config)
    sigmas = grid(path.ve_sigmas, config.sample.steps, config.sample.grid)
    assert len(sigmas.unique()) == config.sample.steps
    assert torch.isin(sigmas, path.ve_sigmas).all()


@pytest.mark.parametrize("name", PAPER)
def test_papers_hyper_parameters(name: str) -> None:
    config = resolved(name)
    model, train, objective = config.model.config, config.train, config.objective.config
    assert (model.channels, model.num_res_blocks, model.attn_resolutions, model.dropout) == (
        128,
        2,
        (16,),
        0.1,
    )
    assert model.ch_mult == ((1, 2, 2, 2, 4) if name == "celeba64" else (1, 2, 2, 2))
    assert model.conditional == (name == "cifar10-cond")
    assert model.path == {"cifar10-uniform": "uniform", "cifar10-ot": "ot"}.get(name, "linear")
    assert (objective.w_ce, objective.w_mse, objective.label_dropout) == (0.001, 1.0, 0.1)
    assert (train.optimizer, train.batch_size, train.weight_decay, train.clip_norm) == ("adam", 128, 0, None)
    assert (train.ema_decay, train.ema_start) == (0.9999, 5000)
    assert train.lr == (2e-4 if name in ("cifar10", "cifar10-cond") else 1e-4)
    assert config.data.config.flip
    if name == "cifar10-ot":
        assert (train.steps, train.lr_schedule) == (1_000_000, ())
    else:
        assert train.steps == 500_000
        assert train.lr_schedule == (LRFactor("warmup", 5000), LRFactor("step", 200_000, 0.1))
