"""ADM's networks (Dhariwal & Nichol 2021, arXiv 2105.05233): the U-Net that denoises, and its first half.

Parameter names and layouts are those of the official implementation, so that its checkpoints load as they
are. Residual blocks of two 3x3 convolutions under GroupNorm and SiLU, attention at some resolutions and in
the middle; the time t, and a class y where there is one, scale and shift the second norm of every block:

    emb = silu(W2 silu(W1 sinusoids(t)) + label_emb(y)),    h = (1 + s) norm(h) + b,    (s, b) = W emb

or are added before it. Everything runs channels last, GroupNorm's statistics and attention's softmax in
float32. First derivatives only: fused attention has no second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.backbones.adm_configs import GROUPS, ADMConfig, Pool
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_kernels import adm_embedding, concatenate, group_norm_silu, upsample_conv3x3

M = TypeVar("M", bound=nn.Module)
SPATIAL_WIDTH = 2048  # hidden layer of the pools `spatial` and `spatial_v2`


class Features(NamedTuple):
    """What the first half of a U-Net makes of an image.

    skips: one map (B, C_i, H_i, W_i) a member of `input_blocks`, first to last; middle: `middle_block`'s.
    """

    skips: tuple[Tensor, ...]
    middle: Tensor


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups, then a scale and shift per image where given, then SiLU."""

    def __init__(self, channels: int, activation: bool = True) -> None:
        super().__init__(GROUPS, channels, eps=1e-5)
        self.activation = activation

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x (B, C, ...), scale and shift (B, C) -> the shape, dtype and layout of x."""
        weight, bias = self.weight, self.bias
        return group_norm_silu(x, self.num_groups, weight, bias, self.eps, scale, shift, self.activation)


def _zeroed(module: M) -> M:
    """The last layer of a residual branch starts at zero: every block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """x + conv(drop(silu(norm(conv(silu(norm(x))), emb)))), x projected where the widths differ.

    resample: the resolution is halved or doubled between the first SiLU and the first convolution, and in x.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ADMConfig,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, config.use_scale_shift_norm
        embedding = 4 * config.model_channels
        # Keys are places in the official sequences, where SiLU and dropout have one too.
        self.in_layers = nn.ModuleDict({"0": Norm(inputs), "2": nn.Conv2d(inputs, outputs, 3, padding=1)})
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(embedding, (1 + self.scale_shift) * outputs)})
        last = _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.out_layers = nn.ModuleDict({"0": Norm(outputs), "3": last})
        self.dropout = nn.Dropout(config.dropout)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, inputs, H, W), emb (B, 4 model_channels) -> (B, outputs, H', W')."""
        h, conv = self.in_layers["0"](x), cast(nn.Conv2d, self.in_layers["2"])
        if self.resample == "up":
            h, x = upsample_conv3x3(h, conv.weight, conv.bias), _doubled(x)
        elif self.resample == "down":
            h, x = conv(_halved(h)), _halved(x)
        else:
            h = conv(h)
        condition = self.emb_layers["1"](emb)
        if self.scale_shift:
            h = self.out_layers["0"](h, *condition.chunk(2, dim=1))
        else:
            h = self.out_layers["0"](h + condition[:, :, None, None])
        return self.skip_connection(x) + self.out_layers["3"](self.dropout(h))


def _attend(qkv: Tensor, heads: int, heads_first: bool, queries: int | None = None) -> Tensor:
    """Attention of every pixel, or the first `queries`, to all; qkv (B, pixels, 3 C) -> (B, queries, C).

    The 3 C channels are, outermost first, (heads, 3, C / heads), or (3, heads, C / heads).
    """
    if heads_first:
        q, k, v = qkv.unflatten(2, (heads, 3, -1)).unbind(3)
    else:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    out = F.scaled_dot_product_attention(q[:, :queries].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """x + W attend(W_qkv norm(x)) over the pixels; scores are scaled by 1 / sqrt(width of a head)."""

    def __init__(self, channels: int, config: ADMConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads if config.num_head_channels == -1 else channels // config.num_head_channels
        self.heads_first = not config.use_new_attention_order
        self.norm = Norm(channels, activation=False)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        qkv = _as_image(self.norm(x), self.qkv).flatten(2).mT  # (B, H W, 3 C): channels last, so no copy
        out = _attend(qkv, self.heads, self.heads_first)
        return x + _as_image(out.mT.unflatten(2, x.shape[2:]), self.proj_out)


def _as_image(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of width 1 on (B, C, H, W): on a CPU up to twice as fast as the product that it is."""
    return F.conv2d(x, conv.weight[..., None], conv.bias)


def _pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of width 1 on (B, places, C)."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class Downsample(nn.Module):
    """Halves the resolution: a strided 3x3 convolution, or an average."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return _halved(x) if self.op is None else self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution by repetition, then a 3x3 convolution or none."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return _doubled(x) if self.conv is None else upsample_conv3x3(x, self.conv.weight, self.conv.bias)


class Block(nn.ModuleList):
    """Layers in sequence; the residual blocks among them see the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, 4 model_channels) -> (B, C', H', W')."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Encoder(nn.Module):
    """The first half of the U-Net: `time_embed`, `input_blocks`, `middle_block`."""

    def __init__(self, config: ADMConfig, in_channels: int) -> None:
        super().__init__()
        self.config = config
        embedding = 4 * config.model_channels
        first, second = nn.Linear(config.model_channels, embedding), nn.Linear(embedding, embedding)
        self.time_embed = nn.ModuleDict({"0": first, "2": second})
        self.input_blocks, self.widths = _way_down(config, in_channels)
        width = self.widths[-1]
        attention = Attention(width, config, config.num_heads)
        self.middle_block = Block([ResBlock(width, width, config), attention, ResBlock(width, width, config)])

    def time_embedding(self, t: Tensor) -> Tensor:
        """(B, 4 model_channels), without the SiLU that `encode` and `decode` want; t (B,) 0 .. T - 1."""
        first, second = cast(Sequence[nn.Linear], [self.time_embed[key] for key in ("0", "2")])
        return second(F.silu(first(adm_embedding(t, self.config.model_channels).to(first.weight.dtype))))

    def encode(self, x_t: Tensor, emb: Tensor) -> Features:
        """The maps of every input block and of the middle; x_t (B, C, H, W), emb (B, 4 model_channels)."""
        # A map of one channel is in both layouts at once: the convolution may leave it in the other one.
        h = self.input_blocks[0](x_t, emb).contiguous(memory_format=torch.channels_last)
        skips = [h]
        for block in list(self.input_blocks)[1:]:
            h = block(h, emb)
            skips.append(h)
        return Features(tuple(skips), self.middle_block(h, emb))


class UNet(Encoder):
    """ADM's U-Net. out_channels: twice in_channels where it learns a variance; num_classes: rows of labels.

    `forward(x_t, t, y)` is `decode(encode(x_t, emb), emb)` with `emb = embed(t, y)`.
    """

    def __init__(
        self, config: ADMConfig, in_channels: int, out_channels: int, num_classes: int | None = None
    ) -> None:
        super().__init__(config, in_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * config.model_channels)
        self.labelled = num_classes is not None
        self.output_blocks = _way_up(config, self.widths)
        width = config.widths[0]
        last = _zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        self.out = nn.ModuleDict({"0": Norm(width), "2": last})
        self.to(memory_format=torch.channels_last)  # the weights too: they are reordered at every call

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, 4 model_channels) of t (B,), int or float in 0 .. T - 1, and y (B,) int64 or None."""
        emb = self.time_embedding(t)
        return F.silu(emb + self.label_emb(y) if self.labelled else emb)

    def decode(self, features: Features, emb: Tensor) -> Tensor:
        """(B, out_channels, H, W) from what `encode` made."""
        h, skips = features.middle, list(features.skips)
        for block in cast(Sequence[Block], self.output_blocks):
            h = block(concatenate(h, skips.pop()), emb)
        return self.out["2"](self.out["0"](h))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, out_channels, H, W); x_t (B, in_channels, H, W) in the path's own scale, t and y as `embed`."""
        emb = self.embed(t, y)
        return self.decode(self.encode(x_t, emb), emb)


class EncoderUNet(Encoder):
    """The first half of the U-Net with a pool: ADM's classifier of noisy images.

    pool: `adaptive` a linear layer on the mean of the last map; `attention` CLIP's, over an image of
    `image_size`; `spatial`, `spatial_v2` a perceptron on the means of every map.
    """

    def __init__(
        self,
        config: ADMConfig,
        in_channels: int,
        out_channels: int,
        image_size: int,
        pool: Pool = "attention",
    ) -> None:
        super().__init__(config, in_channels)
        self.pool = pool
        width, every = self.widths[-1], sum(self.widths) + self.widths[-1]
        if pool == "adaptive":
            layers = {"0": Norm(width), "3": _zeroed(nn.Conv2d(width, out_channels, 1))}
        elif pool == "attention":
            if config.num_head_channels == -1:
                raise UserError("the pool 'attention' needs num_head_channels")
            size = image_size >> (len(config.channel_mult) - 1)
            layers = {"0": Norm(width), "2": AttentionPool(size, width, config, out_channels)}
        elif pool == "spatial":
            layers = {"0": nn.Linear(every, SPATIAL_WIDTH), "2": nn.Linear(SPATIAL_WIDTH, out_channels)}
        else:
            layers = {"0": nn.Linear(every, SPATIAL_WIDTH), "1": Norm(SPATIAL_WIDTH)}
            layers["3"] = nn.Linear(SPATIAL_WIDTH, out_channels)
        self.out = nn.ModuleDict(layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, out_channels) float; x_t (B, in_channels, H, W) in the path's own scale, t (B,) as `UNet`."""
        features = self.encode(x_t, F.silu(self.time_embedding(t)))
        if self.pool == "adaptive":
            return self.out["3"](self.out["0"](features.middle).mean((2, 3), keepdim=True)).flatten(1)
        if self.pool == "attention":
            return self.out["2"](self.out["0"](features.middle))
        means = torch.cat([h.mean((2, 3)) for h in (*features.skips, features.middle)], dim=1)
        if self.pool == "spatial":
            return self.out["2"](F.relu(self.out["0"](means)))
        return self.out["3"](self.out["1"](self.out["0"](means)[..., None])[..., 0])


class AttentionPool(nn.Module):
    """CLIP's attention pool (Radford et al. 2021): the mean pixel attends to every pixel."""

    def __init__(self, size: int, channels: int, config: ADMConfig, outputs: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)
        self.heads = channels // config.num_head_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, size, size) -> (B, outputs)."""
        pixels = x.flatten(2).mT
        if pixels.shape[1] + 1 != self.positional_embedding.shape[1]:
            raise UserError(
                f"the classifier was built for {self.positional_embedding.shape[1] - 1} places at its lowest "
                f"resolution, and these images have {pixels.shape[1]}"
            )
        tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + self.positional_embedding.T
        out = _attend(_pointwise(tokens, self.qkv_proj), self.heads, heads_first=False, queries=1)
        return _pointwise(out, self.c_proj)[:, 0]


def _way_down(config: ADMConfig, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
    """`input_blocks`, and the width of what each of them makes."""
    width = config.widths[0]
    blocks = [Block([nn.Conv2d(in_channels, width, 3, padding=1)])]
    made = [width]
    for level, wider in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(width, wider, config)]
            width = wider
            if 2**level in config.attention_resolutions:
                layers.append(Attention(width, config, config.num_heads))
            blocks.append(Block(layers))
            made.append(width)
        if level < len(config.widths) - 1:
            if config.resblock_updown:
                blocks.append(Block([ResBlock(width, width, config, "down")]))
            else:
                blocks.append(Block([Downsample(width, config.conv_resample)]))
            made.append(width)
    return nn.ModuleList(blocks), made


def _way_up(config: ADMConfig, made: list[int]) -> nn.ModuleList:
    """`output_blocks`: every block takes one more skip, of the widths `made`, the last first."""
    blocks, width, left = [], made[-1], list(made)
    heads = config.num_heads if config.num_heads_upsample == -1 else config.num_heads_upsample
    for level, wider in reversed(list(enumerate(config.widths))):
        for i in range(config.num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(width + left.pop(), wider, config)]
            width = wider
            if 2**level in config.attention_resolutions:
                layers.append(Attention(width, config, heads))
            if level and i == config.num_res_blocks:
                up = config.resblock_updown
                layers.append(
                    ResBlock(width, width, config, "up") if up else Upsample(width, config.conv_resample)
                )
            blocks.append(Block(layers))
    return nn.ModuleList(blocks)


def check_image_size(config: ADMConfig, info: DataInfo) -> None:
    """Raise `UserError` unless the images of `info` can be halved as often as `config` says."""
    times = len(config.channel_mult) - 1
    if info.shape[1] % 2**times or info.shape[2] % 2**times:
        raise UserError(
            f"model.channel_mult {config.channel_mult} halves the images {times} times, but {2**times} does "
            f"not divide the {info.shape[1]}x{info.shape[2]} of {info.name!r}: give it fewer entries"
        )
