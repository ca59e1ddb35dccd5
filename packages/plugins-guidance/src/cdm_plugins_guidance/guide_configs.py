"""Settings of the guide and of the classifier behind it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

NATIVE, OWN = 0, -1  # sizes: as the images come; as the classifier was trained


@dataclass(frozen=True)
class Contract:
    """What images a classifier was trained on, as its weights say."""

    mean: tuple[float, ...] = ()  # of pixels in [0, 1], one a channel; empty: not known
    std: tuple[float, ...] = ()
    size: int = NATIVE  # pixels a side; 0: any
    channels: int = 0  # 0: not known


@dataclass(frozen=True)
class ClassifierConfig:
    """Which classifier, and how it is made smooth and fast.

    name: `torchvision:NAME`, `timm:NAME`, `hf:NAME-OR-FOLDER`, `run:RUN-FOLDER-OR-CONVERTED-FILE`, or a
    Python target `module:callable` that returns an `nn.Module`.
    """

    name: str = ""
    weights: str = ""  # a file (.safetensors, .pth), or a name of torchvision's; empty: the package's own
    softplus: float = math.inf  # beta of the Softplus that takes the place of every ReLU; inf: ReLU stays
    # Both exact but for rounding; None: with Softplus (fold: where there is something to fold), while a
    # network that keeps its ReLUs is left bitwise as it is.
    fold: bool | None = None  # batch norms go into their convolutions
    channels_last: bool | None = None  # the layout that convolutions are faster in
    compile: bool = False  # by torch.compile, once a batch size
    checkpoint: bool = False  # keep the activations between blocks only: less memory, one more forward pass
    shape: tuple[int, ...] = ()  # (C, H, W) of the images it is tried on; empty: as it was trained

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not self.softplus > 0:
            raise ValueError(f"softplus must be above 0 (inf: ReLU stays), not {self.softplus}")
        if self.shape and (len(self.shape) != 3 or min(self.shape) < 1):
            raise ValueError(f"shape must hold three sizes (C, H, W), not {self.shape}")


@dataclass(frozen=True)
class GuideConfig:
    """The log-ratio L(x) = tau1 q.f(x) - logsumexp(tau2 f(x)) and how its gradient is taken; f are logits.

    The defaults ask for grad log p(y | x), the classifier fed as it comes.
    """

    # What is wanted of the image.
    target: Literal["class", "not_class", "none"] = "class"  # y; anything but y; no label: the least entropy
    likelihood: Literal["softmax", "sigmoid"] = "softmax"  # one class an image; attributes, each yes or no
    tau1: float = 1.0
    tau2: float = 1.0  # 0: the joint energy, grad f_y
    discount: float | None = None  # tau2 = tau1 * discount instead (the published margin discount: 0.5)
    alpha: float = 0.0  # weight of the regulariser: L - alpha * divergence
    regulariser: Literal["rkl", "fkl", "js", "entropy"] = "rkl"  # KL(q|p), KL(p|q), Jensen-Shannon, H(p)
    smoothing: float = 0.1  # of the regulariser's labels: q = (1 - smoothing) onehot + smoothing / classes
    tilt: float = 0.0  # t: the gradient of L times exp(-t L); below 0 the likely images count for more
    class_weights: tuple[float, ...] = ()  # factor of the gradient, one a class; empty: 1

    # What the classifier is fed. Model units are [-1, 1].
    input: Literal["raw", "normalised"] = "raw"  # model units; (x + 1) / 2 with mean and std taken out
    mean: tuple[float, ...] = ()  # empty: the classifier's own
    std: tuple[float, ...] = ()
    size: int = NATIVE  # pixels a side that images are resized to; 0: as they come, -1: the classifier's own
    antialias: bool = True  # of resizing
    channels: int = 0  # images of one channel are repeated to so many; 0: the classifier's own
    compensate: bool = True  # normalised: gradients divided by what normalising multiplies them with

    # Averages over perturbed copies of every image.
    copies: int = 1
    noise: float = 0.0  # std of Gaussian noise on x, in its units
    flip: bool = False  # left to right, half of the copies
    shift: int = 0  # pixels, at most, in each direction; the border is repeated
    average: Literal["log", "probability"] = "log"  # of L; of exp L
    seed: int = 0

    # Memory.
    micro_batch: int = 0  # images at a time; 0: all

    @property
    def second_tau(self) -> float:
        """The tau2 in force."""
        return self.tau2 if self.discount is None else self.tau1 * self.discount

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        self._check_ratio()
        self._check_input()
        if self.copies < 1 or self.noise < 0 or self.shift < 0 or self.micro_batch < 0:
            raise ValueError("copies must be at least 1; noise, shift and micro_batch at least 0")
        if self.copies > 1 and not (self.noise or self.flip or self.shift):
            raise ValueError(
                "copies without noise, flip or shift would all be the same: set one, or copies 1"
            )

    def _check_ratio(self) -> None:
        if not all(map(math.isfinite, (self.tau1, self.second_tau, self.alpha, self.tilt))):
            raise ValueError("tau1, tau2, discount, alpha and tilt must be finite")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must lie in [0, 1], not {self.smoothing}")
        if self.alpha and self.regulariser in ("fkl", "js") and self.smoothing == 0:
            raise ValueError(f"smoothing must be above 0 for the regulariser {self.regulariser!r}")
        if self.likelihood == "sigmoid" and (self.alpha or self.target == "none"):
            raise ValueError(
                "likelihood 'sigmoid' has no regulariser and needs a target: they are of softmax"
            )
        if self.target == "none" and (self.alpha or self.tilt or self.class_weights):
            raise ValueError("target 'none' is the entropy alone: leave out alpha, tilt and class_weights")
        if not all(map(math.isfinite, self.class_weights)):
            raise ValueError("class_weights must be finite")

    def _check_input(self) -> None:
        if len(self.mean) != len(self.std) or any(not s > 0 for s in self.std):
            raise ValueError("mean and std must be of one length, one a channel, and std above 0")
        if self.mean and self.input == "raw":
            raise ValueError("mean and std are of input 'normalised': choose it, or leave them out")
        if self.size < OWN or self.channels < 0:
            raise ValueError("size must be -1, 0 or a number of pixels, channels at least 0")
