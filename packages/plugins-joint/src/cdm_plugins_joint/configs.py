"""Settings of the model, of the objective and of the data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cdm_core.backbones.adm_configs import ADMConfig
from cdm_core.denoising_configs import DenoisingConfig

# -- the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointConfig(ADMConfig):
    """`joint/unet`: ADM's U-Net with a classifier of its pooled features; the defaults are those of 32x32.

    head: `embedded` LayerNorm and the U-Net's own embedding of t, `blind` the same without t, `official` the
    released one, BatchNorm over the features and the number t itself, which is right for clean images only.
    """

    model_channels: int = 128  # base width
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)  # width of each resolution, in base widths
    num_res_blocks: int = 3  # a resolution, one more on the way up
    attention_resolutions: tuple[int, ...] = (2, 4)  # downsampling factors with attention, beside the middle
    num_heads: int = 4  # of every attention, where num_head_channels is -1
    num_head_channels: int = -1  # width of a head; -1: num_heads heads
    resblock_updown: bool = False  # residual blocks change the resolution; False: a layer of its own does
    use_new_attention_order: bool = False  # q, k and v apart, then heads; False: heads, then q, k and v
    dropout: float = 0.3
    head: Literal["embedded", "blind", "official"] = "embedded"
    head_width: int = 0  # of its hidden layer; 0: half as many as it sees features
    head_dropout: float = 0.7
    taps: tuple[str, ...] = ()  # maps that it sees: "middle", "input_blocks.3", ...; (): all
    multi_label: bool = False  # the classes are attributes, each there or not
    class_cond: bool = False  # the denoiser may be told the class, or none; the head never is
    predicts: Literal["eps", "x0", "v"] = "eps"
    learn_sigma: bool = False  # the variance of the ancestral step is learned
    noise_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = 1000  # T
    beta_start: float = 1e-3  # linear only, of 1000 steps; 1e-4 everywhere but in the released code
    beta_end: float = 0.02  # linear only, likewise

    @property
    def betas(self) -> tuple[float, float]:
        """First and last beta of the linear schedule: T steps have 1000 / T times those of 1000.

        Below 10 steps that would be above 1, and the released code takes 100 / T times ten times the first.
        """
        steps = self.diffusion_steps
        if steps < 10:
            return 1000 / steps * self.beta_start, 100 / steps * self.beta_end
        return 1000 / steps * self.beta_start, 1000 / steps * self.beta_end

    def check(self) -> None:
        """Raise `ValueError` on a value out of range, or settings that do not go together."""
        super().check()
        if self.diffusion_steps < 2:
            raise ValueError(f"diffusion_steps must be at least 2, not {self.diffusion_steps}")
        first, last = self.betas
        if self.noise_schedule == "linear" and not 0 < first <= last < 1:
            raise ValueError(
                f"diffusion_steps {self.diffusion_steps} make betas from {first:.3g} to {last:.3g} of "
                f"beta_start {self.beta_start} and beta_end {self.beta_end}: they must ascend between 0 and 1"
            )
        if self.head_width < 0 or not 0 <= self.head_dropout < 1:
            raise ValueError(
                f"head_width must be at least 0 and head_dropout in [0, 1), not {self.head_width} and "
                f"{self.head_dropout}"
            )
        if self.head == "official" and (self.taps or self.head_width):
            raise ValueError("head 'official' sees every map and has its own width: leave taps and width out")
        if self.multi_label and self.class_cond:
            raise ValueError("multi_label and class_cond exclude one another: attributes are not embedded")

    @classmethod
    def small(cls) -> JointConfig:
        """A net that tests can afford."""
        return cls(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_heads=2,
            dropout=0.0,
            head_dropout=0.0,
            diffusion_steps=50,
        )


# -- the objective -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AugmentationConfig:
    """What is done to the clean images that the head is shown in training, and to no others.

    A number in [0, 1] is the share of the images that it is done to, each by a coin of its own, in the order
    of the fields; all in [0, 1], where the operations are defined, whatever range the model takes.
    """

    jitter: float = 0.0  # brightness, contrast, saturation and hue at once; of colour images
    jitter_by: float = 0.1  # factors within 1 -+ this, the hue within -+ this share of the circle
    crop: float = 0.0  # a part of the image, made as large as the whole
    crop_area: tuple[float, float] = (0.5, 1.0)  # of the part, as a share of the image
    rotate: float = 0.0
    rotate_by: float = 30.0  # degrees, either way
    flip: float = 0.0  # left to right
    contrast: float = 0.0
    contrast_by: tuple[float, float] = (0.6, 1.8)
    sharpness: float = 0.0
    sharpness_by: tuple[float, float] = (0.4, 2.0)
    brightness: float = 0.0
    brightness_by: tuple[float, float] = (0.6, 1.8)
    mixup: float = 0.0  # mixed with another image, and so are the labels

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        for name in ("jitter", "crop", "rotate", "flip", "contrast", "sharpness", "brightness", "mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the images, from 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.jitter_by <= 0.5 or not 0 <= self.rotate_by <= 180:
            raise ValueError("jitter_by must lie in [0, 0.5] and rotate_by in [0, 180]")
        for name in ("crop_area", "contrast_by", "sharpness_by", "brightness_by"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be two numbers, the smaller first, not {(low, high)}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area must lie in (0, 1], not be {self.crop_area}")


@dataclass(frozen=True)
class JointObjectiveConfig:
    """`joint/joint`: the denoiser's loss plus `w_ce` times the head's cross-entropy, in nats.

    classify: `clean` the head is shown x0 at t = 0; `noised` the denoiser's x_t, in the same pass; or `both`.
    """

    train: Literal["both", "classifier", "denoiser"] = "both"  # one of them alone, on the same numbers
    classify: Literal["clean", "noised", "both"] = "clean"
    w_ce: float = 0.001  # lambda; nothing is lost of it in `train = "classifier"`, where it is 1
    late_start: int = 0  # training passes of the head (steps times micro-batches) before it counts
    ramp: int = 0  # passes over which its weight then rises to w_ce
    taper: float = 0.0  # of noised images: weight (1 - t / T)^taper
    smoothing: float = 0.0  # of the labels
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        for name in ("w_ce", "late_start", "ramp", "taper"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")


# -- data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartlyLabelledConfig:
    """`joint/partly-labelled`: another data set, most of whose training images have lost their labels."""

    of: str = "core/digits"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)  # its own
    labels: float = 1.0  # share of the training images that keep their label, the same of every class
    label_seed: int = 0  # which ones
    # Share of an epoch's rows that are labelled images once more, which the head alone is shown: at 0.25 a
    # batch of 64 has 48 images for the denoiser and, of few labels, 16 and some for the head.
    again: float = 0.0

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not 0 < self.labels <= 1:
            raise ValueError(f"labels must be a share in (0, 1], not {self.labels}")
        if not 0 <= self.again < 1:
            raise ValueError(f"again must be a share in [0, 1), not {self.again}")


@dataclass(frozen=True)
class DomainsConfig:
    """`joint/domains`: trained on labelled images of `source` and unlabelled ones of `target`.

    Validated and tested on `target`. Images are made `channels` x `size` x `size`: padded with black where
    they are smaller, reduced where they are larger.
    """

    source: str = "core/svhn"
    source_settings: dict[str, Any] = field(default_factory=dict, hash=False)
    target: str = "core/mnist"
    target_settings: dict[str, Any] = field(default_factory=dict, hash=False)
    size: int = 32
    channels: int = 3
    download: bool = True  # of either, unless its own settings say otherwise

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.size < 1 or self.channels not in (1, 3):
            raise ValueError(f"size must be at least 1 and channels 1 or 3, not {self.size}, {self.channels}")


@dataclass(frozen=True)
class CelebAAttributesConfig:
    """`joint/celeba-attributes`: CelebA faces with all 40 attributes."""

    root: str | None = None  # None: $CDM_RUN_DATA, or ~/.cache/cdm-run/data
    download: bool = True
    size: int = 64
    dequantise: bool = True
    flip: bool = False

    def check(self) -> None:
        """Raise `ValueError` on a size that the 128x128 crop does not hold."""
        if not 1 <= self.size <= 128:
            raise ValueError(f"size must be between 1 and 128 (the crop is 128x128), got {self.size}")
