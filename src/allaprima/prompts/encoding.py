"""`encode`: prompts with A1111's syntax -> what a diffusers pipeline is called with.

    encoded = encode(pipe, "(red:1.4) [apple:pear:0.5] AND a table :0.7", "blurry", steps=20)
    with encoded.composing(pipe):
        image = pipe(num_inference_steps=20, **encoded.arguments()).images[0]

A prompt that changes with the step is put in place by a `callback_on_step_end`; AND, whose guidance diffusers does not
know, by two hooks on the UNet, which stand only within `composing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from .composition import NEEDS_GUIDANCE, Composition, composing
from .prompt import Prompt, parse, parse_negative
from .schedule import variants
from .text_encoders import EMPHASES, Embeddings, Emphasis, TextEncoders, can_encode, forget

__all__ = [
    "EMPHASES",
    "Embeddings",
    "Emphasis",
    "Encoded",
    "TextEncoders",
    "can_encode",
    "encode",
    "forget",
    "num_chunks",
]


class Stage(NamedTuple):
    """What the UNet reads from step `first` on (steps count from 0).

    prompts    one row for each prompt, and one more for each AND after it
    negative   one row for each prompt, or None without guidance
    """

    first: int
    prompts: Embeddings
    negative: Embeddings | None


class Encoded:
    """Prompts ready for a pipeline.  The tensors belong to a cache: read them, don't write.

    prompt_embeds, negative_prompt_embeds                   [B, L, D] of the first step; B prompts, L = 77·k for CLIP
    pooled_prompt_embeds, negative_pooled_prompt_embeds     [B, P] for SDXL, else None
    stages                                                  more than one where the prompt changes with the step
    """

    def __init__(self, stages: Sequence[Stage], composition: Composition) -> None:
        self.stages, self._now, self._composition = tuple(stages), 0, composition
        self._leaders = [composition.owners.index(i) for i in range(composition.num_pictures)]
        first = self._rows(self.stages[0])
        self.prompt_embeds, self.pooled_prompt_embeds = first
        negative = self.stages[0].negative
        self.negative_prompt_embeds = None if negative is None else negative.embeds
        self.negative_pooled_prompt_embeds = None if negative is None else negative.pooled

    @property
    def is_composed(self) -> bool:
        """Whether AND, or a weight of the whole prompt, is in it: then draw within `composing`."""
        return self._composition.is_needed

    def arguments(self) -> dict[str, Any]:
        """What to call the pipeline with, in place of prompt, negative prompt and clip skip."""
        names = (
            "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        )  # fmt: skip
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(self.stages) == 1:
            return found
        pooled = [] if self.pooled_prompt_embeds is None else ["add_text_embeds"]
        return found | {
            "callback_on_step_end": self.on_step_end,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", *pooled],
        }

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """A `callback_on_step_end` of diffusers: puts the next step's embeddings in place."""
        following = max(i for i, stage in enumerate(self.stages) if stage.first <= step + 1)
        # The next picture begins with the first stage again.
        self._now = 0 if step + 1 == pipe.num_timesteps else following
        if self.stages[following].first == step + 1:
            for name, index in (("prompt_embeds", 0), ("add_text_embeds", 1)):
                if name in tensors:
                    tensors[name] = self._guided(
                        self.stages[following], index, tensors[name], pipe.do_classifier_free_guidance
                    )
        return tensors

    def composing(self, pipe: Any) -> AbstractContextManager[None]:
        """Within this context the pipeline's UNet draws what AND asks for; without AND it does nothing."""
        self._now = 0
        return composing(pipe, self._composition, self._present) if self.is_composed else nullcontext()

    def _present(self) -> Stage:
        return self.stages[self._now]

    def _rows(self, stage: Stage) -> Embeddings:
        """One row for each prompt: the first of those that AND joins."""
        embeds, pooled = stage.prompts
        return Embeddings(embeds[self._leaders], None if pooled is None else pooled[self._leaders])

    def _guided(self, stage: Stage, index: int, like: torch.Tensor, guided: bool) -> torch.Tensor:
        """As the pipeline holds them: the negative ones first, where it guides; every row so often as it draws it."""
        rows = [self._rows(stage)[index]]
        if guided and stage.negative is not None:
            rows.insert(0, stage.negative[index])
        times = like.shape[0] // (len(rows) * len(self._leaders))
        return torch.cat([row.repeat_interleave(times, 0) for row in rows if row is not None]).to(like)


def encode(
    pipe: Any,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    steps: int,
    clip_skip: int = 1,
    emphasis: Emphasis = "Original",
    lora_scale: float | None = None,
    guidance: bool = True,
) -> Encoded:
    """Encode prompts of A1111's syntax for a diffusers pipeline, optimized or not.

    prompt, negative_prompt   one text, or one for each of B pictures; LoRA tags are left out, not applied
    steps       calls of the denoiser: the steps of the request, twice as many for schedulers of second order
    clip_skip   as A1111 counts: 1 is the last layer, 2 the one before (diffusers' `clip_skip` is one less)
    emphasis    "Original", "No norm" or "Ignore"
    guidance    whether the pipeline will guide; without, negative prompts are not encoded
    raises      InputError, ConfigError
    source      A1111's order and numbers: modules/prompt_parser.py and sd_hijack_clip.py, version 1.10
    """
    prompts = [parse(text) for text in _texts(prompt)]
    given = [negative_prompt] if isinstance(negative_prompt, str) or negative_prompt is None else list(negative_prompt)
    negatives = [parse_negative(text or "") for text in (given * len(prompts) if len(given) == 1 else given)]
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each.")
    encoders = TextEncoders(pipe, clip_skip, emphasis, lora_scale)
    # diffusers' rule for SDXL: no negative prompt is not the empty one.
    zeros = negative_prompt is None and encoders.with_pooled and pipe.config.get("force_zeros_for_empty_prompt", False)
    composition = Composition(
        tuple(i for i, found in enumerate(prompts) for _ in found.parts),
        tuple(part.weight for found in prompts for part in found.parts),
    )
    if not guidance and composition.is_needed:
        raise InputError(NEEDS_GUIDANCE)
    positive = [_Timeline(encoders, part.text, steps) for found in prompts for part in found.parts]
    negative = [_Timeline(encoders, found.parts[0].text, steps) for found in negatives] if guidance else []
    stages = []
    for first in sorted({0}.union(*(timeline.changes() for timeline in (*positive, *negative)))):
        ours = _stacked([timeline.at(first) for timeline in positive])
        other = _stacked([timeline.at(first) for timeline in negative]) if guidance else None
        if zeros and other is not None:
            other = Embeddings(*(None if t is None else torch.zeros_like(t) for t in other))  # type: ignore[arg-type]
        stages.append(Stage(first, *_of_one_length(ours, other, encoders)))
    return Encoded(stages, composition)


def num_chunks(pipe: Any, prompt: Prompt, steps: int) -> int:
    """The length of a prompt's embeddings, in chunks."""
    encoders = TextEncoders(pipe)
    texts = {variant.text for part in prompt.parts for variant in variants(part.text, steps)}
    return max(map(encoders.num_chunks, texts))


class _Timeline:
    """One text over the steps."""

    def __init__(self, encoders: TextEncoders, text: str, steps: int) -> None:
        if steps < 1:
            raise InputError(f"steps is {steps}; allowed is at least 1.")
        self._variants = variants(text, steps)
        self._embeddings = encoders([variant.text for variant in self._variants])

    def changes(self) -> Iterator[int]:
        """The steps, counted from 0, at which the text becomes another one."""
        for before, after in zip(self._variants, self._variants[1:], strict=False):
            if before.text != after.text:
                yield before.end_step + 1

    def at(self, step: int) -> Embeddings:
        i = next((i for i, variant in enumerate(self._variants) if step <= variant.end_step), len(self._variants) - 1)
        embeds, pooled = self._embeddings
        return Embeddings(embeds[i : i + 1], None if pooled is None else pooled[i : i + 1])


def _texts(prompt: str | Sequence[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise InputError("No prompt is given.")
    return texts


def _stacked(rows: list[Embeddings]) -> Embeddings:
    """Prompts of a batch: the shorter ones repeat their last vector, as A1111's do."""
    length = max(row.embeds.shape[1] for row in rows)
    embeds = [
        torch.cat([row.embeds, row.embeds[:, -1:].expand(-1, length - row.embeds.shape[1], -1)], dim=1) for row in rows
    ]
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return Embeddings(torch.cat(embeds), torch.cat(pooled) if pooled else None)


def _of_one_length(
    ours: Embeddings, other: Embeddings | None, encoders: TextEncoders
) -> tuple[Embeddings, Embeddings | None]:
    """Prompt and negative prompt: the shorter one is filled with chunks of the empty prompt (A1111's pad_cond_uncond;
    its other way, two calls of different lengths, is not open to a pipeline that guides in one)."""
    if other is None:
        return ours, None
    length = max(ours.embeds.shape[1], other.embeds.shape[1])
    return _padded(ours, length, encoders), _padded(other, length, encoders)


def _padded(found: Embeddings, length: int, encoders: TextEncoders) -> Embeddings:
    missing = length - found.embeds.shape[1]
    if not missing:
        return found
    blank = encoders([""]).embeds
    filling = blank.repeat(found.embeds.shape[0], missing // blank.shape[1], 1)
    return Embeddings(torch.cat([found.embeds, filling], dim=1), found.pooled)
