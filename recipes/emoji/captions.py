"""Scenes and their captions: which pictures go where, and how English and Chinese speak of it.

Imports numpy only, so that a pool of worker processes starts fast.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.emoji.names import (
    A_WORDS,
    AN_WORDS,
    COLORS,
    DEFAULT_STYLES,
    HATS,
    HEADS,
    IRREGULAR_PLURALS,
    MASS,
    PASTELS,
    SINGULAR_IN_S,
    STYLES,
)  # fmt: skip

MAX_SPRITES = 4
EN_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
ZH_NUMBERS = {1: ("一", "1"), 2: ("两", "2"), 3: ("三", "3"), 4: ("四", "4")}


@dataclass
class Scene:
    """What to draw on a canvas of height x width pixels, and how to call it.

    sprite      numbers of the pictures, drawn in this order
    box         for each: centre x, centre y, size in pixels
    background  RGB
    """

    sprite: list[int]
    box: list[tuple[float, float, float]]
    background: tuple[int, int, int]
    en: str
    zh: str


def is_plural(name: str) -> bool:
    last = head_noun(name).split()[-1]
    return last.endswith("s") and not last.endswith("ss") and last not in SINGULAR_IN_S and name not in SINGULAR_IN_S


def head_noun(name: str) -> str:
    """The part of a name that takes the plural: "pot of food" -> "pot"."""
    return re.split(
        r" (?:with|of|in|on|at|without|and|wearing|getting|showing|behind|holding|savoring|blowing|from|pointing) ",
        name,
    )[0]


def is_countable(name: str) -> bool:
    return name not in MASS and not is_plural(name)


def with_article(name: str) -> str:
    """ "apple" -> "an apple"; "grapes" and "bread" stay."""
    if not is_countable(name):
        return name
    low = name.lower()
    vowel = (low[0] in "aeiou" and not low.startswith(A_WORDS)) or low.startswith(AN_WORDS)
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """ "baby chick" -> "baby chicks"; "pot of food" -> "pots of food"; "person biking" -> "people biking"."""
    if name.startswith("person "):
        return "people " + name.removeprefix("person ")
    head = head_noun(name)
    *before, word = head.split()
    if word in IRREGULAR_PLURALS:
        word = IRREGULAR_PLURALS[word]
    elif word.endswith(("s", "x", "ch", "sh", "z")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*before, word]) + name[len(head) :]


class Captioner:
    """Draws scenes at random from the prepared index."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.concepts: list[dict[str, Any]] = index["concepts"]
        self.styles: list[str] = index["styles"]
        self.of: list[dict[str, int]] = [{} for _ in self.concepts]
        for number, (concept, style, _, _) in enumerate(index["sprites"]):
            self.of[concept][self.styles[style]] = number
        weights = np.array([c["weight"] if self.of[i] else 0.0 for i, c in enumerate(self.concepts)])
        self.cumulative = np.cumsum(weights / weights.sum())
        by_name = {c["en"][0]: i for i, c in enumerate(self.concepts)}
        self.hats = [by_name[n] for n in HATS if n in by_name]
        self.heads = [by_name[n] for n in HEADS if n in by_name]
        self.colors = list(COLORS)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    # -- choices ---------------------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, options: Any) -> Any:
        return options[int(self.random.random() * len(options))]

    def concept(self) -> int:
        return min(int(np.searchsorted(self.cumulative, self.random.random())), len(self.concepts) - 1)

    def names(self, concept: int) -> tuple[str, str]:
        """An English and a Chinese name; the official ones more often than the others."""
        c = self.concepts[concept]
        en, zh = (names[0] if self.chance(0.5) else self.pick(names) for names in (c["en"], c["zh"]))
        return en, zh

    def style(self, concepts: list[int], style: str | None) -> tuple[str, bool]:
        """(style, is it named in the caption): one that all the things have."""
        common = set.intersection(*(set(self.of[c]) for c in concepts))
        if style is not None and style in common:
            return style, self.chance(0.5)
        named = self.chance(0.5)
        if not named or not common:
            default = next((s for s in DEFAULT_STYLES if s in common), None)
            if default:
                return default, False
        options = sorted(common) or sorted(self.of[concepts[0]])
        share = np.array([STYLES[s][0] for s in options])
        return options[int(self.random.choice(len(options), p=share / share.sum()))], True

    def background(self) -> tuple[tuple[int, int, int], str, str]:
        """(RGB, English, Chinese); the words are empty when the caption leaves the background open."""
        if self.chance(0.42):
            name = self.pick(self.colors)
            color, zh = COLORS[name]
            return color, name, zh
        return COLORS["white" if self.chance(0.8) else self.pick(PASTELS)][0], "", ""

    # -- scenes ----------------------------------------------------------------------------------------------------

    def scene(self, height: int, width: int, style: str | None = None) -> Scene:
        """One scene; `style` forces the drawing style where the thing exists in it."""
        kind = self.random.random()
        if kind < 0.70:
            return self.single(height, width, style)
        if kind < 0.78:
            return self.pair(height, width, style, vertical=False)
        if kind < 0.84:
            return self.pair(height, width, style, vertical=True)
        if kind < 0.96 or not (self.hats and self.heads):
            return self.several(height, width, style)
        return self.with_hat(height, width, style)

    def single(self, height: int, width: int, style: str | None, concept: int | None = None) -> Scene:
        concept = self.concept() if concept is None else concept
        look, named = self.style([concept], style)
        en, zh = self.names(concept)
        side = min(height, width)
        size = side * self.random.uniform(0.74, 0.9)
        centre = (width / 2 + self.jitter(side), height / 2 + self.jitter(side))
        measure = self.concepts[concept]["measure"]
        phrase_en = self.pick((en, with_article(en), with_article(en), with_article(en)))
        counted = (zh, f"一{measure}{zh}", f"一{measure}{zh}", f"一个{zh}", f"1个{zh}", f"1{measure}{zh}")
        phrase_zh = zh if zh.startswith(("一", "两")) else self.pick((zh, *counted))
        return self.finish([self.of[concept][look]], [(*centre, size)], phrase_en, phrase_zh, look, named, en)

    def several(self, height: int, width: int, style: str | None) -> Scene:
        concept = self.concept()
        look, named = self.style([concept], style)
        en, zh = self.names(concept)
        if not is_countable(en):
            return self.single(height, width, style, concept)
        count = int(self.random.integers(2, MAX_SPRITES + 1))
        boxes = self.grid(count, height, width)
        words = f"{self.pick(EN_NUMBERS[count])} {plural(en)}"
        measure = self.concepts[concept]["measure"] if self.chance(0.7) else "个"
        words_zh = f"{self.pick(ZH_NUMBERS[count])}{measure}{zh}"
        return self.finish([self.of[concept][look]] * count, boxes, words, words_zh, look, named, en)

    def pair(self, height: int, width: int, style: str | None, vertical: bool) -> Scene:
        concepts = [self.concept(), self.concept()]
        look, named = self.style(concepts, style)
        if any(look not in self.of[c] for c in concepts) or concepts[0] == concepts[1]:
            return self.single(height, width, style, concepts[0])
        (en_a, zh_a), (en_b, zh_b) = map(self.names, concepts)
        first, second = self.cells(1, 2, height, width) if not vertical else self.cells(2, 1, height, width)
        turned = self.chance(0.3)
        boxes = [second, first] if turned else [first, second]
        relation, relation_zh = self.relation(vertical, turned)
        a, b = with_article(en_a), with_article(en_b)
        words, words_zh = f"{a} {relation} {b}", f"{zh_a}在{zh_b}的{relation_zh}"
        if not turned and self.chance(0.3):
            words = f"{a} and {b}"
            words_zh = f"上面是{zh_a}，下面是{zh_b}" if vertical else f"{zh_a}和{zh_b}"
            words = f"{a} over {b}" if vertical else words
        sprites = [self.of[c][look] for c in concepts]
        return self.finish(sprites, boxes, words, words_zh, look, named, en_a)

    def relation(self, vertical: bool, turned: bool) -> tuple[str, str]:
        if vertical:
            return (
                (self.pick(("below", "under")), self.pick(("下面", "下方")))
                if turned
                else (self.pick(("above", "on top of")), self.pick(("上面", "上方")))
            )
        return (self.pick(("to the right of", "right of")), self.pick(("右边", "右侧"))) if turned else (self.pick(("to the left of", "left of")), self.pick(("左边", "左侧")))  # fmt: skip

    def with_hat(self, height: int, width: int, style: str | None) -> Scene:
        concepts = [self.pick(self.heads), self.pick(self.hats)]
        look, named = self.style(concepts, style)
        if any(look not in self.of[c] for c in concepts):
            return self.single(height, width, style, concepts[0])
        (en_a, zh_a), (en_b, zh_b) = map(self.names, concepts)
        if self.chance(0.6):
            en_a, zh_a = en_a.removesuffix(" face"), zh_a.removesuffix("脸").removesuffix("头")
        if self.chance(0.4) and self.concepts[concepts[1]]["en"][0] in HATS[:2]:
            en_b, zh_b = "hat", "帽子"
        side = min(height, width)
        size = side * self.random.uniform(0.66, 0.76)
        x, y = width / 2 + self.jitter(side), height / 2 + 0.12 * side
        boxes = [(x, y, size), (x, y - 0.46 * size, 0.58 * size)]
        words = f"{with_article(en_a)} {self.pick(('with', 'wearing', 'in'))} {with_article(en_b)}"
        words_zh = self.pick(
            (f"戴{zh_b}的{zh_a}", f"戴着{zh_b}的{zh_a}", f"一个戴着{zh_b}的{zh_a}", f"{zh_a}戴着{zh_b}")
        )
        return self.finish([self.of[c][look] for c in concepts], boxes, words, words_zh, look, named, en_a)

    # -- layout ----------------------------------------------------------------------------------------------------

    def jitter(self, side: float) -> float:
        return side * float(self.random.uniform(-0.04, 0.04))

    def cells(self, rows: int, columns: int, height: int, width: int) -> list[tuple[float, float, float]]:
        cell = min(height / rows, width / columns)
        size = cell * self.random.uniform(0.8, 0.92)
        # neighbours stay near each other on a wide or tall canvas
        step_y, step_x = min(height / rows, 1.15 * cell), min(width / columns, 1.15 * cell)
        return [
            (width / 2 + (c - (columns - 1) / 2) * step_x, height / 2 + (r - (rows - 1) / 2) * step_y, size)
            for r in range(rows)
            for c in range(columns)
        ]

    def grid(self, count: int, height: int, width: int) -> list[tuple[float, float, float]]:
        ratio = width / height
        if ratio > 1.3 or (count == 2 and ratio >= 0.77):
            return self.cells(1, count, height, width)
        if ratio < 0.77:
            return self.cells(count, 1, height, width)
        boxes = self.cells(2, 2, height, width)
        if count == 3:
            boxes = [(width / 2, boxes[0][1], boxes[0][2]), *boxes[2:]]
        return boxes

    # -- words -----------------------------------------------------------------------------------------------------

    def finish(
        self,
        sprite: list[int],
        box: list[tuple[float, float, float]],
        en: str,
        zh: str,
        look: str,
        named: bool,
        noun: str,
    ) -> Scene:
        color, color_en, color_zh = self.background()
        if self.chance(0.06) and not color_en and not named:
            en = self.pick((f"a picture of {en}", f"an emoji of {en}", f"{noun} emoji" if len(sprite) == 1 else en))
            zh = self.pick((f"{zh}的图片", f"{zh}的画", f"画{zh}"))
        if named:
            _, words_en, words_zh = STYLES[look]
            word_en = words_en[0] if self.chance(0.75) else self.pick(words_en)
            word_zh = words_zh[0] if self.chance(0.6) else self.pick(words_zh)
            en = f"{word_en} of {en}" if self.chance(0.15) else f"{en}, {word_en}"
            zh = f"{word_zh}{'的' if self.chance(0.5) else '，'}{zh}" if self.chance(0.15) else f"{zh}，{word_zh}"
        if color_en:
            en = (
                f"{en} on {with_article(color_en + ' background')}"
                if self.chance(0.25) and not named
                else f"{en}, {color_en} background"
            )
            zh = f"{color_zh}背景，{zh}" if self.chance(0.1) else f"{zh}，{color_zh}背景"
        return Scene(sprite, box, color, en, zh)

    def batch(self, count: int, height: int, width: int, style: str | None = None) -> dict[str, Any]:
        """Many scenes as arrays: sprite [N, 4] (-1: none), box [N, 4, 3], background [N, 3], en and zh lists of N captions."""
        sprite = np.full((count, MAX_SPRITES), -1, np.int16)
        box = np.zeros((count, MAX_SPRITES, 3), np.float32)
        background = np.zeros((count, 3), np.uint8)
        en, zh = [], []
        for n in range(count):
            scene = self.scene(height, width, style)
            sprite[n, : len(scene.sprite)] = scene.sprite
            box[n, : len(scene.box)] = scene.box
            background[n] = scene.background
            en.append(scene.en)
            zh.append(scene.zh)
        return {"sprite": sprite, "box": box, "background": background, "en": en, "zh": zh}
