"""Prompts that change while a picture is drawn.

    [from:to:when]   `from` up to step `when`, then `to`       [to:when]  [from::when]     add, remove
    [a|b|c]          another one at every step; [a|] at every other step nothing
    when             with a dot: a share of all steps; else a step's number

Groups nest, and may stand in ( ) and [ ].  Brackets and colons that form no group are text, which the weights' reader
reads again.  A bar outside of [ | ] makes the whole prompt text, as A1111 does, and so does a backslash at its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

_TOKEN = re.compile(
    r"(?P<text>(?:[^\\\[\]():|]|\\.)+)|(?P<open>[\[(])|(?P<close>[\])])|(?P<separator>[:|])|(?P<bad>\\)"
)
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


class Variant(NamedTuple):
    """One text of a prompt.

    end_step   the last step that uses it, as A1111 counts: it asks for the first variant whose end is not below the
               number of steps done, so that the first variant of two draws one step more than its end says
    """

    end_step: int
    text: str


def variants(prompt: str, steps: int) -> list[Variant]:
    """The texts of a prompt over `steps` calls of the denoiser, in order of their ends; the last end is `steps`.

    Neighbours may have the same text.  cost  linear in the prompt for every variant
    """
    tree = _parse(prompt)
    if tree is None:
        return [Variant(steps, prompt)]
    ends = {steps}
    for node in _nodes(tree):
        if isinstance(node, _Switch) and node.step(steps) >= 1:
            ends.add(node.step(steps))
        elif isinstance(node, _Alternation):
            ends.update(range(1, steps + 1))
    return [Variant(end, _text(tree, end, steps)) for end in sorted(ends)]


def all_text(prompt: str) -> str:
    """The text of all variants: every branch, one behind the other."""
    tree = _parse(prompt)
    return prompt if tree is None else _text(tree)


@dataclass(frozen=True)
class _Switch:
    before: _Sequence
    after: _Sequence
    when: str

    def step(self, steps: int) -> int:
        """The last step of `before`."""
        value = float(self.when) * steps if "." in self.when else float(self.when)
        return int(max(min(value, steps), 0))


@dataclass(frozen=True)
class _Alternation:
    options: tuple[_Sequence, ...]


_Node: TypeAlias = "str | _Switch | _Alternation"
_Sequence: TypeAlias = "list[_Node | _Sequence]"


@dataclass
class _Group:
    """An open bracket with what stands in it, cut at its separators."""

    opened: str
    segments: list[_Sequence] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def literal(self) -> _Sequence:
        """The same, with brackets and separators as text."""
        found: _Sequence = [self.opened, *self.segments[0]]
        for separator, segment in zip(self.separators, self.segments[1:], strict=True):
            found += [separator, *segment]
        return found

    def closed(self, bracket: str) -> _Sequence | None:
        """What the group stands for, or None where it is no group of the grammar."""
        kinds = set(self.separators)
        if bracket == ")":
            valid = self.opened == "(" and kinds <= {":"} and len(self.separators) <= 1
            return [*self.literal(), ")"] if valid else None
        if self.opened != "[" or len(kinds) > 1:
            return None
        if not kinds:
            return [*self.literal(), "]"]
        return [_Alternation(tuple(self.segments))] if kinds == {"|"} else self._switch()

    def _switch(self) -> _Sequence | None:
        *texts, last = self.segments
        found = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if found is None or len(texts) > 2:
            return None
        return [_Switch(texts[0] if len(texts) == 2 else [], texts[-1], found[1])]


def _parse(prompt: str) -> _Sequence | None:
    """The tree of a prompt, or None where the grammar refuses it."""
    root: _Sequence = []
    groups: list[_Group] = []
    for token in _TOKEN.finditer(prompt):
        kind, text = token.lastgroup, token[0]
        if kind == "bad":
            return None
        if kind == "open":
            groups.append(_Group(text))
        elif kind == "close":
            found = groups[-1].closed(text) if groups else None
            if found is None:
                _give_up(groups, root)
                root.append(text)
            else:
                groups.pop()
                (groups[-1].segments[-1] if groups else root).append(found)
        elif kind == "separator" and groups:
            groups[-1].separators.append(text)
            groups[-1].segments.append([])
        else:
            (groups[-1].segments[-1] if groups else root).append(text)
    _give_up(groups, root)
    return None if "|" in root else root


def _give_up(groups: list[_Group], root: _Sequence) -> None:
    """A bracket that is no group's is text, which no group may hold: all that are open are text too."""
    for group in groups:
        root += group.literal()
    groups.clear()


def _nodes(tree: _Sequence) -> list[_Switch | _Alternation]:
    found: list[_Switch | _Alternation] = []
    waiting: list[_Node | _Sequence] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, _Switch):
            found.append(node)
            waiting += [node.before, node.after]
        elif isinstance(node, _Alternation):
            found.append(node)
            waiting += node.options
    return found


def _text(tree: _Sequence, step: int | None = None, steps: int = 0) -> str:
    """The text of one step, or of all branches."""
    found: list[str] = []
    waiting: list[_Node | _Sequence] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, list):
            waiting += reversed(node)
        elif step is None:
            branches = [node.before, node.after] if isinstance(node, _Switch) else node.options
            waiting += (part for branch in reversed(branches) for part in (branch, " "))
        elif isinstance(node, _Switch):
            waiting.append(node.before if step <= node.step(steps) else node.after)
        else:
            waiting.append(node.options[(step - 1) % len(node.options)])
    return "".join(found)
