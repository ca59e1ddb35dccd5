"""Pickles: what is read is what was stored, what is hostile is refused in one line, and nothing is ever run.

Every hostile file below, loaded by `pickle.load`, would leave a marker behind.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdm_core.errors import UserError
from cdm_plugins_guidance import pickles
from cdm_plugins_guidance.pickles import Instance, Persistent, read_pickle

PROTOCOL = b"\x80\x04"
STORAGE = b"ctorch.storage\n_load_from_bytes\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def stored(values: torch.Tensor) -> bytes:
    """The bytes that a pickled tensor has its numbers in."""
    storage = values.__reduce_ex__(2)[1][0]
    return storage.__reduce__()[1][0]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    """Reads a pickle given in bytes."""

    def read_bytes(content: bytes) -> Any:
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        return read_pickle(path)

    return read_bytes


def refused(read: Callable[[bytes], Any], content: bytes, message: str = ".") -> None:
    with pytest.raises(UserError, match=message) as error:
        read(content)
    assert "file.pkl" in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


class Reducer:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# -- what is hostile -----------------------------------------------------------------------------------------


def in_a_global(marker: Path) -> bytes:
    return b"cposix\nsystem\n" + tuple_of(text(f"touch {marker}")) + b"R."


def by_its_parts(module: str, name: str) -> Callable[[Path], bytes]:
    def attack(marker: Path) -> bytes:
        payload = f"touch {marker}" if name.endswith("system") else f"open({str(marker)!r}, 'w')"
        return PROTOCOL + text(module) + text(name) + b"\x93" + tuple_of(text(payload)) + b"R."

    return attack


def in_storage_bytes(prefix: int) -> Callable[[Path], bytes]:
    """A payload in place of one of the pickles that make up a storage, the first ones being sound."""

    def attack(marker: Path) -> bytes:
        sound = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        inner = b"".join(pickle.dumps(part, 2) for part in sound[:prefix])
        payload = pickle.dumps(Reducer(os.system, f"touch {marker}"), 2)
        return PROTOCOL + STORAGE + tuple_of(blob(inner + payload)) + b"R."

    return attack


def in_a_zip(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Reducer(os.system, f"touch {marker}"), buffer)
    return PROTOCOL + STORAGE + tuple_of(blob(buffer.getvalue())) + b"R."


def in_a_persistent_id(marker: Path) -> bytes:
    payload = b"cposix\nsystem\n" + tuple_of(text(f"touch {marker}")) + b"R"
    descriptor = PROTOCOL + tuple_of(text("storage"), payload) + b"Q."
    inner = b"".join(
        pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return PROTOCOL + STORAGE + tuple_of(blob(inner + descriptor)) + b"R."


def within(before: bytes, after: bytes) -> Callable[[Path], bytes]:
    """The call of `posix.system` among the arguments of something that is allowed."""

    def attack(marker: Path) -> bytes:
        payload = b"cposix\nsystem\n" + tuple_of(text(f"touch {marker}")) + b"R"
        return PROTOCOL + before + payload + after

    return attack


def as_an_instance(marker: Path) -> bytes:
    return b"(" + text(f"touch {marker}") + b"iposix\nsystem\n."


def as_an_object(marker: Path) -> bytes:
    return b"(cposix\nsystem\n" + text(f"touch {marker}") + b"o."


def as_a_new_object(marker: Path) -> bytes:
    return (
        PROTOCOL + b"csubprocess\nPopen\n" + tuple_of(tuple_of(text("touch"), text(str(marker)))) + b"\x81."
    )


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "global": (in_a_global, "posix.system"),
    "reducer": (lambda m: pickle.dumps(Reducer(os.system, f"touch {m}")), "posix.system"),
    "reducer, protocol 0": (lambda m: pickle.dumps(Reducer(os.system, f"touch {m}"), 0), "posix.system"),
    "eval": (by_its_parts("builtins", "eval"), "builtins.eval"),
    "dotted name": (by_its_parts("torch", "serialization.os.system"), "torch.serialization.os.system"),
    "dotted allowed name": (by_its_parts("torch", "_utils._rebuild_tensor_v2"), "tries to import torch"),
    "attribute of an allowed one": (
        by_its_parts("torch.storage", "_load_from_bytes.__globals__"),
        "_load_from_bytes.__globals__",
    ),
    "module of an allowed one": (by_its_parts("torch._utils", "os"), r"torch\._utils\.os"),
    "empty name": (by_its_parts("torch.storage", ""), "tries to import"),
    "control characters": (by_its_parts("os\x1b[2J\n", "system"), r"os\\x1b\[2J\\n.system"),
    "storage, first pickle": (in_storage_bytes(0), "posix.system"),
    "storage, second pickle": (in_storage_bytes(1), "posix.system"),
    "storage, third pickle": (in_storage_bytes(2), "posix.system"),
    "storage, fourth pickle": (in_storage_bytes(3), "posix.system"),
    "storage, zip": (in_a_zip, "file.pkl"),
    "storage, persistent id": (in_a_persistent_id, "posix.system"),
    "in a dictionary": (within(b"ccollections\nOrderedDict\n(", b"tR."), "posix.system"),
    "in a set": (within(b"cbuiltins\nset\n(](", b"etR."), "posix.system"),
    "in a parameter": (within(b"ctorch._utils\n_rebuild_parameter\n(", b"tR."), "posix.system"),
    "in a state": (within(b"ctorch.nn.modules.container\nModuleDict\n)\x81", b"b."), "posix.system"),
    "instance": (as_an_instance, "posix.system"),
    "object": (as_an_object, "posix.system"),
    "new object": (as_a_new_object, "subprocess.Popen"),
    "copyreg": (
        lambda m: (
            PROTOCOL + b"ccopyreg\n_reconstructor\n" + tuple_of(b"cposix\nsystem\n", b"N", b"N") + b"R."
        ),
        "copyreg._reconstructor",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(name: str, read: Any, marker: Path) -> None:
    attack, message = HOSTILE[name]
    refused(read, attack(marker), message)
    assert not marker.exists()


def test_the_attacks_are_real(marker: Path) -> None:
    """Loaded by `pickle`, these do run: the test above would see it."""
    ran = set()
    for name, (attack, _) in HOSTILE.items():
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            pickle.loads(attack(marker))
        if marker.exists():
            ran.add(name)
            marker.unlink()
    odd = {"attribute of an allowed one", "module of an allowed one", "empty name", "control characters"}
    assert HOSTILE.keys() - ran == odd | {"dotted allowed name", "copyreg", "new object"}


def test_nothing_is_imported(
    read: Any, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nthing = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(read, b"chostile_module\nthing\n.", r"hostile_module\.thing")
    assert not marker.exists()
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize(
    ("opcode", "code"), [(b"\x82\xf0", 240), (b"\x83\xf0\x00", 240), (b"\x84\xf0\0\0\0", 240)]
)
def test_the_registry_of_extensions_is_not_asked(opcode: bytes, code: int, read: Any, marker: Path) -> None:
    copyreg.add_extension("posix", "system", code)  # type: ignore[arg-type]
    try:
        refused(read, PROTOCOL + opcode + tuple_of(text(f"touch {marker}")) + b"R.", f"extension {code}")
    finally:
        copyreg.remove_extension("posix", "system", code)  # type: ignore[arg-type]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Pany\n.", "PERSID"),
        (text("any") + b"Q.", "objects outside the file"),
        # A state for what has none: a name, a dictionary, a tensor; and one in slots for what has one.
        (PROTOCOL + b"ccollections\nOrderedDict\n}" + text("x") + b"Nsb.", "state to a _Global"),
        (PROTOCOL + b"ccollections\nOrderedDict\n)R}b.", "state to a dict"),
        (PROTOCOL + b"ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b.", "state to a Instance"),
        # Calls of what is no constructor, and constructors told what they are never told.
        (PROTOCOL + text("posix.system") + b")R.", "no constructor"),
        (PROTOCOL + b"cnumpy\nndarray\n)R.", "numpy.ndarray in a way"),
        (PROTOCOL + b"ccollections\nOrderedDict\n]R.", "in a way"),
        (PROTOCOL + b"ccollections\nOrderedDict\n(]tR.", "dictionary of something"),
        (PROTOCOL + b"cbuiltins\nset\n(NtR.", "set of no list"),
        (PROTOCOL + b"ctorch.nn.modules.container\nModuleDict\n(}tR.", "ModuleDict of something"),
        (PROTOCOL + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}tR.", "no class or no state"),
        (PROTOCOL + b"cnumpy\ndtype\n(" + text("O") + b"tR.", "NumPy type O"),
        (PROTOCOL + b"ctorch._utils\n_rebuild_parameter\n(NtR.", "no tensor"),
        (PROTOCOL + STORAGE + b"(NtR.", "no bytes"),
        (
            PROTOCOL
            + STORAGE
            + tuple_of(blob(b"\x80\x02N.\x80\x02N.\x80\x02}.\x80\x02N.\x80\x02N."))
            + b"R.",
            "torch.save",
        ),
        # Containers that are none, keys that are hashed without end, references to nothing.
        (b"NNa.", "no list"),
        (b"NNNs.", "no dictionary"),
        (PROTOCOL + b"N(N\x90.", "no set"),
        (b"}(NNs.", "file.pkl"),
        (PROTOCOL + b"})\x85\x85\x85Ns.", "no text or number"),
        (PROTOCOL + b"\x8f()\x85\x90.", "no text or number"),
        # Keys that can be chosen to collide in every table: a thousand cost a million comparisons.
        (PROTOCOL + b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "key that is too large"),
        (PROTOCOL + b"}\x8a\x08" + struct.pack("<q", 1 - 2**61) + b"Ns.", "key that is too large"),
        (PROTOCOL + b"\x8f(\x8a\x08" + struct.pack("<q", 2**31) + b"\x90.", "key that is too large"),
        (b"}G" + struct.pack(">d", 2.0**61) + b"Ns.", "no text or number"),
        (b"Np2305843009213693951\n.", "numbers an object"),
        (b"Np-1\n.", "numbers an object"),
        (b"h\x07.", "KeyError"),
        (b".", "IndexError"),
        (b"t.", "IndexError"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
    ],
)
def test_what_no_network_needs_is_refused(content: bytes, message: str, read: Any) -> None:
    refused(read, content, message)


# -- what takes memory or time -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (number(0), tuple_of(number(4), number(1000)), tuple_of(number(0), number(0))),  # repeated
        (number(0), tuple_of(number(9)), tuple_of(number(1))),  # past the end
        (number(7), tuple_of(number(2)), tuple_of(number(1))),
        (number(0), tuple_of(number(2)), tuple_of(number(2**30))),
        (number(-1), tuple_of(number(2)), tuple_of(number(1))),
        (number(0), tuple_of(number(-2)), tuple_of(number(1))),
        (number(0), tuple_of(number(2), number(2)), tuple_of(number(1))),
        (number(0), tuple_of(*[number(1)] * 20), tuple_of(*[number(1)] * 20)),
        (number(0), text("2"), text("1")),
    ],
)
def test_tensors_stay_within_their_storage(shape: tuple[bytes, ...], read: Any) -> None:
    storage = STORAGE + tuple_of(blob(stored(torch.arange(8.0)))) + b"R"
    tensor = TENSOR + tuple_of(storage, *shape, b"\x89", b"N") + b"R."
    refused(read, PROTOCOL + tensor, "proper shape|exceeds its storage")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-4], "should have 8 numbers of torch.float32, but has 28 bytes"),
        (lambda raw: raw + b"\0", "but has 33 bytes"),
        (lambda raw: raw.replace(b"K\x08N", b"K\x09N"), "should have 9 numbers"),
        (lambda raw: raw.replace(b"FloatStorage", b"OddStorage\n0"), "tries to import torch.OddStorage"),
        (lambda raw: raw.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "another order"),
    ],
)
def test_storages_are_what_they_say(change: Callable[[bytes], bytes], message: str, read: Any) -> None:
    raw = stored(torch.arange(8.0))
    assert change(raw) != raw
    refused(read, PROTOCOL + STORAGE + tuple_of(blob(change(raw))) + b"R.", message)


def test_memory_taken_twice_must_be_stored_twice(read: Any) -> None:
    """One storage of 64 kB, read or viewed over and over through the memo."""
    raw = blob(stored(torch.zeros(16384))) + b"q\x00"
    again = STORAGE + tuple_of(b"h\x00") + b"R0"
    refused(read, PROTOCOL + raw + again * 3 + b".", "larger than the file")
    storage = raw + b"0" + STORAGE + tuple_of(b"h\x00") + b"Rq\x010"
    view = (
        TENSOR + tuple_of(b"h\x01", number(0), tuple_of(number(16384)), tuple_of(number(1)), b"\x89N") + b"R0"
    )
    refused(read, PROTOCOL + storage + view * 3 + b".", "larger than the file")


def test_lengths_beyond_the_file_are_damage(read: Any) -> None:
    for opcode in (b"\x8e", b"\x8d", b"\x96"):  # bytes, text and a byte array of 2^62
        refused(read, PROTOCOL + opcode + struct.pack("<Q", 2**62) + b"abc")


def test_long_files_are_refused(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    assert read(b"N0" * 499 + b"N.") is None
    refused(read, b"N0" * 500 + b"N.", "more than 1,000 opcodes")


@pytest.mark.parametrize(
    "opening", [b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 100_000, b"(" * 100_000 + b"t" * 100_000]
)
def test_deep_files_are_refused(opening: bytes, read: Any) -> None:
    refused(read, opening + b".", "nests deeper than 200 levels")


def test_keys_of_any_usual_size_are_read(read: Any) -> None:
    content = {0: "a", -(2**31): "b", 2**31 - 1: "c", "x": 1, None: 2, True: 3, b"y": 4}
    assert read(pickle.dumps(content)) == content


def test_a_loop_is_read(read: Any) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    found = read(pickle.dumps(loop))
    assert found[0] == 1
    assert found[1] is found


# -- what is damaged -----------------------------------------------------------------------------------------


def test_empty_missing_and_other_files_are_refused(read: Any, tmp_path: Path) -> None:
    refused(read, b"", "is empty")
    refused(read, b"# a text\n", "no pickle")
    refused(read, bytes(64), "no pickle")
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_pickle(path)


def network() -> dict[str, Any]:
    """Something with everything in it that a file of NVIDIA's tools has, but their own classes."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return {
        "ema": torch.nn.Parameter(weight),
        "numbers": [np.float64(0.5), np.int64(3), np.bool_(True), np.arange(6.0).reshape(2, 3)],
        "plain": ({"a", 1}, collections.OrderedDict(), (), b"bytes", 2.5, -1, 1 << 70, None, False),
    }


def test_every_truncation_is_refused(read: Any) -> None:
    content = pickle.dumps(network(), 4)
    for length in range(1, len(content)):
        refused(read, content[:length])


def test_damaged_bytes_never_raise_anything_else(read: Any) -> None:
    content, draw = pickle.dumps(network(), 4), random.Random(0)
    outcomes = collections.Counter[bool]()
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            read(bytes(damaged))
        except UserError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes[True], outcomes[False]) > 50  # the damage reached data and structure


# -- what is sound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4])
def test_what_was_stored_is_read(protocol: int, read: Any) -> None:
    content = network()
    found = read(pickle.dumps(content, protocol))
    assert torch.equal(found["ema"], content["ema"].data)
    assert found["ema"].dtype == torch.float32
    assert found["numbers"][:3] == [0.5, 3, True]
    assert [type(value) for value in found["numbers"][:3]] == [float, int, bool]
    np.testing.assert_array_equal(found["numbers"][3], content["numbers"][3])
    assert found["plain"] == content["plain"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[3:9:2],
        torch.arange(12, dtype=torch.int64).reshape(3, 4),
        torch.linspace(0, 1, 5, dtype=torch.float16),
        torch.linspace(0, 1, 5, dtype=torch.bfloat16),
        torch.linspace(0, 1, 5, dtype=torch.float64),
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_tensors_are_read_whole(tensor: torch.Tensor, read: Any) -> None:
    found = read(pickle.dumps(tensor))
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Modules under the names of NVIDIA's, as long as a pickle is written."""

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("a pickle was loaded by its own loader")

    class EasyDict(dict):  # type: ignore[type-arg]
        pass

    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = persistence.__name__, util.__name__
    _reconstruct_persistent_obj.__qualname__, EasyDict.__qualname__ = (
        "_reconstruct_persistent_obj",
        "EasyDict",
    )
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    for module in (persistence, util):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent = module.__name__.partition(".")[0]
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    return types.SimpleNamespace(rebuild=_reconstruct_persistent_obj, EasyDict=EasyDict)


def test_objects_of_nvidia_are_names_with_a_state(nvidia: Any, read: Any, marker: Path) -> None:
    source = f"open({str(marker)!r}, 'w').close()"
    state = {
        "_init_args": (),
        "_init_kwargs": nvidia.EasyDict(width=np.float64(2)),
        "inner": torch.nn.ModuleDict(),
    }
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Net", "state": state}
    found = read(pickle.dumps({"ema": Reducer(nvidia.rebuild, meta)}))["ema"]
    assert isinstance(found, Persistent)
    assert found.class_name == "Net"
    assert found.state["_init_kwargs"] == {"width": 2.0}
    assert isinstance(found.state["inner"], Instance)
    assert found.state["inner"].class_name == "ModuleDict"
    assert found.state["inner"].state["training"] is True
    assert not marker.exists()
