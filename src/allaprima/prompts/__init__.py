"""A1111's prompt syntax.

    parse, parse_negative   what was typed -> parts joined by AND, LoRA tags
    read_tags               LoRA tags alone
    variants                [a:b:0.5] and [a|b] over the steps
    pieces                  (red:1.3) -> text and weight
    chunks                  pieces -> token ids in chunks of 75
    encode                  a pipeline's prompts -> embeddings, and what changes them from step to step
    can_encode, num_chunks  what `encode` can do, and how long its result will be
    forget                  drops the embeddings that are kept for a pipeline

The last two rows and `encode` load torch, the others don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chunks import Chunk, Vocabulary, chunks
from .emphasis import Break, Piece, pieces
from .prompt import Part, Prompt, parse, parse_negative
from .schedule import Variant, variants
from .tags import LoraTag, Tags, read_tags

if TYPE_CHECKING:
    from .encoding import EMPHASES, Encoded, can_encode, encode, forget, num_chunks

__all__ = [
    "EMPHASES", "Break", "Chunk", "Encoded", "LoraTag", "Part", "Piece", "Prompt", "Tags", "Variant", "Vocabulary",
    "can_encode", "chunks", "encode", "forget", "num_chunks", "parse", "parse_negative", "pieces", "read_tags",
    "variants",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("EMPHASES", "Encoded", "can_encode", "encode", "forget", "num_chunks"):
        from . import encoding

        return getattr(encoding, name)
    raise AttributeError(f"module 'allaprima.prompts' has no attribute {name!r}")
