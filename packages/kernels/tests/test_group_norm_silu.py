import sys
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import cpp, group_norm_silu, use
from cdm_kernels.group_norm_silu import reference
from cdm_kernels.testing import assert_orders_close, orders

# Triton's interpreter is NumPy, which warns of an overflow that ends in sigmoid(-1e4) = 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
module = sys.modules["cdm_kernels.group_norm_silu"]  # the package's attribute of that name is the function


class Case(NamedTuple):
    shape: tuple[int, ...]
    groups: int
    layout: str = "contiguous"
    adaptive: str = ""  # of scale and shift
    activation: bool = True
    mean: float = 0.0


PIXELS = [(1, 1), (2, 2), (3, 5), (4, 4), (1, 17), (7, 7), (14, 14)]
CASES = [Case((2, 12, *size), 3, layout) for size in PIXELS for layout in ("contiguous", "channels last")]
CASES += [Case((2, 12, *size), 3, "strided") for size in PIXELS[2:4]]
CASES += [
    Case((2, 12, *size), 2, layout, adaptive, activation)
    for size, layout in [((3, 5), "contiguous"), ((7, 7), "channels last"), ((2, 2), "contiguous")]
    for adaptive, activation in [("scale shift", True), ("scale", True), ("shift", False), ("", False)]
]
CASES += [
    Case((2, 5, 4, 4), 5),  # a channel a group
    Case((2, 37, 4, 4), 37, "channels last", "shift"),
    Case((2, 18, 3, 3), 3, "channels last"),  # bundles of groups that are no power of two
    Case((1, 40, 5, 5), 2),
    Case((1, 21, 2, 1), 1, "channels last"),
    Case((3, 12, 17), 3),
    Case((3, 12), 2),
    Case((2, 6, 2, 3, 2), 2),
    Case((2, 6, 3, 3, 2), 3, "channels last", "scale shift"),
]
# Of two layouts and of every way through the kernels, one each: the interpreter is slow.
FEW = [Case((2, 12, 3, 5), 3), Case((2, 10, 5, 2), 2, "channels last", "scale shift", False), *CASES[-9:]]


def identity(case):
    extra = [case.layout, case.adaptive, "" if case.activation else "linear", f"mean {case.mean:g}"]
    return f"{'x'.join(map(str, case.shape))}/{case.groups} {' '.join(extra)}"


def operator(function, case):
    def apply(x, weight, bias, *adaptive):
        named = dict(zip(case.adaptive.split(), adaptive, strict=True))
        return function(x, case.groups, weight, bias, 1e-5, **named, activation=case.activation)

    return apply


def inputs(case, dtype, accumulator=torch.float32, device="cpu"):
    """Leaves: x in dtype and the case's layout; weight, bias and whichever of scale and shift."""
    generator = torch.Generator().manual_seed(0)
    batch, channels = case.shape[:2]
    shapes = [(channels,)] * 2 + [(batch, channels)] * len(case.adaptive.split())
    x = case.mean + torch.randn(case.shape, generator=generator)
    small = [torch.randn(shape, generator=generator) for shape in shapes]
    x = x.to(device, dtype)
    if case.layout == "channels last":
        x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if case.layout == "strided":
        x = torch.stack([x, x], 2)[:, :, 1]
    return [x.requires_grad_(), *(part.to(device, accumulator).requires_grad_() for part in small)]


@cache
def exact(case, dtype):
    """The reference in float64, of the inputs as they are in dtype."""
    return orders(
        operator(reference, case), [part.double().detach().requires_grad_() for part in inputs(case, dtype)]
    )


def compare(case, dtype, accumulator=torch.float32, device="cpu", factor=1.0):
    found = orders(operator(group_norm_silu, case), inputs(case, dtype, accumulator, device))
    assert found[0][0].dtype == found[1][0].dtype == dtype
    assert_orders_close([[t.cpu() for t in order] for order in found], exact(case, dtype), dtype, factor)


# -- the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("adaptive", ["scale shift", ""])
def test_formula(activation, adaptive):
    case = Case((2, 4, 3, 2), 2, adaptive=adaptive, activation=activation)
    x, weight, bias, *extra = (part.detach() for part in inputs(case, torch.float64, torch.float64))
    grouped = x.reshape(2, 2, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    h = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    h = h * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    if adaptive:
        scale, shift = extra
        h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = h * torch.sigmoid(h) if activation else h
    for backend in ("reference", "cpp"):
        with use(backend):
            torch.testing.assert_close(operator(group_norm_silu, case)(x, weight, bias, *extra), expected)


@pytest.mark.parametrize("activation", [True, False])
def test_derivatives_of_the_reference(activation):
    case = Case((2, 4, 3, 2), 2, adaptive="scale shift", activation=activation)
    with use("reference"):
        assert gradcheck(operator(group_norm_silu, case), inputs(case, torch.float64, torch.float64))
        assert gradgradcheck(operator(group_norm_silu, case), inputs(case, torch.float64, torch.float64))


def test_float16_on_the_cpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    case = CASES[4]
    found = orders(operator(group_norm_silu, case), inputs(case, torch.float16))
    assert_orders_close(found, exact(case, torch.float16), torch.float16)


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(module, "kernels", None)
    compare(CASES[4], torch.float32)


def test_transforms_of_torch_func_take_the_reference():
    case = Case((2, 4, 3, 2), 2)
    x, weight, bias = (part.detach() for part in inputs(case, torch.float64, torch.float64))
    gradient = torch.func.grad(lambda x: operator(group_norm_silu, case)(x, weight, bias).square().sum())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(operator(reference, case)(leaf, weight, bias).square().sum(), leaf)
    torch.testing.assert_close(gradient(x), expected)


# -- the C++ kernels -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_cpp(case, dtype, level):
    with use("cpp"):
        compare(case, dtype, torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(("adaptive", "activation"), [("", True), ("scale shift", True), ("", False)])
def test_derivatives_of_the_cpp_kernels(layout, adaptive, activation, level):
    case = Case((2, 4, 3, 2), 2, layout, adaptive, activation)
    with use("cpp"):
        assert gradcheck(operator(group_norm_silu, case), inputs(case, torch.float64, torch.float64))
        assert gradgradcheck(operator(group_norm_silu, case), inputs(case, torch.float64, torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_cpp_with_a_mean_far_from_zero(layout, level):
    # The mean, rounded to float32, moves x^ by up to 300 * 2^-24 = 9 times the tolerance of values.
    with use("cpp"):
        compare(Case((2, 12, 9, 9), 3, layout, mean=300.0), torch.float32, factor=10)
        compare(Case((2, 12, 9, 9), 3, layout, mean=300.0), torch.bfloat16)


def test_several_threads_find_the_same(level):
    case = Case((3, 64, 14, 14), 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use("cpp"):
                found.append(orders(operator(group_norm_silu, case), inputs(case, torch.float32)))
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
        compare(case, dtype, device=device)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_triton_over_several_tiles(layout, device):
    with use("triton"):
        compare(Case((1, 12, 40, 40), 3, layout), torch.float32, device=device)


def test_triton_with_a_mean_far_from_zero(device):
    with use("triton"):
        compare(Case((2, 12, 9, 9), 3, mean=300.0), torch.float32, device=device, factor=10)


def test_triton_kernels_fit_the_registers_of_an_h100(compile_for_h100):
    pytest.importorskip("triton")
    from cdm_kernels.triton.group_norm_silu import blocks

    small = ["alpha", "beta", "weight", "bias", "mean", "rstd", "dweight", "dbias"]
    sizes = ["channels", "pixels", "channel_stride", "pixel_stride", "weight_stride"]
    signature = dict.fromkeys(small, "*fp32") | dict.fromkeys(sizes, "i32") | {"eps": "fp32"}
    kernels = []
    for name, kind, size, unit_stride in [
        ("_forward", "*bf16", 2, "channel_stride"),
        ("_backward", "*fp32", 0, "pixel_stride"),
        ("_double_backward", "*bf16", 2, "channel_stride"),
        ("_double_backward", "*fp32", 0, "pixel_stride"),
    ]:
        bundle, block_d, block_p, warps = blocks(16, 8, 1024, size)
        constants = {"SILU": True, "D": 16, "GROUPS": bundle, "BLOCK_D": block_d, "BLOCK_P": block_p}
        types = signature | dict.fromkeys(["x", "y", "v", "dy", "dx", "ddy"], kind)
        kernels.append((name, types, constants | {unit_stride: 1}, warps))
    for used in compile_for_h100("cdm_kernels.triton.group_norm_silu", kernels):
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] * 32 * warps <= 65536


# -- all implementations -------------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, device):
    with use(request.param):
        yield request.param


def place(backend, device):
    return device if backend == "triton" else "cpu"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1, 1)])
def test_a_group_of_one_element_is_its_bias(shape, backend, device):
    x = torch.randn(shape, device=place(backend, device), requires_grad=True)
    weight, bias = (torch.randn(shape[1], device=x.device, requires_grad=True) for _ in range(2))
    y = group_norm_silu(x, shape[1], weight, bias, 1.0)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), (x, weight, bias), allow_unused=True, materialize_grads=True)
    expected = torch.nn.functional.silu(bias).view(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
    torch.testing.assert_close(y, expected)
    assert all(part.abs().max() < 1e-6 for part in (first, *second))


def test_no_images_give_none(backend, device):
    x = torch.zeros(0, 4, 3, 3, device=place(backend, device), requires_grad=True)
    weight, bias = torch.ones(4, device=x.device, requires_grad=True), torch.zeros(4, device=x.device)
    y = group_norm_silu(x, 2, weight, bias, 1e-5)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("groups", "weight", "scale"),
    [(4, (6,), (2, 6)), (3, (5,), None), (3, (6,), (3, 6)), (3, (6,), (2, 6, 1, 1))],
)
def test_kernels_refuse_shapes_that_they_would_read_past(groups, weight, scale, device):
    for name in ("cpp", "triton"):
        x = torch.zeros(2, 6, 3, device=place(name, device))
        parts = [torch.zeros(weight, device=x.device)] * 2 + [scale and torch.zeros(scale, device=x.device)]
        with use(name), pytest.raises((ValueError, RuntimeError), match=r"weight|match"):
            group_norm_silu(x, groups, *parts[:2], 1e-5, parts[2])


def test_extreme_inputs_stay_finite(backend, device):
    x = (
        torch.tensor([-1e4, 1e4, 3.0, -2.0, 1.0, 0.0], device=place(backend, device))
        .view(1, 1, 6)
        .requires_grad_()
    )
    weight, bias = (torch.full((1,), v, device=x.device, requires_grad=True) for v in (1e4, 100.0))
    y = group_norm_silu(x, 1, weight, bias, 1e-5)
    exact = operator(reference, Case((1, 1, 6), 1))(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-3)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, weight, bias))
    assert all(part.isfinite().all() for part in (first, *second))


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
def test_layout_stays(layout, backend, device):
    case = Case((2, 12, 5, 4), 3, layout)
    x, weight, bias = inputs(case, torch.float32, device=place(backend, device))
    y = operator(group_norm_silu, case)(x, weight, bias)
    assert y.stride() == x.stride()


def test_low_precision_is_normalised_in_float32():
    x = 100 + torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    low = x.to(torch.bfloat16)
    for backend in ("reference", "cpp"):
        with use(backend):
            out = group_norm_silu(low, 2, torch.ones(4), torch.zeros(4), 1e-6)
        exact = reference(low.double(), 2, torch.ones(4), torch.zeros(4), 1e-6)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 0.02


def test_autocast_changes_nothing():
    case = Case((2, 4, 3, 2), 2, adaptive="scale shift")
    parts = inputs(case, torch.float32)
    expected = operator(group_norm_silu, case)(*parts)
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(group_norm_silu, case)(*parts)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


# -- as operators of torch -----------------------------------------------------------------------------------


def operands(case, dtype=torch.float32):
    """Arguments of forward, backward and double backward."""
    x, weight, bias = inputs(case, dtype, torch.promote_types(dtype, torch.float32))
    _, mean, rstd = (part.detach() for part in module._forward(x, weight, bias, case.groups, 1e-5, True))
    dy, v = torch.randn_like(x).requires_grad_(), torch.randn_like(x).requires_grad_()
    alpha, beta = (torch.randn_like(part).requires_grad_() for part in (weight, bias))
    saved = (dy, x, mean, rstd, weight, bias, case.groups, True)
    return (
        (x, weight, bias, case.groups, 1e-5, True),
        saved,
        (v, alpha, beta, *saved),
        (v, None, None, *saved),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_operators_are_fit_for_the_compiler(layout):
    forward, backward, double_backward, partial = operands(Case((2, 4, 3, 2), 2, layout))
    torch.library.opcheck(module._forward, forward)
    torch.library.opcheck(module._backward, backward)
    for arguments in (double_backward, partial):  # whose derivative raises
        constant = [part.detach() if isinstance(part, torch.Tensor) else part for part in arguments]
        torch.library.opcheck(module._double_backward, constant)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", [CASES[4], CASES[5], Case((2, 12, 3, 5), 2, "strided")], ids=identity)
def test_operators_equal_the_functions_of_eager(case):
    def through_operators(x, weight, bias):
        return module._forward(x, weight, bias, case.groups, 1e-5, case.activation)[0]

    found = orders(through_operators, inputs(case, torch.float32))
    expected = orders(operator(group_norm_silu, case), inputs(case, torch.float32))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("through_operators", [False, True])
def test_a_third_derivative_raises(through_operators):
    case = Case((2, 4, 3, 2), 2)
    x, weight, bias = inputs(case, torch.float64, torch.float64)
    if through_operators:
        y = module._forward(x, weight, bias, case.groups, 1e-5, True)[0]
    else:
        y = operator(group_norm_silu, case)(x, weight, bias)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    # y has a derivative of its own: without an error the missing term would pass unseen.
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.square().sum() + y.sum(), x)
