"""What off-the-shelf guidance needs, in one run: an unconditional denoiser, and a classifier of clean images.

The two are trained on the same batches and know nothing of one another. Only sampling brings them together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cdm_core.data import DataInfo
from cdm_core.denoising import DenoisingObjective
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_core.samplers import Prediction
from cdm_plugins_guidance.adm import ADM
from cdm_plugins_guidance.classifier import Classification, Classifier
from cdm_plugins_guidance.pair_configs import PairConfig, PairObjectiveConfig


class Pair(nn.Module):
    """`denoiser` and `classifier`, for the images and classes of `info`."""

    num_classes = None  # the denoiser takes no labels

    def __init__(self, config: PairConfig, info: DataInfo) -> None:
        super().__init__()
        self.denoiser = ADM(config.denoiser, info)
        self.classifier = Classifier(config.classifier, info)
        self.classes = self.classifier.classes

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, ascending: the denoiser's noise levels."""
        return self.denoiser.sigmas

    def scale(self, sigma: Tensor) -> Tensor:
        """alpha of the level nearest to sigma; (B,) -> (B,)."""
        return self.denoiser.scale(sigma)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma]; x (B, C, H, W), sigma (B,); y must be None."""
        return self.denoiser.denoise(x, sigma, y)

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As `denoise`, with the learned variance where there is one."""
        return self.denoiser.predict(x, sigma, y)

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The classifier's (B, K); it takes x for a clean image, whatever sigma (B,)."""
        return self.classifier.class_logits(x, sigma)


class PairObjective:
    """`objective(model, x0, y, draws) -> {"loss", "mse", ..., "ce", "accuracy"}`: both losses, added.

    Split as they are, so that it can be compiled.
    """

    def __init__(self, config: PairObjectiveConfig) -> None:
        self.denoising = DenoisingObjective(config.denoising)
        self.classification = Classification(config.classification)

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units; y (B,) int64."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> tuple[Any, ...]:
        """All that the classifier's loss takes, then all that the denoiser's does."""
        if not isinstance(model, Pair):
            raise UserError(
                f"the objective guidance/pair trains the model guidance/pair, not a {type(model).__name__}"
            )
        shown = self.classification.prepare(model.classifier, x0, y, draws)
        return *shown, *self.denoising.prepare(model.denoiser, x0, None, draws)

    def loss(self, model: Pair, shown: Tensor, sigma: Tensor, y: Tensor, *noised: Any) -> dict[str, Tensor]:
        """The losses of what `prepare` returned; tensor operations only."""
        first = self.denoising.loss(model.denoiser, *noised)
        second = self.classification.loss(model.classifier, shown, sigma, y)
        return first | second | {"loss": first["loss"] + second["loss"]}
