import math
import sys
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import attention, cpp, use
from cdm_kernels.attention import reference
from cdm_kernels.testing import assert_orders_close, orders

module = sys.modules["cdm_kernels.attention"]  # the package's attribute of that name is the function


class Case(NamedTuple):
    shape: tuple[int, ...]  # of qkv
    layout: str = "contiguous"
    size: float = 1.0


CASES = [
    Case((2, 3 * channels, *pixels), layout)
    for channels, pixels in [(1, (1, 1)), (5, (2, 3)), (16, (4, 4)), (17, (3, 6)), (40, (7, 7)), (8, (9, 8))]
    for layout in ("contiguous", "channels last")
]
CASES += [
    Case((2, 12, 3, 5), "strided"),
    Case((3, 6, 17)),
    Case((2, 6, 2, 3, 2), "channels last"),
    Case((2, 96, 4, 4), "channels last", 3.0),  # weights close to 0 and 1
    Case((1, 48, 5, 7), "contiguous", 3.0),
]


def identity(case):
    return f"{'x'.join(map(str, case.shape))} {case.layout} {case.size:g}"


def inputs(case, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = (case.size * torch.randn(case.shape, generator=generator, dtype=torch.float64)).to(dtype)
    if case.layout == "channels last":
        qkv = qkv.to(memory_format=torch.channels_last if qkv.ndim == 4 else torch.channels_last_3d)
    if case.layout == "strided":
        qkv = torch.stack([qkv, qkv], 2)[:, :, 1]
    return [qkv.requires_grad_()]


@cache
def exact(case, dtype):
    """The reference in float64, of the inputs as they are in dtype."""
    return orders(reference, [part.double().detach().requires_grad_() for part in inputs(case, dtype)])


def test_formula():
    (qkv,) = (part.detach() for part in inputs(Case((2, 12, 3, 2)), torch.float64))
    q, k, v = qkv.flatten(2).unflatten(1, (3, 4)).unbind(1)  # (B, C, pixels)
    logits = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(4)
    expected = torch.einsum("bqk,bck->bcq", logits.exp() / logits.exp().sum(-1, keepdim=True), v)
    for backend in ("reference", "cpp"):
        with use(backend):
            torch.testing.assert_close(attention(qkv), expected.unflatten(2, (3, 2)))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_any_size(size):
    """A softmax of logits that float32 has no exponential of, all on one side of zero."""
    qkv = torch.full((1, 3, 2, 3), math.sqrt(abs(size)))
    qkv[:, 0] *= math.copysign(1.0, size)
    qkv[:, 1] += torch.arange(6.0).view(2, 3) * 1e-2
    torch.testing.assert_close(attention(qkv), reference(qkv))
    assert attention(qkv).isfinite().all()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_cpp(case, dtype, level):
    with use("cpp"):
        found = orders(attention, inputs(case, dtype))
    assert found[0][0].dtype == found[1][0].dtype == dtype
    # Logits are the larger, and so are what their rounding makes of the exponentials.
    factor = case.size**2 if dtype != torch.bfloat16 else 1.0
    assert_orders_close(found, exact(case, dtype), dtype, factor)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_derivatives_of_the_cpp_kernels(layout, level):
    with use("cpp"):
        assert gradcheck(attention, inputs(Case((2, 9, 2, 3), layout), torch.float64))
        assert gradgradcheck(attention, inputs(Case((2, 9, 2, 3), layout), torch.float64))


def test_derivatives_of_the_reference():
    with use("reference"):
        assert gradgradcheck(attention, inputs(Case((2, 9, 2, 3)), torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_keeps_the_layout(layout):
    (qkv,) = inputs(Case((2, 12, 3, 5), layout), torch.float32)
    y = attention(qkv)
    (dqkv,) = torch.autograd.grad(y, qkv, torch.randn(y.shape))
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=form)
    assert dqkv.is_contiguous(memory_format=form)


def test_several_threads_find_the_same():
    case = Case((5, 48, 8, 9), "channels last")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(orders(attention, inputs(case, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype", "shape"),
    [
        ("reference", torch.float32, (2, 6, 2, 2)),
        ("triton", torch.float32, (2, 6, 2, 2)),  # which has no kernel of it
        ("cpp", torch.float16, (2, 6, 2, 2)),
        ("cpp", torch.bfloat16, (1, 600, 16, 16)),  # large ones gain by products in bfloat16
        ("cpp", torch.float32, (0, 6, 2, 2)),
    ],
)
def test_what_takes_the_reference(backend, dtype, shape, monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    (qkv,) = inputs(Case(shape), dtype)
    with use(backend):
        assert torch.equal(attention(qkv), reference(qkv))


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(module, "kernels", None)
    (qkv,) = inputs(CASES[2], torch.float32)
    assert torch.equal(attention(qkv), reference(qkv))


def test_transforms_of_torch_func_take_the_reference():
    (qkv,) = (part.detach() for part in inputs(CASES[2], torch.float64))
    gradient = torch.func.grad(lambda qkv: attention(qkv).square().sum())(qkv)
    (expected,) = torch.autograd.grad(reference(leaf := qkv.clone().requires_grad_()).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(2, 8, 2, 2), (2, 1, 2)])
def test_channels_that_are_no_three_parts(shape):
    with pytest.raises(ValueError, match="must be alike wide"):
        attention(torch.zeros(shape))


def test_third_derivative_raises():
    (qkv,) = inputs(CASES[2], torch.float64)
    (first,) = torch.autograd.grad(attention(qkv).pow(3).sum(), qkv, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(second.sum(), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_operators_are_fit_for_the_compiler(layout, dtype):
    if cpp.library() is None:
        pytest.skip(cpp.problem())
    (qkv,) = inputs(Case((2, 12, 3, 5), layout), dtype)
    y, weights = module._forward(qkv)
    dy, weights = torch.randn_like(y).requires_grad_(), weights.detach()
    torch.library.opcheck(module._forward, (qkv,))
    torch.library.opcheck(module._backward, (dy, qkv, weights))
    cotangent = torch.randn_like(qkv)
    torch.library.opcheck(
        module._double_backward,
        (cotangent, dy.detach(), qkv.detach(), weights),
        test_utils=["test_schema", "test_faketensor"],
    )
