"""Stable Diffusion as a classifier: prompts, pipelines, latents; by stand-ins for libraries, and by them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm_core.capabilities import offered
from cdm_core.cli import cli
from cdm_core.data import DataInfo
from cdm_core.diffusers_models import noise_path
from cdm_core.errors import MissingPackage, UserError
from cdm_core.formats import build, load_converted
from cdm_core.manager import load_registry
from cdm_core.runs import load_run
from cdm_core.testing.conformance import randomise
from cdm_plugins_zeroshot import pictures
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.stable_diffusion import (
    FIRST,
    StableDiffusion,
    read_pipeline,
    read_prompts,
)
from cdm_plugins_zeroshot.stable_diffusion_configs import StableDiffusionConfig
from cdm_plugins_zeroshot.zeroshot_configs import EstimatorConfig

PROMPTS = "class,prompt\ncat,a cat\ndog,a dog\ncat,a kitten\nowl,owl\n"
WORDS = ["a cat", "a kitten", "a dog", "owl", ""]  # class by class, the empty one last
NET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 50,
}
TOKENS = 12
INSTALLED = all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))
needs_libraries = pytest.mark.skipif(not INSTALLED, reason="diffusers and transformers are not installed")


# -- stand-ins -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Of the interface of UNet2DConditionModel: it listens to the time and to the prompt."""

    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        block_out_channels: Any,
        down_block_types: Any,
        up_block_types: Any,
        layers_per_block: int,
        norm_num_groups: int,
        cross_attention_dim: int,
        attention_head_dim: int,
    ) -> None:
        super().__init__()
        self.config = NET
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.told = nn.Linear(cross_attention_dim, 8)
        self.last = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        told = self.told(encoder_hidden_states).mean(1) + (t / 50)[:, None].sin()
        return (self.last((self.first(x) + told[:, :, None, None]).tanh()),)


class Settings(dict[str, Any]):
    """Of the interface of the library's configurations."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Coder(nn.Module):
    """Of the interface of AutoencoderKL: halves the image; a fourth channel is their mean."""

    def __init__(self, scaling_factor: float) -> None:
        super().__init__()
        self.config = Settings(scaling_factor=scaling_factor)
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> Any:
        small = F.avg_pool2d(images, 2)
        mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean))

    def decode(self, latents: Tensor) -> Any:
        return types.SimpleNamespace(sample=F.interpolate(latents[:, :3], scale_factor=2))


class Tokenizer:
    """A token a letter, between a start and ends."""

    model_max_length = TOKENS

    @classmethod
    def from_pretrained(cls, folder: str, local_files_only: bool) -> Tokenizer:
        return cls()

    def __call__(self, prompts: list[str], padding: str, max_length: int) -> dict[str, list[list[int]]]:
        coded = [[1, *(ord(c) % 30 + 3 for c in prompt), 2] for prompt in prompts]
        return {"input_ids": [one + [2] * (max_length - len(one)) for one in coded]}


class Encoder(nn.Module):
    """Of the interface of CLIPTextModel."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(max_position_embeddings=TOKENS)
        table = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(table, requires_grad=False)

    @classmethod
    def from_pretrained(cls, folder: str, local_files_only: bool) -> Encoder:
        return cls()

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.table[tokens],)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries are these."""
    diffusers, transformers = types.ModuleType("diffusers"), types.ModuleType("transformers")
    diffusers.__dict__.update(UNet2DConditionModel=Net, AutoencoderKL=Coder)
    transformers.__dict__.update(CLIPTokenizer=Tokenizer, CLIPTextModel=Encoder)
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setitem(sys.modules, "transformers", transformers)


def pipeline(folder: Path, net: nn.Module | None = None, **scheduler: Any) -> Path:
    """A pipeline's folder, and beside it prompts.csv."""
    root = folder / "pipeline"
    if net is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Net(**NET)
    for name, content in {
        "unet": {"_class_name": "UNet2DConditionModel", **NET},
        "vae": {"_class_name": "AutoencoderKL", "scaling_factor": 0.5},
        "scheduler": {**SCHEDULER, **scheduler},
    }.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (root / name / file).write_text(json.dumps(content))
    save_file(net.state_dict(), root / "unet/diffusion_pytorch_model.safetensors")
    save_file(Coder(0.5).state_dict(), root / "vae/diffusion_pytorch_model.safetensors")
    (folder / "prompts.csv").write_text(PROMPTS)
    return root


def told(folder: Path, *more: str) -> tuple[str, ...]:
    return (f"model.prompts={folder / 'prompts.csv'}", *more)


def network(folder: Path, *more: str) -> Any:
    """The model of a pipeline."""
    foreign = read_pipeline(folder / "pipeline", told(folder, *more))
    assert foreign is not None
    return build(foreign, load_registry(), "test").eval()


def command(*words: object) -> Any:
    result = CliRunner().invoke(cli, [str(word) for word in ("--plugin", "zeroshot", *words)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


# -- prompts -------------------------------------------------------------------------------------------------


def test_prompts_are_gathered_by_class_in_the_order_of_their_first(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(PROMPTS)
    assert read_prompts(file) == {"cat": ("a cat", "a kitten"), "dog": ("a dog",), "owl": ("owl",)}


def test_published_files_number_their_classes(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,classname,classidx\n"a blurry, dark dog",dog,1\na cat,cat,0\n')
    assert list(read_prompts(file).items()) == [("cat", ("a cat",)), ("dog", ("a blurry, dark dog",))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a first line `class,prompt` and at least one prompt"),
        ("class,prompt\n", "at least one prompt"),
        ("name,prompt\ncat,a cat\n", "a first line `class,prompt`"),
        ("class,prompt\ncat,\n", "line 2: a class and a prompt are wanted"),
        ("class,prompt\ncat,a cat\ndog\n", "line 3: a class and a prompt"),
        ("prompt,classname,classidx\na,cat,0\nb,dog,2\n", "must number the 2 classes from 0"),
        ("prompt,classname,classidx\na,cat,0\nb,dog,0\n", "must number the 2 classes from 0"),
        ("prompt,classname,classidx\na,cat,0\nb,cat,1\n", "must number the 1 classes from 0"),
    ],
)
def test_prompts_that_make_no_classes(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(file)


# -- pipelines -----------------------------------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = DataInfo("test", (1, 8, 8), 10)
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=r"needs the library diffusers .*: pip install diffusers"):
        StableDiffusion(StableDiffusionConfig.small(), info)
    pipeline(tmp_path)
    with pytest.raises(MissingPackage, match="needs the library transformers"):
        read_pipeline(tmp_path / "pipeline", told(tmp_path))


def test_a_pipeline_knows_its_classes_levels_and_latents(stand_ins: None, tmp_path: Path) -> None:
    root = pipeline(tmp_path)
    foreign = read_pipeline(root, told(tmp_path))
    assert foreign is not None
    assert foreign.model.name == "zeroshot/stable-diffusion"
    assert (foreign.info.shape, foreign.info.class_names) == ((4, 4, 4), ("cat", "dog", "owl"))
    assert (foreign.info.levels, foreign.info.num_classes) == (None, 3)
    config = foreign.model.config
    assert (config.noise_steps, config.tokens) == (50, TOKENS)
    assert config.prompts == (("a cat", "a kitten"), ("a dog",), ("owl",))
    model = network(tmp_path)
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 50) ** 2
    signal = np.cumprod(1 - beta)
    np.testing.assert_allclose(model.sigmas.numpy(), np.sqrt((1 - signal) / signal), rtol=1e-12)
    assert offered(model) == {"denoise", "to_images", "to_latents"}
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(model.to_latents(images)[:, :3], 0.5 * F.avg_pool2d(images, 2))
    torch.testing.assert_close(
        model.to_images(model.to_latents(images)), F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)
    )
    without = network(tmp_path, 'model.autoencoder=""')
    assert offered(without) == {"denoise"}
    assert not hasattr(without, "to_latents")


def test_labels_are_prompts(stand_ins: None, tmp_path: Path) -> None:
    """Classes ask by their first prompt, no class by the empty one, and prompts by numbers behind these."""
    net = Net(**NET)
    randomise(net, 0.2)
    pipeline(tmp_path, net)
    model = network(tmp_path)
    encoded = Encoder()(torch.tensor(Tokenizer()(WORDS, "max_length", TOKENS)["input_ids"]))[0]
    assert model.wordings == ((FIRST, FIRST + 1), (1,), (2,))
    x_t, t = torch.randn(8, 4, 4, 4), torch.arange(8)
    y = torch.tensor([0, 1, 2, 3, *range(FIRST, FIRST + 4)])  # cat, dog, owl, none, then the four prompts
    with torch.no_grad():
        expected = net(x_t, t, encoded[[0, 2, 3, 4, 0, 1, 2, 3]], False)[0]
        assert torch.equal(model(x_t, t, y), expected)
        assert torch.equal(model(x_t, t), net(x_t, t, encoded[[4] * 8], False)[0])
    for wrong in (-1, 4, FIRST + 5):
        with pytest.raises(IndexError):
            model(x_t[:1], t[:1], torch.tensor([wrong]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_it_predicts_becomes_x0(stand_ins: None, prediction: str, tmp_path: Path) -> None:
    pipeline(tmp_path, prediction_type=prediction)
    model = network(tmp_path)
    t, x_t, y = torch.tensor([3, 40]), torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
    alpha, sigma = (v[t].float().view(-1, 1, 1, 1) for v in (model.path.alpha, model.path.sigma))
    with torch.no_grad():
        out = model(x_t, t, y)
        x0 = model.denoise(x_t / alpha, (sigma / alpha).flatten(), y)
    expected = (x_t - sigma * out) / alpha if prediction == "epsilon" else alpha * x_t - sigma * out
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


def test_a_last_level_of_pure_noise_is_not_asked_about() -> None:
    path = noise_path(StableDiffusionConfig(noise_steps=10, zero_snr=True))
    assert float(path.alpha[-1]) == 0
    assert float(path.alpha[0]) == pytest.approx(math.sqrt(1 - 0.00085))
    assert len(path.levels) == 9


def test_what_is_no_pipeline_of_its_kind(stand_ins: None, tmp_path: Path) -> None:
    root = pipeline(tmp_path)
    with pytest.raises(UserError, match=r"--set model\.prompts=FILE\.csv"):
        read_pipeline(root)
    with pytest.raises(UserError, match=r"must be the name of a CSV file"):
        read_pipeline(root, ("model.prompts=[1]",))
    assert read_pipeline(root / "vae", told(tmp_path)) is None
    assert read_pipeline(tmp_path / "prompts.csv", told(tmp_path)) is None
    (tmp_path / "prompts.csv").write_text("class,prompt\ncat,a dozen cats\n")
    with pytest.raises(UserError, match="reads 12 tokens, and this prompt has 14: 'a dozen cats'"):
        read_pipeline(root, told(tmp_path))
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    pipeline(tmp_path, beta_schedule="exponential")
    with pytest.raises(UserError, match=r"model\.schedule"):
        read_pipeline(root, told(tmp_path))
    pipeline(tmp_path, _class_name="EDMEulerScheduler")
    with pytest.raises(UserError, match="schedule must be one of DDPM's family, not edm"):
        read_pipeline(root, told(tmp_path))
    (root / "scheduler/scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
    )
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler is none of DDPM"):
        read_pipeline(root, told(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": ""}, "is empty"),
        ({"prompts": ()}, "is empty"),
        ({"prompts": (("one",),)}, "prompts of 1 classes"),
        (
            {"architecture": json.dumps({**NET, "addition_embed_type": "text_time"})},
            "addition_embed_type must be",
        ),
        ({"architecture": json.dumps({**NET, "cross_attention_dim": [8, 8]})}, "cross_attention_dim must be"),
        ({"architecture": json.dumps({**NET, "colours": 3})}, "does not know colours"),
        ({"architecture": json.dumps({**NET, "sample_size": 8})}, "the network is for 4x8x8"),
        ({"autoencoder": "/nowhere"}, "there is no folder /nowhere"),
    ],
)
def test_a_network_that_cannot_be_built(stand_ins: None, changes: dict[str, Any], says: str) -> None:
    settings = {"architecture": json.dumps(NET), "prompts": (("one",), ("two",), ("three",)), **changes}
    info = DataInfo("latents", (4, 4, 4), 3, levels=None, dequantise=False)
    with pytest.raises(UserError, match=says):
        StableDiffusion(StableDiffusionConfig(**settings), info)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"architecture": "{"}, "architecture must be"),
        ({"prompts": (("a",), ())}, "class 1 has none"),
        ({"tokens": 0}, "tokens"),
        ({"noise_steps": 1}, "noise_steps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"latent_scale": 0.0}, "latent_scale"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StableDiffusionConfig(**settings).check()


# -- classification ------------------------------------------------------------------------------------------


def photographs(folder: Path) -> Path:
    """A folder of images, a subfolder a class."""
    draw = np.random.default_rng(0)
    for name, count in (("owl", 2), ("cat", 1)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(256, size=(10, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"photos/{name}/{i}.png")
    return folder / "photos"


def by_hand(model: Any, x0: Tensor, config: EstimatorConfig, mixture: bool) -> list[float]:
    """Scores of the three classes, pooled as is said, from the errors of the four prompts."""
    estimator = Estimator.of(model, config, (4, 4, 4))
    _, sigma, weight, noise = estimator.pairs(0, 0, config.pairs)
    sigma_ = sigma[:, None, None, None]
    means = []
    for label in range(FIRST, FIRST + 4):
        with torch.no_grad():
            d = model.denoise(x0 + sigma_ * noise, sigma, torch.full((config.pairs,), label))
        error = ((x0 - d) / sigma_).square().flatten(1).mean(1).double().numpy()
        means.append(float((error * weight).mean()))
    cat, kitten, dog, owl = means
    if mixture:
        return [float(np.logaddexp(-cat, -kitten) - np.log(2)), -dog, -owl]
    return [-(cat + kitten) / 2, -dog, -owl]


def classified(root: Path, *more: object) -> Any:
    """What the command says of the photographs, after `convert`."""
    file = root / "sd.safetensors"
    given = ("--device", "cpu", "--json", "--set", "estimator.tile=8", "--pairs", 8)
    return command("zeroshot", "classify", file, "--input", root / "photos", *given, *more)


def converted(folder: Path) -> Path:
    sets = [word for text in told(folder) for word in ("--set", text)]
    file = folder / "sd.safetensors"
    command("convert", folder / "pipeline", "--format", "stable-diffusion", "--out", file, "--json", *sets)
    return file


@pytest.mark.parametrize("mixture", [False, True])
def test_prompts_of_a_class_are_pooled(stand_ins: None, mixture: bool, tmp_path: Path) -> None:
    """By the mean of their errors, or as a mixture of their likelihoods; the image is the encoder's mean."""
    net = Net(**NET)
    randomise(net, 0.3)
    pipeline(tmp_path, net)
    photos = photographs(tmp_path)
    file = converted(tmp_path)
    settings = {"weight": "elbo", "importance": "weight", "wordings": "likelihood"} if mixture else {}
    words = [word for key, value in settings.items() for word in ("--set", f"estimator.{key}={value}")]
    found = classified(tmp_path, "--method", "flat", *words)
    assert [one["image"] for one in found["images"]] == ["cat/0.png", "owl/0.png", "owl/1.png"]
    assert [one["label"] for one in found["images"]] == [0, 2, 2]
    model, _ = load_converted(file, load_registry())
    first = np.asarray(Image.open(photos / "cat/0.png"))[1:9]  # 10 rows are cut to 8
    x0 = model.eval().to_latents(torch.tensor(first / 127.5 - 1).float().permute(2, 0, 1)[None])[0]
    config = EstimatorConfig(pairs=8, tile=8, **settings)
    expected = by_hand(model, x0, config, mixture)
    assert found["images"][0]["scores"] == pytest.approx(expected, rel=1e-3)
    assert found["images"][0]["predicted"] == int(np.argmax(expected))
    assert found["class_evaluations"] == 8 * 4  # four prompts

    raced = classified(tmp_path, "--method", "race", "--set", "elimination.alpha=0", *words)
    assert [one["scores"] for one in raced["images"]] == [one["scores"] for one in found["images"]]


def test_a_class_is_given_up_with_all_of_its_prompts(stand_ins: None, tmp_path: Path) -> None:
    net = Net(**NET)
    randomise(net, 0.5)
    pipeline(tmp_path, net)
    photographs(tmp_path)
    converted(tmp_path)
    found = classified(tmp_path, "--method", "halving")["images"][0]
    # Three classes get one pair, two of them a second one: four prompts, then those of the two.
    assert sorted(found["seen"]) == [1, 2, 2]
    assert found["class_evaluations"] == sum(n * k for n, k in zip(found["seen"], (2, 1, 1), strict=True))


def test_a_data_set_is_resized_and_encoded(stand_ins: None, tmp_path: Path) -> None:
    """Its pixels in [-1, 1], grey ones as colour; its classes must be the model's."""
    pipeline(tmp_path)
    names = "class,prompt\n" + "".join(f"{i},a {i}\n" for i in range(10))
    (tmp_path / "prompts.csv").write_text(names)
    file = converted(tmp_path)
    given = ("zeroshot", "evaluate", file, "--data", "core/digits", "--limit", 3, "--calibrate", 0)
    found = command(*given, "--pairs", 4, "--device", "cpu", "--json", "--set", "estimator.tile=8")
    assert found["methods"]["race"]["n"] == 3
    run = load_run(file, device="cpu")
    pictures.attach(run, "core/digits")
    pixels, _ = run.split("test").__getitems__([0, 1])
    latents = pictures.encoded_split(run, "test")([0, 1])
    grey = pixels.float() / 8 - 1  # 17 levels
    torch.testing.assert_close(latents[:, :3], 0.5 * F.avg_pool2d(grey, 2).expand(-1, 3, -1, -1))

    pipeline(tmp_path / "other")
    with pytest.raises(UserError, match=r"has 10 classes, .* 3"):
        pictures.attach(load_run(converted(tmp_path / "other"), device="cpu"), "core/digits")


def test_folders_that_are_not_the_classes(tmp_path: Path) -> None:
    named = DataInfo("latents", (4, 4, 4), 2, ("cat", "owl"), levels=None)
    numbered = DataInfo("latents", (4, 4, 4), 3, levels=None)
    photos = photographs(tmp_path)
    assert pictures.listed_pictures(photos, named).labels.tolist() == [0, 1, 1]
    assert pictures.listed_pictures(photos, named, limit=2).names == ["cat/0.png", "owl/0.png"]
    assert pictures.listed_pictures(photos / "owl", named).labels is None
    with pytest.raises(UserError, match="has 2 subfolders and the model 3 classes"):
        pictures.listed_pictures(photos, numbered)
    (photos / "bat").mkdir()
    assert pictures.listed_pictures(photos, numbered).labels.tolist() == [1, 2, 2]
    with pytest.raises(UserError, match="subfolder 'bat' is none of the model's classes"):
        pictures.listed_pictures(photos, named)
    with pytest.raises(UserError, match="holds no images"):
        pictures.listed_pictures(photos / "bat", named)
    with pytest.raises(UserError, match="is not a folder"):
        pictures.listed_pictures(photos / "none", named)


# -- the libraries themselves --------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    """A small pipeline as the libraries write it."""
    import diffusers
    import transformers

    root = folder / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = diffusers.UNet2DConditionModel(**NET)
        coder = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.5,
        )
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = transformers.CLIPTextConfig(
            vocab_size=60, max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, **sizes
        )
        encoder = transformers.CLIPTextModel(text)
    randomise(net, 0.1)
    net.save_pretrained(root / "unet")
    coder.save_pretrained(root / "vae")
    encoder.save_pretrained(root / "text_encoder")
    diffusers.PNDMScheduler(50, 0.00085, 0.012, "scaled_linear").save_pretrained(root / "scheduler")
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (root / "tokenizer").mkdir()
    (root / "tokenizer/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    about = {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (root / "tokenizer/tokenizer_config.json").write_text(json.dumps(about))
    (folder / "prompts.csv").write_text(PROMPTS)
    return root


@needs_libraries
@torch.no_grad()
def test_the_libraries_own_pipeline_is_asked_as_they_ask_it(tmp_path: Path) -> None:
    import diffusers
    import transformers

    root = saved(tmp_path)
    model = network(tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(root / "text_encoder")
    words = tokenizer(WORDS, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    torch.testing.assert_close(model.prompts, encoder(words)[0])
    net = diffusers.UNet2DConditionModel.from_pretrained(root / "unet")
    x_t, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 40]), torch.tensor([FIRST + 1, 1])
    out = net(x_t, t, encoder(words)[0][[1, 2]]).sample
    torch.testing.assert_close(model(x_t, t, y), out)
    scheduler = diffusers.DDPMScheduler.from_pretrained(root / "scheduler", clip_sample=False)
    signal = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(model.sigmas, ((1 - signal) / signal).sqrt(), rtol=1e-4, atol=0)
    coder = diffusers.AutoencoderKL.from_pretrained(root / "vae")
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(model.to_latents(images), 0.5 * coder.encode(images).latent_dist.mean)
    torch.testing.assert_close(model.to_images(x_t[:1]), coder.decode(x_t[:1] / 0.5).sample)


@needs_libraries
def test_the_libraries_own_pipeline_classifies(tmp_path: Path) -> None:
    saved(tmp_path)
    photographs(tmp_path)
    converted(tmp_path)
    found = classified(tmp_path, "--method", "flat")
    assert found["n"] == 3
    assert found["class_evaluations"] == 8 * 4
