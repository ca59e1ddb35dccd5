"""What the kernels' tests share: Triton's interpreter, unwritten memory full of NaN, architecture levels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cdm_kernels import build, cpp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """Where Triton kernels run: cuda, or cpu in Triton's interpreter."""
    return DEVICE


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty, empty_like, new_empty give NaN (integers: their largest): what a kernel leaves shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=list(build.levels()))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each architecture level that this processor has: the test's C++ kernels are called at that level."""
    found = cpp.library()
    if found is None:
        pytest.skip(cpp.problem())
    known = list(build.levels())
    if known.index(request.param) < known.index(found.level):
        pytest.skip(f"this processor does not have level {request.param}")
    chosen, call = cpp.Library(found.path, request.param), cpp.Kernel.__call__

    def call_anew(kernel: cpp.Kernel, *arguments: Any) -> None:
        kept, kernel._function = kernel._function, None
        try:
            call(kernel, *arguments)
        finally:
            kernel._function = kept

    monkeypatch.setattr(cpp, "library", lambda: chosen)
    monkeypatch.setattr(cpp.Kernel, "__call__", call_anew)
    return request.param


_COMPILE = """
import importlib, json, re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module(sys.argv[1])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
found = []
for name, signature, constants, warps in json.load(sys.stdin):
    function = getattr(module, name)
    signature = {a: "constexpr" if a in constants else signature[a] for a in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(function, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    usage = {key: int(value) for key, value in re.findall("(REG|STACK|LOCAL|SHARED):([0-9]+)", text)}
    found.append(usage)
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def compile_for_h100(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, int]]]:
    """compile_for_h100(module, [(kernel, signature, constants, warps), ...]): resources of each, no GPU used.

    signature: {argument: "*fp32", "i32", ...}; constants: {argument: value}; pointers are 16-byte aligned.
    REG, STACK, LOCAL, SHARED as cuobjdump names them: nothing was spilled where STACK and LOCAL are 0. In a
    process of its own, where no decorator made the kernels interpreted.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)

    def run(module: str, kernels: list[Any]) -> list[dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, module],
            input=json.dumps(kernels),
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
