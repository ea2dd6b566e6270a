"""Weights of words, as A1111 reads them.

(x)  ×1.1       [x]  ÷1.1       (x:1.3)  ×1.3, and every bracket around multiplies       \\( \\) \\[ \\] \\\\  literal
an open bracket without its partner reaches to the end; a closing one is text
BREAK between words starts a new chunk, in brackets too (where A1111 takes it for a word of negative weight)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

ROUND_FACTOR, SQUARE_FACTOR = 1.1, 1 / 1.1
_TOKEN = re.compile(
    r"""
    (?P<escape> \\[()\[\]\\]? )     # of a lone backslash nothing stays
    | (?P<round> \( ) | (?P<square> \[ )
    | :\s*(?P<weight> [+-]?[.\d]+ )\s*\)
    | (?P<end_round> \) ) | (?P<end_square> ] )
    | (?P<text> [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
CJK = "々〇぀-ヿㄅ-ㄯ㐀-䶿一-鿿가-힣豈-﫿ｦ-ﾟ𠀀-𳏿"
"""Letters of scripts that put no space between words, as part of a regular expression's set."""


def keyword(word: str) -> re.Pattern[str]:
    """A word of its own; letters of Chinese beside it do not make it part of another."""
    return re.compile(rf"(?<![^\W{CJK}]){word}(?![^\W{CJK}])")


_BREAK = keyword("BREAK")
# So many brackets around the average piece are multiplied one by one, in A1111's order, to the last bit.
_DEPTH = 64


class Piece(NamedTuple):
    """Text and its weight."""

    text: str
    weight: float


class Break(NamedTuple):
    """The end of a chunk."""


def pieces(prompt: str) -> list[Piece | Break]:
    """The prompt in pieces of one weight, never empty, in time linear in its length."""
    texts, ranges = _read(prompt)
    weights = _weights(len(texts), ranges)
    return list(_merged(texts, weights)) or [Piece("", 1.0)]


def _read(prompt: str) -> tuple[list[str | Break], list[tuple[int, int, float]]]:
    """Texts without brackets, and (first text, behind the last text, factor) of each bracket, inner ones first."""
    texts: list[str | Break] = []
    ranges: list[tuple[int, int, float]] = []
    rounds: list[int] = []
    squares: list[int] = []
    for found in _TOKEN.finditer(prompt):
        kind = found.lastgroup
        factor = _factor(found["weight"]) if kind == "weight" else ROUND_FACTOR
        if kind == "escape":
            texts.append(found[0][1:])
        elif kind == "round":
            rounds.append(len(texts))
        elif kind == "square":
            squares.append(len(texts))
        elif kind in ("weight", "end_round") and rounds:
            if factor is None:  # digits and dots that make no number
                texts.append(found[0][:-1])
            ranges.append((rounds.pop(), len(texts), ROUND_FACTOR if factor is None else factor))
        elif kind == "end_square" and squares:
            ranges.append((squares.pop(), len(texts), SQUARE_FACTOR))
        else:
            texts.extend(_broken(found[0]))
    ranges += [(start, len(texts), ROUND_FACTOR) for start in rounds]
    ranges += [(start, len(texts), SQUARE_FACTOR) for start in squares]
    return texts, ranges


def _factor(weight: str) -> float | None:
    try:
        return float(weight)
    except ValueError:
        return None


def _broken(text: str) -> Iterator[str | Break]:
    """Text without the BREAKs in it and the white space around them."""
    parts = _BREAK.split(text)
    for i, part in enumerate(parts):
        if i > 0:
            yield Break()
            part = part.lstrip()
        yield part if i == len(parts) - 1 else part.rstrip()


def _weights(num_texts: int, ranges: list[tuple[int, int, float]]) -> list[float]:
    if sum(end - start for start, end, _ in ranges) > _DEPTH * (num_texts + len(ranges)):
        return _deep_weights(num_texts, ranges)
    weights = [1.0] * num_texts
    for start, end, factor in ranges:
        for i in range(start, end):
            weights[i] *= factor
    return weights


def _deep_weights(num_texts: int, ranges: list[tuple[int, int, float]]) -> list[float]:
    """The same products by sums of logarithms, whose cost does not grow with the depth."""
    exponents = [0.0] * (num_texts + 1)
    negatives, zeros = [0] * (num_texts + 1), [0] * (num_texts + 1)
    for start, end, factor in ranges:
        for place, sign in ((start, 1), (end, -1)):
            exponents[place] += sign * math.log(abs(factor) or 1)
            negatives[place] += sign * (factor < 0)
            zeros[place] += sign * (factor == 0)
    sums = zip(accumulate(exponents), accumulate(negatives), accumulate(zeros), strict=True)
    values = [0.0 if zero else (-1) ** negative * _exp(exponent) for exponent, negative, zero in sums]
    return values[:num_texts]


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def _merged(texts: list[str | Break], weights: list[float]) -> Iterator[Piece | Break]:
    """Neighbours of one weight are one piece: words are cut into tokens together."""
    for key, group in groupby(
        zip(texts, weights, strict=True), key=lambda pair: None if isinstance(pair[0], Break) else pair[1]
    ):
        if key is None:
            yield from (Break() for _ in group)
        else:
            yield Piece("".join(str(text) for text, _ in group), key)
