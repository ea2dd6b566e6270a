"""From weighted text to chunks of token ids: 75 for CLIP, with a start and an end 77; any length of prompt.

A1111's rules: a chunk that is full moves what follows its last comma to the next one, if that are 20 tokens or fewer;
BREAK fills the chunk up; the vectors of one textual inversion stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InputError
from .emphasis import Break, Piece

COMMAS = ",，、。；"
BACKTRACK = 20


class Chunk(NamedTuple):
    """Token ids with start, end and padding, and a weight for each; start, end and padding have 1."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What chunks need to know of a tokenizer.

    length   tokens of a chunk, without start and end
    commas   token sequences of a comma
    groups   textual inversions of several vectors: the first one's id -> all ids
    """

    tokenizer: Any
    length: int
    start: int
    end: int
    pad: int
    commas: frozenset[tuple[int, ...]]
    groups: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> Vocabulary:
        """
        max_length   the positions that the text encoder has, start and end included
        raises       InputError for a tokenizer that marks no start or end (T5)
        """
        start = _first(tokenizer.cls_token_id, tokenizer.bos_token_id)
        end = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
        if start is None or end is None:
            raise InputError(
                f"{type(tokenizer).__name__} marks no start and end of a text, which weights and chunks need: "
                "give the prompt without syntax."
            )
        return cls(
            tokenizer,
            min(tokenizer.model_max_length, max_length) - 2,
            start,
            end,
            _first(tokenizer.pad_token_id, end),
            frozenset(_commas(tokenizer)),
            _groups(tokenizer),
        )

    def tokens(self, text: str) -> list[int]:
        """Ids without start and end, none cut off."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return ids

    def units(self, text: str) -> Iterator[tuple[tuple[int, ...], bool]]:
        """(ids that stay together, whether a comma ends with them)"""
        ids = self.tokens(text)
        for i, token in enumerate(ids):
            ends_comma = any(tuple(ids[max(i + 1 - len(comma), 0) : i + 1]) == comma for comma in self.commas)
            yield self.groups.get(token, (token,)), ends_comma


def chunks(pieces: Iterable[Piece | Break], vocabulary: Vocabulary, backtrack: int = BACKTRACK) -> list[Chunk]:
    """At least one chunk, each of `vocabulary.length` + 2 tokens.

    raises   InputError where a textual inversion has more vectors than a chunk has places
    """
    page = _Page(vocabulary)
    for piece in pieces:
        if isinstance(piece, Break):
            page.turn()
            continue
        for unit, ends_comma in vocabulary.units(piece.text):
            if ends_comma:
                page.comma = len(page.ids)
            elif page.is_full and backtrack and page.comma >= 0 and len(page.ids) - page.comma <= backtrack:
                page.turn(keep=page.comma + 1)
            if len(page.ids) + len(unit) > vocabulary.length:
                page.turn()
            page.add(unit, piece.weight)
    if page.ids or not page.chunks:
        page.turn()
    return page.chunks


def empty(vocabulary: Vocabulary) -> Chunk:
    """The chunk of an empty prompt."""
    return chunks([Piece("", 1.0)], vocabulary)[0]


class _Page:
    """The chunk that is being filled, and those that are done.  comma: the place of its last comma, or -1."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.comma = -1
        self.chunks: list[Chunk] = []

    @property
    def is_full(self) -> bool:
        return len(self.ids) == self.vocabulary.length

    def add(self, unit: Sequence[int], weight: float) -> None:
        if len(unit) > self.vocabulary.length:
            name = self.vocabulary.tokenizer.convert_ids_to_tokens(unit[0])
            raise InputError(
                f"the textual inversion {name!r} has {len(unit)} vectors, but a chunk of the prompt has "
                f"{self.vocabulary.length} places: leave it out."
            )
        self.ids += unit
        self.weights += [weight] * len(unit)

    def turn(self, keep: int | None = None) -> None:
        """Close the chunk; what stands from `keep` on goes to the next one."""
        v, keep = self.vocabulary, len(self.ids) if keep is None else keep
        # The end comes once and padding after it: for CLIP of SD1 they are the same token.
        ids = [v.start, *self.ids[:keep], v.end, *[v.pad] * (v.length - keep)]
        weights = [1.0, *self.weights[:keep], *[1.0] * (v.length + 1 - keep)]
        self.chunks.append(Chunk(tuple(ids), tuple(weights)))
        self.ids, self.weights, self.comma = self.ids[keep:], self.weights[keep:], -1


def _first(*found: int | None) -> Any:
    return next((one for one in found if one is not None), None)


def _commas(tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """A comma's tokens as a word of its own, and, where words carry no mark of their end, within a text."""
    ends_marked = tokenizer.convert_tokens_to_ids(",</w>") not in (None, tokenizer.unk_token_id)
    for comma in COMMAS:
        ids = tuple(tokenizer(comma, add_special_tokens=False).input_ids)
        if ids and tokenizer.unk_token_id not in ids:
            yield ids
        inner = tokenizer.convert_tokens_to_ids(comma)
        if not ends_marked and inner not in (None, tokenizer.unk_token_id):
            yield (inner,)


def _groups(tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """diffusers adds the vectors of `name` as the tokens name, name_1, name_2, …"""
    added = tokenizer.added_tokens_encoder
    found = {}
    for name, first in added.items():
        ids, i = [first], 1
        while (following := added.get(f"{name}_{i}")) is not None:
            ids.append(following)
            i += 1
        if len(ids) > 1:
            found[first] = tuple(ids)
    return found
