"""Stand-ins for the parts that load and optimize, where a test is about what happens around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from allaprima.errors import NumericsError


class Pipelines(ModuleType):
    """`allaprima.pipelines` that hands out one pipeline, in plain diffusers, and writes down what it is asked.

    bad_calls   so many calls of an optimized pipeline raise NumericsError
    """

    def __init__(self, pipe: Any, bad_calls: int = 0) -> None:
        super().__init__("allaprima.pipelines")
        self.pipe, self.bad_calls = pipe, bad_calls
        self.optimized = False
        self.asked: list[tuple[Any, ...]] = []

    def load(self, source: Any, *, dtype: str = "auto", device: str = "auto") -> Any:
        self.asked.append(("load", source, dtype))
        return self.pipe

    def optimize(self, pipe: Any, config: Any = None) -> Any:
        self.asked.append(("optimize",))
        self.optimized = True
        return pipe

    @contextmanager
    def eager(self, pipe: Any) -> Iterator[Any]:
        self.asked.append(("eager",))
        self.optimized = False
        yield pipe
        self.optimized = True

    def set_scheduler(self, pipe: Any, name: str) -> None:
        from allaprima.schedulers import set_scheduler

        self.asked.append(("set_scheduler", name))
        set_scheduler(pipe, name)

    def as_task(self, pipe: Any, task: str) -> Any:
        import diffusers

        names = {
            "text2img": "StableDiffusionPipeline",
            "img2img": "StableDiffusionImg2ImgPipeline",
            "inpaint": "StableDiffusionInpaintPipeline",
        }
        task_pipe = getattr(diffusers, names[task])(**pipe.components, requires_safety_checker=False)
        task_pipe.set_progress_bar_config(disable=True)
        task_pipe.check_inputs = self._checked(task_pipe.check_inputs)
        return task_pipe

    def _checked(self, check_inputs: Any) -> Any:
        def check(*arguments: Any, **options: Any) -> None:
            if self.optimized and self.bad_calls:
                self.bad_calls -= 1
                raise NumericsError("the latents hold NaN")
            check_inputs(*arguments, **options)

        return check


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let `from .pipelines import …` inside a function find the stand-in."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
