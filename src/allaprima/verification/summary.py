"""Many reports in one verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from .judging import MAX_MEDIAN_RATIO, MIN_PSNR, Check, Errors
from .metrics import highest, lowest, median, ratio
from .report import Report, finite


@dataclass(frozen=True)
class Summary:
    """Many reports in one verdict.

    failed     drawings that fail whatever the others do
    scattered  drawings in half precision of which only the median step's error is above the limit for the median
               drawing, and by less than twice: with a spread of 3 % some are.  That limit is for `checks`, which judge
               the median drawing
    """

    count: int
    failed: tuple[str, ...]
    scattered: tuple[str, ...]
    psnr_lowest: float
    psnr_median: float
    ssim_lowest: float
    latent_difference_highest: float
    picture_ratio_median: float | None
    latents_ratio_median: float | None
    step_ratio_median: float | None
    checks: tuple[Check, ...]
    fallbacks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failed and bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return finite({"passed": self.passed, **asdict(self), "checks": checks})  # type: ignore[no-any-return]

    def __str__(self) -> str:
        lines = [
            f"{'passed' if self.passed else 'FAILED'}: {self.count - len(self.failed)} of {self.count} drawings",
            *(f"  {check}" for check in self.checks),
            f"  PSNR to eager: lowest {self.psnr_lowest:.1f} dB, median {self.psnr_median:.1f} dB; "
            f"lowest SSIM {self.ssim_lowest:.5f}; largest latent difference {self.latent_difference_highest:.2e}",
            *(f"  failed: {name}" for name in self.failed),
            *(f"  above the median's limit: {name}" for name in self.scattered),
            *(f"  ran eager: {reason}" for reason in self.fallbacks),
        ]
        return "\n".join(lines)


def summarize(reports: Sequence[Report]) -> Summary:
    """raises   InputError, when there is nothing to sum up"""
    if not reports:
        raise InputError("There is no report to sum up.")
    pairs = [(r.eager, r.ours) for r in reports if r.eager and r.ours]
    medians = {
        name: median([ratio(get(ours), get(eager)) for eager, ours in pairs]) if pairs else None
        for name, get in _FREE_ERRORS.items()
    }
    return Summary(
        count=len(reports),
        failed=tuple(r.title for r in reports if not r.passed_among_many),
        scattered=tuple(r.title for r in reports if r.passed_among_many and not r.passed),
        psnr_lowest=lowest([r.psnr for r in reports]),
        psnr_median=median([r.psnr for r in reports]),
        ssim_lowest=lowest([r.ssim for r in reports]),
        latent_difference_highest=highest([highest(r.latent_differences) for r in reports]),
        picture_ratio_median=medians["picture"],
        latents_ratio_median=medians["latents"],
        step_ratio_median=medians["step"],
        checks=_checks_of_many(reports, medians),
        fallbacks=tuple(dict.fromkeys(line for r in reports for line in r.fallbacks)),
    )


_FREE_ERRORS: dict[str, Callable[[Errors], float]] = {
    "picture": lambda errors: errors.picture,
    "latents": lambda errors: errors.latents,
    "step": lambda errors: median(errors.steps),
}


def _checks_of_many(reports: Sequence[Report], medians: Mapping[str, float | None]) -> tuple[Check, ...]:
    if reports[0].truth is None or reports[0].dtype == "float32":
        return (Check("PSNR to eager, dB, lowest", lowest([r.psnr for r in reports]), MIN_PSNR, at_least=True),)
    names = {"picture": "the picture", "latents": "the last latents", "step": "the noise prediction"}
    return tuple(
        Check(f"error of {names[key]} over eager's, median drawing", value, MAX_MEDIAN_RATIO)
        for key, value in medians.items()
        if value is not None
    )
