"""What `make demo` runs: pictures of the embedded models, optimized, timed beside eager, verified.

The first pictures are drawn twice in the same process, by plain diffusers and by the optimized pipeline in turns, after
a warm-up of both.  The times are end to end: text encoder, scheduler, VAE and conversion to a picture.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generation import Picture, Request, draw, settle
from .notices import one_line_warnings, quiet_libraries

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

SEED = 1
NUM_PROMPTS, NUM_TIMED = 7, 3
# Off the native size, and off diffusers' grid of 64 pixels: the program that is there draws these too.
SIZES = ((192, 128), (200, 136))
MARGIN, LABEL_HEIGHT, FONT_SIZE = 10, 18, 12

# The names under which Linux distributions, macOS and Windows ship a font with Chinese characters.
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "STHeiti Light.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
)


@dataclass(frozen=True)
class Row:
    """The pictures of one model and what was measured of them.

    eager_s, ours_s   seconds for one picture, median       ready_s   from the name to a first picture in two steps
    captures, loaded  programs captured now, or found on disk
    verdicts          reports of `verify`
    """

    title: str
    pictures: tuple[Picture, ...]
    eager_s: float
    ours_s: float
    ready_s: float
    captures: int
    loaded: int
    verdicts: tuple[Any, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


def demo(output: Path) -> int:
    """Draw, time and verify; returns the exit code, 1 where a picture is not the same."""
    from rich.console import Console

    from .models import EMBEDDED

    quiet_libraries()
    console = Console()
    rows = []
    with console.status("…") as status:
        for model in EMBEDDED.values():
            status.update(f"{model.title}: drawing with plain diffusers and optimized, in turns …")
            rows.append(draw_row(model))
    output.parent.mkdir(parents=True, exist_ok=True)
    font, knows_chinese = find_font()
    sheet([(row.title, row.pictures) for row in rows], font, knows_chinese).save(output)
    report(console, rows, output, legend=not knows_chinese)
    return 0 if all(row.passed for row in rows) else 1


def draw_row(model: Any) -> Row:
    """All pictures of one embedded model."""
    from .explanation import explain
    from .pipelines import load, optimize
    from .verification import verify

    requests = [Request((prompt,), seed=SEED + i) for i, prompt in enumerate(model.example_prompts[:NUM_PROMPTS])]
    warm_up = dataclasses.replace(requests[0], steps=2)
    eager = load(model.name)
    draw_one(eager, warm_up, model.name, optimized=False)
    begun = time.perf_counter()
    ours = optimize(load(model.name))
    draw_one(ours, warm_up, model.name, optimized=True)
    ready_s = time.perf_counter() - begun

    eager_s, pictures = [], []
    for i, request in enumerate(requests):
        if i < NUM_TIMED:
            eager_s.append(draw_one(eager, request, model.name, optimized=False).seconds)
        pictures.append(draw_one(ours, request, model.name, optimized=True))
    others = [
        draw_one(ours, dataclasses.replace(request, size=size), model.name, optimized=True)
        for request, size in zip(requests, SIZES, strict=False)
    ]
    settings = settle(requests[0], ours, model.name)
    verdict = verify(
        ours,
        model.example_prompts[0],
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        seed=SEED,
    )
    explanation = explain(ours)
    return Row(
        title=model.name,
        pictures=(*pictures, *others),
        eager_s=statistics.median(eager_s),
        ours_s=statistics.median(picture.seconds for picture in pictures[:NUM_TIMED]),
        ready_s=ready_s,
        captures=explanation.captures,
        loaded=explanation.loaded,
        verdicts=(verdict,),
    )


def draw_one(pipe: Any, request: Request, model: str, *, optimized: bool) -> Picture:
    pipe.set_progress_bar_config(disable=True)
    return next(draw(pipe, request, settle(request, pipe, model), optimized=optimized))


# ---- the sheet


def find_font() -> tuple[Any, bool]:
    """(a font, whether it knows Chinese)"""
    from PIL import ImageFont

    for name in CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, FONT_SIZE), True
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE), False


def sheet(rows: list[tuple[str, tuple[Picture, ...]]], font: Any, knows_chinese: bool) -> Image:
    """One row of pictures a model, each with its number and, where the font can write it, its prompt."""
    from PIL import Image, ImageDraw

    # A title above; two lines of label below.
    heights = [3 * LABEL_HEIGHT + max(picture.image.height for picture in pictures) for _, pictures in rows]
    widths = [sum(picture.image.width + MARGIN for picture in pictures) for _, pictures in rows]
    canvas = Image.new("RGB", (max(widths) + MARGIN, sum(heights) + (len(rows) + 1) * MARGIN), "white")
    pen, top, number = ImageDraw.Draw(canvas), MARGIN, 0
    for (title, pictures), height in zip(rows, heights, strict=True):
        pen.text((MARGIN, top), title, fill="black", font=font)
        left = MARGIN
        for picture in pictures:
            number += 1
            canvas.paste(picture.image, (left, top + LABEL_HEIGHT))
            for i, line in enumerate(
                label_lines(f"{number}. {_label(picture, knows_chinese)}", font, picture.image.width)
            ):
                y = top + LABEL_HEIGHT * (1 + i) + picture.image.height + 2
                pen.text((left, y), line, fill="#444444", font=font)
            left += picture.image.width + MARGIN
        top += height + MARGIN
    return canvas


def label_lines(text: str, font: Any, width: int) -> list[str]:
    """Two lines at most, none wider than `width` pixels.  Latin words are kept whole; Chinese may break anywhere."""
    lines: list[str] = []
    rest = text.strip()
    while rest and len(lines) < 2:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 2:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _label(picture: Picture, knows_chinese: bool) -> str:
    size = "" if picture.image.width == picture.image.height else f" {picture.image.width}x{picture.image.height}"
    return (picture.info.prompt if knows_chinese or picture.info.prompt.isascii() else "") + size


# ---- the words


def report(console: Console, rows: list[Row], output: Path, legend: bool) -> None:
    """Say what was drawn, how fast, whether it is the same, and how to go on."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "diffusers", "optimized", "speed", "ready after", "same picture")
    for row in rows:
        table.add_row(
            row.title,
            f"{row.eager_s:.2f} s",
            f"{row.ours_s:.2f} s",
            f"{row.eager_s / row.ours_s:.2f}x",
            f"{row.ready_s:.1f} s",
            "[green]yes[/]" if row.passed else "[bold red]NO[/]",
        )
    console.print(table)
    pictures = [picture for row in rows for picture in row.pictures]
    console.print(
        f"Seconds for one picture, from the prompt on, median of {NUM_TIMED}, both in this run, in turns.\n"
        f"Programs: {sum(row.captures for row in rows)} captured now, {sum(row.loaded for row in rows)} found on disk; "
        f"they drew {len(pictures)} pictures of {len({picture.image.size for picture in pictures})} sizes.",
        highlight=False,
    )
    for verdict in (verdict for row in rows for verdict in row.verdicts if not verdict.passed):
        console.print(escape(str(verdict)), highlight=False)
    if legend:
        _print_legend(console, pictures)
    console.print(f"\n[bold]The pictures: {escape(str(output.resolve()))}[/]", highlight=False, soft_wrap=True)
    console.print(_NEXT, highlight=False, soft_wrap=True)


def _print_legend(console: Console, pictures: list[Picture]) -> None:
    console.print("This machine has no font with Chinese characters; on the sheet", highlight=False)
    for number, picture in enumerate(pictures, start=1):
        if not picture.info.prompt.isascii():
            console.print(f"  {number} is {picture.info.prompt}", highlight=False)


_NEXT = """
Draw your own:
  allaprima generate "a red apple" --count 4
  allaprima generate "一个红色的苹果" --model emoji-zh
What the embedded models can draw:
  allaprima models
  allaprima models --vocabulary emoji
A real Stable Diffusion checkpoint, a diffusers folder or a .safetensors file:
  allaprima generate "a castle by a lake" --model path/to/stable-diffusion-v1-5 --size 512x512
"""


def main() -> None:
    """`python -m allaprima.demo`"""
    with one_line_warnings():
        sys.exit(demo(Path("outputs/demo.png")))


if __name__ == "__main__":
    main()
