"""ControlNet: one and several, img2img and inpainting, guess mode, strengths that change on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import as_task, engines
from allaprima.stage import Time
from tests.pipelines.comparing import (
    MORE_SIZES,
    captures,
    difference,
    mask,
    no_fallbacks,
    picture,
    same_as_eager,
    same_at_all_sizes,
)
from tests.tiny import tiny_controlnet_pipeline


@pytest.fixture(scope="module")
def one(cache: Path) -> Any:
    return ap.optimize(tiny_controlnet_pipeline(), Config(backend="aten", cache_dir=cache))


@pytest.fixture(scope="module")
def two(cache: Path) -> Any:
    return ap.optimize(tiny_controlnet_pipeline(2), Config(backend="aten", cache_dir=cache))


def hint(height: int, width: int) -> dict[str, Any]:
    return {"image": picture(height, width)}


def hints(height: int, width: int) -> dict[str, Any]:
    return {"image": [picture(height, width), picture(height, width, 1)], "controlnet_conditioning_scale": [0.5, 1.5]}


def redrawn(height: int, width: int) -> dict[str, Any]:
    control = {"control_image": picture(height, width, 1)}
    return control | {"image": picture(height, width), "strength": 0.7, "num_inference_steps": 4}


def test_one(one: Any) -> None:
    same_at_all_sizes(one, hint)
    assert engines(one)["controlnet"].bound


def test_the_hint_is_embedded_once_a_picture(one: Any) -> None:
    same_as_eager(one, **hint(64, 64))
    (runner,) = engines(one)["controlnet"].runners()
    assert runner.program.stages[Time.PROMPT].graph.count(*_convolutions(runner)) >= 8
    before = runner.runs["PROMPT"]
    same_as_eager(one, **hint(64, 72), num_inference_steps=5)
    assert runner.runs["PROMPT"] == before + 1


def _convolutions(runner: Any) -> set[Any]:
    graph = runner.program.stages[Time.PROMPT].graph
    return {call.target for call in graph.calls() if "conv2d" in str(call.target)}


def test_its_strength_is_data(one: Any) -> None:
    first = same_as_eager(one, **hint(64, 64))
    before = captures(one)
    weaker = same_as_eager(one, **hint(64, 64), controlnet_conditioning_scale=0.3)
    short = same_as_eager(one, **hint(64, 64), control_guidance_start=0.4, control_guidance_end=0.9)
    assert captures(one) == before
    assert min(difference(first, weaker), difference(first, short), difference(weaker, short)) > 1e-4


def test_another_hint_and_no_guidance(one: Any) -> None:
    first = same_as_eager(one, **hint(64, 64))
    before = captures(one)
    other = same_as_eager(one, image=picture(64, 64, 5))
    same_as_eager(one, **hint(64, 64), guidance_scale=1.0)
    assert captures(one) == before
    assert difference(first, other) > 1e-4


@pytest.mark.slow
def test_guess_mode_is_a_signature_of_its_own(one: Any) -> None:
    same_as_eager(one, **hint(64, 64), guess_mode=True)
    before = captures(one)
    same_as_eager(one, ["a", "b"], **hint(72, 88), guess_mode=True, controlnet_conditioning_scale=0.5)
    assert captures(one) == before
    no_fallbacks(one)


def test_several(two: Any) -> None:
    same_at_all_sizes(two, hints)
    assert {"controlnet.0", "controlnet.1"} <= engines(two).keys()
    assert difference(same_as_eager(two, **hints(64, 64)), same_as_eager(
        two, **hints(64, 64) | {"controlnet_conditioning_scale": [0.5, 0.0]})) > 1e-4  # fmt: skip


def test_img2img(one: Any) -> None:
    same_at_all_sizes(as_task(one, "img2img"), redrawn)


def test_inpainting(one: Any) -> None:
    task = as_task(one, "inpaint")
    same_at_all_sizes(task, lambda h, w: redrawn(h, w) | {"mask_image": mask(h, w), "height": h, "width": w})


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_controlnet_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, hint, [(64, 64, 1), (72, 88, 2)])
    same_as_eager(pipe, **hint(64, 64), controlnet_conditioning_scale=0.3)


@pytest.mark.slow
def test_more_sizes(two: Any) -> None:
    same_at_all_sizes(two, hints, MORE_SIZES)
