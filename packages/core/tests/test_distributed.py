"""Two processes (gloo, on this machine) against one, at the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdm_core.checkpoints import RunFolder

PLUGINS = Path(__file__).parent / "plugins"
# c10d on port 0: torchrun picks a free port itself.
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
)


# The command line, its steps compiled for eager operations: right numbers without the seconds of a compiler.
QUICKLY_COMPILED = """
from functools import partial
import cdm_core.training
from cdm_core.cli import main
from cdm_core.compiled import CompiledObjective
cdm_core.training.CompiledObjective = partial(CompiledObjective, backend="aot_eager")
main()
"""


def launch(
    processes: int, out: Path, *overrides: str, program: tuple[str, ...] = ("-m", "cdm_core")
) -> subprocess.CompletedProcess[str]:
    settings = [part for setting in overrides for part in ("--set", setting)]
    return subprocess.run(
        [
            *(sys.executable, *(TORCHRUN if processes == 2 else ()), *program),
            *("--plugin", "toy", "train", "--device", "cpu", "--out", str(out), *settings),
        ],
        env={**os.environ, "PYTHONPATH": str(PLUGINS), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    """A loss differentiated twice, micro-batches, an odd batch, a weight outside the loss, and a resume."""
    settings = ["train.batch_size=9", "train.micro_batches=3", "train.validate_every=4", "train.log_every=3"]
    one = launch(1, tmp_path / "1", "train.steps=14", *settings)
    assert one.returncode == 0, one.stderr
    for steps in (7, 14):
        two = launch(2, tmp_path / "2", f"train.steps={steps}", "train.checkpoint_every=7", *settings)
        assert two.returncode == 0, two.stderr
    assert "resuming after step 7" in two.stderr
    assert two.stdout.count("Next:") == 1  # one process speaks

    runs = [RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")]
    curves = [{(line["split"], line["step"]): line["loss"] for line in run.metrics()} for run in runs]
    shared = sorted(curves[0].keys() & curves[1].keys())
    # Lines of step 7, where the first sitting ended, and of step 9, which follows it, average other steps.
    compared = [key for key in shared if key != ("train", 9)]
    assert len(compared) == 4 + 4
    for key in compared:
        assert curves[1][key] == pytest.approx(curves[0][key], abs=1e-5), key
    checkpoints = [run.checkpoints()[0] for run in runs]
    for which in ("model", "ema"):
        two_weights = checkpoints[1].weights(which)  # type: ignore[arg-type]
        for name, value in checkpoints[0].weights(which).items():  # type: ignore[arg-type]
            if name != "calls":
                torch.testing.assert_close(two_weights[name], value, rtol=1e-4, atol=1e-5)
    assert two_weights["unused"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_every_process(tmp_path: Path) -> None:
    done = launch(2, tmp_path / "run", "train.steps=9", "objective.poison=4", "train.checkpoint_every=2")
    assert done.returncode != 0
    assert "step 5: the loss or its gradient is not finite" in done.stderr
    assert [checkpoint.step for checkpoint in RunFolder(tmp_path / "run").checkpoints()] == [4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["trace", "whole"])
def test_two_processes_compile_what_one_computes(tmp_path: Path, recipe: str) -> None:
    """Micro-batches of one and of two images, a weight outside the loss; against one process in eager."""
    (tmp_path / "program.py").write_text(QUICKLY_COMPILED)
    settings = ["objective.name=split", "train.steps=6", "train.batch_size=9", "train.micro_batches=3"]
    one = launch(1, tmp_path / "1", *settings)
    assert one.returncode == 0, one.stderr
    program = (str(tmp_path / "program.py"),)
    two = launch(2, tmp_path / "2", *settings, f"train.compile={recipe}", program=program)
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("compiled in ") == 1  # one process speaks
    curves = [
        {(line["split"], line["step"]): line["loss"] for line in RunFolder(tmp_path / name).metrics()}
        for name in ("1", "2")
    ]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    weights = [RunFolder(tmp_path / name).checkpoints()[0].weights("model") for name in ("1", "2")]
    assert weights[1]["unused"].tolist() == [1, 1, 1]
    for name, value in weights[0].items():
        if name != "calls":
            torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
