"""allaprima: optimize a Stable Diffusion pipeline once, draw anything.

Importing this package loads no torch: the public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import Config
from .errors import AllaprimaError

if TYPE_CHECKING:
    from .explanation import explain
    from .merging import loras
    from .pipelines import load, optimize, rebind, restore
    from .switching import switch
    from .verification import verify

__version__ = "0.1.0"

_LAZY = {
    "explain": "explanation",
    "load": "pipelines",
    "loras": "merging",
    "optimize": "pipelines",
    "rebind": "pipelines",
    "restore": "pipelines",
    "switch": "switching",
    "verify": "verification",
}

__all__ = ["AllaprimaError", "Config", "explain", "load", "loras", "optimize", "rebind", "restore", "switch", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'allaprima' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
