"""Foundation models for CT and MRI: from scans to a pretrained, adapted and measured model.

The names below are imported when they are first used, so that `import voxelstem` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from voxelstem.door import AdaptedModel, load
    from voxelstem.errors import VoxelstemError
    from voxelstem.sources import read
    from voxelstem.store import Store
    from voxelstem.study import InputSpec, LabelMap, Study, Volume

__version__ = "0.12.1"

__all__ = [
    "AdaptedModel",
    "InputSpec",
    "LabelMap",
    "Store",
    "Study",
    "Volume",
    "VoxelstemError",
    "__version__",
    "load",
    "read",
]

_HOMES = {
    "AdaptedModel": "voxelstem.door",
    "InputSpec": "voxelstem.study",
    "LabelMap": "voxelstem.study",
    "Store": "voxelstem.store",
    "Study": "voxelstem.study",
    "Volume": "voxelstem.study",
    "VoxelstemError": "voxelstem.errors",
    "load": "voxelstem.door",
    "read": "voxelstem.sources",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from the module where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'voxelstem' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return list(__all__)
