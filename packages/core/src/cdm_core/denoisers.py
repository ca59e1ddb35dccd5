"""Networks trained on discrete noise levels as denoisers: the edge from `forward(x_t, t, y)` to `denoise`.

A network of DDPM's family is given x_t = alpha_t x0 + sigma_t eps and the number t of its level, 0 to T - 1
from clean to noisy, and predicts eps (Ho et al. 2020), x0, or v = alpha_t eps - sigma_t x0 (Salimans & Ho
2022). One that has learned the variance of its ancestral step (Nichol & Dhariwal 2021, eq. 15) gives as many
channels again, o: (o + 1) / 2 is the share of log beta_t in the log variance, the rest is log beta~_t's.
"""

from __future__ import annotations

from itertools import accumulate, repeat
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cdm_core.errors import UserError
from cdm_core.samplers import Prediction
from cdm_core.schedules import Path

Predicts = Literal["eps", "x0", "v"]


class Output(NamedTuple):
    """What a network says of x_t: `value` (B, C, H, W), eps, x0 or v as it was trained, float32 or better.

    variance (B, C, H, W) or None: the learned share of log beta_t, as in `cdm_core.samplers.Prediction`.
    """

    value: Tensor
    variance: Tensor | None


class DiscreteLevels(nn.Module):
    """The levels of a network that is given x_t = alpha_t x0 + sigma_t eps and t; no weights of its own.

    Every t below is (B,) int64 in 0 .. T - 1, clean to noisy.
    """

    path: Path
    timesteps: Tensor

    def set_levels(self, path: Path, timesteps: tuple[int, ...] | None = None) -> None:
        """t counts those levels of `path` that have signal and noise.

        timesteps: the t at which the network is asked, ascending, None: all (`respaced`).
        """
        self.path = Path(path.alpha[path.levels], path.sigma[path.levels])
        kept = torch.tensor(range(len(self.path)) if timesteps is None else timesteps, device="cpu")
        if not len(kept) or kept[0] < 0 or kept[-1] >= len(self.path) or not bool((kept.diff() > 0).all()):
            raise UserError(f"timesteps must ascend within 0 .. {len(self.path) - 1}, not be {timesteps}")
        self._kept = Path(self.path.alpha[kept], self.path.sigma[kept])
        self.register_buffer("timesteps", kept, persistent=False)

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, ascending: the noise levels of `timesteps`, VE units."""
        return self._kept.ve_sigmas

    def scale(self, sigma: Tensor) -> Tensor:
        """alpha of the level nearest to sigma: x_t = alpha x; (B,) VE units -> (B,)."""
        return self._kept.scale(sigma)

    def nearest(self, sigma: Tensor) -> Tensor:
        """t (B,) int64 of the level of `timesteps` nearest to sigma (B,), VE units; 0 where that is clean."""
        return self.timesteps[self._kept.nearest(sigma)]


class DiscreteDenoiser(DiscreteLevels):
    """Makes a network a denoiser: `class Model(DiscreteDenoiser, Network)`.

    It has no weights, so that the network's state dict stays its own. The network's `forward(x_t, t, y=None)`
    takes x_t (B, C, H, W), t (B,) int64 and y (B,) int64, None where it knows no classes; `__init__` of the
    model calls `set_process` once the network is there.
    """

    predicts: Predicts
    learned_variance: bool
    num_classes: int | None
    null_label: int | None

    def set_process(
        self,
        path: Path,
        *,
        predicts: Predicts = "eps",
        learned_variance: bool = False,
        num_classes: int | None = None,
        null_label: int | None = None,
        timesteps: tuple[int, ...] | None = None,
    ) -> None:
        """What the network was trained on.

        path, timesteps: as in `set_levels`; it is trained on all t. num_classes: None for a network without
        classes. null_label: the label that means "no class", None where there is none.
        """
        if predicts not in get_args(Predicts):
            raise UserError(f"a network predicts {', '.join(get_args(Predicts))}, not {predicts!r}")
        self.set_levels(path, timesteps)
        self.predicts, self.learned_variance = predicts, learned_variance
        self.num_classes, self.null_label = num_classes, null_label

    # -- what the network says -------------------------------------------------------------------------------

    def spelt_out(self, y: Tensor | None, x: Tensor) -> Tensor | None:
        """y (B,) with "no class" spelt out; UserError on labels that the network does not know, or misses."""
        if self.num_classes is None:
            if y is not None:
                raise UserError("this model is not class-conditional: it takes no labels")
            return None
        if y is not None:
            return y
        if self.null_label is None:
            raise UserError(
                'this class-conditional model was trained without "no class": give it labels '
                f"(0 to {self.num_classes - 1})"
            )
        return torch.full((len(x),), self.null_label, device=x.device)

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Output:
        """The network's output for x_t (B, C, H, W) in the path's own scale, taken apart."""
        out = self(x_t, t, self.spelt_out(y, x_t))
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if not self.learned_variance:
            return Output(out, None)
        value, share = out.chunk(2, dim=1)
        return Output(value, (share + 1) / 2)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What `Output.value` estimates, for x_t = alpha_t x0 + sigma_t eps; all (B, C, H, W)."""
        if self.predicts == "eps":
            return eps
        if self.predicts == "x0":
            return x0
        alpha, sigma = self._coefficients(t, x0)
        return alpha * eps - sigma * x0

    def to_x0(self, value: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] from `Output.value`."""
        if self.predicts == "eps":
            return self.path.eps_to_x0(x_t, value, t)
        if self.predicts == "x0":
            return value
        alpha, sigma = self._coefficients(t, x_t)
        return (alpha * x_t - sigma * value) / (alpha**2 + sigma**2)

    def to_eps(self, value: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t] from `Output.value`."""
        if self.predicts == "eps":
            return value
        if self.predicts == "x0":
            return self.path.x0_to_eps(x_t, value, t)
        alpha, sigma = self._coefficients(t, x_t)
        return (sigma * x_t + alpha * value) / (alpha**2 + sigma**2)

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t, y] (B, C, H, W); x_t in the path's own scale."""
        return self.to_eps(self.output(x_t, t, y).value, x_t, t)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        path, shape = self.path.to(t.device), (-1, *(1,) * (like.ndim - 1))
        return path.alpha[t].to(like.dtype).view(shape), path.sigma[t].to(like.dtype).view(shape)

    # -- the capability --------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (B, C, H, W), sigma (B,) rounded to the nearest level; differentiable in x."""
        return self.predict(x, sigma, y).x0

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As `denoise`, with the learned variance where there is one."""
        t = self.nearest(sigma)
        x_t = self.path.to_path(x, t)
        value, variance = self.output(x_t, t, y)
        return Prediction(self.to_x0(value, x_t, t), variance)


def respaced(levels: int, spacing: str) -> tuple[int, ...]:
    """Which of the t in 0 .. levels - 1 a released model samples at, by its `timestep_respacing`; ascending.

    "": all. "ddim50": every k-th from 0, 50 of them (Song et al. 2021). "10,15,20": that many, evenly and
    with both ends, of each of three equal sections (Nichol & Dhariwal 2021); "250": of the only section.
    UserError on anything else, or where there are not as many.
    """
    if not spacing:
        return tuple(range(levels))
    counts = spacing.removeprefix("ddim").split(",")
    strided = spacing.startswith("ddim")
    if not all(count.strip().isdigit() and int(count) for count in counts) or (strided and len(counts) > 1):
        raise UserError(f"timestep_respacing {spacing!r} is not understood: write 250, 10,15,20 or ddim50")
    if strided:
        return _every(levels, spacing, int(counts[0]))
    steps: list[int] = []
    for i, count in enumerate(map(int, counts)):
        size = levels // len(counts) + (i < levels % len(counts))
        if count > size:
            raise UserError(f"timestep_respacing {spacing!r}: {count} steps of a section of {size} levels")
        first = i * (levels // len(counts)) + min(i, levels % len(counts))
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        steps += [first + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0)]
    return tuple(steps)


def _every(levels: int, spacing: str, count: int) -> tuple[int, ...]:
    for stride in range(1, levels + 1):
        if len(range(0, levels, stride)) == count:
            return tuple(range(0, levels, stride))
    raise UserError(f"timestep_respacing {spacing!r}: no whole stride takes {count} of {levels} levels")
