"""The shared U-Net: what its head sees, what it is told, and what of it is the released network's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_joint.configs import JointConfig
from cdm_plugins_joint.model import JointModel, OfficialHead

INFO = DataInfo("test", (1, 8, 8), num_classes=10)


def small(info: DataInfo = INFO, **changes: Any) -> JointModel:
    """A net whose every weight matters."""
    config = JointConfig(**{**vars(JointConfig.small()), **changes})
    config.check()
    torch.manual_seed(0)
    model = JointModel(config, info)
    randomise(model)
    return model.eval()


def levels(model: JointModel, *places: int) -> Tensor:
    return model.sigmas[list(places)].float()


# -- the published networks ----------------------------------------------------------------------------------

# Side, channels, classes, settings; parameters of the released networks in all and of the head, in millions.
PUBLISHED = [
    (28, 1, 10, {"model_channels": 64, "channel_mult": (1, 2, 2), "attention_resolutions": (1,)}, 9.71, 0.92),
    (32, 3, 10, {}, 59.47, 6.92),
    (
        64,
        3,
        40,
        {"model_channels": 64, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (4, 8)},
        33.8,
        3.5,
    ),
    (64, 3, 40, {"channel_mult": (1, 2, 3, 4), "attention_resolutions": (4, 8)}, 135.0, 13.9),
]


@pytest.mark.parametrize(("side", "channels", "classes", "changes", "total", "head"), PUBLISHED)
def test_published_networks_have_their_size(
    side: int, channels: int, classes: int, changes: Any, total: float, head: float
) -> None:
    config = JointConfig(head="official", **changes)
    config.check()
    with torch.device("meta"):
        model = JointModel(config, DataInfo("published", (channels, side, side), classes))
    digits = 2 if total < 60 and side < 64 else 1
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == total
    assert sum(p.numel() for p in model.clasifier.parameters()) / 1e6 == pytest.approx(head, abs=0.05)


@pytest.mark.parametrize("head", ["embedded", "blind", "official"])
@pytest.mark.parametrize(
    ("side", "changes"),
    [
        (8, {}),
        (8, {"num_res_blocks": 2}),  # the released default, which its head cannot be built for
        (16, {"channel_mult": (1, 1, 2), "num_res_blocks": 1, "attention_resolutions": ()}),
        (4, {"channel_mult": (2,)}),
    ],
)
def test_any_size_and_depth_has_a_head(side: int, changes: Any, head: str) -> None:
    """The width of what the head sees is counted, not looked up."""
    model = small(DataInfo("any", (2, side, side), 3), head=head, **changes)
    x, sigma = normal(2, 2, side, side), torch.zeros(2)
    assert model.class_logits(x, sigma).shape == (2, 3)
    z = model.representations(x, sigma)
    assert len(model.level_names) == len(z.skips) + 1
    assert model.features(x).shape[1] == sum(h.shape[1] for h in (*z.skips, z.middle))


# -- the head ------------------------------------------------------------------------------------------------


def test_features_are_means_of_maps_the_middles_first() -> None:
    model = small()
    x = normal(3, 1, 8, 8)
    z = model.representations(x, torch.zeros(3))
    expected = torch.cat([h.double().mean((2, 3)) for h in (z.middle, *z.skips)], dim=1)
    torch.testing.assert_close(model.features(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_head_may_see_some_maps_only() -> None:
    model = small(taps=("middle", "input_blocks.1"))
    x = normal(2, 1, 8, 8)
    z = model.representations(x, torch.zeros(2))
    assert model.features(x).shape[1] == z.middle.shape[1] + z.skips[1].shape[1]
    other = z._replace(skips=tuple(h if i == 1 else h + 1 for i, h in enumerate(z.skips)))
    assert torch.equal(model.head(z, torch.zeros(2)), model.head(other, torch.zeros(2)))
    with pytest.raises(UserError, match="the U-Net has no map"):
        small(taps=("input_blocks.9",))


def trained_on_clean(head: Any, width: int, told: Any) -> None:
    """A hundred passes over features of clean images, as clean training makes them."""
    head.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        head(torch.randn(16, width, generator=generator), told)
    head.eval()


def test_the_level_does_not_drown_the_features() -> None:
    """Released bug: t is a BatchNorm's column of no variance, and 316 t at any level but the clean one."""
    width, model = 24, small(head_dropout=0.3)
    official = OfficialHead(width, 10, dropout=0.0)
    trained_on_clean(official, width, torch.zeros(16))
    h, early, late = normal(4, width), torch.zeros(4), torch.full((4,), 40)
    assert (official(h, late) - official(h, early)).abs().amax() > 100 * official(h, early).std()
    pooled = model.pooled(model.representations(normal(4, 1, 8, 8), torch.zeros(4)))
    apart = model.logits(pooled, late) - model.logits(pooled, early.long())
    assert 0 < apart.abs().amax() < 10 * model.logits(pooled, early.long()).abs().amax()


def test_a_blind_head_is_not_told_the_level() -> None:
    model = small(head="blind")
    z = model.representations(normal(2, 1, 8, 8), levels(model, 5, 5))
    assert torch.equal(model.head(z, levels(model, 5, 5)), model.head(z, levels(model, 40, 40)))


def test_an_embedded_head_is_told_the_level() -> None:
    model = small()
    z = model.representations(normal(2, 1, 8, 8), levels(model, 5, 5))
    assert not torch.equal(model.head(z, levels(model, 5, 5)), model.head(z, levels(model, 40, 40)))


@pytest.mark.parametrize("head", ["embedded", "official"])
def test_half_precision_leaves_logits_in_float32(head: str) -> None:
    """Released bug: in half precision the head's and the decoder's types do not meet."""
    model, x = small(head=head), normal(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits, x0 = model.class_logits(x, torch.zeros(2)), model.denoise(x, levels(model, 9, 9))
    assert logits.dtype == x0.dtype == torch.float32
    torch.testing.assert_close(logits, model.class_logits(x, torch.zeros(2)), rtol=0.1, atol=0.1)


def test_training_passes_are_counted_and_kept() -> None:
    for head in ("embedded", "official"):
        model = small(head=head).train()
        for _ in range(3):
            model.class_logits(normal(4, 1, 8, 8), torch.zeros(4))
        model.eval().class_logits(normal(4, 1, 8, 8), torch.zeros(4))
        other = small(head=head)
        other.load_state_dict(model.state_dict())
        assert int(other.passes) == 3


# -- representations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"predicts": "x0"}, {"predicts": "v", "learn_sigma": True}])
def test_decoding_its_own_representations_is_denoising(changes: Any) -> None:
    model = small(**changes)
    x, sigma = 3 * normal(3, 1, 8, 8), levels(model, 0, 20, 49)
    x0, variance = model.decode_representations(model.representations(x, sigma), x, sigma)
    expected = model.predict(x, sigma)
    torch.testing.assert_close(x0, expected.x0)
    assert (variance is None) == (expected.variance is None)
    if variance is not None:
        torch.testing.assert_close(variance, expected.variance)


def test_clean_images_are_seen_as_they_are() -> None:
    """At t = 0 the path has shrunk its signal already; the released classifier is shown x0 itself."""
    model, x = small(), normal(2, 1, 8, 8)
    x_t, t = model.seen(x, torch.tensor([0.0, float(model.sigmas[30])]))
    assert t.tolist() == [0, 30]
    assert torch.equal(x_t[0], x[0])
    torch.testing.assert_close(x_t[1], x[1] * model.path.alpha[30].float())


def test_logits_are_differentiable_in_the_image() -> None:
    model = small().double()
    x, sigma = normal(2, 1, 8, 8, dtype=torch.float64).requires_grad_(), levels(model, 3, 30).double()
    direction = normal(2, 1, 8, 8, seed=1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(model.class_logits(x, sigma)[:, 1].sum(), x)
    with torch.no_grad():
        up, down = (model.class_logits(x + s * 1e-5 * direction, sigma)[:, 1] for s in (1, -1))
    torch.testing.assert_close(
        (gradient * direction).flatten(1).sum(1), (up - down) / 2e-5, rtol=1e-5, atol=1e-7
    )


def test_a_denoiser_may_be_told_the_class_and_the_head_never_is() -> None:
    model = small(class_cond=True)
    assert (model.num_classes, model.null_label, model.classes) == (10, 10, 10)
    x, sigma, y = normal(2, 1, 8, 8), levels(model, 9, 9), torch.tensor([3, 4])
    before = model.class_logits(x, sigma)
    told = model.denoise(x, sigma, y)
    assert not torch.equal(told, model.denoise(x, sigma))
    with torch.no_grad():
        model.label_emb.weight[:10] += 1
    assert torch.equal(model.class_logits(x, sigma), before)
    assert not torch.equal(model.denoise(x, sigma, y), told)


# -- the path ------------------------------------------------------------------------------------------------


def test_the_released_schedule_starts_ten_times_higher() -> None:
    """And is neither ours by default nor lost: beta_start says which."""
    for start, signal in ((1e-3, 2.57e-5), (1e-4, 4.04e-5)):
        with torch.device("meta"):
            model = JointModel(JointConfig(beta_start=start), DataInfo("path", (3, 32, 32), 10))
        assert float(model.path.alpha[-1] ** 2) == pytest.approx(signal, rel=3e-3)
    assert JointConfig(diffusion_steps=8).betas == pytest.approx((100 / 8 * 0.01, 100 / 8 * 0.02))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion_steps": 15}, "diffusion_steps 15 make betas"),
        ({"head": "official", "taps": ("middle",)}, "head 'official' sees every map"),
        ({"multi_label": True, "class_cond": True}, "exclude one another"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointConfig(**changes).check()


def test_data_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="a joint model needs labels, and the data set 'bare' has none"):
        JointModel(JointConfig.small(), DataInfo("bare", (1, 8, 8)))
