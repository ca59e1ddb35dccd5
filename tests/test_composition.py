"""Plugins together: a denoiser of one steered by a classifier of another, through the one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cdm_core import load_run
from cdm_core.cli import cli
from cdm_plugins_guidance.classifiers import load_classifier
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.guide_configs import ClassifierConfig

CDM = ["channels=16", "ch_mult=[1,2]", "num_res_blocks=1", "attn_resolutions=[4]", "norm_groups=4"]
CDM += ["decoder=false", "noise_steps=50"]
SMALL = ["train.steps=60", "train.batch_size=32", "train.validate_every=0"]


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def sets(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Barely trained: an unconditional CDM, a class-conditional one, and a classifier of clean images."""
    folder = tmp_path_factory.mktemp("runs")
    model = [f"model.{text}" for text in CDM]
    run("--plugin", "cdm", "train", "--out", folder / "cdm", *sets(*model, *SMALL))
    conditional = sets(*model, *SMALL, "model.conditional=true")
    run("--plugin", "cdm", "train", "--out", folder / "conditional", *conditional)
    judge = ["--plugin", "guidance", "train", "--recipe", "digits-judge"]
    run(*judge, "--out", folder / "classifier", *sets("model.widths=[16,32]", *SMALL))
    return folder


def sampled(path: Path, out: Path, *words: object) -> tuple[torch.Tensor, Any]:
    """The samples in model units, and what was said of them."""
    found = json.loads(run("sample", path, "--num", 20, "--steps", 15, "--out", out, "--json", *words))
    with np.load(out / "samples.npz") as kept:
        pixels = torch.from_numpy(kept["samples"]).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, found


def of_class(classifier: Path, x0: torch.Tensor, label: int) -> float:
    """Mean log-probability of a class."""
    return float(load_run(classifier, device="cpu").classify(x0).log_softmax(1)[:, label].mean())


def test_a_classifier_steers_an_unconditional_cdm(runs: Path, tmp_path: Path) -> None:
    plain, _ = sampled(runs / "cdm", tmp_path / "plain")
    guide = ["--adapter", "guide", *sets(f"adapter.classifier.name=run:{runs / 'classifier'}")]
    guided, found = sampled(
        runs / "cdm", tmp_path / "guided", "--label", 7, *guide, *sets("adapter.scale=60")
    )
    assert found["adapter"]["name"] == "guidance/guide"
    assert of_class(runs / "classifier", guided, 7) > of_class(runs / "classifier", plain, 7) + 0.1


def test_a_cdms_own_posterior_steers(runs: Path, tmp_path: Path) -> None:
    """Bayes' rule on class-conditional densities knows the noise level: it may look at x_t itself."""
    guide = ["--adapter", "adm-ddim", *sets(f"adapter.classifier.name=run:{runs / 'conditional'}")]
    plain, _ = sampled(runs / "cdm", tmp_path / "plain")
    guided, _ = sampled(runs / "cdm", tmp_path / "guided", "--label", 7, *guide, *sets("adapter.scale=200"))
    assert of_class(runs / "conditional", guided, 7) > of_class(runs / "conditional", plain, 7) + 0.3


def test_torchvisions_classifier_steers(runs: Path, tmp_path: Path) -> None:
    """To what the very network, its ReLUs as they were, takes for the class: untrained, it is weak."""
    models = pytest.importorskip("torchvision.models")
    name, file = "torchvision:resnet18", tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=10).state_dict(), file)
    settings = [f"classifier.name={name}", f"classifier.weights={file}", "scale=1000"]
    guide = ["--adapter", "elucd", *sets(*(f"adapter.{text}" for text in settings))]
    guided, _ = sampled(runs / "cdm", tmp_path / "guided", "--sampler", "ddpm", "--label", 7, *guide)
    plain, _ = sampled(runs / "cdm", tmp_path / "plain", "--sampler", "ddpm")
    network = Guide(load_classifier(ClassifierConfig(name, weights=str(file))))
    with torch.no_grad():
        rise = network.logits(guided).log_softmax(1) - network.logits(plain).log_softmax(1)
    assert float(rise[:, 7].mean()) > 0.05


def test_a_chain_that_does_not_fit_is_explained_before_any_work(runs: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    said = run("sample", runs / "cdm", "--adapter", "elucd", *out, code=2)
    assert said.count("\n") == 1
    assert "the adapter 'guidance/elucd' needs `class_logits`, which the model does not provide" in said
    assert "guidance/pair" in said
    said = run("sample", runs / "classifier", *out, code=2)
    assert "sampling needs `denoise`, which the model 'guidance/classifier' does not provide" in said
    look = ["--adapter", "adm", *sets(f"adapter.classifier.name=run:{runs / 'classifier'}")]
    said = run("sample", runs / "cdm", *look, *out, code=2)
    assert "look 'x_t' needs a classifier that knows the noise level" in said
    assert not (tmp_path / "out").exists()


# -- a joint model, whose head and denoiser are one network --------------------------------------------------

JOINT = ["model_channels=32", "channel_mult=[1,2]", "num_res_blocks=1", "attention_resolutions=[2]"]
JOINT += ["num_heads=2", "dropout=0.0", "head_dropout=0.0", "diffusion_steps=50"]


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Barely trained: a joint model, and one whose denoiser is told the class."""
    folder = tmp_path_factory.mktemp("joint")
    learns = ["objective.classify=noised", "objective.w_ce=1", "train.lr=2e-3", "train.ema_decay=0.9"]
    given = sets(*(f"model.{text}" for text in JOINT), *SMALL, *learns)
    run("--plugin", "joint", "train", "--out", folder / "joint", *given, *sets("train.steps=200"))
    run("--plugin", "joint", "train", "--out", folder / "told", *given, *sets("model.class_cond=true"))
    return folder


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [("adm-ddim", 10), ("universal", 10), ("representations", 300), ("representations-safe", 30)],
)
def test_a_joint_head_steers_its_own_denoiser(joint: Path, tmp_path: Path, adapter: str, scale: int) -> None:
    """As the guide of plugin guidance, on x_t or through the denoiser; and by the plugin's own means."""
    guide = ["--adapter", adapter, *sets(f"adapter.scale={scale}")]
    plain, _ = sampled(joint / "joint", tmp_path / "plain", "--label", "none")
    guided, found = sampled(joint / "joint", tmp_path / "guided", "--label", 7, *guide)
    assert found["adapter"]["name"].endswith(f"/{adapter}")
    assert of_class(joint / "joint", guided, 7) > of_class(joint / "joint", plain, 7) + 0.1


def test_a_joint_denoiser_classifies_without_its_head(joint: Path) -> None:
    given = ["--limit", 4, "--pairs", 8, "--json"]
    found = json.loads(run("zeroshot", "classify", joint / "told", *given))
    assert found["n"] == 4
    assert all(len(image["scores"]) == 10 for image in found["images"])
    said = run("zeroshot", "classify", joint / "joint", *given, code=2)
    assert said.count("\n") == 1  # an unconditional denoiser has no opinion of classes
