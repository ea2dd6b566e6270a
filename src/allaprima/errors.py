"""The exception tree.  Every message names the value, what is allowed and what to do.

AllaprimaError
├── ConfigError            a setting that is not allowed
├── ModelError             a model that cannot be loaded
│   ├── UnknownModelError  no such model; the message lists the nearest names
│   └── CheckpointError    a truncated, hostile or mismatched weights file
├── InputError             a prompt, size or image that cannot be drawn
│   └── SizeError          a height or width that is no multiple of 8, or beyond the memory budget
├── SchedulerError         a scheduler that does not fit the pipeline
├── CaptureError           a module or call that cannot be captured
│   └── GraphError         a graph that is not legal: a fault of ours, never of the user
├── AdapterError           an adapter that the engine cannot honour
├── NumericsError          NaN or Inf where a picture should be
└── OutOfMemoryError       the budget or the machine's memory is spent
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class AllaprimaError(Exception):
    """Base of all errors that allaprima raises on purpose."""


class ConfigError(AllaprimaError, ValueError):
    """A setting that is not allowed."""


class ModelError(AllaprimaError):
    """A model that cannot be loaded."""


class UnknownModelError(ModelError, LookupError):
    """No model of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        super().__init__(
            f"unknown model {name!r}. Nearest names: {', '.join(near)}. "
            "Give an embedded name (`allaprima models` lists them), a diffusers folder, "
            "a .safetensors file or a hub id such as 'owner/name'."
        )
        self.name, self.nearest, self._known = name, tuple(near), known

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._known)


class CheckpointError(ModelError):
    """A weights file that is truncated, hostile or of another architecture."""


class InputError(AllaprimaError, ValueError):
    """A prompt, picture or option that cannot be used."""


class SizeError(InputError):
    """A height or width that cannot be drawn."""


class SchedulerError(InputError):
    """A scheduler that does not fit the pipeline."""


class CaptureError(AllaprimaError):
    """A module or a call that cannot be captured as a graph."""


class GraphError(CaptureError):
    """A graph that broke a rule of `graph.verify`: a fault in allaprima, please report it."""


class AdapterError(AllaprimaError):
    """An adapter (LoRA) that the engine would have to ignore."""


class NumericsError(AllaprimaError, ArithmeticError):
    """NaN or Inf in the latents or the picture."""


class OutOfMemoryError(AllaprimaError, MemoryError):
    """The memory budget of `Config.memory_limit`, or the machine's memory, is spent."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, PyTorch or OpenVINO says that memory ran out."""
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "allocate memory" in text or "bad_alloc" in text
