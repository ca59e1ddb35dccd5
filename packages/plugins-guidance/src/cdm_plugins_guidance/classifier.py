"""An ordinary classifier, trained on clean images: the kind that off-the-shelf guidance takes as it is.

A residual network (He et al. 2016) with the stem and the strides of small images. Its norm is GroupNorm, so
that an image's logits, and a run's numbers, do not depend on what else is in a batch or on how many processes
share it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_guidance.classifier_configs import ClassificationConfig, ResNetConfig
from cdm_plugins_guidance.guide_configs import Contract


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        nn.init.zeros_(self.norm2.weight)  # a block starts as its shortcut
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class Classifier(nn.Module):
    """Images x (B, C, H, W) float32 in model units, [-1, 1] -> class logits (B, K) float32."""

    def __init__(self, config: ResNetConfig, info: DataInfo) -> None:
        super().__init__()
        if not info.num_classes:
            raise UserError(f"a classifier needs labels, and the data set {info.name!r} has none")
        halvings = len(config.widths) - 1
        if min(info.shape[1:]) < 2**halvings:
            raise UserError(
                f"model.widths of {len(config.widths)} stages halve the images {halvings} times, too often "
                f"for the {info.shape[1]}x{info.shape[2]} of {info.name!r}"
            )
        self.classes = info.num_classes
        square = info.shape[1] if info.shape[1] == info.shape[2] else 0
        self.contract = Contract(size=square, channels=info.shape[0])
        channels, groups = config.widths[0], config.norm_groups
        self.stem = nn.Conv2d(info.shape[0], channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)
        self.relu = nn.ReLU()
        blocks = []
        for stage, width in enumerate(config.widths):
            for number in range(config.blocks):
                blocks.append(Block(channels, width, 2 if stage and not number else 1, groups))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(channels, info.num_classes)

    @property
    def classifier(self) -> nn.Module:
        """The network behind `class_logits`, which a guide may make smooth."""
        return self

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: the last stage averaged over the image, (B, widths[-1])."""
        h = self.relu(self.norm(self.stem(x.contiguous(memory_format=torch.channels_last))))
        return self.blocks(h).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, K). It was trained on clean images and takes x for one, whatever sigma (B,)."""
        return self(x)


class Classification:
    """`objective(model, x0, y, draws) -> {"loss", "ce", "accuracy"}`: cross-entropy in nats.

    Split into `prepare`, which moves and mirrors the images in training, and noises them where that is
    wanted, and `loss`, which can be compiled.
    """

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units; y (B,) int64."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(
        self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The images as they are shown (B, C, H, W), their noise std (B,), and their classes (B,)."""
        if y is None:
            raise UserError("a classifier is trained on labelled data, and these have no labels")
        if model.training:
            x0 = moved(x0, self.config.shift, self.config.flip, draws)
        if not self.config.noisy:
            return x0, x0.new_zeros(len(x0)), y
        if not hasattr(model, "sigmas"):
            raise UserError("objective.noisy needs a classifier with noise levels, such as noisy-classifier")
        sigmas = model.sigmas.to(x0.device, x0.dtype)
        sigma = sigmas[draws.integers(len(sigmas))]
        return x0 + sigma[:, None, None, None] * draws.normal(*x0.shape[1:]).to(x0.dtype), sigma, y

    def loss(self, model: Any, x: Tensor, sigma: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The losses of what `prepare` returned; tensor operations only."""
        logits = model.class_logits(x, sigma)
        ce = F.cross_entropy(logits, y, label_smoothing=self.config.smoothing)
        hits = logits.argmax(1) == y
        return {"loss": ce, "ce": ce.detach(), "accuracy": hits.float().mean()}


def moved(x: Tensor, shift: int, flip: bool, draws: Draws) -> Tensor:
    """Each image moved by its own whole number of pixels, up to `shift` either way, and mirrored or not.

    x (B, C, H, W); what comes in from outside repeats the edge.
    """
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    places = []
    for size in x.shape[2:]:
        offset = draws.integers(2 * shift + 1) - shift
        places.append((torch.arange(size, device=x.device) + offset[:, None]).clamp(0, size - 1))
    rows, columns = places
    if flip:
        mirrored = draws.uniform() < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
