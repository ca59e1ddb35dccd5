"""Diffusion transformers, DiT (Peebles & Xie 2023, "Scalable diffusion models with transformers").

Patches of x_t, of pixels or of an autoencoder's latents, are tokens with fixed sine-cosine positions. Time
and class make one vector c, and c alone modulates every block (adaLN-Zero, section 3.2): with LN a LayerNorm
without weights and (shift, scale, gate) linear in silu(c),

    x <- x + gate_1 * attention(LN(x) * (1 + scale_1) + shift_1)
    x <- x + gate_2 * perceptron(LN(x) * (1 + scale_2) + shift_2)

The gates start at zero, every block at the identity. Parameter names are the official ones, hence those of
the released weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.autoencoder import Latents
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser
from cdm_core.errors import UserError
from cdm_kernels import adm_embedding
from cdm_plugins_guidance.dit_configs import DiTConfig

TIME_FREQUENCIES = 256  # width of the sinusoidal embedding of the time, whatever the size
EPS = 1e-6  # of every LayerNorm


def position_table(height: int, width: int, dim: int) -> Tensor:
    """Sines and cosines of the positions on a grid, (height * width, dim) float32, row by row; 4 divides dim.

    A quarter each: sines, then cosines, of the column times 10000^(-i / (dim/4)), then the same of the row.
    """
    rate = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = (torch.arange(n, dtype=torch.float64)[:, None] * rate for n in (height, width))
    column = torch.cat([column.sin(), column.cos()], 1).expand(height, -1, -1)
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], 2).flatten(0, 1).float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class PatchEmbedding(nn.Module):
    """A patch as a token: a convolution whose stride is its size."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, D), row by row."""
        return self.proj(x).flatten(2).mT


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the time, and two layers on them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), steps -> (B, D)."""
        first = cast(nn.Linear, self.mlp[0])
        return self.mlp(adm_embedding(t, TIME_FREQUENCIES).to(first.weight.dtype))


class ClassEmbedding(nn.Module):
    """One vector a class; the last one stands for "no class" where there is one."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) int64 -> (B, D)."""
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention over the tokens, queries, keys and values from one layer (packed in this order)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two layers with GELU between, its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """Attention and perceptron, both modulated and gated."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Perceptron(width, hidden)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = torch.addcmul(x, gate, self.attn(modulated(x, shift, scale)))
        return torch.addcmul(x, gate2, self.mlp(modulated(x, shift2, scale2)))


class FinalLayer(nn.Module):
    """A token as the patch that it predicts."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, outputs)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(modulated(x, shift, scale))


class DiT(Latents, DiscreteDenoiser):
    """The network; `DiscreteDenoiser` makes it a denoiser, `Latents` decodes where it denoises latents.

    cfg_channels: how many channels classifier-free guidance moves, the first ones; None: all.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, info: DataInfo) -> None:
        super().__init__()
        channels, height, width = info.shape
        if config.autoencoder and info.levels is not None:
            raise UserError(
                f"model.autoencoder: this network denoises latents, and {info.name!r} are images; training "
                "on latents is not offered"
            )
        _check_size(config, info)
        self.patch = config.patch_size
        self.grid = (height // self.patch, width // self.patch)
        self.out_channels = channels * (2 if config.learn_sigma else 1)
        depth, dim, heads = config.shape
        self.x_embedder = PatchEmbedding(channels, self.patch, dim)
        self.t_embedder = TimeEmbedding(dim)
        classes = info.num_classes or None
        self.y_embedder = ClassEmbedding(classes + config.null_class, dim) if classes else None
        self.register_buffer("pos_embed", position_table(*self.grid, dim)[None])
        self.blocks = nn.ModuleList(Block(dim, heads, round(dim * config.mlp_ratio)) for _ in range(depth))
        self.final_layer = FinalLayer(dim, self.patch**2 * self.out_channels)
        self._initialise()
        self.cfg_channels = config.cfg_channels
        with torch.device("cpu"):
            path = schedules.linear(config.noise_steps, config.beta_start, config.beta_end)
        null = classes if config.null_class else None
        self.set_process(path, learned_variance=config.learn_sigma, num_classes=classes, null_label=null)
        self.set_autoencoder(config.autoencoder, config.latent_scale, config.checkpoint_decoder)

    def _initialise(self) -> None:
        """Xavier for all layers, narrow normals for what embeds time and class, zero where branches end."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(cast(Tensor, module.bias))
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        time = self.t_embedder.mlp
        ends = [cast(Block, part).adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in cast(list[nn.Linear], [time[0], time[2]]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in cast(list[nn.Linear], [self.final_layer.linear, *ends]):
            nn.init.zeros_(layer.weight)

    @property
    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What the net predicts, the noise and, where learned, its variance: (B, out_channels, H, W).

        x_t (B, C, H, W) in the path's own scale; t (B,) steps 0 .. T - 1; y (B,) int64 classes, None of a net
        without classes, and of one with a class for none.
        """
        c, y = self.t_embedder(t), self.spelt_out(y, x_t)
        if self.y_embedder is not None and y is not None:
            c = c + self.y_embedder(y)
        x = self.x_embedder(x_t) + self.pos_embed
        for block in self._blocks:
            x = block(x, c)
        return self._unpatched(self.final_layer(x, c))

    def _unpatched(self, tokens: Tensor) -> Tensor:
        """(B, N, patch * patch * C), pixels row by row, channels last -> (B, C, H, W)."""
        (rows, columns), p = self.grid, self.patch
        pixels = tokens.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * p, columns * p)


def _check_size(config: DiTConfig, info: DataInfo) -> None:
    if info.shape[1] % config.patch_size or info.shape[2] % config.patch_size:
        raise UserError(
            f"model.patch_size {config.patch_size} does not divide the {info.shape[1]}x{info.shape[2]} of "
            f"{info.name!r}"
        )
