"""Every rule, in the order in which they are applied."""

from __future__ import annotations

from .attention import AttentionWithoutTransposes
from .broadcast import BROADCAST
from .clean import CLEAN
from .linear import MergeSiblingLinears
from .rule import Rule

PORTABLE: tuple[Rule, ...] = (
    *CLEAN,
    *BROADCAST,
    AttentionWithoutTransposes(),
    MergeSiblingLinears(),
)
"""Rules whose result any backend can run."""


def rules_for(backend: str) -> tuple[Rule, ...]:
    """The rules for a backend: "portable", "aten", "openvino" or "cuda"."""
    return {"portable": PORTABLE}[backend]
