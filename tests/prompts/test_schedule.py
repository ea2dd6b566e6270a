"""Prompts that change with the step: random trees are written down as prompts, and their texts known beforehand."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.prompts import variants
from allaprima.prompts.schedule import all_text

STEPS = 12


class Node:
    """Part of a prompt: how it is written, what it reads at a step, at which steps it may change."""

    def written(self) -> str:
        raise NotImplementedError

    def at(self, step: int) -> str:
        raise NotImplementedError

    def ends(self) -> set[int]:
        raise NotImplementedError


@dataclass
class Text(Node):
    text: str

    def written(self) -> str:
        return self.text

    def at(self, step: int) -> str:
        return self.text

    def ends(self) -> set[int]:
        return set()


@dataclass
class Row(Node):
    """Parts in a row, in brackets or not."""

    parts: list[Node]
    brackets: str = ""
    weight: str = ""

    def _joined(self, texts: list[str]) -> str:
        opened, closed = self.brackets[:1], self.brackets[1:]
        return opened + "".join(texts) + self.weight + closed

    def written(self) -> str:
        return self._joined([part.written() for part in self.parts])

    def at(self, step: int) -> str:
        return self._joined([part.at(step) for part in self.parts])

    def ends(self) -> set[int]:
        return set().union(*(part.ends() for part in self.parts))


@dataclass
class Switch(Node):
    before: Node | None
    after: Node
    when: str

    def _step(self) -> int:
        number = float(self.when) * STEPS if "." in self.when else float(self.when)
        return max(0, min(STEPS, int(number)))

    def written(self) -> str:
        before = "" if self.before is None else f"{self.before.written()}:"
        return f"[{before}{self.after.written()}:{self.when}]"

    def at(self, step: int) -> str:
        if step > self._step():
            return self.after.at(step)
        return self.before.at(step) if self.before else ""

    def ends(self) -> set[int]:
        own = {self._step()} - {0}
        return own | self.after.ends() | (self.before.ends() if self.before else set())


@dataclass
class Alternation(Node):
    options: list[Node]

    def written(self) -> str:
        return f"[{'|'.join(option.written() for option in self.options)}]"

    def at(self, step: int) -> str:
        return self.options[(step - 1) % len(self.options)].at(step)

    def ends(self) -> set[int]:
        return set(range(1, STEPS + 1))


TEXTS = st.sampled_from(["", "a", "b cat", " ", "，红", "1.5", "\\(", "\\|", "\\:", "x, y", "\n"]).map(Text)
WHEN = st.sampled_from(["3", " 5", "0.5 ", ".25", "1.", "0", "0.01", "-2", "1e1", "99", "+4", "1.0", "0.999"])


def groups(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    rows = st.lists(inner, max_size=3)
    return st.one_of(
        st.builds(Row, rows),
        st.builds(Row, rows, st.sampled_from(["()", "[]"])),
        st.builds(Row, rows, st.just("()"), st.sampled_from([":1.2", ":b", ":"])),
        st.builds(Switch, st.none() | inner, inner, WHEN),
        st.builds(Alternation, st.lists(inner, min_size=2, max_size=4)),
    )


TREES = st.recursive(TEXTS, groups, max_leaves=8)


@given(TREES)
def test_every_step_reads_what_its_tree_says(tree: Node) -> None:
    found = variants(tree.written(), STEPS)
    assert [variant.end_step for variant in found] == sorted(tree.ends() | {STEPS})
    assert [variant.text for variant in found] == [tree.at(variant.end_step) for variant in found]


@given(TREES, st.sampled_from(["(", ")", "[", "]", ":"]))
def test_a_stray_bracket_or_colon_beside_it_is_text(tree: Node, sign: str) -> None:
    found = variants(f"x{sign}x {tree.written()} x", STEPS)
    assert [variant.text for variant in found] == [f"x{sign}x {tree.at(variant.end_step)} x" for variant in found]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b::0.25]", [(2, "a b"), (10, "a ")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:0]", [(10, "b")]),
        # The same text twice stays two variants: the mean that "Original" restores counts them.
        ("[[a:b:2]::1]c", [(1, "ac"), (2, "c"), (10, "c")]),
        # What is no group is text.
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:(3)]", [(10, "[a:(3)]")]),
        ("(a:b:c)", [(10, "(a:b:c)")]),
        # A bar outside of [ | ], and a backslash before nothing, make it all text.
        ("a | [b:3]", [(10, "a | [b:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
        ("[a|b:3] [c:3]", [(10, "[a|b:3] [c:3]")]),
        ("[b:3]\\", [(10, "[b:3]\\")]),
    ],
)
def test_examples(prompt: str, expected: list[tuple[int, str]]) -> None:
    assert variants(prompt, 10) == expected


def test_alternatives_may_be_empty() -> None:
    assert [text for _, text in variants("[fe|]male", 4)] == ["female", "male", "female", "male"]
    assert [text for _, text in variants("[fe|||]male", 5)] == ["female", "male", "male", "male", "female"]


@pytest.mark.parametrize("when", ["1e999", "-1e999", "1.5", "999999999999999999999"])
def test_a_step_beyond_the_end_is_the_end(when: str) -> None:
    assert variants(f"[a:b:{when}]", 10) == [(10, "b" if when.startswith("-") else "a")]


def test_all_text_has_every_branch() -> None:
    assert set(all_text("[cat:[dog|bird]:0.5] and (fish:1.2)").split()) == {"cat", "dog", "bird", "and", "(fish:1.2)"}


@pytest.mark.parametrize("piece", ["[", "]", "(", "[a:", "[a|", ":", "[a:b:3]", "[a", ")]", "\\", "[ :3", "(a:b:c)"])
def test_time_is_linear(piece: str) -> None:
    begun = time.perf_counter()
    variants(piece * 30_000, 10)
    assert time.perf_counter() - begun < 5  # quadratic: minutes


@pytest.mark.parametrize("opened", ["[a:", "[(", "[a|"])
def test_depth_has_no_limit(opened: str) -> None:
    closed = {"[a:": ":0.5]", "[(": ")]", "[a|": "]"}[opened]
    found = variants(opened * 20_000 + "x" + closed * 20_000, 2)
    assert found[-1].end_step == 2
