"""Checkpoints: whole or not there; damaged ones passed over; a disk that fails."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdm_core import UserError, checkpoints
from cdm_core.checkpoints import RunFolder, safetensors_bytes, torch_bytes
from cdm_core.config import resolve
from cdm_core.manager import Registry
from cdm_core.training import train

PLUGINS = Path(__file__).parent / "plugins"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import toy_plugin

    return Registry.of({"toy": toy_plugin})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_text("config.toml", "")
    return folder


def save(folder: RunFolder, step: int, **valid: float) -> checkpoints.Checkpoint:
    state = {"weight": torch.full((3,), float(step))}
    files = {"ema.safetensors": safetensors_bytes(state), "optimizer.pt": torch_bytes({"step": step})}
    return folder.save(step, files, valid=valid)


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.checkpoints()]


def test_what_is_saved_comes_back(folder: RunFolder) -> None:
    save(folder, 10)
    save(folder, 200)
    latest = folder.latest()
    assert latest is not None
    assert latest.step == 200
    assert latest.weights("ema")["weight"].tolist() == [200.0] * 3
    assert latest.state() == {"step": 200}
    assert steps(folder) == [200, 10]
    assert not list(folder.checkpoints_path.glob(".*"))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["ema.safetensors", "optimizer.pt"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_warning(
    folder: RunFolder, harm: Callable[[Path], None], name: str
) -> None:
    save(folder, 1)
    harm(save(folder, 2).path / name)
    with pytest.warns(UserWarning, match=rf"step-00000002 \({name}.*; using step-00000001") as caught:
        latest = folder.latest()
    assert len(caught) == 1
    assert latest is not None
    assert latest.step == 1


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"step": 2'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(folder: RunFolder, text: str) -> None:
    save(folder, 1, loss=3.0)
    (save(folder, 2, loss=2.0).path / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="manifest"):
        latest = folder.latest()
    assert latest is not None
    assert latest.step == 1
    best = folder.best()
    assert best is not None
    assert best.step == 1


def test_no_good_checkpoint_at_all(folder: RunFolder) -> None:
    assert folder.latest() is None
    truncate(save(folder, 1).path / "optimizer.pt")
    with pytest.warns(UserWarning, match="there is no other"):
        assert folder.latest() is None


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_of_its_step(folder: RunFolder) -> None:
    truncate(save(folder, 2).path / "optimizer.pt")
    save(folder, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.latest() is not None


def test_pruning_keeps_the_newest_and_the_best(folder: RunFolder) -> None:
    for step, loss in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)):
        newest = save(folder, step, loss=loss)
    folder.prune(2, newest)
    assert steps(folder) == [4, 3, 2]
    best = folder.best()
    assert best is not None
    assert best.step == 2


def test_bits_per_dim_ranks_before_the_loss(folder: RunFolder) -> None:
    save(folder, 1, loss=1.0, bits_per_dim=3.0)
    save(folder, 2, loss=2.0, bits_per_dim=2.0)
    best = folder.best()
    assert best is not None
    assert best.step == 2


def test_pruning_never_deletes_the_last_good_one(folder: RunFolder) -> None:
    """Damaged checkpoints of later steps do not count as the newest to keep."""
    for step in (5, 6):
        truncate(save(folder, step).path / "optimizer.pt")
    newest = save(folder, 4)
    folder.prune(1, newest)
    with pytest.warns(UserWarning, match="using step-00000004"):
        latest = folder.latest()
    assert latest is not None
    assert latest.step == 4


@pytest.mark.parametrize("file", range(3))
def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_half_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    save(folder, 1)
    written = []
    write = checkpoints.write_synced

    def full(path: Path, content: bytes) -> None:
        if len(written) == file:
            path.write_bytes(content[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(
        UserError, match=r"step-00000002: No space left.*earlier checkpoints are intact"
    ) as caught:
        save(folder, 2)
    assert "\n" not in str(caught.value)
    assert steps(folder) == [1]
    assert folder.latest() is not None
    assert not list(folder.checkpoints_path.glob(".*"))


def test_metrics_of_a_full_disk(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    folder = RunFolder(tmp_path)
    folder.metrics_path = full
    with pytest.raises(UserError, match="No space left"):
        folder.log(1, {"loss": 1.0})


def test_a_run_cannot_live_under_a_file(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = resolve(registry, plugins=["toy"])
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        train(config, tmp_path / "file" / "run", registry=registry, device="cpu", quiet=True)
    with pytest.raises(UserError, match="is a file"):
        train(config, tmp_path / "file", registry=registry, device="cpu", quiet=True)


def test_a_disk_that_fills_during_training(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_synced

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == ".step-00000004.writing":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_synced", full)
    config = resolve(registry, plugins=["toy"], overrides=["train.steps=6", "train.checkpoint_every=2"])
    with pytest.raises(UserError, match="No space left"):
        train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    assert steps(RunFolder(tmp_path / "run")) == [2]
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(PLUGINS))
    train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    assert steps(RunFolder(tmp_path / "run")) == [6, 4, 2]


def test_a_folder_of_something_else_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"no config\.toml.*--out"):
        train(resolve(registry, plugins=["toy"]), tmp_path, registry=registry, device="cpu", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_equal_states_give_equal_bytes() -> None:
    """Also when one of them went through a file: pickle would tell them apart by the identity of strings."""
    name = "".join(["exp", "_avg"])
    state = {"state": {0: {"exp_avg": torch.ones(2), "betas": (0.9, 0.9)}, 1: {name: torch.ones(2)[:1]}}}
    content = torch_bytes(state)
    import io

    again = torch.load(io.BytesIO(content), weights_only=True)
    assert torch_bytes(again) == content
    again["state"][1][name] += 1
    assert torch_bytes(again) != content


def test_tied_weights_are_saved() -> None:
    from safetensors.torch import load

    tied = torch.arange(3.0)
    loaded = load(safetensors_bytes({"a": tied, "b": tied}))
    assert loaded["a"].tolist() == loaded["b"].tolist() == [0, 1, 2]


def test_metrics_are_strict_json_and_rewind(folder: RunFolder) -> None:
    folder.log(1, {"loss": 2.5, "norm": float("inf")})
    folder.log(2, {"loss": 1.5}, "valid")
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 3, "spl')  # killed while it wrote
    assert folder.metrics() == [
        {"step": 1, "split": "train", "loss": 2.5},
        {"step": 2, "split": "valid", "loss": 1.5},
    ]
    folder.rewind(1)
    assert [json.loads(line)["step"] for line in folder.metrics_path.read_text().splitlines()] == [1]


def test_remains_of_a_killed_write_are_removed(folder: RunFolder) -> None:
    save(folder, 1)
    (folder.checkpoints_path / ".step-00000002.writing").mkdir()
    folder.rewind(1)
    assert [path.name for path in folder.checkpoints_path.iterdir()] == ["step-00000001"]
