"""What diffusers does with pipelines, done to optimized ones: classes, tiles, offloading, copies, dtypes, folders."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

import allaprima as ap
from allaprima.config import Config
from allaprima.engine import Engine
from allaprima.errors import ConfigError
from allaprima.pipelines import engines, state
from tests.pipelines.comparing import (
    captures,
    difference,
    draw,
    mask,
    no_fallbacks,
    picture,
    same_as_eager,
    size,
    start,
)
from tests.tiny import TWO_LEVELS, tiny_controlnet, tiny_controlnet_pipeline, tiny_pipeline, tiny_unet, tiny_xl_pipeline


@pytest.fixture(scope="module")
def xl(cache: Path) -> Any:
    return ap.optimize(tiny_xl_pipeline(), Config(backend="aten", cache_dir=cache))


@pytest.fixture
def sd(cache: Path) -> Any:
    """One that the test may break."""
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(**TWO_LEVELS)
    return ap.optimize(pipe, Config(backend="aten", cache_dir=cache))


# ---- another pipeline of the same parts


@pytest.mark.parametrize(
    ("auto", "options"),
    [
        (AutoPipelineForText2Image, size(64, 72)),
        (AutoPipelineForImage2Image, start(64, 72)),
        (AutoPipelineForInpainting, start(64, 72) | size(64, 72) | {"mask_image": mask(64, 72)}),
    ],
    ids=["text2img", "img2img", "inpaint"],
)
def test_auto_pipelines_run_on_the_same_engines(xl: Any, auto: Any, options: dict[str, Any]) -> None:
    twin = auto.from_pipe(xl)
    twin.set_progress_bar_config(disable=True)
    assert twin.unet is xl.unet
    calls = ap.explain(xl).calls["unet"]
    ours = draw(twin, **options)
    assert ap.explain(xl).calls["unet"] > calls
    with ap.pipelines.eager(xl):
        assert difference(ours, draw(twin, **options)) < 2e-4
    no_fallbacks(xl)


def test_from_pipe_may_be_optimized_as_well(xl: Any, cache: Path) -> None:
    """The newest owner has the engines; what it finds on disk is not captured again."""
    twin = ap.optimize(StableDiffusionXLImg2ImgPipeline.from_pipe(xl), Config(backend="aten", cache_dir=cache))
    twin.set_progress_bar_config(disable=True)
    same_as_eager(twin, **start(64, 72))
    ap.restore(twin)
    ap.optimize(xl, Config(backend="aten", cache_dir=cache))
    same_as_eager(xl, **size(64, 72))


def test_a_pipeline_whose_first_form_is_gone_keeps_its_schedule(cache: Path) -> None:
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(**TWO_LEVELS)
    twin = AutoPipelineForImage2Image.from_pipe(ap.optimize(pipe, Config(backend="aten", cache_dir=cache)))
    twin.set_progress_bar_config(disable=True)
    draw(twin, **start(64, 64))
    engine, gone = engines(pipe)["unet"], weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    runs = engine.events.stage_runs["SCHEDULE"]
    draw(twin, **start(64, 64) | {"strength": 1.0, "num_inference_steps": 5})
    assert engine.events.stage_runs["SCHEDULE"] == runs + 1
    assert engine.events.fallbacks == {}


def test_a_controlnet_joins_later(sd: Any, cache: Path) -> None:
    twin = StableDiffusionControlNetPipeline.from_pipe(sd, controlnet=tiny_controlnet())
    twin.set_progress_bar_config(disable=True)
    hint = {"image": picture(64, 72)}
    ours = draw(twin, **hint)
    assert difference(ours, draw(tiny_controlnet_pipeline(), **hint)) < 2e-4
    ap.optimize(twin, Config(backend="aten", cache_dir=cache))
    assert "controlnet" in engines(twin)
    assert difference(ours, same_as_eager(twin, **hint)) < 2e-4


# ---- the decoder in parts


@pytest.mark.parametrize("sizes", [(64, 64), pytest.param((200, 136), marks=pytest.mark.slow)])
def test_tiles_and_slices(sd: Any, sizes: tuple[int, int]) -> None:
    draw(sd, **size(64, 64))
    draw(ap.pipelines.as_task(sd, "img2img"), **start(64, 64))
    before = captures(sd)
    sd.vae.enable_tiling()
    sd.vae.tile_sample_min_size, sd.vae.tile_latent_min_size = 64, 8
    sd.vae.enable_slicing()
    tiled = same_as_eager(sd, **size(*sizes), num_images_per_prompt=2)
    same_as_eager(ap.pipelines.as_task(sd, "img2img"), **start(*sizes))
    sd.vae.disable_tiling()
    sd.vae.disable_slicing()
    whole = same_as_eager(sd, **size(*sizes), num_images_per_prompt=2)
    assert (difference(tiled, whole) > 1e-3) == (sizes != (64, 64))
    edges = ap.explain(sd).discharged  # a tile of one row is looked at once, in decoder and encoder
    assert captures(sd) == before + edges
    assert edges <= 2
    no_fallbacks(sd)


# ---- weights that go away


def model_offload(pipe: Any) -> None:
    """enable_model_cpu_offload, which wants an accelerator, gives each component such a hook."""
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload_with_hook(part, execution_device="cpu")


def sequential_offload(pipe: Any) -> None:
    """enable_sequential_cpu_offload gives each layer one."""
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [model_offload, sequential_offload])
def test_offloading_is_refused_and_can_be_taken_back(sd: Any, cache: Path, offload: Callable[[Any], None]) -> None:
    before = draw(sd, **size(64, 64))
    offload(sd)
    with pytest.raises(ConfigError, match=r"unet.*remove_all_hooks"):
        draw(sd, **size(64, 64))
    with pytest.raises(ConfigError, match=r"unet.*remove_all_hooks"):
        ap.optimize(sd, Config(backend="aten", cache_dir=cache))
    sd.remove_all_hooks()
    sd.to("cpu")
    ap.optimize(sd, Config(backend="aten", cache_dir=cache))
    assert difference(before, draw(sd, **size(64, 64))) == 0
    no_fallbacks(sd)


def test_restored_pipelines_may_be_offloaded(sd: Any) -> None:
    before = draw(sd, **size(64, 64))
    ap.restore(sd)
    model_offload(sd)
    assert difference(before, draw(sd, **size(64, 64))) < 2e-4


# ---- folders, copies, dtypes


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("build", [tiny_xl_pipeline, pytest.param(tiny_controlnet_pipeline, marks=pytest.mark.slow)])
def test_a_saved_folder_is_a_plain_pipelines(build: Any, cache: Path, tmp_path: Path) -> None:
    pipe = build()
    options = {"image": picture(64, 64)} if build is tiny_controlnet_pipeline else size(64, 64)
    draw(pipe, **options)  # tokenizers write down how they were used last
    pipe.save_pretrained(tmp_path / "plain")
    ap.optimize(pipe, Config(backend="aten", cache_dir=cache))
    draw(pipe, **options)
    before = captures(pipe)
    pipe.save_pretrained(tmp_path / "optimized")
    draw(pipe, **options)
    assert captures(pipe) == before, "diffusers writes its class into the configuration when it saves"
    assert list(files(tmp_path / "plain")) == list(files(tmp_path / "optimized"))
    loaded = ap.load(tmp_path / "optimized", dtype="float32", device="cpu")
    assert type(loaded) is type(pipe)


def test_a_copy_is_a_plain_pipeline(xl: Any) -> None:
    before = draw(xl, **size(64, 64))
    twin = copy.deepcopy(xl)
    assert state(twin) is None
    assert not [part for part in (twin.unet, twin.text_encoder_2) if isinstance(part.__dict__.get("forward"), Engine)]
    assert difference(before, draw(twin, **size(64, 64))) < 2e-4
    assert difference(before, draw(xl, **size(64, 64))) == 0


def test_a_pickle_is_a_plain_pipeline(sd: Any) -> None:
    before = draw(sd, **size(64, 64))
    twin = pickle.loads(pickle.dumps(sd))
    assert state(twin) is None
    assert difference(before, draw(twin, **size(64, 64))) < 2e-4


@pytest.mark.slow
def test_another_dtype_and_back(xl: Any) -> None:
    before = draw(xl, **size(64, 64))
    xl.to(torch.bfloat16)
    draw(xl, **size(64, 64))
    count = captures(xl)
    draw(xl, **size(72, 64))
    assert captures(xl) == count
    xl.to(torch.float32)
    assert difference(before, draw(xl, **size(64, 64))) < 0.2  # the weights were rounded
    no_fallbacks(xl)
