"""Smooth activations: every ReLU of a classifier becomes a Softplus (Ma et al. 2023, section on smoothness).

Softplus_beta(z) = log(1 + exp(beta z)) / beta has curvature beta / 4 at 0 where ReLU has a kink, so the
classifier gets a gradient that is one. Published: beta 3 (DDPM), 5 (EDM); beta -> inf is ReLU again. Weights
and batch norms stay, so Softplus(0) = log(2) / beta enters every layer. ReLU6(z) = ReLU(z) - ReLU(z - 6), and
its smooth form likewise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cdm_core.errors import UserError
from cdm_kernels.softplus import softplus

RELUS = (nn.ReLU, nn.ReLU6)


class Softplus(nn.Softplus):
    """`nn.Softplus` of one beta, by a faster kernel where there is one."""

    def forward(self, z: Tensor) -> Tensor:
        """Of z, any shape."""
        return softplus(z, self.beta)


class SoftReLU6(nn.Module):
    """Softplus_beta(z) - Softplus_beta(z - 6), elementwise: between 0 and 6 as ReLU6 is."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, z: Tensor) -> Tensor:
        """Of z, any shape."""
        return softplus(z, self.beta) - softplus(z - 6, self.beta)


@dataclass(frozen=True)
class Smoothed:
    """What `smooth` replaced: modules, each counted once, and how often a forward pass calls them."""

    module: nn.Module
    beta: float
    modules: int = 0
    calls: int = 0
    originals: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)  # by every dotted name

    def undo(self) -> None:
        """Put the original activations back."""
        for name, original in self.originals.items():
            _put(self.module, name, original)

    def __str__(self) -> str:
        return f"{self.modules} ReLU modules, called {self.calls} times a pass, are Softplus of {self.beta:g}"


def smooth(module: nn.Module, beta: float, example: Tensor) -> Smoothed:
    """Replace every ReLU and ReLU6 within `module` by a Softplus of `beta`, for good or until `undo`.

    example: what `module` takes, one image (1, C, H, W) say, for a trial pass in which calls are counted and
    ReLUs that are functions, out of reach, are found. beta inf: nothing is done. Raises UserError, leaving
    `module` as it was, where there is no ReLU to replace or not all can be.
    """
    if not beta > 0:
        raise UserError(f"softplus beta {beta} is out of range: it must be above 0 (inf: ReLU stays)")
    if math.isinf(beta):
        return Smoothed(module, beta)
    if isinstance(module, RELUS):
        raise UserError("the classifier is itself a ReLU: put it into a module, nn.Sequential say")
    originals = {name: part for name, part in _named(module) if isinstance(part, RELUS)}
    smoothed = Smoothed(module, beta, len(set(originals.values())), originals=originals)
    new = {old: _smooth_form(old, beta) for old in originals.values()}
    try:
        for name, old in originals.items():
            _put(module, name, new[old])
        calls, functions = _trial(module, new.values(), example)
        if functions:
            raise UserError(_unreachable(module, functions))
        if not originals:
            raise UserError(_nothing(module))
    except BaseException:
        smoothed.undo()
        raise
    return Smoothed(module, beta, smoothed.modules, calls, originals)


@contextmanager
def smoothed(module: nn.Module, beta: float, example: Tensor) -> Iterator[Smoothed]:
    """`smooth` for as long as the context lasts."""
    report = smooth(module, beta, example)
    try:
        yield report
    finally:
        report.undo()


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every place of every submodule: one that is shared has several."""
    return module.named_modules(remove_duplicate=False)


def _smooth_form(old: nn.Module, beta: float) -> nn.Module:
    new = SoftReLU6(beta) if isinstance(old, nn.ReLU6) else Softplus(beta)
    return new.train(old.training)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.get_submodule(parent)._modules[child] = part


def _trial(module: nn.Module, new: Iterable[nn.Module], example: Tensor) -> tuple[int, Counter[str]]:
    """One forward pass: calls of the modules `new`, and the functions of the ReLU family called."""
    calls: list[nn.Module] = []
    hooks = [part.register_forward_hook(lambda part, *_: calls.append(part)) for part in new]
    spy = _Spy()
    try:
        with torch.no_grad(), spy:
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return len(calls), spy.found


class _Spy(TorchFunctionMode):
    """Counts the calls of functions that are a ReLU, under whatever name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_")
        if name in ("relu", "relu6") or (name in ("clamp", "clamp_min", "clip") and _from_zero(args, kwargs)):
            self.found[name] += 1
        return func(*args, **kwargs)


def _from_zero(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a clamp has 0 as its lower and nothing, or 6, as its upper limit."""
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    return isinstance(low, int | float) and low == 0 and (high is None or high == 6)


def _unreachable(module: nn.Module, functions: Counter[str]) -> str:
    listed = ", ".join(f"{count} of {name}" for name, count in sorted(functions.items()))
    return (
        f"{type(module).__name__} calls ReLU as a function ({listed} in a forward pass), which cannot be "
        "made smooth: use nn.ReLU modules there, or leave softplus at inf"
    )


def _nothing(module: nn.Module) -> str:
    kinds = {type(part).__name__ for part in module.modules() if _is_activation(part)}
    found = f"its activations are {', '.join(sorted(kinds))}" if kinds else "it has no activation modules"
    return f"no ReLU to make smooth in {type(module).__name__}: {found}; leave softplus at inf"


def _is_activation(part: nn.Module) -> bool:
    """By where torch keeps its own, and by the names that others give theirs."""
    home = "torch.nn.modules.activation"
    attention = isinstance(part, nn.MultiheadAttention)
    own = any(cls.__module__ == home for cls in type(part).__mro__) and not attention
    return own or "activation" in type(part).__module__ or type(part).__name__.endswith(("GELU", "SiLU"))
