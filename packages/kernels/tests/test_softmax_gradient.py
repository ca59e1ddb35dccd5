import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import softmax_gradient

LOGITS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HARD = torch.tensor([5, 0, 2])
SOFT = torch.softmax(torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)


@pytest.mark.parametrize("target", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.0, 0.5), (2.0, 0.0)])
def test_cotangent_is_the_gradient_of_the_value(target, tau1, tau2):
    f = LOGITS.clone().requires_grad_()
    value, cotangent = softmax_gradient(f, target, tau1, tau2)
    (gradient,) = torch.autograd.grad(value.sum(), f)
    torch.testing.assert_close(cotangent, gradient)
    assert gradcheck(lambda f: softmax_gradient(f, target, tau1, tau2), f)
    assert gradgradcheck(lambda f: [part**2 for part in softmax_gradient(f, target, tau1, tau2)], f)


def test_unit_temperatures_give_the_log_probability():
    value, _ = softmax_gradient(LOGITS, HARD)
    torch.testing.assert_close(value, torch.log_softmax(LOGITS, 1)[torch.arange(3), HARD])


def test_extreme_logits_stay_finite():
    value, cotangent = softmax_gradient(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert value.item() == -2e4
    assert cotangent.tolist() == [[-1.0, 1.0]]
