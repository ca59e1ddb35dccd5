import sys
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import (
    cpp,
    cumulative_logits,
    log_ratio,
    noise_level_cross_entropy,
    noise_level_head,
    suffix_table,
    use,
)
from cdm_kernels.testing import assert_orders_close, orders

# Triton's interpreter is NumPy, which warns of the difference of two infinities.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
module = sys.modules["cdm_kernels.head"]
reference = module.reference


class Case(NamedTuple):
    rows: int
    levels: int
    reference: int
    kind: str = "flat"
    layout: str = "contiguous"


SHAPES = [(1, 1, 0), (2, 2, 1), (3, 7, 0), (3, 8, 3), (2, 16, 15), (3, 17, 5), (4, 33, 32), (5, 100, 0)]
CASES = [Case(*shape, kind) for shape in [*SHAPES, (7, 1002, 1001)] for kind in ("flat", "well")]
CASES += [
    Case(6, 1002, 0, "two wells"),  # p is 0 between them
    Case(3, 130, 64, "cusp"),
    Case(2, 4098, 2000, "well"),
    Case(4, 100, 99, "well", "columns"),
    Case(4, 100, 99, "well", "rows"),
]
FEW = [Case(1, 1, 0), *CASES[4:6], *CASES[10:12], *CASES[16:20], *CASES[-2:]]  # the interpreter is slow


def identity(case):
    return f"{case.rows}x{case.levels} to {case.reference} {case.kind} {case.layout}"


def outputs(rows=4, levels=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, levels, generator=generator, dtype=dtype).requires_grad_()


def logits(case):
    """F of a classifier: flat while untrained, later wells, 1e4 nats deep at 1002 levels."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(case.rows, case.levels, generator=generator, dtype=torch.float64)
    if case.kind == "flat":
        return noise
    centre = case.levels * torch.rand(case.rows, 1, generator=generator, dtype=torch.float64)
    levels = torch.arange(case.levels)
    if case.kind == "cusp":
        return noise - 8 * (levels - centre.long()).abs()
    distance = (levels - centre) / case.levels
    if case.kind == "two wells":
        distance = torch.minimum((levels - centre / 3).abs(), (levels - case.levels + centre / 3).abs())
        distance = distance / case.levels
    return 3 * noise - 1e4 * min(case.levels / 1000, 1) * distance.square()


def inputs(case, dtype, device="cpu"):
    """o, a leaf in dtype and the case's layout, and levels that include the first and the last."""
    o = torch.diff(logits(case), dim=1, prepend=torch.zeros(case.rows, 1)).to(device, dtype)
    if case.layout == "columns":
        o = torch.stack([o, o], 2)[:, :, 1]
    if case.layout == "rows":
        o = torch.cat([o, o], 1)[:, : case.levels]
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(case.levels, (case.rows,), generator=generator)
    t[0], t[-1] = 0, case.levels - 1
    return o.requires_grad_(), t.to(device)


@cache
def exact(case, dtype):
    """The reference in float64, of the inputs as they are in dtype."""
    o, t = inputs(case, dtype)
    return orders(lambda o: reference(o, t, case.reference), [o.double().detach().requires_grad_()])


def compare(case, dtype, device="cpu"):
    o, t = inputs(case, dtype, device)
    found = orders(lambda o: noise_level_head(o, t, case.reference), [o])
    (cross_entropy, ratio, estimate), (first,), _ = found
    assert cross_entropy.dtype == ratio.dtype == torch.promote_types(dtype, torch.float32)
    assert (estimate.dtype, first.dtype) == (torch.int64, dtype)
    assert_orders_close([[part.cpu() for part in order] for order in found], exact(case, dtype), dtype)


# -- what they compute ---------------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, device):
    with use(request.param):
        yield request.param


def place(backend, device):
    return device if backend == "triton" else "cpu"


def test_cumulative_logits_are_running_sums():
    o = torch.tensor([[1.0, 2.0, -4.0]])
    assert cumulative_logits(o).tolist() == [[1.0, 3.0, -1.0]]


def levels_of(o, seed=1):
    return torch.randint(o.shape[1], o.shape[:1], generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("level", [0, 3, 8])
def test_log_ratio_is_the_difference_of_logits(level):
    o = outputs()
    t = levels_of(o)
    whole = cumulative_logits(o)
    expected = whole[:, level] - whole.gather(1, t[:, None])[:, 0]
    torch.testing.assert_close(log_ratio(o, t, level), expected)


def test_row_zero_never_learns(backend, device):
    o, t = inputs(Case(4, 100, 99, "well"), torch.float32, place(backend, device))
    head = noise_level_head(o, t, 99)
    loss = (head.cross_entropy.square() + head.log_ratio.square()).sum()
    (first,) = torch.autograd.grad(loss, o, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), o)
    for gradient in (first, second):
        assert torch.equal(gradient[:, 0], torch.zeros_like(gradient[:, 0]))
        assert gradient[:, 1:].abs().max() > 0.1


def test_row_zero_counts_for_nothing(backend, device):
    o, t = inputs(Case(3, 17, 5), torch.float32, place(backend, device))
    expected = noise_level_head(o, t, 5)
    shifted = o.detach().clone()
    shifted[:, 0] = torch.tensor([1e30, -1e30, 0.0])
    for found, part in zip(noise_level_head(shifted, t, 5), expected, strict=True):
        torch.testing.assert_close(found, part.detach())


def test_estimate_is_the_first_of_the_likeliest(backend, device):
    rows = [
        [7.0, 0, 0, 0, 0],
        [0.0, 1, -1, 1, 0],
        [0.0, -1, -1, 3, -2],
        [0.0, -1, 1, -1, 1],
        [3.0, 1, 1, 1, 1],
    ]
    o = torch.tensor(rows, device=place(backend, device)).repeat(1, 9)
    o[:, 5:] = 0
    t = torch.zeros(5, dtype=torch.int64, device=o.device)
    assert noise_level_head(o, t, 0).estimate.tolist() == [0, 1, 3, 0, 4]


def test_impossible_levels_have_no_part(backend, device):
    o = torch.tensor([[0.0, 1.0, -float("inf"), 2.0]], device=place(backend, device), requires_grad=True)
    cross_entropy = noise_level_cross_entropy(o, torch.tensor([0], device=o.device))
    (gradient,) = torch.autograd.grad(cross_entropy.sum(), o)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert cross_entropy.item() == pytest.approx(-p[0].log().item())
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[0.0, p[1].item(), 0, 0]]))


def test_what_is_not_a_number_shows(backend, device):
    for place_of in (1, 20, 99):
        o, t = inputs(Case(2, 100, 99, "well"), torch.float32, place(backend, device))
        poisoned = o.detach().clone()
        poisoned[0, place_of] = float("nan")
        poisoned.requires_grad_()
        cross_entropy = noise_level_cross_entropy(poisoned, t)
        (gradient,) = torch.autograd.grad(cross_entropy.sum(), poisoned)
        assert cross_entropy.isnan().tolist() == [True, False]
        assert gradient[0, 1:].isnan().any()
        assert gradient[1].isfinite().all()


def test_wrong_levels_are_refused(backend, device):
    o = torch.zeros(2, 5, device=place(backend, device))
    for t in (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0]), torch.tensor([[0], [1]])):
        with pytest.raises(ValueError, match="int64"):
            noise_level_head(o, t.to(o.device), 0)
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="5 levels"):
            noise_level_head(o, torch.tensor([0, 1], device=o.device), wrong)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_levels_out_of_range_are_refused_or_not_a_number(wrong, device):
    t = torch.tensor([1, wrong])
    for name in ("reference", "cpp"):
        with use(name), pytest.raises((IndexError, RuntimeError)):
            noise_level_head(torch.zeros(2, 5), t, 0)
    with use("triton"):
        head = noise_level_head(torch.zeros(2, 5, device=device), t.to(device), 0)
    assert head.cross_entropy.isnan().tolist() == head.log_ratio.isnan().tolist() == [False, True]


def test_no_rows_give_none(backend, device):
    o = torch.zeros(0, 7, device=place(backend, device), requires_grad=True)
    head = noise_level_head(o, torch.zeros(0, dtype=torch.int64, device=o.device), 3)
    (gradient,) = torch.autograd.grad(head.cross_entropy.sum() + head.log_ratio.sum(), o)
    assert [part.shape for part in (*head, gradient)] == [(0,), (0,), (0,), (0, 7)]
    assert head.estimate.dtype == torch.int64


# -- precision -----------------------------------------------------------------------------------------------


def test_half_precision_inputs_are_summed_in_float32():
    o = torch.full((1, 1002), 8.0, dtype=torch.bfloat16)
    o[:, 500] = 0.0625  # lost in a bfloat16 running sum of about 4000
    assert cumulative_logits(o)[0, -1] == 1001 * 8 + 0.0625
    for name in ("reference", "cpp"):
        with use(name):
            assert log_ratio(o, torch.tensor([0]), 1001)[0] == 1000 * 8 + 0.0625
            found = noise_level_cross_entropy(o, torch.tensor([0]))[0]
            assert found == pytest.approx(1000 * 8 + 0.0625, abs=1e-2)


def test_float32_head_is_good_to_a_thousandth_of_a_nat_at_ten_thousand_nats():
    o = 10 + torch.randn(8, 1002, generator=torch.Generator().manual_seed(3))
    t = torch.arange(8) * 100
    exact = log_ratio(o.double(), t, 1001)
    assert exact.min() > 3000
    for name in ("reference", "cpp"):
        with use(name):
            assert (log_ratio(o, t, 1001).double() - exact).abs().max() < 4e-3


def test_kernels_are_as_good_at_ten_thousand_nats_as_at_ten(device):
    """Running sums in float32 would be off by 1e-3 there, and p with them."""
    case = Case(3, 1002, 0, "well")
    o, t = inputs(case, torch.float32)
    climb = torch.full_like(o, 10.0)
    climb[:, 900:] = 0
    o = (0.01 * o.detach() * (climb == 0) + climb).requires_grad_()
    t = t.clamp(min=900)
    assert cumulative_logits(o).max() > 8000
    truth = orders(lambda o: reference(o, t, 0)[:1], [o.double().detach().requires_grad_()])
    for name in ("cpp", "triton"):
        with use(name):
            o, t = (part.detach().to(place(name, device)) for part in (o, t))
            found = orders(lambda o, t=t: noise_level_head(o, t, 0)[:1], [o.requires_grad_()])
        for ours, theirs in zip(found, truth, strict=True):
            assert (ours[0].cpu().double() - theirs[0]).abs().max() < 1e-6 * max(1, theirs[0].abs().max())


# -- the reference -------------------------------------------------------------------------------------------


def parts_squared(o, t, level):
    # The log-ratio is linear: its square has a second derivative to check.
    return [part**2 for part in noise_level_head(o, t, level)[:2]]


@pytest.mark.parametrize("level", [0, 3, 8])
def test_derivatives_of_the_reference(level):
    o = outputs()
    t = levels_of(o)
    with use("reference"):
        assert gradcheck(lambda o: parts_squared(o, t, level), o)
        assert gradgradcheck(lambda o: parts_squared(o, t, level), o)


def test_float16_on_the_cpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    compare(CASES[4], torch.float16)


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(module, "kernels", None)
    compare(CASES[4], torch.float32)


def test_transforms_of_torch_func_take_the_reference():
    o, t = outputs().detach(), levels_of(outputs())
    gradient = torch.func.grad(lambda o: noise_level_cross_entropy(o, t).square().sum())
    leaf = o.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(leaf, t, 0).cross_entropy.square().sum(), leaf)
    torch.testing.assert_close(gradient(o), expected)


# -- the C++ kernels -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_cpp(case, dtype, level):
    with use("cpp"):
        compare(case, dtype)


@pytest.mark.parametrize("to", [0, 3, 8])
def test_derivatives_of_the_cpp_kernels(to, level):
    o = outputs()
    t = levels_of(o)
    with use("cpp"):
        assert gradcheck(lambda o: parts_squared(o, t, to), o)
        assert gradgradcheck(lambda o: parts_squared(o, t, to), o)


def test_several_threads_find_the_same(level):
    case = Case(40, 1002, 7, "well")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            o, t = inputs(case, torch.float32)
            with use("cpp"):
                found.append(orders(lambda o, t=t: noise_level_head(o, t, 7), [o]))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


# -- the Triton kernels --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=identity)
def test_triton(case, dtype, device):
    with use("triton"):
        compare(case, dtype, device)


def test_triton_kernels_fit_the_registers_of_an_h100(compile_for_h100):
    pytest.importorskip("triton")
    from cdm_kernels.triton.head import blocks

    small = ["cross_entropy", "log_ratio", "summary", "g", "h", "dg", "dh"]
    signature = dict.fromkeys(small, "*fp32") | dict.fromkeys(["t", "estimate"], "*i64")
    signature |= dict.fromkeys(["stride", "levels", "reference"], "i32")
    kernels = []
    for name, kind, levels in [
        ("_forward", "*fp32", 1002),
        ("_backward", "*bf16", 1002),
        ("_double_backward", "*fp32", 1002),
        ("_double_backward", "*fp32", 8192),
    ]:
        block, warps = blocks(levels)
        kernels.append((name, signature | dict.fromkeys(["o", "v", "out"], kind), {"BLOCK": block}, warps))
    for used, (*_, warps) in zip(compile_for_h100("cdm_kernels.triton.head", kernels), kernels, strict=True):
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] * 32 * warps <= 65536


# -- derivatives of a part -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_alone_has_the_derivatives_that_it_has_in_both(part, backend, device):
    case = Case(3, 17, 5)
    o, t = inputs(case, torch.float32, place(backend, device))
    found = orders(lambda o: noise_level_head(o, t, 5)[part] ** 2, [o])
    o, t = inputs(case, torch.float32)
    truth = orders(lambda o: reference(o, t, 5)[part] ** 2, [o.double().detach().requires_grad_()])
    assert_orders_close([[p.cpu() for p in order] for order in found], truth, torch.float32)


def test_cotangents_have_their_gradients(backend, device):
    case = Case(3, 17, 5)

    def gradient(function, o, t, g, h):
        head = function(o, t, 5)
        return torch.autograd.grad([head.cross_entropy, head.log_ratio], o, [g, h], create_graph=True)[0]

    g, h = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, truth = [], []
    for function, dtype, results in [
        (noise_level_head, torch.float32, found),
        (reference, torch.float64, truth),
    ]:
        where = place(backend, device) if dtype == torch.float32 else "cpu"
        o, t = inputs(case, torch.float32, where)
        leaves = [part.detach().to(where, dtype).requires_grad_() for part in (o, g, h)]
        first = gradient(function, leaves[0], t, *leaves[1:])
        results += [first.detach(), *torch.autograd.grad(first.sin().sum(), leaves)]
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours.cpu() - theirs).abs().max() < 1e-5 * theirs.abs().max()


# -- as operators of torch -----------------------------------------------------------------------------------


def operands(layout="contiguous"):
    """Arguments of forward, backward and double backward."""
    o, t = inputs(Case(4, 100, 99, "well", layout), torch.float32)
    *_, summary = (part.detach() for part in module._forward(o, t, 99))
    g, h, v = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(4, 100)
    return (o, t, 99), (g, h, o, t, summary, 99), (v, g, o, t, summary, 99)


@pytest.mark.parametrize("layout", ["contiguous", "columns", "rows"])
def test_operators_are_fit_for_the_compiler(layout):
    forward, backward, double_backward = operands(layout)
    torch.library.opcheck(module._forward, forward)
    torch.library.opcheck(module._backward, backward)
    constant = [part.detach() if isinstance(part, torch.Tensor) else part for part in double_backward]
    torch.library.opcheck(module._double_backward, constant)  # whose derivative raises
    torch.library.opcheck(module._double_backward, (constant[0], None, *constant[2:]))
    for absent in (0, 1):
        partial = [None if i == absent else part for i, part in enumerate(backward)]
        torch.library.opcheck(module._backward, partial)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES[-6:], ids=identity)
def test_operators_equal_the_functions_of_eager(case):
    o, t = inputs(case, torch.float32)
    found = orders(lambda o: module._forward(o, t, case.reference)[:3], [o])
    expected = orders(lambda o: noise_level_head(o, t, case.reference), [o])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("through_operators", [False, True])
def test_a_third_derivative_raises(through_operators):
    o = outputs()
    t = levels_of(o)
    y = module._forward(o, t, 0)[0] if through_operators else noise_level_cross_entropy(o, t)
    (first,) = torch.autograd.grad(y.square().sum(), o, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), o, create_graph=True)
    # y has a derivative of its own: without an error the missing term would pass unseen.
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.square().sum() + y.sum(), o)


@pytest.mark.parametrize("through_operators", [False, True])
def test_a_third_derivative_along_constants_raises(through_operators):
    o = outputs()
    t = levels_of(o)
    y = module._forward(o, t, 0)[0] if through_operators else noise_level_cross_entropy(o, t)
    (first,) = torch.autograd.grad(y.sum() + (o**4).sum(), o, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), o, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), o)


# -- the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 3, 8])
def test_table_agrees_with_the_head(level):
    generator = torch.Generator().manual_seed(2)
    weight, bias, h = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(9, 5), (9,), (4, 5)]
    )
    o = h @ weight.T + bias
    t = levels_of(o)
    table, offset = suffix_table(weight, bias, level)
    torch.testing.assert_close((table[t] * h).sum(1) + offset[t], log_ratio(o, t, level))
    assert table[level].abs().max() == 0
    assert offset[level] == 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "levels"), [(1, 1), (3, 1002), (64, 102)])
def test_the_cross_entropy_alone_is_that_of_the_head(rows, levels, dtype):
    """Also where nothing is differentiated and a shorter way is taken."""
    o = torch.randn(rows, levels, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.arange(rows) % levels
    assert torch.equal(noise_level_cross_entropy(o, t), noise_level_head(o, t, 0).cross_entropy)
    assert torch.equal(
        noise_level_cross_entropy(o.requires_grad_(), t), noise_level_head(o, t, 0).cross_entropy
    )
    with pytest.raises(IndexError, match="a level of t is not one of the"):
        noise_level_cross_entropy(o.detach(), t + levels)
