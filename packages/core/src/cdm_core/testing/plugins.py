"""Fake plugins, sound and broken, to test what the plugin manager and the command line make of them.

    with installed(tmp_path, FakePlugin("toy", source=...), *BROKEN):
        registry = load_registry()

A fake is a real module and real metadata in a folder on `sys.path`, found as any installed plugin is; the
same folder on PYTHONPATH shows it to a subprocess. For plugins in memory see `cdm_core.manager.Registry.of`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from cdm_core.manager import load_registry

HEADER = """\
from dataclasses import dataclass

from cdm_core import hookimpl
from cdm_core.records import (
    Adapter, CheckpointFormat, Command, Dataset, Metric, Model, Objective, Recipe, Sampler
)

"""


@dataclass(frozen=True)
class FakePlugin:
    """A plugin's source (after `HEADER`, dedented) and the distribution that claims to bring it.

    `says` is a part of the error that the manager must report for it; "" for a sound one.
    """

    name: str
    source: str
    says: str = ""
    distribution: str = ""  # empty: fake-NAME
    version: str = "1.2.3"

    @property
    def project(self) -> str:
        """The distribution's name."""
        return self.distribution or f"fake-{self.name}"

    @property
    def module(self) -> str:
        """The module's name, unlike that of any real one."""
        return "_".join((self.project, self.name, "plugin")).replace("-", "_").replace(".", "_")

    def write(self, folder: Path) -> None:
        """Write module and metadata into `folder`."""
        (folder / f"{self.module}.py").write_text(HEADER + dedent(self.source), encoding="utf-8")
        info = folder / f"{self.project.replace('-', '_')}-{self.version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {self.project}\nVersion: {self.version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[cdm_run]\n{self.name} = {self.module}\n", encoding="utf-8")


GOOD = FakePlugin(
    "good",
    """
    @dataclass(frozen=True)
    class Settings:
        width: int = 8

    @hookimpl
    def register_models():
        return [Model("net", "A net", "torch.nn:Linear", Settings, provides=("denoise",))]

    @hookimpl
    def register_objectives():
        return (Objective(name, "A loss", "torch.nn:MSELoss") for name in ("mse", "l2"))
    """,
)

BROKEN = (
    FakePlugin("import-fails", "import no_such_module", says="No module named 'no_such_module'"),
    FakePlugin("exits", "raise SystemExit('no licence')", says="SystemExit: no licence"),
    FakePlugin("syntax", "def register_models(:", says="SyntaxError"),
    FakePlugin("hookless", "", says="has no function marked @hookimpl"),
    FakePlugin(
        "unmarked",
        """
        def register_models():
            return []
        """,
        says="register_models is not marked @hookimpl",
    ),
    FakePlugin(
        "hook-raises",
        """
        @hookimpl
        def register_models():
            raise RuntimeError("two\\nlines")
        """,
        says="register_models raised RuntimeError: two lines",
    ),
    FakePlugin(
        "generator-raises",
        """
        @hookimpl
        def register_models():
            yield Model("net", "A net", "torch.nn:Linear")
            raise KeyError("late")
        """,
        says="register_models raised KeyError: 'late'",
    ),
    FakePlugin(
        "returns-none",
        """
        @hookimpl
        def register_models():
            pass
        """,
        says="register_models returned None, not an iterable of cdm_core.records.Model",
    ),
    FakePlugin(
        "returns-text",
        """
        @hookimpl
        def register_models():
            return "net"
        """,
        says="register_models returned 'net', not an iterable of cdm_core.records.Model",
    ),
    FakePlugin(
        "wrong-record",
        """
        @hookimpl
        def register_models():
            return [Sampler("walk", "A sampler", "torch.nn:Linear")]
        """,
        says="not a cdm_core.records.Model",
    ),
    FakePlugin(
        "bad-target",
        """
        @hookimpl
        def register_models():
            return [Model("net", "A net", "torch.nn.Linear")]
        """,
        says="model 'net': target must read 'module:attribute', not 'torch.nn.Linear'",
    ),
    FakePlugin(
        "bad-config",
        """
        @hookimpl
        def register_models():
            return [Model("net", "A net", "torch.nn:Linear", {"width": 8})]
        """,
        says="model 'net': config must be a dataclass, not {'width': 8}",
    ),
    FakePlugin(
        "bad-provides",
        """
        @hookimpl
        def register_models():
            return [Model("net", "A net", "torch.nn:Linear", provides=("denoise"))]
        """,
        says="model 'net': provides must be a tuple of capability names, not 'denoise'",
    ),
    FakePlugin(
        "bad-name",
        """
        @hookimpl
        def register_models():
            return [Model("a/net", "A net", "torch.nn:Linear")]
        """,
        says="'a/net' is not a name",
    ),
    FakePlugin(
        "bad-recipe",
        """
        @hookimpl
        def register_recipes():
            return [Recipe("default", "A recipe", "model.width=3")]
        """,
        says="recipe 'default': values must be a mapping, not 'model.width=3'",
    ),
    FakePlugin(
        "misspelt",
        """
        @hookimpl
        def register_model():
            return []
        """,
        says="unknown hook 'register_model': did you mean register_models?",
    ),
    FakePlugin(
        "wrong-argument",
        """
        @hookimpl
        def register_models(registry):
            return []
        """,
        says="register_models(registry) has a wrong argument, registry: it takes no argument",
    ),
    FakePlugin(
        "wrong-observer",
        """
        @hookimpl
        def on_log(folder, step, scalar):
            pass
        """,
        says="on_log(folder, step, scalar) has a wrong argument, scalar: it takes folder, step, scalars",
    ),
    FakePlugin(
        "wraps",
        """
        @hookimpl(wrapper=True)
        def register_models():
            return (yield)
        """,
        says="register_models is a hook wrapper",
    ),
    FakePlugin(
        "names-clash",
        """
        @hookimpl
        def register_models():
            return [Model("net", "One", "torch.nn:Linear"), Model("net", "Two", "torch.nn:Linear")]
        """,
        says="register_models: 2 records have the name 'net'",
    ),
    FakePlugin("train", "", says="its name is that of the command `cdm-run train`"),
)


@contextmanager
def installed(folder: Path, *plugins: FakePlugin) -> Iterator[Path]:
    """`plugins` installed in `folder` (made, if need be) while the context lasts; yields the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for plugin in plugins:
        plugin.write(folder)
    sys.path.insert(0, str(folder))
    _forget()
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for plugin in plugins:
            sys.modules.pop(plugin.module, None)
        _forget()


def _forget() -> None:
    """Make imports and the registry look again."""
    importlib.invalidate_caches()
    load_registry.cache_clear()
