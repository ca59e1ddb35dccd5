"""ADM's networks against the formulas, one layer at a time, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.backbones.adm import (
    Attention,
    AttentionPool,
    EncoderUNet,
    Features,
    ResBlock,
    UNet,
    check_image_size,
)
from cdm_core.backbones.adm_configs import ADMConfig
from cdm_core.data import DataInfo
from cdm_core.errors import UserError

SMALL = ADMConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=4,
    num_head_channels=-1,
    dropout=0.0,
)


def filled(module: nn.Module) -> nn.Module:
    """In float64, every weight at random."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double().eval()


def norm(x: Tensor, layer: nn.Module, activation: bool = True) -> Tensor:
    h = F.group_norm(x, 32, layer.weight, layer.bias, 1e-5)
    return F.silu(h) if activation else h


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_residual_block_is_its_formula(resample: str | None, scale_shift: bool) -> None:
    config = dataclasses.replace(SMALL, use_scale_shift_norm=scale_shift)
    block = filled(ResBlock(32, 64 if resample is None else 32, config, resample))
    x, emb = torch.randn(2, 32, 8, 8).double(), torch.randn(2, 128).double()
    before, after = block.in_layers, block.out_layers
    move = {
        None: lambda h: h,
        "up": lambda h: F.interpolate(h, scale_factor=2.0, mode="nearest"),
        "down": lambda h: F.avg_pool2d(h, 2),
    }[resample]
    h = F.conv2d(move(norm(x, before["0"])), before["2"].weight, before["2"].bias, padding=1)
    condition = block.emb_layers["1"](emb)[:, :, None, None]
    if scale_shift:
        scale, shift = condition.chunk(2, dim=1)
        h = F.silu(norm(h, after["0"], activation=False) * (1 + scale) + shift)
    else:
        h = norm(h + condition, after["0"])
    h = F.conv2d(h, after["3"].weight, after["3"].bias, padding=1)
    torch.testing.assert_close(block(x, emb), block.skip_connection(move(x)) + h)


@pytest.mark.parametrize("new_order", [True, False])
def test_attention_takes_its_heads_in_either_order(new_order: bool) -> None:
    """(3, heads, d) or (heads, 3, d), written out head by head."""
    config = dataclasses.replace(SMALL, use_new_attention_order=new_order)
    layer = filled(Attention(64, config, 4))
    x = torch.randn(2, 64, 3, 5).double()
    qkv = F.conv1d(norm(x, layer.norm, activation=False).flatten(2), layer.qkv.weight, layer.qkv.bias)
    heads = []
    for i in range(4):
        starts = (
            (64 * part + 16 * i for part in range(3)) if new_order else (48 * i + 16 * p for p in range(3))
        )
        q, k, v = (qkv[:, start : start + 16] for start in starts)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(16), -1)
        heads.append(torch.einsum("bts,bcs->bct", weights, v))
    out = F.conv1d(torch.cat(heads, 1), layer.proj_out.weight, layer.proj_out.bias)
    torch.testing.assert_close(layer(x), x + out.view_as(x))


def test_the_attention_pool_is_its_formula() -> None:
    pool = filled(AttentionPool(4, 64, dataclasses.replace(SMALL, num_head_channels=16), 7))
    x = torch.randn(2, 64, 4, 4).double()
    tokens = torch.cat([x.mean((2, 3))[:, :, None], x.flatten(2)], 2) + pool.positional_embedding
    q, k, v = F.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias).view(2, 3, 4, 16, 17).unbind(1)
    weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / 4, -1)
    every = torch.einsum("bhts,bhcs->bhct", weights, v).flatten(1, 2)
    expected = F.conv1d(every, pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
    torch.testing.assert_close(pool(x), expected)
    with pytest.raises(UserError, match="16 places at its lowest resolution, and these images have 64"):
        pool(torch.randn(2, 64, 8, 8).double())


def test_the_embedding_adds_time_and_class() -> None:
    net = filled(UNet(SMALL, 1, 1, num_classes=3))
    t, y = torch.tensor([0, 7]), torch.tensor([2, 0])
    frequencies = 10000.0 ** (-torch.arange(16).double() / 16)
    phase = t.double()[:, None] * frequencies
    waves = torch.cat([phase.cos(), phase.sin()], 1)
    emb = net.time_embed["2"](F.silu(net.time_embed["0"](waves))) + net.label_emb.weight[y]
    torch.testing.assert_close(net.embed(t.double(), y), F.silu(emb))
    torch.testing.assert_close(net.embed(t, y), F.silu(emb), rtol=1e-5, atol=1e-5)  # float32 sines


CONFIGS = {
    "resblocks": {},
    "convolutions": {"resblock_updown": False},
    "averages": {"resblock_updown": False, "conv_resample": False, "use_scale_shift_norm": False},
    "half width": {"model_channels": 64, "channel_mult": (0.5, 1, 1), "num_res_blocks": 2},
    "heads": {"num_heads_upsample": 2, "attention_resolutions": (1, 2)},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_gradient_in_x_is_that_of_the_output(changes: dict[str, object]) -> None:
    net = filled(UNet(dataclasses.replace(SMALL, **changes), 2, 4))
    x, t = torch.randn(2, 2, 8, 8).double(), torch.tensor([3, 11])
    direction, cotangent = torch.randn_like(x), torch.randn(2, 4, 8, 8).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, t), x, cotangent)
    with torch.no_grad():
        ahead, behind = (net(x + h * direction, t) for h in (1e-6, -1e-6))
    slope = ((ahead - behind) / 2e-6 * cotangent).sum()
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_decoding_the_features_is_the_network(changes: dict[str, object]) -> None:
    """A head on the features sees what the second half sees; moved features move the output."""
    net = filled(UNet(dataclasses.replace(SMALL, **changes), 2, 4))
    x, t = torch.randn(2, 2, 8, 8).double(), torch.tensor([3, 11])
    emb = net.embed(t)
    features = net.encode(x, emb)
    assert [h.shape[1] for h in features.skips] == net.widths
    assert torch.equal(net.decode(features, emb), net(x, t))
    for i in range(len(features.skips)):
        moved = [h + 0.1 * (i == j) for j, h in enumerate(features.skips)]
        assert not torch.equal(net.decode(Features(tuple(moved), features.middle), emb), net(x, t))


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_every_pool_differentiates_and_reads_what_it_says(pool: str) -> None:
    config = dataclasses.replace(SMALL, num_head_channels=16)
    net = filled(EncoderUNet(config, 2, 5, 8, pool))
    x, t = torch.randn(3, 2, 8, 8).double().requires_grad_(), torch.tensor([0, 5, 9])
    logits = net(x, t)
    features = net.encode(x, F.silu(net.time_embedding(t)))
    if pool.startswith("spatial"):
        means = torch.cat([h.mean((2, 3)) for h in (*features.skips, features.middle)], 1)
        hidden = net.out["0"](means)
        if pool == "spatial_v2":
            hidden = norm(hidden[:, :, None], net.out["1"])[:, :, 0]
        expected = net.out["3" if pool == "spatial_v2" else "2"](
            F.relu(hidden) if pool == "spatial" else hidden
        )
    else:
        h = norm(features.middle, net.out["0"])
        expected = net.out["2"](h) if pool == "attention" else net.out["3"](h.mean((2, 3), True))[:, :, 0, 0]
    torch.testing.assert_close(logits, expected)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    assert bool(gradient.flatten(1).any(1).all())


def test_in_training_dropout_acts() -> None:
    net = filled(UNet(dataclasses.replace(SMALL, dropout=0.5), 1, 1))
    x, t = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 11])
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_a_new_network_predicts_zero() -> None:
    """Its last layer, and the last one of every residual branch, starts at zero."""
    net = UNet(SMALL, 1, 2)
    assert not net(torch.randn(2, 1, 8, 8), torch.tensor([3, 11])).any()
    block = net.middle_block[0]
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 128)), x)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_mult": (1, 1.5)}, "multiple of 32"),
        ({"channel_mult": ()}, "multiple of 32"),
        ({"num_heads": 3}, "whole heads"),
        ({"num_head_channels": 48}, "whole heads"),
        ({"num_heads_upsample": 0}, "num_heads_upsample must be at least 1, or -1"),
        ({"attention_resolutions": (0,)}, "downsampling factors"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], words: str) -> None:
    SMALL.check()
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes).check()


def test_images_that_cannot_be_halved_are_refused() -> None:
    config = dataclasses.replace(SMALL, channel_mult=(1, 1, 1))
    check_image_size(config, DataInfo("images", (1, 28, 12)))
    with pytest.raises(UserError, match=r"halves the images 2 times, but 4 does not divide the 28x10"):
        check_image_size(config, DataInfo("images", (1, 28, 10)))
