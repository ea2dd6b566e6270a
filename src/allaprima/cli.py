"""The command line.  What takes time to import is imported by the command that needs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from . import __version__
from .errors import AdapterError, AllaprimaError, ConfigError, InputError, ModelError
from .models_command import models_app
from .notices import one_line_warnings, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from .generation import Request, Settings
    from .prompts import LoraTag

# The user gave something that cannot be used: exit 2, as for a wrong option.  Other errors: exit 1.
BAD_INPUT = (AdapterError, ConfigError, InputError, ModelError)
DEFAULT_MODEL = "emoji"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Task(StrEnum):
    text2img = "text2img"
    img2img = "img2img"
    inpaint = "inpaint"


class Drawn(NamedTuple):
    """What the summary says of one picture; the pixels are in the file."""

    path: Path
    seed: int
    seconds: float
    prompt: str
    notes: tuple[str, ...]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"allaprima {__version__}")
        raise typer.Exit


class Commands(typer.core.TyperGroup):
    """Shows our own errors as one message instead of a traceback, and warnings as one line each."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with one_line_warnings():
                return super().invoke(ctx)
        except AllaprimaError as error:
            if ctx.params.get("debug"):
                raise
            _err().print(f"[bold red]Error:[/] [red]{_escaped(error)}[/]", highlight=False, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, BAD_INPUT) else 1) from error


app = typer.Typer(
    cls=Commands,
    name="allaprima",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Embedded name, diffusers folder, .safetensors file or hub id."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: fp16 on GPUs, bf16 on processors that have it, else fp32.")]
SizeOption = Annotated[
    str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 8 from 64 to 2048.", metavar="256x192")
]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.")]
SchedulerOption = Annotated[
    str | None, typer.Option(help='By its A1111 name: "Euler a", "DPM++ 2M Karras", "UniPC", …')
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Draw with Stable Diffusion, optimized once for every size, batch and prompt.

    \b
    allaprima generate "a red apple"
    allaprima generate "a cat" "a dog" --count 4 --size 256x192
    allaprima generate "一个红色的苹果" --model emoji-zh
    allaprima verify "a red apple"
    allaprima models
    """


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One picture (or --count of them) for each prompt.")],
    model: ModelOption = DEFAULT_MODEL,
    negative: Annotated[str, typer.Option("--negative", "-n", help="What the pictures must not show.")] = "",
    size: SizeOption = None,
    steps: StepsOption = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    scheduler: SchedulerOption = None,
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Of the first image, the next has one more; -1 is random.")
    ] = -1,
    count: Annotated[int, typer.Option("--count", "-c", help="Images of each prompt.")] = 1,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images drawn at once.")] = 4,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA and its weight; may be repeated.", metavar="NAME:WEIGHT")
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option(help="Where LoRAs are looked for by name; default $ALLAPRIMA_LORAS.")
    ] = None,
    init_image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White is drawn anew, black is kept.")] = None,
    strength: Annotated[float, typer.Option(help="0 keeps the init image, 1 draws it anew.")] = 0.75,
    clip_skip: Annotated[int, typer.Option(help="1: the text encoder's last layer, 2: the one before, …")] = 1,
    dtype: DtypeOption = Dtype.auto,
    optimize: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="--no-optimize is plain diffusers.")
    ] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder, or one .png file.")] = Path("outputs"),
) -> None:
    """Draw pictures from prompts.

    \b
    allaprima generate "a red apple on a blue background"
    allaprima generate "a cat" "a dog" --count 4 --size 256x192 --seed 7
    allaprima generate "a house" --negative "a tree" --scheduler "Euler a"
    allaprima generate "a green apple" --init-image apple.png --strength 0.6
    allaprima generate "a hat" --init-image girl.png --mask head.png
    allaprima generate "a castle" --model path/to/sd15 --size 512x512
    allaprima generate "a castle" --lora watercolor:0.8 --lora neon:-0.3

    Each file holds its prompt, seed and settings as A1111 writes them.
    An image of a batch can be drawn alone again with its own seed.
    """
    from .generation import Request, check_output, parse_size

    request = Request(
        prompts=tuple(prompts),
        negative_prompt=negative,
        size=parse_size(size) if size else None,
        steps=steps,
        guidance_scale=guidance,
        seed=None if seed == -1 else seed,
        count=count,
        batch=batch,
        init_image=init_image,
        mask=mask,
        strength=strength,
        clip_skip=clip_skip,
        adapters=tuple(parse_lora(text) for text in lora or ()),
    )
    check_output(output, request.num_images)
    pipe = _load(model, dtype, scheduler, optimize, request.loras, lora_dir)
    _draw_and_save(pipe, request, model, optimize, output)


@app.command()
def verify(
    prompt: Annotated[str, typer.Argument(help="What to draw twice.")] = "a red apple",
    model: ModelOption = DEFAULT_MODEL,
    size: SizeOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    seed: Annotated[int, typer.Option("--seed", "-s")] = 0,
    task: Annotated[Task, typer.Option(help="img2img and inpaint start from a test card.")] = Task.text2img,
    dtype: DtypeOption = Dtype.auto,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for verify.png and verify.json.")] = Path(
        "outputs"
    ),
) -> None:
    """Draw the same picture with and without the optimizer and compare; exit code 1 where they differ.

    \b
    allaprima verify "a red apple"
    allaprima verify "a cat" --size 264x200 --scheduler "Euler a" --task inpaint
    """
    from .generation import Request, parse_size, settle

    request = Request((prompt,), size=parse_size(size) if size else None, steps=steps, seed=seed)
    pipe = _load(model, dtype, scheduler, optimized=True)
    from .verification import test_card, test_mask, verify

    settings = settle(request, pipe, model)
    width, height = settings.width, settings.height
    with _err().status("Drawing with and without the optimizer …"):
        report = verify(
            pipe,
            prompt,
            height=height,
            width=width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=seed,
            task=task.value,
            image=None if task == Task.text2img else test_card(width, height),
            mask_image=test_mask(width, height) if task == Task.inpaint else None,
        )
    output.mkdir(parents=True, exist_ok=True)
    picture, record = output / "verify.png", output / "verify.json"
    report.save(picture, record)
    typer.echo(str(report))
    _out().print(f"Eager, ours and the difference: {picture}, figures: {record}", highlight=False)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def explain(
    prompt: Annotated[
        str, typer.Argument(help="Drawn once, in two steps, so that there is something to explain.")
    ] = "",
    model: ModelOption = DEFAULT_MODEL,
    size: SizeOption = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what the optimizer did: rules that fired or declined, stages, captures, fallbacks, memory.

    \b
    allaprima explain
    allaprima explain --model path/to/stable-diffusion-v1-5 --json
    """
    from .generation import Request, draw, parse_size, settle

    request = Request((prompt,), size=parse_size(size) if size else None, steps=2, seed=0)
    pipe = _load(model, dtype, None, optimized=True)
    with _err().status("Drawing …"):
        for _ in draw(pipe, request, settle(request, pipe, model)):
            pass
    from .explanation import explain

    explanation = explain(pipe)
    typer.echo(json.dumps(explanation.as_dict(), indent=2, default=str) if as_json else str(explanation))


app.add_typer(models_app, name="models")


@app.command()
def doctor() -> None:
    """Look at this machine: what was found, and what to do about it.  Exit code 1 where something is broken."""
    from .doctor import examine

    findings = examine()
    out = _out()
    for finding in findings:
        out.print(finding, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if any(finding.state == "bad" for finding in findings) else 0)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the sheet goes.")] = Path("outputs/demo.png"),
) -> None:
    """Draw a sheet of pictures, time it beside eager, verify it."""
    from .demo import demo

    raise typer.Exit(demo(output))


# The options belong to the function that is imported only now; `bench --help` must show them too.
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(ctx: typer.Context) -> None:
    """Time eager, OpenVINO, torch.compile and ours side by side."""
    from .bench.command import bench

    program = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False)
    program.command()(bench)
    code = typer.main.get_command(program).main(args=ctx.args, prog_name="allaprima bench", standalone_mode=False)
    raise typer.Exit(code or 0)


def main() -> None:
    """What the `allaprima` script runs."""
    app()


def parse_lora(text: str) -> tuple[str, float]:
    """ "crayon:0.8" -> ("crayon", 0.8); without a weight it is 1.

    raises   AdapterError
    """
    name, colon, weight = text.rpartition(":")
    if not colon or weight.endswith(".safetensors"):  # the colon may be that of a drive
        name, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not name or not abs(value) <= 100:
        raise AdapterError(
            f"--lora {text!r} is not understood: give NAME:WEIGHT, for example crayon:0.8; weights go from -100 to 100."
        )
    return name, value


def _load(
    model: str,
    dtype: Dtype,
    scheduler: str | None,
    optimized: bool,
    tags: Sequence[LoraTag] = (),
    lora_dir: Path | None = None,
) -> Any:
    quiet_libraries()  # before what follows imports them
    from .pipelines import load, optimize, set_scheduler

    with _err().status(f"Loading {_escaped(model)} …"):
        pipe = load(model, dtype=dtype.value)
        pipe.set_progress_bar_config(disable=True)
        if scheduler:
            set_scheduler(pipe, scheduler)
        if tags:
            from .merging import loras

            loras(pipe, {name: {"text_encoder": te, "unet": unet} for name, te, unet in tags}, lora_dir=lora_dir)
        return optimize(pipe) if optimized else pipe


def _draw_and_save(pipe: Any, request: Request, model: str, optimized: bool, output: Path) -> None:
    from rich.progress import Progress

    from .generation import draw, save, settle

    settings = settle(request, pipe, model)
    drawn: list[Drawn] = []
    console = _err()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(_title(request, settings), total=request.num_images)
        pictures = draw(
            pipe,
            request,
            settings,
            optimized=optimized,
            on_step=lambda start, done: progress.update(bar, completed=start + done),
        )
        for picture in pictures:
            path = save(picture, output)
            drawn.append(Drawn(path, picture.seed, picture.seconds, picture.info.prompt, picture.notes))
    _show_drawn(drawn)


def _title(request: Request, settings: Settings) -> str:
    images = "1 image" if request.num_images == 1 else f"{request.num_images} images"
    return f"{images} of {settings.width}x{settings.height}, {settings.steps} steps"


def _show_drawn(drawn: list[Drawn]) -> None:
    from rich.table import Table

    table = Table("file", "seed", "seconds", "prompt", box=None, header_style="dim")
    for one in drawn:
        table.add_row(str(one.path), str(one.seed), f"{one.seconds:.2f}", _escaped(one.prompt))
    _out().print(table)
    for note in dict.fromkeys(note for one in drawn for note in one.notes):
        _err().print(f"[yellow]Warning:[/] {_escaped(note)}", highlight=False, soft_wrap=True)
    total = sum(one.seconds for one in drawn)
    _out().print(
        f"{len(drawn)} in {total:.1f} s, {total / len(drawn):.2f} s each; the first batch includes the preparation.",
        highlight=False,
    )


def _out() -> Console:
    from rich.console import Console

    return Console()


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _escaped(text: object) -> str:
    """Text of the user's must not be read as markup of ours."""
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    main()
