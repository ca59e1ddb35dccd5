import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import cumulative_logits, log_ratio, noise_level_cross_entropy, suffix_table


def outputs(rows=4, levels=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, levels, generator=generator, dtype=dtype).requires_grad_()


def levels_of(o, seed=1):
    return torch.randint(o.shape[1], o.shape[:1], generator=torch.Generator().manual_seed(seed))


def test_cumulative_logits_are_running_sums():
    o = torch.tensor([[1.0, 2.0, -4.0]])
    assert cumulative_logits(o).tolist() == [[1.0, 3.0, -1.0]]


def test_cross_entropy_is_minus_the_log_probability():
    o = outputs()
    t = levels_of(o)
    expected = -torch.log_softmax(o.cumsum(1), 1)[torch.arange(len(t)), t]
    torch.testing.assert_close(noise_level_cross_entropy(o, t), expected)


def test_cross_entropy_gradient_is_its_closed_form():
    o = outputs()
    t = levels_of(o)
    (gradient,) = torch.autograd.grad(noise_level_cross_entropy(o, t).sum(), o)
    tails = torch.softmax(o.detach().cumsum(1), 1).flip(1).cumsum(1).flip(1)
    closed = tails - (torch.arange(o.shape[1]) <= t[:, None]).double()
    torch.testing.assert_close(gradient, closed)


def test_row_zero_never_learns():
    o = outputs(dtype=torch.float32)
    t = levels_of(o)
    loss = noise_level_cross_entropy(o, t).sum() + log_ratio(o, t, o.shape[1] - 1).sum()
    (gradient,) = torch.autograd.grad(loss, o)
    assert torch.equal(gradient[:, 0], torch.zeros(len(o)))
    assert gradient[:, 1:].abs().max() > 0.1


@pytest.mark.parametrize("function", [noise_level_cross_entropy, lambda o, t: log_ratio(o, t, 0)])
def test_derivatives_of_first_and_second_order(function):
    o = outputs()
    t = levels_of(o)
    assert gradcheck(lambda o: function(o, t), o)
    # The log-ratio is linear: its square has a second derivative to check.
    assert gradgradcheck(lambda o: function(o, t) ** 2, o)


@pytest.mark.parametrize("reference", [0, 3, 8])
def test_log_ratio_is_the_difference_of_logits(reference):
    o = outputs()
    t = levels_of(o)
    logits = cumulative_logits(o)
    expected = logits[:, reference] - logits.gather(1, t[:, None])[:, 0]
    torch.testing.assert_close(log_ratio(o, t, reference), expected)


@pytest.mark.parametrize("reference", [0, 3, 8])
def test_table_agrees_with_the_head(reference):
    generator = torch.Generator().manual_seed(2)
    weight, bias, h = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(9, 5), (9,), (4, 5)]
    )
    o = h @ weight.T + bias
    t = levels_of(o)
    table, offset = suffix_table(weight, bias, reference)
    torch.testing.assert_close((table[t] * h).sum(1) + offset[t], log_ratio(o, t, reference))
    assert table[reference].abs().max() == 0
    assert offset[reference] == 0


def test_derivatives_through_the_table():
    weight, bias = outputs(5, 3), outputs(1, 5)
    table = lambda w, b: suffix_table(w, b[0], 4)  # noqa: E731
    assert gradcheck(table, (weight, bias))
    assert gradgradcheck(lambda w, b: [part**2 for part in table(w, b)], (weight, bias))


def test_table_gives_row_zero_no_gradient():
    weight = outputs(6, 3, dtype=torch.float32)
    table, _ = suffix_table(weight, torch.zeros(6), 5)
    (gradient,) = torch.autograd.grad((table * torch.randn(6, 3)).sum(), weight)
    assert torch.equal(gradient[0], torch.zeros(3))


def test_half_precision_inputs_are_summed_in_float32():
    o = torch.full((1, 1002), 8.0, dtype=torch.bfloat16)
    o[:, 500] = 0.0625  # lost in a bfloat16 running sum of about 4000
    assert cumulative_logits(o)[0, -1] == 1001 * 8 + 0.0625
    assert log_ratio(o, torch.tensor([0]), 1001)[0] == 1000 * 8 + 0.0625
    assert noise_level_cross_entropy(o, torch.tensor([0]))[0] == pytest.approx(1000 * 8 + 0.0625, abs=1e-2)


def test_float32_head_is_good_to_a_thousandth_of_a_nat_at_ten_thousand_nats():
    o = 10 + torch.randn(8, 1002, generator=torch.Generator().manual_seed(3))
    t = torch.arange(8) * 100
    exact = log_ratio(o.double(), t, 1001)
    assert exact.min() > 3000
    assert (log_ratio(o, t, 1001).double() - exact).abs().max() < 4e-3
