"""EDM: preconditionings by an exact denoiser, layers by their definitions, classes, levels, grids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.records import Model
from cdm_core.testing import ModelConformance
from cdm_plugins_guidance.edm import EDM, edm_grid
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_guidance.edm_schedules import iddpm_levels, solve_in_time, vp_betas, vp_sigma, vp_time
from cdm_plugins_guidance.edm_unet import Block, Filter, ResamplingConv

IMAGES = DataInfo("images", (3, 8, 12), 4)
SONG = {"model_type": "SongUNet", "precond": "ve"}
NCSNPP = {
    **SONG,
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adm": {},
    "ddpm++ vp": {**SONG, "precond": "vp", "augment_dim": 3},
    "ncsn++ ve": NCSNPP,
    "skip": {**SONG, "precond": "edm", "encoder_type": "skip", "decoder_type": "skip"},
    "iddpm": {"precond": "iddpm", "M": 100},
}


def config(**changes: Any) -> EDMConfig:
    return dataclasses.replace(EDMConfig.small(), **changes)


def edm(**changes: Any) -> EDM:
    torch.manual_seed(0)
    model = EDM(config(**changes), IMAGES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images(rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, *IMAGES.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class TestConformance(ModelConformance):
    """What every model keeps to, by each network and each preconditioning."""

    @pytest.fixture
    def component_name(self) -> str:
        return "guidance/edm"

    @pytest.fixture
    def record(self) -> Model:
        return Model("edm", "Under test", "cdm_plugins_guidance.edm:EDM", EDMConfig, ("denoise",))

    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def options(self, request: pytest.FixtureRequest) -> EDMConfig:
        made = config(**request.param)
        made.check()
        return made


@pytest.mark.parametrize(
    ("changes", "shape", "classes", "count"),
    [
        ({"conditional": True}, (3, 64, 64), 1000, 295_899_267),
        ({**SONG, "augment_dim": 9}, (3, 32, 32), None, 55_733_891),
        ({**NCSNPP, "augment_dim": 9}, (3, 32, 32), None, 56_397_827),
    ],
    ids=["ImageNet 64", "DDPM++", "NCSN++"],
)
def test_official_parameter_counts(changes: Any, shape: Any, classes: int | None, count: int) -> None:
    song = {"model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
    settings = EDMConfig(**(changes | song if "model_type" in changes else changes))
    with torch.device("meta"):
        model = EDM(settings, DataInfo("official", shape, classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# -- preconditioning -----------------------------------------------------------------------------------------


class Exact(nn.Module):
    """What a perfect network of each kind says, told only what the preconditioning tells it.

    vp and iddpm predict the noise n of x_t = (x0 + sigma n) / sqrt(1 + sigma^2); ve its negative from
    x0 + sigma n; edm the velocity sin(a) x0 / s - cos(a) n with tan(a) = sigma / s, s the data's deviation.
    """

    def __init__(self, model: EDM, mixture: GaussianMixture) -> None:
        super().__init__()
        self.settings, self.mixture = model.config, mixture
        self.levels = getattr(model, "u", None)

    def forward(self, x: Tensor, noise: Tensor, labels: Any, augment: Any) -> Tensor:
        kind, data = self.settings.precond, self.settings.sigma_data
        if kind in ("edm", "ve"):
            sigma = (4 * noise).exp() if kind == "edm" else 2 * noise.exp()
            scale = (sigma**2 + data**2).sqrt() if kind == "edm" else torch.ones_like(sigma)
        else:
            time = noise / (self.settings.M - 1)
            sigma = vp_sigma(time, self.settings.beta_d, self.settings.beta_min)
            if kind == "iddpm":
                sigma = self.levels.to(noise)[(self.settings.M - 1 - noise).long()]
            scale = (1 + sigma**2).sqrt()
        rows = (-1, 1, 1, 1)
        x0 = self.mixture.denoise(x * scale.view(rows), sigma)
        n = (x * scale.view(rows) - x0) / sigma.view(rows)
        angle = torch.atan2(sigma, torch.full_like(sigma, data)).view(rows)
        if kind == "edm":
            return angle.sin() * x0 / data - angle.cos() * n
        return -n if kind == "ve" else torch.cat([n, 7 * x], 1) if kind == "iddpm" else n


@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm"])
def test_an_exact_network_makes_an_exact_denoiser(precond: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 192, generator=generator)
    mixture = GaussianMixture(torch.ones(3), means, torch.eye(192).expand(3, -1, -1) * 0.3)
    settings = config(precond=precond, conditional=False, sigma_data=0.7)
    model = EDM(settings, DataInfo("images", (3, 8, 8)))
    model.model = Exact(model, mixture)  # type: ignore[assignment]
    low, high = model.sigma_range
    sigma = model.round_sigma(torch.logspace(math.log10(low), math.log10(high), 9, dtype=torch.float64))
    x = sigma.view(-1, 1, 1, 1) * torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.denoise(x, sigma), mixture.denoise(x, sigma), rtol=1e-9, atol=1e-9)


def test_edm_asks_its_network_for_unit_variance() -> None:
    """Of inputs, and of targets, where data of deviation sigma_data are what it was told (appendix B.6)."""
    model = EDM(config(conditional=False, sigma_data=0.8), IMAGES)
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    c_skip, c_out, c_in, _ = model.coefficients(sigma)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c_in**2 * (0.8**2 + sigma**2), one)
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.8**2 + c_skip**2 * sigma**2) / c_out**2, one)


def test_classes_are_one_hot_and_none_is_zero() -> None:
    model, x, sigma = edm(), images(), torch.tensor([0.3, 9.0])
    y = torch.tensor([2, 0])
    with torch.no_grad():
        assert torch.equal(model.denoise(x, sigma, y), model(x, sigma, torch.eye(4)[y]))
        for none in (None, torch.full((2,), model.null_label)):
            assert torch.equal(model.denoise(x, sigma, none), model(x, sigma, torch.zeros(2, 4)))
        with pytest.raises(UserError, match="takes no labels"):
            edm(conditional=False).denoise(x, sigma, y)


@pytest.mark.parametrize("changes", [{}, SONG], ids=["adm", "song"])
def test_augmentation_labels_are_zero_unless_given(changes: Any) -> None:
    model, x, sigma = edm(**changes, augment_dim=3), images(), torch.tensor([0.3, 9.0])
    with torch.no_grad():
        plain = model(x, sigma)
        assert torch.equal(plain, model(x, sigma, augment=torch.zeros(2, 3)))
        assert not torch.allclose(plain, model(x, sigma, augment=torch.ones(2, 3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_differentiable(variant: str) -> None:
    """A directional derivative in float64, against a central difference."""
    model = edm(**VARIANTS[variant]).double()
    x, direction = images(1, torch.float64).requires_grad_(), images(2, torch.float64)[1:]
    sigma, y = torch.tensor([0.6], dtype=torch.float64), torch.tensor([1])
    (gradient,) = torch.autograd.grad(model.denoise(x, sigma, y).square().sum(), x)
    with torch.no_grad():
        ends = [model.denoise(x + h * direction, sigma, y).square().sum() for h in (1e-5, -1e-5)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_keeps_attention_and_output_in_float32(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, sigma = edm(**VARIANTS[variant]), images(), torch.tensor([0.3, 3.0])
    seen: list[torch.dtype] = []
    attention = F.scaled_dot_product_attention

    def observed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.dtype)
        return attention(q, k, v)

    with torch.no_grad():
        exact = model.denoise(x, sigma)
        monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.denoise(x, sigma)
    assert set(seen) == {torch.float32}
    assert rough.dtype == torch.float32
    error = (rough - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 3e-2  # it did use bfloat16, whose numbers have 8 bits


# -- levels --------------------------------------------------------------------------------------------------


def test_iddpm_levels_follow_their_recursion() -> None:
    steps, u = 50, [0.0]
    a = [math.sin(math.pi / 2 * j / steps / 1.008) ** 2 for j in range(steps + 1)]
    for j in range(steps, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(a[j - 1] / a[j], 0.001) - 1))
    expected = torch.tensor(u, dtype=torch.float64)
    torch.testing.assert_close(iddpm_levels(steps), expected, rtol=1e-12, atol=1e-12)


def test_an_iddpm_denoises_at_its_levels_alone() -> None:
    model = edm(precond="iddpm", M=60)
    levels = model.sigmas
    assert levels.shape == (60,)
    torch.testing.assert_close(levels, iddpm_levels(60)[:-1].flip(0), rtol=1e-6, atol=0)
    sigma = levels[[3, 40]].float()
    x = images()
    with torch.no_grad():
        assert torch.equal(model.denoise(x, sigma * 1.001), model.denoise(x, sigma))
        assert torch.equal(model.denoise(x, torch.full((2,), 1e-9)), model(x, levels[[0, 0]].float()))
    torch.testing.assert_close(model.scale(sigma * 1.001), 1 / (1 + sigma**2).sqrt())


def test_others_take_any_level_within_their_limits() -> None:
    wanted = {"edm": (0.002, 80.0), "ve": (0.02, 80.0), "vp": (0.002, 80.0)}
    for precond, ends in wanted.items():
        model = EDM(config(precond=precond), IMAGES)
        assert not hasattr(model, "sigmas")
        assert model.sigma_range == ends
    limits = EDM(config(precond="vp"), IMAGES).limits
    assert limits == pytest.approx((math.sqrt(1e-6), math.sqrt(math.exp(10.05) - 1)), rel=1e-3)


def test_time_of_the_path_vp_is_the_inverse_of_its_noise() -> None:
    time = torch.logspace(-5, 0, 21, dtype=torch.float64)
    torch.testing.assert_close(vp_time(vp_sigma(time)), time, rtol=1e-12, atol=0)


# -- layers --------------------------------------------------------------------------------------------------


def resampling(taps: tuple[float, ...], size: int, up: bool) -> np.ndarray:
    """The matrix of a filter along one axis: zeros between the pixels, or every second one, zeros outside."""
    line, pad = np.array(taps) / sum(taps), (len(taps) - 1) // 2
    if not up:
        matrix = np.zeros((size // 2, size))
        for i in range(size // 2):
            for k, tap in enumerate(line):
                if 0 <= 2 * i + k - pad < size:
                    matrix[i, 2 * i + k - pad] = tap
        return matrix
    stuffed = np.zeros((size, 2 * size))
    stuffed[np.arange(size), 2 * np.arange(size)] = 2.0
    return np.stack([np.convolve(row, line)[pad : pad + 2 * size] for row in stuffed], 1)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (3, 1)])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_filters_are_what_they_are_defined_as(taps: Any, direction: Any) -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    rows, columns = (torch.from_numpy(resampling(taps, n, direction == "up")) for n in (6, 8))
    expected = torch.einsum("ih,bchw,jw->bcij", rows, x, columns)
    torch.testing.assert_close(Filter(taps, direction).double()(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_resampling_convolution_is_the_filter_and_then_the_convolution(
    taps: Any, direction: Any, kernel: int
) -> None:
    layer = ResamplingConv(5, 4, kernel, direction, taps).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    filtered = Filter(taps, direction).double()(x)
    torch.testing.assert_close(layer(x), F.conv2d(filtered, layer.weight, layer.bias, padding=kernel // 2))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_a_fused_one_convolves_first_and_pads_once(taps: Any) -> None:
    layer = ResamplingConv(5, 4, 3, "down", taps, fused=True).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    pad = 1 + (len(taps) - 1) // 2
    wide = F.conv2d(F.pad(x, (pad,) * 4), layer.weight)
    filtered = F.conv2d(wide, layer.resample_filter.expand(4, 1, -1, -1), groups=4)[:, :, ::2, ::2]
    torch.testing.assert_close(layer(x), filtered + layer.bias[:, None, None])


def test_attention_reads_the_official_order_of_channels() -> None:
    model = edm(model_channels=64, channel_mult=(1, 2)).double()  # two heads of 64
    block = model.model.get_submodule("dec.4x4_in0")
    assert isinstance(block, Block)
    assert block.heads == 2
    x = torch.randn(2, 128, 4, 6, dtype=torch.float64)
    packed = block.qkv(block.norm2(x)).reshape(2, 2, 64, 3, 24)
    q, k, v = packed.unbind(3)
    weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / 8, -1)
    expected = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 128, 4, 6)
    torch.testing.assert_close(block._attend(x), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 1, 1, 1)}, "halves the images 3 times"),
        ({"model_channels": 36, "channel_mult": (1, 4)}, "144 channels do not split into 32 groups"),
        ({"model_channels": 224, "channel_mult": (1,)}, "224 channels do not split into 3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EDM(config(**changes), IMAGES)


def test_classes_need_labels() -> None:
    with pytest.raises(UserError, match="needs labels"):
        EDM(config(), DataInfo("plain", (3, 8, 8)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 0},
        {"model_channels": 30},
        {"channel_mult": ()},
        {"dropout": 1.0},
        {"augment_dim": -1},
        {"resample_filter": (1, 2, 1), **SONG},
        {"resample_filter": (1, -1), **SONG},
        {"encoder_type": "skip"},
        {"sigma_min": 2.0, "sigma_max": 1.0},
        {"sigma_min": 0.1, "precond": "vp"},
        {"sigma_data": 0.0},
        {"beta_d": 0.0},
        {"M": 1},
    ],
)
def test_settings_out_of_range_are_refused(changes: Any) -> None:
    with pytest.raises(ValueError, match=r"must|need|follow|setting"):
        config(**changes).check()


# -- grids and solvers ---------------------------------------------------------------------------------------


def test_grids_are_uniform_in_what_they_say() -> None:
    model = EDM(config(), IMAGES)
    assert torch.equal(edm_grid("edm", 7, model), schedules.rho_grid(0.002, 80, 7))
    ve = edm_grid("ve", 7, model)
    torch.testing.assert_close(ve.log().diff().std(), ve.new_zeros(()), atol=1e-12, rtol=0)
    assert ve[[0, -1]].tolist() == pytest.approx([100, 0.02])
    vp = edm_grid("vp", 7, model)
    time = vp_time(vp, *vp_betas(model))
    torch.testing.assert_close(time, torch.linspace(1, 1e-3, 7, dtype=torch.float64), rtol=1e-9, atol=0)
    assert vp_betas(model) == pytest.approx((19.9, 0.1))
    iddpm, every = edm_grid("iddpm", 7, model), iddpm_levels()
    index = torch.tensor([int((every == level).nonzero()) for level in iddpm])
    assert index.diff().max() - index.diff().min() <= 1
    assert 0.002 <= iddpm[-1] < every[998]
    assert every[index[0] - 1] > 81 >= iddpm[0]


def test_grids_stay_within_what_the_model_takes_and_on_its_levels() -> None:
    ve = EDM(config(precond="ve", sigma_min=0.05, sigma_max=20.0), IMAGES)
    for kind in ("edm", "vp", "ve", "iddpm"):
        grid = edm_grid(kind, 5, ve)
        assert grid.max() <= 20 * (1 + 1e-12)
        assert grid.min() >= 0.05 * (1 - 1e-12)
    iddpm = EDM(config(precond="iddpm"), IMAGES)
    for kind in ("edm", "vp", "ve", "iddpm"):
        assert set(edm_grid(kind, 5, iddpm).tolist()) <= set(iddpm.sigmas.tolist())
    with pytest.raises(UserError, match="at least 2 steps"):
        edm_grid("edm", 1, ve)


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("order", [1, 2])
def test_solvers_in_time_converge_at_their_order(kind: Any, order: Any) -> None:
    """To the exact trajectory of a Gaussian: x - m shrinks as sqrt(s^2 + sigma^2)."""
    model = EDM(config(), IMAGES)
    mean, std = 0.4, 0.7
    start = torch.linspace(-3, 3, 5, dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    errors = []
    for steps in (80, 160):
        sigmas = edm_grid(kind, steps, model)
        betas = vp_betas(model) if kind == "vp" else None
        x0 = solve_in_time(denoise, start * sigmas[0], sigmas, betas=betas, order=order)
        exact = mean + (start * sigmas[0] - mean) * std / (std**2 + sigmas[0] ** 2).sqrt()
        errors.append(float((x0 - exact).abs().max()))
    assert errors[1] < (0.3 if order == 1 else 0.03)
    assert 2**order * 0.8 < errors[0] / errors[1] < 2**order * 1.3
