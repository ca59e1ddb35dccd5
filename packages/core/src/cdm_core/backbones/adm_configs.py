"""The architecture of ADM's networks, under the official field names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
GROUPS = 32  # of every GroupNorm


@dataclass(frozen=True)
class ADMConfig:
    """What the U-Net and the encoder have in common; the defaults are those of ImageNet 64x64."""

    model_channels: int = 192  # base width
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)  # width of each resolution, in base widths
    num_res_blocks: int = 3  # a resolution, one more on the way up
    attention_resolutions: tuple[int, ...] = (
        2,
        4,
        8,
    )  # downsampling factors with attention, beside the middle
    num_heads: int = 4  # of every attention, where num_head_channels is -1
    num_head_channels: int = 64  # width of a head; -1: num_heads heads
    num_heads_upsample: int = -1  # heads on the way up; -1: num_heads
    use_scale_shift_norm: bool = True  # the embedding scales and shifts a norm; False: it is added
    resblock_updown: bool = True  # residual blocks change the resolution; False: a layer of its own does
    conv_resample: bool = True  # that layer has a convolution; False: averages and repeats alone
    use_new_attention_order: bool = True  # q, k and v apart, then heads; False: heads, then q, k and v
    dropout: float = 0.1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.model_channels < 2 or self.num_res_blocks < 1:
            raise ValueError("model_channels must be at least 2, num_res_blocks at least 1")
        if not self.channel_mult or any(width < 1 or width % GROUPS for width in self.widths):
            raise ValueError(
                f"channel_mult must make of model_channels {self.model_channels} one width a resolution, "
                f"each a multiple of {GROUPS}; it makes {self.widths}"
            )
        if any(factor < 1 for factor in self.attention_resolutions):
            raise ValueError(
                f"attention_resolutions are downsampling factors, not {self.attention_resolutions}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        self._check_heads()

    def _check_heads(self) -> None:
        for name in ("num_head_channels", "num_heads_upsample"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ValueError(f"{name} must be at least 1, or -1, not {getattr(self, name)}")
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, not {self.num_heads}")
        attended = {width for i, width in enumerate(self.widths) if 2**i in self.attention_resolutions}
        for width in attended | {self.widths[-1]}:
            for heads in (self.num_heads, self.num_heads_upsample):
                size = width // heads if self.num_head_channels == -1 else self.num_head_channels
                if heads != -1 and (
                    size < 1 or width % size or (self.num_head_channels == -1 and width % heads)
                ):
                    raise ValueError(f"an attention of width {width} does not fall into whole heads")
