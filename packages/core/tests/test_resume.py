"""The same command again: bit for bit what an uninterrupted run would have been."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm_core import UserError
from cdm_core.checkpoints import RunFolder
from cdm_core.config import resolve
from cdm_core.manager import Registry
from cdm_core.settings import RunConfig
from cdm_core.training import train

PLUGINS = Path(__file__).parent / "plugins"
LEFT_OUT = ("seconds", "images_per_second")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import toy_plugin

    return Registry.of({"toy": toy_plugin})


def figures(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in LEFT_OUT} for line in folder.metrics()]


def hashes(folder: RunFolder, step: int) -> dict[str, str]:
    path = folder.checkpoints_path / f"step-{step:08d}"
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}


# Dropout, the flip of the data, log lines that straddle the checkpoint and an odd number of images: all that
# could make a difference.
SETTINGS = (
    "model.dropout=0.3",
    "train.log_every=3",
    "train.validate_every=5",
    "train.checkpoint_every=10",
    "train.micro_batches=2",
    "train.clip_norm=1.0",
)


def command(out: Path, *more: str) -> list[str]:
    overrides = [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]
    return [
        *(sys.executable, "-m", "cdm_core", "--plugin", "toy", "train", "--device", "cpu"),
        *("--steps", "20", "--out", str(out), *overrides),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PLUGINS), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_twenty_steps_equal_ten_a_kill_and_ten(tmp_path: Path) -> None:
    whole = subprocess.run(command(tmp_path / "whole"), env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr

    # Step 13 of the run to be killed waits for ever, so that the kill comes between two checkpoints.
    waiting = {**environment(), "TOY_PLUGIN_WAIT": "13"}
    with subprocess.Popen(command(tmp_path / "cut"), env=waiting, stderr=subprocess.PIPE) as process:
        folder = RunFolder(tmp_path / "cut")
        for _ in range(1200):
            if [line for line in folder.metrics() if line["step"] == 12] or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [checkpoint.step for checkpoint in folder.checkpoints()] == [10]

    again = subprocess.run(command(tmp_path / "cut"), env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 10" in again.stderr
    uninterrupted = RunFolder(tmp_path / "whole")
    assert hashes(folder, 10) == hashes(uninterrupted, 10)
    assert hashes(folder, 20) == hashes(uninterrupted, 20)
    assert figures(folder) == figures(uninterrupted)

    finished = subprocess.run(
        [*command(tmp_path / "cut"), "--json"], env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0
    assert "has its 20 steps already" in finished.stderr
    assert json.loads(finished.stdout)["step"] == 20
    assert figures(folder) == figures(uninterrupted)


def configure(registry: Registry, *overrides: str) -> RunConfig:
    return resolve(registry, plugins=["toy"], overrides=["train.checkpoint_every=2", *overrides])


def run(registry: Registry, out: Path, *overrides: str) -> RunFolder:
    return train(configure(registry, *overrides), out, registry=registry, device="cpu", quiet=True)


def test_a_truncated_newest_checkpoint_loses_nothing_else(registry: Registry, tmp_path: Path) -> None:
    whole = run(registry, tmp_path / "whole", "train.steps=8")
    cut = run(registry, tmp_path / "cut", "train.steps=6")
    newest = cut.checkpoints()[0].path / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="using step-00000004") as caught:
        run(registry, tmp_path / "cut", "train.steps=8")
    assert len([w for w in caught if "damaged" in str(w.message)]) == 1
    assert hashes(cut, 8) == hashes(whole, 8)
    assert cut.latest() is not None
    trains = [[line for line in figures(f) if line["split"] == "train"] for f in (cut, whole)]
    assert trains[0] == trains[1]


def test_more_steps_extend_a_finished_run(registry: Registry, tmp_path: Path) -> None:
    whole = run(registry, tmp_path / "whole", "train.steps=7")
    some = run(registry, tmp_path / "some", "train.steps=3")
    run(registry, tmp_path / "some", "train.steps=7", "train.keep_checkpoints=1")
    assert hashes(some, 7) == hashes(whole, 7)


def test_the_number_of_workers_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    a = run(registry, tmp_path / "a", "train.steps=3")
    b = run(registry, tmp_path / "b", "train.steps=3", "train.num_workers=1")
    assert hashes(a, 3) == hashes(b, 3)


def test_another_seed_gives_another_run(registry: Registry, tmp_path: Path) -> None:
    a = run(registry, tmp_path / "a", "train.steps=2")
    b = run(registry, tmp_path / "b", "train.steps=2", "seed=1")
    assert hashes(a, 2)["model.safetensors"] != hashes(b, 2)["model.safetensors"]


def test_other_settings_do_not_resume(registry: Registry, tmp_path: Path) -> None:
    folder = run(registry, tmp_path / "run", "train.steps=2")
    before = figures(folder)
    with pytest.raises(UserError) as caught:
        run(registry, tmp_path / "run", "train.steps=4", "train.lr=0.5", "model.width=9")
    text = str(caught.value)
    assert "model.width 8 not 9, train.lr 0.01 not 0.5" in text
    assert "--out" in text
    assert "train.steps" not in text
    assert figures(folder) == before


def test_an_edited_config_is_noticed(registry: Registry, tmp_path: Path) -> None:
    folder = run(registry, tmp_path / "run", "train.steps=2")
    folder.write_text("config.toml", folder.config_path.read_text().replace("lr = 0.01", "lr = 0.5"))
    with pytest.raises(UserError, match="was changed after step-00000002"):
        run(registry, tmp_path / "run", "train.steps=4", "train.lr=0.5")


def test_the_optimizer_state_loads_without_pickle(registry: Registry, tmp_path: Path) -> None:
    folder = run(registry, tmp_path / "run", "train.steps=3")
    state = torch.load(folder.checkpoints()[0].path / "optimizer.pt", weights_only=True)
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {3.0}
