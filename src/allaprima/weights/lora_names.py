"""Which module a name in an adapter's file means.

Trainers write a module's path with dots or underscores, behind a prefix for the component, in diffusers' names or in
those of the original (LDM) UNet.  All of them are looked up in one table a component, without dots and underscores
told apart.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator, Mapping
from itertools import takewhile
from operator import eq
from typing import NamedTuple

from torch import nn

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet_", DENOISERS),
    ("lora_transformer_", DENOISERS),
    ("lora_te_", ("text_encoder",)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", ("text_encoder_3",)),
    ("lycoris_", DENOISERS + TEXT_ENCODERS),
    ("model.diffusion_model.", DENOISERS),
    ("diffusion_model.", DENOISERS),
    ("text_encoders.clip_l.transformer.", ("text_encoder",)),
    ("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    ("base_model.model.", DENOISERS + TEXT_ENCODERS),
)
"""How files begin the names of a component's modules, beside the component's own name and a dot."""

SHELLS = ("text_model.", "bert.", "roberta.", "model.", "transformer.")
"""Outermost modules that versions and heads of one text encoder have or lack."""

NEIGHBOURS = 8

LEGACY = re.compile(r"(?:\.processor)?[._]to_(q|k|v|out)_lora$")
"""Attention as diffusers wrote it when adapters were attention processors."""

_LDM_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


class Place(NamedTuple):
    """A module of a pipeline: the component and the module's path in it, without PEFT's layers around it."""

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


class Names:
    """Where names of adapter files lead to in a pipeline's components."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._tables = {name: _table(component) for name, component in components.items()}
        self._orders: dict[str, tuple[list[str], list[str]]] = {}
        self._prefixes = (*((f"{name}.", (name,)) for name in components), *PREFIXES)

    def find(self, name: str) -> Place | None:
        """The module that a file calls `name`."""
        for component, rest in self._readings(name):
            for path in _spellings(rest):
                if (found := self._tables[component].get(_flat(path))) is not None:
                    return Place(component, found)
        return None

    def nearest(self, name: str) -> Place | None:
        """The module whose name has much of its beginning and end in common with `name`."""
        best: tuple[int, Place | None] = (0, None)
        for component, rest in self._readings(name):
            flat = _flat(rest)
            for known in _neighbours(flat, self._sorted(component)):
                common = _common(flat, known)
                if common > max(best[0], len(flat) // 2):
                    best = common, Place(component, self._tables[component][known])
        return best[1]

    def _sorted(self, component: str) -> tuple[list[str], list[str]]:
        """All flat names in order, and in the order of their ends, each written backwards."""
        if component not in self._orders:
            table = self._tables[component]
            self._orders[component] = sorted(table), sorted(known[::-1] for known in table)
        return self._orders[component]

    def missing_component(self, name: str) -> str | None:
        """The component that a name is meant for, where the pipeline has none such."""
        wanted = next((known for prefix, known in PREFIXES if name.startswith(prefix)), None)
        if wanted is None:
            wanted = tuple(known for known in DENOISERS + TEXT_ENCODERS if name.startswith(f"{known}."))
        return wanted[0] if wanted and not any(known in self._tables for known in wanted) else None

    def _readings(self, name: str) -> Iterator[tuple[str, str]]:
        """(component, rest of the name): after the prefix, or the whole name for all components."""
        for prefix, components in self._prefixes:
            if name.startswith(prefix):
                yield from ((known, name[len(prefix) :]) for known in components if known in self._tables)
                return
        order = sorted(self._tables, key=lambda known: known not in DENOISERS)
        yield from ((known, name) for known in order)


def modules_by_path(component: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, where a layer that PEFT wrapped has its own path and not its wrapper's."""
    found: dict[str, nn.Module] = {}
    for path, module in component.named_modules(remove_duplicate=False):
        plain = path.replace(".base_layer", "")
        if plain != path or plain not in found:
            found[plain] = module
    return found


def ldm_names(component: nn.Module) -> dict[str, str]:
    """Path in the original UNet -> path in diffusers', for a UNet of diffusers; else empty.

    source   CompVis' latent-diffusion and Stability's generative-models: blocks are counted through all levels
    """
    if not all(isinstance(getattr(component, name, None), nn.Module) for name in ("down_blocks", "up_blocks")):
        return {}
    found = {ldm: own for own, ldm in _LDM_OUTSIDE.items()}
    found |= _ldm_blocks("down_blocks", component.down_blocks, "input_blocks", 1)  # type: ignore[arg-type]
    for ldm, own in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
        found |= _ldm_inside(f"mid_block.{own}", f"middle_block.{ldm}")
    return found | _ldm_blocks("up_blocks", component.up_blocks, "output_blocks", 0)  # type: ignore[arg-type]


def _ldm_blocks(own: str, blocks: nn.ModuleList, ldm: str, first: int) -> dict[str, str]:
    """Each resnet begins a block; its attention follows in the same one.  A downsampler is a block of its own, an
    upsampler the last part of the block before it."""
    found: dict[str, str] = {}
    number = first
    for i, block in enumerate(blocks):
        attentions = getattr(block, "attentions", None) or ()
        for j in range(len(block.resnets)):  # type: ignore[arg-type]
            found |= _ldm_inside(f"{own}.{i}.resnets.{j}", f"{ldm}.{number}.0")
            if j < len(attentions):
                found |= _ldm_inside(f"{own}.{i}.attentions.{j}", f"{ldm}.{number}.1")
            number += 1
        if getattr(block, "downsamplers", None):
            found[f"{ldm}.{number}.0.op"] = f"{own}.{i}.downsamplers.0.conv"
            number += 1
        if getattr(block, "upsamplers", None):
            found[f"{ldm}.{number - 1}.{2 if attentions else 1}.conv"] = f"{own}.{i}.upsamplers.0.conv"
    return found


def _ldm_inside(own: str, ldm: str) -> dict[str, str]:
    """A block by itself, for names that go on below it as they are, and the parts of a resnet."""
    return {ldm: own} | {f"{ldm}.{part}": f"{own}.{name}" for name, part in _LDM_RESNET.items()}


def _table(component: nn.Module) -> dict[str, str]:
    """Flat name -> path, for each name that a file may use.  A module's own name goes before another's alias."""
    paths = [path for path in modules_by_path(component) if path]
    known = set(paths)
    aliases: dict[str, str] = {}
    ldm = {own: alias for alias, own in ldm_names(component).items()}
    for path in paths:
        if ldm and (alias := _in_ldm(path, ldm)):
            aliases[_flat(alias)] = path
        for shell in SHELLS:
            if path.startswith(shell) and (short := path.removeprefix(shell)) not in known:
                aliases[_flat(short)] = path
    return aliases | {_flat(path): path for path in paths}


def _in_ldm(path: str, ldm: Mapping[str, str]) -> str | None:
    """The name of a module that has one, or lies in a block that has."""
    outer, inner = path, ""
    while outer:
        if outer in ldm:
            return ldm[outer] + inner
        outer, _, last = outer.rpartition(".")
        inner = f".{last}{inner}"
    return None


def _spellings(rest: str) -> Iterator[str]:
    """Paths that a name may mean, the likeliest first."""
    yield rest
    for shell in SHELLS:
        for mark in (shell, shell.replace(".", "_")):
            if rest.startswith(mark):
                yield rest.removeprefix(mark)
    if found := LEGACY.search(rest):
        which, stem = found[1], rest[: found.start()]
        yield f"{stem}.to_out.0" if which == "out" else f"{stem}.to_{which}"
        for encoder in (stem, stem.removeprefix("text_model.")):
            yield f"{encoder}.{which}_proj"


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _neighbours(flat: str, orders: tuple[list[str], list[str]]) -> Iterator[str]:
    """Names beside `flat` in either order: among them are those with the longest common beginning and end."""
    forward, backward = orders
    place = bisect(forward, flat)
    yield from forward[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]
    place = bisect(backward, flat[::-1])
    yield from (known[::-1] for known in backward[max(0, place - NEIGHBOURS) : place + NEIGHBOURS])


def _common(one: str, other: str) -> int:
    """Length of the common beginning and of the common end, which do not overlap."""
    begin = _same(one, other)
    return begin + _same(one[begin:][::-1], other[begin:][::-1])


def _same(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))
