"""Pickles of NVIDIA's EDM: settings, weights, the round trip through `convert`, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cdm_core import formats, hookimpl
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.manager import Registry
from cdm_core.records import Model
from cdm_plugins_guidance.edm import EDM
from cdm_plugins_guidance.edm_checkpoint import official_settings, read_edm
from cdm_plugins_guidance.edm_configs import EDMConfig

SIZE = 16
ADM = {"model_type": "DhariwalUNet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
NCSNPP = {
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [2],
    "num_blocks": 1,
    "attn_resolutions": [16],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "augment_dim": 9,
}


class Persistent:
    """An object as NVIDIA's tools pickle it, with a source that must not be run."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise RuntimeError('the source was run')",
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(module: nn.Module, name: str, arguments: dict[str, Any]) -> Any:
    """A module of ours as one of NVIDIA's: ModuleDicts as they are, all others persistent."""
    children = {key: persistent(child, "Part", {}) for key, child in module._modules.items() if child}
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain._modules = children
        return plain
    return Persistent(
        name,
        training=False,
        _parameters=dict(module._parameters),
        _buffers={**module._buffers, "scratch": torch.zeros(2)},
        _non_persistent_buffers_set={"scratch"},
        _modules={**children, "absent": None},
        _init_args=(),
        _init_kwargs={**arguments, "init_weight": np.sqrt(1 / 3)} if name == "Part" else arguments,
    )


def model_of(network: str, arguments: dict[str, Any], classes: int = 0) -> EDM:
    told = {"img_resolution": SIZE, "img_channels": 3, "label_dim": classes, **arguments}
    tables = official_settings(network, told, "test")
    torch.manual_seed(0)
    config, info = (
        formats.filled(c, tables[t], t, "test") for c, t in ((EDMConfig, "model"), (DataInfo, "data"))
    )
    model = EDM(config, info)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the pickle of a model with the arguments that its network is said to be made with."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("a pickle was loaded by its own loader")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def write(model: EDM, network: str, arguments: dict[str, Any], classes: int = 0, **others: Any) -> Path:
        told = {"img_resolution": SIZE, "img_channels": 3, "label_dim": classes, **arguments}
        content = {"ema": persistent(model, network, told), "loss_fn": Persistent("EDMLoss", P_mean=-1.2)}
        path = tmp_path / "network-snapshot.pkl"
        path.write_bytes(pickle.dumps(content | {"augment_pipe": None, "dataset_kwargs": {}} | others, 4))
        return path

    return write


CASES = {
    "adm": ("EDMPrecond", ADM, 5),
    "ncsn++": ("VEPrecond", NCSNPP, 0),
    "iddpm": ("iDDPMPrecond", {**ADM, "M": 50}, 0),
}


def plugin() -> Any:
    class Plugin:
        @staticmethod
        @hookimpl
        def register_models() -> list[Model]:
            return [Model("edm", "EDM", "cdm_plugins_guidance.edm:EDM", EDMConfig, ("denoise",))]

    return Plugin


@pytest.mark.parametrize("case", CASES)
def test_the_converted_network_is_the_pickled_one(case: str, save: Any, tmp_path: Path) -> None:
    network, arguments, classes = CASES[case]
    model = model_of(network, arguments, classes)
    foreign = read_edm(save(model, network, arguments, classes), ())
    assert foreign is not None
    assert foreign.model.name == "guidance/edm"
    assert foreign.model.config == model.config
    formats.save_converted(foreign, tmp_path / "edm.safetensors")
    loaded, about = formats.load_converted(tmp_path / "edm.safetensors", Registry.of({"guidance": plugin()}))
    x, sigma = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0.3, 9.0])
    y = torch.tensor([1, 4]) if classes else None
    with torch.no_grad():
        assert torch.equal(loaded.eval().denoise(x, sigma, y), model.denoise(x, sigma, y))
    assert "CC BY-NC-SA 4.0" in about.note
    assert about.info.num_classes == (classes or None)
    assert (about.info.shape, about.info.dequantise, about.info.levels) == ((3, SIZE, SIZE), False, 256)


def test_what_the_network_was_not_told_is_the_official_default() -> None:
    told = {"img_resolution": 32, "img_channels": 1}
    made = {
        name: formats.filled(EDMConfig, official_settings(name, told, "test")["model"], "model", "test")
        for name in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
    }
    song = {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
    assert made["EDMPrecond"] == EDMConfig()
    assert made["iDDPMPrecond"] == EDMConfig(precond="iddpm")
    assert made["VPPrecond"] == EDMConfig(precond="vp", model_type="SongUNet", **song)
    assert made["VEPrecond"] == EDMConfig(precond="ve", model_type="SongUNet", **song)


def test_training_options_are_left_out_and_the_flip_is_the_data_sets(save: Any) -> None:
    told = {**ADM, "use_fp16": True, "label_dropout": 0.1}
    foreign = read_edm(
        save(model_of("EDMPrecond", ADM), "EDMPrecond", told, dataset_kwargs={"xflip": True}), ()
    )
    assert foreign is not None
    assert foreign.info.flip
    assert not read_edm(save(model_of("EDMPrecond", ADM), "EDMPrecond", told), ()).info.flip  # type: ignore[union-attr]


def test_half_precision_becomes_float32(save: Any) -> None:
    model = model_of("EDMPrecond", ADM).half()
    foreign = read_edm(save(model, "EDMPrecond", ADM), ())
    assert foreign is not None
    assert {tensor.dtype for tensor in foreign.state_dict.values()} == {torch.float32}


def test_settings_can_be_told(save: Any) -> None:
    path = save(model_of("EDMPrecond", ADM), "EDMPrecond", ADM)
    foreign = read_edm(path, ("model.dropout=0.3", "data.flip=true", "model.sigma_max=50"))
    assert foreign is not None
    assert foreign.info.flip
    expected = dataclasses.replace(model_of("EDMPrecond", ADM).config, dropout=0.3, sigma_max=50.0)
    assert foreign.model.config == expected
    with pytest.raises(UserError, match="train"):
        read_edm(path, ("train.lr=1",))


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ("Precond", {}, "its network is a Precond, and only VPPrecond"),
        ("EDMPrecond", {"width": 3}, "unknown key 'model.width'"),
        ("EDMPrecond", {"model_channels": "wide"}, "model.model_channels"),
        ("EDMPrecond", {"model_channels": 10**6}, "should be"),
        ("EDMPrecond", {"model_channels": 10**12}, "no possible size"),
        ("EDMPrecond", {"num_blocks": 10**12}, "fewer weights than the blocks"),
        ("EDMPrecond", {"num_blocks": 2}, "should be .* is missing"),
        ("EDMPrecond", {"label_dim": 7}, "map_label.weight should be .* is missing"),
        ("EDMPrecond", {"attn_resolutions": []}, "no place for model.dec.8x8_block0.norm2.bias"),
        ("EDMPrecond", {"img_resolution": 0}, r"made for images of \(3, 0, 0\)"),
        ("EDMPrecond", {"sigma_data": -1.0}, "sigma_data"),
        ("EDMPrecond", {"label_dim": np.zeros(2)}, "argument label_dim of its network is no number, text"),
        ("EDMPrecond", {"model_type": np.zeros(2)}, "argument model_type of its network is no number, text"),
        ("EDMPrecond", {"channel_mult": [[1], 2]}, "argument channel_mult"),
        ("EDMPrecond", {"channel_mult": [1] * 33}, "argument channel_mult"),
        ("EDMPrecond", {"model_channels": 10**400}, "argument model_channels"),
        ("EDMPrecond", {"model_type": "x" * 81}, "argument model_type"),
        ("EDMPrecond", {"model_type": "x\x1b[2J"}, "argument model_type"),
        ("EDMPrecond", {"x\x1b[2J\n": 1}, r"no proper name: x\\x1b\[2J\\n$"),
        ("EDMPrecond", {7: 1}, "no proper name: <int>"),
        ("Precond\x1b[2J\n" + "x" * 999, {}, r"its network is a Precond\\x1b\[2J\\nx{60,80}, and only"),
        ("iDDPMPrecond", {}, "should be"),
    ],
)
def test_settings_that_are_not_the_weights_are_refused(
    network: str, changes: dict[str, Any], message: str, save: Any
) -> None:
    told = {**ADM, "attn_resolutions": [8]}
    path = save(model_of("EDMPrecond", told), network, told | changes)
    with pytest.raises(UserError, match=message) as error:
        read_edm(path, ())
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1500


def test_a_value_that_is_shared_without_end_is_never_written_out(save: Any) -> None:
    """Forty lists within each other, each with two references to the next: a text of terabytes."""
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]
    model = model_of("EDMPrecond", ADM)
    path = save(model, "EDMPrecond", {**ADM, "channel_mult": nested})
    with pytest.raises(UserError, match="argument channel_mult of its network is no number"):
        read_edm(path, ())
    path = save(model, "EDMPrecond", ADM, dataset_kwargs={"xflip": nested})
    with pytest.raises(UserError, match="xflip of its data set must be true or false, not <list>"):
        read_edm(path, ())


def test_a_filter_that_is_not_the_settings_one_is_refused(save: Any) -> None:
    told = {**NCSNPP, "channel_mult": [1, 1]}
    path = save(model_of("VEPrecond", told), "VEPrecond", told | {"resample_filter": [1, 2, 2, 1]})
    with pytest.raises(UserError, match="resample_filter is not of"):
        read_edm(path, ())


def test_names_of_the_file_are_quoted_as_printable_text(save: Any) -> None:
    model = model_of("EDMPrecond", ADM)
    model.register_buffer("surplus\x1b[2J\n", torch.zeros(1))
    with pytest.raises(UserError, match=r"no place for surplus\\x1b\[2J\\n$"):
        read_edm(save(model, "EDMPrecond", ADM), ())
    model = model_of("EDMPrecond", ADM)
    model.register_buffer("x" * 501, torch.zeros(1))
    with pytest.raises(UserError, match="a name of over 500 characters"):
        read_edm(save(model, "EDMPrecond", ADM), ())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_non_persistent_buffers_set": 3}, "own buffers are no set"),
        ({"_modules": {"a\x1b": 3}}, r"a\\x1b\. is no module"),
        (
            {"_parameters": (shared := {"w": None}), "_buffers": shared},
            "_buffers is a part of its network twice",
        ),
    ],
)
def test_a_module_in_disorder_is_refused(state: Any, message: str, save: Any) -> None:
    path = save(model_of("EDMPrecond", ADM), "EDMPrecond", ADM)
    told = {**ADM, "img_resolution": SIZE, "img_channels": 3}
    network = Persistent("EDMPrecond", _init_args=(), _init_kwargs=told, **state)
    path.write_bytes(pickle.dumps({"ema": network}, 4))
    with pytest.raises(UserError, match=message) as error:
        read_edm(path, ())
    assert str(error.value).isprintable()


def test_what_is_in_the_network_twice_is_refused(save: Any) -> None:
    """Shared parts could be shared without end."""
    model = model_of("EDMPrecond", ADM)
    model.model.map_layer1.bias = model.model.map_layer0.bias
    with pytest.raises(UserError, match="bias is a part of its network twice"):
        read_edm(save(model, "EDMPrecond", ADM), ())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_init_args": (16, 3), "_init_kwargs": {}}, "with which arguments"),
        ({"_init_args": (), "_init_kwargs": {"img_channels": 3}}, "made without img_resolution"),
        ({}, "with which arguments"),
        ({"_init_args": np.zeros(2), "_init_kwargs": {}}, "with which arguments"),
    ],
)
def test_a_network_that_does_not_say_how_it_was_made_is_refused(
    state: dict[str, Any], message: str, save: Any, tmp_path: Path
) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"ema": Persistent("EDMPrecond", **state)}, 4))
    with pytest.raises(UserError, match=message):
        read_edm(path, ())


def test_other_files_are_not_ours(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(300, 2)}
    torch.save(tensors, tmp_path / "zip.pt")
    torch.save(tensors, tmp_path / "zip.pkl")
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "text.txt").write_text("# a text")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"ema": 3}))
    (tmp_path / "list").write_bytes(pickle.dumps([1, 2]))
    # A header of 1152 bytes, 0x480: the first two bytes of the file are those of a pickle.
    for pad in range(1100):
        content = formats.save(tensors, {"note": "x" * pad})
        if content[:2] == b"\x80\x04":
            break
    (tmp_path / "tensors.safetensors").write_bytes(content)
    assert content[:2] == b"\x80\x04"
    for path in tmp_path.iterdir():
        assert read_edm(path, ()) is None, path.name


def test_hostile_damaged_and_absent_files_are_refused(save: Any, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    path = save(model_of("EDMPrecond", ADM), "EDMPrecond", ADM, loss_fn=Hostile())
    with pytest.raises(UserError, match=r"tries to import posix\.system"):
        read_edm(path, ())
    path.with_suffix("").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"tries to import posix\.system"):
        read_edm(path.with_suffix(""), ())  # whatever its name
    assert not (tmp_path / "it-ran").exists()
    path.write_bytes(save(model_of("EDMPrecond", ADM), "EDMPrecond", ADM).read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged"):
        read_edm(path, ())
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_edm(path, ())
    path.write_text("not a pickle")
    with pytest.raises(UserError, match="no pickle"):
        read_edm(path, ())
    with pytest.raises(UserError, match="cannot read"):
        read_edm(tmp_path / "absent.pkl", ())
