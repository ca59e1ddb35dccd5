"""The diffusion transformer against its formulas, written out without a layer of the implementation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.capabilities import offered
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_guidance.dit import DiT, position_table
from cdm_plugins_guidance.dit_configs import SIZES, DiTConfig

LATENTS = DataInfo("latents", (4, 8, 12), num_classes=5, levels=None)
TINY = replace(DiTConfig.small(), mlp_ratio=3.0)


def build(config: DiTConfig = TINY, info: DataInfo = LATENTS) -> DiT:
    torch.manual_seed(0)
    model = DiT(config, info)
    randomise(model, 0.2)
    return model.double().eval()


def inputs(info: DataInfo = LATENTS) -> tuple[Tensor, Tensor, Tensor]:
    return normal(3, *info.shape, dtype=torch.float64), torch.tensor([0, 7, 19]), torch.tensor([0, 4, 2])


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def plainly(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network as Peebles & Xie 2023 describe it (figure 3), one image and one head at a time."""
    state, images = model.state_dict(), []
    linear = lambda name, h: h @ state[f"{name}.weight"].mT + state[f"{name}.bias"]  # noqa: E731
    p = model.patch
    for i in range(len(x)):
        rate = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        features = torch.cat([torch.cos(t[i] * rate), torch.sin(t[i] * rate)])
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
        c = F.silu(c + state["y_embedder.embedding_table.weight"][y[i]])
        patches = [
            x[i, :, a : a + p, b : b + p].flatten()
            for a in range(0, x.shape[2], p)
            for b in range(0, x.shape[3], p)
        ]
        kernel = state["x_embedder.proj.weight"].flatten(1)
        h = torch.stack(patches) @ kernel.mT + state["x_embedder.proj.bias"] + state["pos_embed"][0]
        for k in range(len(model.blocks)):
            block = f"blocks.{k}"
            parts = linear(f"{block}.adaLN_modulation.1", c).chunk(6)
            q, key, v = linear(f"{block}.attn.qkv", layer_norm(h) * (1 + parts[1]) + parts[0]).chunk(3, -1)
            heads = []
            for part in range(2):
                one = slice(part * 8, part * 8 + 8)
                weights = torch.softmax(q[:, one] @ key[:, one].mT / math.sqrt(8), -1)
                heads.append(weights @ v[:, one])
            h = h + parts[2] * linear(f"{block}.attn.proj", torch.cat(heads, -1))
            z = linear(f"{block}.mlp.fc1", layer_norm(h) * (1 + parts[4]) + parts[3])
            z = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            h = h + parts[5] * linear(f"{block}.mlp.fc2", z)
        shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2)
        h = linear("final_layer.linear", layer_norm(h) * (1 + scale) + shift)
        image = torch.empty(model.out_channels, *x.shape[2:], dtype=x.dtype)
        for token, values in enumerate(h):
            a, b = divmod(token, x.shape[3] // p)
            image[:, a * p : a * p + p, b * p : b * p + p] = values.view(p, p, -1).permute(2, 0, 1)
        images.append(image)
    return torch.stack(images)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_is_the_network_of_the_paper(patch: int, learn_sigma: bool) -> None:
    model = build(replace(TINY, patch_size=patch, learn_sigma=learn_sigma))
    x, t, y = inputs()
    with torch.no_grad():
        # the time's features are float32
        torch.testing.assert_close(model(x, t, y), plainly(model, x, t, y), rtol=0, atol=1e-5)


def test_its_gradient_is_that_of_the_formulas() -> None:
    model = build(replace(TINY, patch_size=4))
    x, t, y = inputs()
    cotangent = normal(3, 8, 8, 12, seed=5, dtype=torch.float64)
    x.requires_grad_()
    (own,) = torch.autograd.grad((model(x, t, y) * cotangent).sum(), x)
    (plain,) = torch.autograd.grad((plainly(model, x, t, y) * cotangent).sum(), x)
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_positions_are_sines_of_column_then_row() -> None:
    table = position_table(2, 3, 8).double()
    for row in range(2):
        for column in range(3):
            angles = [[place / 10000 ** (i / 2) for i in range(2)] for place in (column, row)]
            wanted = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            torch.testing.assert_close(
                table[row * 3 + column], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7
            )


# Parameters in millions: Peebles & Xie 2023, table 1 (S/2 to XL/2), without the fixed positions.
@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes(size: Any, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(size), DataInfo("latents", (4, 32, 32), 1000, levels=None))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == millions
    assert SIZES[size].depth == len(model.blocks)


def test_starts_as_predicting_no_noise() -> None:
    """adaLN-Zero: every block is the identity and the last layer zero, whatever the input."""
    torch.manual_seed(0)
    model = DiT(TINY, LATENTS)
    x, sigma = normal(3, *LATENTS.shape), model.sigmas[[0, 9, 19]].float()
    x0, variance = model.predict(x, sigma, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(x0, x)
    assert variance is not None
    assert bool((variance == 0.5).all())
    h = torch.randn(3, 24, 16)
    assert torch.equal(model.blocks[0](h, torch.randn(3, 16)), h)


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    model = build()
    x, t, y = inputs()
    x_ve, sigma = model.path.to_ve(x, t)
    with torch.no_grad():
        x0, variance = model.predict(x_ve, sigma, y)
        eps, share = model(x, t, y).chunk(2, 1)
    torch.testing.assert_close(model.path.x0_to_eps(x, x0, t), eps)
    torch.testing.assert_close(variance, (share + 1) / 2)
    assert build(replace(TINY, learn_sigma=False)).predict(x_ve, sigma, y).variance is None


def test_no_class_is_the_last_one() -> None:
    model = build()
    x, t, _ = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t, torch.full((3,), 5)))
    assert model.null_label == model.num_classes == 5


def test_labels_it_cannot_take_or_lacks_are_refused() -> None:
    x, t, y = inputs()
    with pytest.raises(UserError, match="give it labels"):
        build(replace(TINY, null_class=False))(x, t)
    with pytest.raises(UserError, match="takes no labels"):
        build(info=replace(LATENTS, num_classes=None))(x, t, y)


def test_patches_must_tile_the_image() -> None:
    with pytest.raises(UserError, match=r"patch_size 8 does not divide the 8x12 of 'latents'"):
        DiT(replace(TINY, patch_size=8), LATENTS)


def test_autocast_changes_rounding_alone() -> None:
    model = build().float()
    x, t, y = (v.float() if v.is_floating_point() else v for v in inputs())
    x_ve, sigma = model.path.to_ve(x, t)
    with torch.no_grad():
        exact = model.predict(x_ve, sigma, y)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.predict(x_ve, sigma, y)
    assert rounded.x0.dtype == torch.float32
    noise = lambda x0: model.path.x0_to_eps(x, x0, t)  # noqa: E731
    wanted = noise(exact.x0)
    assert (noise(rounded.x0) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_without_an_autoencoder_it_denoises_and_decodes_nothing() -> None:
    model = build()
    assert offered(model) == {"denoise"}
    assert not hasattr(model, "to_images")
    assert not hasattr(model, "to_latents")


def test_an_autoencoder_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.autoencoder: there is no folder"):
        DiT(replace(TINY, autoencoder=str(tmp_path / "vae")), LATENTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"hidden_size": 18}, "hidden_size 18 must be a multiple of 4"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"noise_steps": 1}, "noise_steps"),
        ({"beta_start": 0.5}, "beta_start"),
        ({"cfg_channels": 0}, "cfg_channels"),
        ({"latent_scale": -1.0}, "latent_scale"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong).check()
