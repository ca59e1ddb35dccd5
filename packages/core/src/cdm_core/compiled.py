"""Compiled training steps, and models compiled for sampling and scoring.

A loss may differentiate the model inside (`torch.autograd.grad(..., create_graph=True)`); training then
differentiates twice, and of the many ways to hand such a step to a compiler most fail and some give wrong
gradients without a word. Three are used, the *recipes*:

- `trace`: `torch.compile` of the loss, the inner `torch.autograd.grad` traced with it; `loss.backward()`
  stays outside. Needs `torch._dynamo.config.trace_autograd_ops`. Inside, an operator of its own must be a
  `torch.library` operator at every order: the backward of a plain `autograd.Function` would be dropped.
- `whole`: eager autograd is run once under `make_fx`, which writes down every operation of the loss and of
  its gradients; that list, without any autograd left in it, is compiled. Takes any operator.
- `cuda-graph`: the same step in eager, its kernel launches recorded once and replayed. Needs a GPU.

Nothing compiled is trusted: it is compared with eager before it is first used, and refused if it differs.
A model is traced (`make_fx`) with its weights as they are then.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cdm_core.adapters import Wrapper
from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_core.samplers import Prediction
from cdm_core.settings import Compile

Recipe = Literal["trace", "whole", "cuda-graph"]
Scalars = dict[str, Tensor]
Step = Callable[..., Scalars]

# Error allowed, relative: in float32 and better; with TensorFloat-32; where half precision takes part.
EXACT, TENSORFLOAT, ROUGH = 1e-4, 5e-3, 5e-2
_SEED = 0  # of the dropout masks of a comparison


@runtime_checkable
class SplitObjective(Protocol):
    """An objective whose `loss` can be compiled: `__call__` is `loss(model, *prepare(model, x0, y, draws))`.

    `prepare` does all that is random or no tensor operation, and makes the leaves that the loss
    differentiates in (a compiler cannot take a leaf made inside). `loss` is tensor operations alone: no draw
    but the model's own dropout, no `.item()`, no branch on a value.
    """

    def prepare(self, model: Any, x0: Tensor, y: Tensor | None, draws: Any) -> tuple[Tensor | None, ...]: ...

    def loss(self, model: Any, *prepared: Tensor | None) -> Scalars: ...

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Any) -> Scalars: ...


def choose(recipe: Compile, device: torch.device) -> Recipe:
    """The recipe behind `auto`, `trace`, `whole` or `cuda-graph` on `device`; `UserError` if it has none."""
    if recipe == "auto":
        return "whole"  # as fast as `trace` or faster wherever it was measured, and it takes any operator
    if recipe == "trace" and not can_trace():
        raise UserError(
            f"train.compile 'trace': torch {torch.__version__} cannot trace torch.autograd.grad: use 'whole'"
        )
    if recipe == "cuda-graph" and device.type != "cuda":
        raise UserError(f"train.compile 'cuda-graph' needs a GPU, and this runs on {device.type}: use 'auto'")
    assert recipe in get_args(Recipe)
    return recipe  # type: ignore[return-value]


def can_trace() -> bool:
    """Whether this torch traces `torch.autograd.grad` inside what it compiles."""
    import torch._dynamo

    return hasattr(torch._dynamo.config, "trace_autograd_ops")


# -- the training step -------------------------------------------------------------------------------------


class CompiledObjective:
    """`objective` with its loss compiled: called like it, and its losses are trained like its own.

    One step is compiled for every shape of batch, at its first call, and compared with eager there: loss,
    gradients and buffers. Raises `UserError` where the objective is not split, the compiler fails, or what it
    made is wrong. recipe: as `choose` returns it; name: the objective's; backend: of `torch.compile`.
    """

    def __init__(self, objective: Any, recipe: Recipe, *, name: str, backend: str = "inductor") -> None:
        if not isinstance(objective, SplitObjective):
            raise UserError(
                f"the objective {name!r} cannot be compiled, as it has no `prepare` and `loss`: "
                "train without --compile"
            )
        self.objective, self.recipe, self.name, self.backend = objective, recipe, name, backend
        self.error = 0.0  # the largest relative error of a gradient that a comparison found
        self._steps: dict[Any, Step] = {}

    def __call__(self, model: nn.Module, x0: Tensor, y: Tensor | None, draws: Any) -> Scalars:
        """As the objective; without grad there is nothing to gain, and the objective itself is called."""
        prepared = self.objective.prepare(model, x0, y, draws)
        if not torch.is_grad_enabled():
            return self.objective.loss(model, *prepared)
        return self._step(model, prepared)(*prepared)

    def compile(self, model: nn.Module, x0: Tensor, y: Tensor | None, draws: Any) -> None:
        """Compile for batches like this one; the model stays as it is."""
        self._step(model, self.objective.prepare(model, x0, y, draws))

    def _step(self, model: nn.Module, prepared: Sequence[Tensor | None]) -> Step:
        key = id(model), model.training, _signature(prepared)
        if key not in self._steps:  # a step holds its model, so that no other gets its id
            self._steps[key] = self._compile(model, prepared)
        return self._steps[key]

    def _compile(self, model: nn.Module, prepared: Sequence[Tensor | None]) -> Step:
        """The step for batches like `prepared`, found right."""

        def eager(*prepared: Tensor | None) -> Scalars:
            return self.objective.loss(model, *prepared)

        device = _device(model)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            _put_back(model, weights=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of the compiler, about itself
            _fill_zeros(model)
            # A recording replays eager's own dropout; compilers lay tensors, and with them masks, out anew.
            masks = nullcontext if self.recipe == "cuda-graph" else same_masks
            with masks():
                expected = _evaluate(eager, model, prepared)
            with _compiling(f"the objective {self.name!r}", "train without --compile", self.recipe):
                with _put_back(model):
                    step = self._make(model, prepared)
                with masks():
                    found = _evaluate(step, model, prepared)
        tolerance = _tolerance(model)
        self.error = max(self.error, _compare(found, expected, tolerance, self.name, self.recipe))
        return step

    def _make(self, model: nn.Module, prepared: Sequence[Tensor | None]) -> Step:
        if self.recipe == "trace":
            return _traced(self.objective, model, self.backend)

        whole = _Whole(self.objective, model, prepared)
        inputs = whole.inputs(_unlike(prepared))
        if self.recipe == "cuda-graph":
            whole.run = _captured(whole.compute, inputs, whole.fixed)
        else:
            whole.run = _written_down(whole.compute, inputs, self.backend)
        return whole


def _traced(objective: SplitObjective, model: nn.Module, backend: str) -> Step:
    """Recipe `trace`."""
    import torch._dynamo
    import torch._functorch.config

    def loss(*prepared: Tensor | None) -> Scalars:
        return objective.loss(model, *prepared)

    # What is compiled is kept, and limited in number, by code object: each loss gets one of its own.
    code = loss.__code__.replace()
    own = types.FunctionType(code, loss.__globals__, closure=loss.__closure__)
    compiled = _torch_compile(own, backend, _device(model))
    # Wrapped for many processes, a model's graph would be cut at every bucket of gradients.
    settings = {"trace_autograd_ops": True, "optimize_ddp": False}
    # The backward pass without autocast, as in eager, where it is not open any more.
    outside = {"backward_pass_autocast": "off"}
    outside = {name: value for name, value in outside.items() if hasattr(torch._functorch.config, name)}

    def step(*prepared: Tensor | None) -> Scalars:
        with torch._dynamo.config.patch(settings), torch._functorch.config.patch(outside):
            return compiled(*prepared)

    return step


class _Loss(nn.Module):
    """`objective.loss` as a forward pass: what `functional_call` can run with other weights."""

    def __init__(self, objective: SplitObjective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, *prepared: Tensor | None) -> Scalars:
        return self.objective.loss(self.model, *prepared)


class _Whole:
    """The loss and its gradients as one function of tensors, `compute`; a step that runs it as one node.

    run: `compute`, compiled or recorded, to be set by whoever does that. fixed: so many inputs are the
    model's own memory.
    """

    run: Callable[..., list[Tensor]]

    def __init__(
        self, objective: SplitObjective, model: nn.Module, prepared: Sequence[Tensor | None]
    ) -> None:
        self.module, self.device = _Loss(objective, model), _device(model)
        self.dtype = _autocast_dtype(self.device)
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        self.weights = {name: p for name, p in parameters.items() if p.requires_grad}
        self.state = {name: t for name, t in (parameters | buffers).items() if name not in self.weights}
        self.leaves = [None if t is None else t.requires_grad for t in prepared]
        self.names: list[str] = []  # of the scalars
        self.reached: list[nn.Parameter] = []  # the weights that the loss depends on
        # Gradients in float16 would vanish without the factor that a GradScaler puts on the loss later.
        self.scale = torch.ones((), device=self.device)
        self.fixed = len(self.weights) + len(self.state)

    def inputs(self, prepared: Sequence[Tensor | None]) -> list[Tensor]:
        """What `compute` takes: weights, other state, the scale of the loss, and the batch."""
        given = (t for t in prepared if t is not None)
        return [t.detach() for t in (*self.weights.values(), *self.state.values(), self.scale, *given)]

    def compute(self, *inputs: Tensor) -> list[Tensor]:
        """All scalars, then the gradients of `scale * loss` in the weights that it depends on."""
        names, rest = [*self.weights, *self.state], iter(inputs)
        tensors = {name: next(rest).detach().requires_grad_(name in self.weights) for name in names}
        leaves = [tensors[name] for name in self.weights]
        scale = next(rest)
        prepared = [
            None if leaf is None else next(rest).detach().requires_grad_(leaf) for leaf in self.leaves
        ]
        # Without the cache of casts: it would hand tensors of one run to another.
        autocast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            with autocast:
                scalars = functional_call(self.module, tensors, tuple(prepared))
            # Outside, as `loss.backward()` is: autocast would round what it leaves in float32.
            gradients = torch.autograd.grad(scalars["loss"] * scale, leaves, allow_unused=True)
        pairs = list(zip(self.weights.values(), gradients, strict=True))
        self.names, self.reached = list(scalars), [p for p, gradient in pairs if gradient is not None]
        return [t.detach() for t in (*scalars.values(), *gradients) if t is not None]

    def __call__(self, *prepared: Tensor | None) -> Scalars:
        """The loss, differentiable in the weights once, and the other scalars."""
        return dict(zip(self.names, _Ready.apply(self, prepared, *self.reached), strict=True))


class _Ready(torch.autograd.Function):
    """Hands out gradients that were computed together with the loss, times whatever comes for the loss."""

    @staticmethod
    def forward(ctx: Any, whole: _Whole, prepared: Sequence[Tensor | None], *reached: Tensor) -> Any:
        ctx.whole, ctx.scale = whole, whole.scale
        with torch.autocast(whole.device.type, enabled=False):  # its casts are in the graph
            outputs = whole.run(*whole.inputs(prepared))
        count = len(whole.names)
        ctx.save_for_backward(*outputs[count:])
        scalars = dict(zip(whole.names, outputs, strict=False))
        ctx.mark_non_differentiable(*(t for name, t in scalars.items() if name != "loss"))
        return tuple(scalars.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a compiled step is differentiated once: its gradients have no graph")
        whole, cotangent = ctx.whole, cotangents[ctx.whole.names.index("loss")]
        if whole.dtype == torch.float16:  # the next loss is scaled as this one was
            whole.scale = torch.where(cotangent > 0, cotangent, whole.scale)
        return None, None, *torch._foreach_mul(ctx.saved_tensors, cotangent / ctx.scale)


# -- sampling and scoring ----------------------------------------------------------------------------------


class CompiledModel(Wrapper):
    """A model with its `denoise`, `predict` and `log_density` compiled, each for one size of batch.

    The size is that of the first call. A smaller batch is filled up with copies of its last row and cut
    again, so that the same code computes every image; a larger one compiles anew. Gradients are not computed:
    where grad is enabled the model itself is called. On a GPU the launches are recorded and replayed. Raises
    `UserError` where the compiler fails, or what it made is wrong. hint: what to do then.
    """

    def __init__(self, model: Any, *, hint: str, backend: str = "inductor") -> None:
        super().__init__(model)
        self.capabilities = offered(model)
        self._hint, self._backend = hint, backend
        self._compiled: dict[Any, tuple[int, Callable[..., Tensor]]] = {}

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """As the model's."""
        return self._call("denoise", x, sigma, y)

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As the model's, or its `denoise` where it has none."""
        if not hasattr(self.model, "predict"):
            return Prediction(self.denoise(x, sigma, y))
        return Prediction(*self._call("predict", x, sigma, y).unbind(1))

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """As the model's."""
        return self._call("log_density", x, y, sigma)

    def _call(self, name: str, *inputs: Tensor | None) -> Tensor:
        method = getattr(self.model, name)
        if name == "predict":
            method = _stacked(method)
        if torch.is_grad_enabled():
            return method(*inputs)
        rows = max(len(t) for t in inputs if t is not None)
        key = name, _signature([None if t is None else t[:1] for t in inputs])
        size, compiled = self._compiled.get(key, (0, method))
        if rows > size:
            size, compiled = rows, self._compile(name, method, inputs)
            self._compiled[key] = size, compiled
        return compiled(*(None if t is None else _filled_up(t, size) for t in inputs))[:rows]

    def _compile(
        self, name: str, method: Callable[..., Tensor], inputs: Sequence[Tensor | None]
    ) -> Callable[..., Tensor]:
        """The method for batches like `inputs`, found right on them and on another batch."""
        batches = [inputs, _unlike(inputs, factor=0.5)]
        expected = [method(*batch) for batch in batches]
        with _compiling(f"`{name}` of this model", self._hint), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = _method(method, _unlike(inputs), self._backend)
            found = [compiled(*batch) for batch in batches]
        tolerance = _tolerance(self.model)
        for error in (_relative(a, b) for a, b in zip(found, expected, strict=True)):
            if not error <= tolerance:
                raise UserError(
                    f"compiled, `{name}` of this model is wrong: it differs from eager's by {error:.2g} of "
                    f"its size, and {tolerance:g} is allowed: {self._hint}"
                )
        return compiled


def _stacked(predict: Callable[..., Prediction]) -> Callable[..., Tensor]:
    """Everything that `predict` returns as one tensor, (B, 1 or 2, ...): compiled methods return one."""
    return lambda *inputs: torch.stack([part for part in predict(*inputs) if part is not None], dim=1)


def _method(
    method: Callable[..., Tensor], inputs: Sequence[Tensor | None], backend: str
) -> Callable[..., Tensor]:
    """A method of a model compiled for `inputs`, and recorded on a GPU."""
    places = [i for i, t in enumerate(inputs) if t is not None]
    tensors = [t for t in inputs if t is not None]

    def function(*tensors: Tensor) -> list[Tensor]:
        given: list[Tensor | None] = [None] * len(inputs)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return [method(*given)]

    compiled = _written_down(function, tensors, backend)
    device = tensors[0].device
    if device.type == "cuda":
        with torch.autocast(device.type, enabled=False):  # the casts are in the graph
            compiled = _captured(compiled, tensors, fixed=0)

    def call(*inputs: Tensor | None) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return compiled(*(t for t in inputs if t is not None))[0]

    return call


def _filled_up(rows: Tensor, size: int) -> Tensor:
    """`size` rows: those given, then copies of the last one."""
    return (
        torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])]) if len(rows) < size else rows
    )


# -- compilers ---------------------------------------------------------------------------------------------


def _torch_compile(function: Callable[..., Any], backend: str, device: torch.device) -> Callable[..., Any]:
    """`torch.compile` as everything here needs it: one graph for one shape, dropout by torch's kernels."""
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {"fallback_random": True}
        if device.type == "cpu":
            # Channels last, the default, makes every normalisation between two convolutions a strided one.
            options["layout_optimization"] = False
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)


def _written_down(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], backend: str
) -> Callable[..., list[Tensor]]:
    """`function` traced operation by operation at `inputs`, autograd and all, then compiled; no grad."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(function)(*inputs)
    compiled = _torch_compile(graph, backend, inputs[0].device)

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return compiled(*inputs)

    return run


def _captured(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], fixed: int
) -> Callable[..., list[Tensor]]:
    """`function`'s launches recorded in a CUDA graph and replayed; no grad.

    The first `fixed` inputs are read, and written, where they are; the others are copied to where the
    recording read them.
    """
    device = inputs[0].device
    static = [t if i < fixed else t.clone() for i, t in enumerate(inputs)]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # whatever is set up at a first call must not be recorded
                function(*static)
        torch.cuda.current_stream().wait_stream(side)
        # Threads that read data or watch over other processes may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*static)

    def replay(*inputs: Tensor) -> list[Tensor]:
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(static[:fixed], inputs[:fixed], strict=True)):
            raise RuntimeError("the model's weights were moved after its step was recorded: record it anew")
        with torch.no_grad(), torch.cuda.device(device):
            for place, value in zip(static[fixed:], inputs[fixed:], strict=True):
                place.copy_(value)
            graph.replay()
            return [output.clone() for output in outputs]  # the next replay overwrites them

    return replay


@contextmanager
def _compiling(what: str, hint: str, recipe: str | None = None) -> Iterator[None]:
    """Failures of a compiler, of whatever type, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a compiler may fail in any way
        by = f" by recipe {recipe!r}" if recipe else ""
        raise UserError(f"{what} cannot be compiled{by} ({_reason(error)}): {hint}") from error


def _reason(error: BaseException, length: int = 160) -> str:
    """What an error says, in one line: the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    # Some only say who raised, and what is on the next line.
    telling = [line for line in lines if line and not line.endswith("raised:")]
    text = telling[0] if telling else type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."


# -- comparisons -------------------------------------------------------------------------------------------

Evaluation = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]  # loss, gradients, buffers after


def _evaluate(step: Step, model: nn.Module, prepared: Sequence[Tensor | None]) -> Evaluation:
    """What a step computes, the seed always the same; buffers are put back."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(_SEED)
    with _put_back(model):
        loss = step(*prepared)["loss"]
        with torch.autocast(loss.device.type, enabled=False):  # as training differentiates: outside
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return loss.detach(), dict(zip(weights, gradients, strict=True)), after


def _compare(found: Evaluation, expected: Evaluation, tolerance: float, name: str, recipe: str) -> float:
    """The relative error of the gradient; `UserError` where that or anything else is above `tolerance`."""

    def refuse(what: str) -> UserError:
        return UserError(
            f"compiled by recipe {recipe!r}, the objective {name!r} is wrong: {what}: train without --compile"
        )

    def differs(what: str, error: float) -> UserError:
        return refuse(f"{what} differs from eager's by {error:.2g} of its size, and {tolerance:g} is allowed")

    error = _relative(found[0], expected[0])
    if not error <= tolerance:
        raise differs("the loss", error)
    for weight, gradient in expected[1].items():
        if (gradient is None) != (found[1][weight] is None):
            raise refuse(f"{weight!r} has {'a' if gradient is None else 'no'} gradient, unlike in eager")
    pairs = {weight: (a, expected[1][weight]) for weight, a in found[1].items() if a is not None}
    error = _relative(*(torch.cat([pair[i].double().flatten() for pair in pairs.values()]) for i in (0, 1)))  # type: ignore[union-attr]
    if not error <= tolerance:
        worst = max(pairs, key=lambda weight: _distance(*pairs[weight]))  # type: ignore[arg-type]
        raise differs(f"the gradient of the weights (most of all that of {worst!r})", error)
    for buffer, value in expected[2].items():
        gap = _relative(found[2][buffer], value)
        if not gap <= tolerance:
            raise differs(f"the buffer {buffer!r} after a step", gap)
    return error


@contextmanager
def same_masks() -> Iterator[None]:
    """Dropout that drops the same elements whatever the memory layout, by whoever computes it.

    torch draws masks in the order of memory, in which a compiler may hold a tensor otherwise than eager does.
    Here the kernels under all of them draw in the order of indices.
    """

    def bernoulli(out: Tensor, p: float = 0.5, *, generator: Any = None) -> Tensor:
        return out.copy_(torch.rand(out.shape, device=out.device) < p)

    def dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(x.shape, device=x.device) >= (p if train else 0)
        mask = torch.empty_like(x, dtype=torch.bool).copy_(drawn)  # in x's layout, as a compiler expects
        scale = 1 / (1 - p) if train and p < 1 else 1.0
        return torch.empty_like(x).copy_(x * mask * scale), mask

    with torch.library._scoped_library("aten", "IMPL") as kernels, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        kernels.impl("bernoulli_.float", bernoulli, "CPU")
        if torch.cuda.is_available():
            kernels.impl("native_dropout", dropout, "CUDA")
        yield


def _distance(a: Tensor, b: Tensor) -> float:
    """Euclidean; infinite where it is not a number, so that this is the worst."""
    return float((a.double() - b.double()).norm().nan_to_num(nan=float("inf")))


def _relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| as vectors; 0 for equals, be they infinite or no numbers."""
    if bool(((found == expected) | (found.isnan() & expected.isnan())).all()):
        return 0.0
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _tolerance(model: nn.Module) -> float:
    """How far rounding alone may take a compiled step from eager's."""
    dtypes = {p.dtype for p in model.parameters()}
    device = _device(model)
    if dtypes & {torch.float16, torch.bfloat16} or _autocast_dtype(device) is not None:
        return ROUGH
    # TensorFloat-32, which torch allows convolutions on a GPU, has 10 bits.
    return TENSORFLOAT if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else EXACT


@contextmanager
def _put_back(model: nn.Module, *, weights: bool = False) -> Iterator[None]:
    """Whatever happens to the values of the model's buffers, and of its weights too, is undone."""

    def tensors() -> dict[str, Tensor]:  # asked for twice: a buffer may have become another tensor
        return dict(model.named_buffers()) | (dict(model.named_parameters()) if weights else {})

    kept = {name: tensor.detach().clone() for name, tensor in tensors().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors().items():
                tensor.copy_(kept[name])


def _fill_zeros(model: nn.Module) -> None:
    """Random numbers into every weight that is zero: behind a zero, as a new head is, no error would show."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                inputs = parameter[0].numel() if parameter.ndim > 1 and len(parameter) else 100
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)


def _unlike(batch: Sequence[Tensor | None], factor: float = 1.1) -> list[Tensor | None]:
    """A batch of the same shapes, its rows others: for tracing, whatever it took for a constant will show."""

    def other(tensor: Tensor) -> Tensor:
        rows = tensor.detach().roll(1, 0) if tensor.ndim else tensor.detach()
        return (rows * factor if rows.is_floating_point() else rows).requires_grad_(tensor.requires_grad)

    return [None if tensor is None else other(tensor) for tensor in batch]


def _signature(tensors: Sequence[Tensor | None]) -> Any:
    """What a compiled function depends on: shapes, types, leaves, autocast."""
    given = [t for t in tensors if t is not None]
    each = tuple(None if t is None else (t.shape, t.dtype, t.requires_grad) for t in tensors)
    return each, _autocast_dtype(given[0].device)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast casts to now; None: it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
