"""Golden tensors: what the official implementations compute on small random nets, for our code to agree with.

The folder is $CDM_GOLDEN_DIR (default: `shared/golden` beside the checkout). A test module names its systems
in `SYSTEMS`; each of its tests that takes `golden` runs once for every file of those systems.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(os.environ.get("CDM_GOLDEN_DIR") or Path(__file__).parents[3] / "shared" / "golden")
FORWARD, BACKWARD = 2e-5, 1e-4  # relative, float32: single forward passes; gradients and samples


class Golden:
    """One file: its metadata, its weights in float32, and its other tensors, each to be compared once."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, Any] = {key: _parsed(text) for key, text in file.metadata().items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        self.path = path
        self.inputs = {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("in/")}
        self.expected = {key: tensor for key, tensor in tensors.items() if key.startswith(("out/", "grad/"))}
        self.weights = {
            key.removeprefix("weight/"): tensor.float()
            for key, tensor in tensors.items()
            if key.startswith("weight/")
        }
        self.compared: set[str] = set()

    def compare(self, name: str, actual: Tensor, tolerance: float, floor: float = 0.0) -> None:
        """Within `tolerance` of the largest entry of the recorded tensor, everywhere.

        `floor`: the scale below which the recorded numbers are rounding errors themselves.
        """
        expected = self.expected[name]
        self.compared.add(name)
        assert actual.shape == expected.shape, name
        error = (actual.double() - expected.double()).abs().max()
        scale = expected.double().abs().max().clamp(min=floor)
        assert error <= tolerance * scale, (
            f"{name}: off by {error / scale:.1e} of its scale, allowed {tolerance}"
        )

    def assert_all_compared(self) -> None:
        """Every output and gradient of the file has been looked at."""
        assert set(self.expected) == self.compared


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _system(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("system", "").strip('"')


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    systems = metafunc.module.SYSTEMS
    paths = [path for path in sorted(FOLDER.glob("*.safetensors")) if _system(path) in systems]
    if paths:
        metafunc.parametrize("golden", paths, ids=[path.stem for path in paths], indirect=True)
    else:
        reason = f"no golden tensors of {', '.join(systems)} in {FOLDER} (set CDM_GOLDEN_DIR)"
        metafunc.parametrize("golden", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    torch.manual_seed(0)
    return Golden(request.param)
