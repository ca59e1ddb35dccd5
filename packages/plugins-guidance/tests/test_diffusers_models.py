"""Networks and autoencoders of diffusers, against what the library's own schedulers make of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core import samplers
from cdm_core.capabilities import offered
from cdm_core.config import plain
from cdm_core.data import DataInfo
from cdm_core.diffusers_configs import DiffusersConfig
from cdm_core.diffusers_folder import find, library
from cdm_core.errors import UserError
from cdm_core.formats import filled
from cdm_core.samplers import Conditional
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_guidance.diffusers_configs import Transformer2DConfig, UNet2DConfig

try:
    import diffusers
except ImportError:
    diffusers = None
needs_diffusers = pytest.mark.skipif(diffusers is None, reason="the library diffusers is not installed")

GREY = DataInfo("grey", (1, 8, 8))
CLASSES = DataInfo("grey", (1, 8, 8), 10)


def unet(config: UNet2DConfig | None = None, info: DataInfo = GREY) -> Any:
    from cdm_plugins_guidance.diffusers_models import UNet2D

    torch.manual_seed(0)
    model = UNet2D(config or UNet2DConfig.small(), info)
    randomise(model)
    return model.eval()


def with_net(config: DiffusersConfig, **changes: Any) -> Any:
    return replace(config, architecture=json.dumps({**config.settings, **changes}))


# -- without the library -------------------------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        UserError, match=r"model\.architecture needs the library diffusers .*: pip install diffusers"
    ):
        unet()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (UNet2DConfig(architecture="{"), "architecture must be the text"),
        (UNet2DConfig(architecture="[1]"), "architecture must be the text"),
        (UNet2DConfig(schedule="trained"), "betas must be numbers"),
        (UNet2DConfig(betas=(0.1,)), "betas must be numbers"),
        (UNet2DConfig(noise_steps=1), "noise_steps"),
        (UNet2DConfig(beta_start=0.0), "beta_start"),
        (UNet2DConfig(sigma_min=100.0), "sigma_data"),
        (UNet2DConfig(num_heads=0), "num_heads"),
        (Transformer2DConfig(schedule="edm"), "schedule edm"),
        (Transformer2DConfig(cfg_channels=0), "cfg_channels"),
    ],
)
def test_settings_out_of_range(config: DiffusersConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check()


def test_its_settings_survive_the_way_through_a_file() -> None:
    config = replace(Transformer2DConfig.small(), betas=(0.1, 0.2), schedule="trained", cfg_channels=None)
    assert filled(Transformer2DConfig, json.loads(json.dumps(plain(config))), "model", "file") == config


def test_other_files_and_folders_hold_no_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (tmp_path / "weights.pt").write_bytes(b"")
    kinds = ("UNet2DModel",)
    assert find(tmp_path, kinds) is None
    assert find(tmp_path / "config.json", kinds) is None
    assert find(tmp_path / "weights.pt", kinds) is None
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no table"):
        find(tmp_path, kinds)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        find(tmp_path, kinds)


# -- denoisers -----------------------------------------------------------------------------------------------

SCHEDULES = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.001, 0.01, 0.02, 0.1, 0.3]},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
]


def saved(net: Any, root: Path, scheduler: Any, subfolder: str = "unet") -> Path:
    net.save_pretrained(root / subfolder)
    scheduler.save_pretrained(root / "scheduler")
    return root


def loaded(root: Path, *told: str) -> Any:
    """The model of a folder, with its weights."""
    from cdm_plugins_guidance import diffusers_models as models

    foreign = models.read_folder(root, told)
    assert foreign is not None
    target = models.Transformer2D if foreign.model.name == "guidance/diffusers-dit" else models.UNet2D
    model = target(foreign.model.config, foreign.info)
    model.load_state_dict(dict(foreign.state_dict))
    return model.eval()


@needs_diffusers
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: "-".join(map(str, o.values()))[:30] or "linear")
@torch.no_grad()
def test_predicts_the_x0_that_the_scheduler_does(options: dict[str, Any], tmp_path: Path) -> None:
    net = unet(with_net(UNet2DConfig.small(), out_channels=1)).net
    steps = {} if "trained_betas" in options else {"num_train_timesteps": 50}
    scheduler = diffusers.DDPMScheduler(**options, **steps, clip_sample=False)
    model = loaded(saved(net, tmp_path, scheduler))
    signal = scheduler.alphas_cumprod.double()
    # A last level of no signal is where a path starts, not where the model is asked.
    levels = int((signal > 1e-9).sum())
    assert len(model.sigmas) == levels
    torch.testing.assert_close(model.sigmas, ((1 - signal) / signal).sqrt()[:levels], rtol=1e-3, atol=0)
    for step in range(0, levels, max(1, levels // 5)):
        x_t, t = normal(2, 1, 8, 8, seed=step), torch.tensor([step, step])
        out = net(x_t, t).sample
        wanted = scheduler.step(out, step, x_t).pred_original_sample
        x0 = model.denoise(x_t / signal[step].sqrt().float(), model.sigmas[t].float())
        assert (x0 - wanted).abs().max() <= 1e-3 * wanted.abs().max(), step


@needs_diffusers
@torch.no_grad()
def test_samples_with_its_learned_variance_as_the_scheduler_does(tmp_path: Path) -> None:
    net = unet().net
    scheduler = diffusers.DDPMScheduler(20, beta_end=0.2, variance_type="learned_range", clip_sample=False)
    model = loaded(saved(net, tmp_path, scheduler))
    noise = [normal(2, 1, 8, 8, seed=i) for i in range(20)]
    x_t = start = normal(2, 1, 8, 8, seed=99)
    scheduler.set_timesteps(20)
    for i, t in enumerate(scheduler.timesteps):
        torch.manual_seed(i)
        x_t = stepped(scheduler, net(x_t, t).sample, t, x_t, noise[i])
    draws = iter(noise)
    sigmas = model.sigmas.flip(0)
    x = start / model.scale(sigmas[:1]).float()
    ours = samplers.ddpm(Conditional(model), x, sigmas, noise=lambda x: next(draws))
    torch.testing.assert_close(ours, x_t, rtol=0, atol=1e-4 * float(x_t.abs().max()))


def stepped(scheduler: Any, out: Tensor, t: Tensor, x_t: Tensor, noise: Tensor) -> Tensor:
    """A step of the scheduler with fresh noise of ours: its own taken out by a step whose noise is known."""
    torch.manual_seed(0)
    theirs = torch.randn(x_t.shape)
    torch.manual_seed(0)
    moved = scheduler.step(out, t, x_t).prev_sample
    if t == 0:
        return moved
    share = scheduler._get_variance(int(t), predicted_variance=out.chunk(2, 1)[1])
    return moved + (share / 2).exp() * (noise - theirs)


@needs_diffusers
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_preconditions_as_the_edm_scheduler_does(prediction: str, tmp_path: Path) -> None:
    net = unet(with_net(UNet2DConfig.small(), out_channels=1)).net
    scheduler = diffusers.EDMEulerScheduler(sigma_max=30.0, sigma_data=0.7, prediction_type=prediction)
    model = loaded(saved(net, tmp_path, scheduler))
    assert model.sigma_range == (0.002, 30.0)
    assert model.null_label is None
    x = normal(1, 1, 8, 8)
    for sigma in torch.tensor([[0.002], [0.5], [30.0]]):
        out = net(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        wanted = scheduler.precondition_outputs(x, out, sigma)
        torch.testing.assert_close(model.denoise(x, sigma), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="takes no labels"):
        model.denoise(x, sigma, torch.tensor([1]))


@needs_diffusers
@pytest.mark.parametrize("official", [True, False])
@torch.no_grad()
def test_a_transformer_computes_as_dit_or_as_the_class(official: bool, tmp_path: Path) -> None:
    """`official` is DiT, tensor for tensor; without it, the class as it is."""
    from cdm_plugins_guidance.diffusers_weights import dit_to_diffusers
    from cdm_plugins_guidance.dit import DiT
    from cdm_plugins_guidance.dit_configs import DiTConfig

    config = DiTConfig(depth=2, hidden_size=16, num_heads=2)
    torch.manual_seed(0)
    own = DiT(config, CLASSES).eval()
    randomise(own, 0.2)
    settings, weights = dit_to_diffusers(own.state_dict(), config)
    net = diffusers.DiTTransformer2DModel(**settings)
    net.load_state_dict(weights)
    model = loaded(
        saved(net, tmp_path, diffusers.DDPMScheduler(), "transformer"),
        f"model.official={str(official).lower()}",
    )
    x, t, y = normal(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 9, 10])
    expected = own(x, t, y) if official else net.eval()(x, t, class_labels=y).sample
    error = (model(x, t, y) - expected).abs().max()
    assert error <= 2e-5 * expected.abs().max()
    other = net.eval()(x, t, class_labels=y).sample if official else own(x, t, y)
    assert (model(x, t, y) - other).abs().max() > 1e-3
    assert (model.null_label, model.cfg_channels) == (10, 3)


@needs_diffusers
def test_training_leaves_the_labels_to_the_objective() -> None:
    """The class drops labels itself while it trains; here that is done once, by who trains it."""
    from cdm_plugins_guidance.diffusers_models import Transformer2D

    torch.manual_seed(0)
    model = Transformer2D(Transformer2DConfig.small(), CLASSES).train()
    randomise(model)
    x, t, y = normal(8, 1, 8, 8), torch.arange(8), torch.arange(8)
    with torch.no_grad():
        outputs = [model(x, t, y) for _ in range(8)]
    assert all(torch.equal(outputs[0], output) for output in outputs)


@needs_diffusers
def test_heads_may_be_the_same_number_at_every_width() -> None:
    from cdm_plugins_guidance.diffusers_models import set_heads

    config = UNet2DConfig.small()
    one, two = (unet(replace(config, num_heads=n)) for n in (1, 2))
    plainly = unet(with_net(config, attention_head_dim=16))
    x, t = normal(2, 1, 8, 8), torch.tensor([3, 7])
    with torch.no_grad():
        assert torch.equal(one(x, t), plainly(x, t))  # the attention is 16 wide
        assert not torch.equal(one(x, t), two(x, t))
        assert torch.equal(two(x, t), unet(with_net(config, attention_head_dim=8))(x, t))
    with pytest.raises(UserError, match="num_heads 3 does not divide the 16"):
        set_heads(one.net, 3)


@needs_diffusers
def test_a_network_for_other_data_is_refused() -> None:
    with pytest.raises(UserError, match="the network is for 1x8x8, and 'big' is 1x16x16"):
        unet(info=DataInfo("big", (1, 16, 16)))
    with pytest.raises(UserError, match="the network knows 4 classes, 'grey' has None"):
        unet(with_net(UNet2DConfig.small(), num_class_embeds=4))
    with pytest.raises(UserError, match="architecture is empty"):
        unet(UNet2DConfig())
    with pytest.raises(UserError, match=r"UNet2DModel of the installed diffusers does not know colours"):
        unet(with_net(UNet2DConfig.small(), colours=3, only_cross_attention=False))
    with pytest.raises(UserError, match="cannot be built from it"):
        unet(with_net(UNet2DConfig.small(), block_out_channels=[8]))


@needs_diffusers
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "none of DDPM's family"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "model.schedule"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "variance_type": "learned"},
            "variance_type 'learned' is not read",
        ),
    ],
)
def test_a_scheduler_that_is_not_understood(scheduler: Any, message: str, tmp_path: Path) -> None:
    from cdm_plugins_guidance.diffusers_models import read_folder

    root = saved(unet().net, tmp_path, diffusers.DDPMScheduler())
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(UserError, match=message):
        read_folder(root)


@needs_diffusers
def test_names_of_old_attention_layers_are_understood(tmp_path: Path) -> None:
    net = unet().net
    root = saved(net, tmp_path, diffusers.DDPMScheduler(20))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in net.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        state[name] = tensor
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, root / "unet" / "diffusion_pytorch_model.bin")
    assert any("proj_attn" in name for name in state)
    model = loaded(root)
    x, t = normal(2, 1, 8, 8), torch.tensor([3, 7])
    with torch.no_grad():
        assert torch.equal(model(x, t), net(x, t).sample)


# -- autoencoders --------------------------------------------------------------------------------------------


def autoencoder(kind: str, folder: Path, **settings: Any) -> Any:
    """A small one, saved in `folder`: the library's object."""
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        net = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **blocks, **settings
        )
    else:
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        net = diffusers.AutoencoderTiny(**widths, **blocks, **settings)
    net.save_pretrained(folder)
    return net.eval()


@needs_diffusers
@pytest.mark.parametrize(("kind", "scale"), [("AutoencoderKL", 0.18215), ("AutoencoderTiny", 1.0)])
def test_latents_are_decoded_and_encoded_at_their_scale(kind: str, scale: float, tmp_path: Path) -> None:
    from cdm_plugins_guidance.dit import DiT
    from cdm_plugins_guidance.dit_configs import DiTConfig

    net = autoencoder(kind, tmp_path / "vae")
    config = replace(DiTConfig.small(), autoencoder=str(tmp_path / "vae"))
    model = DiT(config, DataInfo("latents", (4, 8, 8), levels=None))
    assert offered(model) == {"denoise", "to_images", "to_latents"}
    assert not any("autoencoder" in name for name in model.state_dict())
    z, images = normal(2, 4, 8, 8), torch.tanh(normal(2, 3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(model.to_images(z), net.decode(z / scale).sample)
        code = net.encode(images)
        if kind == "AutoencoderTiny":
            torch.testing.assert_close(model.to_latents(images), code.latents * scale)
            with pytest.raises(UserError, match="leave out noise"):
                model.to_latents(images, z)
        else:
            torch.testing.assert_close(model.to_latents(images), code.latent_dist.mean * scale)
            drawn = (
                code.latent_dist.mean + code.latent_dist.std * normal(*code.latent_dist.mean.shape)
            ) * scale
            torch.testing.assert_close(model.to_latents(images, normal(*code.latent_dist.mean.shape)), drawn)


@needs_diffusers
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_gradients_flow_through_the_decoder(kind: str, tmp_path: Path) -> None:
    """By central differences in float64; the same with activations computed again; none in its weights."""
    from cdm_core.autoencoder import Autoencoder

    autoencoder(kind, tmp_path)
    z, direction = normal(1, 4, 4, 4, dtype=torch.float64), normal(1, 4, 4, 4, seed=1, dtype=torch.float64)
    gradients = []
    for checkpoint in (False, True):
        coder = Autoencoder(tmp_path, scale=0.5, checkpoint=checkpoint)
        coder.net.double()
        z.requires_grad_()
        value = coder.decode(z).square().sum()
        (gradient,) = torch.autograd.grad(value, z)
        gradients.append(gradient)
        assert not any(parameter.requires_grad for parameter in coder.net.parameters())
    with torch.no_grad():
        h = 1e-6
        ends = [coder.decode(z + sign * h * direction).square().sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((gradients[0] * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0])


@needs_diffusers
def test_a_shift_of_the_latents_is_honoured(tmp_path: Path) -> None:
    from cdm_core.autoencoder import Autoencoder

    net = autoencoder("AutoencoderKL", tmp_path, scaling_factor=0.3, shift_factor=0.7)
    z = normal(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(Autoencoder(tmp_path).decode(z), net.decode(z / 0.3 + 0.7).sample)
        images = net.decode(z / 0.3 + 0.7).sample
        torch.testing.assert_close(
            Autoencoder(tmp_path).encode(images), (net.encode(images).latent_dist.mean - 0.7) * 0.3
        )


@needs_diffusers
def test_a_folder_that_holds_no_autoencoder_is_refused(tmp_path: Path) -> None:
    from cdm_core.autoencoder import Autoencoder

    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        Autoencoder(tmp_path)
    unet().net.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds UNet2DModel, not one of AutoencoderKL, AutoencoderTiny"):
        Autoencoder(tmp_path)
    autoencoder("AutoencoderKL", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        Autoencoder(tmp_path / "vae")


@needs_diffusers
def test_a_pipeline_brings_its_autoencoder(tmp_path: Path) -> None:
    from cdm_plugins_guidance.diffusers_models import read_folder

    settings = {"in_channels": 4, "out_channels": 4}
    net = diffusers.UNet2DModel(**{**UNet2DConfig.small().settings, **settings})
    saved(net, tmp_path, diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large"))
    autoencoder("AutoencoderKL", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    foreign = read_folder(tmp_path)
    assert foreign is not None
    assert foreign.info == DataInfo("converted", (4, 8, 8), levels=None, dequantise=False)
    assert "sample.clip=true" in foreign.note
    assert "sampler.variance=large" in foreign.note
    assert loaded(tmp_path).to_images(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


@needs_diffusers
def test_the_library_is_imported_by_who_asks() -> None:
    assert library("diffusers", "a test") is diffusers
