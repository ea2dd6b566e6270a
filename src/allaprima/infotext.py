"""The text that A1111 keeps in a picture, under the PNG key `parameters`.

    a red apple on a table
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 7, Size: 256x192, Model: emoji

What `Infotext.format` writes, A1111 and its readers parse, and `parse` gives back exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_KEY = "parameters"
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
# The format has no escapes of its own: a line of the prompt that looks like the marker would end the prompt.
_MARKER = re.compile(rf"^(\\*){_NEGATIVE}", re.MULTILINE)
_ESCAPED = re.compile(rf"^\\(\\*){_NEGATIVE}", re.MULTILINE)
# Fewer pairs than this, and A1111 takes the last line for a line of the prompt.
MIN_PAIRS = 3


@dataclass(frozen=True)
class Infotext:
    """How a picture was made.

    prompt, negative_prompt   may have several lines; line ends become "\\n", NUL characters are dropped
    settings                  the last line's pairs in their order, values as text: "Steps" -> "20"
    """

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _one_line_end(self.prompt))
        object.__setattr__(self, "negative_prompt", _one_line_end(self.negative_prompt))

    @property
    def seed(self) -> int | None:
        """The seed that draws this picture alone."""
        value = self.settings.get("Seed", "")
        return int(value) if re.fullmatch(r"\d+", value) else None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.settings.get("Size", ""))
        return (int(found[1]), int(found[2])) if found else None

    def format(self) -> str:
        """The text as A1111 writes it."""
        lines = [_escape(self.prompt)]
        if self.negative_prompt:
            lines.append(f"{_NEGATIVE} {_escape(self.negative_prompt)}")
        lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in self.settings.items()))
        return "\n".join(lines)


def parse(text: str) -> Infotext:
    """The reverse of `Infotext.format`; also reads what A1111 and its relatives wrote."""
    *lines, last = _one_line_end(text).split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < MIN_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:])
    negative = negative.removeprefix(_NEGATIVE).removeprefix(" ")
    return Infotext(_unescape(prompt), _unescape(negative), {key: _unquote(value) for key, value in pairs})


def save_png(image: Image, path: Path, info: Infotext) -> None:
    """Write the picture with its infotext: tEXt where Latin-1 holds it, else (Chinese) iTXt in UTF-8."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(PNG_KEY, info.format())
    image.save(path, format="PNG", pnginfo=chunks)


def read_png(path: Path) -> Infotext | None:
    """The infotext of a picture, or None where it has none.

    raises   InputError where the file is no picture
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            text = image.info.get(PNG_KEY)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    return parse(text) if isinstance(text, str) else None


def _one_line_end(text: str) -> str:
    return re.sub(r"\r\n?", "\n", text).replace("\0", "")


def _escape(text: str) -> str:
    return _MARKER.sub(rf"\\\1{_NEGATIVE}", text)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(rf"\1{_NEGATIVE}", text)


def _quote(value: str) -> str:
    plain = value and value == value.strip() and not value.startswith('"') and not re.search(r"[,:\n]", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not (len(value) >= 2 and value[0] == value[-1] == '"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value
