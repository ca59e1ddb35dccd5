"""Who may import whom: plugins -> core, kernels; core -> kernels at most; no plugin imports another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").exists())
OURS = {f"cdm_{name.replace('-', '_')}" for name in PACKAGES}


def imports(file: Path) -> set[str]:
    """Top-level names of every module that `file` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def allowed(package: str) -> set[str]:
    own = f"cdm_{package.replace('-', '_')}"
    return {own} | {"kernels": set(), "core": {"cdm_kernels"}}.get(package, {"cdm_core", "cdm_kernels"})


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_inwards(package: str) -> None:
    sources = list((ROOT / "packages" / package / "src").rglob("*.py"))
    assert sources
    wrong = {str(file.relative_to(ROOT)): imports(file) & OURS - allowed(package) for file in sources}
    assert not {file: names for file, names in wrong.items() if names}


@pytest.mark.parametrize("package", [name for name in PACKAGES if name.startswith("plugins-")])
def test_no_method_is_named_in_core(package: str) -> None:
    """Core may not know a plugin by its module or by its name as a string."""
    name = package.removeprefix("plugins-")
    pattern = re.compile(rf"cdm_plugins_{name}|[\"']{name}[\"']")
    hits = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in (ROOT / "packages/core/src").rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits
