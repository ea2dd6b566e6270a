"""SDXL: two text encoders, sizes as conditions, the refiner, img2img and inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import as_task, engines
from allaprima.stage import Time
from tests.pipelines.comparing import (
    MORE_SIZES,
    captures,
    difference,
    draw,
    mask,
    picture,
    same_as_eager,
    same_at_all_sizes,
    size,
    start,
)
from tests.tiny import tiny_refiner, tiny_xl_pipeline


@pytest.fixture(scope="module")
def xl(cache: Path) -> Any:
    return ap.optimize(tiny_xl_pipeline(), Config(backend="aten", cache_dir=cache))


def repainted(height: int, width: int) -> dict[str, Any]:
    return size(height, width) | {"image": picture(height, width), "mask_image": mask(height, width), "strength": 0.7}


def test_text_to_image(xl: Any) -> None:
    same_at_all_sizes(xl, size)
    assert {"text_encoder", "text_encoder_2", "unet", "vae.decoder"} <= {n for n, e in engines(xl).items() if e.bound}


def test_time_ids_are_data_and_known_with_the_prompt(xl: Any) -> None:
    first = same_as_eager(xl, **size(64, 64))
    before = captures(xl)
    other = same_as_eager(xl, **size(64, 64), original_size=(512, 300), crops_coords_top_left=(8, 40))
    assert difference(first, other) > 1e-4
    assert captures(xl) == before
    (runner,) = engines(xl)["unet"].runners()
    step = runner.program.stages[Time.STEP].inputs
    assert not [name for name in step if "time_ids" in name or "text_embeds" in name]


def test_a_second_prompt_and_a_long_one(xl: Any) -> None:
    same_as_eager(xl, **size(64, 64))
    before = captures(xl)
    same_as_eager(xl, prompt_2="a tree", negative_prompt="blue", **size(64, 64))
    same_as_eager(xl, clip_skip=0, guidance_scale=1.0, **size(64, 64))
    text = torch.randn(1, 154, 64, generator=torch.Generator().manual_seed(1))
    pooled = text[:, 0, :32]
    same_as_eager(xl, None, prompt_embeds=text, negative_prompt_embeds=-text, pooled_prompt_embeds=pooled,
                  negative_pooled_prompt_embeds=-pooled, **size(72, 64))  # fmt: skip
    assert captures(xl) == before


def test_img2img(xl: Any) -> None:
    same_at_all_sizes(as_task(xl, "img2img"), start)


def test_inpainting(xl: Any) -> None:
    same_at_all_sizes(as_task(xl, "inpaint"), repainted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_half_precision_with_the_decoder_in_float32(cache: Path) -> None:
    """diffusers casts SDXL's VAE to float32 to decode and back: nothing is captured twice for that."""
    pipe = ap.optimize(tiny_xl_pipeline(dtype=torch.float16), Config(backend="aten", cache_dir=cache))
    first = draw(pipe, **size(64, 64))
    before = captures(pipe)
    assert difference(first, draw(pipe, **size(64, 64))) == 0
    assert captures(pipe) == before
    assert pipe.vae.dtype == torch.float16


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_xl_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, size, [(64, 64, 1), (72, 88, 2)])


@pytest.mark.slow
def test_the_refiner(cache: Path) -> None:
    pipe = ap.optimize(tiny_refiner(), Config(backend="aten", cache_dir=cache))
    assert "text_encoder" not in engines(pipe)
    same_at_all_sizes(pipe, start)
    before = captures(pipe)
    same_as_eager(pipe, **start(64, 64), aesthetic_score=2.0)
    assert captures(pipe) == before


@pytest.mark.slow
def test_base_and_refiner_share_the_steps(xl: Any, cache: Path) -> None:
    """An ensemble of experts: the base stops early, the refiner goes on from its latents."""
    refiner = ap.optimize(tiny_refiner(), Config(backend="aten", cache_dir=cache))

    def both(pipe: Any, prompt: Any, **options: Any) -> Any:
        latents = torch.as_tensor(draw(pipe, prompt, denoising_end=0.6, output_type="latent", **options))
        return draw(refiner, prompt, image=latents, denoising_start=0.6)

    same_as_eager(xl, drawing=both, num_inference_steps=5, **size(64, 72))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint"])
def test_more_sizes(xl: Any, task: Any) -> None:
    options = {"text2img": size, "img2img": start, "inpaint": repainted}[task]
    same_at_all_sizes(as_task(xl, task), options, MORE_SIZES)
