"""AND: guidance by several prompts at once.

    noise = u + s·Σ wᵢ·(cᵢ - u)     s the guidance scale; u, cᵢ the UNet's answers to the negative prompt and prompt i

A diffusers pipeline computes u + s·(c - u) from one call of the UNet with [u, c].  Two hooks on the UNet put all
prompts into that call, and c = u + Σ wᵢ·(cᵢ - u) into its answer.

source   Liu et al. 2022, arXiv:2206.01714
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..errors import InputError

NEEDS_GUIDANCE = "AND, and a weight at a prompt's end, need guidance: a guidance scale above 1."


class Composition(NamedTuple):
    """Which prompts AND joins.

    owners    for each of them the picture it belongs to, in order: 0, 0, 1 for "a AND b" and "c"
    weights   for each of them its share of the guidance
    """

    owners: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def num_pictures(self) -> int:
        return self.owners[-1] + 1

    @property
    def is_needed(self) -> bool:
        return len(self.owners) > self.num_pictures or any(weight != 1 for weight in self.weights)


@contextmanager
def composing(pipe: Any, composition: Composition, present: Callable[[], Any]) -> Iterator[None]:
    """Two hooks on the pipeline's UNet, for as long as the context lasts.

    present   says which Stage's embeddings are to be read now
    raises    InputError where the pipeline has no UNet; within, where it does not guide
    """
    if getattr(pipe, "unet", None) is None:
        raise InputError(f"{type(pipe).__name__} knows no AND: it has no UNet.")
    hooks = _Hooks(pipe, composition, present)
    handles = [
        pipe.unet.register_forward_pre_hook(hooks.widen, with_kwargs=True),
        pipe.unet.register_forward_hook(hooks.combine),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hooks:
    def __init__(self, pipe: Any, composition: Composition, present: Callable[[], Any]) -> None:
        self.pipe, self.composition, self.present = pipe, composition, present
        self.times = 0
        # The same tensor at every step: the prompt stage runs again for another one, and a copy makes the host wait.
        self._kept: dict[str, tuple[Any, torch.Tensor]] = {}

    def widen(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """[u, c] -> [u, c₁, c₂, …]"""
        num_rows, num_pictures = args[0].shape[0], self.composition.num_pictures
        if not self.pipe.do_classifier_free_guidance or num_rows % (2 * num_pictures):
            raise InputError(NEEDS_GUIDANCE)
        self.times = num_rows // (2 * num_pictures)
        rows = self._keep("rows", (num_rows, args[0].device), lambda: self._rows().to(args[0].device))
        wide = [_widened(value, rows, num_rows) for value in (args, kwargs)]
        made = wide[1] | {"encoder_hidden_states": self._embeddings(0, kwargs["encoder_hidden_states"])}
        if "text_embeds" in (added := made.get("added_cond_kwargs") or {}):
            made["added_cond_kwargs"] = added | {"text_embeds": self._embeddings(1, added["text_embeds"])}
        return wide[0], made

    def combine(self, module: Any, args: Any, output: Any) -> Any:
        """[u, c₁, c₂, …] -> [u, c], summed in float32."""
        noise = output[0].float()
        half = self.composition.num_pictures * self.times
        unguided, guided = noise[:half], noise[half:]
        owners = self._keep("owners", (half, noise.device), lambda: (self._rows()[half:] - half).to(noise.device))
        weights = self._keep("weights", (half, noise.device), lambda: self._weights().to(noise.device))
        steps = (guided - unguided[owners]) * weights.view(-1, *[1] * (noise.ndim - 1))
        found = torch.cat([unguided, unguided.index_add(0, owners, steps)]).to(output[0].dtype)
        return (found, *output[1:]) if isinstance(output, tuple) else type(output)(sample=found)

    def _rows(self) -> torch.Tensor:
        """From which row of [u, c] each row of the wide call starts; every prompt is drawn `times` times."""
        half, times = self.composition.num_pictures * self.times, self.times
        guided = [half + owner * times + i for owner in self.composition.owners for i in range(times)]
        return torch.tensor([*range(half), *guided])

    def _weights(self) -> torch.Tensor:
        return torch.tensor(self.composition.weights).repeat_interleave(self.times)

    def _embeddings(self, index: int, like: torch.Tensor) -> torch.Tensor:
        stage = self.present()

        def made() -> torch.Tensor:
            parts = [stage.negative[index], stage.prompts[index]]
            return torch.cat([part.repeat_interleave(self.times, 0) for part in parts]).to(like)

        return self._keep(f"embeddings {index}", (stage.first, self.times), made)

    def _keep(self, name: str, state: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._kept or self._kept[name][0] != state:
            self._kept[name] = state, make()
        return self._kept[name][1]


def _widened(value: Any, rows: torch.Tensor, num_rows: int) -> Any:
    """The rows of every tensor that has `num_rows`, in tuples, lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == num_rows else value
    if isinstance(value, dict):
        return {key: _widened(inner, rows, num_rows) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_widened(inner, rows, num_rows) for inner in value)
    return value
