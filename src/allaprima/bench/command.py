"""`allaprima bench`.  Nothing heavy is imported before the options are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .measure import Results
    from .memory import Peaks
    from .workloads import Case

MEMORY_LIMIT_S = 1800.0


def bench(
    arch: Annotated[
        str | None, typer.Option(help="An architecture with random weights instead of a model: sd15.", metavar="NAME")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, diffusers folder, .safetensors file or hub id.")
    ] = "emoji",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto is what suits the device.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda; auto takes the GPU where there is one.")] = "auto",
    what: Annotated[
        str,
        typer.Option(
            help="Of step (one UNet call with guidance), text (text encoder), vae (decoding), e2e (prompt to pictures)."
        ),
    ] = "step,text,vae,e2e",
    sizes: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels, separated by commas; else the native size and its double."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Pictures at once, separated by commas.")] = "1",
    variants: Annotated[
        str | None,
        typer.Option(
            help="Of eager, channels-last, openvino, ours; and on request, because they compile for minutes, compile, "
            "compile-static, max-autotune. Else eager, the best known rival and ours."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, every variant is timed once.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of e2e.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, the same for every variant.")] = None,
    compile_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a first call of torch.compile may take; then it is unfinished.")
    ] = 300.0,
    memory: Annotated[
        bool,
        typer.Option("--memory/--no-memory", help="Also measure peak memory, each variant in a process of its own."),
    ] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON lines and the plot.")] = Path(
        "benchmarks"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="The last line on stdout is one JSON document with all of it.")
    ] = False,
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
    import torch
    from rich.console import Console

    from ..generation import quiet_libraries
    from .environment import environment
    from .measure import measure
    from .report import compact, records, write_lines
    from .variants import VARIANTS, default_variants
    from .workloads import cases, subject

    quiet_libraries()
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=as_json)
    pipe = subject(arch, model, dtype, device)
    names = _words(variants) or default_variants(pipe.device.type)
    _check_names("--variants", names, VARIANTS)
    points = cases(_words(what), _sizes(sizes, pipe), [int(batch) for batch in _words(batches)], steps)
    number = str(pipe.unet.dtype).removeprefix("torch.")
    run = {
        "subject": arch or Path(model).stem,
        "dtype": number,
        "device": pipe.device.type,
        "repeats": repeats,
        **environment(),
    }
    with console.status("…") as status:
        results = measure(
            pipe,
            points,
            names,
            repeats=repeats,
            compile_limit_s=compile_limit,
            memory=_peaks_of(arch, model, number, pipe.device.type) if memory else None,
            say=status.update,
        )
    lines = records(run, results)
    stem = output / f"bench-{run['subject']}-{number}-{pipe.device.type}"
    write_lines(stem.with_suffix(".jsonl"), lines)
    _show(console, stem, run, results)
    if as_json:
        sys.stdout.write(compact(lines) + "\n")


def _show(console: Any, stem: Path, run: dict[str, Any], results: Results) -> None:
    from .report import build_table, notes, outcome_table, plot

    place = run["gpu"] if run["device"] == "cuda" else f"{run['cpu']}, {run['threads']} threads"
    title = f"{run['subject']}, {run['dtype']}, {place}, torch {run['packages']['torch']}"
    console.print(f"[bold]{title}[/]", highlight=False)
    console.print(outcome_table(results), build_table(results))
    for note in notes(results):
        console.print(note, style="red", markup=False, highlight=False)
    ceiling = results.ceiling
    console.print(
        f"the machine's best: {ceiling.flops_per_s / 1e9:.0f} GFLOP/s in {run['dtype']}, "
        f"{ceiling.bytes_per_s / 1e9:.1f} GB/s; numbers: {stem.with_suffix('.jsonl')}",
        highlight=False,
    )
    try:
        plot(stem.with_suffix(".png"), title, results)
        console.print(f"plot: {stem.with_suffix('.png')}", highlight=False)
    except ImportError:
        console.print("no plot: pip install 'allaprima[plot]'", markup=False, highlight=False)


def _peaks_of(arch: str | None, model: str, dtype: str, device: str) -> Any:
    from dataclasses import asdict

    from .memory import Request, measured_alone

    def peaks(variant: str, case: Case) -> Peaks:
        return measured_alone(Request(arch, model, dtype, device, variant, asdict(case)), MEMORY_LIMIT_S)

    return peaks


def _sizes(text: str | None, pipe: Any) -> list[tuple[int, int]]:
    from ..generation import parse_size

    if text:
        return [parse_size(size) for size in _words(text)]
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return [(native, native), (2 * native, 2 * native)]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _check_names(option: str, names: Sequence[str], known: Any) -> None:
    from ..errors import InputError

    for name in names:
        if name not in known:
            raise InputError(f"{option} {name!r} is unknown; allowed: {', '.join(known)}.")


if __name__ == "__main__":
    typer.run(bench)
