import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import group_norm_silu


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_formula(activation, adaptive):
    x, weight, bias, scale, shift = (part.detach() for part in inputs())
    extra = (scale, shift) if adaptive else (None, None)
    grouped = x.reshape(2, 2, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    h = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    h = h * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    if adaptive:
        h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = h * torch.sigmoid(h) if activation else h
    torch.testing.assert_close(group_norm_silu(x, 2, weight, bias, 1e-6, *extra, activation), expected)


@pytest.mark.parametrize("activation", [True, False])
def test_derivatives_of_first_and_second_order(activation):
    def op(x, weight, bias, scale, shift):
        return group_norm_silu(x, 2, weight, bias, 1e-5, scale, shift, activation)

    assert gradcheck(op, inputs())
    assert gradgradcheck(op, inputs())


def test_low_precision_is_normalised_in_float32():
    x = 100 + torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    low = x.to(torch.bfloat16)
    out = group_norm_silu(low, 2, torch.ones(4), torch.zeros(4), 1e-6)
    exact = group_norm_silu(low.double(), 2, torch.ones(4), torch.zeros(4), 1e-6)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.02
