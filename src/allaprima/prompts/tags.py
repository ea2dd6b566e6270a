"""`<lora:name:0.8>` tags in prompts: the one reader for the command line and the server.

    <lora:name>  <lora:name:te>  <lora:name:te:unet>  <lora:name:te=0.5:unet=1>  <lyco:name:1>  ＜lora：水墨：0.8＞

A name may have dots, spaces and Chinese in it, and a full-width colon where no number follows that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import InputError

LORA_KINDS = ("lora", "lyco")
MAX_WEIGHT = 100
_HEAD = re.compile(r"[<＜](\w+)[:：]")
_TAIL = re.compile(r"[>＞]")
_SEPARATOR = re.compile(r"([:：])")
_NAMED = re.compile(r"\s*(te|unet|dyn)\s*[=＝](.*)", re.DOTALL)


class LoraTag(NamedTuple):
    """One LoRA that a prompt asks for: its name, and its weights in the text encoder and in the UNet."""

    name: str
    te: float
    unet: float


class Tags(NamedTuple):
    """What `read_tags` found.

    text      the prompt without its tags
    loras     in their order; one name may come twice
    unknown   tags of other kinds, such as <hypernet:…>, as they were typed: they are taken out too, as A1111 does
    """

    text: str
    loras: tuple[LoraTag, ...]
    unknown: tuple[str, ...]


def read_tags(prompt: str) -> Tags:
    """Take the tags out of a prompt, in time linear in its length.

    raises   InputError where a LoRA tag has no name, or a weight that is no number
    """
    kept, loras, unknown, end = [], [], [], 0
    for head, start, close in _tags(prompt):
        kept.append(prompt[end:start])
        end = close + 1
        arguments = prompt[start + len(head[0]) : close]
        if head[1].lower() in LORA_KINDS:
            loras.append(_lora(prompt[start:end], arguments))
        else:
            unknown.append(prompt[start:end])
    return Tags("".join([*kept, prompt[end:]]), tuple(loras), tuple(unknown))


def _tags(prompt: str) -> Iterator[tuple[re.Match[str], int, int]]:
    """(head, where it starts, where its tag closes)"""
    end = 0
    while head := _HEAD.search(prompt, end):
        # One sign at least belongs to the arguments, and it may not be the end of the tag.
        close = _TAIL.search(prompt, head.end())
        if close is None:
            return
        if close.start() > head.end():
            yield head, head.start(), close.start()
        end = close.end()


def _lora(tag: str, arguments: str) -> LoraTag:
    name, weights, named = _split(arguments)
    if not name:
        raise InputError(f"{tag} names no LoRA: write <lora:name:0.8>.")
    if len(weights) > 2 or "dyn" in named:
        raise InputError(f"{tag}: a LoRA's rank cannot be changed here; leave out what follows the two weights.")
    te = _weight(tag, named.get("te", weights[0] if weights else "1"))
    unet = _weight(tag, named["unet"]) if "unet" in named else _weight(tag, weights[1]) if weights[1:] else te
    return LoraTag(name, te, unet)


def _split(arguments: str) -> tuple[str, list[str], dict[str, str]]:
    """The name, the weights by place and by name.  A full-width colon before anything else is part of the name."""
    first, *rest = _SEPARATOR.split(arguments)
    name, weights, named = first, list[str](), dict[str, str]()
    for colon, value in zip(rest[::2], rest[1::2], strict=True):
        if found := _NAMED.fullmatch(value):
            named[found[1]] = found[2]
        elif colon == "：" and not weights and not named and _number(value) is None:
            name += colon + value
        else:
            weights.append(value)
    return name.strip(), weights, named


def _weight(tag: str, text: str) -> float:
    value = _number(text)
    if value is None or not abs(value) <= MAX_WEIGHT:
        raise InputError(
            f"{tag}: the weight {text!r} is no number from -{MAX_WEIGHT} to {MAX_WEIGHT}: write <lora:name:0.8>."
        )
    return value


def _number(text: str) -> float | None:
    try:
        value = float(text.replace("．", ".").replace("－", "-").replace("＋", "+"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
