"""Configurations and tokenizer of the public Stable Diffusion families, so that a single file loads offline.

A file in the original layout holds weights alone.  What else its pipeline needs is in `architectures.json`, as the
families' diffusers folders state it, and in `clip/`: CLIP's vocabulary, of which the tokenizer is built.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NUM_MERGES = 49152 - 256 - 2
"""CLIP uses as many of the vocabulary's merges as give 49,152 tokens with 256 bytes and two marks."""


@functools.cache
def _all() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "architectures.json").read_text())
    return found


def architecture(name: str) -> dict[str, Any]:
    """The configurations of a family: component -> its configuration; also "pipeline" and "options".

    name     "sd1" | "sd1-inpaint" | "sd2" | "sd2-base" | "sd2-inpaint" | "sdxl" | "sdxl-inpaint" | "sdxl-refiner"
    raises   KeyError
    """
    own = dict(_all()[name])
    base = architecture(own.pop("like")) if "like" in own else {}
    for part, settings in own.items():
        merge = isinstance(settings, dict) and isinstance(base.get(part), dict)
        base[part] = {**base[part], **settings} if merge else settings
    return {part: settings for part, settings in base.items() if settings is not None}


@functools.cache
def clip_vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """CLIP's tokens in the order of their ids, and its merges in the order of their rank.

    source   Radford et al. 2021, https://github.com/openai/CLIP (MIT)
    """
    text = gzip.decompress((FOLDER / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    lines = text.split("\n")[1 : 1 + NUM_MERGES]
    merges = tuple((left, right) for left, right in map(str.split, lines))
    letters = _byte_letters()
    ends = [f"{letter}</w>" for letter in letters]
    return (*letters, *ends, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"), merges


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes: first those that are printable themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, 49,408 tokens, at most 77 a prompt.

    pad_token   "<|endoftext|>" for OpenAI's encoders (SD 1, the first of SDXL), "!" for OpenCLIP's
    """
    from transformers import CLIPTokenizer

    tokens, merges = clip_vocabulary()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=77, pad_token=pad_token)
