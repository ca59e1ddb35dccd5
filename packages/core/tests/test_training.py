"""The training loop: its numbers, its guards, what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from cdm_core import UserError, hookimpl, lr
from cdm_core.checkpoints import RunFolder
from cdm_core.commands.common import Session
from cdm_core.commands.train import train as command
from cdm_core.components import build
from cdm_core.config import from_toml, resolve
from cdm_core.data import Split
from cdm_core.ema import EMA
from cdm_core.manager import Registry
from cdm_core.random import Draws, fold
from cdm_core.settings import LRFactor, RunConfig
from cdm_core.training import bounds, order, read, train

PLUGINS = Path(__file__).parent / "plugins"
LEFT_OUT = ("split", "seconds", "images_per_second")  # the same in every line, or never the same


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import toy_plugin

    return Registry.of({"toy": toy_plugin})


def configure(registry: Registry, *overrides: str) -> RunConfig:
    return resolve(registry, plugins=["toy"], overrides=["train.steps=6", *overrides])


def figures(folder: RunFolder, split: str = "train") -> list[dict[str, Any]]:
    lines = [line for line in folder.metrics() if line["split"] == split]
    return [{k: v for k, v in line.items() if k not in LEFT_OUT} for line in lines]


def weights(folder: RunFolder, which: str = "model") -> dict[str, torch.Tensor]:
    checkpoint = folder.latest()
    assert checkpoint is not None
    return load_file(checkpoint.path / f"{which}.safetensors")


# -- learning rate -------------------------------------------------------------------------------------------


def test_learning_rate_factors_multiply() -> None:
    schedule = (LRFactor("warmup", 10), LRFactor("step", 20, 0.1))
    got = [lr.factor(step, schedule, 100) for step in (0, 4, 9, 10, 19, 20, 45)]
    assert got == pytest.approx([0.1, 0.5, 1, 1, 1, 0.1, 0.01])


def test_cosine_falls_to_its_factor_and_stays() -> None:
    schedule = (LRFactor("cosine", 0, 0.2),)
    got = [lr.factor(step, schedule, 8) for step in (0, 2, 4, 8, 20)]
    assert got == pytest.approx([1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2, 0.2])


def test_learning_rate_of_a_run_is_the_schedule(registry: Registry, tmp_path: Path) -> None:
    config = configure(registry)
    schedule = (LRFactor("warmup", 4),)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr_schedule=schedule))
    lines = figures(train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True))
    assert [line["lr"] for line in lines] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


# -- moving average ------------------------------------------------------------------------------------------


def test_ema_copies_then_averages_with_a_warm_start() -> None:
    model = torch.nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.15, start=2)
    expected = []
    for step, value in enumerate([3.0, 5.0, 7.0, 11.0]):
        torch.nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        ema.update(model, step)
        expected.append(ema.module.weight.item())
    # Decays of the averages are min(0.15, 1/10) and min(0.15, 2/11).
    third = 0.1 * 5 + 0.9 * 7
    assert expected == pytest.approx([3, 5, third, 0.15 * third + 0.85 * 11])
    assert ema.module.running_mean.item() == 11
    assert not ema.module.training
    assert not ema.module.weight.requires_grad


def test_ema_of_half_precision_weights_is_float32() -> None:
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    ema = EMA(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema.module.weight.fill_(0.0)
    ema.update(model, 3)  # decay 4/13
    assert ema.module.weight.dtype == torch.float32
    assert ema.module.weight.item() == pytest.approx(9 / 13)


def test_ema_in_a_checkpoint_follows_the_weights(registry: Registry, tmp_path: Path) -> None:
    config = configure(registry, "train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    folder = train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    average = build(config, registry).model.state_dict()["conv.weight"]
    for checkpoint in reversed(folder.checkpoints()):
        decay = checkpoint.step / (9 + checkpoint.step)
        average = decay * average + (1 - decay) * checkpoint.weights("model")["conv.weight"]
        torch.testing.assert_close(checkpoint.weights("ema")["conv.weight"], average)


# -- rows and draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "parts"), [(8, 2), (7, 3), (2, 3)])
def test_bounds_cut_every_row_once(total: int, parts: int) -> None:
    rows = [row for index in range(parts) for row in range(*bounds(total, parts, index))]
    assert rows == list(range(total))


def test_order_is_a_new_permutation_each_epoch_and_wastes_no_image() -> None:
    batches = list(order(10, 4, seed=3, steps=range(5), rows=slice(0, 4)))
    seen = [image for batch in batches for image in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_order_starts_anywhere_and_is_cut_by_rows() -> None:
    whole = list(order(10, 4, 3, range(6), slice(0, 4)))
    assert list(order(10, 4, 3, range(2, 6), slice(0, 4))) == whole[2:]
    assert list(order(10, 4, 3, range(6), slice(1, 3))) == [batch[1:3] for batch in whole]


# -- the step ------------------------------------------------------------------------------------------------


def test_first_steps_are_those_of_plain_pytorch(registry: Registry, tmp_path: Path) -> None:
    """The loop against a loop written out: the same rows, draws, Adam and weights."""
    config = configure(registry, "train.steps=5", "seed=7")
    folder = train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    model, objective, data = build(config, registry)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step, images in enumerate(order(37, 8, 7, range(5), slice(0, 8))):
        pixels, labels = data.split("train").__getitems__(images)
        x0 = data.info.to_model(pixels, Draws(fold(7, "pixels", step), 8), train=True)
        loss = objective(model, x0, labels, Draws(fold(7, "train", step), 8))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [line["loss"] for line in figures(folder)] == losses
    for name, value in weights(folder).items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_gradient_accumulation_is_the_whole_batch(
    registry: Registry, tmp_path: Path, micro_batches: int
) -> None:
    overrides = ["train.clip_norm=0.5", "train.precision=no"]
    one = train(configure(registry, *overrides), tmp_path / "1", registry=registry, device="cpu", quiet=True)
    config = configure(registry, *overrides, f"train.micro_batches={micro_batches}")
    many = train(config, tmp_path / "n", registry=registry, device="cpu", quiet=True)
    for split in ("train", "valid"):
        for a, b in zip(figures(one, split), figures(many, split), strict=True):
            assert a == pytest.approx(b, rel=2e-6)
    for name, value in weights(one, "ema").items():
        if name != "calls":
            torch.testing.assert_close(value, weights(many, "ema")[name], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step_that_sgd_would_take(registry: Registry, tmp_path: Path) -> None:
    plain = figures(train(configure(registry), tmp_path / "a", registry=registry, device="cpu", quiet=True))
    clipped_config = configure(registry, "train.clip_norm=1e-12")
    clipped = figures(train(clipped_config, tmp_path / "b", registry=registry, device="cpu", quiet=True))
    # The logged norm is before clipping; Adam's eps (1e-8) swallows a gradient of 1e-12.
    assert clipped[0]["grad_norm"] == plain[0]["grad_norm"] > 1e-3
    before = build(clipped_config, registry).model.state_dict()["conv.weight"]
    after = weights(RunFolder(tmp_path / "b"))["conv.weight"]
    assert (
        (after - before).abs().max()
        < 1e-5
        < (weights(RunFolder(tmp_path / "a"))["conv.weight"] - before).abs().max()
    )


def test_weights_outside_the_loss_stay(registry: Registry, tmp_path: Path) -> None:
    folder = train(configure(registry), tmp_path / "run", registry=registry, device="cpu", quiet=True)
    assert torch.equal(weights(folder)["unused"], torch.ones(3))


def test_bf16_computes_in_bf16_and_keeps_float32_weights(registry: Registry, tmp_path: Path) -> None:
    exact = train(configure(registry), tmp_path / "a", registry=registry, device="cpu", quiet=True)
    config = configure(registry, "train.precision=bf16")
    rough = train(config, tmp_path / "b", registry=registry, device="cpu", quiet=True)
    for a, b in zip(figures(exact), figures(rough), strict=True):
        assert a["loss"] != b["loss"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert weights(rough)["conv.weight"].dtype == torch.float32


# -- figures -------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_since_the_last(registry: Registry, tmp_path: Path) -> None:
    each = train(configure(registry), tmp_path / "a", registry=registry, device="cpu", quiet=True)
    config = configure(registry, "train.log_every=4")
    some = train(config, tmp_path / "b", registry=registry, device="cpu", quiet=True)
    losses = [line["loss"] for line in figures(each)]
    lines = figures(some)
    assert [line["step"] for line in lines] == [4, 6]
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2])


def test_validation_scores_the_whole_split_with_averaged_weights(registry: Registry, tmp_path: Path) -> None:
    config = configure(registry, "train.validate_every=3")
    folder = train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    model, objective, data = build(config, registry)
    model.load_state_dict(weights(folder, "ema"))
    model.eval()
    split = data.split("valid")
    loss = bits = labels_seen = 0.0
    for first, total in ((0, 8), (8, 3)):
        pixels, labels = split.__getitems__(list(range(first, first + total)))
        x0 = data.info.to_model(pixels, Draws(fold(0, "valid", "pixels", first), total))
        loss += objective(model, x0, labels, Draws(fold(0, "valid", first), total))["loss"].item() * total
        bits += data.info.bits_per_dim(model.log_density(x0)).sum().item()
        labels_seen += labels.sum().item()
    lines = figures(folder, "valid")
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[-1]["loss"] == pytest.approx(loss / 11, rel=1e-6)
    assert lines[-1]["bits_per_dim"] == pytest.approx(bits / 11, rel=1e-6)
    assert lines[-1]["label_mean"] == pytest.approx(labels_seen / 11)


def test_validation_does_not_disturb_training(registry: Registry, tmp_path: Path) -> None:
    runs = [
        train(configure(registry, f"train.validate_every={every}"), tmp_path / str(every), registry=registry,
              device="cpu", quiet=True)
        for every in (1, 6)
    ]  # fmt: skip
    assert figures(runs[0]) == figures(runs[1])


def test_tensorboard_holds_the_figures(registry: Registry, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(configure(registry), tmp_path / "run", registry=registry, device="cpu", quiet=True)
    events = EventAccumulator(str(folder.tensorboard_path))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in figures(folder)]


def test_the_folder_describes_the_run(registry: Registry, tmp_path: Path) -> None:
    folder = train(configure(registry), tmp_path / "run", registry=registry, device="cpu", quiet=True)
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["processes"] == 1
    plugins = {plugin["name"]: plugin for plugin in json.loads((folder.path / "plugins.json").read_text())}
    assert plugins["toy"]["components"]["model"] == ["toy/energy", "toy/mute"]
    again = resolve(registry, config_file=folder.config_path)
    assert again == dataclasses.replace(configure(registry), recipe=again.recipe)
    assert (folder.samples_path / "step-00000006.png").read_bytes().startswith(b"\x89PNG")


def test_observers_see_the_run_and_cannot_change_it(registry: Registry, tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    class Watcher:
        @hookimpl
        def on_run_start(self, folder: RunFolder) -> None:
            seen.append(("start", folder.latest()))

        @hookimpl
        def on_log(self, step: int, scalars: dict[str, float]) -> None:
            seen.append(("log", step))

        @hookimpl
        def on_run_end(self, folder: RunFolder, step: int) -> None:
            latest = folder.latest()
            seen.append(("end", latest and latest.step))

    import toy_plugin

    watched = Registry.of({"toy": toy_plugin, "watch": Watcher()})
    config = configure(watched, "train.steps=2", "train.validate_every=0")
    train(config, tmp_path / "run", registry=watched, device="cpu", quiet=True)
    assert seen == [("start", None), ("log", 1), ("log", 2), ("log", 2), ("end", 2)]


# -- guards --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    registry: Registry, tmp_path: Path
) -> None:
    config = configure(registry, "objective.poison=4", "train.checkpoint_every=2")
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    assert "step 5:" in str(caught.value)
    assert str(fold(0, "train", 4)) in str(caught.value)
    folder = RunFolder(tmp_path / "run")
    latest = folder.latest()
    assert latest is not None
    assert latest.step == 4
    assert all(value.isfinite().all() for value in latest.weights("ema").values())
    assert [line["step"] for line in figures(folder)] == [1, 2, 3, 4]
    assert not list(folder.checkpoints_path.glob(".*"))


def test_a_model_that_lacks_a_capability_is_refused_and_another_named(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"toy/score.*`denoise`.*toy/mute.*offered by toy/energy"):
        train(configure(registry, "model.name=mute"), tmp_path / "run", registry=registry, quiet=True)
    assert not (tmp_path / "run").exists()


def test_too_few_rows_for_the_micro_batches(registry: Registry, tmp_path: Path) -> None:
    config = configure(registry)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=9))
    with pytest.raises(UserError, match="micro_batches"):
        train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)


def test_fp16_needs_a_gpu(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16"):
        train(configure(registry, "train.precision=fp16"), tmp_path / "run", registry=registry, device="cpu")


def test_progress_bar_on_a_terminal(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(configure(registry), tmp_path / "run", registry=registry, device="cpu")
    text = capsys.readouterr().err
    assert "100%" in text
    assert "6/6" in text
    assert "loss=" in text


# -- the command ---------------------------------------------------------------------------------------------


def invoke(registry: Registry, *arguments: str) -> str:
    session = Session(plugins=("toy",))
    vars(session)["registry"] = registry
    result = CliRunner().invoke(command, ["--device", "cpu", *arguments], obj=session, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_dry_run_prints_a_plan_that_can_be_run_and_writes_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = invoke(registry, "--dry-run", "--steps", "3", "--seed", "5", "--set", "train.lr=0.5")
    config = from_toml(plan, registry)
    assert (config.train.steps, config.seed, config.train.lr) == (3, 5, 0.5)
    assert "92 parameters; data 1x4x4" in plan
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_into_a_folder_named_after_the_recipe(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = json.loads(invoke(registry, "--steps", "2", "--json"))
    folder = RunFolder("runs/default")
    assert report["run"] == "runs/default"
    assert report["step"] == report["best_step"] == 2
    assert report["valid"]["bits_per_dim"] == figures(folder, "valid")[-1]["bits_per_dim"]
    table = invoke(registry, "--steps", "2")
    assert "cdm-run report runs/default" in table
    assert f"{report['valid']['bits_per_dim']:.4g}" in table


def test_progress_lines_where_there_is_no_terminal(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure(registry, "train.log_every=3"), tmp_path / "run", registry=registry, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 3/6", "train"], ["step 6/6", "train"], ["step 6/6", "valid"]
    ]  # fmt: skip
    assert "loss" in lines[0]
    assert "images_per_second" in lines[0]


class Unreadable(Split):
    """A split whose images are all damaged."""

    def __len__(self) -> int:
        return 4

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, None]:
        raise UserError(f"cannot read image {indices[0]}: it is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_in_a_reading_process_too(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(read(Unreadable(), [[2, 3]], workers, pin=False))
    assert str(caught.value) == "cannot read image 2: it is damaged"
