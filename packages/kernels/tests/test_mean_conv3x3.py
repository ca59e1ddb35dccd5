import sys
import weakref
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from cdm_kernels import cpp, mean_conv3x3, use
from cdm_kernels.mean_conv3x3 import reference, window_sums
from cdm_kernels.testing import assert_orders_close, orders

module = sys.modules["cdm_kernels.mean_conv3x3"]  # the package's attribute of that name is the function


LAYOUTS = ("contiguous", "channels last")


class Case(NamedTuple):
    channels: int
    size: tuple[int, int]
    layout: str = "contiguous"


SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 3), (3, 2), (8, 8), (5, 17)]
CASES = [Case(3, size, layout) for size in SIZES for layout in LAYOUTS]
CASES += [
    Case(1, (3, 4), "strided"),
    Case(3, (5, 4), "transposed"),
    Case(2, (4, 70)),  # more columns than a block has
    Case(2, (3, 64)),
    Case(1, (17, 200)),
    Case(16, (4, 4), "channels last"),
    Case(85, (3, 4), "channels last"),
    Case(130, (3, 2), "channels last"),
]
FEW = [CASES[0], CASES[3], *CASES[8:10], *CASES[14:18], Case(20, (3, 4)), Case(40, (3, 2), "channels last")]


def identity(case):
    return f"{case.channels}x{case.size[0]}x{case.size[1]} {case.layout}"


def image(case, dtype, device="cpu"):
    """A leaf (2, C, H, W) in dtype and the case's layout."""
    shape = (2, case.channels, *case.size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if case.layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if case.layout == "transposed":
        x = x.mT.contiguous().mT
    if case.layout == "strided":
        x = torch.stack([x, x], 4)[..., 1]
    return x.requires_grad_()


def inputs(case, dtype, accumulator=torch.float32, device="cpu"):
    """Leaves x, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(s, generator=generator) for s in [(4, case.channels, 3, 3), (4,)])
    return [image(case, dtype, device), *(p.to(device, accumulator).requires_grad_() for p in (weight, bias))]


def textbook(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1).mean((2, 3))


@cache
def exact(case, dtype):
    """The textbook's orders in float64, of the inputs as they are in dtype."""
    return orders(textbook, [part.double().detach().requires_grad_() for part in inputs(case, dtype)])


def compare(case, dtype, device="cpu"):
    accumulator = torch.promote_types(dtype, torch.float32)
    found = orders(mean_conv3x3, inputs(case, dtype, accumulator, device))
    assert found[0][0].dtype == accumulator
    assert found[1][0].dtype == dtype
    assert_orders_close([[part.cpu() for part in order] for order in found], exact(case, dtype), dtype)


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    with use(request.param):
        yield request.param


def place(backend, device):
    return device if backend == "triton" else "cpu"


# -- the mean of the convolution -----------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_cpp(case, dtype, level):
    with use("cpp"):
        compare(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_reference(case):
    with use("reference"):
        compare(case, torch.float64)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=identity)
def test_triton(case, dtype, device):
    with use("triton"):
        compare(case, dtype, device)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", [Case(1, (70, 33)), Case(17, (3, 130), "channels last")], ids=identity)
def test_triton_over_several_tiles(case, device):
    with use("triton"):
        compare(case, torch.float32, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_the_cpp_kernels(layout, level):
    parts = inputs(Case(3, (3, 4), layout), torch.float64, torch.float64)
    with use("cpp"):
        assert gradcheck(mean_conv3x3, parts)
        assert gradgradcheck(mean_conv3x3, parts)


def test_derivatives_of_the_reference():
    parts = inputs(Case(3, (3, 4)), torch.float64, torch.float64)
    with use("reference"):
        assert gradcheck(mean_conv3x3, parts)
        assert gradgradcheck(mean_conv3x3, parts)


def test_several_threads_find_the_same(level):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for layout in LAYOUTS:
                x = image(Case(48, (15, 13), layout), torch.float32)
                with use("cpp"):
                    sums = window_sums(x)
                    found.append((sums, *torch.autograd.grad(sums, x, sums)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


# -- the window sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (5, 1), (1, 1)])
def test_windows(size, backend, device):
    x = image(Case(2, size), torch.float32, place(backend, device)).detach()
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [padded[:, :, i : i + size[0], j : j + size[1]] for i in range(3) for j in range(3)]
    expected = torch.stack([tap.double().sum((2, 3)) for tap in taps], 2)
    torch.testing.assert_close(window_sums(x).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_what_no_tap_sees_does_not_reach_its_sum(layout, name, device):
    # Subtracted from the sum of all, 1e8 at the border would drown the rest.
    x = torch.ones(1, 2, 4, 5, device=place(name, device))
    x[:, :, 0], x[:, :, :, 0] = 1e8, 1e8
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    with use(name):
        assert torch.equal(window_sums(x)[0, :, 8].cpu(), torch.full((2,), 12.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_is_summed_in_float32(layout, backend, device):
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    x = torch.ones(1, 1, 64, 65, dtype=dtype, device=place(backend, device))
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    sums = window_sums(x)
    assert sums.dtype == torch.float32
    columns, rows = torch.tensor([64.0, 65.0, 64.0]), torch.tensor([63.0, 64.0, 63.0])
    assert torch.equal(sums[0, 0].view(3, 3).cpu(), rows[:, None] * columns)


@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_gradient_has_the_layout_of_the_image(layout, name, device):
    x = image(Case(3, (4, 5), layout), torch.float32, place(name, device))
    with use(name):
        (dx,) = torch.autograd.grad(window_sums(x).sum(), x)
    last = layout == "channels last"
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_triton_kernels_fit_the_registers_of_an_h100(compile_for_h100):
    pytest.importorskip("triton")
    from cdm_kernels.triton.mean_conv3x3 import blocks

    names = ("channels", "height", "width", "image_stride", "channel_stride", "row_stride", "column_stride")
    kernels = []
    for kind, size, unit_stride in (("*fp32", 0, "column_stride"), ("*bf16", 2, "channel_stride")):
        sizes = zip(("BLOCK_H", "BLOCK_W", "BLOCK_C"), blocks(128, 32, 32, size), strict=True)
        constants = {**dict(sizes), unit_stride: 1}
        for name, picture in (("_window_sums", "x"), ("_adjoint", "dx")):
            signature = dict.fromkeys(names, "i32") | {picture: kind, "sums": "*fp32"}
            kernels.append((name, signature, constants, 4))
    for used in compile_for_h100("cdm_kernels.triton.mean_conv3x3", kernels):
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] <= 96


# -- everything else -----------------------------------------------------------------------------------------


def test_float16_on_the_cpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    compare(CASES[8], torch.float16)


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(module, "kernels", None)
    compare(CASES[8], torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_nothing_in_nothing_out(shape, backend, device):
    x = torch.zeros(shape, device=place(backend, device), requires_grad=True)
    weight, bias = torch.ones(4, shape[1], 3, 3, device=x.device), torch.ones(4, device=x.device)
    y = mean_conv3x3(x, weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.cpu(), torch.ones(shape[0], 4))
    assert dx.shape == shape


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_autocast_rounds_no_order(name):
    parts = inputs(Case(20, (4, 4)), torch.float32)

    def train(x, weight, bias):
        y = mean_conv3x3(x, weight, bias)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y, slope, *torch.autograd.grad(slope.square().sum() + y.sum(), (x, weight, bias))

    with use(name):
        expected = train(*parts)
        with torch.autocast("cpu", torch.bfloat16):
            found = train(*parts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_image_is_not_kept_for_the_backward_pass():
    x, weight, bias = inputs(Case(3, (4, 5)), torch.float32)
    h = x * 2
    y = mean_conv3x3(h, weight, bias)
    gone = weakref.ref(h)
    del h
    assert gone() is None
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own
def test_forward_mode_and_transforms_find_the_derivative():
    x, weight, bias = (part.detach() for part in inputs(Case(3, (3, 4)), torch.float64, torch.float64))
    along = torch.randn_like(x)
    expected = textbook(along, weight, torch.zeros_like(bias))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(window_sums(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(found, reference(along))
    torch.testing.assert_close(
        torch.func.jvp(lambda x: mean_conv3x3(x, weight, bias), (x,), (along,))[1], expected
    )


def through_operators(x):
    return module._window_sums(x)


@pytest.mark.parametrize("function", [window_sums, through_operators])
def test_third_derivatives_are_right(function):
    def third(sums):
        x = image(Case(3, (3, 4)), torch.float64)
        value = sums(x).pow(4).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.pow(2).sum(), x, create_graph=True)
        return value

    torch.testing.assert_close(third(function), third(reference))


@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_fit_for_the_compiler(layout, dtype):
    x = image(Case(3, (3, 4), layout), dtype)
    torch.library.opcheck(module._window_sums, (x,))
    sums = torch.randn(2, 3, 9, requires_grad=True)
    torch.library.opcheck(module._window_sums_adjoint, (sums, 3, 4, dtype, layout == "channels last"))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
def test_operators_equal_the_functions_of_eager(layout):
    case = Case(3, (3, 4), layout)
    found = orders(lambda x: module._window_sums(x).pow(2), [image(case, torch.float32)])
    expected = orders(lambda x: window_sums(x).pow(2), [image(case, torch.float32)])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_second_order_equals_eager(layout):
    def penalty(x, weight, bias):
        y = mean_conv3x3(x, weight, bias)
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return slope.square().sum() + y.sum()

    parts = inputs(Case(3, (3, 4), layout), torch.float64, torch.float64)
    expected = torch.autograd.grad(penalty(*parts), parts)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(*parts), parts)
    torch.testing.assert_close(found, expected)
