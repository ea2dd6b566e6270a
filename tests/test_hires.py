"""Hires fix: two passes over the same engines, A1111's upscalers, seeds and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import InputError, SizeError
from allaprima.hires import UPSCALERS, hires
from allaprima.pipelines import set_scheduler
from tests.pipelines.comparing import captures, difference, no_fallbacks, same_as_eager, size
from tests.tiny import TWO_LEVELS, tiny_pipeline, tiny_unet, tiny_xl_pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def pipe(cache: Path) -> Any:
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(**TWO_LEVELS)
    set_scheduler(pipe, "DDIM")
    return ap.optimize(pipe, Config(backend="aten", cache_dir=cache))


def enlarged(pipe: Any, prompt: Any = "a red apple", **options: Any) -> Any:
    options = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(0)} | options
    return hires(pipe, prompt, **options).images


def test_it_draws_larger_and_captures_nothing_more(pipe: Any) -> None:
    same_as_eager(pipe, drawing=enlarged, **size(64, 72))
    before = captures(pipe)
    for options in ({}, {"scale": 1.5}, {"size": (88, 136)}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}):
        found = same_as_eager(pipe, drawing=enlarged, **size(64, 72), **options)
        batch = options.get("num_images_per_prompt", 1)
        width, height = options.get("size", tuple(round(side * options.get("scale", 2.0)) for side in (72, 64)))
        assert found.shape == (batch, height // 8 * 8, width // 8 * 8, 3)
    assert captures(pipe) == before
    no_fallbacks(pipe)


@pytest.mark.parametrize("upscaler", UPSCALERS)
def test_each_upscaler_is_another_picture(pipe: Any, upscaler: str) -> None:
    found = enlarged(pipe, upscaler=upscaler, **size(64, 72))
    assert difference(found, enlarged(pipe, upscaler=upscaler, **size(64, 72))) == 0
    others = [enlarged(pipe, upscaler=other, **size(64, 72)) for other in UPSCALERS if other != upscaler]
    differences = [difference(found, other) for other in others]
    # Enlarging twofold, "antialiased" changes nothing, and nearest-exact is nearest.
    assert sum(d > 1e-3 for d in differences) >= 4


def test_strength_and_steps_of_the_second_pass(pipe: Any) -> None:
    first = enlarged(pipe, **size(64, 64))
    assert difference(first, enlarged(pipe, strength=0.3, **size(64, 64))) > 1e-3
    calls = ap.explain(pipe).calls["unet"]
    enlarged(pipe, strength=0.5, second_steps=6, **size(64, 64))
    assert ap.explain(pipe).calls["unet"] - calls == 4 + 3


def test_a_seed_is_the_seed_of_both_passes(pipe: Any) -> None:
    """The second pass begins with the noise that its seed gives at the larger size, as in A1111."""
    generator = torch.Generator().manual_seed(0)
    latents = pipe("a", **size(64, 64), num_inference_steps=2, output_type="latent", generator=generator).images
    found = enlarged(pipe, "a", num_inference_steps=2, **size(64, 64), strength=1.0, upscaler="Latent (nearest)")
    again = ap.pipelines.as_task(pipe, "img2img")(
        "a", image=torch.nn.functional.interpolate(latents, scale_factor=2.0), strength=1.0, num_inference_steps=2,
        output_type="np", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert difference(found, again) == 0


def test_a_batch_with_a_generator_each(pipe: Any) -> None:
    def pair(pipe: Any, prompt: Any, seeds: tuple[int, ...] = (1, 2), **options: Any) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return enlarged(pipe, [prompt] * len(seeds), generator=generators, **options)

    both = same_as_eager(pipe, drawing=pair, **size(64, 64))
    assert difference(both[1:], pair(pipe, "a red apple", (2,), **size(64, 64))) < 1e-4


def test_sdxl(cache: Path) -> None:
    pipe = ap.optimize(tiny_xl_pipeline(), Config(backend="aten", cache_dir=cache))
    same_as_eager(pipe, drawing=enlarged, **size(64, 72))
    before = captures(pipe)
    same_as_eager(pipe, drawing=enlarged, scale=1.5, **size(64, 64))
    assert captures(pipe) == before


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an upscaler": ({"upscaler": "ESRGAN"}, InputError, "ESRGAN.*Latent"),
    "a scale of 0": ({"scale": 0}, InputError, "scale is 0"),
    "a scale that is a text": ({"scale": "2"}, InputError, "scale is '2'"),
    "a size off the latents": ({"size": (100, 64)}, SizeError, "100x64.*multiples of 8"),
    "a negative size": ({"size": (-64, 64)}, SizeError, "-64x64"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(pipe: Any, what: str) -> None:
    options, kind, words = BAD[what]
    with pytest.raises(kind, match=words):
        hires(pipe, "a", num_inference_steps=1, **size(64, 64), **options)
