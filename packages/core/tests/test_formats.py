"""Converted files and `cdm-run convert`: round trip, hostile and damaged input, refusal to overwrite."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from cdm_core import formats, hookimpl
from cdm_core.cli import cli
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.manager import Registry
from cdm_core.records import CheckpointFormat, Model
from cdm_core.settings import Selection

INFO = DataInfo("toy", (2, 1, 1), 3, ("a", "b", "c"), levels=None)


@dataclass(frozen=True)
class ToyConfig:
    widths: tuple[int, ...] = (4,)
    bias: bool = True


def toy(config: ToyConfig, info: DataInfo) -> torch.nn.Module:
    return torch.nn.Linear(info.shape[0], config.widths[0], config.bias)


def read_toy(path: Path, overrides: tuple[str, ...]) -> formats.Foreign | None:
    content = formats.read_tensors(path)
    if not isinstance(content, dict) or "toy" not in content:
        return None
    values = formats.overridden({"model": {"widths": [len(content["toy"]["weight"])]}}, overrides)
    config = formats.filled(ToyConfig, values["model"], "model", "--set")
    return formats.Foreign(content["toy"], Selection("toy/toy", config), INFO, "guessed nothing")


class Plugin:
    @hookimpl
    def register_models(self) -> Any:
        return [Model("toy", "a toy", f"{__name__}:toy", ToyConfig)]

    @hookimpl
    def register_checkpoint_formats(self) -> Any:
        return [CheckpointFormat("toy", "toys", f"{__name__}:read_toy")]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry.of({"toy": Plugin()})
    monkeypatch.setattr("cdm_core.manager.load_registry", lambda no_plugins=False: registry)
    # Test files are not importable by name: hand the targets over.
    targets = {f"{__name__}:toy": toy, f"{__name__}:read_toy": read_toy}
    for kind in ("model", "checkpoint format"):
        for record in registry.components(kind).values():
            monkeypatch.setattr(type(record), "load", lambda self: targets[self.target])
    return registry


def foreign(width: int = 4) -> formats.Foreign:
    torch.manual_seed(0)
    config = ToyConfig(widths=(width,))
    return formats.Foreign(toy(config, INFO).state_dict(), Selection("toy/toy", config), INFO, "a note")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "toy.pt"
    torch.save({"toy": dict(foreign().state_dict), "epoch": 3, "optimizer": {"lr": [1e-3]}}, path)
    return path


def convert(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["convert", *map(str, arguments)])
    return result.exit_code, result.output


def test_round_trip(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "new" / "toy.safetensors"
    formats.save_converted(foreign(), path)
    model, about = formats.load_converted(path, registry)
    assert about == formats.Converted(Selection("toy/toy", ToyConfig()), INFO, "a note")
    assert torch.equal(model.weight, foreign().state_dict["weight"])
    assert os.listdir(path.parent) == ["toy.safetensors"]


def test_nothing_is_left_where_writing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "write_synced", full)
    with pytest.raises(UserError, match="No space left"):
        formats.save_converted(foreign(), tmp_path / "toy.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused_in_words(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    formats.save_converted(
        formats.Foreign(foreign(5).state_dict, Selection("toy/toy", ToyConfig()), INFO), path
    )
    with pytest.raises(UserError, match=r"does not fit the model 'toy/toy'.*size mismatch"):
        formats.load_converted(path, registry)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not made by `cdm-run convert`"),
        ({formats.KEY: "{"}, "cannot be read"),
        ({formats.KEY: "{}"}, "cannot be read"),
        (
            {formats.KEY: json.dumps({"model": {"name": "toy/toy", "wdth": 3}, "data": {}, "note": ""})},
            "wdth",
        ),
        (
            {formats.KEY: json.dumps({"model": {"name": "other/net"}, "data": {}, "note": ""})},
            "unknown plugin",
        ),
    ],
)
def test_other_safetensors_are_refused(
    registry: Registry, tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata)
    with pytest.raises(UserError, match=message):
        formats.load_converted(path, registry)


def test_command_converts(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy.safetensors"
    code, output = convert(checkpoint, "--out", out, "--json")
    assert code == 0, output
    assert json.loads(output)["parameters"] == 12
    model, about = formats.load_converted(out, registry)
    assert torch.equal(model.weight, foreign().state_dict["weight"])
    assert about.note == "guessed nothing"


def test_command_does_not_overwrite_unless_told(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy.safetensors"
    out.write_text("precious")
    code, output = convert(checkpoint, "--out", out)
    assert (code, out.read_text()) == (2, "precious")
    assert "--force" in output
    assert convert(checkpoint, "--out", out, "--force")[0] == 0
    formats.load_converted(out, registry)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


def damage(kind: str, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    if kind == "hostile":
        torch.save({"toy": Hostile()}, checkpoint)
    elif kind == "bare pickle":
        checkpoint.write_bytes(pickle.dumps(Hostile()))
    elif kind == "other":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    else:
        checkpoint.write_bytes(
            {"empty": b"", "noise": bytes(range(256)) * 9, "truncated": content[:-300]}[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("noise", "cannot be read"),
        ("truncated", "cannot be read"),
        ("hostile", "nothing in it was run"),
        ("bare pickle", "nothing in it was run"),
        ("other", "in no known checkpoint format (known: toy/toy)"),
    ],
)
def test_bad_files_cost_one_line(
    registry: Registry,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(kind, checkpoint)
    code, output = convert(checkpoint, "--out", tmp_path / "toy.safetensors")
    assert code == 2
    assert message in output
    assert output.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["toy.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "--out", "x.safetensors"], "no such file"),
        (["toy.pt", "--out", "x.bin"], "must end in .safetensors"),
        (["toy.pt", "--out", "x.safetensors", "--format", "tyo"], "toy"),
        (["toy.pt", "--out", "x.safetensors", "--set", "model.bais=false"], "bias"),
        (["toy.pt", "--out", "x.safetensors", "--set", "train.lr=1"], "model only"),
        (["toy.pt", "--out", "x.safetensors", "--set", "model.bias=false"], "does not fit"),
    ],
)
def test_bad_words_cost_one_line(
    registry: Registry,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = convert(*arguments)
    assert (code, output.count("\n")) == (2, 1)
    assert message in output
    assert sorted(os.listdir(tmp_path)) == ["toy.pt"]
