"""Every condition of a verdict must be able to fail: the optimized side is sabotaged in each way that matters."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import allaprima
from allaprima.errors import ConfigError, InputError
from allaprima.pipelines import engines
from allaprima.verification import TASKS, Task, precise_copy, summarize, verify, verify_many
from tests.tiny import tiny_pipeline
from tests.verification.sabotage import SMALL, Change, noise, optimized


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
    precise = precise_copy(pipe, torch.float32)
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
def test_other_tasks(task: Task) -> None:
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


def test_many() -> None:
    pipe = optimized(torch.bfloat16)
    reports = verify_many(pipe, ["a cat", "a dog"], [(64, 64), (72, 64)], num_inference_steps=2, progress=False, seed=5)
    summary = summarize(reports)
    assert summary.count == 12
    assert summary.passed, summary
    assert {r.drawing.task for r in reports} == set(TASKS)
    assert {r.drawing.seed for r in reports} == {5, 6}
    assert json.dumps(summary.as_dict())
    assert summary.picture_ratio_median == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_real_optimizer(dtype: torch.dtype) -> None:
    pipe = allaprima.optimize(tiny_pipeline(dtype=dtype))
    reports = verify_many(pipe, ["a red apple"], [(64, 64), (104, 72)], num_inference_steps=4, progress=False)
    summary = summarize(reports)
    assert summary.passed, "\n".join(map(str, [summary, *reports]))
    assert not summary.fallbacks
