"""Files that are written whole or not at all, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from cdm_core.checkpoints import disk


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file aside, then rename it; UserError on a full or read-only disk. Returns `path`."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def to_json(value: Any) -> str:
    """Indented JSON text; numbers that are not finite become null, as JSON has none."""
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
