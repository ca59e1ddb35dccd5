"""The plugin manager: what is found, how failures are isolated, named and explained."""

import itertools
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from cdm_core import UserError, hookimpl
from cdm_core.manager import PluginWarning, Registry, Source, load_registry
from cdm_core.manager import installed as entry_points
from cdm_core.records import Model, Sampler
from cdm_core.testing.plugins import BROKEN, GOOD, FakePlugin, installed


def plugin(**hooks):
    """A plugin in memory; hooks by name."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


def models(*names, **record):
    return plugin(register_models=lambda: [Model(name, name, "torch.nn:Linear", **record) for name in names])


def test_core_is_there_and_sound():
    registry = load_registry(no_plugins=True)
    assert [(p.name, p.distribution, p.status, p.error) for p in registry.plugins] == [
        ("core", "cdm-core", "ok", None)
    ]
    assert "core/ddim" in registry.components("sampler")
    assert "core/digits" in registry.components("dataset")
    assert list(registry.components("sampler")) == sorted(registry.components("sampler"))


def test_targets_of_core_can_be_imported():
    registry = load_registry(no_plugins=True)
    kinds = ("sampler", "adapter", "dataset", "metric")
    records = [record for kind in kinds for record in registry.components(kind).values()]
    assert len(records) >= 20
    assert all(callable(record.load()) for record in records)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda p: p.name)
def test_broken_plugin_is_reported_and_stops_nobody(tmp_path, broken):
    with installed(tmp_path, broken, GOOD):
        registry = Registry(entry_points())
    info = next(p for p in registry.plugins if p.name == broken.name)
    assert info.status == "failed"
    assert broken.says in info.error
    assert "\n" not in info.error
    assert (info.distribution, info.version) == (broken.project, "1.2.3")
    assert "good/net" in registry.components("model")
    assert registry.owner("good/mse").status == "ok"


@pytest.mark.parametrize("broken", BROKEN, ids=lambda p: p.name)
def test_strict_raises(tmp_path, monkeypatch, broken):
    monkeypatch.setenv("CDM_RUN_STRICT", "1")
    with installed(tmp_path, broken), pytest.raises((Exception, SystemExit)) as caught:
        Registry([source for source in entry_points() if source.name in ("core", broken.name)])
    expected = broken.says.removeprefix("SystemExit: ").rpartition("Error: ")[2]
    assert expected in " ".join(str(caught.value).split()) or caught.type.__name__ == broken.says


def test_no_plugins_leaves_only_core(tmp_path):
    with installed(tmp_path, GOOD, *BROKEN):
        assert [p.name for p in load_registry(no_plugins=True).plugins] == ["core"]
        assert len(load_registry().plugins) > len(BROKEN)


def test_every_hook_of_a_plugin_is_isolated():
    def fails():
        raise RuntimeError("no models today")

    mixed = plugin(
        register_models=fails,
        register_samplers=lambda: [Sampler("walk", "Walks", "torch.nn:Linear"), "nonsense"],
    )
    registry = Registry.of({"mixed": mixed})
    info = registry.plugin("mixed")
    assert info.components == {"sampler": ["mixed/walk"]}
    assert "register_models raised RuntimeError: no models today" in info.error
    assert "register_samplers: returned 'nonsense'" in info.error
    with pytest.warns(PluginWarning, match="no models today"):
        assert registry.ask_for("mixed") is info


def test_two_distributions_of_one_name_both_fail():
    sources = [
        Source("twin", "b-dist", "2.0", lambda: models("b")),
        Source("twin", "a-dist", "1.0", lambda: models("a")),
        Source("other", "c-dist", "3.0", lambda: models("c")),
    ]
    for order in itertools.permutations(sources):
        registry = Registry(order)
        assert [(p.name, p.distribution, p.status) for p in registry.plugins] == [
            ("other", "c-dist", "ok"),
            ("twin", "a-dist", "failed"),
            ("twin", "b-dist", "failed"),
        ]
        assert all("a-dist 1.0 and b-dist 2.0" in p.error for p in registry.plugins if p.name == "twin")
        assert list(registry.components("model")) == ["other/c"]


def test_nobody_takes_the_name_of_core():
    impostor = Source("core", "a-dist", "9", lambda: models("net"))
    registry = Registry([impostor, *entry_points(no_plugins=True)])
    assert not registry.components("model")
    assert registry.plugin("core").distribution == "cdm-core"
    assert [p.error for p in registry.plugins if p.distribution == "a-dist"] == [
        "the plugin name 'core' belongs to cdm-core"
    ]


def test_order_of_installation_does_not_matter(tmp_path):
    listings = []
    for i, order in enumerate(itertools.permutations((GOOD, BROKEN[0], FakePlugin("late", GOOD.source)))):
        with installed(tmp_path / str(i), *order):
            registry = load_registry()
        listings.append([p.to_dict() for p in registry.plugins])
    assert all(listing == listings[0] for listing in listings)


def test_a_module_behind_two_names_serves_the_first():
    shared = models("net")
    registry = Registry.of({"zeta": shared, "alpha": shared})
    assert list(registry.components("model")) == ["alpha/net"]
    assert "already registered" in registry.plugin("zeta").error


def test_find_by_full_and_bare_name():
    registry = Registry.of({"a": models("net", "lone"), "b": models("net")})
    assert registry.find("model", "b/net")[0] == "b/net"
    assert registry.find("model", "lone")[0] == "a/lone"
    assert registry.find("model", "net", prefer=("core", "b", "a"))[0] == "b/net"
    assert registry.find("model", "lone", prefer=("b",))[0] == "a/lone"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("model", "net", r"^model 'net' could be a/net or b/net: give the full name$"),
        (
            "sampler",
            "ddmi",
            r"^unknown sampler 'ddmi': did you mean core/ddim\? \(known: core/ddim, core/ddpm, ",
        ),
        ("sampler", "core/hoin", r"^unknown sampler 'core/hoin': did you mean core/heun\?"),
        ("model", "zzzzz", r"^unknown model 'zzzzz' \(known: a/lone, a/net, b/net\)$"),
        ("model", "cor/net", r"^unknown plugin 'cor': did you mean core\? .* with pip$"),
        ("adapter", "DDIM", r"^unknown adapter 'DDIM' \(known: core/bayes, core/cfg\)$"),
    ],
)
def test_find_explains(kind, name, message):
    registry = Registry.of({"a": models("net", "lone"), "b": models("net")})
    with pytest.raises(UserError, match=message):
        registry.find(kind, name)


def test_failed_plugin_asked_for_by_name_says_why(tmp_path):
    with installed(tmp_path, BROKEN[0]):
        registry = load_registry()
    reason = (
        r"plugin 'import-fails' \(fake-import-fails 1.2.3\) failed: cannot be imported: ModuleNotFoundError"
    )
    for ask in (
        lambda: registry.find("model", "import-fails/net"),
        lambda: registry.find("model", "net", prefer=("import-fails",)),
        lambda: registry.ask_for("import-fails"),
    ):
        with pytest.raises(UserError, match=reason):
            ask()
    with pytest.raises(UserError, match=r"is it of a failed plugin \(.*import-fails"):
        registry.find("model", "net")


def test_provides():
    registry = Registry.of({"a": models("net", provides=("log_density",)), "b": models("net")})
    assert registry.provides("class_logits") == ["core/bayes"]
    assert registry.provides("log_density", kind="model") == ["a/net"]
    assert registry.provides("log_density", kind="adapter") == []
    assert registry.hint(["log_density", "telepathy"]) == "`log_density` is offered by a/net"


def test_a_config_with_a_field_called_name_is_refused(tmp_path):
    source = GOOD.source.replace("width: int = 8", "name: str = ''")
    with installed(tmp_path, FakePlugin("named", source)):
        error = load_registry().plugin("named").error
    assert "its config has a field `name`" in error


def test_observers_see_and_one_that_raises_warns_once():
    seen = []

    def raises(folder, step):
        raise ValueError("tired")

    registry = Registry.of(
        {
            "bad": plugin(on_run_end=raises),
            "good": plugin(on_run_end=lambda step: seen.append(step)),
            "logs": plugin(on_log=lambda scalars: seen.append(dict(scalars))),
        }
    )
    with pytest.warns(PluginWarning, match=r"plugin 'bad': on_run_end raised ValueError: tired"):
        registry.hook.on_run_end(folder=None, step=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.hook.on_run_end(folder=None, step=4)
    registry.hook.on_log(folder=None, step=4, scalars={"loss": 1.0})
    assert seen == [3, 4, {"loss": 1.0}]


def test_observers_cannot_change_what_others_see():
    def meddles(scalars):
        scalars["loss"] = 0.0

    seen = {}
    registry = Registry.of(
        {"a": plugin(on_log=meddles), "b": plugin(on_log=lambda scalars: seen.update(scalars))}
    )
    scalars = {"loss": 1.0}
    with pytest.warns(PluginWarning, match="does not support item assignment"):
        registry.hook.on_log(folder=None, step=1, scalars=scalars)
    assert scalars == seen == {"loss": 1.0}


def test_strict_observer_raises():
    def raises():
        raise ValueError("tired")

    registry = Registry.of({"bad": plugin(on_run_start=raises)}, strict=True)
    with pytest.raises(ValueError, match="tired"):
        registry.hook.on_run_start(folder=None)


def test_sound_plugins_are_silent(tmp_path):
    with installed(tmp_path, GOOD), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_registry().ask_for("good").error is None


def test_registry_is_loaded_once_and_without_torch():
    code = (
        "import sys; from cdm_core.manager import load_registry as l; "
        "assert l() is l(); print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
