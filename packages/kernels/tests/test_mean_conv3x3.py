import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import mean_conv3x3


def inputs(size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, *size), (4, 3, 3, 3), (4,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("size", [(5, 4), (2, 3), (1, 1), (1, 6)])
def test_is_the_mean_of_the_convolution(size):
    x, weight, bias = inputs(size)
    expected = F.conv2d(x, weight, bias, padding=1).mean((2, 3))
    torch.testing.assert_close(mean_conv3x3(x, weight, bias), expected)


def test_derivatives_of_first_and_second_order():
    assert gradcheck(mean_conv3x3, inputs((3, 4)))
    assert gradgradcheck(mean_conv3x3, inputs((3, 4)))
