import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from cdm_kernels import conv2d, cpp, first_order, use
from cdm_kernels.conv2d import reference
from cdm_kernels.cpp.conv2d import pixel_product
from cdm_kernels.testing import assert_orders_close, orders

module = sys.modules["cdm_kernels.conv2d"]  # the package's attribute of that name is the function

# Shapes of x and weight, whether there is a bias, and the geometry.
CASES = {
    "3x3": ((2, 4, 5, 6), (6, 4, 3, 3), True, {"padding": (1, 1)}),
    "no bias": ((2, 4, 5, 6), (6, 4, 3, 3), False, {"padding": (1, 1)}),
    "no padding": ((2, 3, 7, 5), (5, 3, 3, 3), True, {}),
    "1x1": ((2, 4, 5, 6), (6, 4, 1, 1), True, {}),
    "1x1 by pixels": ((3, 32, 7, 9), (19, 32, 1, 1), True, {}),  # of more than a block of pixels
    "1x1 by pixels, no bias": ((2, 16, 1, 1), (5, 16, 1, 1), False, {}),
    "stride": ((2, 4, 7, 6), (6, 4, 3, 3), True, {"stride": (2, 2), "padding": (1, 1)}),
    "dilation": ((2, 4, 7, 6), (6, 4, 3, 3), True, {"padding": (2, 2), "dilation": (2, 2)}),
    "groups": ((2, 6, 5, 6), (4, 3, 3, 3), True, {"padding": (1, 1), "groups": 2}),
    "depthwise": ((2, 4, 5, 6), (8, 1, 3, 3), True, {"padding": (1, 1), "groups": 4}),
    "oblong": ((1, 3, 4, 9), (5, 3, 1, 4), True, {"stride": (1, 3), "padding": (0, 2)}),
    "one element": ((1, 1, 1, 1), (1, 1, 3, 3), True, {"padding": (1, 1)}),
}


def inputs(name, dtype=torch.float64, memory_format=torch.contiguous_format):
    x, weight, bias, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [x, weight, weight[:1]][: 2 + bias]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    drawn[:2] = [part.to(memory_format=memory_format) for part in drawn[:2]]
    return [part.requires_grad_() for part in drawn]


def operator(function, name):
    return lambda x, weight, bias=None: function(x, weight, bias, **CASES[name][3])


def through_operators(x, weight, bias=None, **geometry):
    settings = [
        geometry.get(key, (default,) * 2) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    return module._conv2d(x, weight, bias, *settings, geometry.get("groups", 1))


@pytest.mark.parametrize("function", [conv2d, through_operators])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_first_and_second_derivative_are_torchs(name, dtype, memory_format, function):
    parts = inputs(name, dtype, memory_format)
    exact = orders(operator(reference, name), [part.detach().double().requires_grad_() for part in parts])
    assert_orders_close(orders(operator(function, name), parts), exact, dtype)


@pytest.mark.parametrize("function", [conv2d, through_operators])
@pytest.mark.parametrize("name", CASES)
def test_third_derivative_is_torchs(name, function):
    def third(convolution):
        parts = inputs(name)
        total = operator(convolution, name)(*parts).pow(4).sum()
        for _ in range(2):
            total = sum(g.pow(2).sum() for g in torch.autograd.grad(total, parts, create_graph=True))
        return torch.autograd.grad(total, parts)

    for found, expected in zip(third(function), third(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("function", [conv2d, reference])
@pytest.mark.parametrize("name", ["3x3", "stride", "dilation", "groups", "1x1"])
def test_derivatives_against_differences(name, function):
    assert gradcheck(operator(function, name), inputs(name))
    # Along random directions: every pair of entries would be thousands of calls.
    assert gradgradcheck(operator(function, name), inputs(name), fast_mode=True)


@pytest.mark.parametrize("name", ["3x3", "no bias", "1x1"])
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(name):
    found = []
    for function in (conv2d, reference):
        parts = inputs(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = operator(function, name)(*parts)
        (first,) = torch.autograd.grad(y.float().square().sum(), parts[0], create_graph=True)
        gradients = torch.autograd.grad(first.square().sum() + y.float().sum(), parts)
        assert y.dtype == torch.bfloat16
        assert all(part.dtype == torch.float32 for part in (first, *gradients))
        found.append((y, first, *gradients))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 3e-2 * theirs.abs().max()


@pytest.fixture
def masks(monkeypatch):
    """Which of the gradients in x, weight and bias each call of the backward primitive computed."""
    seen, compute = [], module._gradients

    def record(dy, x, weight, geometry, mask):
        seen.append(tuple(mask))
        return compute(dy, x, weight, geometry, mask)

    monkeypatch.setattr(module, "_gradients", record)
    return seen


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("leaf", [True, False])
def test_the_input_gradient_computes_no_weight_gradient(leaf, create_graph, masks):
    x, weight, bias = inputs("3x3")
    kernel, offset = (weight, bias) if leaf else (2 * weight, 2 * bias)
    y = operator(conv2d, "3x3")(x, kernel, offset)
    torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)
    assert masks == [(True, False, False)]


def test_a_loss_of_the_input_gradient_computes_each_gradient_once(masks):
    x, weight, bias = inputs("3x3")
    y = operator(conv2d, "3x3")(x, weight, bias)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    masks.clear()
    first.square().sum().backward()
    # dgrad's backward: a wgrad; through dy = 2 y into conv's: dgrad, wgrad and the sum for the bias in one.
    assert sorted(masks) == [(False, True, False), (True, True, True)]
    gradients = [part.grad for part in (x, weight, bias)]
    x, weight, bias = inputs("3x3")
    y = operator(reference, "3x3")(x, weight, bias)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for found, expected in zip(
        gradients, torch.autograd.grad(first.square().sum(), (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_frozen_weights_have_no_gradient_computed(masks):
    x, weight, bias = inputs("3x3")
    y = operator(conv2d, "3x3")(x, weight.detach(), bias.detach())
    y.square().sum().backward()
    assert masks == [(True, False, False)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant):
    x, weight, bias = inputs("3x3")
    y = checkpoint(operator(conv2d, "3x3"), x, weight, bias, use_reentrant=reentrant)
    y.square().sum().backward()
    found = [part.grad for part in (x, weight, bias)]
    expected = torch.autograd.grad(
        operator(reference, "3x3")(x, weight, bias).square().sum(), (x, weight, bias)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["3x3", "no bias", "stride", "groups", "1x1 by pixels"])
def test_operators_are_fit_for_the_compiler(name):
    x, weight, *bias = inputs(name, torch.float32)
    geometry = module.Geometry((1, 1), (0, 0), (1, 1), 1)._replace(**CASES[name][3])
    dy = torch.randn_like(operator(reference, name)(x, weight)).requires_grad_()
    torch.library.opcheck(module._conv2d, (x, weight, bias[0] if bias else None, *geometry))
    torch.library.opcheck(module._input_gradient, (dy, x, weight, *geometry))
    torch.library.opcheck(module._weight_gradient, (dy, x, weight, *geometry))
    if x.shape[1] > 1:  # the layout that comes out is the layout that the compiler is told of
        x, dy = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, dy))
        torch.library.opcheck(module._conv2d, (x, weight, bias[0] if bias else None, *geometry))
        torch.library.opcheck(module._input_gradient, (dy, x, weight, *geometry))
        torch.library.opcheck(module._weight_gradient, (dy, x, weight, *geometry))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("pixels", "outputs", "inputs"), [(1, 1, 16), (130, 9, 48), (700, 33, 16)])
def test_pixel_product(pixels, outputs, inputs, with_bias, level):
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(1, channels, pixels, 1, generator=generator).to(memory_format=torch.channels_last)
        for channels in (inputs, outputs)
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(pixel_product(dy, x, with_bias))
    finally:
        torch.set_num_threads(before)
    expected = (dy[0, :, :, 0].double() @ x[0, :, :, 0].double().T)[:, :, None, None]
    for dweight, dbias in found:
        assert (dweight - expected).abs().max() < 1e-6 * expected.abs().max()
        if with_bias:
            torch.testing.assert_close(dbias, dy.double().sum((0, 2, 3)).float())
        else:
            assert dbias is None


@pytest.mark.parametrize(
    ("dtype", "layout", "kernel", "geometry"),
    [
        (torch.float64, torch.channels_last, (8, 32, 1, 1), {}),
        (torch.float32, torch.contiguous_format, (8, 32, 1, 1), {}),
        (torch.float32, torch.channels_last, (8, 32, 1, 1), {"stride": (2, 2)}),
        (torch.float32, torch.channels_last, (8, 32, 1, 1), {"padding": (1, 1)}),
        (torch.float32, torch.channels_last, (8, 16, 1, 1), {"groups": 2}),
        (torch.float32, torch.channels_last, (8, 32, 1, 2), {}),
    ],
)
def test_other_convolutions_take_torchs_gradient(dtype, layout, kernel, geometry, monkeypatch):
    monkeypatch.setattr(module, "kernels", None)  # whoever asks for one fails
    x = torch.randn(2, 32, 4, 4, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(kernel, dtype=dtype, requires_grad=True)
    conv2d(x, weight, **geometry).sum().backward()
    expected = torch.autograd.grad(reference(x, weight, **geometry).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_without_a_library_torchs_convolution_serves(monkeypatch):
    monkeypatch.setattr(module, "_Convolution", None)  # whoever asks for it fails
    parts = inputs("3x3")
    expected = operator(reference, "3x3")(*parts)
    with use("reference"):
        assert torch.equal(operator(conv2d, "3x3")(*parts), expected)
    monkeypatch.setattr(cpp, "library", lambda: None)
    assert torch.equal(operator(conv2d, "3x3")(*parts), expected)


def test_transforms_of_torch_func_take_the_reference():
    x, weight, bias = (part.detach() for part in inputs("3x3"))
    per_image = torch.func.vmap(
        torch.func.grad(lambda x: operator(conv2d, "3x3")(x[None], weight, bias).square().sum())
    )
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(operator(reference, "3x3")(leaf, weight, bias).square().sum(), leaf)
    torch.testing.assert_close(per_image(x), expected)


def test_in_first_order_it_is_torchs_own():
    """Same numbers; and none of ours in the graph, whose backward pass costs more."""
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    ours = conv2d(x, weight)
    with first_order():
        theirs = conv2d(x, weight)
    assert ours.grad_fn.name() == "_ConvolutionBackward"
    assert theirs.grad_fn.name() == "ConvolutionBackward0"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert conv2d(x, weight).grad_fn.name() == "_ConvolutionBackward"  # only while the context is open
