import sys
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import cpp, softmax_gradient, use
from cdm_kernels.testing import assert_orders_close, orders

# Triton's interpreter is NumPy, which warns of what is infinite where it is masked.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value")
]
module = sys.modules["cdm_kernels.softmax_gradient"]  # the package's attribute of that name is the function
reference = module.reference

LOGITS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HARD = torch.tensor([5, 0, 2])
SOFT = torch.softmax(torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
TARGETS = pytest.mark.parametrize("target", [HARD, SOFT], ids=["hard", "soft"])
TEMPERATURES = pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.0, 0.5), (2.0, 0.0), (1.5, -0.7)])


class Case(NamedTuple):
    rows: int
    classes: int
    soft: bool = False
    tau1: float = 1.0
    tau2: float = 1.0
    scale: float = 2.0
    offset: float = 0.0
    layout: str = "contiguous"


CASES = [
    Case(*shape, soft) for shape in [(1, 1), (2, 2), (3, 15), (3, 16), (3, 17)] for soft in (False, True)
]
CASES += [Case(3, 70, soft, *tau) for soft in (False, True) for tau in [(1.0, 0.3), (2.0, 0.0), (1.5, -0.7)]]
CASES += [Case(3, 40, soft, 1.0, 0.3, offset=1e4) for soft in (False, True)]
CASES += [
    Case(2, 1000),
    Case(2, 1000, True, 1.0, 0.5),
    Case(2, 4100, False, 1.0, 0.5),
    Case(4, 200, False, scale=1e4),
    Case(3, 24, False, layout="columns"),
    Case(3, 24, True, layout="rows"),
]
FEW = [*CASES[:2], *CASES[8:]]  # the interpreter is slow


def identity(case):
    kind = "soft" if case.soft else "hard"
    size = f"{case.rows}x{case.classes} {kind}, scale {case.scale:g}, offset {case.offset:g}"
    return f"{size}, {case.tau1:g}, {case.tau2:g}, {case.layout}"


def inputs(case, dtype, device="cpu"):
    """Logits, a leaf in dtype and the case's layout, and the target."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(case.rows, case.classes, generator=generator, dtype=torch.float64) * case.scale
    if case.scale > 1e3:  # a rival close to the largest of every row, lest p be 0 and 1
        f[:, 1] = f.max(1).values - 1.5
    f = (f + case.offset).to(device, dtype)
    if case.layout == "columns":
        f = torch.stack([f, f], 2)[:, :, 1]
    if case.layout == "rows":
        f = torch.cat([f, f], 1)[:, : case.classes]
    if case.soft:
        q = torch.randn(case.rows, case.classes, generator=generator, dtype=torch.float64).softmax(1)
        return f.requires_grad_(), q.to(device, torch.promote_types(dtype, torch.float32))
    return f.requires_grad_(), torch.randint(case.classes, (case.rows,), generator=generator).to(device)


@cache
def exact(case, dtype):
    """The reference in float64, of the inputs as they are in dtype."""
    f, target = inputs(case, dtype)
    target = target.double() if case.soft else target
    apply = lambda f: reference(f, target, case.tau1, case.tau2)  # noqa: E731
    return orders(apply, [f.double().detach().requires_grad_()])


def compare(case, dtype, device="cpu"):
    f, target = inputs(case, dtype, device)
    found = orders(lambda f: softmax_gradient(f, target, case.tau1, case.tau2), [f])
    (value, cotangent), (first,), _ = found
    assert value.dtype == cotangent.dtype == torch.promote_types(dtype, torch.float32)
    assert first.dtype == dtype
    assert_orders_close([[part.cpu() for part in order] for order in found], exact(case, dtype), dtype)


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, device):
    with use(request.param):
        yield request.param


def place(backend, device):
    return device if backend == "triton" else "cpu"


# -- what it computes ----------------------------------------------------------------------------------------


@TARGETS
@TEMPERATURES
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_cotangent_is_the_gradient_of_the_value(target, tau1, tau2, name):
    f = LOGITS.clone().requires_grad_()
    with use(name):
        value, cotangent = softmax_gradient(f, target, tau1, tau2)
        (gradient,) = torch.autograd.grad(value.sum(), f)
    torch.testing.assert_close(cotangent, gradient)


def test_unit_temperatures_give_the_log_probability(backend, device):
    f, target = LOGITS.float().to(place(backend, device)), HARD.to(place(backend, device))
    value, _ = softmax_gradient(f, target)
    torch.testing.assert_close(value.cpu(), torch.log_softmax(LOGITS, 1)[torch.arange(3), HARD].float())


def test_extreme_logits_stay_finite(backend, device):
    f = torch.tensor([[1e4, -1e4]], device=place(backend, device), requires_grad=True)
    value, cotangent = softmax_gradient(f, torch.tensor([1], device=f.device))
    assert value.item() == -2e4
    assert cotangent.tolist() == [[-1.0, 1.0]]
    (first,) = torch.autograd.grad(value.square().sum() + cotangent.square().sum(), f, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), f)
    assert first.tolist() == [[4e4, -4e4]]
    assert second.tolist() == [[2.0, -2.0]]


def test_classes_ruled_out_have_no_part(backend, device):
    f = torch.tensor([[0.0, -float("inf"), 1.0]], device=place(backend, device))
    value, cotangent = softmax_gradient(f, torch.tensor([2], device=f.device))
    p = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(value.cpu(), p[1:].log())
    torch.testing.assert_close(cotangent.cpu(), torch.tensor([[-p[0], 0.0, 1 - p[1]]]))


def test_what_is_not_a_number_shows(backend, device):
    f = torch.zeros(2, 40, device=place(backend, device))
    f[0, 33] = float("nan")
    f.requires_grad_()
    value, cotangent = softmax_gradient(f, torch.tensor([2, 3], device=f.device))
    (gradient,) = torch.autograd.grad(value.sum(), f)
    assert value.isnan().tolist() == [True, False]
    assert cotangent.isnan().any(1).tolist() == gradient.isnan().any(1).tolist() == [True, False]


def test_wrong_targets_are_refused(backend, device):
    f = torch.zeros(2, 5, device=place(backend, device))
    for target in (torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="must be"):
            softmax_gradient(f, target.to(f.device))
    with pytest.raises(ValueError, match="soft labels: detach"):
        softmax_gradient(f, torch.full((2, 5), 0.2, device=f.device, requires_grad=True))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_classes_out_of_range_are_refused_or_not_a_number(wrong, device):
    target = torch.tensor([1, wrong])
    for name in ("reference", "cpp"):
        with use(name), pytest.raises((IndexError, RuntimeError)):
            softmax_gradient(torch.zeros(2, 5), target)
    with use("triton"):
        value, cotangent = softmax_gradient(torch.zeros(2, 5, device=device), target.to(device))
    assert value.isnan().tolist() == cotangent.isnan().all(1).tolist() == [False, True]


def test_no_rows_give_none(backend, device):
    f = torch.zeros(0, 5, device=place(backend, device), requires_grad=True)
    value, cotangent = softmax_gradient(f, torch.zeros(0, dtype=torch.int64, device=f.device))
    (gradient,) = torch.autograd.grad(value.sum() + cotangent.sum(), f)
    assert [part.shape for part in (value, cotangent, gradient)] == [(0,), (0, 5), (0, 5)]
    assert gradient.dtype == f.dtype


# -- the reference -------------------------------------------------------------------------------------------


def derivatives(target, tau1, tau2):
    f = LOGITS.clone().requires_grad_()
    assert gradcheck(lambda f: softmax_gradient(f, target, tau1, tau2), f)
    assert gradgradcheck(lambda f: [part**2 for part in softmax_gradient(f, target, tau1, tau2)], f)


@TARGETS
@TEMPERATURES
def test_derivatives_of_the_reference(target, tau1, tau2):
    with use("reference"):
        derivatives(target, tau1, tau2)


def test_float16_on_the_cpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    compare(CASES[4], torch.float16)


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(module, "kernels", None)
    compare(CASES[4], torch.float32)


# -- the C++ kernels -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_cpp(case, dtype, level):
    with use("cpp"):
        compare(case, dtype)


@TARGETS
@TEMPERATURES
def test_derivatives_of_the_cpp_kernels(target, tau1, tau2, level):
    with use("cpp"):
        derivatives(target, tau1, tau2)


def test_several_threads_find_the_same(level):
    case = Case(40, 1000, True, 1.0, 0.5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            f, target = inputs(case, torch.float32)
            with use("cpp"):
                found.append(orders(lambda f, q=target: softmax_gradient(f, q, 1.0, 0.5), [f]))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


# -- the Triton kernels --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", FEW, ids=identity)
def test_triton(case, device):
    with use("triton"):
        compare(case, torch.float32, device)
        if max(case.scale, case.offset) < 1e4:  # float16 ends at 6.5e4
            compare(case, torch.float16, device)


def test_triton_kernels_fit_the_registers_of_an_h100(compile_for_h100):
    pytest.importorskip("triton")
    from cdm_kernels.triton.softmax_gradient import blocks

    signature = dict.fromkeys(["value", "cotangent", "statistics", "a", "b", "da", "db"], "*fp32")
    signature |= {"stride": "i32", "classes": "i32", "tau1": "fp32", "tau2": "fp32"}
    kernels = []
    for name, kind, soft, classes in [
        ("_forward", "*fp32", True, 1000),
        ("_forward", "*bf16", False, 1000),
        ("_backward", "*fp32", False, 1000),
        ("_double_backward", "*fp32", False, 8192),
    ]:
        block, warps = blocks(classes)
        types = dict.fromkeys(["f", "u", "out", "df"], kind) | {"target": "*fp32" if soft else "*i64"}
        kernels.append((name, signature | types, {"SOFT": soft, "BLOCK": block}, warps))
    found = compile_for_h100("cdm_kernels.triton.softmax_gradient", kernels)
    for used, (*_, warps) in zip(found, kernels, strict=True):
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] * 32 * warps <= 65536


# -- derivatives of a part -----------------------------------------------------------------------------------


@TARGETS
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_alone_has_the_derivatives_that_it_has_in_both(target, part, backend, device):
    f = LOGITS.float().to(place(backend, device)).requires_grad_()
    q = target.to(f.device)
    found = orders(lambda f: softmax_gradient(f, q, 1.5, 0.5)[part] ** 2, [f])
    truth = orders(
        lambda f: reference(f, target, 1.5, 0.5)[part] ** 2, [LOGITS.float().double().requires_grad_()]
    )
    assert_orders_close([[p.cpu() for p in order] for order in found], truth, torch.float32)


@TARGETS
def test_cotangents_have_their_gradients(target, backend, device):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(3,), (3, 6)])
    found, truth = [], []
    for function, dtype, results in [
        (softmax_gradient, torch.float32, found),
        (reference, torch.float64, truth),
    ]:
        where = place(backend, device) if dtype == torch.float32 else "cpu"
        leaves = [part.to(where, dtype).detach().requires_grad_() for part in (LOGITS, a, b)]
        parts = function(leaves[0], target.to(where), 1.5, 0.5)
        (first,) = torch.autograd.grad(parts, leaves[0], leaves[1:], create_graph=True)
        results += [first.detach(), *torch.autograd.grad(first.sin().sum(), leaves)]
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours.cpu() - theirs).abs().max() < 1e-5 * theirs.abs().max()


# -- as operators of torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[6], CASES[7], *CASES[-2:]], ids=identity)
def test_operators_are_fit_for_the_compiler(case):
    f, target = inputs(case, torch.float32)
    torch.library.opcheck(module._forward, (f, target, 1.5, 0.5))
    statistics = module._forward(f, target, 1.5, 0.5)[2].detach()
    a, b, u = torch.randn(case.rows), torch.randn(f.shape), torch.randn(f.shape)
    rest = (f, target, statistics, 1.5, 0.5)
    torch.library.opcheck(module._backward, (a.requires_grad_(), b.requires_grad_(), *rest))
    torch.library.opcheck(module._backward, (None, b, *rest))
    torch.library.opcheck(module._backward, (a, None, *rest))
    constant = (u, a.detach(), b.detach(), f.detach(), *rest[1:])
    torch.library.opcheck(module._double_backward, constant)  # whose derivative raises
    torch.library.opcheck(module._double_backward, (u, None, None, *constant[3:]))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES[-6:], ids=identity)
def test_operators_equal_the_functions_of_eager(case):
    f, target = inputs(case, torch.float32)
    found = orders(lambda f: module._forward(f, target, 1.5, 0.5)[:2], [f])
    expected = orders(lambda f: softmax_gradient(f, target, 1.5, 0.5), [f])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@TARGETS
@pytest.mark.parametrize("through_operators", [False, True])
def test_a_third_derivative_raises(target, through_operators):
    f = LOGITS.clone().requires_grad_()
    function = module._forward if through_operators else softmax_gradient
    value, cotangent = function(f, target, 1.0, 0.5)[:2]
    y = value.square().sum() + cotangent.square().sum()
    (first,) = torch.autograd.grad(y, f, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), f, create_graph=True)
    # y has a derivative of its own: without an error the missing term would pass unseen.
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum() + y, f)
