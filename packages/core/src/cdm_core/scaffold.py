"""Writes a new plugin: five files, one of them the method. The texts are in `templates/`."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from cdm_core import __version__
from cdm_core.commands import COMMANDS
from cdm_core.errors import UserError

# Template -> path in the new package.
FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "plugin.py.in": "src/$module/__init__.py",
    "method.py.in": "src/$module/method.py",
    "test.py.in": "tests/test_$identifier.py",
}
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def check_name(name: str) -> None:
    """Raise `UserError` unless `name` can name a plugin, its distribution and its module."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a plugin: use lower-case letters and digits, beginning with a letter, "
            "words joined by - or _ (e.g. my-method)"
        )
    if name == "core" or name in COMMANDS:
        raise UserError(f"{name!r} cannot name a plugin: cdm-run itself uses that name")


def write(name: str, out: Path) -> list[Path]:
    """Write the plugin `name` into the folder `out`, which must not exist or be empty; the paths written."""
    check_name(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give --out a new one")
    identifier = name.replace("-", "_")
    words = {
        "name": name,
        "identifier": identifier,
        "module": f"cdm_plugins_{identifier}",
        "distribution": f"cdm-plugins-{name.replace('_', '-')}",
        "core_version": __version__,
    }
    templates = resources.files("cdm_core") / "templates"
    written = []
    for template, target in FILES.items():
        path = out / Template(target).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((templates / template).read_text("utf-8")).substitute(words), "utf-8")
        written.append(path)
    return written
