"""Every condition of a verdict must be able to fail: the optimized side is sabotaged in each way that matters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allaprima
from allaprima import verification
from allaprima.errors import ConfigError, InputError
from allaprima.pipelines import engines
from allaprima.verification import Check, Drawing, Errors, psnr, record, ssim, summarize, verify
from tests.tiny import tiny_pipeline

SMALL = dict(num_inference_steps=3, height=64, width=72)
Change = Callable[[torch.Tensor, int], torch.Tensor]


def optimized(dtype: torch.dtype = torch.float32, **changes: Change) -> Any:
    """A pipeline whose engines run the eager modules; `changes` distort what an engine returns at its n-th call."""
    pipe = allaprima.optimize(tiny_pipeline(dtype=dtype))
    for name, engine in engines(pipe).items():
        engine._run = _distorted(engine, changes.get(name.replace(".", "_"), lambda x, n: x))
    return pipe


def _distorted(engine: Any, change: Change) -> Callable[..., Any]:
    calls = 0

    def run(args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = engine.original(*args, **kwargs)
        return change(result, calls) if isinstance(result, torch.Tensor) else (change(result[0], calls), *result[1:])

    return run


def noise(scale: float) -> Change:
    def change(x: torch.Tensor, n: int) -> torch.Tensor:
        return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)).to(x)

    return change


def test_equal_pictures_pass() -> None:
    report = verify(optimized(), "a red apple", count=2, **SMALL)
    assert report.passed
    assert report.psnr == math.inf
    assert report.ssim == pytest.approx(1)
    assert report.latent_differences == (0.0,) * 4  # PNDM takes one more call than steps
    assert [len(pictures) for pictures in report.images] == [2, 2]
    assert report.images[0][0].size == (72, 64)
    assert report.error_eager is None
    assert str(report).startswith("passed")


def test_a_wrong_picture_fails_in_float32() -> None:
    report = verify(optimized(unet=noise(0.01)), "a red apple", **SMALL)
    assert not report.passed
    assert report.psnr < 60
    assert max(report.latent_differences) > 0
    assert "FAIL" in str(report)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, None),
        ({"unet": noise(0.01)}, "median step"),
        ({"unet": lambda x, n: x * 1.2 if n % 4 == 2 else x}, "worst step"),
        ({"vae_decoder": noise(0.05)}, "decoding"),
        ({"text_encoder": noise(0.5)}, "median step"),
    ],
    ids=["equal", "every step", "one step", "decoder", "text encoder"],
)
def test_half_precision_is_judged_by_float32(changes: dict[str, Change], failing: str | None) -> None:
    report = verify(optimized(torch.bfloat16, **changes), "a red apple", **SMALL)
    failed = [check.name for check in report.checks if not check.passed]
    assert report.truth == "float32"
    assert report.passed == (failing is None)
    assert report.error_eager
    if failing:
        assert any(failing in name for name in failed), report


def test_less_error_than_eager_passes() -> None:
    """Ours may differ from eager as it likes, if it is nearer to the truth."""
    pipe = optimized(torch.bfloat16)
    precise = verification.precise_copy(pipe, torch.float32)
    engine = engines(pipe)["unet"]

    def run(args: Any, kwargs: Any) -> Any:
        wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return (precise.unet(args[0].float(), args[1], **wide)[0].to(torch.bfloat16),)

    engine._run = run
    report = verify(pipe, "a red apple", **SMALL)
    assert report.passed, report
    assert report.psnr < math.inf
    assert report.eager
    assert report.ours
    assert np.median(report.ours.steps) < np.median(report.eager.steps)


def test_without_truth_half_precision_is_not_judged() -> None:
    report = verify(optimized(torch.bfloat16), "a red apple", truth=False, **SMALL)
    assert not report.passed
    assert report.verdict.startswith("not judged")


def test_float64_can_be_the_truth_of_float32() -> None:
    report = verify(optimized(), "a red apple", truth="float64", **SMALL)
    assert report.passed
    assert report.truth == "float64"
    assert report.error_eager
    assert report.error_eager < 1e-3
    assert report.error_ours == report.error_eager


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_other_tasks(task: verification.Task) -> None:
    report = verify(optimized(torch.bfloat16), "a red apple", task=task, count=2, **SMALL)
    assert report.passed, report
    wrong = verify(optimized(torch.bfloat16, vae_encoder=noise(0.5)), "a red apple", task=task, **SMALL)
    assert not wrong.passed, wrong


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = optimized()
    pipe.set_progress_bar_config(desc="mine", disable=True)
    verify(pipe, "a red apple", **SMALL)
    assert "step" not in pipe.scheduler.__dict__
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert engines(pipe)


def test_wrong_requests() -> None:
    with pytest.raises(ConfigError, match="not optimized"):
        verify(tiny_pipeline(), "a red apple")
    with pytest.raises(InputError, match="allowed: text2img"):
        verify(optimized(), "a red apple", task="txt2img")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float64"):
        verify(optimized(), "a red apple", truth="bfloat16")  # type: ignore[arg-type]


def test_a_wider_run_starts_from_the_same_noise() -> None:
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    narrow = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.bfloat16)
    with verification._NoiseIn(torch.bfloat16):
        wide = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(narrow.float(), wide)


def test_given_latents_are_handed_on() -> None:
    pipe = tiny_pipeline()
    free = record(pipe, Drawing("a red apple", **SMALL))
    other = record(pipe, Drawing("two cats", seed=1, **SMALL), latents=free.latents)
    assert np.array_equal(free.pixels, other.pixels)  # decoded from the same last latents
    assert not torch.equal(free.predictions[1], other.predictions[1])


# ---- measures ------------------------------------------------------------------------------------------------------


def test_psnr() -> None:
    a = np.zeros((8, 8, 3), np.float32)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + np.float32(0.001)) == pytest.approx(60, abs=1e-3)


def test_ssim_of_flat_pictures_is_the_formula() -> None:
    a, b = np.full((16, 20, 3), 0.2, np.float32), np.full((16, 20, 3), 0.6, np.float32)
    assert ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-6)


def test_ssim_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((13, 12, 1)).astype(np.float32)
    b = (0.7 * a + 0.3 * rng.random(a.shape)).astype(np.float32)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for top in range(3):
        for left in range(2):
            x, y = (p[top : top + 11, left : left + 11, 0].astype(float) for p in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            vxy = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_ratio_of_errors() -> None:
    assert verification.ratio(2.0, 1.0) == 2
    assert verification.ratio(0.0, 0.0) == 0
    assert verification.ratio(1e-9, 0.0) == math.inf


def test_a_check_fails_on_nan() -> None:
    assert not Check("x", math.nan, 1.0).passed
    assert not Check("x", math.nan, 1.0, at_least=True).passed
    assert Check("x", 60.0, 60.0, at_least=True).passed
    fine, nan = Errors((1.0,), (1.0,), 1.0, 1.0, 1.0), Errors((math.nan,), (1.0,), 1.0, 1.0, 1.0)
    assert all(check.passed for check in verification.judge([10.0], fine, fine, half=True))
    assert not all(check.passed for check in verification.judge([10.0], fine, nan, half=True))
    assert not verification.judge([math.nan, 99.0], None, None, half=False)[0].passed


# ---- what is written -----------------------------------------------------------------------------------------------


def test_files(tmp_path: Any) -> None:
    report = verify(optimized(), "苹果", count=2, **SMALL)
    report.save(tmp_path / "new" / "sheet.png", tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["passed"] is True
    assert found["psnr"] == "inf"
    assert found["drawing"] == {
        "prompt": "苹果", "negative_prompt": None, "height": 64, "width": 72, "num_inference_steps": 3,
        "guidance_scale": 7.5, "seed": 0, "task": "text2img", "count": 2,
    }  # fmt: skip
    assert {"checks", "ssim", "psnrs", "ssims", "latent_differences", "errors", "fallbacks", "dtype", "truth"} <= set(
        found
    )
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 3 * 72
        assert sheet.height > 2 * 64


def test_the_difference_is_shown_sixteenfold() -> None:
    report = verify(optimized(vae_decoder=lambda x, n: x + 0.02), "a red apple", **SMALL)
    shown = np.asarray(report.differences[0]).astype(int)
    eager, ours = (np.asarray(pictures[0]).astype(int) for pictures in report.images)
    assert abs(np.median(shown) - 16 * 0.01 * 255) < 2  # 0.02 of the decoder's -1 to 1 is 0.01 of 0 to 1
    assert np.median(np.abs(eager - ours)) in (2, 3)


# ---- many ----------------------------------------------------------------------------------------------------------


def test_many() -> None:
    pipe = optimized(torch.bfloat16)
    reports = verification.verify_many(
        pipe, ["a cat", "a dog"], [(64, 64), (72, 64)], num_inference_steps=2, progress=False, seed=5
    )
    summary = summarize(reports)
    assert summary.count == 12
    assert summary.passed, summary
    assert {r.drawing.task for r in reports} == set(verification.TASKS)
    assert {r.drawing.seed for r in reports} == {5, 6}
    assert json.dumps(summary.as_dict())
    assert summary.picture_ratio_median == 1


def test_one_failure_among_many_fails() -> None:
    good = verify(optimized(), "a cat", **SMALL)
    bad = verify(optimized(unet=noise(0.01)), "a dog", **SMALL)
    summary = summarize([good, bad, good])
    assert not summary.passed
    assert len(summary.failed) == 1
    assert "a dog" in summary.failed[0]
    with pytest.raises(InputError):
        summarize([])


def test_prompts() -> None:
    for model, count in (("emoji", 100), ("emoji-zh-3d", 100), ("another", 40)):
        assert len(set(verification.prompts_for(model, count))) == count
    assert not any(prompt.isascii() for prompt in verification.prompts_for("emoji-zh", 20))
    assert len(verification.prompts_for("another", 100)) == 100


# ---- with the real engines -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_real_optimizer(dtype: torch.dtype) -> None:
    pipe = allaprima.optimize(tiny_pipeline(dtype=dtype))
    reports = verification.verify_many(
        pipe, ["a red apple"], [(64, 64), (104, 72)], num_inference_steps=4, progress=False
    )
    summary = summarize(reports)
    assert summary.passed, "\n".join(map(str, [summary, *reports]))
    assert not summary.fallbacks
