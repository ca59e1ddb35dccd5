"""Data sets and their description. One fact has one home: how integers become model inputs is `DataInfo`.

Importing this package, or `cdm_core.data.configs`, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_core.data.base import Data, DataInfo, Split, TensorSplit, carve, in_memory

__all__ = ["Data", "DataInfo", "Split", "TensorSplit", "carve", "in_memory"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cdm_core.data import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
