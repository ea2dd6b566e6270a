"""LCM and Turbo: few steps, no second row for guidance, the guidance scale as an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import LCMScheduler

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import as_task, engines
from tests.pipelines.comparing import (
    MORE_SIZES,
    captures,
    difference,
    same_as_eager,
    same_at_all_sizes,
    size,
    start,
)
from tests.tiny import tiny_lcm_pipeline, tiny_sd2_pipeline


@pytest.fixture(scope="module")
def lcm(cache: Path) -> Any:
    return ap.optimize(tiny_lcm_pipeline(), Config(backend="aten", cache_dir=cache))


def test_latent_consistency(lcm: Any) -> None:
    same_at_all_sizes(lcm, size)


def test_the_guidance_scale_is_data(lcm: Any) -> None:
    first = same_as_eager(lcm, **size(64, 64))
    before = captures(lcm)
    other = same_as_eager(lcm, **size(64, 64), guidance_scale=3.0, num_inference_steps=1)
    same_as_eager(lcm, **size(64, 64), guidance_scale=1.5, num_inference_steps=4)
    assert captures(lcm) == before
    assert difference(first, other) > 1e-4


def test_img2img(lcm: Any) -> None:
    same_at_all_sizes(as_task(lcm, "img2img"), start)


def test_turbo(cache: Path) -> None:
    """One step, no guidance, timesteps from the end: SD-Turbo's way of drawing."""
    pipe = tiny_sd2_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    ap.optimize(pipe, Config(backend="aten", cache_dir=cache))
    few = {"guidance_scale": 0.0, "num_inference_steps": 1}
    same_at_all_sizes(pipe, lambda h, w: size(h, w) | few)
    schedule = engines(pipe)["unet"].events.stage_runs["SCHEDULE"]
    same_as_eager(pipe, **size(64, 64) | few | {"num_inference_steps": 4})
    assert engines(pipe)["unet"].events.stage_runs["SCHEDULE"] == schedule + 1


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_lcm_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, size, [(64, 64, 1), (72, 88, 2)])


@pytest.mark.slow
def test_more_sizes(lcm: Any) -> None:
    same_at_all_sizes(lcm, size, MORE_SIZES)
