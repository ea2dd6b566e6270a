"""NaN and Inf: an error or a second decode in float32, never a black picture, never a stop inside the loop."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import NumericsError
from allaprima.numerics import NumericsGuard
from allaprima.pipelines import as_task, eager
from tests.test_pipelines import FAST, PICTURE, draw
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


def optimized(cache: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return ap.optimize(tiny_pipeline(dtype=dtype), Config(**{"backend": "aten", "cache_dir": cache, **settings}))


def fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Overwrite one number; returns what was there."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[0] = value
    return before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_broken_unet_is_an_error_and_passes(cache: Path, value: float, backend: str, output_type: str) -> None:
    pipe = optimized(cache, backend=backend)
    good = draw(pipe)
    before = fill(pipe.unet.conv_out.bias, value)
    with pytest.raises(NumericsError, match="UNet"):
        draw(pipe, output_type=output_type)
    with torch.no_grad():
        pipe.unet.conv_out.bias.copy_(before)
    assert np.array_equal(draw(pipe), good)


def test_a_run_that_was_broken_off_leaves_no_flag(cache: Path) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError

    pipe = optimized(cache)
    before = fill(pipe.unet.conv_out.bias, math.nan)
    with pytest.raises(KeyError):
        draw(pipe, callback_on_step_end=fail)
    with torch.no_grad():
        pipe.unet.conv_out.bias.copy_(before)
    assert np.isfinite(draw(pipe)).all()


def test_bad_latents_are_an_error(cache: Path) -> None:
    pipe = optimized(cache)
    with pytest.raises(NumericsError):
        pipe.vae.decode(torch.full((1, 4, 8, 8), math.nan))
    with pytest.raises(NumericsError):
        draw(pipe, latents=torch.full((1, 4, 8, 9), math.inf))


def test_a_bad_picture_to_start_from_is_an_error(cache: Path) -> None:
    pipe = optimized(cache)
    task = as_task(pipe, "img2img")
    fill(pipe.vae.encoder.conv_out.bias, math.nan)
    with pytest.raises(NumericsError):
        draw(task, image=PICTURE, strength=0.7, height=None)


def overflowing(pipe: Any) -> Any:
    """Let the decoder's first convolution leave float16's range (65504); the norm after it brings float32 back."""
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 2e4
    return pipe


def test_a_decoder_that_overflows_in_float16_decodes_in_float32(cache: Path) -> None:
    pipe = overflowing(optimized(cache, torch.float16))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half() * 20
    with eager(pipe), torch.no_grad():
        assert not torch.isfinite(pipe.vae.decode(latents).sample).all(), "the test's decoder should overflow"
    with pytest.warns(RuntimeWarning, match="float32"), torch.no_grad():
        picture = pipe.vae.decode(latents).sample
    assert torch.isfinite(picture).all()
    assert picture.std() > 0
    truth = pipe.vae.to(torch.float32)
    with eager(pipe), torch.no_grad():
        expected = truth.decode(latents.float()).sample
    torch.testing.assert_close(picture.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_whole_picture_is_drawn_when_the_decoder_overflows(cache: Path) -> None:
    pipe = optimized(cache, torch.bfloat16)
    decoder_forward = pipe.vae.decoder.__dict__["forward"]
    original, seen = decoder_forward.original, []

    def overflow(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0].dtype)
        return torch.full_like(original(*args, **kwargs), math.inf)

    decoder_forward._run = lambda args, kwargs: overflow(*args, **kwargs)
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        picture = draw(pipe)
    assert seen == [torch.bfloat16]
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01


def test_a_decoder_that_is_broken_in_float32_too_is_an_error(cache: Path) -> None:
    pipe = optimized(cache)
    fill(pipe.vae.decoder.conv_out.bias, math.nan)
    with pytest.warns(RuntimeWarning), pytest.raises(NumericsError, match="even in float32"):
        draw(pipe)


def test_good_pictures_come_without_a_warning(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        draw(optimized(cache))


def test_the_check_can_be_turned_off(cache: Path) -> None:
    pipe = optimized(cache, check_numerics=False)
    fill(pipe.unet.conv_out.bias, math.nan)
    assert not torch.isfinite(torch.as_tensor(draw(pipe, output_type="latent"))).all()


def test_the_flag_is_not_read_inside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = NumericsGuard()

    def reads(*_: Any) -> Any:
        raise AssertionError("the flag was read")

    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, reads)
        for value in (1.0, math.nan, 1.0):
            guard.watch((torch.tensor([value]),), ())
    with pytest.raises(NumericsError):
        guard.check()
    guard.check()


def test_a_run_reads_the_flag_once_after_its_last_step(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = optimized(cache)
    order: list[str] = []
    watch, check = NumericsGuard.watch, NumericsGuard.check
    monkeypatch.setattr(NumericsGuard, "watch", lambda *a: (order.append("step"), watch(*a))[1])
    monkeypatch.setattr(NumericsGuard, "check", lambda *a: (order.append("check"), check(*a))[1])
    pipe = optimized(cache)
    draw(pipe)
    assert order[: FAST["num_inference_steps"] + 1].count("check") == 0
    assert "step" not in order[order.index("check") :]
