import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels.product import product

module = sys.modules["cdm_kernels.product"]


def inputs(dtype=torch.float64, shapes=((3, 5), (5, 2))):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


FUNCTIONS = {"eager": product, "operator": lambda a, b: module._product(a, b)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_the_product_in_every_order(name):
    a, b = inputs()
    assert torch.equal(FUNCTIONS[name](a, b), a @ b)
    assert gradcheck(FUNCTIONS[name], (a, b))
    assert gradgradcheck(FUNCTIONS[name], (a, b))


def orders(function, a, b):
    """Value, gradient in a, and what a training step finds from that gradient: all under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        y = function(a, b)
        (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        return y, first, *torch.autograd.grad(first.square().sum(), (a, b))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_rounds_no_order(name):
    a, b = inputs(torch.float32, ((9, 40), (40, 7)))
    found = orders(FUNCTIONS[name], a, b)
    exact = orders(product, a.double().detach().requires_grad_(), b.double().detach().requires_grad_())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    # The remedy that does not reach the derivatives: that of the gradient is what this operator is for.
    first = orders(module.reference, a, b)[1]
    assert (first - exact[1]).abs().max() > 1e-4 * exact[1].abs().max()


def test_a_gradient_that_nobody_asks_for_is_not_computed(monkeypatch):
    a, b = inputs()
    y = product(a, b)
    seen = []

    def count(x, z):
        seen.append((x.shape, z.shape))
        return x @ z

    monkeypatch.setattr(module, "reference", count)
    torch.autograd.grad(y.sum(), a)
    assert seen == [((3, 2), (2, 5))]


def test_transforms_of_torch_func():
    a, b = (part.detach() for part in inputs())
    found = torch.func.grad(lambda a: product(a, b).square().sum())(a)
    torch.testing.assert_close(found, 2 * (a @ b) @ b.T)


def test_operator_is_fit_for_the_compiler():
    torch.library.opcheck(module._product, tuple(inputs(torch.float32)))


def test_compiled_second_order_equals_eager():
    def penalty(a, b):
        (slope,) = torch.autograd.grad(product(a, b).pow(3).sum(), a, create_graph=True)
        return slope.square().sum()

    a, b = inputs()
    expected = torch.autograd.grad(penalty(a, b), (a, b))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(a, b), (a, b))
    torch.testing.assert_close(found, expected)
