"""The demo: a sheet that can be read on any machine, and a verdict that decides the exit code."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from allaprima import demo
from allaprima.demo import find_font, label_lines, sheet
from allaprima.generation import Picture
from allaprima.infotext import Infotext
from tests import stand_ins


def picture(prompt: str, width: int = 128, height: int = 128) -> Picture:
    return Picture(Image.new("RGB", (width, height), "teal"), 1, 0.5, Infotext(prompt))


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(f"allaprima.{name}")
    vars(made).update(content)
    return made


@pytest.fixture
def parts(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The demo's surroundings with one model of random weights; `parts.passed` is the verdict of `verify`."""
    parts = SimpleNamespace(passed=True)
    tiny = SimpleNamespace(
        name="tiny",
        title="Tiny",
        example_prompts=("a red apple", "红苹果"),
        native_size=(64, 64),
        steps=2,
        guidance_scale=7.5,
        description="x",
    )

    def verify(pipe: Any, prompt: str, **options: Any) -> Any:
        return SimpleNamespace(passed=parts.passed)

    stand_ins.install(monkeypatch, stand_ins.Pipelines(tiny_pipe))
    stand_ins.install(monkeypatch, module("models", EMBEDDED={"tiny": tiny}))
    stand_ins.install(monkeypatch, module("verification", verify=verify))
    stand_ins.install(monkeypatch, module("explanation", explain=lambda pipe: SimpleNamespace(captures=4, loaded=0)))
    monkeypatch.setattr(demo, "SIZES", ((72, 64),))
    return parts


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_code_is_the_verdict(parts: Any, tmp_path: Path, capsys: Any, passed: bool) -> None:
    parts.passed = passed
    assert demo.demo(tmp_path / "new" / "demo.png") == (0 if passed else 1)
    with Image.open(tmp_path / "new" / "demo.png") as made:
        assert made.width > 2 * 64 + 72
    said = capsys.readouterr().out
    assert "allaprima models --vocabulary emoji" in said
    assert str(tmp_path) in said
    assert ("NO" in said) is not passed


def test_prompts_that_the_font_cannot_write_are_in_the_terminal(
    parts: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CHINESE_FONTS", ("no such font.ttf",))
    demo.demo(tmp_path / "demo.png")
    assert "2 is 红苹果" in capsys.readouterr().out


def test_a_sheet_holds_every_picture() -> None:
    font, knows_chinese = find_font()
    rows = [("emoji", (picture("a"), picture("b", 200, 136))), ("emoji-zh", (picture("一只猫"),))]
    made = sheet(rows, font, knows_chinese)
    teal = sum(count for count, colour in made.getcolors(1 << 16) or [] if colour == (0, 128, 128))
    assert teal == 2 * 128 * 128 + 200 * 136


@pytest.mark.parametrize(
    "text", ["12 a red apple and a green tree on a table", "3 一个红色的苹果在一棵绿色的树的左边", "x" * 99, ""]
)
def test_labels_stay_below_their_picture(text: str) -> None:
    font, _ = find_font()
    lines = label_lines(text, font, 128)
    assert len(lines) <= 2
    assert all(font.getlength(line) <= 128 for line in lines)
    assert text.startswith(lines[0] if lines else "")
