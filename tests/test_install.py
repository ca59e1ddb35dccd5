"""Core, kernels and one plugin, built as wheels and installed alone, are a working `cdm-run`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHOSEN = ("core", "kernels", "plugins-cdm")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the chosen wheels; third-party packages are linked in, ours are not."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    for package in CHOSEN:
        # Built from a copy: an in-tree build would leave its own files beside the sources.
        source = folder / "source" / package
        shutil.copytree(
            ROOT / "packages" / package, source, ignore=shutil.ignore_patterns("build", "*.egg-info")
        )
        run(
            *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder
        )
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(folder / "venv/bin/python", "-c", where, cwd=folder).strip())
    for path in {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}:
        for entry in path.iterdir():
            if not entry.name.startswith(("cdm_", "__editable__")) and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == len(CHOSEN)
    run(
        *pip,
        "--python",
        folder / "venv/bin/python",
        "install",
        "--no-deps",
        "--no-index",
        *wheels,
        cwd=folder,
    )
    return folder


@pytest.mark.slow
def test_a_partial_install_is_a_working_tool(environment: Path) -> None:
    tool = environment / "venv/bin/cdm-run"
    plugins = {entry["name"]: entry for entry in json.loads(run(tool, "plugins", "--json", cwd=environment))}
    assert set(plugins) == {"core", "cdm"}
    assert {entry["status"] for entry in plugins.values()} == {"ok"}
    run(
        tool,
        "--plugin",
        "cdm",
        "train",
        "--steps",
        2,
        "--out",
        "run",
        "--set",
        "train.batch_size=8",
        cwd=environment,
    )
    run(tool, "sample", "run", "--num", 2, "--steps", 2, "--out", "images", cwd=environment)
    assert (environment / "images/grid.png").stat().st_size > 0
    figures = json.loads(run(tool, "likelihood", "run", "--split", "test", "--json", cwd=environment))
    # Two steps from a head of zeros: the density is still almost exactly the standard normal one.
    assert 4.5 < figures["bits_per_dim"] < 5.1
