"""The C++ kernels, loaded by ctypes: `library()` finds, checks or builds the shared object.

The binary of the wheel serves when it was built from these very sources; else one from the cache; else it is
built there on first use. Without a compiler there is no library, `problem()` says why, and the references
serve.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Arguments that are no tensors. (`isinstance(a, Tensor)` of what is none costs as much as a small kernel.)
_AS_THEY_ARE = frozenset((int, bool, float, type(None), type(ctypes.byref(ctypes.c_int64()))))
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # `Dtype` of common.h

_problem = ""


class Library:
    """Functions of the shared object by name, at one architecture level."""

    def __init__(self, path: Path, level: str | None = None) -> None:
        self.path, self._functions = path, ctypes.CDLL(str(path))
        for name in ("cdm_source_hash", "cdm_level"):
            getattr(self._functions, name).restype = ctypes.c_char_p
        self.level: str = level or self._functions.cdm_level().decode()

    @property
    def source_hash(self) -> str:
        """`build.source_hash` at the time of building."""
        return self._functions.cdm_source_hash().decode()

    def function(self, name: str, signature: str) -> Callable[..., None]:
        """`name` at this level; signature: one letter an argument, i int64, d double, p pointer."""
        found = getattr(self._functions, f"{name}_{self.level}")
        kinds = {"i": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
        found.argtypes, found.restype = [kinds[letter] for letter in signature], None
        return found


@cache
def library() -> Library | None:
    """The library, or None where there is none to be had; CDM_KERNELS_CPP=0 does without."""
    global _problem
    if os.environ.get("CDM_KERNELS_CPP") == "0":
        _problem = "switched off by CDM_KERNELS_CPP=0"
        return None
    from cdm_kernels import build  # here: `python -m cdm_kernels.build` must be the first to import it

    wanted, kept = build.source_hash(), build.cached()
    for path in (build.PACKAGED, kept):
        try:
            if path.exists() and (found := Library(path)).source_hash == wanted:
                return found
        except (OSError, AttributeError):  # of another machine, or of other sources
            continue
    try:
        build.compiler(), build.ninja()
        print("cdm-kernels: building the C++ kernels, once (half a minute)", file=sys.stderr)
        build.build(kept)
        return Library(kept)
    except (build.BuildError, OSError) as error:
        _problem = " ".join(str(error).split())
        print(f"cdm-kernels: without C++ kernels, slower: {_problem}", file=sys.stderr)
        return None


def problem() -> str:
    """Why `library()` is None, in one line; empty while it is not."""
    return _problem


class Kernel:
    """A function of the library, looked up when it is first called.

    signature: one letter an argument, i int64, d float64, p the address of a tensor's first element or None.
    """

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature
        self._function: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Tensors must be laid out as the kernel reads them; integers and floats go as they are."""
        if self._function is None:
            found = library()
            assert found is not None
            self._function = found.function(self.name, self.signature)
        self._function(*[a if type(a) in _AS_THEY_ARE else a.data_ptr() for a in arguments])
