"""The typed configuration: layers, types, suggestions, round trips."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import tomli_w

from cdm_core import UserError, hookimpl
from cdm_core.adapter_configs import CFGConfig
from cdm_core.config import diff, from_toml, is_resumable, resolve, resolve_sampling, to_dict, to_toml
from cdm_core.manager import Registry, load_registry
from cdm_core.records import Model, Objective, Recipe
from cdm_core.settings import LRFactor, Selection


@dataclass(frozen=True)
class Attention:
    heads: int = 4
    scale: float | None = 0.5


@dataclass(frozen=True)
class NetConfig:
    width: int = 8
    rate: float = 0.1
    kind: Literal["plain", "fancy"] = "plain"
    mult: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.0, 1.0)
    limit: int | None = 5
    title: str | None = None
    attention: Attention = Attention()
    wide: Attention = Attention(heads=16)
    blocks: tuple[Attention, ...] = ()
    folder: Path = Path("here")
    flag: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    either: int | str = 1
    anything: Any = None

    def check(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}")
        if self.rate > 1 and self.flag:
            raise ValueError("with flag, rate must be at most 1")


@dataclass(frozen=True)
class OtherConfig:
    depth: int


TORCH = "torch.nn:Linear"
BASE = {
    "model": {"name": "net", "width": 16, "attention": {"heads": 2}},
    "objective": {"name": "loss"},
    "data": {"name": "digits"},
    "sampler": {"name": "ddim", "eta": 0.5},
    "train": {"steps": 10, "clip_norm": 1.0},
}
CHILD = {"base": "default", "model": {"rate": 0.3, "attention": {"scale": 2.0}}, "train": {"lr": 1e-3}}


def toy(**recipes):
    models = [
        Model("net", "A net", TORCH, NetConfig),
        Model("other", "Another", TORCH, OtherConfig),
        Model("bare", "Without settings", TORCH),
    ]
    recipes = {"default": BASE, "child": CHILD, **recipes}
    return SimpleNamespace(
        register_models=hookimpl(lambda: models),
        register_objectives=hookimpl(lambda: [Objective("loss", "A loss", TORCH)]),
        register_recipes=hookimpl(lambda: [Recipe(name, name, values) for name, values in recipes.items()]),
    )


@pytest.fixture(scope="module")
def registry():
    return Registry.of({"toy": toy()})


def test_recipe_fills_what_it_says_and_defaults_the_rest(registry):
    config = resolve(registry)
    assert config.recipe == "toy/default"
    assert config.model == Selection("toy/net", NetConfig(width=16, attention=Attention(heads=2)))
    assert config.objective == Selection("toy/loss", None)
    assert (config.data.name, config.sampler.name) == ("core/digits", "core/ddim")
    assert config.sampler.config.eta == 0.5
    assert (config.train.steps, config.train.clip_norm, config.train.batch_size) == (10, 1.0, 64)
    assert config.seed == 0


def test_precedence(registry, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("seed = 3\n[model]\nwidth = 32\nrate = 0.2\n[train]\nsteps = 20\n")
    config = resolve(
        registry, config_file=file, overrides=["model.width=64", "train.lr=1e-3", "train.steps=30"]
    )
    assert (config.model.config.width, config.model.config.rate) == (64, 0.2)
    assert config.model.config.attention.heads == 2
    assert (config.train.steps, config.train.lr, config.train.clip_norm, config.seed) == (30, 1e-3, 1.0, 3)


def test_base_recipe_is_merged_deep(registry):
    config = resolve(registry, plugins=["toy"], recipe="child")
    assert config.recipe == "toy/child"
    assert config.model.config == NetConfig(width=16, rate=0.3, attention=Attention(2, 2.0))
    assert (config.train.steps, config.train.lr) == (10, 1e-3)


def test_an_adapter_is_optional(registry):
    assert resolve(registry).adapter is None
    config = resolve(registry, overrides=["adapter.name=cfg", "adapter.weight=2"])
    assert config.adapter == Selection("core/cfg", CFGConfig(2.0))
    assert from_toml(to_toml(config), registry) == config
    assert resolve(registry, overrides=["adapter=none"]).adapter is None
    with pytest.raises(UserError, match=r"adapter\.name is missing"):
        resolve(registry, overrides=["adapter.weight=2"])


def test_sampling_is_the_runs_own_or_a_recipes_with_changes(registry):
    own = resolve(registry, overrides=["adapter=cfg", "sample.steps=7"]).sampling
    assert resolve_sampling(registry, own) == own
    changed = resolve_sampling(registry, own, overrides=["sample.steps=9", "adapter.weight=3"])
    assert changed == replace(
        own, sample=replace(own.sample, steps=9), adapter=Selection("core/cfg", CFGConfig(3.0))
    )
    assert resolve_sampling(registry, own, overrides=["adapter=none"]).adapter is None
    child = resolve_sampling(registry, own, recipe="child", plugins=["toy"], overrides=["sampler.eta=1"])
    assert (child.adapter, child.sampler.config.eta) == (None, 1.0)
    with pytest.raises(UserError, match="--set train: sampling has the tables sampler, sample, adapter only"):
        resolve_sampling(registry, own, overrides=["train.lr=1"])


def test_a_nested_table_leaves_the_rest_of_its_default(registry):
    config = resolve(registry, overrides=["model.wide.scale=3"])
    assert config.model.config.wide == Attention(16, 3.0)
    assert from_toml(to_toml(config), registry) == config
    assert resolve(registry, overrides=["model.wide.scale=none"]).model.config.wide == Attention(16, None)


def test_circular_base_is_an_error():
    registry = Registry.of({"toy": toy(a={"base": "b"}, b={"base": "a"})})
    with pytest.raises(
        UserError, match=r"recipe toy/a: its `base` goes round in a circle \(toy/a -> toy/b -> toy/a\)"
    ):
        resolve(registry, recipe="a")


def test_another_component_does_not_inherit_settings(registry):
    config = resolve(registry, overrides=["model.depth=3", "model.name=other"])
    assert config.model == Selection("toy/other", OtherConfig(3))
    same = resolve(registry, overrides=["model.name=toy/net", "sampler=heun"])
    assert same.model.config.width == 16
    assert same.sampler.name == "core/heun"


def test_which_recipe():
    registry = Registry.of({"a": toy(), "b": toy()})
    with pytest.raises(UserError, match="which recipe"):
        resolve(registry)
    assert resolve(registry, plugins=["b"]).recipe == "b/default"
    assert resolve(registry, plugins=["b"]).model.name == "b/net"
    assert resolve(registry, recipe="a/child", plugins=["b"]).model.name == "a/net"
    with pytest.raises(UserError, match=r"unknown recipe 'core/default'"):
        resolve(registry, plugins=["core"])


def test_a_files_recipe_is_its_base_and_a_complete_file_stands_alone(registry, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('recipe = "child"\n[train]\nsteps = 7\n')
    config = resolve(registry, config_file=file)
    assert (config.recipe, config.train.steps, config.train.lr) == ("toy/child", 7, 1e-3)
    file.write_text(to_toml(replace(config, recipe="gone/recipe")))
    alone = resolve(registry, config_file=file)
    assert alone == replace(config, recipe="gone/recipe")
    assert resolve(registry, recipe="toy/default", config_file=file).recipe == "toy/default"


OVERRIDES = [
    ("model.width=3", "width", 3),
    ("model.width=1e2", "width", 100),
    ("model.rate=1", "rate", 1.0),
    ("model.kind=fancy", "kind", "fancy"),
    ('model.kind="fancy"', "kind", "fancy"),
    ("model.mult=[1, 2, 4]", "mult", (1, 2, 4)),
    ("model.pair=[1, 2.5]", "pair", (1.0, 2.5)),
    ("model.limit=none", "limit", None),
    ("model.limit=7", "limit", 7),
    ("model.title=a b = c", "title", "a b = c"),
    ("model.attention.heads=8", "attention", Attention(heads=8)),
    ("model.attention.scale=none", "attention", Attention(heads=2, scale=None)),
    ("model.blocks=[{heads=1}, {scale=2}]", "blocks", (Attention(1), Attention(scale=2.0))),
    ("model.folder=/data", "folder", Path("/data")),
    ("model.flag=true", "flag", True),
    ("model.extra={a=1}", "extra", {"a": 1.0}),
    ("model.either=two", "either", "two"),
    ("model.anything=[1, 'x']", "anything", [1, "x"]),
]


@pytest.mark.parametrize(("override", "name", "value"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_set_parses_and_round_trips(registry, override, name, value):
    config = resolve(registry, overrides=[override])
    got = getattr(config.model.config, name)
    assert got == value
    assert type(got) is type(value)
    assert from_toml(to_toml(config), registry) == config


WRONG = [
    ("model.widht=3", r"unknown key 'model\.widht' in --set: did you mean model\.width\? \(known: "),
    ("modle.width=3", r"unknown key 'modle' in --set: did you mean model\?"),
    ("train.stesp=3", r"unknown key 'train\.stesp' in --set: did you mean train\.steps\?"),
    (
        "model.attention.head=3",
        r"unknown key 'model\.attention\.head' in --set: did you mean model\.attention\.heads",
    ),
    ("objective.x=1", r"unknown key 'objective\.x' in --set: toy/loss has no settings"),
    ("model.width=wide", r"model\.width in --set must be a whole number, not 'wide'"),
    ("model.width=1.5", r"model\.width in --set must be a whole number, not 1\.5"),
    ("model.width=true", r"must be a whole number, not True"),
    ("model.width=inf", r"must be a whole number, not inf"),
    ("model.rate=true", r"model\.rate in --set must be a number, not True"),
    (
        "model.kind=fanci",
        r"model\.kind in --set must be one of plain, fancy, not 'fanci'; did you mean fancy\?",
    ),
    ("model.mult=3", r"model\.mult in --set must be a list, each a whole number, not 3"),
    ("model.mult=[1, 'x']", r"model\.mult\[1\] in --set must be a whole number, not 'x'"),
    ("model.pair=[1]", r"model\.pair in --set must be a list of 2: a number, a number, not \[1\]"),
    ("model.limit=x", r"model\.limit in --set must be a whole number or none, not 'x'"),
    ("model.attention=3", r"model\.attention in --set must be a table, not 3"),
    ("model.flag=1", r"model\.flag in --set must be true or false, not 1"),
    ("model.title=3", r"model\.title in --set must be a string or none, not 3"),
    ("model.width=0", r"^model\.width must be at least 1, not 0 \(set in --set\)$"),
    ("model.name=ohter", r"model\.name in --set: unknown model 'ohter': did you mean toy/other\?"),
    ("model.name=other", r"model\.depth is missing: say --set model\.depth=VALUE"),
    ("model.name=3", r"model\.name in --set must be a string, not 3"),
    ("model=3", r"model in --set must be a table with a `name`, not 3"),
    ("sampler.name=ddmi", r"sampler\.name in --set: unknown sampler 'ddmi': did you mean core/ddim\?"),
    ("data.name=digist", r"data\.name in --set: unknown dataset 'digist': did you mean core/digits\?"),
    ("train.steps=0", r"^train\.steps must be at least 1, not 0 \(set in --set\)$"),
    ("train.lr=-1", r"train\.lr must be at least 0, not -1\.0"),
    ("train.lr=nan", r"train\.lr must be at least 0, not nan"),
    ("train.ema_decay=1.5", r"train\.ema_decay must be between 0 and 1, not 1\.5"),
    ("train.betas=[0.9, 1]", r"train\.betas must be at least 0 and below 1"),
    ("train.clip_norm=0", r"train\.clip_norm must be above 0"),
    (
        "train.micro_batches=3",
        r"^train\.batch_size 64 must be a multiple of micro_batches 3$",
    ),
    (
        "train.lr_schedule=[{kind='warmup'}]",
        r"train: lr_schedule: warmup needs steps of at least 1, not 0$",
    ),
    ("train.lr_schedule=[{kind='warmpu'}]", r"train\.lr_schedule\[0\]\.kind in --set must be one of warmup"),
    ("sample.steps=0", r"sample\.steps must be at least 1, not 0"),
    ("seed=-1", r"seed in --set must be between 0"),
    ("seed=x", r"seed in --set must be a whole number"),
    ("train.steps", r"--set train\.steps: write KEY=VALUE"),
    ("=3", r"--set =3: write KEY=VALUE"),
    ("recipe=default2", r"unknown recipe 'default2': did you mean toy/default\?"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[o[0] for o in WRONG])
def test_wrong_input_is_explained_in_one_line(registry, override, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(registry, overrides=[override])
    assert "\n" not in str(caught.value)


def test_errors_name_file_and_recipe(registry, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[model]\nwidht = 1\n")
    with pytest.raises(
        UserError, match=r"unknown key 'model\.widht' in .*my\.toml: did you mean model\.width"
    ):
        resolve(registry, config_file=file)
    file.write_text("[model\n")
    with pytest.raises(UserError, match=r"my\.toml: not valid TOML: .*line 1"):
        resolve(registry, config_file=file)
    with pytest.raises(UserError, match=r"gone\.toml: there is no such file"):
        resolve(registry, config_file=tmp_path / "gone.toml")
    broken = Registry.of({"toy": toy(default=BASE | {"train": {"stepps": 1}})})
    with pytest.raises(UserError, match=r"unknown key 'train\.stepps' in recipe toy/default"):
        resolve(broken)


def test_missing_component_is_named():
    registry = Registry.of({"toy": toy(default={"model": "net", "objective": "loss", "data": "digits"})})
    with pytest.raises(
        UserError, match=r"sampler\.name is missing: say --set sampler\.name=NAME \(known: core/ddim"
    ):
        resolve(registry)


def test_two_sets_at_odds(registry):
    with pytest.raises(UserError, match=r"'attention' was given a value by another --set"):
        resolve(registry, overrides=["model.attention=3", "model.attention.heads=2"])


def test_cross_field_check_names_the_table(registry):
    with pytest.raises(UserError, match=r"^model: with flag, rate must be at most 1$"):
        resolve(registry, overrides=["model.flag=true", "model.rate=2"])


def test_toml_holds_everything(registry):
    config = resolve(
        registry, overrides=["train.lr_schedule=[{kind='warmup', steps=5}]", "train.clip_norm=none"]
    )
    assert config.train.lr_schedule == (LRFactor("warmup", 5),)
    assert config.train.clip_norm is None
    again = from_toml(to_toml(config), registry)
    assert again == config
    assert "clip_norm" not in to_dict(config)["train"]


def test_from_toml_reads_old_files_and_refuses_unknown_keys(registry):
    values = to_dict(resolve(registry))
    del values["train"]["lr"]
    assert from_toml(tomli_w.dumps(values), registry) == resolve(registry)
    values["train"]["momentum"] = 0.9
    with pytest.raises(UserError, match=r"unknown key 'train\.momentum' in config\.toml"):
        from_toml(tomli_w.dumps(values), registry)


def test_diff_and_resumable(registry):
    a = resolve(registry)
    b = resolve(
        registry, overrides=["train.steps=20", "train.lr=1", "model.attention.heads=7", "sampler=heun"]
    )
    assert diff(a, a) == []
    everything = diff(a, b)
    assert {"train.steps", "train.lr", "model.attention.heads", "sampler.name", "sampler.eta"} <= set(
        everything
    )
    assert everything == sorted(everything)
    assert set(everything) - set(diff(a, b, resumable=False)) == {"train.steps"}
    assert is_resumable("train.checkpoint_every")
    assert not is_resumable("train.batch_size")
    assert not is_resumable("model.width")


@pytest.mark.parametrize("full", sorted(load_registry().components("recipe")))
def test_every_installed_recipe_resolves_and_round_trips(full):
    registry = load_registry()
    config = resolve(registry, recipe=full)
    assert config.recipe == full
    assert from_toml(to_toml(config), registry) == config
