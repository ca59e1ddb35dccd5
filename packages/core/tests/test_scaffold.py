"""`new-plugin`: what it writes is installed as a stranger would, trained and tested."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cdm_core import UserError, scaffold
from cdm_core.cli import cli
from cdm_core.config import resolve
from cdm_core.manager import load_registry

NAME = "my-method"
MODULE = "cdm_plugins_my_method"


def test_writes_five_files(tmp_path):
    written = scaffold.write(NAME, tmp_path / "p")
    found = sorted(str(p.relative_to(tmp_path / "p")) for p in (tmp_path / "p").rglob("*") if p.is_file())
    assert found == [
        "README.md",
        "pyproject.toml",
        f"src/{MODULE}/__init__.py",
        f"src/{MODULE}/method.py",
        "tests/test_my_method.py",
    ]
    assert sorted(written) == sorted(tmp_path / "p" / name for name in found)
    texts = [path.read_text() for path in written]
    assert not any("$" in text for text in texts), "a placeholder was left"
    assert f'{NAME} = "{MODULE}"' in (tmp_path / "p" / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "name", ["", "My", "1st", "a b", "a/b", "-a", "a-", "a--b", "ä", "core", "train", "../up"]
)
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a plugin"):
        scaffold.write(name, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "p").mkdir()
    scaffold.write("one", tmp_path / "p")
    before = (tmp_path / "p" / "README.md").read_text()
    with pytest.raises(UserError, match="is not an empty folder"):
        scaffold.write("two", tmp_path / "p")
    assert (tmp_path / "p" / "README.md").read_text() == before
    with pytest.raises(UserError, match="is not an empty folder"):
        scaffold.write("two", tmp_path / "p" / "README.md")


def test_command_refuses_a_taken_name(tmp_path, monkeypatch):
    scaffold.write(NAME, tmp_path / "p")
    monkeypatch.syspath_prepend(fake_install(tmp_path / "p", tmp_path / "site"))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    load_registry.cache_clear()
    try:
        result = CliRunner().invoke(cli, ["new-plugin", NAME, "--out", str(tmp_path / "q")])
        registry = load_registry()
    finally:
        load_registry.cache_clear()
        sys.modules.pop(MODULE, None)
    assert result.exit_code == 2
    assert f"a plugin '{NAME}' is installed already (cdm-plugins-my-method)" in result.stderr
    assert registry.plugin(NAME).error is None
    config = resolve(registry, plugins=[NAME])
    assert (config.model.name, config.objective.name) == (f"{NAME}/denoiser", f"{NAME}/edm")


def fake_install(source, site):
    """The package's files and metadata, put where an installer would: fast, and without one."""
    (site / f"{MODULE}-0.1.0.dist-info").mkdir(parents=True)
    (source / "src" / MODULE).rename(site / MODULE)
    info = site / f"{MODULE}-0.1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cdm-plugins-my-method\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[cdm_run]\n{NAME} = {MODULE}\n")
    return site


@pytest.mark.slow
def test_generated_plugin_installs_trains_and_passes_its_tests(tmp_path):
    site, source, run = tmp_path / "site", tmp_path / "p", tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "2", "CDM_RUN_STRICT": "1"}

    def call(*args):
        done = subprocess.run(
            [sys.executable, "-m", *args],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("cdm_core", "new-plugin", NAME, "--out", str(source))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    call("pip", "install", "-q", *offline, "--target", str(site), str(source))
    rows = {row["name"]: row for row in json.loads(call("cdm_core", "plugins", "--json"))}
    assert rows[NAME]["status"] == "ok"
    assert rows[NAME]["distribution"] == "cdm-plugins-my-method"
    assert rows[NAME]["components"] == {
        "model": [f"{NAME}/denoiser"],
        "objective": [f"{NAME}/edm"],
        "recipe": [f"{NAME}/default"],
    }
    call("cdm_core", "--plugin", NAME, "train", "--steps", "3", "--device", "cpu", "--out", str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line["split"] == "train" and line["step"] == 3 and line["loss"] > 0 for line in lines)
    out = call("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(source), str(source))
    assert " passed" in out
    assert "failed" not in out
