"""Settings of a denoiser and a classifier trained side by side. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from cdm_core.denoising_configs import DenoisingConfig
from cdm_plugins_guidance.adm_configs import UNetConfig
from cdm_plugins_guidance.classifier_configs import ClassificationConfig, ResNetConfig


@dataclass(frozen=True)
class PairConfig:
    """`guidance/pair`: an unconditional denoiser and an ordinary classifier."""

    denoiser: UNetConfig = field(default_factory=UNetConfig)
    classifier: ResNetConfig = field(default_factory=ResNetConfig)

    def check(self) -> None:
        """Raise `ValueError` where the denoiser would know the classes itself."""
        if self.denoiser.class_cond:
            raise ValueError("denoiser.class_cond must be false: what is guided knows no classes here")
        self.denoiser.check()
        self.classifier.check()

    @classmethod
    def small(cls) -> PairConfig:
        """Nets that tests can afford."""
        small = UNetConfig.small()
        denoiser = {**vars(small), "class_cond": False, "null_class": False}
        return cls(UNetConfig(**denoiser), ResNetConfig.small())


@dataclass(frozen=True)
class PairObjectiveConfig:
    """The losses of the two; they share no weight, so that adding them trains each as if alone."""

    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
