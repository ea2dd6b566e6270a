"""The same picture, proven: eager and optimized from one seed, with a float32 run as the judge of both.

Two questions, asked in this order:

  Is it the same picture?       PSNR and SSIM of ours against eager, and the latents after every step.
  Which is nearer the truth?    The error of eager and of ours against the same weights in float32.

A free run amplifies rounding: after twenty steps two correct programs in bf16 differ by a visible amount, and which of
the two lies nearer to the truth is chance.  So the second question is also asked one step at a time: the float32 run
and ours are given eager's latents after every step, and each noise prediction and each decoding is judged by itself.
One picture then suffices for a verdict; the free runs are judged over many (`verify_many`, `summarize`).
"""

from __future__ import annotations

import copy
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch.overrides import TorchFunctionMode

from .errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Pixels = npt.NDArray[np.float32]

Task = Literal["text2img", "img2img", "inpaint"]
TASKS: tuple[Task, ...] = ("text2img", "img2img", "inpaint")

MIN_PSNR = 60.0  # float32: a root mean square of 0.001 of the range, a quarter of one 8-bit level
MAX_MEDIAN_RATIO = 1.1  # half precision: the median error of ours over eager's
MAX_RATIO = 2.0  # half precision: the same for any single step
DIFFERENCE_GAIN = 16  # a difference of one 8-bit level shows as 16


# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One request to a pipeline; image i is drawn with seed + i.

    image, mask_image   PIL images for img2img and inpaint; resized to the size that is drawn.
                        None takes `test_card` and `test_mask`.
    raises              InputError
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    task: Task = "text2img"
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    strength: float = 0.8
    count: int = 1

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task is {self.task!r}; allowed: {', '.join(TASKS)}.")

    def arguments(self, native: int) -> dict[str, Any]:
        """Keyword arguments for the pipeline of this task; fresh generators every time.

        native   height and width where none is given
        """
        size = (self.width or native, self.height or native)
        given: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "num_images_per_prompt": self.count,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in range(self.count)],
        }
        if self.task != "img2img":
            given |= {"width": size[0], "height": size[1]}
        if self.task != "text2img":
            given |= {"image": (self.image or test_card(*size)).resize(size), "strength": self.strength}
        if self.task == "inpaint":
            given["mask_image"] = (self.mask_image or test_mask(*size)).resize(size)
        return given

    def as_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.__dict__.items() if k not in ("image", "mask_image")}
        if self.task == "text2img":
            del plain["strength"]
        return plain


# ---- one run, recorded ---------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What one run left behind, on the CPU in float64.

    predictions   the guided noise prediction of each step, as the scheduler received it  [B, 4, H/8, W/8]
    latents       after each step                                                         [B, 4, H/8, W/8]
    pixels        the pictures, 0 to 1                                                    [B, H, W, 3]
    """

    predictions: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    pixels: Pixels = field(default_factory=lambda: np.empty(0, np.float32))


def record(pipe: Any, drawing: Drawing, latents: Sequence[torch.Tensor] | None = None) -> Trace:
    """Run `pipe` and record it.  With `latents`, each step hands those on instead of its own."""
    trace = Trace()

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = tensors["latents"]
        trace.latents.append(_kept(own))
        return {"latents": latents[step].to(own)} if latents is not None else {}

    with _quiet(pipe), _predictions_of(pipe.scheduler, trace.predictions):
        arguments = drawing.arguments(native=pipe.unet.config.sample_size * pipe.vae_scale_factor)
        trace.pixels = pipe(**arguments, output_type="np", callback_on_step_end=after_step).images
    return trace


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


@contextmanager
def _predictions_of(scheduler: Any, kept: list[torch.Tensor]) -> Iterator[None]:
    """Keep what `scheduler.step` is given: the one place where every pipeline shows its noise prediction."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature of `step`
    def recording_step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.append(_kept(model_output))
        return step(model_output, *args, **kwargs)

    scheduler.step = recording_step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own: several runs make one verification."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


# ---- the truth -----------------------------------------------------------------------------------------------------


def precise_copy(pipe: Any, dtype: torch.dtype) -> Any:
    """An unoptimized copy of the pipeline with the same weights, widened to `dtype`; `pipe` stays as it is."""
    from .pipelines import eager

    with eager(pipe):
        parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns at every cast
    options = {k: pipe.config[k] for k in ("requires_safety_checker",) if k in pipe.config}
    return type(pipe)(**parts, **options)


class _NoiseIn(TorchFunctionMode):
    """`torch.randn` draws in `dtype` and then widens, so that a wider run starts from the same noise.

    torch draws other numbers for another dtype from the same seed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("dtype")
        if func is torch.randn and wanted is not None:
            return func(*args, **{**kwargs, "dtype": self.dtype}).to(wanted)
        return func(*args, **kwargs)


# ---- measures ------------------------------------------------------------------------------------------------------


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures with values 0 to 1, in dB; infinite where they are equal."""
    mean_square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity of two pictures [H, W, C] with values 0 to 1, averaged over the channels.

    The window shrinks to the largest odd size that fits where a picture is smaller than 11 pixels.

    source   Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861: Gaussian window of 11x11 pixels with
             sigma 1.5, K1 = 0.01, K2 = 0.03
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(p)).double().permute(2, 0, 1)[:, None] for p in (a, b))
    radius = min(5, (min(x.shape[-2:]) - 1) // 2)
    line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean = functools.partial(torch.nn.functional.conv2d, weight=window)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference over root mean square of the truth."""
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


def ratio(ours: float, eager: float) -> float:
    """ours / eager, where nothing over nothing is no error at all."""
    if eager == 0:
        return math.inf if ours > 0 else 0.0
    return ours / eager


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
            decode=_rms(stepwise.pixels, true_stepwise.pixels),
            latents=relative_error(free.latents[-1], true_free.latents[-1]),
            picture=_rms(free.pixels, true_free.pixels),
        )


def _rms(a: Pixels, b: Pixels) -> float:
    """Root mean square of each picture's difference; the median over the pictures."""
    squares = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float(np.median(np.sqrt(squares)))


# ---- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One condition of the verdict.  A value that is no number fails."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.value:.4g} (must be {sign} {self.limit:g})"


def judge(psnrs: Sequence[float], eager: Errors | None, ours: Errors | None, half: bool) -> tuple[Check, ...]:
    """The conditions of design: float32 is compared with eager, half precision with the truth."""
    if not half:
        return (Check("PSNR to eager, dB", _lowest(psnrs), MIN_PSNR, at_least=True),)
    if eager is None or ours is None:
        return ()
    return (
        *_step_checks("the noise prediction", ours.steps, eager.steps),
        *_step_checks("the latents", ours.step_latents, eager.step_latents),  # the encoder's error shows only here
        Check("error of the decoding over eager's", ratio(ours.decode, eager.decode), MAX_MEDIAN_RATIO),
    )


def _step_checks(what: str, ours: Sequence[float], eager: Sequence[float]) -> tuple[Check, Check]:
    median = ratio(statistics.median(ours), statistics.median(eager))
    worst = _highest([ratio(o, e) for o, e in zip(ours, eager, strict=True)])
    return (
        Check(f"error of {what} over eager's, median step", median, MAX_MEDIAN_RATIO),
        Check(f"error of {what} over eager's, worst step", worst, MAX_RATIO),
    )


def _lowest(values: Sequence[float]) -> float:
    return float(np.min(values))  # unlike min(), it lets a NaN through


def _highest(values: Sequence[float]) -> float:
    return float(np.max(values))


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
    def verdict(self) -> str:
        if not self.checks:
            return "not judged: in half precision the judge is a float32 run (truth=True)"
        return "passed" if self.passed else "FAILED"

    @property
    def psnr(self) -> float:
        return _lowest(self.psnrs)

    @property
    def ssim(self) -> float:
        return _lowest(self.ssims)

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
        return _finite(found)  # type: ignore[no-any-return]

    def save(self, png: str | Path | None = None, json_file: str | Path | None = None) -> None:
        """Write the contact sheet (eager, ours, difference ×16) and the numbers."""
        if png is not None:
            contact_sheet([self]).save(_parent_made(png))
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
            f"largest latent difference {_highest(self.latent_differences):.2e}",
        ]
        if self.eager and self.ours:
            lines.append(
                f"  picture against {self.truth}, rms of 0..1: "
                f"eager {self.eager.picture:.2e}, ours {self.ours.picture:.2e}"
            )
        lines += [f"  ran eager: {reason}" for reason in self.fallbacks]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """Lists, dicts and numbers as JSON can hold them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: str | Path, value: Any) -> None:
    _parent_made(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _parent_made(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---- verify --------------------------------------------------------------------------------------------------------


def verify(
    pipe: Any,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
    task: Task = "text2img",
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    strength: float = 0.8,
    count: int = 1,
    truth: bool | Literal["float32", "float64"] = True,
) -> Report:
    """Draw with the eager and with the optimized pipeline and compare.

    pipe     an optimized pipeline; it is left as it was
    truth    judge both by a float32 run of the same weights (True; needs a float32 copy in memory), or by a float64
             run, or do not (False).  For a float32 pipeline True means eager itself.
    returns  Report; `.passed` is PSNR to eager ≥ 60 dB in float32, and in half precision no more error than 1.1 times
             eager's in the median step and in the decoding, and nowhere twice eager's
    raises   InputError, ConfigError where the pipeline is not optimized
    """
    settings = dict(locals())
    del settings["pipe"], settings["truth"]
    return Verifier(pipe, truth).verify(Drawing(**settings))


class Verifier:
    """Verifies many drawings of one pipeline; the float32 copy is made once."""

    def __init__(self, pipe: Any, truth: bool | Literal["float32", "float64"] = True) -> None:
        fallbacks(pipe)  # raises where there is nothing to verify
        self.pipe = pipe
        self.dtype: torch.dtype = pipe.unet.dtype
        self.half = self.dtype in (torch.float16, torch.bfloat16)
        self.truth_dtype = _truth_dtype(truth, self.half)
        self._precise = None if self.truth_dtype is None else precise_copy(pipe, self.truth_dtype)

    def verify(self, drawing: Drawing) -> Report:
        from .pipelines import as_task, eager

        pipe = as_task(self.pipe, drawing.task)
        with eager(pipe):
            theirs = record(pipe, drawing)
        ours = record(pipe, drawing)
        errors = self._errors(pipe, drawing, theirs, ours)
        psnrs = tuple(map(psnr, theirs.pixels, ours.pixels))
        return Report(
            drawing=drawing,
            dtype=_name(self.dtype),
            device=str(pipe.device),
            truth=_name(self.truth_dtype) if self.truth_dtype else None,
            images=(_pil(theirs.pixels), _pil(ours.pixels)),
            differences=_pil(np.abs(theirs.pixels - ours.pixels) * DIFFERENCE_GAIN),
            psnrs=psnrs,
            ssims=tuple(map(ssim, theirs.pixels, ours.pixels)),
            latent_differences=tuple(map(_largest_difference, theirs.latents, ours.latents)),
            eager=errors and errors[0],
            ours=errors and errors[1],
            checks=judge(psnrs, errors and errors[0], errors and errors[1], self.half),
            fallbacks=fallbacks(self.pipe),
        )

    def _errors(self, pipe: Any, drawing: Drawing, theirs: Trace, ours: Trace) -> tuple[Errors, Errors] | None:
        """Of eager and of ours.  Eager's free run is its stepwise run too: the others follow its latents."""
        from .pipelines import as_task

        if self._precise is None:
            return None
        precise = as_task(self._precise, drawing.task)
        with _NoiseIn(self.dtype):
            true_free = record(precise, drawing)
            true_stepwise = record(precise, drawing, theirs.latents)
        ours_stepwise = record(pipe, drawing, theirs.latents)
        return (
            Errors.of(theirs, theirs, true_stepwise, true_free),
            Errors.of(ours_stepwise, ours, true_stepwise, true_free),
        )


def _truth_dtype(truth: bool | str, half: bool) -> torch.dtype | None:
    if truth == "float64":
        return torch.float64
    if truth not in (True, False, "float32"):
        raise InputError(f"truth is {truth!r}; allowed: True, False, 'float32', 'float64'.")
    return torch.float32 if truth and half else None


def fallbacks(pipe: Any) -> tuple[str, ...]:
    """One line for each reason why calls of the optimized pipeline ran eager.  raises   ConfigError if it is not one"""
    from .explanation import explain

    return tuple(f"{count} x {why}" for why, count in explain(pipe).fallbacks.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _pil(pixels: Pixels) -> list[Image.Image]:
    levels = (np.nan_to_num(pixels, nan=1.0).clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


# ---- many ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Many reports in one verdict: every report passes, and in half precision the free runs do in the median."""

    count: int
    failed: tuple[str, ...]
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
        return _finite({"passed": self.passed, **asdict(self), "checks": checks})  # type: ignore[no-any-return]

    def __str__(self) -> str:
        lines = [
            f"{'passed' if self.passed else 'FAILED'}: {self.count - len(self.failed)} of {self.count} drawings",
            *(f"  {check}" for check in self.checks),
            f"  PSNR to eager: lowest {self.psnr_lowest:.1f} dB, median {self.psnr_median:.1f} dB; "
            f"lowest SSIM {self.ssim_lowest:.5f}; largest latent difference {self.latent_difference_highest:.2e}",
            *(f"  failed: {name}" for name in self.failed),
            *(f"  ran eager: {reason}" for reason in self.fallbacks),
        ]
        return "\n".join(lines)


def summarize(reports: Sequence[Report]) -> Summary:
    """raises   InputError, when there is nothing to sum up"""
    if not reports:
        raise InputError("There is no report to sum up.")
    pairs = [(r.eager, r.ours) for r in reports if r.eager and r.ours]
    medians = {
        name: statistics.median(ratio(get(ours), get(eager)) for eager, ours in pairs) if pairs else None
        for name, get in _FREE_ERRORS.items()
    }
    return Summary(
        count=len(reports),
        failed=tuple(_label(r) for r in reports if not r.passed),
        psnr_lowest=_lowest([r.psnr for r in reports]),
        psnr_median=float(np.median([r.psnr for r in reports])),
        ssim_lowest=_lowest([r.ssim for r in reports]),
        latent_difference_highest=_highest([_highest(r.latent_differences) for r in reports]),
        picture_ratio_median=medians["picture"],
        latents_ratio_median=medians["latents"],
        step_ratio_median=medians["step"],
        checks=_checks_of_many(reports, medians),
        fallbacks=tuple(dict.fromkeys(line for r in reports for line in r.fallbacks)),
    )


_FREE_ERRORS: dict[str, Callable[[Errors], float]] = {
    "picture": lambda errors: errors.picture,
    "latents": lambda errors: errors.latents,
    "step": lambda errors: statistics.median(errors.steps),
}


def _checks_of_many(reports: Sequence[Report], medians: Mapping[str, float | None]) -> tuple[Check, ...]:
    if reports[0].truth is None or reports[0].dtype == "float32":
        return (Check("PSNR to eager, dB, lowest", _lowest([r.psnr for r in reports]), MIN_PSNR, at_least=True),)
    names = {"picture": "the picture", "latents": "the last latents", "step": "the noise prediction"}
    return tuple(
        Check(f"error of {names[key]} over eager's, median drawing", value, MAX_MEDIAN_RATIO)
        for key, value in medians.items()
        if value is not None
    )


def verify_many(
    pipe: Any,
    prompts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    tasks: Sequence[Task] = TASKS,
    truth: bool | Literal["float32", "float64"] = True,
    progress: bool = True,
    **settings: Any,
) -> list[Report]:
    """Verify every prompt at every size (width, height) in every task; prompt i is drawn with seed + i.

    settings   as of `verify`
    """
    from rich.progress import track

    verifier = Verifier(pipe, truth)
    first_seed = settings.pop("seed", 0)
    cases = [(i, size, task) for task in tasks for size in sizes for i in range(len(prompts))]
    reports = []
    for i, (width, height), task in track(cases, description="verifying", disable=not progress):
        drawing = Drawing(prompts[i], width=width, height=height, task=task, seed=first_seed + i, **settings)
        reports.append(verifier.verify(drawing))
    return reports


def test_card(width: int, height: int) -> Image.Image:
    """A picture to start from: a gradient of three colours with a disc in the middle."""
    y, x = np.mgrid[0:height, 0:width] / np.array([[[height]], [[width]]])
    inside = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09)[..., None]
    pixels = np.where(inside, [0.9, 0.3, 0.2], np.stack([x, y, 1 - x], axis=-1))
    return Image.fromarray((pixels * 255).astype(np.uint8))


def test_mask(width: int, height: int) -> Image.Image:
    """The right half is to be drawn anew."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


test_card.__test__ = test_mask.__test__ = False  # type: ignore[attr-defined]  # pytest, these are not tests


# ---- the contact sheet ---------------------------------------------------------------------------------------------

_CAPTION = 16


def contact_sheet(reports: Sequence[Report], across: int = 1, largest: int = 256) -> Image.Image:
    """One row of (eager, ours, difference ×16) for each image, `across` of them side by side."""
    rows = [(_label(r), *pictures) for r in reports for pictures in zip(*r.images, r.differences, strict=True)]
    cell = min(largest, max(max(row[1].size) for row in rows))
    wide, tall = 3 * cell + 3 * 4, cell + 2 * _CAPTION + 8
    num_lines = math.ceil(len(rows) / across)
    sheet = Image.new("RGB", (across * (wide + 12), num_lines * tall), "white")
    for i, row in enumerate(rows):
        _draw_row(sheet, (i % across * (wide + 12) + 6, i // across * tall), cell, *row)
    return sheet


def _draw_row(sheet: Image.Image, corner: tuple[int, int], cell: int, label: str, *pictures: Image.Image) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    font = _font(12, chinese=not label.isascii())
    draw.text((left, top + 2), _clipped(label, 3 * cell, font), fill="black", font=font)
    names = ("eager", "ours", f"difference x{DIFFERENCE_GAIN}")
    for i, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        x = left + i * (cell + 4)
        draw.text((x, top + _CAPTION + 1), name, fill="gray", font=_font(12))
        shown = picture.copy()
        shown.thumbnail((cell, cell))
        sheet.paste(shown, (x, top + 2 * _CAPTION + 2))


def _label(report: Report) -> str:
    (width, height), drawing = report.images[1][0].size, report.drawing
    verdict = report.verdict.split(":")[0]
    return f"{verdict} {drawing.task} {width}x{height} seed {drawing.seed} {report.psnr:.1f} dB  {drawing.prompt}"


def _clipped(text: str, width: int, font: Any) -> str:
    while len(text) > 3 and font.getlength(text) > width:
        text = text[:-4] + "..."
    return text


@functools.cache
def _font(size: int, chinese: bool = False) -> Any:
    """Pillow's own font; for Chinese one of the machine's, where it has one."""
    for name in _CHINESE_FONTS if chinese else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


_CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc")


# ---- python -m allaprima.verification ------------------------------------------------------------------------------

# For checkpoints that do not come with a list of what they can draw.
THINGS = """red apple, cat, dog, tree, house, car, sun, moon, star, flower, fish, bird, rocket, guitar, umbrella,
pizza, banana, strawberry, mushroom, cactus, butterfly, elephant, penguin, octopus, bicycle, train, airplane, sailboat,
clock, key, book, pencil, soccer ball, trophy, crown, hat, cup of coffee, birthday cake, snowman, rainbow"""


def prompts_for(model: str, count: int) -> list[str]:
    """Things that the model can draw, in its language, spread evenly over all that it knows."""
    from .models import EMBEDDED, vocabulary

    names = vocabulary(model) if model in EMBEDDED else [name.strip() for name in THINGS.split(",")]
    chosen = min(count, len(names))
    return [names[i % chosen * len(names) // chosen] for i in range(count)]


def command(
    model: Annotated[str, typer.Option(help="Embedded name, diffusers folder, .safetensors file or hub id.")] = "emoji",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to draw.")] = 40,
    sizes: Annotated[str, typer.Option(help="WIDTHxHEIGHT, separated by commas.")] = "128x128,192x128,136x104",
    tasks: Annotated[str, typer.Option(help="Of text2img, img2img, inpaint; separated by commas.")] = ",".join(TASKS),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: what suits the device.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    truth: Annotated[str, typer.Option(help="float32, float64, or none: then eager alone is the measure.")] = "float32",
    seed: Annotated[int, typer.Option(help="Prompt i is drawn with seed + i.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON file and the contact sheet.")] = Path("benchmarks"),
) -> None:
    """Draw many prompts with the eager and with the optimized pipeline and prove that the pictures are the same."""
    from . import optimize
    from .bench.environment import environment
    from .generation import parse_size, quiet_libraries
    from .pipelines import load

    quiet_libraries()
    pipe = optimize(load(model, dtype=dtype, device=device))
    reports = verify_many(
        pipe,
        prompts_for(model, prompts),
        [parse_size(size) for size in sizes.split(",")],
        tasks=[task.strip() for task in tasks.split(",")],  # type: ignore[misc]  # Drawing checks the names
        truth=False if truth == "none" else truth,  # type: ignore[arg-type]  # Verifier checks the name
        num_inference_steps=steps,
        seed=seed,
    )
    summary = summarize(reports)
    stem = output / f"verify-{Path(model).stem}-{reports[0].dtype}"
    worst_first = sorted(reports, key=lambda report: report.psnr)
    write_json(
        f"{stem}.json",
        {"summary": summary.as_dict(), "environment": environment(), "reports": [r.as_dict() for r in reports]},
    )
    contact_sheet(worst_first[:24], across=2).save(_parent_made(f"{stem}.png"))
    typer.echo(f"{summary}\n  numbers: {stem}.json\n  contact sheet, lowest PSNR first: {stem}.png")
    raise typer.Exit(0 if summary.passed else 1)


if __name__ == "__main__":
    typer.run(command)
