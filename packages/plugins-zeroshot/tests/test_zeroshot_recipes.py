"""The recipes: each resolves, and those of publications have their settings."""

from __future__ import annotations

from typing import Any

import pytest

from cdm_core.config import resolve
from cdm_core.errors import UserError
from cdm_core.manager import load_registry
from cdm_core.settings import RunConfig
from cdm_plugins_zeroshot.estimators import Estimator, levels_of
from cdm_plugins_zeroshot.recipes import RECIPES
from cdm_plugins_zeroshot.zeroshot_configs import OFFICIAL_STAGES, ClassifierConfig


def recipe(name: str) -> RunConfig:
    registry = load_registry()
    try:
        return resolve(registry, plugins=["zeroshot"], recipe=name)
    except UserError as error:
        if "guidance" in str(error):
            pytest.skip(f"recipe {name} is for a network of plugin guidance, which is not installed")
        raise


def classifier(name: str) -> ClassifierConfig:
    adapter = recipe(name).adapter
    assert adapter is not None
    config: Any = adapter.config
    assert isinstance(config, ClassifierConfig)
    return config


@pytest.mark.parametrize("name", [one.name for one in RECIPES])
def test_every_recipe_resolves(name: str) -> None:
    config = recipe(name)
    assert config.recipe == f"zeroshot/{name}"
    if config.adapter is not None:
        config.adapter.config.check()


def test_mnist_as_the_re_implementation_trains_it() -> None:
    """50 epochs of 60,000 images in batches of 512, n_T 400, one label in ten dropped."""
    config = recipe("mnist")
    model, train = config.model.config, config.train
    assert (model.n_feat, model.n_T, model.beta_start, model.beta_end, model.sign) == (
        256,
        400,
        1e-4,
        0.02,
        -1,
    )
    assert train.steps * train.batch_size == pytest.approx(50 * 60_000, rel=1e-3)
    assert (train.lr, train.optimizer, train.ema_decay) == (1e-4, "adam", 0.0)
    assert config.objective.config.label_dropout == 0.1


def test_dit_is_asked_at_every_fourth_level() -> None:
    """t = 2, 6, ..., 998 of 1,000, every class at each."""
    config = classifier("imagenet-dit")
    assert config.elimination.rule == "none"
    estimator = Estimator(config.estimator, levels_of(None, config.estimator), (1, 1, 1))
    assert sorted(estimator.levels(0, 0, 250).tolist()) == list(range(2, 1000, 4))
    assert (config.estimator.loss, config.estimator.weight) == ("l2", "simple")


def test_edm_is_asked_at_126_levels_in_a_line() -> None:
    settings = classifier("cifar10").estimator
    levels = levels_of(None, settings)
    assert len(levels) == settings.pairs == 126
    assert (float(levels[0]), float(levels[-1])) == pytest.approx((1e-4, 3.0))
    assert levels.diff().std() < 1e-12
    assert sorted(Estimator(settings, levels, (1, 1, 1)).levels(0, 0, 126).tolist()) == list(range(126))


def test_stable_diffusion_goes_in_two_stages() -> None:
    config = classifier("stable-diffusion")
    assert (config.elimination.stage_pairs, config.elimination.stage_keep) == OFFICIAL_STAGES["cifar10"]
    assert (config.estimator.pairs, config.estimator.loss, config.estimator.precision) == (500, "l1", "fp16")
