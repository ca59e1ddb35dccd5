import sys
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from cdm_kernels import cpp, use
from cdm_kernels.softplus import SMALL, softplus
from cdm_kernels.testing import assert_orders_close, orders

module = sys.modules["cdm_kernels.softplus"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


class Case(NamedTuple):
    shape: tuple[int, ...]
    beta: float = 3.0
    spread: float = 2.0
    layout: str = "contiguous"


CASES = [
    *(Case((SMALL + extra,)) for extra in (0, 1, 7, 8, 15)),
    Case((2, 33, 5, 7)),
    Case((2, 32, 5, 7), layout="channels last"),
    Case((2, 33, 5, 7), layout="strided"),
    Case((5, 8191), 1.0, 20.0),  # in threads
    Case((4096,), 5.0, 0.01),
    Case((4096,), 0.5, 50.0),
]


def inputs(case, dtype):
    """z, a leaf in dtype and the case's layout."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(case.shape, generator=generator, dtype=torch.float64) * case.spread).to(dtype)
    if case.layout == "channels last":
        z = z.to(memory_format=torch.channels_last)
    if case.layout == "strided":
        z = torch.cat([z, z], 1)[:, ::2]
    return z.requires_grad_()


@cache
def exact(case, dtype):
    """In float64, of the inputs as they are in dtype, by a formula that has no threshold."""
    z = inputs(case, dtype).double().detach().requires_grad_()
    return orders(lambda z: torch.logaddexp(case.beta * z, torch.zeros_like(z)) / case.beta, [z])


@pytest.fixture(autouse=True)
def _compiled():
    if cpp.library() is None:
        pytest.skip(cpp.problem())


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives(case, dtype, level, nan_filled):
    z = inputs(case, dtype)
    assert_orders_close(orders(lambda z: softplus(z, case.beta), [z]), exact(case, dtype), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_gradient_alone_is_the_kernels_own(layout, level, nan_filled):
    """Without a graph another code path serves; the cotangent comes in the other layout."""
    case = Case((2, 32, 5, 7), layout=layout)
    z = inputs(case, torch.float32)
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    if layout == "contiguous":
        dy = dy.to(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(softplus(z, 3.0), z, dy)
    expected = dy.double() * torch.sigmoid(3 * z.detach().double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    assert found.stride() == z.stride()


def test_tails_are_right_in_relation_to_themselves(level):
    z = torch.linspace(-25, 25, 4096)
    expected = torch.logaddexp(3 * z.double(), torch.zeros(1).double()) / 3
    torch.testing.assert_close(softplus(z, 3.0).double(), expected, rtol=6e-6, atol=0)  # 75 roundings of 3 z


def test_extremes(level):
    z = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, 0.0, float("nan"), -float("nan")])
    found = softplus(z.repeat(SMALL), 2.0)[:7]
    expected = torch.tensor([float("inf"), 0.0, 1e30, 0.0, 0.34657359027997264])
    torch.testing.assert_close(found[:5], expected, rtol=1e-6, atol=1e-30)
    assert found[5:].isnan().all()


def test_gradcheck_in_two_orders(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradcheck(lambda z: softplus(z, 3.0), [z])
    assert gradgradcheck(lambda z: softplus(z, 3.0), [z])


def test_a_third_derivative_is_right(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    z = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    found = softplus(z, 2.0)
    for _ in range(3):
        (found,) = torch.autograd.grad(found.sum(), z, create_graph=True)
    s = torch.sigmoid(2 * z)
    torch.testing.assert_close(found, 4 * s * (1 - s) * (1 - 2 * s))


def test_small_tensors_and_tracers_take_pytorchs_own():
    z = torch.randn(SMALL - 1)
    assert torch.equal(softplus(z, 3.0), F.softplus(z, 3.0))
    graph = make_fx(lambda z: softplus(z, 3.0))(torch.randn(2 * SMALL))
    assert "aten.softplus.default" in graph.code
    with use("reference"):
        z = torch.randn(2 * SMALL)
        assert torch.equal(softplus(z, 3.0), F.softplus(z, 3.0))


def test_torch_func_takes_pytorchs_own():
    z = torch.randn(2, SMALL)
    slope = torch.func.vmap(torch.func.grad(lambda row: softplus(row, 3.0).sum()))(z)
    torch.testing.assert_close(slope, torch.sigmoid(3 * z))
