"""The contact sheet: eager, ours and their difference side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .report import Report

DIFFERENCE_GAIN = 16  # a difference of one 8-bit level shows as 16
_CAPTION = 16
_CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc")


def contact_sheet(reports: Sequence[Report], across: int = 1, largest: int = 256) -> Image.Image:
    """One row of (eager, ours, difference ×16) for each image, `across` of them side by side."""
    rows = [(r.label, *pictures) for r in reports for pictures in zip(*r.images, r.differences, strict=True)]
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
