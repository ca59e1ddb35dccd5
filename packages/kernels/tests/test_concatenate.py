import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_kernels import concatenate
from cdm_kernels.concatenate import reference
from cdm_kernels.testing import assert_orders_close, orders

SHAPES = [(2, 3, 4, 5), (2, 4, 4, 5), (2, 2, 4, 5)]


def parts(dtype=torch.float64, layout=torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES)
    return [part.contiguous(memory_format=layout).requires_grad_() for part in drawn]


def bent(function):
    """Not linear, so that there is a second derivative to compare."""
    return lambda *tensors: function(*tensors).pow(3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch_in_value_and_derivatives(dtype, layout):
    found = orders(bent(concatenate), parts(dtype, layout))
    exact = orders(bent(reference), [part.detach().double().requires_grad_() for part in parts(dtype)])
    assert_orders_close(found, exact, dtype)


def test_derivatives_of_first_second_and_third_order():
    assert gradcheck(concatenate, parts())
    assert gradgradcheck(bent(concatenate), parts())
    first = torch.autograd.grad(bent(concatenate)(*parts()).sum(), inputs := parts(), allow_unused=True)
    assert first == (None,) * 3  # of other leaves: the graph is one of its own
    value = concatenate(*inputs).pow(4).sum()
    gradient = value
    for factor in (4, 12, 24):
        (gradient,) = torch.autograd.grad(gradient.sum(), inputs[:1], create_graph=True)
        torch.testing.assert_close(gradient, factor * inputs[0] ** ({4: 3, 12: 2, 24: 1}[factor]))


def test_keeps_the_layout_and_gives_gradients_in_it():
    tensors = parts(torch.float32, torch.channels_last)
    y = concatenate(*tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for gradient in torch.autograd.grad(y, tensors, torch.randn_like(y)):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_the_second_derivative_pads_nothing_with_zeros():
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors = parts(torch.float32)
    y = concatenate(*tensors)
    gradients = torch.autograd.grad(
        y, tensors, (seed := torch.ones_like(y).requires_grad_()), create_graph=True
    )
    with Names():
        torch.autograd.grad(gradients, seed, [torch.ones_like(g) for g in gradients])
    assert any("cat" in name for name in seen)
    assert not any("slice_backward" in name or "zeros" in name for name in seen)
