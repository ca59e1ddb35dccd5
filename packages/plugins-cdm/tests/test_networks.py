"""The networks: sizes, official parameter counts, the fold of the last convolution, classes, precision."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_kernels import cumulative_logits
from cdm_plugins_cdm.configs import MLPConfig, UNetConfig
from cdm_plugins_cdm.model import MLP
from cdm_plugins_cdm.unet import UNet

IMAGES = DataInfo("images", (3, 8, 12), 4)
POINTS = DataInfo("points", (2, 1, 1), 4, levels=None)


def unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    model = UNet(dataclasses.replace(UNetConfig.small(), **changes), IMAGES)
    return with_a_trained_head(model)


def with_a_trained_head(model: Any) -> Any:
    torch.nn.init.normal_(model.linear_layer.weight, std=0.1)
    torch.nn.init.normal_(model.linear_layer.bias, std=0.1)
    return model.eval()


def images(rows: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, *IMAGES.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "size", "classes", "count"),
    [
        ({}, 32, None, 33_405_930),
        ({"conditional": True}, 32, 10, 36_296_938),
        ({"path": "ot_official"}, 32, None, 33_405_416),
        ({"ch_mult": (1, 2, 2, 2, 4)}, 64, None, 74_784_490),
        ({"ch_mult": (2, 1, 2)}, 32, None, 23_293_930),
    ],
)
def test_official_parameter_counts(changes: Any, size: int, classes: int | None, count: int) -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig(**changes), DataInfo("official", (3, size, size), classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_fixed_table_follows_the_weights() -> None:
    """After an optimiser step, new weights, another dtype, a copy: never a table of weights that were."""
    model = unet()
    model.denoise(images(), torch.full((2,), 0.5))
    before = model.fixed_table()[0]
    assert model.fixed_table()[0] is before
    optimizer = torch.optim.SGD([model.linear_layer.weight], lr=1.0)
    model.linear_layer.weight.grad = torch.ones_like(model.linear_layer.weight)
    optimizer.step()
    assert not torch.equal(model.fixed_table()[0], before)
    torch.testing.assert_close(model.fixed_table(), model.table())
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    torch.testing.assert_close(model.fixed_table(), model.table())
    other = copy.deepcopy(model)
    torch.nn.init.ones_(other.linear_layer.weight)
    for changed in (other, model.double()):
        torch.testing.assert_close(changed.fixed_table(), changed.table())


def test_features_are_the_pooled_last_convolution() -> None:
    model = unet().double()
    x = images(dtype=torch.float64)
    h = model.norm_out(model._trunk(model.conv_in(x), None))
    torch.testing.assert_close(model.features(x), model.conv_out(h).mean((2, 3)))


@pytest.mark.parametrize(
    "changes", [{}, {"resamp_with_conv": False}, {"decoder": False}, {"conditional": True}, {"channels": 24}]
)
def test_denoiser_is_the_gradient_of_the_log_density(changes: Any) -> None:
    """Tweedie: E[x0 | x] = x + sigma^2 grad log p(x; sigma), here by two independent roads, in float64."""
    model = unet(**changes).double()
    x = images(dtype=torch.float64).requires_grad_()
    sigma = model.sigmas[[3, 12]]
    y = torch.tensor([1, 3]) if changes.get("conditional") else None
    (score,) = torch.autograd.grad(model.log_density(x, y, sigma).sum(), x)
    expected = x + sigma.view(-1, 1, 1, 1) ** 2 * score
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(x, sigma, y), expected)


def test_mlp_denoiser_is_the_gradient_of_its_log_density() -> None:
    model = with_a_trained_head(MLP(MLPConfig.small(), POINTS)).double()
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    sigma = model.sigmas[:5]
    (score,) = torch.autograd.grad(model.log_density(x, None, sigma).sum(), x)
    torch.testing.assert_close(model.denoise(x, sigma), x + sigma.view(-1, 1, 1, 1) ** 2 * score)


def test_log_density_is_that_of_the_logits() -> None:
    model = unet()
    x = images()
    logits = model.noise_level_logits(x)
    normal = torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1)
    expected = normal + logits[:, model.path.clean] - logits[:, model.reference]
    torch.testing.assert_close(model.log_density(x), expected)


def test_a_new_model_knows_nothing() -> None:
    """All levels alike likely: the density is N(0, I), and the denoiser that of unit Gaussians."""
    model = UNet(UNetConfig.small(), IMAGES)
    x = images()
    assert torch.equal(model.noise_level_logits(x), torch.zeros(2, 22))
    torch.testing.assert_close(
        model.log_density(x), torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1)
    )
    sigma = model.sigmas[[0, -1]].float()
    torch.testing.assert_close(model.denoise(x, sigma), x / (1 + sigma.view(-1, 1, 1, 1) ** 2))


def test_no_class_is_the_null_class() -> None:
    model = unet(conditional=True)
    x, sigma = images(), model.sigmas[[5, 5]].float()
    assert model.null_label == 4
    null = torch.full((2,), 4)
    assert torch.equal(model.log_density(x), model.log_density(x, null))
    assert torch.equal(model.denoise(x, sigma), model.denoise(x, sigma, null))
    assert (model.log_density(x) - model.log_density(x, torch.zeros(2, dtype=torch.long))).abs().min() > 1e-6


def test_labels_are_refused_by_a_model_without_classes() -> None:
    with pytest.raises(UserError, match="takes no labels"):
        unet().log_density(images(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(UNetConfig(conditional=True), DataInfo("bare", (3, 32, 32))), "'bare' has none"),
        (lambda: UNet(UNetConfig(), DataInfo("odd", (3, 28, 28))), "8 does not divide the 28x28 of 'odd'"),
        (lambda: MLP(MLPConfig(), DataInfo("image", (3, 8, 8))), r"points of shape \(d, 1, 1\)"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_words(build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (UNetConfig(noise_steps=0), "noise_steps"),
        (UNetConfig(beta_start=0.5, beta_end=0.1), "beta_start"),
        (UNetConfig(ch_mult=()), "ch_mult"),
        (UNetConfig(dropout=1.0), "dropout"),
        (UNetConfig(channels=0), "channels"),
        (MLPConfig(width=0), "width"),
    ],
)
def test_ranges(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check()


def test_the_head_is_float32_under_autocast() -> None:
    model = unet()
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        h, o = model.features(x), model(x)
        assert model.log_density(x).dtype == torch.float32
    assert h.dtype == o.dtype == torch.float32
    torch.testing.assert_close(o, model.head(h), rtol=0, atol=0)
    torch.testing.assert_close(o, model(x), rtol=0.1, atol=0.05)


def test_conformance_of_shapes_and_names() -> None:
    """Names that checkpoints in the wild have."""
    names = set(unet(conditional=True).state_dict())
    expected = {
        "label_emb.weight",
        "temb.dense.1.bias",
        "conv_in.weight",
        "down.0.downsample.conv.weight",
        "down.1.attn.0.proj_out.weight",
        "mid.attn_1.q.weight",
        "up.1.block.1.nin_shortcut.weight",
        "up.1.upsample.conv.bias",
        "norm_out.weight",
        "linear_layer.weight",
    }
    assert expected <= names
    assert cumulative_logits(unet()(images())).shape == (2, 22)


def test_a_row_of_a_batch_does_not_depend_on_the_others() -> None:
    model, x = unet(), images(3)
    sigma = model.sigmas[[2, 9, 17]].float()
    whole = model.denoise(x, sigma)
    torch.testing.assert_close(whole[1:2], model.denoise(x[1:2], sigma[1:2]), rtol=1e-5, atol=1e-5)
