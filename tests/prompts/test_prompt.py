"""A prompt taken apart: comments, tags, AND, weights at the end; what counts as plain."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.prompts import parse, parse_negative


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a AND b:0.5", [("a", 1.0), (" b", 0.5)]),
        ("a AND b ： －０．５", [("a", 1.0), (" b", -0.5)]),
        ("一只猫AND一只狗", [("一只猫", 1.0), ("一只狗", 1.0)]),
        ("a :2 AND AND b", [("a", 2.0), ("", 1.0), (" b", 1.0)]),
        ("(a AND b:0.5)", [("(a", 1.0), (" b:0.5)", 1.0)]),
        ("a and b, SAND ANDY", [("a and b, SAND ANDY", 1.0)]),
        ("a cat:0.5", [("a cat", 0.5)]),
        ("比例16：9", [("比例16：9", 1.0)]),
        ("[a:b:3]", [("[a:b:3]", 1.0)]),
        ("（红：1.3） ", [("(红:1.3)", 1.0)]),
        ("# a comment\na cat\n#another", [("a cat", 1.0)]),
        ("the # 1", [("the # 1", 1.0)]),
    ],
)
def test_parts(typed: str, parts: list[tuple[str, float]]) -> None:
    found = parse(typed)
    assert list(found.parts) == parts
    assert found.typed == typed


def test_a_negative_prompt_knows_neither_and_nor_a_weight_at_its_end() -> None:
    assert parse_negative("（a） AND b:0.5").parts == (("(a) AND b:0.5", 1.0),)


def test_tags_are_no_text() -> None:
    found = parse("a <lora:x:0.5> AND b<foo:y>：0.5")
    assert found.parts == (("a", 1.0), (" b", 0.5))
    assert found.loras == (("x", 0.5, 0.5),)
    assert found.unknown == ("<foo:y>",)


@pytest.mark.parametrize(
    "text", ["", "a red apple", "一只猫，一只狗", "a: b, {c} <d> | e", "（没关", "16：9", "it's ~!@", "a )] b"]
)
def test_text_without_syntax_is_plain(text: str) -> None:
    assert parse(text).is_plain
    assert parse_negative(text).is_plain


@pytest.mark.parametrize(
    "text",
    ["(a)", "[a]", "（a）", "a (b", "[a:b:3]", "[a|b]", "a BREAK b", "a AND b", "a:2", "<lora:a:1>", "<foo:a>", "a\\b",
     "#a", "a <lora:b:1>"],
)  # fmt: skip
def test_text_with_syntax_is_not_plain(text: str) -> None:
    assert not parse(text).is_plain


@given(st.text(alphabet="a红 ()[]（】：:|\\<>ANDBREK0.5#\n", max_size=30))
def test_any_text_can_be_read(text: str) -> None:
    found = parse(text) if ":" not in text.replace("：", ":") else None
    assert found is None or found.parts
    assert isinstance(parse_negative(text.replace("<", "")).is_plain, bool)


def test_words_are_what_the_encoder_may_read() -> None:
    words = parse("（红色：1.3）的[猫:狗:0.5] AND 鸟 BREAK 鱼:0.5<lora:龙:1>").words
    assert {"红色", "猫", "狗", "鸟", "鱼"} <= set(words.replace("的", " ").split())
    assert not set("（）()[]:：龙5") & set(words)


@pytest.mark.parametrize("piece", [" ", " :", "a AND ", "AND", "#a\n", "1", ":1", "\n"])
def test_time_is_linear(piece: str) -> None:
    begun = time.perf_counter()
    parse("a" + piece * 50_000 + "b")
    assert time.perf_counter() - begun < 5  # quadratic: minutes
