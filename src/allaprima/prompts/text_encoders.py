"""From texts to embeddings: the text encoders of a pipeline, chunk by chunk, with the words' weights applied.

CLIP, BERT (Taiyi), XLM-R (AltDiffusion), and the two encoders of SDXL with their pooled output.  The encoders are
called as diffusers calls them, so that an engine needs no capture of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from ..errors import ConfigError, InputError
from .cache import EmbeddingCache
from .chunks import Chunk, Vocabulary, chunks, empty
from .emphasis import pieces

Emphasis = Literal["Original", "No norm", "Ignore"]
EMPHASES: tuple[Emphasis, ...] = get_args(Emphasis)
_CACHE = "_allaprima_embeddings"


class Embeddings(NamedTuple):
    """What a UNet gets to read of some texts.

    embeds   [V, L, D] in the encoder's dtype; L tokens in whole chunks
    pooled   [V, P], or None where the pipeline has no such input
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None


class TextEncoders:
    """The text encoders of one pipeline, with the settings of one request.

    clip_skip    as A1111 counts: 1 is the last layer (of SDXL the one that it was trained with), 2 the one before
    emphasis     "Original" multiplies and restores the mean, "No norm" multiplies, "Ignore" leaves the weights out
    lora_scale   what diffusers calls cross_attention_kwargs["scale"]
    raises       ConfigError, InputError
    """

    def __init__(
        self, pipe: Any, clip_skip: int = 1, emphasis: Emphasis = "Original", lora_scale: float | None = None
    ) -> None:
        if emphasis not in EMPHASES:
            raise ConfigError(f"emphasis {emphasis!r}; allowed: {', '.join(EMPHASES)}.")
        if not isinstance(clip_skip, int) or clip_skip < 1:
            raise InputError(f"clip_skip is {clip_skip!r}; allowed is 1 (the last layer), 2, …")
        self.pipe, self.clip_skip, self.emphasis, self.lora_scale = pipe, clip_skip, emphasis, lora_scale
        if not can_encode(pipe):
            raise InputError(f"{type(pipe).__name__} takes no prompts with syntax: only pipelines like SD and SDXL do.")
        self.modules = [(n, m) for n in ("text_encoder", "text_encoder_2") if (m := getattr(pipe, n, None)) is not None]
        self.with_pooled = hasattr(pipe, "text_encoder_2")
        self.vocabularies = [
            Vocabulary.of(getattr(pipe, name.replace("text_encoder", "tokenizer")), _num_positions(module))
            for name, module in self.modules
        ]
        self.device: torch.device = pipe._execution_device
        self._cache: EmbeddingCache = pipe.__dict__.setdefault(_CACHE, EmbeddingCache())

    def num_chunks(self, text: str) -> int:
        return max(len(chunks(pieces(text), vocabulary)) for vocabulary in self.vocabularies)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """Encode the variants of one prompt: the mean that "Original" restores is the mean of all of them.

        texts   V of them, padded to the length of the longest with chunks of the empty prompt; a text may come again
        """
        found = []
        for (name, module), vocabulary in zip(self.modules, self.vocabularies, strict=True):
            counts = Counter(texts)
            rows = [chunks(pieces(text), vocabulary) for text in counts]
            length = max(self.num_chunks(text) for text in counts)
            rows = [[*row, *[empty(vocabulary)] * (length - len(row))] for row in rows]
            embeds, pooled = self._cached(name, module, vocabulary, rows, tuple(counts.values()))
            order = [list(counts).index(text) for text in texts]
            found.append((embeds[order], None if pooled is None else pooled[order]))
        return Embeddings(torch.cat([embeds for embeds, _ in found], dim=-1), found[-1][1])

    def _cached(
        self, name: str, module: nn.Module, vocabulary: Vocabulary, rows: list[list[Chunk]], counts: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        forward = module.__dict__.get("forward")
        how = (self.clip_skip, self.emphasis, self.lora_scale, str(self.device), getattr(forward, "bypassed", None))
        key = (name, tuple(map(tuple, rows)), counts, how)
        found = self._cache.get(name, module, key)
        if found is None:
            found = self._encode(module, vocabulary, rows, counts)
            self._cache.put(key, found)
        return found

    def _encode(
        self, module: nn.Module, vocabulary: Vocabulary, rows: list[list[Chunk]], counts: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        columns, pooled = [], None
        with _scaled(module, self.lora_scale):
            for column in zip(*rows, strict=True):
                ids = torch.tensor([chunk.ids for chunk in column], device=self.device)
                hidden, pool = self._hidden(module, ids, vocabulary)
                pooled = pool if pooled is None else pooled  # of the first chunk, as A1111 does
                columns.append(self._weighted(hidden, [chunk.weights for chunk in column], counts))
        return torch.cat(columns, dim=1), pooled

    def _hidden(
        self, module: Any, ids: torch.Tensor, vocabulary: Vocabulary
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.with_pooled:
            output = module(ids, output_hidden_states=True)
            layers = self._layer(output.hidden_states, self.clip_skip + 1)
            return layers, output[0] if output[0].ndim == 2 else None
        masked = getattr(module.config, "use_attention_mask", False)
        mask = (ids != vocabulary.pad).long() if masked else None
        if self.clip_skip == 1:
            return module(ids, attention_mask=mask)[0], None
        norm = _final_norm(module)
        if norm is None:
            raise InputError(
                f"clip skip {self.clip_skip}: the text encoder {type(module).__name__} is read at its last layer only; "
                "use 1."
            )
        output = module(ids, attention_mask=mask, output_hidden_states=True)
        return norm(self._layer(output[-1], self.clip_skip)), None

    def _layer(self, layers: Sequence[torch.Tensor], from_last: int) -> torch.Tensor:
        if from_last > len(layers):
            raise InputError(
                f"clip skip {self.clip_skip}: the text encoder has {len(layers)} layers; "
                f"the largest is {len(layers) - from_last + self.clip_skip}."
            )
        return layers[-from_last]

    def _weighted(
        self, hidden: torch.Tensor, weights: list[tuple[float, ...]], counts: tuple[int, ...]
    ) -> torch.Tensor:
        """hidden  [V, N, D]; weights  [V, N]; counts  how often each row stands for a variant, in the mean"""
        if self.emphasis == "Ignore" or all(weight == 1 for row in weights for weight in row):
            return hidden
        before = hidden.float()
        after = before * torch.tensor(weights, device=hidden.device, dtype=torch.float32)[..., None]
        if self.emphasis == "Original":
            shares = torch.tensor(counts, device=hidden.device, dtype=torch.float32)
            after = after * _ratio(before, after, shares / shares.sum(), torch.finfo(hidden.dtype).eps)
        result = after.to(hidden.dtype)
        if not bool(torch.isfinite(result).all()):
            raise InputError(
                "the weights of the prompt are too large, or they cancel one another: use smaller ones, "
                'or the emphasis "No norm".'
            )
        return result


def can_encode(pipe: Any) -> bool:
    """Whether the pipeline's text encoders are of the kinds that read syntax: those of SD and SDXL, before a UNet."""
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    return getattr(pipe, "unet", None) is not None and any(hasattr(e, "config") for e in encoders)


def forget(pipe: Any) -> None:
    """Drop all embeddings that are kept for a pipeline: needed after writes to the weights that leave no trace."""
    pipe.__dict__.pop(_CACHE, None)


def _ratio(before: torch.Tensor, after: torch.Tensor, shares: torch.Tensor, eps: float) -> torch.Tensor:
    """The mean before the weights over the mean after them.  1 where a mean is no larger than what rounding each number
    may make of zero: a final norm without a bias leaves nothing else."""
    means = [(z.mean((1, 2)) * shares).sum() for z in (before, after)]
    sizes = [(z.abs().mean((1, 2)) * shares).sum() for z in (before, after)]
    known = (means[0].abs() > eps * sizes[0]) & (means[1].abs() > eps * sizes[1])
    return torch.where(known, means[0] / means[1], 1.0)


@contextmanager
def _scaled(module: nn.Module, lora_scale: float | None) -> Iterator[None]:
    """Adapters at `lora_scale`, as diffusers' own `encode_prompt` sets them for its time."""
    if lora_scale is None or lora_scale == 1:
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(module, lora_scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, lora_scale)


def _final_norm(module: Any) -> Any:
    """transformers 5.6 moved it out of `text_model`; BERT and XLM-R have none."""
    inner = getattr(module, "text_model", module)
    return getattr(inner, "final_layer_norm", None)


def _num_positions(module: Any) -> int:
    config = module.config
    # RoBERTa's kind counts positions from behind its padding token.
    offset = config.pad_token_id + 1 if "roberta" in str(config.model_type) else 0
    return int(config.max_position_embeddings) - offset
