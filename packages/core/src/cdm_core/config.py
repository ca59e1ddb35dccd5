"""Fills the typed settings of a run from a recipe, a TOML file and `--set`, and writes them back.

Later layers win: dataclass defaults < recipe < `--config FILE` < `--set a.b=c`. A TOML file has the top-level
keys `recipe` and `seed`, the tables `[model]`, `[objective]`, `[data]` and `[sampler]`, each with the `name`
of a component and that component's own settings, `[adapter]` alike where sampling goes through one, and
`[train]` and `[sample]`. None is a key left out, or "none" where the default is something else.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from cdm_core.errors import UserError
from cdm_core.manager import Registry, did_you_mean, nearest
from cdm_core.settings import LRFactor, RunConfig, SampleConfig, Sampling, Selection, TrainConfig

# Table of the configuration -> kind of component that it chooses.
COMPONENTS = {"model": "model", "objective": "objective", "data": "dataset", "sampler": "sampler"}
OPTIONAL = {"adapter": "adapter"}
KINDS = COMPONENTS | OPTIONAL
TABLES: dict[str, type] = {"train": TrainConfig, "sample": SampleConfig}
SAMPLING = ("sampler", "sample", "adapter")  # the tables that decide how samples are drawn
KEYS = ("recipe", "seed", *KINDS, *TABLES)
NONE = "none"

# Smallest and largest value of the settings of core's own tables; None: no limit.
_RANGES: dict[type, dict[str, tuple[float | None, float | None]]] = {
    LRFactor: {"steps": (0, None), "factor": (0, None)},
    TrainConfig: {
        "steps": (1, None),
        "batch_size": (1, None),
        "micro_batches": (1, None),
        "lr": (0, None),
        "weight_decay": (0, None),
        "ema_decay": (0, 1),
        "ema_start": (0, None),
        "log_every": (1, None),
        "validate_every": (0, None),
        "sample_every": (0, None),
        "checkpoint_every": (1, None),
        "keep_checkpoints": (1, None),
        "num_workers": (0, None),
    },
    SampleConfig: {"steps": (1, None), "batch_size": (1, None)},
}


@dataclass(frozen=True)
class _Layer:
    """Values from one place. `where` names the place in errors; bare names come from `prefer` first."""

    where: str
    values: Mapping[str, Any]
    prefer: tuple[str, ...] = ()


@dataclass
class Merged:
    """Layers laid over one another, and which of them set each dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """The place that set a dotted key (or something under it)."""
        if key in self.origin:
            return self.origin[key]
        inside = (place for k, place in self.origin.items() if k.startswith((f"{key}.", f"{key}[")))
        return next(inside, self.origin.get(key.partition("[")[0], "the configuration"))


def resolve(
    registry: Registry,
    *,
    plugins: Sequence[str] = (),
    recipe: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a run.

    Without `recipe` the base is the file's `recipe`, else the recipe `default` of the first of `plugins` (or
    the only one there is). A file that itself names its model, objective, data and sampler stands alone: its
    `recipe` is a label. `overrides` are texts `a.b=c`, c in TOML or else a bare string. Raises
    `UserError` on an unknown key, a value of the wrong type or out of range, or an unknown component.
    """
    file = _read(config_file) if config_file is not None else {}
    changes = parse_overrides(overrides)
    chosen = recipe or changes.get("recipe")
    base: list[_Layer] = []
    if chosen or not all(_names(file, table) for table in COMPONENTS):
        chosen, _ = _find_recipe(registry, chosen or file.get("recipe"), plugins)
        base = _recipe_layers(registry, chosen, plugins)
    prefer = (*plugins, *(layer.prefer[0] for layer in base[:1]))
    layers = [*base, _Layer(str(config_file), file, prefer), _Layer("--set", changes, prefer)]
    return _build(registry, layers, chosen or str(file.get("recipe", "")))


def from_toml(text: str, registry: Registry, *, where: str = "config.toml") -> RunConfig:
    """The configuration that `to_toml` wrote; its `recipe` is a label. `where` names the text in errors."""
    values = _parse(text, where)
    return _build(registry, [_Layer(where, values)], str(values.get("recipe", "")))


def to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML; `from_toml` gives back an equal one."""
    return tomli_w.dumps(to_dict(config))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as nested plain values, laid out as in the TOML file."""
    values: dict[str, Any] = {"recipe": config.recipe, "seed": config.seed}
    for table in KINDS:
        chosen: Selection | None = getattr(config, table)
        if chosen is not None:
            values[table] = _plain_selection(chosen)
    return values | {table: plain(getattr(config, table)) for table in TABLES}


def diff(a: RunConfig, b: RunConfig, *, resumable: bool = True) -> list[str]:
    """Sorted dotted keys in which two configurations differ, e.g. `train.lr`.

    With `resumable` False, those that may change between two runs of one `train` command are left out.
    """
    flat_a, flat_b = _flat(to_dict(a)), _flat(to_dict(b))
    keys = (key for key in flat_a.keys() | flat_b.keys() if flat_a.get(key) != flat_b.get(key))
    return sorted(key for key in keys if resumable or not is_resumable(key))


def is_resumable(key: str) -> bool:
    """Whether a dotted key may change between two runs of the same `train` command."""
    table, _, name = key.partition(".")
    fields = {f.name: f for f in dataclasses.fields(TABLES[table])} if table in TABLES else {}
    return name in fields and bool(fields[name].metadata.get("resumable"))


def resolve_sampling(
    registry: Registry,
    own: Sampling,
    *,
    plugins: Sequence[str] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Sampling:
    """`own` or the sampling tables of `recipe`, and over them the texts `a.b=c`.

    Raises `UserError` as `resolve` does, and on a key of another table.
    """
    if recipe is not None:
        full, _ = _find_recipe(registry, recipe, plugins)
        layers = _recipe_layers(registry, full, plugins)
        layers = [replace(layer, values=_only(layer.values, SAMPLING)) for layer in layers]
    else:
        tables: dict[str, Any] = {"sampler": _plain_selection(own.sampler), "sample": plain(own.sample)}
        if own.adapter is not None:
            tables["adapter"] = _plain_selection(own.adapter)
        layers = [_Layer("the run", tables)]
    changes = parse_overrides(overrides)
    for key in changes:
        if key not in SAMPLING:
            raise UserError(f"--set {key}: sampling has the tables {', '.join(SAMPLING)} only")
    merged = _merge(registry, [*layers, _Layer("--set", changes, tuple(plugins))])
    return Sampling(
        _select(registry, merged, "sampler", "sampler"),
        fill(SampleConfig, merged.values.get("sample", {}), "sample", merged),
        _select_optional(registry, merged, "adapter"),
    )


def _only(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in keys}


# Layers ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not a text in UTF-8") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from error


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`a.b=c` texts as one nested dictionary."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"--set {text}: write KEY=VALUE, e.g. --set train.lr=1e-4")
        table = values
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {text}: {part!r} was given a value by another --set")
        table[parts[-1]] = _value(value.strip())
    return values


def _value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _find_recipe(registry: Registry, name: Any, plugins: Sequence[str]) -> tuple[str, Any]:
    if name is not None and not isinstance(name, str):
        raise UserError(f"recipe must be the name of a recipe, not {name!r}")
    if name:
        return registry.find("recipe", name, plugins)
    if plugins:
        # The first plugin's own default or an error: another's would be a surprise.
        return registry.find("recipe", f"{plugins[0]}/default")
    known = registry.components("recipe")
    if sum(full.endswith("/default") for full in known) != 1:
        names = ", ".join(known) or "none is installed"
        raise UserError(f"which recipe? say --recipe NAME, or --plugin NAME for its default (known: {names})")
    return registry.find("recipe", "default")


def _recipe_layers(registry: Registry, full: str, plugins: Sequence[str]) -> list[_Layer]:
    """The recipe and those it builds on by its key `base`, deepest first."""
    layers: list[_Layer] = []
    seen: list[str] = []
    name: str | None = full
    plugin = full.partition("/")[0]
    while name is not None:
        if name in seen:
            circle = " -> ".join([*seen, name])
            raise UserError(f"recipe {full}: its `base` goes round in a circle ({circle})")
        seen.append(name)
        _, record = registry.find("recipe", name)
        values = {key: value for key, value in record.values.items() if key != "base"}
        layers.insert(0, _Layer(f"recipe {name}", values, (plugin, *plugins)))
        base = record.values.get("base")
        name = f"{plugin}/{base}" if base else None
    return layers


def _names(values: Mapping[str, Any], table: str) -> bool:
    chosen = values.get(table)
    return isinstance(chosen, str) or (isinstance(chosen, Mapping) and "name" in chosen)


def _merge(registry: Registry, layers: Sequence[_Layer]) -> Merged:
    merged = Merged()
    for layer in layers:
        for key, value in layer.values.items():
            if key not in KEYS:
                raise UserError(f"unknown key {key!r} in {layer.where}{did_you_mean(key, KEYS)}")
            if key in OPTIONAL and value == NONE:
                merged.values.pop(key, None)
            elif key in KINDS:
                _merge_component(registry, merged, layer, key, value)
            elif key != "recipe":
                _lay(merged, merged.values, layer.where, key, key, value)
    return merged


def _merge_component(registry: Registry, merged: Merged, layer: _Layer, table: str, value: Any) -> None:
    """Lay a component's table over what is there; another component's settings do not carry over."""
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise UserError(f"{table} in {layer.where} must be a table with a `name`, not {value!r}")
    if "name" in value:
        full, _ = _named(registry, layer, table, value["name"])
        if merged.values.get(table, {}).get("name") != full:
            merged.values[table] = {}
            merged.origin = {k: v for k, v in merged.origin.items() if not k.startswith(f"{table}.")}
        value = {**value, "name": full}
    target = merged.values.setdefault(table, {})
    for key, item in value.items():
        _lay(merged, target, layer.where, f"{table}.{key}", key, item)


def _named(registry: Registry, layer: _Layer, table: str, name: Any) -> tuple[str, Any]:
    if not isinstance(name, str):
        raise UserError(f"{table}.name in {layer.where} must be a string, not {name!r}")
    try:
        return registry.find(KINDS[table], name, layer.prefer)
    except UserError as error:
        raise UserError(f"{table}.name in {layer.where}: {error}") from error


def _lay(merged: Merged, target: dict[str, Any], where: str, dotted: str, key: str, value: Any) -> None:
    """target[key] = value, tables merged key by key, noting where each leaf came from."""
    if not isinstance(value, Mapping):
        target[key] = value
        merged.origin[dotted] = where
        return
    if not isinstance(target.get(key), dict):
        target[key] = {}
    for name, item in value.items():
        _lay(merged, target[key], where, f"{dotted}.{name}", name, item)


# Typed values ---------------------------------------------------------------------------------------------


def _build(registry: Registry, layers: Sequence[_Layer], recipe: str) -> RunConfig:
    merged = _merge(registry, layers)
    parts: dict[str, Any] = {"recipe": recipe, "seed": _seed(merged)}
    for table, kind in COMPONENTS.items():
        parts[table] = _select(registry, merged, table, kind)
    for table in OPTIONAL:
        parts[table] = _select_optional(registry, merged, table)
    for table, cls in TABLES.items():
        parts[table] = fill(cls, merged.values.get(table, {}), table, merged)
    return RunConfig(**parts)


def _seed(merged: Merged) -> int:
    seed: int = _convert(int, merged.values.get("seed", 0), "seed", merged)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed in {merged.where('seed')} must be between 0 and 2**63 - 1, not {seed}")
    return seed


def _select(registry: Registry, merged: Merged, table: str, kind: str) -> Selection:
    values = dict(merged.values.get(table, {}))
    if "name" not in values:
        known = ", ".join(registry.components(kind)) or "none is installed"
        raise UserError(f"{table}.name is missing: say --set {table}.name=NAME (known: {known})")
    full, record = registry.find(kind, values.pop("name"))
    if record.config is not None:
        return Selection(full, fill(record.config, values, table, merged))
    if values:
        key = f"{table}.{next(iter(values))}"
        raise UserError(f"unknown key {key!r} in {merged.where(key)}: {full} has no settings")
    return Selection(full)


def _select_optional(registry: Registry, merged: Merged, table: str) -> Selection | None:
    return _select(registry, merged, table, OPTIONAL[table]) if merged.values.get(table) else None


def fill(cls: type, values: Any, path: str, merged: Merged) -> Any:
    """An instance of the dataclass `cls` from plain values; `path` is the dotted key of the whole."""
    if not isinstance(values, Mapping):
        raise _wrong(path, merged, "a table", values)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = _hints(cls)
    for name in values:
        if name not in fields:
            known = [f"{path}.{field}" for field in fields]
            key = f"{path}.{name}"
            raise UserError(f"unknown key {key!r} in {merged.where(key)}{did_you_mean(key, known)}")
    filled = {
        name: _convert(hints[name], _over_default(fields[name], value), f"{path}.{name}", merged)
        for name, value in values.items()
    }
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in filled:
            raise UserError(f"{path}.{name} is missing: say --set {path}.{name}=VALUE")
    try:
        made = cls(**filled)
        _check(made)
    except ValueError as error:
        # Messages of checks begin with the field at fault.
        name = str(error).partition(" ")[0]
        text = f"{path}.{error}" if name in fields else f"{path}: {error}"
        place = f" (set in {merged.where(f'{path}.{name}')})" if name in values else ""
        raise UserError(text + place) from error
    return made


def _over_default(field: dataclasses.Field[Any], value: Any) -> Any:
    """A nested table laid over the field's own default: what it does not say stays as the default has it."""
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if isinstance(value, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return _laid(plain(default), value)
    return value


def _laid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        name: _laid(base[name], value)
        for name, value in over.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **over, **nested}


def _check(settings: Any) -> None:
    """Raise `ValueError` where a value is out of range."""
    for name, (low, high) in _RANGES.get(type(settings), {}).items():
        value = getattr(settings, name)
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or not math.isfinite(value):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name} must be {limits}, not {value}")
    if isinstance(settings, TrainConfig):
        _check_train(settings)
    own: Callable[[], None] | None = getattr(settings, "check", None)
    if own is not None:
        own()


def _check_train(train: TrainConfig) -> None:
    if train.batch_size % train.micro_batches:
        raise ValueError(
            f"batch_size {train.batch_size} must be a multiple of micro_batches {train.micro_batches}"
        )
    if train.clip_norm is not None and not train.clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0 (or none for no clipping), not {train.clip_norm}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise ValueError(f"betas must be at least 0 and below 1, not {train.betas}")
    for factor in train.lr_schedule:
        if factor.kind != "cosine" and factor.steps < 1:
            raise ValueError(f"lr_schedule: {factor.kind} needs steps of at least 1, not {factor.steps}")


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise UserError(
            f"the settings {cls.__module__}.{cls.__qualname__} have a type that cannot be read: {error}"
        ) from error


def _wrong(path: str, merged: Merged, wanted: str, value: Any) -> UserError:
    return UserError(f"{path} in {merged.where(path)} must be {wanted}, not {value!r}")


def _convert(hint: Any, value: Any, path: str, merged: Merged) -> Any:
    """`value` as the type `hint`, losslessly, or `UserError`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, path, merged)
    if origin is Literal:
        return _convert_literal(hint, value, path, merged)
    if origin in (tuple, list):
        return _convert_sequence(hint, origin, value, path, merged)
    if origin is dict or hint is dict:
        inner = typing.get_args(hint)[1] if origin is dict else Any
        if not isinstance(value, Mapping):
            raise _wrong(path, merged, _describe(hint), value)
        return {key: _convert(inner, item, f"{path}.{key}", merged) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return fill(typing.cast(type, hint), value, path, merged)
    return _convert_scalar(hint, value, path, merged)


def _convert_scalar(hint: Any, value: Any, path: str, merged: Merged) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Any:
        return value
    if hint is float and number:
        return float(value)
    if hint is int and number and value == value // 1:  # 1e5 steps is a float in TOML
        return int(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, str) and type(value) is hint:
        return value
    raise _wrong(path, merged, _describe(hint), value)


def _convert_union(hint: Any, value: Any, path: str, merged: Merged) -> Any:
    options = typing.get_args(hint)
    if types.NoneType in options and value == NONE:
        return None
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _convert(option, value, path, merged)
        except UserError as error:
            failure = error
    # A member's own words say more than "must be X or nothing" where there is only one member.
    if sum(option is not types.NoneType for option in options) == 1 and isinstance(value, Mapping):
        raise failure
    raise _wrong(path, merged, _describe(hint), value)


def _convert_literal(hint: Any, value: Any, path: str, merged: Merged) -> Any:
    options = typing.get_args(hint)
    if any(value == option and type(value) is type(option) for option in options):
        return value
    near = nearest(value, [o for o in options if isinstance(o, str)]) if isinstance(value, str) else None
    guess = f"; did you mean {near}?" if near else ""
    text = f"{path} in {merged.where(path)} must be {_describe(hint)}, not {value!r}"
    raise UserError(text + guess)


def _convert_sequence(hint: Any, origin: type, value: Any, path: str, merged: Merged) -> Any:
    args = typing.get_args(hint)
    if not isinstance(value, list | tuple):
        raise _wrong(path, merged, _describe(hint), value)
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(path, merged, _describe(hint), value)
        inner = args
    else:
        inner = (args[0],) * len(value)
    items = zip(inner, value, strict=True)
    return origin(_convert(kind, item, f"{path}[{i}]", merged) for i, (kind, item) in enumerate(items))


def _describe(hint: Any) -> str:
    """A type in words that a user of TOML knows."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    if hint in words:
        return words[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(NONE if a is types.NoneType else _describe(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    if origin in (tuple, list):
        return f"a list, each {_describe(args[0])}"
    return "a table"


# Plain values ---------------------------------------------------------------------------------------------


def plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as TOML-able values."""
    values = {f.name: (getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)}
    return {
        name: _plain_value(value)
        for name, (value, default) in values.items()
        if not (value is None and default is None)
    }


def _plain_selection(chosen: Selection) -> dict[str, Any]:
    return {"name": chosen.name, **(plain(chosen.config) if chosen.config is not None else {})}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if value is None:
        return NONE
    return str(value) if isinstance(value, Path) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
