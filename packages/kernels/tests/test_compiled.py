"""Second-order gradients inside and around compiled regions: right, or refused, never silently wrong.

The recipes are those that PyTorch has for a loss with a gradient in it. `torch.compile(model)` with the
gradient outside is not among them: PyTorch refuses it whatever the operators.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import cdm_kernels
from cdm_kernels import cpp, use
from cdm_kernels.testing import assert_orders_close, orders

T = torch.tensor([4, 0, 2])
ONE, TWO = (1, 1), (2, 2)


class Case(NamedTuple):
    function: Callable[..., Any]
    shapes: list[tuple[int, ...]]


CASES = {
    "adm_embedding": Case(lambda t: cdm_kernels.adm_embedding(t, 6), [(3,)]),
    "attention": Case(cdm_kernels.attention, [(2, 6, 3, 2)]),
    "concatenate": Case(cdm_kernels.concatenate, [(2, 3, 4, 2), (2, 1, 4, 2)]),
    "conv2d": Case(lambda *a: cdm_kernels.conv2d(*a, TWO, ONE), [(2, 4, 5, 4), (6, 4, 3, 3), (6,)]),
    "cumulative_logits": Case(cdm_kernels.cumulative_logits, [(3, 5)]),
    "ddpm_embedding": Case(lambda t: cdm_kernels.ddpm_embedding(t, 6), [(3,)]),
    "edm_fourier_embedding": Case(cdm_kernels.edm_fourier_embedding, [(3,), (4,)]),
    "edm_positional_embedding": Case(lambda t: cdm_kernels.edm_positional_embedding(t, 6), [(3,)]),
    "group_norm_silu": Case(
        lambda x, w, b, *s: cdm_kernels.group_norm_silu(x, 2, w, b, 1e-5, *s),
        [(2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4)],
    ),
    "log_ratio": Case(lambda o: cdm_kernels.log_ratio(o, T.to(o.device), 4), [(3, 5)]),
    "mean_conv3x3": Case(cdm_kernels.mean_conv3x3, [(2, 3, 4, 5), (4, 3, 3, 3), (4,)]),
    "noise_level_cross_entropy": Case(
        lambda o: cdm_kernels.noise_level_cross_entropy(o, T.to(o.device)), [(3, 5)]
    ),
    "noise_level_head": Case(lambda o: cdm_kernels.noise_level_head(o, T.to(o.device), 1)[:2], [(3, 5)]),
    "softmax_gradient": Case(lambda f: cdm_kernels.softmax_gradient(f, T.to(f.device), 1.5, 0.5), [(3, 5)]),
    "suffix_table": Case(lambda w, b: cdm_kernels.suffix_table(w, b, 4), [(5, 3), (5,)]),
    "upsample_conv3x3": Case(cdm_kernels.upsample_conv3x3, [(2, 3, 3, 4), (2, 3, 3, 3), (2,)]),
}


def inputs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def scalar(function: Callable[..., Any], parts: Sequence[Tensor]) -> Tensor:
    """The fourth powers of function's values, summed: no derivative is constant."""
    values = function(*parts)
    return sum(v.pow(4).sum() for v in ((values,) if isinstance(values, Tensor) else values))


def loss_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A loss that has the gradient of `scalar` in it."""

    def loss(*parts: Tensor) -> Tensor:
        value = scalar(function, parts)
        return value + sum(g.pow(2).sum() for g in torch.autograd.grad(value, parts, create_graph=True))

    return loss


def step_of(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The loss and its gradients."""

    def step(*parts: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(function)(*parts)
        return loss.detach(), *torch.autograd.grad(loss, parts)

    return step


def gradient_outside(function: Any, parts: Sequence[Tensor], backend: Any) -> Sequence[Tensor]:
    """The loss is compiled, its gradient in the leaves is taken outside."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(loss_of(function), backend=backend, fullgraph=True)(*parts)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def whole_step(function: Any, parts: Sequence[Tensor], backend: Any) -> Sequence[Tensor]:
    """Loss and outer gradient in one compiled function."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        return torch.compile(step_of(function), backend=backend, fullgraph=True)(*parts)


def functional(function: Any, parts: Sequence[Tensor], backend: Any) -> Sequence[Tensor]:
    """`torch.func.grad` inside the compiled loss, the outer gradient outside."""

    def loss(*parts: Tensor) -> Tensor:
        arguments = tuple(range(len(parts)))
        gradients = torch.func.grad(lambda *parts: scalar(function, parts), arguments)(*parts)
        return scalar(function, parts) + sum(g.pow(2).sum() for g in gradients)

    torch._dynamo.reset()
    value = torch.compile(loss, backend=backend, fullgraph=True)(*parts)
    return value.detach(), *torch.autograd.grad(value, parts)


def traced(function: Any, parts: Sequence[Tensor], backend: Any) -> Sequence[Tensor]:
    """make_fx of the whole eager step, then compiled; without grad, lest it be differentiated once more."""
    torch._dynamo.reset()
    graph = make_fx(step_of(function))(*parts)
    with torch.no_grad():
        return torch.compile(graph, backend=backend)(*parts)


RECIPES = [gradient_outside, whole_step, functional, traced]


@cache
def eager(name: str) -> Sequence[Tensor]:
    with use("reference"):
        return step_of(CASES[name].function)(*inputs(CASES[name].shapes))


def assert_right(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_every_public_function_is_here():
    assert {*CASES, "first_order", "use"} == set(cdm_kernels.__all__)


def test_every_operator_is_reached():
    """By what a compiler sees of the cases below: they test all that is registered."""
    if cpp.library() is None:
        pytest.skip(cpp.problem())
    found = set()

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.update(
            node.target._schema.name for node in graph.graph.nodes if hasattr(node.target, "_schema")
        )
        return make_boxed_func(graph.forward)

    for case in CASES.values():
        whole_step(case.function, inputs(case.shapes), aot_autograd(fw_compiler=record))
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {name for name in registered if name.startswith("cdm_kernels::")} <= found


@pytest.mark.parametrize("name", CASES)
def test_eager(name):
    assert_right(step_of(CASES[name].function)(*inputs(CASES[name].shapes)), eager(name))


@pytest.mark.parametrize("through_operators", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_third_derivative_is_right_or_raises(name, through_operators):
    """Of the loss that has a gradient in it; what makes operators of the functions is a tracer."""

    def third(*parts: Tensor) -> Sequence[Tensor]:
        gradients = torch.autograd.grad(loss_of(CASES[name].function)(*parts), parts, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), parts)

    parts = inputs(CASES[name].shapes)
    with use("reference"):
        expected = third(*parts)
    try:
        found = make_fx(third)(*parts)(*parts) if through_operators else third(*parts)
    except RuntimeError as error:
        if "third derivative" not in str(error):
            raise
        return
    assert_right(found, expected, 1e-8)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_compiled(name, recipe):
    parts = inputs(CASES[name].shapes)
    try:
        found = recipe(CASES[name].function, parts, "aot_eager")
    except Exception:
        if recipe is not functional:
            raise
        return
    assert_right(found, eager(name))


# -- a small classifier of noise levels, and a compiler that generates code ----------------------------------


def classifier(x: Tensor, kernel: Tensor, gain: Tensor, offset: Tensor, last: Tensor, bias: Tensor) -> Tensor:
    h = cdm_kernels.conv2d(x, kernel, None, padding=ONE)
    h = cdm_kernels.group_norm_silu(h, 2, gain, offset, 1e-5)
    o = cdm_kernels.mean_conv3x3(h, last, bias)
    return cdm_kernels.noise_level_cross_entropy(o, T.to(o.device)) + cdm_kernels.log_ratio(
        o, T.to(o.device), 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [gradient_outside, traced])
def test_classifier_under_inductor(recipe):
    shapes = [(3, 2, 4, 4), (4, 2, 3, 3), (4,), (4,), (5, 4, 3, 3), (5,)]
    with use("reference"):
        expected = step_of(classifier)(*inputs(shapes))
    assert_right(recipe(classifier, inputs(shapes), "inductor"), expected)


# -- why operators -------------------------------------------------------------------------------------------


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x):
        ctx.save_for_backward(dy, x)
        return 3 * x**2 * dy

    @staticmethod
    def backward(ctx, v):
        dy, x = ctx.saved_tensors
        return 3 * x**2 * v, 6 * x * dy * v


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, dy):
        return _Slope.apply(dy, *ctx.saved_tensors)


def test_a_bare_function_is_right_in_eager_and_when_traced_but_not_compiled():
    """Were this to fail, PyTorch has mended what the operators are there for."""
    expected = step_of(lambda x: x**3)(*inputs([(3,)]))
    assert_right(step_of(_Cube.apply)(*inputs([(3,)])), expected)
    assert_right(traced(_Cube.apply, inputs([(3,)]), "aot_eager"), expected)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(gradient_outside(_Cube.apply, inputs([(3,)]), "aot_eager"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: Triton's kernels run on one")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_same_in_every_order(name, monkeypatch):
    """Values, first and second derivatives of float32 tensors on the device, against float64 on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = [part.detach().float().double().requires_grad_() for part in inputs(CASES[name].shapes)]
    found = [part.detach().float().cuda().requires_grad_() for part in exact]
    bent = lambda *parts: scalar(CASES[name].function, parts)  # noqa: E731
    with use("reference"):
        expected = orders(bent, exact)
    actual = orders(bent, found)
    assert_orders_close(tuple([t.cpu() for t in part] for part in actual), expected, torch.float32, factor=10)
