"""`allaprima models`: what there is to draw with, and how more of it comes here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

models_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


@models_app.callback()
def models(
    ctx: typer.Context,
    vocabulary: Annotated[
        str | None, typer.Option(help="List the words that this model knows.", metavar="MODEL")
    ] = None,
) -> None:
    """List models and adapters, and what they can draw; fetch and convert checkpoints.

    \b
    allaprima models
    allaprima models --vocabulary emoji
    allaprima models pull owner/name
    allaprima models convert model.ckpt
    """
    if ctx.invoked_subcommand is None:
        _list(vocabulary)


@models_app.command("list")
def list_models(
    vocabulary: Annotated[
        str | None, typer.Option(help="List the words that this model knows.", metavar="MODEL")
    ] = None,
) -> None:
    """List the embedded models and adapters, and what they can draw.

    \b
    allaprima models list
    allaprima models list --vocabulary emoji
    """
    _list(vocabulary)


@models_app.command()
def pull(
    hub_id: Annotated[
        str, typer.Argument(help="owner/name on the Hugging Face hub, or on HF_ENDPOINT's mirror of it.")
    ],
    variant: Annotated[str | None, typer.Option(help="Of the weights, where there are several: fp16, …")] = None,
    file: Annotated[str | None, typer.Option(help="One file alone, such as a checkpoint in one file.")] = None,
    pickles: Annotated[
        bool,
        typer.Option("--pickles", help="Parts that exist as pickles alone, too; `models convert` makes them safe."),
    ] = False,
) -> None:
    """Download what drawing needs of a checkpoint; started again, it goes on where it was cut off.

    \b
    allaprima models pull owner/name
    allaprima models pull owner/name --variant fp16
    allaprima models pull owner/name --file model.safetensors
    HF_ENDPOINT=https://mirror.example allaprima models pull owner/name
    """
    from .errors import CheckpointError
    from .weights.hub import is_hub_id
    from .weights.hub import pull as download

    if not is_hub_id(hub_id):
        raise CheckpointError(f"{hub_id!r} is no hub id: give owner/name.")
    place = download(hub_id, variant=variant, file=file, pickles=pickles)
    told = (
        f"allaprima models convert {place}"
        if pickles
        else f'allaprima generate "…" --model {place if file else hub_id}'
    )
    _out().print(f"{hub_id} is in {place}", highlight=False, soft_wrap=True, markup=False)
    _out().print(told, style="bold", highlight=False, soft_wrap=True, markup=False)


@models_app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A .ckpt, .bin, .pt or .pth file, or a diffusers folder with .bin parts.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder; default: beside it.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB that reading one file may take; default: three times its size, and one.")
    ] = None,
    seconds: Annotated[int, typer.Option(help="Time that one file may take.")] = 900,
    replace: Annotated[bool, typer.Option("--replace", help="Files that are there already.")] = False,
) -> None:
    """Make safetensors of pickles, which can run any code when they are read.

    \b
    allaprima models convert model.ckpt
    allaprima models convert path/to/Taiyi --output path/to/taiyi-safe

    It is done in a process without network, limited in memory, time and disk, by torch's restricted unpickler.
    """
    from rich.progress import Progress

    from .weights.conversion import convert as make_safe

    with Progress(console=_err(), transient=True, disable=not _err().is_terminal) as bars:
        found = make_safe(
            source,
            output,
            memory_bytes=int(memory * 1e9) if memory is not None else None,
            seconds=seconds,
            replace=replace,
            progress=_shown(bars),
        )
    for one in found:
        line = f"{one.path}: {one.tensors} tensors, {one.size / 1e9:.2f} GB, compared with the pickle's bit by bit."
        _out().print(line, highlight=False, soft_wrap=True, markup=False)
        if one.skipped:
            skipped = ", ".join(one.skipped[:10])
            _err().print(f"Not weights, left out: {skipped}", highlight=False, soft_wrap=True, markup=False)
    if any(one.network != "none" for one in found):
        _err().print(
            "This system permits no network namespace: network access was refused by Python alone.", soft_wrap=True
        )


def _shown(bars: Progress) -> Any:
    """A progress bar for each file."""
    known: dict[Path, Any] = {}

    def progress(path: Path, done: int, total: int) -> None:
        if path not in known:
            known[path] = bars.add_task(path.name, total=max(1, total))
        bars.update(known[path], completed=done)

    return progress


def _list(vocabulary: str | None) -> None:
    from .errors import UnknownModelError
    from .models import EMBEDDED, LORAS
    from .models import vocabulary as words_of

    if vocabulary is None:
        _show(EMBEDDED, LORAS)
    elif vocabulary not in EMBEDDED:
        raise UnknownModelError(vocabulary, EMBEDDED)
    else:
        typer.echo("\n".join(words_of(vocabulary)))


def _show(embedded: Any, loras: Any) -> None:
    from rich.table import Table

    table = Table("model", "language", "size", "what it is", "try", title="Embedded models", show_lines=True)
    for model in embedded.values():
        height, width = model.native_size
        examples = "\n".join(model.example_prompts[:3])
        table.add_row(model.name, model.language, f"{width}x{height}", model.description, examples)
    _out().print(table)
    adapters = Table("LoRA", "for", "what it is", "changes", title="Embedded LoRAs")
    for lora in loras.values():
        adapters.add_row(lora.name, lora.model, lora.description, lora.targets)
    _out().print(adapters)
    _out().print("The words a model knows: [bold]allaprima models --vocabulary NAME[/]")
    _out().print("Any Stable Diffusion checkpoint works too: [bold]allaprima generate … --model FOLDER_OR_FILE[/]")
    _out().print("From the Hugging Face hub: [bold]allaprima models pull OWNER/NAME[/]")


def _out() -> Console:
    from rich.console import Console

    return Console()


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True)
