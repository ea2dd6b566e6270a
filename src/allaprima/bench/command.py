"""`allaprima bench`.  Nothing heavy is imported before the options are read."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from .measure import Results
    from .memory import Peaks
    from .workloads import Case

MEMORY_LIMIT_S = 1800.0


ArchOption = Annotated[
    str | None, typer.Option(help="An architecture with random weights instead of a model: sd15.", metavar="NAME")
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Embedded name, diffusers folder, .safetensors file or hub id.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto is what suits the device.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda; auto takes the GPU where there is one.")]
WhatOption = Annotated[
    str,
    typer.Option(
        help="Of step (one UNet call with guidance), text (text encoder), vae (decoding), e2e (prompt to pictures), "
        "img2img, inpaint (the same from a picture)."
    ),
]
SizesOption = Annotated[
    str | None, typer.Option(help="WIDTHxHEIGHT in pixels, separated by commas; else the native size and its double.")
]
BatchesOption = Annotated[str, typer.Option(help="Pictures at once, separated by commas.")]
VariantsOption = Annotated[
    str | None,
    typer.Option(
        help="Of eager, channels-last, openvino, cuda-graph, xformers, ours; and on request, because they compile for "
        "minutes, compile, compile-static, compile-graph, max-autotune. Else eager, the best known rival and ours."
    ),
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Rounds; in each, every variant is timed once.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Denoising steps of e2e.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads, the same for every variant.")]
CompileLimitOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds that a first call of torch.compile may take; then it is unfinished.")
]
MemoryOption = Annotated[
    bool, typer.Option("--memory/--no-memory", help="Also measure peak memory, each variant in a process of its own.")
]
CostsOption = Annotated[
    bool,
    typer.Option(
        "--costs/--no-costs",
        help="Also measure what the first call, a changed weight and a second pipeline cost; without, captures of "
        "earlier runs are used and it is sooner done.",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON lines and the plot.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="The last line on stdout is one JSON document with all of it.")
]


@dataclass(frozen=True)
class Options:
    """What the command line asked: a field for each parameter of `bench`."""

    arch: str | None
    model: str
    dtype: str
    device: str
    what: str
    sizes: str | None
    batches: str
    variants: str | None
    repeats: int
    steps: int
    threads: int | None
    compile_limit: float
    costs: bool
    memory: bool
    output: Path
    as_json: bool


def bench(
    arch: ArchOption = None,
    model: ModelOption = "emoji",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    what: WhatOption = "step,text,vae,e2e",
    sizes: SizesOption = None,
    batches: BatchesOption = "1",
    variants: VariantsOption = None,
    repeats: RepeatsOption = 20,
    steps: StepsOption = 20,
    threads: ThreadsOption = None,
    compile_limit: CompileLimitOption = 300.0,
    costs: CostsOption = True,
    memory: MemoryOption = True,
    output: OutputOption = Path("benchmarks"),
    as_json: JsonOption = False,
) -> None:
    """Time eager, OpenVINO, torch.compile and ours side by side.

    All variants run in one process and take turns, so that what disturbs the machine disturbs them alike. The median
    over the rounds is reported, and the quartiles beside it. Before a variant is timed, its result is compared with a
    float32 run: what is wrong is called wrong, and no speed-up of it is reported.

    \b
    allaprima bench
    allaprima bench --what step --sizes 128x128,264x200 --batches 1,4
    allaprima bench --arch sd15 --dtype bfloat16 --what step --sizes 256x256,512x512
    allaprima bench --variants eager,compile,ours --compile-limit 120

    "±" is half the distance between the quartiles; "× eager" how many times faster than diffusers as it is; "floor" how
    much of the machine's own speed (its best matrix product in this dtype) is reached, which no speed-up shows.
    """
    run(Options(**locals()))


def run(options: Options) -> None:
    """Measure, then write the JSON lines, the table and the plot.

    raises   InputError, ConfigError, ModelError
    """
    import torch
    from rich.console import Console

    from ..notices import quiet_libraries
    from .report import compact, records, write_lines
    from .workloads import subject

    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=options.as_json)
    pipe = subject(options.arch, options.model, options.dtype, options.device)
    about = _about(options, pipe)
    results = _measured(options, pipe, console)
    lines = records(about, results)
    stem = options.output / f"bench-{about['subject']}-{about['dtype']}-{about['device']}"
    write_lines(stem.with_suffix(".jsonl"), lines)
    _show(console, stem, about, results)
    if options.as_json:
        sys.stdout.write(compact(lines) + "\n")


def _about(options: Options, pipe: Any) -> dict[str, Any]:
    """What was measured, where and with what: the first line of the file."""
    from ..environment import environment

    return {
        "subject": options.arch or Path(options.model).stem,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "repeats": options.repeats,
        **environment(),
    }


def _measured(options: Options, pipe: Any, console: Console) -> Results:
    from .measure import measure
    from .variants import VARIANTS, default_variants
    from .workloads import cases

    names = _words(options.variants) or default_variants(pipe.device.type)
    _check_names("--variants", names, VARIANTS)
    points = cases(_words(options.what), _sizes(options.sizes, pipe), _batches(options.batches), options.steps)
    with console.status("…") as status:
        return measure(
            pipe,
            points,
            names,
            repeats=options.repeats,
            compile_limit_s=options.compile_limit,
            costs=options.costs,
            memory=_peaks_of(options, pipe) if options.memory else None,
            say=status.update,
        )


def _show(console: Console, stem: Path, about: dict[str, Any], results: Results) -> None:
    from .report import build_table, notes, outcome_table, plot

    place = about["gpu"] if about["device"] == "cuda" else f"{about['cpu']}, {about['threads']} threads"
    title = f"{about['subject']}, {about['dtype']}, {place}, torch {about['packages']['torch']}"
    console.print(f"[bold]{title}[/]", highlight=False)
    console.print(outcome_table(results), build_table(results))
    for note in notes(results):
        console.print(note, style="red", markup=False, highlight=False)
    ceiling = results.ceiling
    console.print(
        f"the machine's best: {ceiling.flops_per_s / 1e9:.0f} GFLOP/s in {about['dtype']}, "
        f"{ceiling.bytes_per_s / 1e9:.1f} GB/s; numbers: {stem.with_suffix('.jsonl')}",
        highlight=False,
    )
    try:
        plot(stem.with_suffix(".png"), title, results)
        console.print(f"plot: {stem.with_suffix('.png')}", highlight=False)
    except ImportError:
        console.print("no plot: pip install 'allaprima[plot]'", markup=False, highlight=False)


def _peaks_of(options: Options, pipe: Any) -> Callable[[str, Case], Peaks]:
    """(variant, case) -> the peak memory of a process that runs only this."""
    from .memory import Request, measured_alone

    dtype, device = str(pipe.unet.dtype).removeprefix("torch."), pipe.device.type

    def peaks(variant: str, case: Case) -> Peaks:
        request = Request(options.arch, options.model, dtype, device, variant, asdict(case))
        return measured_alone(request, MEMORY_LIMIT_S)

    return peaks


def _sizes(text: str | None, pipe: Any) -> list[tuple[int, int]]:
    from ..generation import parse_size

    if text:
        return [parse_size(size) for size in _words(text)]
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return [(native, native), (2 * native, 2 * native)]


def _batches(text: str) -> list[int]:
    from ..errors import InputError

    for word in _words(text):
        if not (word.isdecimal() and int(word)):
            raise InputError(f"--batches {word!r} is no number of pictures; give for example 1,4.")
    return [int(word) for word in _words(text)]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _check_names(option: str, names: Sequence[str], known: Any) -> None:
    from ..errors import InputError

    for name in names:
        if name not in known:
            raise InputError(f"{option} {name!r} is unknown; allowed: {', '.join(known)}.")


if __name__ == "__main__":
    typer.run(bench)
