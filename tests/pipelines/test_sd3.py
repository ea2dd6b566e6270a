"""SD3: a transformer instead of a UNet.  Nothing in the optimizer knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import as_task, engines
from allaprima.stage import Time
from tests.pipelines.comparing import captures, same_as_eager, same_at_all_sizes, size, start
from tests.tiny import tiny_sd3_pipeline

SIZES = ((64, 64, 1), (80, 112, 2), (144, 64, 1))
"""Multiples of 16: two latents make a patch."""


@pytest.fixture(scope="module")
def sd3(cache: Path) -> Any:
    return ap.optimize(tiny_sd3_pipeline(), Config(backend="aten", cache_dir=cache))


def test_text_to_image(sd3: Any) -> None:
    same_at_all_sizes(sd3, size, SIZES)
    assert engines(sd3)["transformer"].bound


def test_what_is_known_with_the_timestep_is_computed_before_the_step(sd3: Any) -> None:
    """The modulations of every block, 6 to 9 vectors each, depend on timestep and prompt only."""
    same_as_eager(sd3, **size(64, 64))
    (runner,) = engines(sd3)["transformer"].runners()
    assert runner.program.count(Time.SCHEDULE, torch.ops.aten.linear.default) >= 4
    assert "timestep" not in runner.program.stages[Time.STEP].inputs


def test_embeddings_of_another_length(sd3: Any) -> None:
    same_as_eager(sd3, **size(64, 64))
    before = captures(sd3)
    text = torch.randn(1, 154, 64, generator=torch.Generator().manual_seed(1))
    pooled = text[:, 0]
    same_as_eager(sd3, None, prompt_embeds=text, negative_prompt_embeds=-text, pooled_prompt_embeds=pooled,
                  negative_pooled_prompt_embeds=-pooled, **size(80, 64))  # fmt: skip
    same_as_eager(sd3, guidance_scale=1.0, **size(64, 64))
    assert captures(sd3) == before


def test_img2img(sd3: Any) -> None:
    same_at_all_sizes(as_task(sd3, "img2img"), lambda h, w: start(h, w) | size(h, w), SIZES)


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_sd3_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, size, SIZES)
