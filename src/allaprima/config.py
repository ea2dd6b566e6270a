"""What the user asks for: frozen, checked, every default in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError

QUALITIES = ("exact",)
BACKENDS = ("auto", "openvino", "aten")


def default_cache_dir() -> Path:
    """`$ALLAPRIMA_CACHE`, else `$XDG_CACHE_HOME/allaprima`, else `~/.cache/allaprima`."""
    if chosen := os.environ.get("ALLAPRIMA_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "allaprima"


@dataclass(frozen=True)
class Config:
    """Settings of `optimize`.

    quality       "exact": algebraically equal, accumulated in fp32, no worse than eager
    backend       "auto" picks the fastest one that is installed for the device
    memory_limit  bytes that the engine's buffers may take, or None for no limit of ours
    cache_dir     where captured graphs are kept; None keeps nothing on disk
    cuda_graphs   replay each size as one CUDA graph (no effect on the CPU)
    max_plans     sizes whose buffers are kept ready at once
    threads       CPU threads for the openvino backend, or None for torch.get_num_threads()
    check_numerics  look for NaN and Inf once after the denoising loop
    raises        ConfigError
    """

    quality: str = "exact"
    backend: str = "auto"
    memory_limit: int | None = None
    cache_dir: Path | None = field(default_factory=default_cache_dir)
    cuda_graphs: bool = True
    max_plans: int = 16
    threads: int | None = None
    check_numerics: bool = True

    def __post_init__(self) -> None:
        _one_of("quality", self.quality, QUALITIES)
        _one_of("backend", self.backend, BACKENDS)
        _positive("memory_limit", self.memory_limit)
        if self.max_plans is None:
            raise ConfigError("Config.max_plans is None; give a positive whole number.")
        _positive("max_plans", self.max_plans)
        _positive("threads", self.threads)
        if self.cache_dir is not None:  # a text is as good as a Path
            object.__setattr__(self, "cache_dir", Path(self.cache_dir))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"Config.{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _positive(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
        raise ConfigError(f"Config.{name} is {value!r}; give a positive whole number or None.")
