"""Full-width punctuation of Chinese input methods, read as syntax where it stands for syntax.

（红色：1.3）的花           ->  (红色:1.3)的花       brackets in pairs, also mixed; the colon before a weight
【红｜蓝】、［红：蓝：0.5］  ->  [红|蓝]、[红:蓝:0.5]  the bars and colons of a schedule
红色（没有关上              ->  as it is             a bracket without its partner
标题：一只猫                ->  as it is             a colon that neither a weight nor a schedule needs
\\（红色\\）                ->  as it is             escaped
"""

from __future__ import annotations

import re

ROUND, SQUARE = ("(（", ")）"), ("[［【", "]］】")
COLONS, BARS = ":：", "|｜"
_ASCII = str.maketrans("（）［］【】：｜０１２３４５６７８９．＋－", "()[][]:|0123456789.+-")
_FULL_WIDTH = re.compile("[（）［］【】：｜]")
_MARK = re.compile(r"\\.|[()（）\[\]［］【】:：|｜]", re.DOTALL)
_NUMBER = re.compile(r"\s*[+\-＋－]?[0-9０-９.．]+\s*")


def to_ascii(text: str) -> str:
    """The prompt with ASCII syntax; every other character stays as it is, in its place.  Linear in the text."""
    if not _FULL_WIDTH.search(text):
        return text
    changes = _Changes(text)
    groups: list[_Group] = []
    num_open = {ROUND: 0, SQUARE: 0}
    for mark in _MARK.finditer(text):
        sign, at = mark[0], mark.start()
        for kind in (ROUND, SQUARE):
            if sign in kind[0]:
                groups.append(_Group(kind, at))
                num_open[kind] += 1
            elif sign in kind[1] and num_open[kind]:
                while groups[-1].kind is not kind:  # a bracket of the other kind that nothing closes
                    num_open[groups.pop().kind] -= 1
                num_open[kind] -= 1
                changes.close(groups.pop(), at)
        if groups and sign in COLONS:
            groups[-1].colons.append(at)
        elif groups and sign in BARS:
            groups[-1].bars.append(at)
    return changes.applied()


class _Group:
    """An open bracket and the separators directly in it."""

    def __init__(self, kind: tuple[str, str], start: int) -> None:
        self.kind, self.start = kind, start
        self.colons: list[int] = []
        self.bars: list[int] = []


class _Changes:
    """What becomes ASCII: places in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.letters = list(text)

    def close(self, group: _Group, end: int) -> None:
        self._change(group.start, end)
        if group.kind is ROUND:
            if group.colons and self._is_number(group.colons[-1] + 1, end):
                self._change(group.colons[-1], *range(group.colons[-1] + 1, end))
        elif group.colons and self._is_number(group.colons[-1] + 1, end):
            self._schedule(group, end)
        elif not any(self.text[at] == ":" for at in group.colons):
            self._change(*group.bars)

    def _schedule(self, group: _Group, end: int) -> None:
        """[from:to:when] has one or two colons: those of ASCII, where they are enough, else all."""
        last = group.colons[-1]
        ascii_ones = [at for at in group.colons if self.text[at] == ":"]
        chosen = ascii_ones if last in ascii_ones and len(ascii_ones) <= 2 else group.colons
        if len(chosen) <= 2:
            self._change(*chosen, *range(last + 1, end))

    def _is_number(self, start: int, end: int) -> bool:
        return _NUMBER.fullmatch(self.text, start, end) is not None

    def _change(self, *places: int) -> None:
        for at in places:
            self.letters[at] = self.letters[at].translate(_ASCII)

    def applied(self) -> str:
        return "".join(self.letters)
