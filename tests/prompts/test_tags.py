"""LoRA tags: names, weights, what is taken out of the prompt, what is refused."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.errors import InputError
from allaprima.prompts import LoraTag, read_tags

NAMES = st.text(alphabet="ab.-_ 水墨（）()1", min_size=1).map(str.strip).filter(bool)
WEIGHTS = st.floats(-100, 100).map(lambda weight: round(weight, 3))


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:iuV35.uv1P:1>", ("iuV35.uv1P", 1, 1)),
        ("<lora:水墨:0.8>", ("水墨", 0.8, 0.8)),
        ("＜lora：水墨：0.8＞", ("水墨", 0.8, 0.8)),
        ("<lora：水墨:０．８>", ("水墨", 0.8, 0.8)),
        ("＜lora:水墨：-0.8>", ("水墨", -0.8, -0.8)),
        ("<lora:my lora v1.0>", ("my lora v1.0", 1, 1)),
        ("<lora:a:0.5:0.25>", ("a", 0.5, 0.25)),
        ("<lora:a:te=0.5:unet=0.25>", ("a", 0.5, 0.25)),
        ("<lora:a:unet=0.25>", ("a", 1, 0.25)),
        ("<lora:a:te=0.25>", ("a", 0.25, 0.25)),
        ("<lora:a:0.5:unet=2>", ("a", 0.5, 2)),
        ("<lora:a:0.5:0.25:te=0>", ("a", 0, 0.25)),
        ("<lyco:a:0.5>", ("a", 0.5, 0.5)),
        ("<lora:1:0.5>", ("1", 0.5, 0.5)),
        ("<lora:水墨：国风:0.5>", ("水墨：国风", 0.5, 0.5)),
        ("<lora:folder/a.b:0.5>", ("folder/a.b", 0.5, 0.5)),
        ("<lora:a<b:0.5>", ("a<b", 0.5, 0.5)),
    ],
)
def test_a_tag_is_read_and_taken_out(tag: str, expected: tuple[str, float, float]) -> None:
    assert read_tags(f"一只 {tag}, cat") == ("一只 , cat", (expected,), ())


@pytest.mark.parametrize(
    "tag",
    ["<lora:a:strong>", "<lora:a:>", "<lora::1>", "<lora: :1>", "<lora:a:nan>", "<lora:a:inf>", "<lora:a:1e5>",
     "<lora:a:te=x>", "<lora:a:1:1:64>", "<lora:a:dyn=64>"],
)  # fmt: skip
def test_a_wrong_tag_is_named(tag: str) -> None:
    with pytest.raises(InputError, match="<lora:"):
        read_tags(f"a {tag} cat")


@pytest.mark.parametrize("text", ["a < b > c", "<>", "<lora>", "<lora:>", "<lora:a", "lora:a:1>", "<:a>", "<a b:1>"])
def test_what_is_no_tag_stays(text: str) -> None:
    assert read_tags(text) == (text, (), ())


def test_tags_of_other_kinds_are_taken_out_and_told() -> None:
    assert read_tags("a<hypernet:b:1> <lora:c:1>d") == ("a d", (LoraTag("c", 1, 1),), ("<hypernet:b:1>",))


@given(st.lists(st.tuples(NAMES, WEIGHTS, WEIGHTS)), st.text(alphabet="ab，红 ()[]"))
def test_any_tags_anywhere_are_found_in_order(loras: list[tuple[str, float, float]], between: str) -> None:
    tags = "".join(f"{between}<lora:{name}:{te}:{unet}>" for name, te, unet in loras)
    found = read_tags(tags + between)
    assert found.loras == tuple(loras)
    assert found.text == between * (len(loras) + 1)


@pytest.mark.parametrize("piece", ["<lora:", "<", "<lora:a:1", "＜a：", "<a:>", "<lora:a:1>"])
def test_time_is_linear(piece: str) -> None:
    begun = time.perf_counter()
    read_tags(piece * 50_000)
    assert time.perf_counter() - begun < 5  # quadratic: minutes


def test_reading_prompts_loads_no_torch() -> None:
    program = (
        "import sys\nfrom allaprima.prompts import parse, read_tags, variants, pieces\n"
        "parse('(a:1.2) <lora:b:1>')\nassert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
