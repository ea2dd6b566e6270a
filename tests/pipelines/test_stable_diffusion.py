"""Stable Diffusion 1 and 2, Taiyi's form, and both kinds of inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import InputError
from allaprima.pipelines import as_task, engines
from tests.pipelines.comparing import (
    MORE_SIZES,
    captures,
    difference,
    mask,
    picture,
    same_as_eager,
    same_at_all_sizes,
    size,
    start,
)
from tests.tiny import tiny_inpainting_pipeline, tiny_sd2_pipeline, tiny_taiyi_pipeline

TEXT = torch.randn(1, 154, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def taiyi(cache: Path) -> Any:
    return ap.optimize(tiny_taiyi_pipeline(), Config(backend="aten", cache_dir=cache))


@pytest.fixture(scope="module")
def sd2(cache: Path) -> Any:
    return ap.optimize(tiny_sd2_pipeline(), Config(backend="aten", cache_dir=cache))


@pytest.fixture(scope="module")
def inpainting(cache: Path) -> Any:
    return ap.optimize(tiny_inpainting_pipeline(), Config(backend="aten", cache_dir=cache))


def repainted(height: int, width: int) -> dict[str, Any]:
    return size(height, width) | {"image": picture(height, width), "mask_image": mask(height, width)}


def test_taiyi_with_512_tokens(taiyi: Any) -> None:
    text = taiyi.encode_prompt("红色的苹果", "cpu", 1, False)[0]
    assert text.shape == (1, 512, 32)
    same_at_all_sizes(taiyi, size, prompt="红色的苹果")


def test_taiyi_with_embeddings_of_any_length(taiyi: Any) -> None:
    same_as_eager(taiyi, **size(64, 64))
    before = captures(taiyi)
    for length in (2, 77, 300, 600):
        text = TEXT[:, :1, :32].expand(1, length, 32) * torch.linspace(0, 1, length)[:, None]
        same_as_eager(taiyi, None, prompt_embeds=text, negative_prompt_embeds=-text, **size(64, 72))
    assert captures(taiyi) == before


def test_sd2_predicts_velocities(sd2: Any) -> None:
    assert sd2.scheduler.config.prediction_type == "v_prediction"
    same_at_all_sizes(sd2, size)
    same_as_eager(sd2, None, prompt_embeds=TEXT, negative_prompt_embeds=-TEXT, **size(72, 64))


def test_sd2_img2img(sd2: Any) -> None:
    same_at_all_sizes(as_task(sd2, "img2img"), start)


def test_inpainting_with_four_channels(sd2: Any) -> None:
    same_at_all_sizes(as_task(sd2, "inpaint"), repainted)


def test_inpainting_with_nine_channels(inpainting: Any) -> None:
    same_at_all_sizes(inpainting, repainted)
    changed = same_as_eager(inpainting, **repainted(64, 64) | {"mask_image": mask(64, 32).resize((64, 64))})
    assert difference(changed, same_as_eager(inpainting, **repainted(64, 64), strength=0.5)) > 1e-3


@pytest.mark.parametrize("build", [tiny_taiyi_pipeline, tiny_sd2_pipeline, tiny_inpainting_pipeline])
def test_on_openvino(cache: Path, build: Any) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(build(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, repainted if build is tiny_inpainting_pipeline else size, [(64, 64, 1), (72, 88, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint"])
def test_more_sizes(sd2: Any, task: Any) -> None:
    options = {"text2img": size, "img2img": start, "inpaint": repainted}[task]
    same_at_all_sizes(as_task(sd2, task), options, MORE_SIZES)


def test_a_task_shares_all_engines(sd2: Any) -> None:
    assert engines(as_task(sd2, "inpaint")) == engines(sd2)


def test_a_task_that_the_family_does_not_have(cache: Path) -> None:
    from tests.tiny import tiny_lcm_pipeline, tiny_refiner

    with pytest.raises(InputError, match=r"LatentConsistencyModelPipeline cannot be used for 'inpaint'.*img2img"):
        as_task(tiny_lcm_pipeline(), "inpaint")
    assert as_task(tiny_refiner(), "img2img").config.requires_aesthetics_score
