"""Any denoiser with labels classifies: the networks of other plugins, by the command of plugin zeroshot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from cdm_core.cli import cli
from cdm_core.data import DataInfo
from cdm_core.formats import Foreign, save_converted
from cdm_core.images import save_npz
from cdm_core.runs import Run, load_run
from cdm_core.settings import Selection
from cdm_core.testing.conformance import randomise
from cdm_plugins_guidance.adm import ADM
from cdm_plugins_guidance.adm_configs import UNetConfig
from cdm_plugins_guidance.dit import DiT
from cdm_plugins_guidance.dit_configs import DiTConfig
from cdm_plugins_guidance.edm import EDM
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.zeroshot_configs import EstimatorConfig

CLASSES, PAIRS = 4, 8
INFO = DataInfo("tiny", (1, 8, 8), num_classes=CLASSES, dequantise=False)
SETTINGS = EstimatorConfig(pairs=PAIRS, tile=16, levels=40, sigma_max=5.0)
OPTIONS = [
    "--pairs",
    PAIRS,
    *(w for s in ("tile=16", "levels=40", "sigma_max=5") for w in ("--set", f"estimator.{s}")),
]


def run(*words: object, plugins: tuple[str, ...] = ("guidance", "zeroshot")) -> str:
    chosen = [word for plugin in plugins for word in ("--plugin", plugin)]
    result = CliRunner().invoke(cli, [str(word) for word in (*chosen, *words)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def built(make: Callable[[], Any]) -> Any:
    """A network of random weights that listens to its labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    randomise(model, 0.2)
    return model.eval()


def adm(folder: Path) -> Path:
    """guided-diffusion's weights, through `convert`."""
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        class_cond=True,
        noise_schedule="linear",
        dropout=0.0,
    )
    torch.save(built(lambda: ADM(config, INFO)).state_dict(), folder / "adm.pt")
    told = ("model.num_head_channels=16", "model.noise_schedule=linear", "data.shape=[1,8,8]")
    sets = [word for text in (*told, "model.attention_resolutions=[2]") for word in ("--set", text)]
    run("convert", folder / "adm.pt", "--format", "adm", "--out", folder / "adm.safetensors", *sets)
    return folder / "adm.safetensors"


def dit(folder: Path) -> Path:
    """The official DiT's weights, through `convert`."""
    model = built(lambda: DiT(DiTConfig(depth=2, hidden_size=64, num_heads=1), INFO))
    torch.save(model.state_dict(), folder / "dit.pt")
    out = ("--out", folder / "dit.safetensors", "--set", "data.levels=256")
    run("convert", folder / "dit.pt", "--format", "dit", *out)
    return folder / "dit.safetensors"


def edm(folder: Path) -> Path:
    """EDM's network of any noise level, as `convert` writes it."""
    config = EDMConfig.small()
    model = built(lambda: EDM(config, INFO))
    foreign = Foreign(model.state_dict(), Selection("guidance/edm", config), INFO)
    save_converted(foreign, folder / "edm.safetensors")
    return folder / "edm.safetensors"


def diffusers(folder: Path) -> Path:
    """A UNet2DModel in a folder of the library, through `convert`."""
    library = pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    net = built(
        lambda: library.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=CLASSES,
        )
    )
    net.save_pretrained(folder / "pipeline/unet")
    library.DDPMScheduler(100).save_pretrained(folder / "pipeline/scheduler")
    run("convert", folder / "pipeline", "--out", folder / "diffusers.safetensors")
    return folder / "diffusers.safetensors"


def scores(run: Run, x0: Tensor) -> Tensor:
    """Minus the mean squared error of eps, (N, classes): the definition, one image and class at a time."""
    estimator, rows = Estimator.of(run.model, SETTINGS, run.info.shape), []
    for image, clean in enumerate(x0):
        _, sigma, _, noise = estimator.pairs(image, 0, PAIRS)
        x = clean + sigma[:, None, None, None] * noise
        with torch.no_grad():
            asked = (run.model.denoise(x, sigma, torch.full((PAIRS,), y)) for y in range(CLASSES))
            rows.append([-float(((clean - d) / sigma[:, None, None, None]).square().mean()) for d in asked])
    return torch.tensor(rows)


@pytest.mark.parametrize("make", [adm, dit, edm, diffusers], ids=lambda make: make.__name__)
def test_a_denoiser_of_guidance_classifies(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """By the errors of eps, each class asked about the same pairs; and a race ends on the flat answer."""
    file = make(tmp_path)
    pixels = torch.randint(256, (3, *INFO.shape), generator=torch.Generator().manual_seed(1))
    save_npz(tmp_path / "x.npz", pixels / 127.5 - 1, INFO, None, {})
    given = (
        "zeroshot",
        "classify",
        file,
        "--input",
        tmp_path / "x.npz",
        *OPTIONS,
        "--device",
        "cpu",
        "--json",
    )
    found = json.loads(run(*given, "--method", "flat"))["images"]
    loaded = load_run(file, device="cpu")
    expected = scores(loaded, pixels / 127.5 - 1)
    assert float(expected.std(1).min()) > 1e-5 * float(expected.abs().max())  # it does listen
    torch.testing.assert_close(torch.tensor([one["scores"] for one in found]), expected, rtol=2e-4, atol=0)
    assert [one["predicted"] for one in found] == expected.argmax(1).tolist()

    raced = json.loads(run(*given, "--method", "race", "--set", "elimination.alpha=0"))["images"]
    assert [one["scores"] for one in raced] == [one["scores"] for one in found]


def test_a_cdm_is_asked_for_errors_and_for_densities(tmp_path: Path) -> None:
    """One table: the Monte-Carlo classifier and exact Bayes on the same weights, a pass a class and level."""
    model = ["channels=16", "ch_mult=[1,2]", "num_res_blocks=1", "attn_resolutions=[4]", "norm_groups=4"]
    model += ["noise_steps=50", "conditional=true"]
    small = [f"model.{text}" for text in model] + [
        "train.steps=60",
        "train.batch_size=32",
        "train.validate_every=0",
    ]
    sets = [word for text in small for word in ("--set", text)]
    pair = ("cdm", "zeroshot")
    run("train", "--recipe", "digits", "--out", tmp_path / "run", *sets, plugins=pair)
    given = (
        "zeroshot",
        "evaluate",
        tmp_path / "run",
        "--limit",
        12,
        "--calibrate",
        30,
        "--pairs",
        8,
        "--json",
    )
    found = json.loads(run(*given, "--device", "cpu", plugins=pair))
    race, bayes = (found["methods"][name] for name in ("race", "bayes"))
    assert bayes["evaluations"] == 10 * 3  # three noise levels
    assert bayes["evaluations"] < race["class_evaluations"] <= 10 * 8
    assert bayes["accuracy"] > 0.3  # of ten classes, barely trained
    assert [c["second"] for c in found["contrasts"]] == ["bayes"]


def test_the_recipe_of_a_published_classifier_says_how(tmp_path: Path) -> None:
    """`--recipe` brings the settings, words on the command line change them; samples stay as they are."""
    file = edm(tmp_path)
    x0 = torch.rand(2, *INFO.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    save_npz(tmp_path / "x.npz", x0, INFO, torch.tensor([1, 3]), {})
    given = (
        "zeroshot",
        "classify",
        file,
        "--input",
        tmp_path / "x.npz",
        "--recipe",
        "zeroshot/cifar10",
        "--json",
    )
    found = json.loads(run(*given, "--device", "cpu"))
    assert found["method"] == "flat"
    assert found["evaluations"] == 126 * CLASSES
    settings = found["settings"]["estimator"]
    assert (settings["levels"], settings["spacing"], settings["sigma_max"]) == (126, "linear", 3.0)
    changed = json.loads(run(*given, "--method", "stages", "--pairs", 20, "--device", "cpu"))
    assert changed["settings"]["elimination"]["stage_pairs"] == [2, 20]
    assert changed["settings"]["estimator"]["spacing"] == "linear"

    sampled = load_run(file, device="cpu", recipe="zeroshot/cifar10")
    plain = load_run(file, device="cpu", recipe="zeroshot/cifar10", overrides=["adapter=none"])
    assert torch.equal(sampled.sample(2, steps=3), plain.sample(2, steps=3))
