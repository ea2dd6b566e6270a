"""OpenVINO, the CPU's library: our graphs translated node by node, compiled once for each state of the weights.

translate.py   Graph -> ov.Model: sizes, types, one call after another
operators.py   what each operator becomes
runtime.py     OpenVinoExecutable: weights in, compile, run for every size

Importing this package loads no OpenVINO; `available` says whether it can be loaded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...graph import Graph

if TYPE_CHECKING:
    from .runtime import OpenVinoExecutable

__all__ = ["OpenVinoExecutable", "available", "unsupported"]


@lru_cache(maxsize=1)
def available() -> str | None:
    """Why OpenVINO cannot be used here, in words; None where it can."""
    try:
        import openvino.opset15  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"OpenVINO cannot be imported ({type(error).__name__}: {error}); pip install 'allaprima[cpu]'."
    return None


def unsupported(graph: Graph) -> list[str]:
    """One readable line for each node that cannot be translated; empty where the whole graph can."""
    reason = available()
    if reason is not None:
        return [reason]
    from .translate import unsupported as lines

    return lines(graph)


def __getattr__(name: str) -> Any:
    if name == "OpenVinoExecutable":
        from .runtime import OpenVinoExecutable

        return OpenVinoExecutable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
