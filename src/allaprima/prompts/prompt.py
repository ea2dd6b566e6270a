"""A prompt as it was typed, taken apart in A1111's order: comment lines, tags, full-width punctuation, AND."""

from __future__ import annotations

import re
from typing import NamedTuple

from .emphasis import Piece, keyword, pieces
from .punctuation import to_ascii
from .schedule import all_text, variants
from .tags import LoraTag, read_tags

_AND = keyword("AND")
_COMMENT = re.compile(r"^#[^\n]*(?:\n|\Z)", re.MULTILINE)
_WEIGHT = re.compile(r"\s*([+\-＋－]?(?:[0-9０-９]+[.．]?|[0-9０-９]*[.．][0-9０-９]+))\s*")


class Part(NamedTuple):
    """One of the prompts that AND joins, and its share of the guidance."""

    text: str
    weight: float


class Prompt(NamedTuple):
    """What a prompt asks for.

    typed     as it was given
    parts     at least one
    loras     the LoRAs of its tags, in their order
    unknown   tags of other kinds, which nothing reads
    """

    typed: str
    parts: tuple[Part, ...]
    loras: tuple[LoraTag, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether no syntax is in it: what a text encoder reads is what was typed."""
        text, weight = self.parts[0]
        if len(self.parts) > 1 or weight != 1 or text.rstrip() != self.typed.rstrip():
            return False
        return variants(text, 1)[0].text == text and pieces(text) == [Piece(text, 1.0)]

    @property
    def words(self) -> str:
        """All that the text encoder may get to read, without syntax."""
        found = (piece for part in self.parts for piece in pieces(all_text(part.text)))
        return " ".join(piece.text for piece in found if isinstance(piece, Piece))


def parse(text: str) -> Prompt:
    """A prompt of A1111's syntax.  A weight at its end counts without an AND too: "a cat :0.5" has half the guidance.

    raises   InputError where a LoRA tag is wrong
    """
    found = read_tags(_COMMENT.sub("", text))
    halves = _AND.split(found.text)
    # Without AND a full-width colon before a number is only text: 比例16：9.
    colons = ":" if len(halves) == 1 else ":："
    return Prompt(text, tuple(_part(half, colons) for half in halves), found.loras, found.unknown)


def parse_negative(text: str) -> Prompt:
    """A negative prompt: AND and a weight at the end are words there."""
    found = read_tags(_COMMENT.sub("", text))
    return Prompt(text, (Part(to_ascii(found.text), 1.0),), found.loras, found.unknown)


def _part(text: str, colons: str) -> Part:
    at = max(text.rfind(colon) for colon in colons)
    weight = _WEIGHT.fullmatch(text, at + 1) if at >= 0 else None
    if weight is None:
        return Part(to_ascii(text).rstrip(), 1.0)
    number = weight[1].translate(str.maketrans("．＋－", ".+-"))
    return Part(to_ascii(text[:at]).rstrip(), float(number))
