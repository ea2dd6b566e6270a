"""Full-width punctuation: syntax where it stands for syntax, a character everywhere else."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.prompts.punctuation import to_ascii

FULL_WIDTH = "（）［］【】：｜"
TEXT = st.text(alphabet="(（)）[［【]］】:：|｜\\红1０.．3 a", max_size=40)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("（红色：1.3）的花", "(红色:1.3)的花"),
        ("(红色：1.3)的花", "(红色:1.3)的花"),
        ("（红色:1.3)的花", "(红色:1.3)的花"),
        ("（红色： －１．３ ）", "(红色: -1.3 )"),
        ("（红色）【蓝色】［绿色］", "(红色)[蓝色][绿色]"),
        ("（（红）：1.2）", "((红):1.2)"),
        ("［红：蓝：0.5］", "[红:蓝:0.5]"),
        ("[红：蓝：０．５]", "[红:蓝:0.5]"),
        ("[红:蓝：0.5]", "[红:蓝:0.5]"),
        ("【红：：8】", "[红::8]"),
        ("【红｜蓝】", "[红|蓝]"),
        ("[红|蓝｜]", "[红|蓝|]"),
        ("【（红：1.2）：（蓝：0.8）：5】", "[(红:1.2):(蓝:0.8):5]"),
        # Text that looks like punctuation.
        ("红色（没有关上", "红色（没有关上"),
        ("没有打开）的", "没有打开）的"),
        ("标题：一只猫", "标题：一只猫"),
        ("比例16：9｜横图", "比例16：9｜横图"),
        ("（注：说明）", "(注：说明)"),
        ("（红｜蓝）", "(红｜蓝)"),
        ("[红：蓝]", "[红：蓝]"),
        ("[时间：上午：红：蓝：0.5]", "[时间：上午：红：蓝：0.5]"),
        ("[红：色:蓝:0.5]", "[红：色:蓝:0.5]"),
        ("[红：1｜蓝]", "[红：1|蓝]"),
        (r"\（红色\）", r"\（红色\）"),
        (r"（红\：1.3）", r"(红\：1.3)"),
        ("，、。；！？“”《》＜＞", "，、。；！？“”《》＜＞"),
    ],
)
def test_what_is_syntax_and_what_is_text(typed: str, meant: str) -> None:
    assert to_ascii(typed) == meant


@given(TEXT)
def test_only_punctuation_and_numbers_change_and_each_in_its_place(typed: str) -> None:
    meant = to_ascii(typed)
    assert len(meant) == len(typed)
    for before, after in zip(typed, meant, strict=True):
        assert before == after or (before in FULL_WIDTH + "０．" and after in "()[]:|0.")


@given(st.text(alphabet="([)]:|\\红1.3 a", max_size=40))
def test_ascii_stays_as_it_is(typed: str) -> None:
    assert to_ascii(typed) == typed


@given(st.text(alphabet="(（)）红a", max_size=30))
def test_brackets_that_change_are_pairs(typed: str) -> None:
    """Taking turns with a stack: every full-width bracket that has a partner changes, no other does."""
    waiting: list[int] = []
    paired: set[int] = set()
    for i, sign in enumerate(typed):
        if sign in "(（":
            waiting.append(i)
        elif sign in ")）" and waiting:
            paired |= {waiting.pop(), i}
    changed = {i for i, (a, b) in enumerate(zip(typed, to_ascii(typed), strict=True)) if a != b}
    assert changed == {i for i in paired if typed[i] in "（）"}


@pytest.mark.parametrize("piece", ["（", "）", "（：", "：1", "【｜", "（ ", "（：1）", "(【", "】)"])
def test_time_is_linear(piece: str) -> None:
    begun = time.perf_counter()
    to_ascii(piece * 50_000)
    assert time.perf_counter() - begun < 5  # quadratic: minutes
