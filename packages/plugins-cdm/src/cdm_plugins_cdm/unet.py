"""The noise-level classifier of images: DDPM's U-Net without a time embedding, pooled to one vector an image.

Architecture and parameter names are those of the official implementation (and so of its checkpoints):
residual blocks of two 3x3 convolutions under GroupNorm and SiLU, attention at some resolutions and in the
middle, and after the last block GroupNorm, SiLU, a 3x3 convolution, a global average and a linear layer. A
class, where there is one, enters every block where the time entered DDPM's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_kernels import attention, concatenate, conv2d, group_norm_silu, mean_conv3x3, upsample_conv3x3
from cdm_plugins_cdm.configs import UNetConfig
from cdm_plugins_cdm.model import NoiseLevelClassifier, count_classes, make_path


class Norm(nn.GroupNorm):
    """GroupNorm, then SiLU."""

    def __init__(self, channels: int, groups: int, activation: bool = True) -> None:
        super().__init__(groups, channels, eps=1e-6)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        groups, eps = self.num_groups, self.eps
        return group_norm_silu(x, groups, self.weight, self.bias, eps, activation=self.activation)


class Conv2d(nn.Conv2d):
    """A convolution with a cheaper second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W')."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class ResBlock(nn.Module):
    """x + conv(drop(silu(norm(conv(silu(norm(x))) + class)))), x projected where the widths differ."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig, embedding: int | None) -> None:
        super().__init__()
        self.norm1 = Norm(inputs, config.norm_groups)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, outputs) if embedding else None
        self.norm2 = Norm(outputs, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """x (B, inputs, H, W), embedding (B, E) or None -> (B, outputs, H, W)."""
        h = self.conv1(self.norm1(x))
        if self.temb_proj is not None and embedding is not None:
            h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of one head over the pixels, its three projections in one."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = Norm(channels, groups, activation=False)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        parts = (self.q, self.k, self.v)
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([cast(Tensor, p.bias) for p in parts])
        return x + self.proj_out(attention(conv2d(self.norm(x), weight, bias)))


class Resample(nn.Module):
    """Halves or doubles the resolution, with a convolution or without."""

    def __init__(self, channels: int, up: bool, with_conv: bool) -> None:
        super().__init__()
        self.up = up
        stride, padding = (1, 1) if up else (2, 0)
        self.conv = Conv2d(channels, channels, 3, stride, padding) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        if self.up and self.conv is not None:
            return upsample_conv3x3(x, self.conv.weight, self.conv.bias)
        if self.up:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        # A strided convolution padded on the right and below only: DDPM's (TensorFlow's "same").
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """The residual blocks of one resolution, all with attention or none, and the way to the next one."""

    def __init__(
        self, blocks: list[ResBlock], attention: bool, resample: tuple[str, Resample] | None
    ) -> None:
        super().__init__()
        self.depth = len(blocks)
        self.block = nn.ModuleList(blocks)
        widths = [block.conv2.out_channels for block in blocks] if attention else []
        self.attn = nn.ModuleList(Attention(width, blocks[0].norm1.num_groups) for width in widths)
        self.resample_name = resample[0] if resample else None
        if resample:
            self.add_module(*resample)  # under its official name: `downsample` or `upsample`

    def step(self, i: int, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Block i and its attention."""
        x = self.block[i](x, embedding)
        return self.attn[i](x) if len(self.attn) else x

    def resample(self, x: Tensor) -> Tensor:
        """To the next resolution; x itself on the last one."""
        return self.get_submodule(self.resample_name)(x) if self.resample_name else x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, config: UNetConfig, embedding: int | None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config, embedding)
        self.attn_1 = Attention(channels, config.norm_groups)
        self.block_2 = ResBlock(channels, channels, config, embedding)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, embedding)), embedding)


class Embedding(nn.Module):
    """Two layers on a class embedding, SiLU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, 4 * channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels) -> (B, 4 channels)."""
        return self.dense[1](F.silu(self.dense[0](x)))


class UNet(NoiseLevelClassifier):
    """The official network; with `decoder` off its first half only (the paper's future work)."""

    def __init__(self, config: UNetConfig, info: DataInfo) -> None:
        channels, num_classes = config.channels, count_classes(config, info)
        _check_size(config, info)
        features = 2 * channels * config.ch_mult[0]
        super().__init__(make_path(config), features, num_classes)
        embedding = None if num_classes is None else 4 * channels
        self.temb = None if num_classes is None else Embedding(channels)
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes + 1, channels)
        self.conv_in = Conv2d(info.shape[0], channels, 3, padding=1)
        self.down, skips = _way_down(config, info, embedding)
        width = skips[-1]
        self.mid = Middle(width, config, embedding)
        self.up = _way_up(config, info, embedding, skips) if config.decoder else None
        if config.decoder:
            width = channels * config.ch_mult[0]
        self.norm_out = Norm(width, config.norm_groups)
        self.conv_out = Conv2d(width, features, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # the weights too: they are reordered at every call

    def features(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """h (B, D) float32, D = 2 channels ch_mult[0].

        The output of conv_out averaged over the image, without the convolution.
        """
        embedding = None
        classes = self._classes(y, x_t)
        if self.temb is not None and self.label_emb is not None:
            embedding = self.temb(self.label_emb(classes))
        # Channels last: convolutions are faster so, and the norms read either layout. An x_t of one channel
        # would be in both layouts at once, and a convolution keeps to the other one.
        h = self.conv_in(x_t).contiguous(memory_format=torch.channels_last)
        h = self.norm_out(self._trunk(h, embedding))
        with torch.autocast(h.device.type, enabled=False):
            return mean_conv3x3(h, self.conv_out.weight, cast(Tensor, self.conv_out.bias))

    def _trunk(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        skips = [h]
        for stage in cast(Iterable[Stage], self.down):
            for i in range(stage.depth):
                h = stage.step(i, h, embedding)
                skips.append(h)
            if stage.resample_name:
                h = stage.resample(h)
                skips.append(h)
        h = self.mid(h, embedding)
        for stage in cast(Iterable[Stage], list(self.up or [])[::-1]):  # the compiler knows no `reversed`
            for i in range(stage.depth):
                h = stage.step(i, concatenate(h, skips.pop()), embedding)
            h = stage.resample(h)
        return h


def _check_size(config: UNetConfig, info: DataInfo) -> None:
    factor = 2 ** (len(config.ch_mult) - 1)
    if info.shape[1] % factor or info.shape[2] % factor:
        raise UserError(
            f"model.ch_mult {config.ch_mult} halves the images {len(config.ch_mult) - 1} times, but {factor} "
            f"does not divide the {info.shape[1]}x{info.shape[2]} of {info.name!r}: give it fewer entries"
        )


def _way_down(config: UNetConfig, info: DataInfo, embedding: int | None) -> tuple[nn.ModuleList, list[int]]:
    """The stages from full to lowest resolution, and the widths of what they leave for the way up."""
    stages, skips, last = nn.ModuleList(), [config.channels], len(config.ch_mult) - 1
    for i, factor in enumerate(config.ch_mult):
        width, blocks = config.channels * factor, []
        for _ in range(config.num_res_blocks):
            blocks.append(ResBlock(skips[-1], width, config, embedding))
            skips.append(width)
        attention = info.shape[1] >> i in config.attn_resolutions
        if i == last:
            stages.append(Stage(blocks, attention, None))
        else:
            halve = Resample(width, up=False, with_conv=config.resamp_with_conv)
            stages.append(Stage(blocks, attention, ("downsample", halve)))
            skips.append(width)
    return stages, skips


def _way_up(config: UNetConfig, info: DataInfo, embedding: int | None, skips: list[int]) -> nn.ModuleList:
    """The stages of the way up, full resolution first; every block takes one more skip, the last first."""
    stages: list[Stage] = []
    width, left = skips[-1], list(skips)
    for i, factor in reversed(list(enumerate(config.ch_mult))):
        blocks = []
        for _ in range(config.num_res_blocks + 1):
            blocks.append(ResBlock(width + left.pop(), config.channels * factor, config, embedding))
            width = config.channels * factor
        attention = info.shape[1] >> i in config.attn_resolutions
        resample = ("upsample", Resample(width, up=True, with_conv=config.resamp_with_conv)) if i else None
        stages.insert(0, Stage(blocks, attention, resample))
    return nn.ModuleList(stages)
