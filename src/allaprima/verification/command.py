"""`python -m allaprima.verification`: many prompts, sizes and tasks of one model, written to benchmarks/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..environment import environment
from ..generation import parse_size
from ..notices import quiet_libraries
from ..pipelines import load, optimize
from .drawing import TASKS, prompts_for
from .report import Report, parent_made, write_json
from .sheet import contact_sheet
from .summary import Summary, summarize
from .verifier import verify_many

NUM_SHOWN = 24


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
    quiet_libraries()
    begun = environment()  # of the commit that runs, whatever is committed meanwhile
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
    save(stem, begun, summary, reports)
    typer.echo(f"{summary}\n  numbers: {stem}.json\n  contact sheet, lowest PSNR first: {stem}.png")
    raise typer.Exit(0 if summary.passed else 1)


def save(stem: Path, begun: dict[str, Any], summary: Summary, reports: Sequence[Report]) -> None:
    """Write `stem`.json with every number and `stem`.png with the pictures that are furthest from eager's."""
    record = {"summary": summary.as_dict(), "environment": begun, "reports": [r.as_dict() for r in reports]}
    write_json(f"{stem}.json", record)
    furthest_first = sorted(reports, key=lambda report: report.psnr)
    contact_sheet(furthest_first[:NUM_SHOWN], across=2).save(parent_made(f"{stem}.png"))
