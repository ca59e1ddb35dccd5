"""The guides as adapters: a published method each, by its defaults, every part of it open.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from cdm_plugins_guidance.apply_configs import METHODS, TermConfig
from cdm_plugins_guidance.guide_configs import ClassifierConfig, GuideConfig


@dataclass(frozen=True)
class OneGuide(TermConfig):
    """A classifier, what is asked of it, and how its gradient is applied."""

    # Which classifier; without a name, the model's own `class_logits`.
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)


@dataclass(frozen=True)
class GuidedConfig(OneGuide):
    """One guide, or several whose moves are added up."""

    # Labels go to the denoiser too. None: where it is conditional on as many classes as the guides have.
    condition: bool | None = None
    others: tuple[OneGuide, ...] = ()  # further guides

    @property
    def requires(self) -> tuple[str, ...]:
        """Capabilities of the model that is guided."""
        named = all(term.classifier.name for term in (self, *self.others))
        return ("denoise",) if named else ("denoise", "class_logits")

    @classmethod
    def small(cls) -> GuidedConfig:
        """The model's own classifier as it is: those of tests are no networks."""
        return cls(classifier=ClassifierConfig())


class Method(typing.NamedTuple):
    """What makes a published method: a term, and where they differ from the defaults its other parts."""

    summary: str
    term: TermConfig
    classifier: ClassifierConfig = ClassifierConfig()
    guide: GuideConfig = GuideConfig()


_SMOOTH, _JOINT = ClassifierConfig(softplus=3.0), GuideConfig(discount=0.5)
ADAPTERS: Mapping[str, Method] = {
    "guide": Method("Score of the predicted x0, for any sampler", TermConfig()),
    "elucd": Method("EluCD, ancestral samplers (Ma et al. 2024)", METHODS["elucd"], _SMOOTH, _JOINT),
    "elucd-official": Method(
        "EluCD with the released code's peak, for parity", METHODS["elucd-official"], _SMOOTH, _JOINT
    ),
    "elucd-edm": Method(
        "EluCD, EDM's samplers (Ma et al. 2024)",
        METHODS["elucd-edm"],
        ClassifierConfig(softplus=5.0),
        GuideConfig(tau2=0.0),
    ),
    "adm": Method("Noisy classifier, ancestral samplers (Dhariwal & Nichol 2021)", METHODS["adm"]),
    "adm-ddim": Method("Noisy classifier, other samplers (Dhariwal & Nichol 2021)", METHODS["adm-ddim"]),
    "universal": Method("Through the denoiser, score (Bansal et al. 2023)", METHODS["universal"]),
    "freedom": Method("Through the denoiser, plain step (Yu et al. 2023)", METHODS["freedom"]),
    "mpgd": Method("Shift of the predicted x0 (He et al. 2024)", METHODS["mpgd"]),
}


def config_of(name: str) -> type[GuidedConfig]:
    """`GuidedConfig` with the defaults of the method `name`."""
    method = ADAPTERS[name]
    hints = typing.get_type_hints(TermConfig)
    defaults = [
        (f.name, hints[f.name], field(default=getattr(method.term, f.name))) for f in fields(TermConfig)
    ]
    parts = [
        ("classifier", ClassifierConfig, field(default=method.classifier)),
        ("guide", GuideConfig, field(default=method.guide)),
    ]
    made = dataclasses.make_dataclass(
        f"{name.title().replace('-', '')}Config", [*defaults, *parts], bases=(GuidedConfig,), frozen=True
    )
    made.__module__, made.__doc__ = __name__, method.summary
    return made


CONFIGS: Mapping[str, type[GuidedConfig]] = {name: config_of(name) for name in ADAPTERS}
globals().update({cls.__name__: cls for cls in CONFIGS.values()})  # where copying and pickling look for them
