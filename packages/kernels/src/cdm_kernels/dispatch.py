"""Which implementation serves a call, and how an operator becomes one of torch's.

Three ways lead to the same kernels. In eager, an `autograd.Function`: three times cheaper than the
dispatcher. Where a compiler or tracer looks on, a custom operator: there an `autograd.Function` that is
differentiated twice would be silently wrong. And the reference, plain PyTorch, wherever no kernel fits.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cdm_kernels import cpp

_LIBRARY = torch.library.Library("cdm_kernels", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def traced(*tensors: Tensor | None) -> bool:
    """Whether torch.compile, make_fx, a fake or another mode or subclass is looking on."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(t is not None and type(t) not in _PLAIN for t in tensors)


def has_kernel(x: Tensor, composite: bool = False, triton: bool = True) -> bool:
    """Whether there are kernels for tensors like x.

    Transforms of `torch.func` and duals of forward mode take the reference. composite: the operator is made
    of torch's own for the sake of its second derivative alone, so under `first_order` too. triton: whether
    Triton has kernels of the operator.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if composite and in_first_order():
        return False
    backend = _backend(x.device.type, x.dtype)
    return backend is not None and (triton or backend != "triton")


def _backend(device: str, dtype: torch.dtype) -> str | None:
    chosen = _forced or {"cpu": "cpp", "cuda": "triton"}.get(device)
    if chosen == "triton":
        return "triton" if dtype in _TRITON_DTYPES and triton_problem(device) == "" else None
    fits = chosen == "cpp" and device == "cpu" and dtype in cpp.DTYPES and cpp.library() is not None
    return "cpp" if fits else None


# What `torch.compiler.assume_constant_result` sets; that function imports the whole compiler for it.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def triton_problem(device: str) -> str:
    """Why Triton's kernels cannot run on `device`, in one line; empty where they can.

    Tried once, by a kernel that does nothing much: Triton may be there without a compiler, or a GPU too old.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        found = import_module("cdm_kernels.triton.probe").run(device)
    except Exception as error:  # whatever a driver or a compiler says
        found = " ".join(str(error).split())[:300] or type(error).__name__
    if found:
        print(f"cdm-kernels: without Triton kernels, slower: {found}", file=sys.stderr)
    return found


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Take one implementation while the context is open: `reference`, `cpp` or `triton`.

    For comparisons and tests, not for threads. `triton` runs on CPU tensors in Triton's interpreter alone
    (TRITON_INTERPRET=1 set before Triton is imported). Where the named kernels do not fit, the reference
    serves.
    """
    global _forced
    if backend not in ("reference", "cpp", "triton"):
        raise ValueError(f"backend must be reference, cpp or triton, not {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def first_order() -> Iterator[None]:
    """What is computed while the context is open is differentiated once at most, as in sampling.

    Operators that are there for the sake of their second derivative make way for torch's own, which cost less
    to differentiate once. Not for threads. Results stay right to all orders, only slower in the second.
    """
    global _first_order
    before, _first_order = _first_order, True
    try:
        yield
    finally:
        _first_order = before


def in_first_order() -> bool:
    """Whether a `first_order` context is open."""
    return _first_order


_forced: str | None = None
_first_order = False


@cache
def _module(backend: str, operator: str) -> Any:
    return import_module(f"cdm_kernels.{backend}.{operator}")


def kernels(x: Tensor, operator: str) -> Any:
    """The module with the kernels of `operator` for x: `cdm_kernels.triton.*` or `cdm_kernels.cpp.*`."""
    return _module("triton" if _forced == "triton" or x.is_cuda else "cpp", operator)


def define(
    schema: str,
    operator: str,
    function: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
    devices: tuple[str, ...] = ("CPU", "CUDA"),
) -> Callable[..., Any]:
    """Make `torch.ops.cdm_kernels.NAME`: `function` of `kernels(x, operator)` on `devices`, and its fake.

    schema: `NAME(Tensor x, ...) -> ...`, its first tensor deciding the device. backward(ctx, *gradients) and
    save(ctx, inputs, output) as `torch.library.register_autograd` takes them. Where the derivatives end,
    backward must raise: without one torch only warns, and leaves a term out.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in devices:
        _LIBRARY.impl(name, _late(key.lower(), operator, function), key)
    torch.library.register_fake(f"cdm_kernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"cdm_kernels::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.cdm_kernels, name).default


def define_composite(
    schema: str, function: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]
) -> Callable[..., Any]:
    """`define` for a function of torch's own operators: it serves every device, and fakes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cdm_kernels::{name}", function, lib=_LIBRARY)  # with the layouts it gives
    torch.library.register_autograd(f"cdm_kernels::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.cdm_kernels, name).default


def _late(device: str, operator: str, function: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        triton = _forced == "triton" or device == "cuda"
        return getattr(_module("triton" if triton else "cpp", operator), function)(*arguments)

    return kernel


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy of it, in one of the two layouts that kernels read; whether that is channels last."""
    if x.is_contiguous():
        return x, False
    return (x, True) if is_channels_last(x) else (x.contiguous(), False)


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in the channels-last layout, and not in the contiguous one as well."""
    if x.is_contiguous() or x.ndim not in (4, 5):
        return False
    return x.is_contiguous(memory_format=channels_last(x.ndim))


def like(tensor: Tensor, is_channels_last: bool) -> Tensor:
    """tensor in a layout that `dense` found."""
    return (
        tensor.contiguous(memory_format=channels_last(tensor.ndim))
        if is_channels_last
        else tensor.contiguous()
    )


def channels_last(ndim: int) -> torch.memory_format:
    """The channels-last format of 4-D and 5-D tensors."""
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def leaf_free(tensor: Tensor) -> Tensor:
    """tensor behind a view where it is a leaf: `wanted` cannot ask the engine about leaves."""
    return tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad else tensor


def wanted(ctx: Any, inputs: Iterable[int]) -> list[bool]:
    """Which inputs' gradients the running backward pass will use; of a leaf, whether it requires grad.

    `autograd.grad(h, x)` wants none of the weights' gradients, and `ctx.needs_input_grad` does not know: it
    says which inputs require grad at all. Those gradients are a third of a convolution's backward pass.
    """
    return [ctx.needs_input_grad[i] and _will_run(ctx.next_functions[i][0]) for i in inputs]


def _will_run(node: Any) -> bool:
    return "AccumulateGrad" in node.name() or torch._C._will_engine_execute_node(node)
