"""Weights of words, against a slow reader that follows the published rules letter by letter."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.prompts import Break, Piece, pieces
from allaprima.prompts import emphasis as module

ROUND, SQUARE = 1.1, 1 / 1.1
PROMPTS = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":", ":1.3)", ":-.5)", ": +2 )", ":1.2.3)", "\\", "\\(", "\\]", "\\\\", "a",
                     "red cat", " ", ",", "1.5", "，", "红"])
).map("".join)  # fmt: skip


def slow(prompt: str) -> list[tuple[str, float]]:
    """(letter, weight) of all that is read: every bracket that closes multiplies all letters behind its opening one."""
    letters: list[list[object]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for letter in letters[opened[kind].pop() :]:
            letter[1] = letter[1] * factor  # type: ignore[operator]

    i = 0
    while i < len(prompt):
        sign, end = prompt[i], prompt.find(")", i)
        number = _number(prompt[i + 1 : end]) if sign == ":" and end > i else None
        if sign == "\\":
            i += 1
            if i == len(prompt) or prompt[i] not in "()[]\\":
                continue
            letters.append([prompt[i], 1.0])
        elif sign in "([":
            opened[sign].append(len(letters))
        elif number is not None and opened["("]:
            close("(", number)
            i = end
        elif sign == ")" and opened["("]:
            close("(", ROUND)
        elif sign == "]" and opened["["]:
            close("[", SQUARE)
        else:
            letters.append([sign, 1.0])
        i += 1
    # Brackets that are still open reach to the end: the outermost round one first, square ones after them.
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[kind]:
            for letter in letters[start:]:
                letter[1] = letter[1] * factor  # type: ignore[operator]
    return [(str(letter), float(weight)) for letter, weight in letters]  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    text = text.strip()
    unsigned = text[1:] if text[:1] in ("+", "-") else text
    if not unsigned or set(unsigned) - set("0123456789."):
        return None
    try:
        return float(text)
    except ValueError:
        return None


def letters_of(found: list[Piece | Break]) -> list[tuple[str, float]]:
    return [(letter, piece.weight) for piece in found if isinstance(piece, Piece) for letter in piece.text]


@given(PROMPTS)
def test_every_letter_has_the_weight_of_the_rules_to_the_last_bit(prompt: str) -> None:
    assert letters_of(pieces(prompt)) == slow(prompt)


@given(PROMPTS)
def test_pieces_of_one_weight_are_one(prompt: str) -> None:
    weights = [piece.weight for piece in pieces(prompt) if isinstance(piece, Piece)]
    assert weights
    assert all(before != after for before, after in pairwise(weights))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("", [("", 1.0)]),
        ("a (big) dog", [("a ", 1.0), ("big", 1.1), (" dog", 1.0)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(abc:-1)", [("abc", -1.0)]),
        ("(a (b:1.5):2)", [("a ", 2.0), ("b", 3.0)]),
        ("(open", [("open", 1.1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("closed) ]", [("closed) ]", 1.0)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("a:1.3)", [("a:1.3)", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
    ],
)
def test_examples(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = pieces(prompt)
    assert [piece.text for piece in found if isinstance(piece, Piece)] == [text for text, _ in expected]
    assert [piece.weight for piece in found if isinstance(piece, Piece)] == pytest.approx([w for _, w in expected])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", ["a", None, "b"]),
        ("一只猫BREAK一只狗", ["一只猫", None, "一只狗"]),
        ("猫\n BREAK\t狗", ["猫", None, "狗"]),
        ("BREAK a", ["", None, "a"]),
        ("a BREAK BREAK b", ["a", None, "", None, "b"]),
        ("(a BREAK b:1.5)", ["a", None, "b"]),
        ("break BREAKS OUTBREAK éBREAK BREAK_ 1BREAK", ["break BREAKS OUTBREAK éBREAK BREAK_ 1BREAK"]),
        ("a,BREAK,b", ["a,", None, ",b"]),
        ("かBREAKカ 한BREAK국", ["か", None, "カ 한", None, "국"]),
    ],
)
def test_break_is_a_word_of_its_own(prompt: str, expected: list[str | None]) -> None:
    assert [None if isinstance(found, Break) else found.text for found in pieces(prompt)] == expected


def test_deep_brackets_multiply_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithms have a relative error of some units in the last place for each factor."""
    prompt = "(a(b:0)[c(d:-2" + "(e" * 60 + ":1.01)" * 60 + ")]f:3)"
    exact = pieces(prompt)
    monkeypatch.setattr(module, "_DEPTH", 0)
    for one, other in zip(letters_of(exact), letters_of(pieces(prompt)), strict=True):
        assert one[0] == other[0]
        assert other[1] == pytest.approx(one[1], rel=200 * 2**-52)


@pytest.mark.parametrize(
    "piece", ["(", ")", "(a", "[a]", "(a:1.1", ":1.1)", " ", "BREAK ", "\\", ":", ": ", "a :1", "(a)"]
)
def test_time_is_linear(piece: str) -> None:
    begun = time.perf_counter()
    found = pieces(piece * 50_000)
    assert time.perf_counter() - begun < 5  # quadratic: minutes
    assert not any(math.isnan(one.weight) for one in found if isinstance(one, Piece))


def test_balanced_nesting_is_linear_too() -> None:
    begun = time.perf_counter()
    found = pieces("(a" * 50_000 + ")" * 50_000)
    assert time.perf_counter() - begun < 5
    assert len(letters_of(found)) == 50_000
