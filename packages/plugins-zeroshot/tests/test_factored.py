"""Two halves of any denoiser: nothing is gone round, and costs are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance, Clipped
from cdm_core.data import DataInfo
from cdm_core.mixtures import GaussianMixture
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig
from cdm_plugins_zeroshot.factored import Factored, Features, Unfactored, factored, measured_share, passes


def mixture() -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    return GaussianMixture(torch.full((3,), 1 / 3), means, torch.eye(2).expand(3, 2, 2) / 4)


def unet() -> ContextUnet:
    torch.manual_seed(0)
    model = ContextUnet(ContextUnetConfig.small(), DataInfo("grey", (1, 8, 8), 3))
    randomise(model)
    return model.eval()


def pairs() -> tuple[Tensor, Tensor]:
    """Images in an order of their own, and classes."""
    return torch.tensor([1, 0, 1, 1]), torch.tensor([2, 2, 0, 1])


@torch.no_grad()
def test_any_denoiser_can_be_asked_in_two_halves() -> None:
    model = mixture()
    halves = factored(model)
    x, sigma, (image, y) = normal(2, 2, 1, 1), torch.tensor([0.3, 2.0]), pairs()
    out = halves.decode(halves.encode(x, sigma).rows(image), sigma[image], y)
    assert torch.equal(out, model.denoise(x[image], sigma[image], y))
    assert torch.equal(halves.decode(halves.encode(x, sigma), sigma), model.denoise(x, sigma))
    assert isinstance(halves, Factored)
    assert halves.shared_share == 0
    assert halves.means is model.means  # type: ignore[attr-defined] - the rest is the model's own


@pytest.mark.parametrize("wrap", [lambda m: ClassifierFreeGuidance(CFGConfig(2.0), m), Clipped])
@torch.no_grad()
def test_a_wrapper_is_not_gone_round(wrap: Any) -> None:
    """What a wrapper passes through, the model's own halves among it, is not what the wrapper computes."""
    model = unet()
    wrapped, halves = wrap(model), factored(wrap(model))
    sigma = model.sigmas[[3, 15]].float()
    x, (image, y) = 3 * normal(2, 1, 8, 8), pairs()
    out = halves.decode(halves.encode(x, sigma).rows(image), sigma[image], y)
    assert torch.equal(out, wrapped.denoise(x[image], sigma[image], y))
    assert not torch.equal(out, model.denoise(x[image], sigma[image], y))


class OtherHalves(nn.Module):
    """A network whose methods of the same names mean something else."""

    def encode(self, x_t: Tensor, emb: Tensor) -> Tensor:
        raise AssertionError("not ours to call")

    decode = encode

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return x / 2


def test_names_alone_do_not_make_halves() -> None:
    halves, x = factored(OtherHalves()), normal(2, 1, 4, 4)
    assert isinstance(halves, Unfactored)
    assert torch.equal(halves.decode(halves.encode(x, x[:, 0, 0, 0]), x[:, 0, 0, 0]), x / 2)


def test_features_are_taken_by_rows() -> None:
    features = Features((normal(3, 2), normal(3, 1, 4, 4, seed=1)))
    taken = features.rows(torch.tensor([2, 2, 0, 1]))
    assert isinstance(taken, Features)
    for one, whole in zip(taken, features, strict=True):
        assert torch.equal(one, torch.stack([whole[2], whole[2], whole[0], whole[1]]))


def test_the_share_is_of_a_pass_without_gradients() -> None:
    class TwoLayers(nn.Module):
        """Of 12 products one layer has 9, the other 3."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

        def encode(self, x: Tensor, sigma: Tensor) -> Features:
            assert not torch.is_grad_enabled()
            return Features((self.first(x),))

        def decode(self, features: Features, sigma: Tensor, y: Tensor | None = None) -> Tensor:
            return self.second(features[0])

    model: Any = TwoLayers()
    assert measured_share(model, torch.ones(1, 3), torch.ones(1), None) == 9 / 12
    oracle: Any = Unfactored(mixture())
    assert 0 <= measured_share(oracle, torch.ones(1, 2, 1, 1), torch.ones(1), torch.tensor([1])) < 1


def test_costs_are_in_whole_passes() -> None:
    assert passes(0.0, 7, 70) == 70
    assert passes(0.48, 1, 1) == 1
    assert passes(0.48, 1, 10) == pytest.approx(0.48 + 5.2)
