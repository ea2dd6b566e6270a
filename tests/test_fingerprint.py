"""Every change of a module is noticed: of its mathematics by the key, of anything by the watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F

from allaprima.fingerprint import StructureWatch, WeightsWatch, _identical, structure, structure_key
from tests.tiny import tiny_bert, tiny_clip, tiny_unet, tiny_vae

CHANGES: dict[str, Callable[[Any], None]] = {
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "attention processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "an attribute of a processor": lambda unet: setattr(first_attention(unet).processor, "scale", 2.0),
    "train mode": lambda unet: unet.train(),
    "train mode of one part": lambda unet: unet.mid_block.train(),
    "a part replaced": lambda unet: setattr(unet, "conv_act", nn.ReLU()),
    "a number": lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
    "a list edited in place": lambda unet: unet.down_blocks[0].marks.append(1),
    "a plain tensor edited in place": lambda unet: unet.down_blocks[0].plain.add_(1),
    "a dictionary edited in place": lambda unet: unet.down_blocks[0].table.update(a=2),
    "dtype": lambda unet: unet.to(torch.bfloat16),
    "a parameter more": lambda unet: unet.register_parameter("extra", nn.Parameter(torch.zeros(2))),
}


def first_attention(unet: Any) -> Any:
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def unet() -> Any:
    made = tiny_unet()
    made.down_blocks[0].marks = []
    made.down_blocks[0].plain = torch.zeros(2)
    made.down_blocks[0].table = {"a": 1}
    return made


# ---- the key


def test_the_key_is_the_same_for_another_checkpoint() -> None:
    assert structure_key(tiny_unet(0)) == structure_key(tiny_unet(1))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_key_changes_with(change: Callable[[Any], None]) -> None:
    module = unet()
    before = structure_key(module)
    change(module)
    assert structure_key(module) != before


def test_the_key_changes_with_the_config() -> None:
    keys = {
        structure_key(tiny_unet()),
        structure_key(tiny_unet(norm_eps=1e-6)),
        structure_key(tiny_unet(act_fn="gelu")),
    }
    assert len(keys) == 3


def test_the_key_returns_when_a_change_is_undone() -> None:
    module = unet()
    before = structure_key(module)
    module.enable_freeu(0.9, 0.2, 1.1, 1.2)
    module.disable_freeu()
    module.train()
    module.eval()
    assert structure_key(module) == before


class Acts(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tanh, torch.sigmoid),
        (F.silu, F.relu),
        (functools.partial(F.gelu, approximate="none"), functools.partial(F.gelu, approximate="tanh")),
        (scaled(2.0), scaled(3.0)),
        (lambda x: x.sin(), lambda x: x.cos()),
        (torch.ones(2), torch.zeros(2)),
        (torch.ones(2).numpy(), torch.zeros(2).numpy()),
        (True, 1),
        ({1, 2}, {1, 3}),
    ],
)
def test_the_key_tells_attributes_apart(one: Any, other: Any) -> None:
    assert structure_key(Acts(one)) != structure_key(Acts(other))
    assert structure_key(Acts(one)) == structure_key(Acts(one))


def test_the_key_changes_when_a_class_gets_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Acts(torch.tanh)
    before, watch = structure_key(module), StructureWatch(module)
    monkeypatch.setattr(Acts, "forward", lambda self, x: self.act(x) * 2)
    assert not watch.unchanged()
    assert structure_key(module) != before


def test_a_setting_of_a_text_encoder_is_part_of_its_key() -> None:
    module = tiny_clip()
    before, watch = structure_key(module), StructureWatch(module)
    module.config.output_hidden_states = True
    assert not watch.unchanged()
    assert structure_key(module) != before


# ---- code that no version stands for


@pytest.mark.parametrize("build", [tiny_unet, lambda: tiny_vae().decoder, tiny_clip, tiny_bert])
def test_the_code_of_diffusers_and_transformers_is_known_by_its_version(build: Callable[[], nn.Module]) -> None:
    assert structure(build()).foreign is None


def test_code_of_the_user_is_foreign() -> None:
    assert "Acts" in str(structure(Acts(torch.tanh)).foreign)
    assert structure(nn.Sequential(nn.Linear(2, 2))).foreign is None

    module = tiny_unet()
    module.mid_block.hack = lambda x: x
    assert "lambda" in str(structure(module).foreign)


# ---- the watches


def test_the_structure_watch_is_quiet_while_nothing_changes() -> None:
    module = unet()
    watch, weights = StructureWatch(module), WeightsWatch(module)
    with torch.no_grad():
        module(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 4, 32))
    assert watch.unchanged()
    assert weights.unchanged()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_watch_notices(change: Callable[[Any], None]) -> None:
    module = unet()
    structure, weights = StructureWatch(module), WeightsWatch(module)
    change(module)
    assert not (structure.unchanged() and weights.unchanged())


WEIGHT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "edited in place": lambda m: m.conv_in.weight.mul_(2),
    "another tensor": lambda m: setattr(m.conv_in, "weight", nn.Parameter(torch.zeros_like(m.conv_in.weight))),
    "load_state_dict": lambda m: m.load_state_dict(tiny_unet(1).state_dict()),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(tiny_unet(1).state_dict(), assign=True),
    "moved to another dtype": lambda m: m.to(torch.bfloat16),
    "to another dtype and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "other storage": lambda m: setattr(m.conv_in.weight, "data", torch.zeros_like(m.conv_in.weight)),
}


@pytest.mark.parametrize("change", WEIGHT_CHANGES.values(), ids=WEIGHT_CHANGES.keys())
def test_the_weights_watch_notices(change: Callable[[Any], Any]) -> None:
    module = tiny_unet()
    watch = WeightsWatch(module)
    assert watch.unchanged()
    with torch.no_grad():
        change(module)
    assert not watch.unchanged()


def test_the_weights_watch_notices_a_new_buffer() -> None:
    module = nn.Sequential(nn.ReLU())
    watch = WeightsWatch(module)
    module[0].register_buffer("extra", torch.zeros(1))
    assert not watch.unchanged()


def test_where_a_model_was_loaded_from_is_no_structure(tmp_path: Path) -> None:
    encoder = tiny_clip()
    kind, before = type(encoder), structure_key(encoder)
    keys = set()
    for name in ("one", "other"):
        encoder.save_pretrained(tmp_path / name)
        keys.add(structure_key(kind.from_pretrained(tmp_path / name)))
    assert keys == {before}


# ---- hooks and adapters


def test_a_hook_inside_is_named_and_one_outside_is_not() -> None:
    module = tiny_unet()
    watch = StructureWatch(module)
    outside = module.register_forward_hook(lambda *_: None)
    assert watch.hooked() is None
    inside = module.conv_in.register_forward_pre_hook(lambda *_: None)
    assert watch.hooked() == "Conv2d"
    inside.remove()
    outside.remove()
    assert watch.hooked() is None


def test_a_hook_on_all_modules_is_noticed() -> None:
    watch = StructureWatch(nn.Sequential(nn.ReLU()))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert watch.hooked()
    finally:
        handle.remove()


def test_a_forward_replaced_inside_is_noticed() -> None:
    module = tiny_unet()
    module.conv_in.forward = lambda x: x
    assert "Conv2d" in str(StructureWatch(module).hooked())


def test_adapters_are_weights_and_no_structure() -> None:
    from peft import LoraConfig

    module = tiny_unet()
    before = structure_key(module)
    watch = StructureWatch(module)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]), "ink")
    assert structure_key(module) == before
    assert not watch.unchanged(), "other layers stand in the places of some"
    watch, weights = StructureWatch(module), WeightsWatch(module)
    assert watch.hooked() is None
    module.set_adapters("ink", 0.5)
    assert watch.unchanged()
    assert not weights.unchanged()
    module.conv_in.padding = (2, 2)
    assert structure_key(module) != before


def test_a_hook_on_an_adapters_layer_is_named() -> None:
    from peft import LoraConfig

    module = tiny_unet()
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "ink")
    (_, layer), *_ = ((n, p) for n, p in module.named_modules() if n.endswith("to_q"))
    layer.register_forward_hook(lambda *_: None)
    assert StructureWatch(module).hooked() == "Linear"


@pytest.mark.parametrize(
    ("now", "same"), [([1, 2], True), ([1], False), ([1, 2, 3], False), ([2, 1], False), ([], False)]
)
def test_the_same_objects_and_as_many(now: list[int], same: bool) -> None:
    assert _identical(iter(now), [1, 2]) is same
