"""What one verification found, as text, JSON and a contact sheet."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .drawing import Drawing
from .judging import Check, Errors
from .metrics import highest, lowest
from .sheet import contact_sheet


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    images               the pictures of (eager, ours), as lists
    psnr, ssim           of ours to eager, the lowest of all images
    latent_differences   the largest absolute difference of the latents to eager's after each step
    error_eager, error_ours   error of the picture against the float32 run, or None where there was none
    eager, ours          the same in detail
    fallbacks            calls that ran eager inside the optimized pipeline, and why
    """

    drawing: Drawing
    dtype: str
    device: str
    truth: str | None
    images: tuple[list[Image.Image], list[Image.Image]]
    differences: list[Image.Image]
    psnrs: tuple[float, ...]
    ssims: tuple[float, ...]
    latent_differences: tuple[float, ...]
    eager: Errors | None
    ours: Errors | None
    checks: tuple[Check, ...]
    fallbacks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def passed_among_many(self) -> bool:
        return bool(self.checks) and all(check.passed_among_many for check in self.checks)

    @property
    def verdict(self) -> str:
        if not self.checks:
            return "not judged: in half precision the judge is a float32 run (truth=True)"
        return "passed" if self.passed else "FAILED"

    @property
    def label(self) -> str:
        """One line above its pictures on a contact sheet."""
        return f"{self.verdict.split(':')[0]} {self.title}"

    @property
    def title(self) -> str:
        """What was drawn, in one line."""
        (width, height), drawing = self.images[1][0].size, self.drawing
        return f"{drawing.task} {width}x{height} seed {drawing.seed} {self.psnr:.1f} dB  {drawing.prompt}"

    @property
    def psnr(self) -> float:
        return lowest(self.psnrs)

    @property
    def ssim(self) -> float:
        return lowest(self.ssims)

    @property
    def error_eager(self) -> float | None:
        return self.eager.picture if self.eager else None

    @property
    def error_ours(self) -> float | None:
        return self.ours.picture if self.ours else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that JSON does not know are the strings "inf" and "nan"."""
        width, height = self.images[1][0].size
        found = {
            "passed": self.passed,
            "verdict": self.verdict,
            "drawing": {**self.drawing.as_dict(), "width": width, "height": height},
            "dtype": self.dtype,
            "device": self.device,
            "truth": self.truth,
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
            "psnr": self.psnr,
            "ssim": self.ssim,
            "psnrs": self.psnrs,
            "ssims": self.ssims,
            "latent_differences": self.latent_differences,
            "errors": {"eager": self.eager and asdict(self.eager), "ours": self.ours and asdict(self.ours)},
            "fallbacks": self.fallbacks,
        }
        return finite(found)  # type: ignore[no-any-return]

    def save(self, png: str | Path | None = None, json_file: str | Path | None = None) -> None:
        """Write the contact sheet (eager, ours, difference ×16) and the numbers."""
        if png is not None:
            contact_sheet([self]).save(parent_made(png))
        if json_file is not None:
            write_json(json_file, self.as_dict())

    def __str__(self) -> str:
        width, height = self.images[1][0].size
        drawing = self.drawing
        lines = [
            f"{self.verdict}  {drawing.prompt!r} {drawing.task} {width}x{height}, {drawing.num_inference_steps} steps, "
            f"seed {drawing.seed}, {drawing.count} image(s), {self.dtype} on {self.device}",
            *(f"  {check}" for check in self.checks),
            f"  PSNR to eager {self.psnr:.1f} dB, SSIM {self.ssim:.5f}, "
            f"largest latent difference {highest(self.latent_differences):.2e}",
        ]
        if self.eager and self.ours:
            lines.append(
                f"  picture against {self.truth}, rms of 0..1: "
                f"eager {self.eager.picture:.2e}, ours {self.ours.picture:.2e}"
            )
        lines += [f"  ran eager: {reason}" for reason in self.fallbacks]
        return "\n".join(lines)


def finite(value: Any) -> Any:
    """Lists, dicts and numbers as JSON can hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: str | Path, value: Any) -> None:
    parent_made(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parent_made(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
