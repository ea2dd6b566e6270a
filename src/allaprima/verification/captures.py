"""`python -m allaprima.verification.captures`: nothing is captured again, whatever is drawn.

Every checkpoint draws each size in each batch, with guidance and without, with each scheduler.  A component's program
is captured at the first call of a signature (which arguments there are, their dtypes and ranks) and never after that;
the next checkpoint of the same architecture finds it on disk.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from ..config import Config
from ..engine import Engine
from ..environment import environment
from ..generation import parse_size
from ..models import EMBEDDED
from ..notices import one_line_warnings, quiet_libraries
from ..pipelines import engines, load, optimize, set_scheduler
from .drawing import Drawing, prompts_for
from .report import write_json

SIZES = "64x64,72x64,64x104,96x96,136x104,128x128,88x160,120x136,160x160,192x128,200x136,128x256"
BATCHES = "1,2,3,4"
SCHEDULERS = "DDIM,Euler a,DPM++ 2M Karras"
GUIDANCE_SCALES = (4.0, 1.0)  # 1 is no guidance: half the batch, and no negative prompt
NUM_STEPS = 2


@dataclass(frozen=True)
class Picture:
    """One call of the pipeline: what may change from one to the next."""

    scheduler: str
    guidance_scale: float
    width: int
    height: int
    batch: int


@dataclass(frozen=True)
class Count:
    """What one component's engine did.

    calls          of the component
    captures       programs captured        loaded    found on disk instead
    signatures     of the captured calls, each once: equal to `captures` where nothing was captured twice
    confirmations  captures at a size that the program was not known to hold for, which gave the same program
    fallbacks      calls that ran eager
    """

    calls: int
    captures: int
    loaded: int
    signatures: int
    confirmations: int
    fallbacks: int

    @classmethod
    def of(cls, engine: Engine) -> Count:
        events = engine.events
        return cls(
            calls=events.calls,
            captures=events.captures,
            loaded=events.loaded,
            signatures=len(set(events.signatures)),
            confirmations=events.discharged,
            fallbacks=events.fallbacks.total(),
        )

    @property
    def passed(self) -> bool:
        return self.captures == self.signatures and self.captures + self.loaded > 0 and not self.fallbacks


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's pictures.

    first, last   counts of each component that was called, after the first picture and after the last
    late          pictures after the first that captured or confirmed something, in words
    """

    pictures: int
    seconds: float
    first: Mapping[str, Count]
    last: Mapping[str, Count]
    late: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return bool(self.last) and all(count.passed for count in self.last.values())

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self), "seconds": round(self.seconds, 1)}


def plan(sizes: Sequence[tuple[int, int]], batches: Sequence[int], schedulers: Sequence[str]) -> list[Picture]:
    """Every combination, sizes changing fastest."""
    points = itertools.product(schedulers, GUIDANCE_SCALES, batches, sizes)
    return [Picture(name, scale, width, height, batch) for name, scale, batch, (width, height) in points]


def draw_all(pipe: Any, prompt: str, pictures: Iterable[Picture]) -> Checkpoint:
    """Draw them with an optimized pipeline and count what its engines capture."""
    begun, number, counts, late = time.perf_counter(), 0, _counts(pipe), []
    first: dict[str, Count] = {}
    for number, picture in enumerate(pictures, start=1):
        set_scheduler(pipe, picture.scheduler)
        _draw(pipe, prompt, picture)
        before, counts = counts, _counts(pipe)
        first = first or counts
        if number > 1:
            late += [f"{name} at {number}: {picture}" for name in counts if _work(counts[name]) != _work(before[name])]
    last = {name: count for name, count in counts.items() if count.calls}
    return Checkpoint(number, time.perf_counter() - begun, {n: first[n] for n in last}, last, tuple(late))


def _draw(pipe: Any, prompt: str, picture: Picture) -> None:
    drawing = Drawing(
        prompt,
        width=picture.width,
        height=picture.height,
        num_inference_steps=NUM_STEPS,
        guidance_scale=picture.guidance_scale,
        count=picture.batch,
    )
    pipe(**drawing.arguments(native=picture.width), output_type="np")


def _counts(pipe: Any) -> dict[str, Count]:
    return {name: Count.of(engine) for name, engine in engines(pipe).items()}


def _work(count: Count) -> Count:
    """All but what grows with every call."""
    return replace(count, calls=0)


def draw_checkpoints(models: Sequence[str], pictures: Sequence[Picture], dtype: str) -> dict[str, Checkpoint]:
    """Each checkpoint with the disk cache of those before it, which begins empty."""
    found = {}
    with tempfile.TemporaryDirectory() as cache, Progress(console=Console(stderr=True)) as progress:
        for model in models:
            pipe = optimize(load(model, dtype=dtype), Config(cache_dir=Path(cache)))
            pipe.set_progress_bar_config(disable=True)
            (prompt,) = prompts_for(model, 1)
            found[model] = draw_all(pipe, prompt, progress.track(pictures, description=model))
    return found


def command(
    models: Annotated[str, typer.Option(help="Checkpoints, separated by commas.")] = ",".join(EMBEDDED),
    sizes: Annotated[str, typer.Option(help="WIDTHxHEIGHT, separated by commas.")] = SIZES,
    batches: Annotated[str, typer.Option(help="Pictures at once, separated by commas.")] = BATCHES,
    schedulers: Annotated[str, typer.Option(help="By their A1111 names, separated by commas.")] = SCHEDULERS,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: what suits the device.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for captures.json.")] = Path("benchmarks"),
) -> None:
    """Draw every combination of size, batch, guidance and scheduler; exit code 1 where anything is captured twice."""
    quiet_libraries()
    begun = environment()
    settings = {"sizes": _words(sizes), "batches": _words(batches), "schedulers": _words(schedulers)}
    pictures = plan(
        [parse_size(size) for size in settings["sizes"]],
        [int(batch) for batch in settings["batches"]],
        settings["schedulers"],
    )
    found = draw_checkpoints(_words(models), pictures, dtype)
    passed = all(checkpoint.passed for checkpoint in found.values())
    path = output / "captures.json"
    record = {
        "passed": passed,
        "settings": {**settings, "guidance_scales": GUIDANCE_SCALES, "steps": NUM_STEPS, "dtype": dtype},
        "environment": begun,
        "checkpoints": {model: checkpoint.as_dict() for model, checkpoint in found.items()},
    }
    write_json(path, record)
    typer.echo("\n".join([*_lines(found), f"numbers: {path}"]))
    raise typer.Exit(0 if passed else 1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _lines(found: Mapping[str, Checkpoint]) -> Iterator[str]:
    for model, checkpoint in found.items():
        verdict = "passed" if checkpoint.passed else "FAILED"
        yield f"{verdict}: {model}, {checkpoint.pictures} calls of the pipeline in {checkpoint.seconds:.0f} s"
        for name, count in checkpoint.last.items():
            yield (
                f"  {name}: {count.calls} calls, {count.captures} captured for {count.signatures} signatures, "
                f"{count.loaded} found on disk, {count.confirmations} sizes confirmed, {count.fallbacks} ran eager"
            )
        yield from (f"  after the first picture: {line}" for line in checkpoint.late)


if __name__ == "__main__":
    with one_line_warnings():
        typer.run(command)
