"""Pickles of networks, read without running anything in them.

A pickle is a program: a list of opcodes that may import and call what it likes. NVIDIA's tools go further and
store, with every object, the source of its class, which their loader executes. Here the opcodes are
interpreted (`pickletools.genops` splits the file) by a machine that imports nothing and calls nothing but the
few constructors below, each looked up by its exact (module, name) and written here. What they make is inert:
containers, numbers, texts, tensors, arrays, and `Persistent` and `Instance`, which are names with a state. No
more memory is taken than the file accounts for.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from cdm_core.errors import UserError

MAX_OPCODES = 2_000_000  # a network of a thousand tensors takes some 20,000
MAX_DEPTH = 200  # of containers within containers; a network has some 30
MAX_DIMENSIONS = 16  # of a tensor
MAX_INTEGER = 2**31  # of a key: larger ones can be chosen to collide, and take quadratic time

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the files that `torch.save` wrote before it wrote zips
_KEYS = (str, int, bool, bytes, type(None))  # hashed without recursion
_INERT = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_IMPORTS = {"EXT1", "EXT2", "EXT4", "INST"}


@dataclass(frozen=True)
class Persistent:
    """An object that NVIDIA's `torch_utils.persistence` stored: its class by name, and its attributes.

    `state["_init_args"]` and `state["_init_kwargs"]` are what it was made with.
    """

    class_name: str
    state: Mapping[str, Any]


@dataclass
class Instance:
    """An object of a class that is known by name alone, with its attributes."""

    class_name: str
    state: Mapping[str, Any]


def read_pickle(path: Path) -> Any:
    """The content of a pickle: dict, list, tuple, set, texts, numbers, bytes, and the objects named below.

    Tensors are on the CPU; NumPy scalars become Python's. Raises UserError, one line, on a file that is no
    pickle, is damaged or hostile: it says what the file tried to import, and nothing of it has been run.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            root = _Machine(_CONSTRUCTORS, _Budget(size)).run(content)
        _check_depth(root)
        return root
    except _Refusal as refusal:
        raise UserError(f"{path} is refused: {refusal}; nothing in it was run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # any bytes may come here, and they raise anything
        problem = ascii(f"{type(error).__name__}: {error}"[:120])[1:-1]
        raise UserError(f"{path} is no pickle, or is damaged ({problem}); nothing in it was run") from error


class _Refusal(Exception):
    """Why a pickle is not read, in words."""


def _require(condition: bool, refusal: str) -> None:
    if not condition:
        raise _Refusal(refusal)


# -- the machine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """What a pickle refers to by name: the name, never the thing."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Budget:
    """What a file of `size` bytes can account for: memory that is taken twice must be stored twice."""

    def __init__(self, size: int) -> None:
        self.opcodes, self.storages, self.tensors = MAX_OPCODES, size, size

    def take(self, *, opcodes: int = 0, storages: int = 0, tensors: int = 0) -> None:
        """Raise `_Refusal` where there is not as much left; storages, tensors: bytes."""
        self.opcodes -= opcodes
        self.storages -= storages
        self.tensors -= tensors
        _require(self.opcodes >= 0, f"it has more than {MAX_OPCODES:,} opcodes")
        _require(self.storages >= 0 and self.tensors >= 0, "its tensors are larger than the file")


Constructor = Callable[[_Budget, tuple[Any, ...]], Any]


class _Machine:
    """Interprets opcodes. `allowed`: what may be named, and what calling it makes (None: it is not called).

    persistent: what is made of a persistent id; None where there may be none.
    """

    def __init__(
        self,
        allowed: Mapping[tuple[str, str], Constructor | None],
        budget: _Budget,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.allowed, self.budget, self.persistent = allowed, budget, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: mmap.mmap | io.BytesIO) -> Any:
        """The object that the next pickle of `content` describes."""
        self.stack, self.marked, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], content)):
            self.budget.take(opcodes=1)
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise _Refusal("it does not end")

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in _INERT:
            self.stack.append(argument)
        elif name in _FRESH:
            self.stack.append(_FRESH[name]())
        elif name in _MOVES:
            _MOVES[name](self, argument)
        elif name in _IMPORTS:
            what = shown(argument.replace(" ", ".")) if name == "INST" else f"extension {argument}"
            raise _Refusal(f"it tries to import {what}")
        elif name not in ("PROTO", "FRAME"):
            raise _Refusal(f"it uses the opcode {name}, which networks are not stored with")

    def push(self, value: Any) -> None:
        """Put on top."""
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        """The top `count` objects, taken off."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def refer(self, module: Any, name: Any) -> None:
        """Push a reference; `_Refusal` unless exactly this name of exactly this module is allowed."""
        known = isinstance(module, str) and isinstance(name, str) and (module, name) in self.allowed
        _require(known, f"it tries to import {shown(module)}.{shown(name)}")
        self.stack.append(_Global(module, name))

    def call(self) -> None:
        """Push what an allowed constructor makes of its arguments."""
        function, arguments = self.take(2)
        _require(isinstance(function, _Global), "it tries to call what is no constructor")
        constructor = self.allowed[function.module, function.name]
        if constructor is None or not isinstance(arguments, tuple):
            raise _Refusal(f"it tries to call {function} in a way that no network needs")
        self.stack.append(constructor(self.budget, arguments))

    def append(self, items: Iterable[Any]) -> None:
        """Append to the list on top."""
        _require(type(self.stack[-1]) is list, "it appends to what is no list")
        self.stack[-1].extend(items)

    def insert(self, flat: list[Any] | tuple[Any, ...]) -> None:
        """Put keys and values into the dictionary on top."""
        _require(type(self.stack[-1]) is dict and len(flat) % 2 == 0, "it puts items into no dictionary")
        self.stack[-1].update(zip(_keys(flat[::2]), flat[1::2], strict=True))

    def add(self, items: list[Any]) -> None:
        """Add to the set on top."""
        _require(type(self.stack[-1]) is set, "it adds to what is no set")
        self.stack[-1].update(_keys(items))

    def build(self) -> None:
        """Give a state to the object on top, of the few kinds that have one."""
        (state,) = self.take(1)
        target = self.stack[-1]
        if isinstance(target, Instance) and type(state) is dict:
            target.state = state
        elif isinstance(target, _DType):
            target.set_order(state)
        elif type(target) is np.ndarray:
            _fill(target, state, self.budget)
        else:
            raise _Refusal(f"it gives a state to a {type(target).__name__}")

    def persist(self) -> None:
        """Replace a persistent id by what it means."""
        if self.persistent is None:
            raise _Refusal("it refers to objects outside the file")
        self.stack.append(self.persistent(self.stack.pop()))

    def memoise(self, index: int | None) -> None:
        """Remember the object on top."""
        _require(index is None or 0 <= index < MAX_INTEGER, "it numbers an object beyond its end")
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def mark(self) -> None:
        """Set a mark."""
        self.marked.append(self.stack)
        self.stack = []


def shown(value: Any, limit: int = 80) -> str:
    """A text of a file as an error may quote it: printable ASCII, of at most `limit` characters of it.

    What is no text is shown by its type alone: its own representation could be of any length.
    """
    return ascii(value[:limit])[1:-1] if isinstance(value, str) else f"<{type(value).__name__}>"


def _keys(keys: Any) -> Any:
    _require(all(type(key) in _KEYS for key in keys), "it has a key that is no text or number")
    small = all(-MAX_INTEGER <= key < MAX_INTEGER for key in keys if type(key) is int)
    _require(small, "it has a number for a key that is too large")
    return keys


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(_keys(flat[::2]), flat[1::2], strict=True))


_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_MOVES: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.take(1),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memoise(None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, index: m.memoise(index)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.push(m.take(1)),
    "TUPLE2": lambda m, _: m.push(m.take(2)),
    "TUPLE3": lambda m, _: m.push(m.take(3)),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "DICT": lambda m, _: m.push(_pairs(m.since_mark())),
    "APPEND": lambda m, _: m.append(m.take(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.insert(m.take(2)),
    "SETITEMS": lambda m, _: m.insert(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(m.since_mark()),
    "GLOBAL": lambda m, names: m.refer(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.refer(*m.take(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persist(),
}


def _check_depth(root: Any) -> None:
    """Refuse what would overrun the stack of whoever walks it; a loop is walked once."""
    level, seen, depth = [root], {id(root)}, 0
    while level:
        _require(depth <= MAX_DEPTH, f"it nests deeper than {MAX_DEPTH} levels")
        inside = [part for parent in level for part in _parts(parent)]
        level = []
        for part in inside:
            if id(part) not in seen:
                seen.add(id(part))
                level.append(part)
        depth += 1


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Persistent | Instance):
        return (value.state,)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


# -- what may be called --------------------------------------------------------------------------------------


def _empty(_: _Budget, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    _require(arguments == (), "it makes a dictionary of something")
    return {}


def _set(_: _Budget, arguments: tuple[Any, ...]) -> set[Any]:
    _require(len(arguments) == 1 and type(arguments[0]) is list, "it makes a set of no list")
    return set(_keys(arguments[0]))


def _persistent(_: _Budget, arguments: tuple[Any, ...]) -> Persistent:
    meta = arguments[0] if len(arguments) == 1 and type(arguments[0]) is dict else {}
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or type(state) is not dict:
        raise _Refusal("an object of NVIDIA's tools in it has no class or no state")
    return Persistent(name, state)


def _instance(name: str) -> Constructor:
    def make(_: _Budget, arguments: tuple[Any, ...]) -> Instance:
        _require(arguments == (), f"it makes a {name} of something")
        return Instance(name, {})

    return make


# Tensors. A storage is a tensor of one dimension.

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


def _storage(budget: _Budget, arguments: tuple[Any, ...]) -> Tensor:
    """The storage in bytes that `torch.save` wrote: five small pickles, then the numbers."""
    _require(len(arguments) == 1 and type(arguments[0]) is bytes, "it loads a storage of no bytes")
    budget.take(storages=len(arguments[0]))
    content = io.BytesIO(arguments[0])
    described: list[tuple[torch.dtype, str, int]] = []
    allowed: dict[tuple[str, str], Constructor | None] = {("torch", name): None for name in _STORAGES}
    machine = _Machine(allowed, budget, lambda key: described.append(_described(key)))
    magic, version, system, _, keys = (machine.run(content) for _ in range(5))
    _require((magic, version) == (_MAGIC, _VERSION), "a storage in it was not written by torch.save")
    _require(type(system) is dict and system.get("little_endian") is True, "its bytes are in another order")
    _require(len(described) == 1 and keys == [described[0][1]], "a storage in it is not described")
    dtype, _, count = described[0]
    length = content.read(8)
    raw = bytearray(content.read())
    _require(
        len(length) == 8 and int.from_bytes(length, "little") == count and len(raw) == count * dtype.itemsize,
        f"a storage in it should have {count} numbers of {dtype}, but has {len(raw)} bytes",
    )
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _described(key: Any) -> tuple[torch.dtype, str, int]:
    """dtype, name and length of a storage from its persistent id."""
    _require(type(key) is tuple and len(key) == 6 and key[0] == "storage", "a storage in it is not described")
    _, kind, name, _, count, view = key
    plain = isinstance(kind, _Global) and type(name) is str and type(count) is int and view is None
    _require(plain and count >= 0, "a storage in it is not described")
    return _STORAGES[kind.name], name, count


def _tensor(budget: _Budget, arguments: tuple[Any, ...]) -> Tensor:
    _require(len(arguments) >= 4 and isinstance(arguments[0], Tensor), "a tensor in it has no storage")
    storage, offset, size, stride = arguments[:4]
    for numbers in ((offset,), size, stride):
        _sizes(numbers)
    _require(len(size) == len(stride), "a tensor in it has no proper shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    _require(count <= len(storage) and last < max(len(storage), 1), "a tensor in it exceeds its storage")
    budget.take(tensors=count * storage.itemsize)
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _parameter(_: _Budget, arguments: tuple[Any, ...]) -> Tensor:
    _require(bool(arguments) and isinstance(arguments[0], Tensor), "a parameter in it is no tensor")
    tensor: Tensor = arguments[0]
    return tensor


def _sizes(value: Any) -> None:
    proper = type(value) is tuple and len(value) <= MAX_DIMENSIONS
    proper = proper and all(type(n) is int and 0 <= n <= sys.maxsize for n in value)
    _require(proper, "a tensor in it has no proper shape")


# NumPy.

_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


@dataclass
class _DType:
    """A type of plain numbers."""

    value: np.dtype[Any]

    def set_order(self, state: Any) -> None:
        """Set the byte order from the state of a pickled dtype."""
        plain = type(state) is tuple and len(state) >= 8 and state[2:5] == (None, None, None)
        _require(plain and state[1] in ("<", ">", "|", "="), "it has a NumPy type that is no plain number")
        self.value = self.value.newbyteorder(state[1])


def _dtype(_: _Budget, arguments: tuple[Any, ...]) -> _DType:
    name = arguments[0] if arguments else None
    _require(type(name) is str and name in _NUMBERS, f"it has the NumPy type {shown(name)}")
    return _DType(np.dtype(name))


def _scalar(_: _Budget, arguments: tuple[Any, ...]) -> int | float | bool:
    _require(len(arguments) == 2 and isinstance(arguments[0], _DType), "it has a NumPy number of no type")
    dtype, raw = arguments[0].value, arguments[1]
    _require(type(raw) is bytes and len(raw) == dtype.itemsize, "it has a NumPy number of another size")
    number: int | float | bool = np.frombuffer(raw, dtype)[0].item()
    return number


def _array(_: _Budget, arguments: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    _require(
        arguments[:2] == (_Global("numpy", "ndarray"), (0,)), "it has a NumPy array of a class of its own"
    )
    return np.empty(0, np.uint8)


def _fill(array: np.ndarray[Any, Any], state: Any, budget: _Budget) -> None:
    """Give an array its shape and numbers, in place: others may refer to it already."""
    _require(type(state) is tuple and len(state) == 5, "it has a NumPy array of no proper state")
    version, shape, dtype, fortran, raw = state
    _require(isinstance(dtype, _DType) and type(fortran) is bool, "it has a NumPy array of no plain numbers")
    _sizes(shape)
    fits = type(raw) is bytes and math.prod(shape) * dtype.value.itemsize == len(raw)
    _require(fits, "a NumPy array in it exceeds its bytes")
    budget.take(tensors=len(raw))
    array.__setstate__((version, shape, dtype.value, fortran, raw))


_CONSTRUCTORS: dict[tuple[str, str], Constructor | None] = {
    ("collections", "OrderedDict"): _empty,
    ("dnnlib.util", "EasyDict"): _empty,
    ("builtins", "set"): _set,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.nn.modules.container", "ModuleDict"): _instance("ModuleDict"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): None,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
}
