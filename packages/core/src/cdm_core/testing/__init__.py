"""What a plugin's tests need: conformance suites to subclass, and a distribution known exactly.

    from cdm_core.testing import ModelConformance

    class TestMyNet(ModelConformance):
        component = "mine/net"

Needs pytest. `cdm_core.testing.plugins` has fake and broken plugins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_core.mixtures import GaussianMixture
    from cdm_core.testing.conformance import (
        AdapterConformance,
        DatasetConformance,
        ModelConformance,
        ObjectiveConformance,
        SamplerConformance,
        all_components,
    )

__all__ = [
    "AdapterConformance",
    "DatasetConformance",
    "GaussianMixture",
    "ModelConformance",
    "ObjectiveConformance",
    "SamplerConformance",
    "all_components",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that the fake plugins beside can be imported without torch.
    if name == "GaussianMixture":
        from cdm_core.mixtures import GaussianMixture

        return GaussianMixture
    if name in __all__:
        import pytest

        # Before the first import, so that a failed assertion shows its values.
        pytest.register_assert_rewrite("cdm_core.testing.conformance")
        from cdm_core.testing import conformance

        return getattr(conformance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
