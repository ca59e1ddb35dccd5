"""Finds the plugins and keeps them from harming one another.

A plugin is an entry point of the group `cdm_run`. Each plugin, and each hook of each plugin, is loaded by
itself: what goes wrong is kept with the plugin's distribution and version (`PluginInfo.error`), what is sound
stays in use, and nothing depends on the order of installation. `CDM_RUN_STRICT=1` raises the first problem.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from cdm_core import hookspecs, records
from cdm_core.commands import COMMANDS
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.runs import RunFolder

GROUP = "cdm_run"
CORE = "core"
CORE_DISTRIBUTION = "cdm-core"

# Registration hook -> the record it must return.
REGISTERS: dict[str, type] = {
    "register_models": records.Model,
    "register_objectives": records.Objective,
    "register_samplers": records.Sampler,
    "register_adapters": records.Adapter,
    "register_datasets": records.Dataset,
    "register_metrics": records.Metric,
    "register_checkpoint_formats": records.CheckpointFormat,
    "register_recipes": records.Recipe,
    "register_commands": records.Command,
}
KINDS = tuple(record.kind for record in REGISTERS.values())  # type: ignore[attr-defined]
_ARGUMENTS = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name in REGISTERS or name.startswith("on_")
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class PluginWarning(UserWarning):
    """A plugin misbehaved and the run goes on without it."""


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from; `load()` imports it."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin: what it is, what it offers, what went wrong."""

    name: str
    distribution: str
    version: str
    error: str | None = None  # one line; None: all is well
    components: dict[str, list[str]] = field(default_factory=dict)  # kind -> full names

    @property
    def status(self) -> str:
        """`ok` or `failed`; a failed plugin may still offer what its sound hooks registered."""
        return "failed" if self.error else "ok"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: name, distribution, version, status, error, components."""
        return {**asdict(self), "status": self.status}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely misspells; swapped letters count as the least of mistakes."""
    near = difflib.get_close_matches(name, sorted(known), n=5)
    return next((n for n in near if sorted(n) == sorted(name)), near[0] if near else None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean X? (known: ...)`, as far as there is something to say.

    A known `plugin/name` is also matched by its last part.
    """
    names = sorted(known)
    if not names:
        return ""
    full = {spelling.lower(): n for n in names for spelling in (n.rpartition("/")[2], n)}
    near = nearest(name.lower(), full)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (f": did you mean {full[near]}?" if near else "") + f" (known: {listed})"


def _one_line(error: BaseException) -> str:
    """Type, message and the place that raised, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


class _Manager(pluggy.PluginManager):
    """pluggy, which would refuse a whole plugin for one wrong hook, made to skip that hook and note why."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        self.skipped: list[str] = []  # why hooks of the plugin being registered were skipped

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        options = super().parse_hookimpl_opts(plugin, name)
        problem = None
        if options is not None:
            problem = _hook_problem(options.get("specname") or name, getattr(plugin, name), options)
        elif name in _ARGUMENTS and inspect.isroutine(getattr(plugin, name, None)):
            problem = f"{name} is not marked @hookimpl, so it would never be called"
        if problem:
            self.skipped.append(problem)
            return None
        return options


def _hook_problem(hook: str, function: Callable[..., object], options: Mapping[str, Any]) -> str | None:
    if hook not in _ARGUMENTS:
        near = nearest(hook, _ARGUMENTS)
        guess = f"did you mean {near}?" if near else f"the hooks are {', '.join(_ARGUMENTS)}"
        return f"unknown hook {hook!r}: {guess}"
    if options.get("wrapper") or options.get("hookwrapper"):
        return f"{hook} is a hook wrapper, which could change what other plugins register"
    wanted = _ARGUMENTS[hook]
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    wrong = [name for name in required if name not in wanted]
    if wrong:
        accepts = f"takes {', '.join(wanted)}" if wanted else "takes no argument"
        return f"{hook}({', '.join(required)}) has a wrong argument, {', '.join(wrong)}: it {accepts}"
    return None


def _record_problem(record: Any, wanted: type) -> str | None:
    """Why `record` is not a usable `wanted`, or None."""
    if not isinstance(record, wanted):
        return f"returned {record!r:.80}, not a cdm_core.records.{wanted.__name__}"
    if not isinstance(record.name, str) or not _NAME.fullmatch(record.name):  # type: ignore[attr-defined]
        return f"{record.name!r} is not a name (letters, digits and + . _ -)"  # type: ignore[attr-defined]
    if isinstance(record, records.Recipe):
        if isinstance(record.values, Mapping):
            return None
        return f"recipe {record.name!r}: values must be a mapping, not {record.values!r:.80}"
    return _component_problem(record)  # type: ignore[arg-type]


def _component_problem(record: records.Component) -> str | None:
    where = f"{record.kind} {record.name!r}"
    if not isinstance(record.target, str) or not _TARGET.fullmatch(record.target):
        return f"{where}: target must read 'module:attribute', not {record.target!r:.80}"
    if record.config is not None and not (isinstance(record.config, type) and is_dataclass(record.config)):
        return f"{where}: config must be a dataclass, not {record.config!r:.80}"
    if record.config is not None and "name" in {f.name for f in fields(record.config)}:
        return f"{where}: its config has a field `name`, which is the key that names the component itself"
    for name in ("provides", "requires"):
        value = getattr(record, name)
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            return f"{where}: {name} must be a tuple of capability names, not {value!r:.80}"
    return None


class Observers:
    """The lifecycle hooks. Each observer is called by itself: its exception becomes one warning."""

    def __init__(self, manager: pluggy.PluginManager, strict: bool) -> None:
        self._manager, self._strict = manager, strict
        self._warned: set[tuple[str, str]] = set()

    def on_run_start(self, folder: RunFolder) -> None:
        """Training is about to take its first step."""
        self._tell("on_run_start", folder=folder)

    def on_log(self, folder: RunFolder, step: int, scalars: Mapping[str, float]) -> None:
        """A line was written to `metrics.jsonl`; observers see a read-only copy of it."""
        self._tell("on_log", folder=folder, step=step, scalars=MappingProxyType(dict(scalars)))

    def on_run_end(self, folder: RunFolder, step: int) -> None:
        """Training ended."""
        self._tell("on_run_end", folder=folder, step=step)

    def _tell(self, hook: str, **arguments: Any) -> None:
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                if self._strict:
                    raise
                if (impl.plugin_name, hook) not in self._warned:
                    self._warned.add((impl.plugin_name, hook))
                    text = f"plugin {impl.plugin_name!r}: {hook} raised {_one_line(error)}; the run goes on"
                    warnings.warn(text, PluginWarning, stacklevel=3)


class Registry:
    """Every plugin and what each registered, by kind and full name `plugin/name`.

    Kinds: model, objective, sampler, adapter, dataset, metric, checkpoint format, recipe, command.
    """

    def __init__(self, sources: Iterable[Source], *, strict: bool | None = None) -> None:
        self._strict = os.environ.get("CDM_RUN_STRICT") == "1" if strict is None else strict
        self._sources = sorted(sources, key=lambda s: (s.name, s.distribution, s.version))
        self._problems: dict[Source, list[str]] = defaultdict(list)
        self._components: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._manager = _Manager()
        for source in self._sources:
            self._load(source)
        for hook, record in REGISTERS.items():
            self._collect(hook, record)
        self.hook = Observers(self._manager, self._strict)
        self.plugins: list[PluginInfo] = [self._info(source) for source in self._sources]

    @classmethod
    def of(cls, plugins: Mapping[str, object], *, core: bool = True, strict: bool | None = None) -> Registry:
        """A registry of plugin objects in memory, with core's own components unless `core` is False."""
        sources = [Source(name, "in-memory", "0", lambda p=plugin: p) for name, plugin in plugins.items()]  # type: ignore[misc]
        return cls([*(installed(no_plugins=True) if core else ()), *sources], strict=strict)

    def components(self, kind: str) -> dict[str, Any]:
        """Full name -> record, in sorted order, of every component of a kind."""
        return dict(self._components[kind])

    def owner(self, full_name: str) -> PluginInfo:
        """The plugin that registered `plugin/name`."""
        return self.plugin(full_name.partition("/")[0])

    def plugin(self, name: str) -> PluginInfo:
        """The plugin of that name, failed or not; `UserError` when none is installed."""
        same = sorted((p for p in self.plugins if p.name == name), key=lambda p: p.error is not None)
        if same:
            return same[0]
        raise UserError(
            f"unknown plugin {name!r}{did_you_mean(name, {p.name for p in self.plugins})}; "
            f"plugins come as packages of their own: install the one that offers {name!r} with pip"
        )

    def ask_for(self, name: str) -> PluginInfo:
        """The plugin asked for by `--plugin`: `UserError` if unknown or unusable, a warning if partly so."""
        info = self.plugin(name)
        if info.error and not info.components:
            raise UserError(_failure(info))
        if info.error:
            warnings.warn(f"{_failure(info)}; what else it offers is in use", PluginWarning, stacklevel=2)
        return info

    def find(self, kind: str, name: str, prefer: Sequence[str] = ()) -> tuple[str, Any]:
        """(full name, record) of a component by its full or bare name.

        A bare name is taken from the first plugin of `prefer` that has it, else it must be unique. Raises
        `UserError` with the nearest name, the candidates, or why the plugin that should have it failed.
        """
        known = self._components[kind]
        if name in known:
            return name, known[name]
        candidates = [full for full in known if full.partition("/")[2] == name]
        for plugin in prefer:
            if f"{plugin}/{name}" in candidates:
                return f"{plugin}/{name}", known[f"{plugin}/{name}"]
        if len(candidates) == 1:
            return candidates[0], known[candidates[0]]
        if candidates:
            raise UserError(f"{kind} {name!r} could be {' or '.join(candidates)}: give the full name")
        raise UserError(self._unknown(kind, name, prefer))

    def provides(self, capability: str, kind: str | None = None) -> list[str]:
        """Full names of the components (of one kind, or of all) that provide a capability."""
        kinds = KINDS if kind is None else (kind,)
        return [
            full
            for k in kinds
            for full, record in self._components[k].items()
            if capability in getattr(record, "provides", ())
        ]

    def hint(self, missing: Iterable[str]) -> str:
        """Which installed components would supply the missing capabilities; empty when none would."""
        found = [(name, self.provides(name)) for name in missing]
        return "; ".join(f"`{name}` is offered by {', '.join(full)}" for name, full in found if full)

    def _unknown(self, kind: str, name: str, prefer: Sequence[str]) -> str:
        plugin, slash, _ = name.partition("/")
        text = f"unknown {kind} {name!r}"
        if slash:
            info = self.plugin(plugin)
            if info.error:
                return f"{text}: {_failure(info)}"
        text += did_you_mean(name, self._components[kind])
        if slash:
            return text
        failed = [info for info in self.plugins if info.error]
        asked = [info for info in failed if info.name in prefer]
        if asked:
            return f"{text}; {_failure(asked[0])}"
        names = ", ".join(info.name for info in failed)
        return f"{text}; or is it of a failed plugin ({names}: see `cdm-run plugins`)?" if names else text

    def _problem(self, source: Source, text: str, error: BaseException | None = None) -> None:
        if self._strict:
            raise error or UserError(f"plugin {source.name!r} ({source}): {text}")
        self._problems[source].append(text)

    def _load(self, source: Source) -> None:
        clash = self._clash(source)
        if clash:
            self._problem(source, clash)
            return
        self._manager.skipped.clear()
        try:
            plugin = source.load()
        except (Exception, SystemExit) as error:
            self._problem(source, f"cannot be imported: {_one_line(error)}", error)
            return
        try:
            self._manager.register(plugin, source.name)
        except Exception as error:
            self._problem(source, f"cannot be registered: {_one_line(error)}", error)
            return
        for text in self._manager.skipped:
            self._problem(source, text)
        if not self._manager.get_hookcallers(plugin) and not self._problems[source]:
            self._problem(source, f"{plugin!r:.80} has no function marked @hookimpl")

    def _clash(self, source: Source) -> str | None:
        """Why a plugin may not have its name. All who share a name fail, so that no order decides."""
        if not _NAME.fullmatch(source.name):
            return f"{source.name!r} is not a name (letters, digits and + . _ -)"
        if source.name in COMMANDS:
            return f"its name is that of the command `cdm-run {source.name}`"
        same = [s for s in self._sources if s.name == source.name]
        if source.name == CORE:
            ours = source.distribution == CORE_DISTRIBUTION
            return None if ours else f"the plugin name {CORE!r} belongs to {CORE_DISTRIBUTION}"
        if len(same) > 1:
            owners = " and ".join(str(s) for s in same)
            return f"the plugin name {source.name!r} is claimed by {owners}: uninstall all but one"
        return None

    def _collect(self, hook: str, wanted: type) -> None:
        """Call one registration hook of every plugin, sorted by plugin, and keep what is sound."""
        kept: dict[str, Any] = {}
        impls = getattr(self._manager.hook, hook).get_hookimpls()
        for source in self._sources:
            mine = [impl for impl in impls if impl.plugin_name == source.name]
            if not mine or self._clash(source):
                continue
            found = [record for impl in mine for record in self._call(source, hook, impl, wanted)]
            count = Counter(record.name for record in found)
            for name, times in count.items():
                if times > 1:
                    text = f"{hook}: {times} records have the name {name!r}, and none of them is used"
                    self._problem(source, text)
            kept |= {f"{source.name}/{r.name}": r for r in found if count[r.name] == 1}
        self._components[wanted.kind] = dict(sorted(kept.items()))  # type: ignore[attr-defined]

    def _call(self, source: Source, hook: str, impl: pluggy.HookImpl, wanted: type) -> list[Any]:
        try:
            result: Any = impl.function()
            sound = isinstance(result, Iterable) and not isinstance(result, str)
            found = list(result) if sound else []
        except Exception as error:
            self._problem(source, f"{hook} raised {_one_line(error)}", error)
            return []
        if not sound:
            text = f"{hook} returned {result!r:.80}, not an iterable of cdm_core.records.{wanted.__name__}"
            self._problem(source, text)
        checked = [(record, _record_problem(record, wanted)) for record in found]
        for _, problem in checked:
            if problem:
                self._problem(source, f"{hook}: {problem}")
        return [record for record, problem in checked if not problem]

    def _info(self, source: Source) -> PluginInfo:
        error = "; ".join(self._problems[source]) or None
        held = not self._clash(source)
        components = {
            kind: names
            for kind in KINDS
            if held and (names := [n for n in self._components[kind] if n.partition("/")[0] == source.name])
        }
        return PluginInfo(source.name, source.distribution, source.version, error, components)


def _failure(info: PluginInfo) -> str:
    return f"plugin {info.name!r} ({info.distribution} {info.version}) failed: {info.error}"


def installed(no_plugins: bool = False) -> list[Source]:
    """The entry points of the group `cdm_run`; with `no_plugins` only core's."""
    sources = []
    for point in metadata.entry_points(group=GROUP):
        dist = point.dist
        name = re.sub(r"[-_.]+", "-", dist.name).lower() if dist else "unknown"
        source = Source(point.name, name, dist.version if dist else "unknown", point.load)
        if not no_plugins or (source.name == CORE and name == CORE_DISTRIBUTION):
            sources.append(source)
    return sources


@cache
def load_registry(no_plugins: bool = False) -> Registry:
    """The registry of this environment, made once a process."""
    return Registry(installed(no_plugins))
