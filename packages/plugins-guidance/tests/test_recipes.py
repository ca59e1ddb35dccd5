"""The recipes: what was published, and the default one from `train` to guided samples."""

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
from cdm_core.config import resolve
from cdm_core.manager import load_registry
from cdm_core.random import Draws
from cdm_core.settings import RunConfig
from cdm_plugins_guidance.pair import PairObjective
from cdm_plugins_guidance.pair_configs import PairObjectiveConfig


def recipe(name: str) -> RunConfig:
    return resolve(load_registry(), plugins=["guidance"], recipe=name)


@pytest.mark.parametrize(("name", "depth"), [("adm128-resnet50", 50), ("adm128-resnet101", 101)])
def test_elucd_on_adm_as_published(name: str, depth: int) -> None:
    """Ma et al. 2024: 250 steps, s = 1, Softplus 3, tau1 = 1, discount 0.5, gamma 0.3, x0 clipped."""
    config = recipe(name)
    assert config.adapter is not None
    guide = config.adapter.config
    assert (config.sampler.name, config.sample.steps, config.sample.clip) == ("core/ddpm", 250, True)
    assert (guide.look, guide.rule, guide.scale, guide.gamma) == ("x0", "mean", 1.0, 0.3)
    assert (guide.classifier.name, guide.classifier.softplus) == (f"torchvision:resnet{depth}", 3.0)
    assert (guide.guide.tau1, guide.guide.second_tau, guide.guide.input) == (1.0, 0.5, "raw")
    network = config.model.config
    assert (network.model_channels, network.num_heads, network.use_new_attention_order) == (256, 4, False)
    assert (network.learn_sigma, network.class_cond, network.noise_schedule) == (True, True, "linear")


def test_elucd_on_edm_as_published() -> None:
    """18 steps, w = 0.004, add 0.3, Softplus 5, tau2 = 0, gradients to RMS 1."""
    config = recipe("edm64-resnet101")
    assert config.adapter is not None
    guide = config.adapter.config
    assert (config.sampler.name, config.sample.steps, config.sampler.config.churn) == ("core/heun", 18, 0)
    assert (guide.look, guide.rule, guide.schedule) == ("rms", "nudge", "linear-sine")
    assert (guide.scale, guide.sine, guide.normalise) == (0.004, 0.3, "rms")
    assert (guide.classifier.softplus, guide.guide.second_tau) == (5.0, 0.0)


def test_dit_is_guided_after_its_own_guidance() -> None:
    for name in ("dit256", "dit512"):
        config = recipe(name)
        assert config.adapter is not None
        assert (config.sample.guidance, config.model.config.cfg_channels) == (0.5, 3)
        assert config.adapter.config.rule == "mean"


def test_a_pairs_loss_is_the_sum_of_two_that_share_no_weight() -> None:
    """Each half has the gradient that it would have alone."""
    from cdm_core.components import build_data, build_model

    config = resolve(load_registry(), plugins=["guidance"], overrides=["model.classifier.widths=[16,32]"])
    info = build_data(config, load_registry()).info
    model: Any = build_model(config, load_registry(), info).train()
    x0, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6)
    objective = PairObjective(PairObjectiveConfig())
    objective(model, x0, y, Draws(0, 6))["loss"].backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    shown, sigma, labels, *noised = objective.prepare(model, x0, y, Draws(0, 6))
    model.zero_grad()
    objective.denoising.loss(model.denoiser, *noised)["loss"].backward()
    objective.classification.loss(model.classifier, shown, sigma, labels)["loss"].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name])


def test_a_guide_that_does_not_fit_stops_training_before_it_starts(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run"), "--set", "adapter.name=adm"]
    result = CliRunner().invoke(cli, ["--plugin", "guidance", "train", *out])
    assert result.exit_code == 2
    assert "look 'x_t' needs a classifier that knows the noise level" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_default_recipe_trains_and_is_sampled_guided(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.stdout

    changes = ["train.batch_size=32", "train.validate_every=0", "model.classifier.widths=[16,32]"]
    sets = [word for change in changes for word in ("--set", change)]
    run("--plugin", "guidance", "train", "--steps", 40, "--out", tmp_path / "run", *sets)
    stronger = ["--set", "adapter.scale=300"]  # than the recipe's, for a classifier that has hardly learnt
    found = json.loads(run("sample", tmp_path / "run", "--num", 20, "--steps", 10, "--json", *stronger))
    assert found["adapter"]["name"] == "guidance/guide"
    with np.load(Path(found["out"]) / "samples.npz") as kept:
        assert kept["labels"].tolist() == [*range(10)] * 2
        guided = torch.from_numpy(kept["samples"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    plain = load_run(tmp_path / "run", device="cpu").sample(20, labels="none", steps=10)
    judge = load_run(tmp_path / "run", device="cpu")
    target = torch.arange(20) % 10
    likely = [float(judge.classify(x).log_softmax(1)[range(20), target].mean()) for x in (guided, plain)]
    assert likely[0] > likely[1] + 0.02


def test_a_runs_settings_run_no_code_of_their_authors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CDM_RUN_PYTHON_TARGETS", raising=False)
    named = ["--set", "adapter.classifier.name=os:getcwd", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, ["--plugin", "guidance", "train", *named])
    assert result.exit_code == 2
    assert "set the environment variable CDM_RUN_PYTHON_TARGETS=1 if you trust it" in result.output
