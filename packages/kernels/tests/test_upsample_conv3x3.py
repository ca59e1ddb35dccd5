from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import upsample_conv3x3, use
from cdm_kernels.testing import assert_orders_close, orders
from cdm_kernels.upsample_conv3x3 import reference

module = import_module("cdm_kernels.upsample_conv3x3")  # the package's attribute is the function


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detour pays for large images alone; it is to be right for all."""
    monkeypatch.setattr(module, "_SMALL", 0)


def inputs(dtype=torch.float64, size=(3, 4), layout=torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, *size), (4, 3, 3, 3), (4,)]
    x, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [part.requires_grad_() for part in (x.contiguous(memory_format=layout), *rest)]


def bent(function):
    """Not linear in x, so that every second derivative is there to compare."""
    return lambda *parts: function(*parts).pow(3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 5), (7, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_convolution_of_the_upsampled_image(dtype, size, layout):
    found = orders(bent(upsample_conv3x3), inputs(dtype, size, layout))
    exact = orders(bent(reference), [part.detach().double().requires_grad_() for part in inputs(dtype, size)])
    assert_orders_close(found, exact, dtype)


def test_derivatives_of_first_and_second_order():
    assert gradcheck(upsample_conv3x3, inputs(size=(2, 3)))
    assert gradgradcheck(upsample_conv3x3, inputs(size=(2, 3)))


def test_without_a_bias():
    x, weight, _ = inputs()
    torch.testing.assert_close(upsample_conv3x3(x, weight), reference(x, weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_layout(layout):
    y = upsample_conv3x3(*inputs(layout=layout))
    assert y.is_contiguous(memory_format=layout)
    x, weight, bias = inputs(layout=layout)
    (dx,) = torch.autograd.grad(upsample_conv3x3(x, weight, bias), x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=layout)


def test_autocast_gives_bfloat16_and_float32_gradients():
    parts = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = upsample_conv3x3(*parts)
    assert y.dtype == torch.bfloat16
    exact = reference(*(part.detach().double() for part in parts))
    assert (y.double() - exact).abs().max() < 2e-2 * exact.abs().max()
    for gradient in torch.autograd.grad(y.float().sum(), parts):
        assert gradient.dtype == torch.float32


def test_places_that_no_parity_reads_get_no_gradient():
    """The (H + 1) x (W + 1) places of a parity are one row and one column too many."""
    y = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    out = module._Interleave.apply(y)
    (dy,) = torch.autograd.grad(out.sum(), y)
    assert dy.sum() == out.numel()
    blocks = dy.unflatten(1, (2, 2, 2))[0]
    assert blocks[0, :, :, -1].abs().sum() == blocks[1, :, :, 0].abs().sum() == 0
    assert blocks[:, 0, :, :, -1].abs().sum() == blocks[:, 1, :, :, 0].abs().sum() == 0


def test_small_images_and_the_reference_take_the_long_way(monkeypatch):
    parts = inputs()
    exact = reference(*parts)
    monkeypatch.setattr(module, "product", None)  # whoever sums weights fails
    with use("reference"):
        assert torch.equal(upsample_conv3x3(*parts), exact)
    monkeypatch.setattr(module, "_SMALL", 10**6)
    torch.testing.assert_close(upsample_conv3x3(*parts), exact)
