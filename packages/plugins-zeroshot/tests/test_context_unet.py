"""The context U-Net: its formula, its units, its two halves, its training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.config import plain
from cdm_core.data import DataInfo
from cdm_core.denoising import DenoisingObjective
from cdm_core.denoising_configs import DenoisingConfig
from cdm_core.errors import UserError
from cdm_core.formats import filled
from cdm_core.random import Draws
from cdm_core.testing.conformance import close, normal, randomise
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig

SMALL = ContextUnetConfig.small()
GREY = DataInfo("grey", (1, 8, 8), 10)
CASES = {
    "grey": (SMALL, GREY),
    "colour, not square, few classes": (replace(SMALL, n_feat=16), DataInfo("colour", (3, 12, 8), 3)),
    "positive one-hot, other levels": (ContextUnetConfig(8, 7, 1e-3, 0.3, sign=1), GREY),
}


def build(config: ContextUnetConfig = SMALL, info: DataInfo = GREY, **to: Any) -> ContextUnet:
    """A net with every weight and running statistic moved, in evaluation mode."""
    torch.manual_seed(0)
    model = ContextUnet(config, info)
    randomise(model)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(buffer + 0.3 * normal(*buffer.shape, seed=len(name)).abs())
    return model.to(**to).eval()


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> ContextUnet:
    return build(*CASES[request.param], dtype=torch.float64)


def batch(model: ContextUnet, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C, H, W) and sigma (rows,) over all levels, in the model's precision; classes, one dropped."""
    dtype = next(model.parameters()).dtype
    sigma = model.sigmas[torch.linspace(0, len(model.path) - 1, rows).long()].to(dtype)
    x = torch.tanh(normal(rows, *model.shape, dtype=dtype)) + sigma.view(-1, 1, 1, 1) * normal(
        rows, *model.shape, seed=1, dtype=dtype
    )
    y = torch.arange(rows) % model.num_classes
    y[1] = model.null_label
    return x, sigma, y


# -- the published network as one function of its weights, with its concatenations ---------------------------


def published(model: ContextUnet, u_t: Tensor, time: Tensor, code: Tensor) -> Tensor:
    """eps from u_t in the scale of [0, 1], t / n_T in (0, 1] and the one-hot that enters; any mode."""
    w, train = (
        {**dict(model.named_parameters()), **copy.deepcopy(dict(model.named_buffers()))},
        model.training,
    )

    def block(name: str, x: Tensor, residual: bool = False) -> Tensor:
        outs = []
        for conv in (f"{name}.conv1", f"{name}.conv2"):
            x = F.conv2d(x, w[f"{conv}.0.weight"], w[f"{conv}.0.bias"], padding=1)
            mean, var = w[f"{conv}.1.running_mean"], w[f"{conv}.1.running_var"]
            x = F.batch_norm(x, mean, var, w[f"{conv}.1.weight"], w[f"{conv}.1.bias"], train)
            outs.append(x := F.gelu(x))
        return (outs[0] + outs[1]) / 1.414 if residual else x

    def embed(name: str, x: Tensor) -> Tensor:
        first = F.gelu(F.linear(x, w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"]))
        return F.linear(first, w[f"{name}.model.2.weight"], w[f"{name}.model.2.bias"])[..., None, None]

    def up(name: str, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(x, w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"], stride=2)
        return block(f"{name}.model.2", block(f"{name}.model.1", x))

    def normed(name: str, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, 8, w[f"{name}.weight"], w[f"{name}.bias"]))

    first = block("init_conv", u_t, residual=True)
    half = F.max_pool2d(block("down1.model.0", first), 2)
    quarter = F.max_pool2d(block("down2.model.0", half), 2)
    vector = F.gelu(quarter.mean((2, 3), keepdim=True))
    spread = F.conv_transpose2d(vector, w["up0.0.weight"], w["up0.0.bias"], stride=quarter.shape[2:])
    h = embed("contextembed1", code) * normed("up0.1", spread) + embed("timeembed1", time)
    h = up("up1", torch.cat([h, quarter], 1))
    h = embed("contextembed2", code) * h + embed("timeembed2", time)
    h = up("up2", torch.cat([h, half], 1))
    h = F.conv2d(torch.cat([h, first], 1), w["out.0.weight"], w["out.0.bias"], padding=1)
    return F.conv2d(normed("out.1", h), w["out.3.weight"], w["out.3.bias"], padding=1)


def expected(model: ContextUnet, config: ContextUnetConfig, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """E[x0 | x, sigma, y] by the published network, in its own units."""
    beta = torch.linspace(config.beta_start, config.beta_end, config.n_T + 1, dtype=torch.float64)
    signal = (1 - beta).cumprod(0)
    t = 1 + (2 * (1 / signal[1:] - 1).sqrt() - sigma.double()[:, None]).abs().argmin(1)
    kept = signal[t].to(x.dtype).view(-1, 1, 1, 1)
    code = config.sign * F.one_hot(y, model.num_classes + 1)[:, : model.num_classes]
    u = (x + 1) / 2  # u0 and noise of half the size
    eps = published(model, kept.sqrt() * u, (t.to(x.dtype) / config.n_T)[:, None], code.to(x.dtype))
    return 2 * (u - ((1 - kept) / kept).sqrt() * eps) - 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("train", [False, True])
@torch.no_grad()
def test_is_the_published_network(name: str, dtype: torch.dtype, tolerance: float, train: bool) -> None:
    config, info = CASES[name]
    model = build(config, info, dtype=dtype).train(train)
    for embedding in (model.timeembed1, model.timeembed2):  # t / n_T was rounded to float32
        embedding.inputs.copy_((torch.arange(config.n_T, dtype=dtype) + 1)[:, None] / config.n_T)
    x, sigma, y = batch(model)
    wanted = expected(model, config, x, sigma, y)
    assert close(model.denoise(x, sigma, y), wanted, tolerance)
    assert model.denoise(x, sigma, y).dtype == dtype


def test_levels_are_the_published_ones_for_images_of_twice_the_range() -> None:
    """n_T = 400: 401 betas, the first in every product; the signal's share as published, noise doubled."""
    model = ContextUnet(ContextUnetConfig(8), GREY)
    signal = 1 / (1 + (model.sigmas / 2).square())
    assert len(signal) == 400
    for t, abar in ((1, 0.99975), (200, 0.359), (400, 0.0173)):
        assert float(signal[t - 1]) == pytest.approx(abar, abs=5e-4)
    assert model.sigma_clean / 2 == pytest.approx((1e-4 / 0.9999) ** 0.5)
    start = model.scale(model.sigmas[-1:]).reciprocal()  # of a walk, as std: u_T is N(0, I)
    assert float(start) == pytest.approx(2 / float(signal[-1]) ** 0.5)


@torch.no_grad()
def test_no_label_is_a_one_hot_of_zeros(model: ContextUnet) -> None:
    x, sigma, y = batch(model)
    null = torch.full_like(y, model.null_label)
    assert torch.equal(model.denoise(x, sigma), model.denoise(x, sigma, null))
    assert not close(model.denoise(x, sigma), model.denoise(x, sigma, y), 1e-6)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_labels_that_it_does_not_know_are_refused(wrong: int) -> None:
    model = build()
    x, sigma, y = batch(model)
    with pytest.raises(IndexError):
        model.denoise(x, sigma, torch.full_like(y, wrong))


# -- the two halves ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_encoding_serves_every_class(model: ContextUnet) -> None:
    """(image, class) in any order and number; features of rows are those of images."""
    x, sigma, _ = batch(model, 3)
    image, y = torch.tensor([2, 0, 1, 2, 2]), torch.tensor([0, 1, model.null_label, 2, 0])
    features = model.encode(x, sigma)
    out = model.decode(features.rows(image), sigma[image], y)
    assert close(out, model.denoise(x[image], sigma[image], y), 1e-12)
    assert close(model.decode(features, sigma), model.denoise(x, sigma), 1e-12)
    for rows, wanted in zip(features.rows(image), model.encode(x[image], sigma[image]), strict=True):
        assert close(rows, wanted, 1e-12)


@torch.no_grad()
def test_every_map_stays_in_channels_last() -> None:
    """Else every layer that takes one reorders it."""
    model = build()
    features = model.factored().encode(*batch(model)[:2])
    for tensor in (*features, *features.rows(torch.tensor([3, 3, 0]))):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_classes_and_levels_leave_the_shared_half_alone() -> None:
    """Given x_t it depends on nothing else: t reaches the way down through the image alone."""
    model = build(dtype=torch.float64)
    u_t, t = normal(1, *model.shape, dtype=torch.float64), torch.tensor([[2], [17]])
    alpha = model.path.alpha
    first, second = (model._downwards(u_t - alpha[i], i) for i in t)
    assert all(close(one, other, 1e-12) for one, other in zip(first, second, strict=True))


def operations(n: int, channels: int, classes: int, side: int) -> tuple[int, int]:
    """Products of the shared half and of a class's, one image: 3x3 layers 9 i o a pixel, upsampling 4 i o."""
    full, half, quarter = side**2, side**2 // 4, side**2 // 16
    blocks = 9 * (channels * n + n * n) * full + 2 * 9 * n * n * full + 9 * (2 + 4) * n * n * half
    spread = 4 * n * n * quarter
    joints = 4 * 2 * n * n * quarter + 4 * n * n * half + 9 * n * n * full  # of up1, up2, out: each side's
    up = 4 * 9 * n * n * (half + full) + 9 * n * channels * full
    embeddings = (classes + 1) * 3 * n + 2 * (4 + 1) * n * n
    return blocks + spread + joints, joints + up + embeddings


@pytest.mark.parametrize(
    ("n", "channels", "classes", "side"), [(8, 1, 10, 8), (16, 3, 4, 16), (64, 1, 10, 28)]
)
def test_the_shared_share_is_counted(n: int, channels: int, classes: int, side: int) -> None:
    model = ContextUnet(ContextUnetConfig(n), DataInfo("any", (channels, side, side), classes))
    shared, own = operations(n, channels, classes, side)
    assert model.shared_share == pytest.approx(shared / (shared + own), rel=1e-9)
    if side == 28:
        assert model.shared_share == pytest.approx(0.480, abs=5e-4)


# -- for inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@torch.no_grad()
def test_folded_it_computes_the_same(dtype: torch.dtype, tolerance: float) -> None:
    model = build(dtype=dtype)
    x, sigma, y = batch(model)
    assert 0 < model.shared_share < 1
    net = model.factored()
    wanted = model.denoise(x, sigma, y)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
    assert close(net.denoise(x, sigma, y), wanted, tolerance)
    assert close(net.decode(net.encode(x, sigma), sigma, y), wanted, tolerance)
    assert net.shared_share > model.shared_share  # no embedding to compute any more


def test_folding_takes_a_copy() -> None:
    model = build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = model.factored()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    x, sigma, y = batch(model)
    first = net.denoise(x, sigma, y)
    randomise(model)
    assert torch.equal(net.denoise(x, sigma, y), first)
    assert not close(model.factored().denoise(x, sigma, y), first, 1e-3)


@torch.no_grad()
def test_half_precision_ends_before_the_last_layer() -> None:
    """Under autocast eps is no bfloat16, neither as published nor folded, and near the exact one."""
    model = build()
    x, sigma, y = batch(model)
    t = model.nearest(sigma)
    exact = model(model.path.to_path(x, t), t, y)
    for net in (model, model.factored()):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(model.path.to_path(x, t), t, y)
            x0 = net.decode(net.encode(x, sigma), sigma, y)
        assert out.dtype == x0.dtype == torch.float32
        assert not torch.equal(out, out.bfloat16().float())
        assert close(out, exact, 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        tabled = model.factored()
    assert torch.equal(tabled.contextembed1.answers, model.factored().contextembed1.answers)


# -- training ------------------------------------------------------------------------------------------------


def test_the_objective_is_the_published_loss() -> None:
    """Mean over pixels of (eps - eps^)^2 at u_t, the classes' one-hots negative, a tenth of them zero."""
    model = build().train()
    objective, rows = DenoisingObjective(DenoisingConfig()), 32
    x0, y = torch.tanh(normal(rows, *model.shape)), torch.arange(rows) % 10
    drawn = objective.prepare(model, x0, y, Draws(0, rows))
    _, _, t, eps, classes = drawn
    assert classes is not None
    assert 0 < int((classes == 10).sum()) < 10
    assert torch.equal(classes[classes != 10], y[classes != 10])
    beta = torch.linspace(1e-4, 0.02, 21, dtype=torch.float64)
    signal = (1 - beta).cumprod(0)[t + 1].float().view(-1, 1, 1, 1)
    u_t = signal.sqrt() * (x0 + 1) / 2 + (1 - signal).sqrt() * eps
    code = -F.one_hot(classes, 11)[:, :10].float()
    wanted = (published(model, u_t, (t[:, None] + 1) / 20, code) - eps).square().mean()
    assert objective.loss(model, *drawn)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_training_reaches_every_weight_and_the_statistics() -> None:
    """On two constant images, black and white, the loss falls to a fifth, and evaluation agrees with it."""
    torch.manual_seed(0)
    model = ContextUnet(replace(SMALL, beta_end=0.5), replace(GREY, num_classes=2))
    objective, optimiser = DenoisingObjective(DenoisingConfig()), torch.optim.Adam(model.parameters(), 1e-2)
    y, losses = torch.arange(32) % 2, []
    x0 = (2.0 * y - 1).view(-1, 1, 1, 1).expand(-1, *GREY.shape)
    for step in range(60):
        loss = objective(model, x0, y, Draws(step, len(y)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):  # of the biases the normalisation takes most out again
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 1e-7, name
    tracked = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(tracked) == 14
    assert all(int(count) == 60 for count in tracked)
    with torch.no_grad():
        held_out = objective(model.eval(), x0, y, Draws(60, len(y)))["loss"]
    assert held_out.item() < 0.2 * losses[0]


# -- what it refuses -----------------------------------------------------------------------------------------


def test_data_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="multiples of 4, not 30x28"):
        ContextUnet(SMALL, DataInfo("odd", (1, 30, 28), 10))
    with pytest.raises(UserError, match="'plain' has no labels"):
        ContextUnet(SMALL, DataInfo("plain", (1, 8, 8)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_feat": 12}, "multiple of 8, not 12"),
        ({"n_feat": 0}, "multiple of 8, not 0"),
        ({"n_T": 1}, "n_T must be at least 2"),
        ({"beta_end": 1.0}, "beta_start <= beta_end < 1"),
        ({"sign": 2}, "sign"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        filled(ContextUnetConfig, {**plain(SMALL), **change}, "model", "--set")
