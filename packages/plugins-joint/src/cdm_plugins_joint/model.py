"""Joint diffusion (Deja, Trzcinski & Tomczak 2023, arXiv 2301.13622): one U-Net for p(x) and p(y | x).

The encoder of ADM's U-Net makes of x_t the maps z = (z_1, ..., z_n, z_mid), its skips and its middle; the
decoder makes of them the noise, a head of their averages over the image the class:

    ln p(x, y) = ln p(x) + ln p(y | z(x)),    logits = head(mean z_mid, mean z_1, ..., mean z_n, t)

Parameter names are the released ones (`clasifier` is the head's, spelt so). The released head has the number
t among its features, under a BatchNorm: trained on clean images, t = 0, that column has no variance, and at
any other t it is 316 t and drowns the rest. It is kept for the checkpoints that exist; the heads offered here
are told t by the U-Net's own embedding of it, or are not told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.backbones.adm import Features, UNet, check_image_size
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser, Output
from cdm_core.errors import UserError
from cdm_core.samplers import Prediction
from cdm_plugins_joint.configs import JointConfig

Representations = Features


def make_path(config: JointConfig) -> schedules.Path:
    """The path that `config` names, on the CPU whatever the default device."""
    with torch.device("cpu"):
        if config.noise_schedule == "cosine":
            return schedules.cosine(config.diffusion_steps)
        return schedules.linear(config.diffusion_steps, *config.betas)


class JointModel(DiscreteDenoiser, UNet):
    """The U-Net as a denoiser and as a classifier, for the images and classes of `info`.

    classes: those of the head; num_classes: those that the denoiser is told, None without. Shapes below:
    x (B, C, H, W) and sigma (B,) in VE units, x = x0 + sigma n, sigma rounded to the nearest level, 0 for
    clean images; t (B,) int64 the level's number; pooled: one (B, C_i) a map, skips first, the middle last.
    """

    capabilities = frozenset({"denoise", "class_logits", "representations"})

    def __init__(self, config: JointConfig, info: DataInfo) -> None:
        check_image_size(config, info)
        if not info.num_classes:
            raise UserError(f"a joint model needs labels, and the data set {info.name!r} has none")
        channels, told = info.shape[0], info.num_classes if config.class_cond else None
        super().__init__(
            config, channels, (1 + config.learn_sigma) * channels, None if told is None else told + 1
        )
        self.set_process(
            make_path(config),
            predicts=config.predicts,
            learned_variance=config.learn_sigma,
            num_classes=told,
            null_label=told,
        )
        self.classes, self.multi_label = info.num_classes, config.multi_label
        self.level_names = (*(f"input_blocks.{i}" for i in range(len(self.widths))), "middle")
        self.order = _order(self.level_names, config.taps)
        widths = [*self.widths, self.widths[-1]]
        width = sum(widths[i] for i in self.order)
        self.official = config.head == "official"
        if self.official:
            self.clasifier = OfficialHead(width, self.classes, config.head_dropout)
        else:
            told_t = 4 * config.model_channels if config.head == "embedded" else 0
            hidden = config.head_width or max(1, width // 2)
            self.class_head = Head(width, hidden, self.classes, told_t, config.head_dropout)

    # -- the head --------------------------------------------------------------------------------------------

    @property
    def classifier_head(self) -> OfficialHead | Head:
        """The head's own layers."""
        return self.clasifier if self.official else self.class_head

    @property
    def passes(self) -> Tensor:
        """() int64: how often the head was run in training."""
        return self.classifier_head.passes

    def pooled(self, z: Representations) -> tuple[Tensor, ...]:
        """The average of every map over the image, float32 or better."""
        maps = (*z.skips, z.middle)
        return tuple(h.mean((2, 3), dtype=torch.promote_types(h.dtype, torch.float32)) for h in maps)

    def logits(self, pooled: Sequence[Tensor], t: Tensor) -> Tensor:
        """(B, classes) float32 or better, under any autocast."""
        h = torch.cat([pooled[i] for i in self.order], dim=1)
        with torch.autocast(h.device.type, enabled=False):
            if self.official:
                return self.clasifier(h, t)
            told = self.class_head.time is not None
            return self.class_head(h, F.silu(self.time_embedding(t)) if told else None)

    def head(self, z: Representations, sigma: Tensor) -> Tensor:
        """`logits` of representations, told that they are of level sigma."""
        return self.logits(self.pooled(z), self.nearest(sigma))

    # -- representations -------------------------------------------------------------------------------------

    def seen(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: x_t and t. Clean images are given as they are, with t = 0."""
        t = self.nearest(sigma)
        noisy = (sigma > 0).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(noisy, self.path.to_path(x, t), x), t

    def representations(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Representations:
        """The encoder's maps; differentiable in x. y (B,): what the denoiser is told, None: no class."""
        x_t, t = self.seen(x, sigma)
        return self.encode(x_t, self.embed(t, self.spelt_out(y, x)))

    def decode_representations(
        self, z: Representations, x: Tensor, sigma: Tensor, y: Tensor | None = None
    ) -> Prediction:
        """E[x0 | x] as the decoder has it of z, and the learned variance where there is one.

        x is what eps is inverted with: with its own representations this is what `predict` returns.
        """
        x_t, t = self.seen(x, sigma)
        value, variance = self.decoded(z, self.embed(t, self.spelt_out(y, x)))
        return Prediction(self.to_x0(value, x_t, t), variance)

    def decoded(self, z: Representations, emb: Tensor) -> Output:
        """The decoder's output of z, taken apart; emb as `embed` makes it."""
        out = self.decode(z, emb)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if not self.learned_variance:
            return Output(out, None)
        value, share = out.chunk(2, dim=1)
        return Output(value, (share + 1) / 2)

    # -- capabilities ----------------------------------------------------------------------------------------

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Unnormalised log p(y | x), (B, classes); of attributes, of each by itself. Differentiable in x."""
        return self.head(self.representations(x, sigma), sigma)

    def features(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """What the head sees of x, but for t: (B, D). sigma None: of clean images."""
        pooled = self.pooled(self.representations(x, x.new_zeros(len(x)) if sigma is None else sigma))
        return torch.cat([pooled[i] for i in self.order], dim=1)


def _order(names: Sequence[str], taps: Sequence[str]) -> tuple[int, ...]:
    """The places, among skips and then the middle, of the maps that the head sees: the middle's first."""
    unknown = [tap for tap in taps if tap not in names]
    if unknown:
        raise UserError(f"model.taps: the U-Net has no map {unknown[0]!r}; it has {', '.join(names)}")
    middle = len(names) - 1
    return tuple(i for i in (middle, *range(middle)) if not taps or names[i] in taps)


class OfficialHead(nn.Module):
    """The released head: BatchNorm over the features and t, two linear layers, dropout before each norm."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.bn_1, self.fc_1 = nn.BatchNorm1d(width + 1), nn.Linear(width + 1, width // 2)
        self.bn_2, self.fc_2 = nn.BatchNorm1d(width // 2), nn.Linear(width // 2, classes)

    @property
    def passes(self) -> Tensor:
        """() int64: training passes, which BatchNorm counts."""
        assert self.bn_1.num_batches_tracked is not None
        return self.bn_1.num_batches_tracked

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """h (B, width), t (B,) -> (B, classes)."""
        h = torch.cat([h, t.to(h.dtype)[:, None]], dim=1)
        h = F.leaky_relu(self.fc_1(self.bn_1(self.dropout(h))))
        return self.fc_2(self.bn_2(self.dropout(h)))


class Head(nn.Module):
    """LayerNorm, two linear layers; no image sees another. The embedding of t is added in between.

    time: the width of that embedding, 0: the head is not told t.
    """

    passes: Tensor

    def __init__(self, width: int, hidden: int, classes: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.time = nn.Linear(time, hidden) if time else None
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(hidden, classes)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Tensor, emb: Tensor | None) -> Tensor:
        """h (B, width), emb (B, time) or None -> (B, classes)."""
        if self.training:
            self.passes.add_(1)
        h = self.first(self.norm(h))
        if self.time is not None:
            h = h + self.time(emb)
        return self.last(self.dropout(F.silu(h)))
