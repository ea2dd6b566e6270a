"""The conditions of a verdict: what the errors of eager and ours may be.

A free run amplifies rounding: after twenty steps two correct programs in bf16 differ by a visible amount, and which of
the two lies nearer to the truth is chance.  So errors are also taken one step at a time: the float32 run and ours are
given eager's latents after every step, and each noise prediction and each decoding is judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .metrics import highest, lowest, median, median_rms, ratio, relative_error
from .recording import Trace

MIN_PSNR = 60.0  # float32: a root mean square of 0.001 of the range, a quarter of one 8-bit level
MAX_MEDIAN_RATIO = 1.1  # half precision: the median error of ours over eager's
MAX_RATIO = 2.0  # half precision: the same for any single step


@dataclass(frozen=True)
class Errors:
    """How far one variant is from the truth.  All are relative to the root mean square of the truth, but for pictures.

    steps          the noise prediction of each step, from the same latents
    step_latents   the latents after each step, from the same latents before it
    decode         the picture decoded from the same latents, root mean square of the 0 to 1 range
    latents        the last latents of a free run         picture   the picture of a free run, as `decode`
    """

    steps: tuple[float, ...]
    step_latents: tuple[float, ...]
    decode: float
    latents: float
    picture: float

    @classmethod
    def of(cls, stepwise: Trace, free: Trace, true_stepwise: Trace, true_free: Trace) -> Errors:
        return cls(
            steps=tuple(map(relative_error, stepwise.predictions, true_stepwise.predictions)),
            step_latents=tuple(map(relative_error, stepwise.latents, true_stepwise.latents)),
            decode=median_rms(stepwise.pixels, true_stepwise.pixels),
            latents=relative_error(free.latents[-1], true_free.latents[-1]),
            picture=median_rms(free.pixels, true_free.pixels),
        )


@dataclass(frozen=True)
class Check:
    """One condition of the verdict.  A value that is no number fails.

    scatters  the limit is one for the median of many drawings, which a single one may miss by chance
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    scatters: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def passed_among_many(self) -> bool:
        """As one of many drawings, whose median has a condition of its own."""
        return self.passed or (self.scatters and self.value <= MAX_RATIO)

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.value:.4g} (must be {sign} {self.limit:g})"


def judge(psnrs: Sequence[float], eager: Errors | None, ours: Errors | None, half: bool) -> tuple[Check, ...]:
    """The conditions of design: float32 is compared with eager, half precision with the truth."""
    if not half:
        return (Check("PSNR to eager, dB", lowest(psnrs), MIN_PSNR, at_least=True),)
    if eager is None or ours is None:
        return ()
    return (
        *_step_checks("the noise prediction", ours.steps, eager.steps),
        *_step_checks("the latents", ours.step_latents, eager.step_latents),  # the encoder's error shows only here
        Check("error of the decoding over eager's", ratio(ours.decode, eager.decode), MAX_MEDIAN_RATIO),
    )


def _step_checks(what: str, ours: Sequence[float], eager: Sequence[float]) -> tuple[Check, Check]:
    usual = ratio(median(ours), median(eager))
    worst = highest([ratio(o, e) for o, e in zip(ours, eager, strict=True)])
    return (
        Check(f"error of {what} over eager's, median step", usual, MAX_MEDIAN_RATIO, scatters=True),
        Check(f"error of {what} over eager's, worst step", worst, MAX_RATIO),
    )
