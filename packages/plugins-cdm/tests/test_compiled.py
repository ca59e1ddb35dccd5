"""The objective and its networks compiled: second-order gradients, samples and likelihoods are eager's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm_core.compiled import CompiledModel, CompiledObjective, same_masks
from cdm_core.data import DataInfo
from cdm_core.random import Draws
from cdm_plugins_cdm.configs import MLPConfig, ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.model import MLP
from cdm_plugins_cdm.objective import CDMObjective
from cdm_plugins_cdm.unet import UNet

IMAGES, POINTS = DataInfo("images", (1, 8, 8), 4), DataInfo("points", (3, 1, 1), 4, levels=None)
RECIPES = ["trace", "whole"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    model = UNet(dataclasses.replace(UNetConfig.small(), **changes), IMAGES).train()
    nn.init.normal_(model.linear_layer.weight, std=0.1)
    return model


def mlp(**changes: Any) -> MLP:
    torch.manual_seed(0)
    model = MLP(dataclasses.replace(MLPConfig.small(), **changes), POINTS).train()
    nn.init.normal_(model.linear_layer.weight, std=0.1)
    return model


def batch(model: Any, rows: int = 4) -> tuple[Any, Tensor, Tensor, Draws]:
    shape = (1, 8, 8) if isinstance(model, UNet) else (3, 1, 1)
    x0 = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))
    return model, x0, torch.arange(rows) % 4, Draws(2, rows)


def gradient(step: Callable[..., dict[str, Tensor]], model: nn.Module) -> Tensor:
    """All of it as one vector, float64; the seed always the same."""
    torch.manual_seed(3)
    loss = step(*batch(model))["loss"]
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def in_double(objective: CDMObjective, model: nn.Module) -> Tensor:
    """The gradient that eager computes in float64."""

    def step(model: Any, *args: Any) -> dict[str, Tensor]:
        x_t, level, eps, y = objective.prepare(model, *args)
        return objective.loss(model, x_t.detach().double().requires_grad_(x_t.requires_grad), level, eps, y)

    return gradient(step, copy.deepcopy(model).double())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compiled(objective: CDMObjective, recipe: Any, backend: str = "aot_eager") -> CompiledObjective:
    return CompiledObjective(objective, recipe, name="cdm/cdm", backend=backend)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("make", "changes", "settings"),
    [
        (mlp, {}, {}),
        (mlp, {"conditional": True, "path": "ot_official"}, {"w_ce": 1.0}),
        (mlp, {}, {"w_mse": 0.0, "w_ce": 1.0}),
        (unet, {"conditional": True, "dropout": 0.3}, {"w_ce": 1.0}),
        (unet, {"decoder": False}, {}),
    ],
)
def test_gradients_are_those_of_eager_in_float64(recipe: str, make: Any, changes: Any, settings: Any) -> None:
    model, objective = make(**changes), CDMObjective(ObjectiveConfig(**settings))
    step = compiled(objective, recipe)
    step.compile(*batch(model))
    with same_masks():  # the trunk's layout is not the compiler's
        assert error(gradient(step, model), in_double(objective, model)) < 5e-6
    assert step.error < 5e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_under_autocast(recipe: str) -> None:
    model, objective = unet(), CDMObjective(ObjectiveConfig(w_ce=1.0))
    exact = in_double(objective, model)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = gradient(objective, model), gradient(compiled(objective, recipe), model)
    assert error(found, eager) < 2e-2
    assert error(found, exact) < 1.5 * error(eager, exact)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_leaves_the_head_in_float32_backwards_too(recipe: str) -> None:
    """Training differentiates the loss outside autocast; a compiled step that did not would round here."""
    model, objective = unet(), CDMObjective(ObjectiveConfig(w_ce=1.0, w_mse=0.0))
    found = []
    for step in (compiled(objective, recipe), objective):
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(*batch(model))["loss"]
        found.append(torch.autograd.grad(loss, model.linear_layer.weight)[0])
    assert error(*(g.double().flatten() for g in found)) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_real_compiler(recipe: str) -> None:
    model, objective = mlp(conditional=True), CDMObjective(ObjectiveConfig(w_ce=1.0))
    step = compiled(objective, recipe, backend="inductor")
    assert error(gradient(step, model), in_double(objective, model)) < 5e-6


def test_scalars_are_those_of_eager() -> None:
    model, objective = mlp(conditional=True), CDMObjective(ObjectiveConfig())
    for recipe in RECIPES:
        found, expected = compiled(objective, recipe)(*batch(model)), objective(*batch(model))
        assert found.keys() == expected.keys() == {"loss", "ce", "mse", "accuracy"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("make", [mlp, unet])
def test_a_compiled_model_denoises_and_scores_alike(make: Any) -> None:
    """Labelled, unlabelled and mixed, at one level a row; the second batch is smaller and is filled up."""
    model = make(conditional=True).eval().requires_grad_(False)
    wrapped = CompiledModel(model, hint="leave it", backend="aot_eager")
    for rows in (4, 3):
        _, x, y, _ = batch(model, rows)
        sigma, labels = torch.linspace(0.1, 5, rows), y.clone().fill_(2).where(y > 0, y * 0 + 4)
        calls: list[Callable[[Any], Tensor]] = [
            lambda m, x=x, s=sigma, y=labels: m.denoise(x, s, y),
            lambda m, x=x, s=sigma: m.denoise(x, s),
            lambda m, x=x, y=labels: m.log_density(x, y),
            lambda m, x=x, y=labels, s=sigma: m.log_density(x, y, s),
        ]
        for call in calls:
            with torch.no_grad():
                torch.testing.assert_close(call(wrapped), call(model), rtol=1e-4, atol=1e-4)
    assert len(wrapped._compiled) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph needs one")
@pytest.mark.parametrize("recipe", ["cuda-graph", "whole"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_of_the_unet_on_a_gpu(recipe: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, and images large enough for the low-resolution form of the upsampling convolution."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = unet(dropout=0.2, channels=32, norm_groups=8).cuda()
    x0 = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1)).cuda()
    objective: Any = CDMObjective(ObjectiveConfig(w_ce=1.0))
    step = CompiledObjective(objective, recipe, name="cdm/cdm")
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        step.compile(model, x0, None, Draws(2, 256, device="cuda"))
        loss = step(model, x0, None, Draws(2, 256, device="cuda"))["loss"]
    loss.backward()
    assert step.error < (5e-2 if half else 1e-4)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
