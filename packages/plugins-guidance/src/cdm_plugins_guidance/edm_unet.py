"""The networks of EDM: DDPM++ and NCSN++ (Song et al. 2021), and ADM (Dhariwal & Nichol 2021).

One residual U-Net conditioned on a noise level, with attention at some resolutions, in two builds that differ
in how the embedding enters, in what is beside a block, in how the resolution changes, and in the head
(Karras et al. 2022, appendix F.2). Parameter names are those of the official implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.errors import UserError
from cdm_kernels import (
    concatenate,
    ddpm_embedding,
    edm_positional_embedding,
    group_norm_silu,
    upsample_conv3x3,
)
from cdm_kernels.timestep_embedding import sinusoidal_embedding
from cdm_plugins_guidance.edm_configs import EDMConfig

Direction = Literal["up", "down"]


# -- layers --------------------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """GroupNorm over min(32, C / 4) groups, an optional scale and shift per image, and SiLU."""

    def __init__(self, channels: int, eps: float, activation: bool = True) -> None:
        groups = min(32, channels // 4)
        if groups < 1 or channels % groups:
            raise UserError(
                f"model: {channels} channels do not split into {groups} groups of a norm: choose "
                "model_channels as a multiple of 32"
            )
        super().__init__(groups, channels, eps=eps)
        self.activation = activation

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(B, C, H, W), scale and shift (B, C) -> silu(norm(x) (1 + scale) + shift)."""
        groups, eps = self.num_groups, self.eps
        return group_norm_silu(x, groups, self.weight, self.bias, eps, scale, shift, self.activation)


class Filter(nn.Module):
    """Halves or doubles the resolution with a separable filter of even length."""

    resample_filter: Tensor

    def __init__(self, taps: tuple[float, ...], direction: Direction) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float64) / sum(taps)
        self.register_buffer("resample_filter", torch.outer(line, line)[None, None].float())
        self.direction = direction
        self.padding = (len(taps) - 1) // 2
        self.box = len(taps) == 2 and taps[0] == taps[1]  # average down, repetition up

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2) or (B, C, 2H, 2W)."""
        if self.box and self.direction == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.box else self.spread(x, self.padding)

    def spread(self, x: Tensor, padding: int) -> Tensor:
        """The filter as a convolution of stride 2, or the adjoint of one, of every channel by itself."""
        channels = x.shape[1]
        weight = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, weight, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=padding, groups=channels)


class ResamplingConv(Filter):
    """A `Filter`, then a convolution of 3x3 or 1x1; `fused`: the convolution first, where that is published.

    In infinite images the two orders are the same, but where these are padded they differ.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        direction: Direction,
        taps: tuple[float, ...],
        fused: bool = False,
    ) -> None:
        super().__init__(taps, direction)
        made = nn.Conv2d(inputs, outputs, kernel)
        self.weight, self.bias = made.weight, made.bias
        self.kernel, self.fused = kernel, fused

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H/2, W/2) or (B, outputs, 2H, 2W)."""
        if self.fused:
            wide = F.conv2d(x, self.weight, padding=self.kernel // 2 + self.padding)
            return self._biased(self.spread(wide, 0))
        if self.direction == "down":
            return F.conv2d(super().forward(x), self.weight, self.bias, padding=self.kernel // 2)
        if self.kernel == 1:  # commutes with the filter, and there are fewer pixels before it
            return self._biased(super().forward(F.conv2d(x, self.weight)))
        if self.box:
            return upsample_conv3x3(x, self.weight, self.bias)
        return F.conv2d(super().forward(x), self.weight, self.bias, padding=1)

    def _biased(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return x + self.bias.to(x.dtype)[:, None, None]


@dataclass(frozen=True)
class Style:
    """In what the two networks differ."""

    embedding: int  # width of the noise embedding
    noise: int  # width of the sinusoids that it is made of
    stem: int  # width after the first convolution
    eps: float  # of the norms
    skip_scale: float  # of every sum of two branches
    adaptive: bool  # the embedding scales and shifts after the second norm; else it is added before
    project: bool  # every resampling block has a 1x1 convolution beside it, not the filter alone
    head_width: int | None  # channels of an attention head; None: one head
    attend_once: bool  # on the way up, the last block of a resolution alone has attention

    def heads(self, channels: int) -> int:
        """Attention heads at a width; 0: no attention. UserError where they do not divide it."""
        heads = 1 if self.head_width is None else channels // self.head_width
        if heads and channels % heads:
            raise UserError(
                f"model: {channels} channels do not split into {heads} heads of attention: choose "
                f"model_channels as a multiple of {self.head_width}"
            )
        return heads


class Block(nn.Module):
    """Residual block of two 3x3 convolutions that the noise embedding enters, and attention after it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: EDMConfig,
        style: Style,
        direction: Direction | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.adaptive, self.skip_scale = style.adaptive, style.skip_scale
        self.heads = style.heads(outputs) if attention else 0
        self.norm0 = Norm(inputs, style.eps)
        self.conv0 = _conv(inputs, outputs, 3, config, direction)
        self.affine = nn.Linear(style.embedding, outputs * (1 + style.adaptive))
        self.norm1 = Norm(outputs, style.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv1 = _conv(outputs, outputs, 3, config)
        self.skip: nn.Module | None = None
        if inputs != outputs or (direction and style.project):
            self.skip = _conv(inputs, outputs, 1, config, direction)
        elif direction:
            self.skip = Filter(config.resample_filter, direction)
        if self.heads:
            self.norm2 = Norm(outputs, style.eps, activation=False)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = _conv(outputs, outputs, 1, config)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, inputs, H, W), embedding (B, E) -> (B, outputs, H', W')."""
        h, entering = self.conv0(self.norm0(x)), self.affine(embedding)
        if self.adaptive:
            h = self.norm1(h, *entering.chunk(2, 1))
        else:
            h = self.norm1(h + entering[:, :, None, None])
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self.proj(self._attend(x))) * self.skip_scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over the pixels, in float32 or better under any autocast; one derivative, no second.

        The official order of the 3 C channels of `qkv` is (head, channel, query or key or value). Their
        weights are put into another one, so that not the pixels need be, which are more.
        """
        weight, bias = self.qkv.weight, self.qkv.bias
        assert bias is not None
        split = (self.heads, -1, 3)
        weight = weight.unflatten(0, split).movedim(2, 0).flatten(0, 2)
        bias = bias.unflatten(0, split).movedim(2, 0).flatten()
        packed = F.conv2d(self.norm2(x), weight, bias).permute(0, 2, 3, 1)
        with torch.autocast(x.device.type, enabled=False):
            precise = packed.to(torch.promote_types(packed.dtype, torch.float32))
            # (B, heads, pixels, channels) each
            q, k, v = precise.flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2).unflatten(1, x.shape[2:])
        return mixed.permute(0, 3, 1, 2).to(packed.dtype)


def _conv(
    inputs: int, outputs: int, kernel: int, config: EDMConfig, direction: Direction | None = None
) -> nn.Module:
    if direction:
        return ResamplingConv(inputs, outputs, kernel, direction, config.resample_filter)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


# -- networks ------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """What the two networks share: the way down, the way up, and how their blocks are joined.

    A module is named by the height of its images, as `enc.16x16_block0`. A subclass has the embedding of the
    noise level, `embed`, and makes the output of what leaves each resolution on the way up, `paint`.
    """

    def __init__(
        self, config: EDMConfig, shape: tuple[int, int, int], outputs: int, label_dim: int, style: Style
    ) -> None:
        super().__init__()
        self.config, self.style, self.label_dim = config, style, label_dim
        self.heights = [shape[1] >> level for level in range(len(config.channel_mult))]
        self.widths = [config.model_channels * factor for factor in config.channel_mult]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._make_way_up(self._make_way_down(shape[0]))
        self.map_layer0 = nn.Linear(style.noise, style.embedding)
        self.map_layer1 = nn.Linear(style.embedding, style.embedding)
        self.map_augment = (
            nn.Linear(config.augment_dim, style.noise, bias=False) if config.augment_dim else None
        )

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """(B, E) from noise labels (B,), classes (B, label_dim) or None, augmentation (B, A) or None."""
        raise NotImplementedError

    def paint(self, level: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        """The output so far, h (B, C, H, W) having been computed at `level`; image: what it was before."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """F (B, outputs, H, W) of x (B, C, H, W); the other arguments are those of `embed`."""
        embedding = self.embed(noise, labels, augment)
        h, skips = self._go_down(x, embedding)
        return self._go_up(h, skips, embedding)

    def _block(
        self, inputs: int, outputs: int, direction: Direction | None = None, attention: bool = False
    ) -> Block:
        return Block(inputs, outputs, self.config, self.style, direction, attention)

    def _name(self, level: int, name: str) -> str:
        return f"{self.heights[level]}x{self.heights[level]}_{name}"

    def _make_way_down(self, channels: int) -> list[int]:
        """The modules of the way down; the widths of what it leaves for the way up."""
        config, width = self.config, self.style.stem
        self.enc[self._name(0, "conv")] = _conv(channels, width, 3, config)
        skips = [width]
        for level, outputs in enumerate(self.widths):
            if level:
                self.enc[self._name(level, "down")] = self._block(width, width, "down")
                channels = self._make_side_way(level, channels, width)
                skips.append(width)
            attention = self.heights[level] in config.attn_resolutions
            for i in range(config.num_blocks):
                self.enc[self._name(level, f"block{i}")] = self._block(width, outputs, attention=attention)
                width = outputs
                skips.append(width)
        return skips

    def _make_side_way(self, level: int, channels: int, width: int) -> int:
        """How the image itself gets to a lower resolution; the channels that it has there."""
        taps = self.config.resample_filter
        if self.config.encoder_type == "skip":
            self.enc[self._name(level, "aux_down")] = Filter(taps, "down")
            self.enc[self._name(level, "aux_skip")] = _conv(channels, width, 1, self.config)
        elif self.config.encoder_type == "residual":
            fused = ResamplingConv(channels, width, 3, "down", taps, fused=True)
            self.enc[self._name(level, "aux_residual")] = fused
            return width
        return channels

    def _make_way_up(self, skips: list[int]) -> None:
        config, width, last = self.config, skips[-1], len(self.widths) - 1
        for level, outputs in reversed(list(enumerate(self.widths))):
            if level == last:
                self.dec[self._name(level, "in0")] = self._block(width, width, attention=True)
                self.dec[self._name(level, "in1")] = self._block(width, width)
            else:
                self.dec[self._name(level, "up")] = self._block(width, width, "up")
            for i in range(config.num_blocks + 1):
                attention = self.heights[level] in config.attn_resolutions and (
                    i == config.num_blocks or not self.style.attend_once
                )
                block = self._block(width + skips.pop(), outputs, attention=attention)
                self.dec[self._name(level, f"block{i}")] = block
                width = outputs

    def _go_down(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, image, skips = x, x, []
        for level in range(len(self.heights)):
            if level == 0:
                # Channels last: convolutions are faster so, and the norms read either layout. An image of
                # one channel would be in both layouts at once, and a convolution keeps to the other one.
                h = self.enc[self._name(level, "conv")](h).contiguous(memory_format=torch.channels_last)
            else:
                h = self.enc[self._name(level, "down")](h, embedding)
                h, image = self._join_side_way(level, h, image)
            skips.append(h)
            for i in range(self.config.num_blocks):
                h = self.enc[self._name(level, f"block{i}")](h, embedding)
                skips.append(h)
        return h, skips

    def _join_side_way(self, level: int, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.encoder_type == "skip":
            image = self.enc[self._name(level, "aux_down")](image)
            h = h + self.enc[self._name(level, "aux_skip")](image)
        elif self.config.encoder_type == "residual":
            h = image = (h + self.enc[self._name(level, "aux_residual")](image)) * self.style.skip_scale
        return h, image

    def _go_up(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        image, last = None, len(self.heights) - 1
        for level in range(last, -1, -1):
            for name in ("in0", "in1") if level == last else ("up",):
                h = self.dec[self._name(level, name)](h, embedding)
            for i in range(self.config.num_blocks + 1):
                h = self.dec[self._name(level, f"block{i}")](concatenate(h, skips.pop()), embedding)
            image = self.paint(level, h, image)
        assert image is not None
        return image


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021), the first with sinusoids of fixed frequencies."""

    def __init__(self, config: EDMConfig, shape: tuple[int, int, int], outputs: int, label_dim: int) -> None:
        width = config.model_channels
        style = Style(
            embedding=width * config.channel_mult_emb,
            noise=width * config.channel_mult_noise,
            stem=width,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            adaptive=False,
            project=True,
            head_width=None,
            attend_once=True,
        )
        super().__init__(config, shape, outputs, label_dim, style)
        self.map_noise = Frequencies(style.noise) if config.embedding_type == "fourier" else None
        self.map_label = nn.Linear(label_dim, style.noise) if label_dim else None
        for level in range(len(self.widths)):
            self._make_output(level, outputs)
        self._initialise()

    def _make_output(self, level: int, outputs: int) -> None:
        """At every resolution with the decoder `skip`, else at the highest alone."""
        skip = self.config.decoder_type == "skip"
        if skip and level < len(self.widths) - 1:
            self.dec[self._name(level, "aux_up")] = Filter(self.config.resample_filter, "up")
        if skip or level == 0:
            self.dec[self._name(level, "aux_norm")] = Norm(self.widths[level], self.style.eps)
            self.dec[self._name(level, "aux_conv")] = _conv(self.widths[level], outputs, 3, self.config)

    def _initialise(self) -> None:
        """Xavier, biases 0; next to nothing where a branch ends, a tenth in the attention's logits."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | ResamplingConv):
                gain = math.sqrt(0.2) if name.endswith("qkv") else 1.0
                gain = 1e-5 if name.endswith(("conv1", "proj", "aux_conv")) else gain
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        width = self.style.noise
        h = ddpm_embedding(noise, width) if self.map_noise is None else self.map_noise(noise)
        if self.map_label is not None and labels is not None:
            h = h + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(h))))

    def paint(self, level: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        if self._name(level, "aux_conv") not in self.dec:
            return None
        own = self.dec[self._name(level, "aux_conv")](self.dec[self._name(level, "aux_norm")](h))
        return own if image is None else own + self.dec[self._name(level, "aux_up")](image)


class Frequencies(nn.Module):
    """Random Fourier features of the noise level: sines, then cosines, of 2 pi t f."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, noise: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        return sinusoidal_embedding(noise, self.freqs, True, 2 * len(self.freqs), 2 * math.pi)


class DhariwalUNet(UNet):
    """ADM (Dhariwal & Nichol 2021), as in EDM: classes enter after the noise level's first layers."""

    def __init__(self, config: EDMConfig, shape: tuple[int, int, int], outputs: int, label_dim: int) -> None:
        width = config.model_channels
        style = Style(
            embedding=width * config.channel_mult_emb,
            noise=width,
            stem=width * config.channel_mult[0],
            eps=1e-5,
            skip_scale=1.0,
            adaptive=True,
            project=False,
            head_width=64,
            attend_once=False,
        )
        super().__init__(config, shape, outputs, label_dim, style)
        self.map_label = nn.Linear(label_dim, style.embedding, bias=False) if label_dim else None
        self.out_norm = Norm(self.widths[0], style.eps)
        self.out_conv = _conv(self.widths[0], outputs, 3, config)
        self._initialise()

    def _initialise(self) -> None:
        """PyTorch's own, 0 where a branch ends."""
        for name, module in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        h = edm_positional_embedding(noise, self.style.noise)
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        h = self.map_layer1(F.silu(self.map_layer0(h)))
        if self.map_label is not None and labels is not None:
            h = h + self.map_label(labels)
        return F.silu(h)

    def paint(self, level: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        return self.out_conv(self.out_norm(h)) if level == 0 else None
