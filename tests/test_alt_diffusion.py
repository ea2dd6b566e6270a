"""AltDiffusion: our encoder equals diffusers' own, reads its folders, and draws the same pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AltDiffusionImg2ImgPipeline, AltDiffusionPipeline, StableDiffusionPipeline

import allaprima as ap
from allaprima.alt_diffusion import CLASSES, AltTextEncoder, load_alt_diffusion
from allaprima.config import Config
from allaprima.errors import CheckpointError
from allaprima.pipelines import as_task, engines
from tests.pipelines.comparing import (
    captures,
    difference,
    draw,
    no_fallbacks,
    same_as_eager,
    same_at_all_sizes,
    size,
    start,
)
from tests.tiny import tiny_alt_encoder, tiny_alt_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*AltDiffusion.*is deprecated:FutureWarning")

THEIRS = pytest.importorskip("diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series")
PROMPT, LONG = "红色的苹果", "红色的苹果，绿树和房子，太阳和月亮在天上" * 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def pipe(cache: Path) -> Any:
    return ap.optimize(tiny_alt_pipeline(), Config(backend="aten", cache_dir=cache))


def their_encoder(ours: AltTextEncoder) -> Any:
    config = THEIRS.RobertaSeriesConfig(**{k: v for k, v in ours.config.to_dict().items() if k != "model_type"})
    theirs = THEIRS.RobertaSeriesModelWithTransformation(config).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all("pooler" in key for key in missing)
    return theirs


@pytest.fixture(scope="module")
def theirs() -> Any:
    """diffusers' pipeline of diffusers' encoder."""
    parts = dict(tiny_alt_pipeline().components)
    parts["text_encoder"] = their_encoder(parts["text_encoder"])
    pipe = AltDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["alt_diffusion", "diffusers"])
def folder(request: pytest.FixtureRequest, theirs: Any, tmp_path: Path) -> Path:
    """As published, and as diffusers saves it today."""
    theirs.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    entries = json.loads(index.read_text())
    assert entries["_class_name"] in CLASSES
    entries["text_encoder"][0] = request.param
    index.write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("pre", [True, False], ids=["normalised", "plain"])
def test_our_encoder_is_theirs(pre: bool) -> None:
    ours = tiny_alt_encoder(has_pre_transformation=pre)
    theirs = their_encoder(ours)
    tokens = torch.randint(5, 40, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, 12:] = 0
    with torch.no_grad():
        a, b = ours(tokens, attention_mask=mask), theirs(tokens, attention_mask=mask)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a.last_hidden_state, b.last_hidden_state)
        assert ours(tokens, output_hidden_states=True, return_dict=False)[-1][-1].shape == (2, 20, 48)


def test_every_size(pipe: Any) -> None:
    same_at_all_sizes(pipe, size, prompt=PROMPT)
    before = captures(pipe)
    same_as_eager(pipe, LONG, negative_prompt=PROMPT, **size(64, 64))
    assert captures(pipe) == before


def test_img2img(pipe: Any) -> None:
    same_at_all_sizes(as_task(pipe, "img2img"), start, prompt=PROMPT)


def test_clip_skip_takes_the_layer_before(pipe: Any) -> None:
    """The model itself takes the last layer but one, which is what clip_skip=1 asks for."""
    assert difference(draw(pipe, PROMPT, **size(64, 64)), draw(pipe, PROMPT, clip_skip=1, **size(64, 64))) < 1e-5
    assert difference(draw(pipe, PROMPT, **size(64, 64)), draw(pipe, PROMPT, clip_skip=2, **size(64, 64))) > 1e-3
    no_fallbacks(pipe)


def test_a_folder_is_read_without_diffusers_classes(folder: Path) -> None:
    found = load_alt_diffusion(folder)
    assert type(found) is StableDiffusionPipeline
    assert type(found.text_encoder) is AltTextEncoder
    found.set_progress_bar_config(disable=True)
    assert difference(draw(found, PROMPT, **size(64, 64)), draw(tiny_alt_pipeline(), PROMPT, **size(64, 64))) == 0


def test_diffusers_own_pipelines(theirs: Any, cache: Path) -> None:
    plain = draw(theirs, PROMPT, **size(64, 64))
    assert difference(plain, draw(tiny_alt_pipeline(), PROMPT, **size(64, 64))) == 0
    ap.optimize(theirs, Config(backend="aten", cache_dir=cache))
    assert engines(theirs).keys() == {"text_encoder", "unet", "vae.decoder", "vae.encoder"}
    same_as_eager(theirs, PROMPT, **size(64, 72))
    twin = as_task(theirs, "img2img")
    assert type(twin) is AltDiffusionImg2ImgPipeline
    same_as_eager(twin, PROMPT, **start(64, 64))
    assert type(as_task(twin, "text2img")) is AltDiffusionPipeline
    ap.restore(theirs)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="AltDiffusion"):
        load_alt_diffusion(tmp_path)


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_alt_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, size, [(64, 64, 1), (72, 88, 2)], prompt=PROMPT)
