"""IP-Adapters' strengths as data: `pipe.set_ip_adapter_scale` is a write, not another capture.

diffusers keeps a strength as a number in each cross-attention's processor, and a captured graph would hold it as a
constant.  While the UNet is captured, and while its structure is described, something else stands there: a number that
the call brings along, in a table of a row for each processor and a column for each adapter.  A strength of zero stays
what it is, because the processor then leaves its part out.  source: Ye et al. 2023, arXiv:2308.06721
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TABLE = "ip_adapter_scales"
"""The entry of added_cond_kwargs that brings the table."""


class StrengthTable:
    """The strengths of a UNet's adapters as one tensor, which stays the same one while they do."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._seen: tuple[Any, ...] = ()
        self._table: torch.Tensor | None = None

    def added_to(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's keyword arguments, with the table where the call shows pictures to adapters."""
        given = kwargs.get("added_cond_kwargs")
        if not given or "image_embeds" not in given:
            return kwargs
        rows = [[_number(s) for s in part.scale] for part in _processors(self.module)]
        if not rows:
            return kwargs
        device = given["image_embeds"][0].device
        if self._table is None or self._seen != (rows, device):
            self._seen, self._table = (rows, device), torch.tensor(rows, dtype=torch.float32, device=device)
        return kwargs | {"added_cond_kwargs": given | {TABLE: self._table}}


@contextmanager
def strengths_from_the_call(module: nn.Module) -> Iterator[None]:
    """Within this context the processors of a UNet multiply by what the call's table says."""
    processors = _processors(module)
    if not processors:
        yield
        return
    before = [list(part.scale) for part in processors]
    reader = _Reader(module.process_encoder_hidden_states)  # type: ignore[arg-type]
    vars(module)["process_encoder_hidden_states"] = reader
    for row, part in enumerate(processors):
        part.scale[:] = [_Strength(reader, row, i) if _number(s) else s for i, s in enumerate(part.scale)]
    try:
        yield
    finally:
        del vars(module)["process_encoder_hidden_states"]
        for part, scale in zip(processors, before, strict=True):
            part.scale[:] = scale


class _Reader:
    """The UNet's first look at its conditions, which the table is among."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.table: torch.Tensor | None = None

    def __call__(self, encoder_hidden_states: Any, added_cond_kwargs: dict[str, Any]) -> Any:
        self.table = added_cond_kwargs.get(TABLE)
        return self.original(encoder_hidden_states, added_cond_kwargs)


class _Strength:
    """A place in the table that behaves like the number there."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, reader: _Reader, row: int, column: int) -> None:
        self.reader, self.place = reader, (row, column)

    def __eq__(self, other: object) -> bool:
        return False  # it is not zero, whatever it is

    def __mul__(self, value: torch.Tensor) -> torch.Tensor:
        if self.reader.table is None:
            raise ValueError("an IP-Adapter needs a picture: ip_adapter_image or ip_adapter_image_embeds.")
        return self.reader.table[self.place] * value


def _processors(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "to_k_ip") and isinstance(part.scale, list)]


def _number(scale: Any) -> float:
    """A strength, or zero for what is none: several for the masks of one adapter stay where they are."""
    return float(scale) if isinstance(scale, int | float) else 0.0
