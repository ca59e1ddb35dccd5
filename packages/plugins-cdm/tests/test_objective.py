"""The two losses and their second-order gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_cdm.configs import MLPConfig, ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.model import MLP
from cdm_plugins_cdm.objective import CDMObjective, terms
from cdm_plugins_cdm.unet import UNet

POINTS = DataInfo("points", (3, 1, 1), 4, levels=None)


def small(**changes: Any) -> MLP:
    torch.manual_seed(0)
    model = MLP(dataclasses.replace(MLPConfig.small(), **changes), POINTS)
    torch.nn.init.normal_(model.linear_layer.weight, std=0.1)
    return model


def points(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 1, 1, generator=torch.Generator().manual_seed(1))


class Fixed:
    """Draws that were written down, and how often labels were asked about."""

    def __init__(self, level: Tensor, eps: Tensor, coin: Tensor | None = None) -> None:
        self.level, self.eps, self.coin = level, eps, coin

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.level

    def normal(self, *shape: int) -> Tensor:
        return self.eps

    def uniform(self, *shape: int) -> Tensor:
        assert self.coin is not None
        return self.coin


@pytest.mark.parametrize("changes", [{}, {"path": "ot_official"}, {"conditional": True}])
def test_gradient_of_the_loss_against_finite_differences(changes: Any) -> None:
    """Of second order: the loss itself differentiates the network."""
    model = small(**changes).double().eval()
    x0 = points().double()
    y = torch.arange(6) % 4 if changes.get("conditional") else None
    draws = Fixed(torch.tensor([0, 1, 5, 10, 15, 19]), points(6).double().flip(0))
    objective = CDMObjective(ObjectiveConfig(w_ce=0.5))
    loss = objective(model, x0, y, draws)["loss"]
    model.zero_grad()
    loss.backward()
    step = 1e-6
    for parameter in model.parameters():
        direction = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                ends.append(objective(model, x0, y, draws)["loss"])
                parameter.sub_(sign * step * direction)
        difference = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((parameter.grad * direction).sum(), difference, rtol=1e-5, atol=1e-7)


def test_row_zero_stays_where_it_is() -> None:
    model = small()
    CDMObjective(ObjectiveConfig())(model, points(), None, Draws(0, 6))["loss"].backward()
    assert not model.linear_layer.weight.grad[0].any()
    assert model.linear_layer.bias.grad[0] == 0
    assert model.linear_layer.weight.grad[1:].abs().amax(1).min() > 0


def test_loss_is_the_weighted_sum_over_the_whole_batch() -> None:
    model = small()
    level, eps = torch.tensor([0, 1, 5, 10, 20, 21]), points().flip(0)
    result = CDMObjective(ObjectiveConfig(w_ce=0.25, w_mse=2.0))(model, points(), None, Fixed(level, eps))
    x_t = model.path.noised(points(), level, eps)
    o, parts = model(x_t), terms(model, x_t, level, eps, None)
    ce = torch.nn.functional.cross_entropy(o.cumsum(1), level)
    torch.testing.assert_close(result["ce"], ce.detach())
    torch.testing.assert_close(result["loss"], 0.25 * ce + 2 * parts.squared_error.mean())
    # Nothing is learnt of the noise at the clean level, where none is predicted, or at pure noise, all of it.
    torch.testing.assert_close(parts.squared_error[0], eps[0].square().mean())
    assert parts.squared_error[5] < 1e-10
    expected = parts.squared_error[1:5].sum() / 6 * 22 / 20
    torch.testing.assert_close(result["mse"], expected.detach())


@pytest.mark.parametrize(("w_ce", "w_mse"), [(1.0, 0.0), (0.0, 1.0)])
def test_either_loss_alone(w_ce: float, w_mse: float) -> None:
    model = small()
    both = CDMObjective(ObjectiveConfig(1.0, 1.0))(model, points(), None, Draws(0, 6))
    one = CDMObjective(ObjectiveConfig(w_ce, w_mse))(model, points(), None, Draws(0, 6))
    torch.testing.assert_close(one["ce"], both["ce"])
    assert ("mse" in one) == (w_mse > 0)
    mse = both["loss"].detach() - both["ce"]
    torch.testing.assert_close(one["loss"].detach(), both["ce"] if w_ce else mse)
    one["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_values_do_not_depend_on_whether_gradients_are_wanted() -> None:
    model = small()
    objective = CDMObjective(ObjectiveConfig())
    trained = objective(model, points(), None, Draws(0, 6))
    with torch.no_grad():
        validated = objective(model, points(), None, Draws(0, 6))
    assert not validated["loss"].requires_grad
    for name, value in trained.items():
        torch.testing.assert_close(validated[name], value.detach())


def test_labels_are_dropped_in_training_and_never_in_validation() -> None:
    model = small(conditional=True)
    asked: list[Tensor] = []
    features = model.features
    model.features = lambda x, y=None: asked.append(y) or features(x, y)  # type: ignore[assignment]
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    draws = Fixed(torch.full((6,), 3), points(), coin=torch.tensor([0.05, 0.2, 0.0, 0.9, 0.0999, 0.1]))
    objective = CDMObjective(ObjectiveConfig(label_dropout=0.1))
    objective(model.train(), points(), y, draws)
    objective(model.eval(), points(), y, draws)
    assert asked[0].tolist() == [4, 1, 4, 3, 4, 1]
    assert asked[1].tolist() == y.tolist()
    assert y.tolist() == [0, 1, 2, 3, 0, 1]


def test_labels_of_the_data_are_left_alone_without_classes() -> None:
    model = small()
    labelled = CDMObjective(ObjectiveConfig())(model, points(), torch.arange(6) % 4, Draws(0, 6))
    assert labelled["loss"] == CDMObjective(ObjectiveConfig())(model, points(), None, Draws(0, 6))["loss"]


def test_what_it_cannot_train_is_refused_in_words() -> None:
    objective = CDMObjective(ObjectiveConfig())
    with pytest.raises(UserError, match="not a Linear"):
        objective(torch.nn.Linear(1, 1), points(), None, Draws(0, 6))
    with pytest.raises(UserError, match="labelled data"):
        objective(small(conditional=True), points(), None, Draws(0, 6))
    with pytest.raises(ValueError, match="not both 0"):
        ObjectiveConfig(0.0, 0.0).check()


def test_autocast_leaves_the_loss_close() -> None:
    torch.manual_seed(0)
    model = UNet(UNetConfig.small(), DataInfo("images", (1, 8, 8)))
    torch.nn.init.normal_(model.linear_layer.weight, std=0.3)
    x0 = torch.randn(4, 1, 8, 8)
    objective = CDMObjective(ObjectiveConfig(w_ce=1.0))
    full = objective(model, x0, None, Draws(0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(model, x0, None, Draws(0, 4))
    low["loss"].backward()
    assert low["loss"].dtype == torch.float32
    torch.testing.assert_close(low["loss"], full["loss"], rtol=0.05, atol=0)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
