"""Two-dimensional convolution whose second derivative is made of the same three primitives as its first.

y = conv(x, w) is linear in both arguments, and so are its gradients dx = dgrad(dy, w) and dw = wgrad(dy, x).
The derivatives of each are the other two:

    dgrad(dy, w) with cotangent v:  d dy = conv(v, w),  dw = wgrad(dy, v)
    wgrad(dy, x) with cotangent u:  d dy = conv(x, u),  dx = dgrad(dy, u)

PyTorch's own double backward computes dw above as a convolution with batch and channels exchanged and a
kernel as large as the image, 2 to 3 times slower in float32. Derivatives of any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_kernels.cpp.conv2d import LANES
from cdm_kernels.dispatch import define_composite, has_kernel, kernels, leaf_free, traced, wanted


class Geometry(NamedTuple):
    """How the kernel moves over the image."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, autocast included.

    x (B, C, H, W), weight (D, C / groups, h, w), bias (D,) or None, of one float dtype unless autocast makes
    them so; (B, D, H', W') in that dtype and x's layout. Derivatives of every order.
    """
    if not has_kernel(x, composite=True):
        return reference(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        return _conv2d(x, weight, bias, *geometry)
    bias = None if bias is None else leaf_free(bias)
    return _forward(x, leaf_free(weight), bias, geometry)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`conv2d` by PyTorch's own derivatives."""
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


# The three primitives; without grad, as in most backward passes of second order, by themselves.


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if torch.is_grad_enabled():
        return _Convolution.apply(x, weight, bias, geometry)
    return reference(x, weight, bias, *geometry)


def _to_input(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if torch.is_grad_enabled():
        return _InputGradient.apply(dy, x, weight, geometry)
    return _gradients(dy, x, weight, geometry, [True, False, False])[0]


def _to_weight(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if torch.is_grad_enabled():
        return _WeightGradient.apply(dy, x, weight, geometry)
    return _gradients(dy, x, weight, geometry, [False, True, False])[1]


def _by_pixels(dy: Tensor, x: Tensor, weight: Tensor, geometry: Any) -> bool:
    """Whether there is a kernel for the weight's gradient: oneDNN's is slow where the weight is 1x1."""
    stride, padding, _, groups = geometry
    if weight.shape[2:] != (1, 1) or groups != 1 or (*stride, *padding) != (1, 1, 0, 0):
        return False
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[1] % LANES == 0 and x.numel() > 0
    if not fits or traced(dy, x, weight) or not has_kernel(x, triton=False):
        return False
    return all(part.is_contiguous(memory_format=torch.channels_last) for part in (dy, x))


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, geometry: Any, mask: list[bool]) -> tuple[Any, ...]:
    stride, padding, dilation, groups = geometry
    if mask[1] and _by_pixels(dy, x, weight, geometry):
        dx = None
        if mask[0]:
            dx = _gradients(dy, x, weight, geometry, [True, False, False])[0]
        return dx, *kernels(x, "conv2d").pixel_product(dy, x, mask[2])
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [dy.shape[1]], stride, padding, dilation, False, [0, 0], groups, mask
    )


# -- in eager ------------------------------------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return reference(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mask = wanted(ctx, range(3))
        if not torch.is_grad_enabled():
            return *_gradients(dy, x, weight, ctx.geometry, mask), None
        dx = _to_input(dy, x, weight, ctx.geometry) if mask[0] else None
        dweight = _to_weight(dy, x, weight, ctx.geometry) if mask[1] else None
        return dx, dweight, dy.sum((0, 2, 3)) if mask[2] else None, None


class _InputGradient(torch.autograd.Function):
    """dgrad(dy, weight); of x it takes the shape alone."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(dy, weight)
        ctx.geometry = geometry
        return _gradients(dy, x, weight, geometry, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        dy, weight = ctx.saved_tensors
        mask = wanted(ctx, (0, 2))
        ddy = _forward(v, weight, None, ctx.geometry) if mask[0] else None
        dweight = _to_weight(dy, v, weight, ctx.geometry) if mask[1] else None
        return ddy, None, dweight, None


class _WeightGradient(torch.autograd.Function):
    """wgrad(dy, x); of weight it takes the shape alone."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(dy, x)
        ctx.geometry = geometry
        return _gradients(dy, x, weight, geometry, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        dy, x = ctx.saved_tensors
        mask = wanted(ctx, range(2))
        ddy = _forward(x, u, None, ctx.geometry) if mask[0] else None
        dx = _to_input(dy, x, u, ctx.geometry) if mask[1] else None
        return ddy, dx, None, None


# -- in a compiled region ------------------------------------------------------------------------------------


def _save_conv2d(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[3:]


def _differentiate_conv2d(ctx: Any, dy: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    dx = _input_gradient(dy, x, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dweight = _weight_gradient(dy, x, weight, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return dx, dweight, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None, None


def _save_input_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    dy, _, weight, *ctx.geometry = inputs
    ctx.save_for_backward(dy, weight)


def _differentiate_input_gradient(ctx: Any, v: Tensor) -> Any:
    dy, weight = ctx.saved_tensors
    ddy = _conv2d(v, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dweight = _weight_gradient(dy, v, weight, *ctx.geometry) if ctx.needs_input_grad[2] else None
    return ddy, None, dweight, None, None, None, None


def _save_weight_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    dy, x, _, *ctx.geometry = inputs
    ctx.save_for_backward(dy, x)


def _differentiate_weight_gradient(ctx: Any, u: Tensor) -> Any:
    dy, x = ctx.saved_tensors
    ddy = _conv2d(x, u, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dx = _input_gradient(dy, x, u, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None, None, None, None


def _run_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return reference(x, weight, bias, *geometry)


def _run_input_gradient(dy: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return _gradients(dy, x, weight, geometry, [True, False, False])[0]


def _run_weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return _gradients(dy, x, weight, geometry, [False, True, False])[1]


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_conv2d = define_composite(
    f"conv2d(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    _run_conv2d,
    _differentiate_conv2d,
    _save_conv2d,
)
_input_gradient = define_composite(
    f"conv2d_input_gradient(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor",
    _run_input_gradient,
    _differentiate_input_gradient,
    _save_input_gradient,
)
_weight_gradient = define_composite(
    f"conv2d_weight_gradient(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor",
    _run_weight_gradient,
    _differentiate_weight_gradient,
    _save_weight_gradient,
)
