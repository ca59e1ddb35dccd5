"""The conditional U-Net of the MNIST diffusion classifier, under its published names.

The network (TeaPearce, Conditional_Diffusion_MNIST; the classifier, Svithjod, Diffusion_Classifier) predicts
eps from u_t = sqrt(abar_t) u + sqrt(1 - abar_t) eps, u in [0, 1], and t / n_T, t = 1 .. n_T. Our images are
x0 = 2 u - 1, so that with x = x0 + sigma n, n = eps,

    u_t = alpha_t (x + 1),    alpha_t = sqrt(abar_t) / 2,    sigma = sqrt(1 - abar_t) / alpha_t,

twice the ratio of noise to signal that the network was made for. Here t counts from 0.

Class and time enter at two places of the way up, as a factor and an offset of each channel; the way down, the
bottleneck and the first layer of the way up see neither. The three layers that take a concatenation of both
sides are linear, so that each is one part of the shared half and one of the class's half.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser
from cdm_core.errors import UserError
from cdm_plugins_zeroshot.context_unet_configs import GROUPS, ContextUnetConfig
from cdm_plugins_zeroshot.factored import Features, measured_share

RESIDUAL = 1.414  # what the published network divides a sum of two by: not quite the root of 2


def make_path(config: ContextUnetConfig) -> schedules.Path:
    """Levels 1 .. n_T, x_t = sqrt(abar_t) / 2 x0 + sqrt(1 - abar_t) eps; beta_0 is in every abar_t."""
    with torch.device("cpu"):
        path = schedules.linear(config.n_T + 1, config.beta_start, config.beta_end)
        return schedules.Path(path.alpha[2:-1] / 2, path.sigma[2:-1])


class ConvBlock(nn.Module):
    """Twice 3x3 convolution, batch normalisation, GELU; residual: (first + second) / 1.414 comes out."""

    def __init__(self, inputs: int, outputs: int, residual: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = _normalised(inputs, outputs), _normalised(outputs, outputs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        first = self.conv1(x)
        second = self.conv2(first)
        return (first + second) / RESIDUAL if self.residual else second

    def fold(self) -> None:
        """Make the running statistics part of the weights; in evaluation mode only, and for good."""
        for layers in (self.conv1, self.conv2):
            layers[0] = fuse_conv_bn_eval(cast(nn.Conv2d, layers[0]), cast(nn.BatchNorm2d, layers[1]))
            layers[1] = nn.Identity()


def _normalised(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.GELU())


class Stage(nn.Module):
    """Layers in a row under the name `model`, as the published weights have them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """All of them."""
        return self.model(x)


class Embedding(Stage):
    """Linear, GELU, Linear of one of N fixed inputs (N, d), named by its row."""

    def __init__(self, inputs: Tensor, width: int) -> None:
        super().__init__(nn.Linear(inputs.shape[1], width), nn.GELU(), nn.Linear(width, width))
        self.inputs: Tensor
        self.register_buffer("inputs", inputs, persistent=False)

    def forward(self, row: Tensor) -> Tensor:
        """row (B,) int64 -> (B, width, 1, 1)."""
        return super().forward(F.embedding(row, self.inputs))[..., None, None]

    def tabled(self) -> Table:
        """The same of every row, computed once."""
        return Table(self.forward(torch.arange(len(self.inputs), device=self.inputs.device)))


class Table(nn.Module):
    """An embedding with its answers written down, (N, width, 1, 1)."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers: Tensor
        self.register_buffer("answers", answers)

    def forward(self, row: Tensor) -> Tensor:
        """row (B,) int64 -> (B, width, 1, 1)."""
        return F.embedding(row, self.answers.flatten(1))[..., None, None]


def _up(inputs: int, outputs: int) -> Stage:
    upsample = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    return Stage(upsample, ConvBlock(outputs, outputs), ConvBlock(outputs, outputs))


def part(layer: nn.Module, x: Tensor, start: int) -> Tensor:
    """What the channels of a layer's input from number `start` on, x, add to its output.

    layer: a convolution, or a transposed one without padding. The bias comes with the last channels.
    """
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    stop = start + x.shape[1]
    bias = layer.bias if stop == layer.in_channels else None
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, layer.weight[start:stop], bias, layer.stride)
    return F.conv2d(x, layer.weight[:, start:stop], bias, padding=cast(tuple[int, int], layer.padding))


class ContextUnet(DiscreteDenoiser):
    """The network as a denoiser, for the images and classes of `info`; "no class" is a one-hot of zeros.

    Images of any channels whose height and width are multiples of 4 (published: 28x28 grey ones). `factored`
    gives it for inference.
    """

    def __init__(self, config: ContextUnetConfig, info: DataInfo) -> None:
        _check(info)
        super().__init__()
        n, classes, (channels, height, width) = config.n_feat, cast(int, info.num_classes), info.shape
        codes = torch.cat([config.sign * torch.eye(classes), torch.zeros(1, classes)])
        times = (torch.arange(1, config.n_T + 1) / config.n_T)[:, None]
        quarter = height // 4, width // 4
        self.shape = info.shape
        self.sigma_clean = 2 * math.sqrt(config.beta_start / (1 - config.beta_start))  # level 0, VE units
        self.init_conv = ConvBlock(channels, n, residual=True)
        self.down1 = Stage(ConvBlock(n, n), nn.MaxPool2d(2))
        self.down2 = Stage(ConvBlock(n, 2 * n), nn.MaxPool2d(2))
        self.to_vec = nn.Sequential(nn.AvgPool2d(quarter), nn.GELU())
        self.timeembed1, self.timeembed2 = Embedding(times, 2 * n), Embedding(times, n)
        self.contextembed1, self.contextembed2 = Embedding(codes, 2 * n), Embedding(codes, n)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * n, 2 * n, quarter, stride=quarter), nn.GroupNorm(GROUPS, 2 * n), nn.ReLU()
        )
        self.up1, self.up2 = _up(4 * n, n), _up(2 * n, n)
        self.out = nn.Sequential(
            nn.Conv2d(2 * n, n, 3, padding=1),
            nn.GroupNorm(GROUPS, n),
            nn.ReLU(),
            nn.Conv2d(n, channels, 3, padding=1),
        )
        self.to(memory_format=torch.channels_last)  # the weights too: they are reordered at every call
        self.set_process(make_path(config), num_classes=classes, null_label=classes)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """eps (B, C, H, W) float32 or better; x_t (B, C, H, W) on `path`, t (B,) 0 .. n_T - 1, y (B,)."""
        return self._upwards(self._downwards(x_t, t), t, self.spelt_out(y, x_t))

    # -- the two halves --------------------------------------------------------------------------------------

    def _downwards(self, x_t: Tensor, t: Tensor) -> Sequence[Tensor]:
        """The bottleneck, 2 n_feat channels, and the skips' part of up1, up2 and out, n_feat each."""
        u_t = x_t + self._coefficients(t, x_t)[0]
        # A map of one channel is in both layouts at once: the convolution may leave it in the other one.
        first = self.init_conv(u_t).contiguous(memory_format=torch.channels_last)
        half = self.down1(first)
        quarter = self.down2(half)
        middle = self.up0(self.to_vec(quarter)).contiguous(memory_format=torch.channels_last)
        skips = ((self.up1.model[0], quarter), (self.up2.model[0], half), (self.out[0], first))
        return middle, *(part(layer, skip, skip.shape[1]) for layer, skip in skips)

    def _upwards(self, maps: Sequence[Tensor], t: Tensor, y: Tensor | None) -> Tensor:
        """eps from what `_downwards` made, the classes y (B,) and t (B,)."""
        middle, *skips = maps
        h = self.contextembed1(y) * middle + self.timeembed1(t)
        h = self.up1.model[1:](part(self.up1.model[0], h, 0) + skips[0])
        h = self.contextembed2(y) * h + self.timeembed2(t)
        h = self.up2.model[1:](part(self.up2.model[0], h, 0) + skips[1])
        h = self.out[1:-1](part(self.out[0], h, 0) + skips[2])
        # Classes differ by a thousandth of the error: half precision's rounding of eps would show.
        last = cast(nn.Conv2d, self.out[-1])
        with torch.autocast(h.device.type, enabled=False):
            return last(h.to(last.weight.dtype))

    # -- Factored --------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, sigma: Tensor) -> Features:
        """What no class changes; x (P, C, H, W) and sigma (P,) in VE units. The first tensor is x_t."""
        t = self.nearest(sigma)
        x_t = self.path.to_path(x, t)
        return Features((x_t, *self._downwards(x_t, t)))

    def decode(self, features: Features, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (R, C, H, W); sigma (R,) as encoded, y (R,) int64, None: no class."""
        t, x_t = self.nearest(sigma), features[0]
        return self.to_x0(self._upwards(features[1:], t, self.spelt_out(y, x_t)), x_t, t)

    @cached_property
    def shared_share(self) -> float:
        """Share of one pass that `encode` does: 0.48 of the published net's. Counted once, by running it."""
        like = next(self.parameters())
        x, y = like.new_zeros(1, *self.shape), torch.zeros(1, dtype=torch.int64, device=like.device)
        return measured_share(self, x, self.sigmas[:1].to(like), y)

    @torch.no_grad()
    def factored(self) -> ContextUnet:
        """A copy in evaluation mode, with batch normalisation in the weights and embeddings as tables.

        It keeps the weights of now, has no gradients, and its state dict is not the model's.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for block in [module for module in model.modules() if isinstance(module, ConvBlock)]:
            block.fold()
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            for name in ("timeembed1", "timeembed2", "contextembed1", "contextembed2"):
                setattr(model, name, getattr(model, name).tabled())
        model.__dict__.pop("shared_share", None)  # embeddings are in it no more
        return model.requires_grad_(False)


def _check(info: DataInfo) -> None:
    if not info.num_classes:
        raise UserError(f"a context U-Net needs classes, and the data set {info.name!r} has no labels")
    if info.shape[1] % 4 or info.shape[2] % 4:
        raise UserError(
            f"a context U-Net halves its images twice: height and width must be multiples of 4, "
            f"not {info.shape[1]}x{info.shape[2]}"
        )
