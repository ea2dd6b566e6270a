from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from allaprima.verification import verify
from tests.verification.sabotage import SMALL, optimized


def test_files(tmp_path: Path) -> None:
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
