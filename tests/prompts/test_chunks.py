"""Chunks of token ids, against a slow cutter that follows the published rules on whole lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.errors import InputError
from allaprima.prompts import Break, Piece, Vocabulary, chunks
from tests.tiny import tiny_bert_tokenizer, tiny_clip_tokenizer

LENGTH, BACKTRACK = 12, 4
PIECES = st.lists(
    st.builds(Piece, st.text(alphabet="ab,，", max_size=20), st.sampled_from([1.0, 1.3, -0.5])) | st.just(Break()),
    max_size=6,
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(tiny_clip_tokenizer(), LENGTH + 2)


def slow(pieces: list[Piece | Break], v: Vocabulary) -> list[list[tuple[int, float]]]:
    """(id, weight) of each chunk, without start, end and padding."""
    sections: list[list[tuple[int, float, bool]]] = [[]]
    for piece in pieces:
        if isinstance(piece, Break):
            sections.append([])
        else:
            sections[-1] += [(unit[0], piece.weight, comma) for unit, comma in v.units(piece.text)]
    found = []
    for i, section in enumerate(sections):
        rest = section
        while len(rest) > LENGTH:
            commas = [at for at in range(LENGTH - BACKTRACK, LENGTH) if rest[at][2]]
            # A comma is itself never moved on: it may open the next chunk.
            cut = commas[-1] + 1 if commas and not rest[LENGTH][2] else LENGTH
            found.append(rest[:cut])
            rest = rest[cut:]
        # BREAK ends a chunk even if it is empty; the end of the prompt only one that holds something.
        if rest or i < len(sections) - 1 or not found:
            found.append(rest)
    return [[(token, weight) for token, weight, _ in chunk] for chunk in found]


@given(pieces=PIECES)
def test_chunks_are_cut_where_the_rules_say(vocabulary: Vocabulary, pieces: list[Piece | Break]) -> None:
    found = chunks(pieces, vocabulary, BACKTRACK)
    expected = slow(pieces, vocabulary)
    assert len(found) == len(expected)
    for chunk, inner in zip(found, expected, strict=True):
        filling = LENGTH - len(inner)
        v = vocabulary
        assert chunk.ids == (v.start, *(token for token, _ in inner), v.end, *[v.pad] * filling)
        assert chunk.weights == (1.0, *(weight for _, weight in inner), *[1.0] * (filling + 1))


@pytest.mark.parametrize("comma", [",", "，", "、", "。", "；"])
def test_a_phrase_is_not_cut_where_a_comma_is_near(comma: str) -> None:
    tokenizer = tiny_clip_tokenizer()
    v = Vocabulary.of(tokenizer, 77)
    head, tail = "a" * 60, "b" * 16
    near = chunks([Piece(f"{head} {comma} {tail}", 1.0)], v)
    num_comma = len(v.tokens(comma))
    assert [sum(i not in (v.start, v.end) for i in chunk.ids) for chunk in near] == [60 + num_comma, 16]
    far = chunks([Piece(f"{'a' * 40} {comma} {'b' * 60}", 1.0)], v)
    assert sum(i not in (v.start, v.end) for i in far[0].ids) == 75
    assert chunks([Piece(f"{head} {comma} {tail}", 1.0)], v, backtrack=0)[0].ids.count(v.end) == 1


def test_real_chunks_have_77_tokens() -> None:
    v = Vocabulary.of(tiny_clip_tokenizer(), 77)
    assert (v.length, v.start, v.end) == (75, v.tokenizer.bos_token_id, v.tokenizer.eos_token_id)
    assert [len(chunk.ids) for chunk in chunks([Piece("a" * 200, 1.0)], v)] == [77] * 3


def test_bert_starts_with_cls_ends_with_sep_and_is_padded() -> None:
    tokenizer = tiny_bert_tokenizer()
    v = Vocabulary.of(tokenizer, 512)
    (chunk,) = chunks([Piece("红色的", 1.0), Piece("苹果", 1.3)], v)
    assert list(chunk.ids) == tokenizer("红色的苹果", padding="max_length", max_length=64).input_ids
    assert chunk.weights[:7] == (1.0, 1.0, 1.0, 1.0, 1.3, 1.3, 1.0)


def test_the_vectors_of_an_inversion_stay_together() -> None:
    tokenizer = tiny_clip_tokenizer()
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    v = Vocabulary.of(tokenizer, LENGTH + 2)
    vectors = tuple(tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"]))
    found = chunks([Piece("a" * 10 + " <cat> b <dog>", 1.2)], v)
    assert len(found) == 2
    assert found[0].ids[11:] == (v.end, v.pad, v.pad)
    assert found[1].ids[1:4] == vectors
    assert found[1].weights[:6] == (1.0, 1.2, 1.2, 1.2, 1.2, 1.2)
    fitting = chunks([Piece("a" * 9 + " <cat>", 1.0)], v)
    assert fitting[0].ids[10:13] == vectors


def test_an_inversion_longer_than_a_chunk_is_refused() -> None:
    tokenizer = tiny_clip_tokenizer()
    tokenizer.add_tokens(["<cat>", *(f"<cat>_{i}" for i in range(1, 13))])
    with pytest.raises(InputError, match="'<cat>' has 13 vectors"):
        chunks([Piece("a <cat>", 1.0)], Vocabulary.of(tokenizer, LENGTH + 2))


def test_a_tokenizer_without_start_and_end_is_refused() -> None:
    tokenizer = tiny_bert_tokenizer()
    tokenizer.cls_token = None
    with pytest.raises(InputError, match="BertTokenizer"):
        Vocabulary.of(tokenizer, 512)
