"""Released weights: their names, their head, and what their shapes do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cdm_core import load_run
from cdm_core.cli import cli
from cdm_core.data import DataInfo
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_joint.checkpoint import read_official
from cdm_plugins_joint.configs import JointConfig
from cdm_plugins_joint.model import JointModel

SMALL: dict[str, Any] = {"model_channels": 32, "num_res_blocks": 1, "head": "official", "num_heads": 4}
NETWORKS = [
    ({"channel_mult": (1, 2, 2), "attention_resolutions": (1,), "num_res_blocks": 3}, (1, 28, 28), 10),
    ({"channel_mult": (1, 2, 2, 2), "attention_resolutions": (2, 4)}, (3, 32, 32), 10),
    ({"channel_mult": (1, 2, 3, 4), "attention_resolutions": (4, 8)}, (3, 64, 64), 40),
    ({"channel_mult": (1, 2), "attention_resolutions": (2,), "use_scale_shift_norm": False}, (3, 32, 32), 7),
]


def network(changes: Any, shape: tuple[int, int, int], classes: int) -> JointModel:
    config = JointConfig(**{**SMALL, **changes, "multi_label": classes == 40})
    config.check()
    torch.manual_seed(0)
    model = JointModel(config, DataInfo("released", shape, classes))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(("changes", "shape", "classes"), NETWORKS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_the_architecture_is_read_off_the_file(
    changes: Any, shape: Any, classes: int, prefix: str, tmp_path: Path
) -> None:
    model = network(changes, shape, classes)
    path = tmp_path / "model020000_0.pt"
    torch.save({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, path)
    foreign = read_official(path, [])
    assert foreign is not None
    assert (foreign.info.shape, foreign.info.num_classes) == (shape, classes)
    found, own = foreign.model.config, model.config
    for name in (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "head",
        "multi_label",
    ):
        assert getattr(found, name) == getattr(own, name), name
    assert found.use_scale_shift_norm == own.use_scale_shift_norm
    again = JointModel(found, foreign.info)
    again.load_state_dict(dict(foreign.state_dict))
    x = normal(2, *shape)
    assert torch.equal(again.eval().class_logits(x, torch.zeros(2)), model.class_logits(x, torch.zeros(2)))


def test_a_converted_file_denoises_and_classifies(tmp_path: Path) -> None:
    """Head and all: the released sampler builds a network without it, and cannot load the file."""
    model = network(*NETWORKS[3])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    words = ["convert", tmp_path / "model.pt", "--out", tmp_path / "model.safetensors"]
    words += ["--set", "model.diffusion_steps=50"]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "The head was trained on clean images" in result.output
    run = load_run(tmp_path / "model.safetensors", device="cpu")
    x = normal(3, 3, 32, 32).tanh()
    torch.testing.assert_close(run.classify(x), model.class_logits(x, torch.zeros(3)).detach())
    assert len(run.model.sigmas) == 50


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert read_official(tmp_path / "other.pt", []) is None
