"""What is written into a picture is read back, and is what A1111 writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from allaprima.errors import InputError
from allaprima.infotext import MIN_PAIRS, Infotext, parse, read_png, save_png

LINES = st.sampled_from(["Negative prompt: x", "\\Negative prompt:", "Steps: 1, Seed: 2, Size: 8x8", "", " a", "苹果"])
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")),
    st.lists(LINES, max_size=4).map("\n".join),
)
KEYS = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]*[A-Za-z0-9]", fullmatch=True)
SETTINGS = st.dictionaries(KEYS, TEXT, min_size=MIN_PAIRS, max_size=8)

EXAMPLE = Infotext(
    "a red apple,\non a table",
    "blurry",
    {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "7.0", "Seed": "7", "Size": "256x192", "Lora": "水墨: abc"},
)


@given(TEXT, TEXT, SETTINGS)
def test_format_and_parse_are_inverse(prompt: str, negative: str, settings: dict[str, str]) -> None:
    info = Infotext(prompt, negative, settings)
    assert parse(info.format()) == info


@given(st.text())
def test_any_text_parses(text: str) -> None:
    parse(text)


def test_the_text_is_a1111s() -> None:
    assert EXAMPLE.format() == (
        "a red apple,\non a table\nNegative prompt: blurry\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 7, Size: 256x192, Lora: "水墨: abc"'
    )
    assert (EXAMPLE.seed, EXAMPLE.size) == (7, (256, 192))


def test_a1111s_own_parser_reads_it() -> None:
    """The regular expression and the loop of A1111 1.10, on a prompt that would mislead them unescaped."""
    info = Infotext("a\nNegative prompt: not yet", "b", EXAMPLE.settings)
    *lines, last = info.format().strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert dict(pairs)["Sampler"] == "DPM++ 2M"
    assert len(pairs) == len(EXAMPLE.settings)
    assert [line for line in lines if line.strip().startswith("Negative prompt:")] == ["Negative prompt: b"]


def test_text_without_settings_is_all_prompt() -> None:
    assert parse("a cat\nsleeping: yes") == Infotext("a cat\nsleeping: yes")


@pytest.mark.parametrize(("prompt", "chunk"), [("a red apple", b"tEXt"), ("一个红色的苹果", b"iTXt")])
def test_png_keeps_it(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    info = Infotext(prompt, "模糊" if chunk == b"iTXt" else "blurry", {"Steps": "2", "Seed": "1", "Size": "8x8"})
    save_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", info)
    assert chunk + b"parameters" in (tmp_path / "a.png").read_bytes()
    assert read_png(tmp_path / "a.png") == info


def test_a_picture_without_infotext_has_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert read_png(tmp_path / "a.png") is None


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"a\.png"):
        read_png(tmp_path / "a.png")
