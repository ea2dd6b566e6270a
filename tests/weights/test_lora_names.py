"""Names of adapter files lead to the modules that diffusers' own converters lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import nn

from allaprima.weights.lora_names import Names, Place, ldm_names, modules_by_path
from tests.lora_files import BLOCK, flat
from tests.tiny import tiny_bert, tiny_clip, tiny_unet

WEIGHTED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
ATTENTION = "transformer_blocks.0.attn1.to_q"


def unet(**changes: Any) -> UNet2DConditionModel:
    """The levels of SD 1.5: four, with two layers each."""
    sd15 = dict(
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=1,
        layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    )
    with torch.device("meta"):
        return tiny_unet(**{**sd15, **changes})


SDXL = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)


@pytest.fixture(scope="module")
def names() -> Names:
    return Names({"unet": unet(), "text_encoder": tiny_clip()})


@pytest.mark.parametrize(
    ("ldm", "path"),
    [
        ("input_blocks_1_1", f"down_blocks.0.attentions.0.{ATTENTION}"),
        ("input_blocks_4_1", f"down_blocks.1.attentions.0.{ATTENTION}"),
        ("input_blocks_8_1", f"down_blocks.2.attentions.1.{ATTENTION}"),
        ("middle_block_1", f"mid_block.attentions.0.{ATTENTION}"),
        ("output_blocks_3_1", f"up_blocks.1.attentions.0.{ATTENTION}"),
        ("output_blocks_11_1", f"up_blocks.3.attentions.2.{ATTENTION}"),
    ],
)
def test_the_published_blocks_of_sd15(names: Names, ldm: str, path: str) -> None:
    assert names.find(f"lora_unet_{ldm}_{flat(ATTENTION)}") == Place("unet", path)


@pytest.mark.parametrize(
    ("ldm", "path"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("input_blocks.10.0.in_layers.2", "down_blocks.3.resnets.0.conv1"),
        ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.5.0.out_layers.3", "up_blocks.1.resnets.2.conv2"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("out.2", "conv_out"),
    ],
)
def test_the_published_layers_of_sd15_with_dots(names: Names, ldm: str, path: str) -> None:
    assert names.find(f"diffusion_model.{ldm}") == Place("unet", path)


def layers_by_ldm(module: nn.Module) -> dict[str, str]:
    """LDM name -> path, for every layer with a weight."""
    layers = [path for path, part in modules_by_path(module).items() if isinstance(part, WEIGHTED)]
    found = {ldm: path for path in layers if (ldm := ldm_of(module, path))}
    assert len(found) == len(layers)
    return found


@pytest.mark.parametrize("changes", [{}, SDXL], ids=["sd15", "sdxl"])
def test_ldm_names_lead_where_checkpoints_of_ldm_lead(changes: dict[str, Any]) -> None:
    """diffusers converts a checkpoint in which every weight is a number to know it by."""
    module = unet(**changes)
    found = layers_by_ldm(module)
    checkpoint = {
        f"model.diffusion_model.{ldm}.{kind}": torch.full((1,), float(number))
        for number, ldm in enumerate(found)
        for kind in ("weight", "bias")
    }
    wanted = convert_ldm_unet_checkpoint(checkpoint, module.config)
    by_number = {int(value): key.removesuffix(".weight") for key, value in wanted.items() if key.endswith(".weight")}
    names = Names({"unet": module})
    for number, (ldm, path) in enumerate(found.items()):
        assert by_number[number] == path
        assert names.find(f"lora_unet_{flat(ldm)}") == names.find(f"diffusion_model.{ldm}") == Place("unet", path)


def test_ldm_names_of_sdxl_lead_where_loras_lead() -> None:
    """The same through diffusers' converters for LoRAs, which know nothing of SD 1.5's blocks from the tenth on."""
    module = unet(**SDXL)
    found = {ldm: path for ldm, path in layers_by_ldm(module).items() if "norm" not in path}
    tensors = {
        f"lora_unet_{flat(ldm)}.lora_{side}.weight": torch.full((1,), float(number))
        for number, ldm in enumerate(found)
        for side in ("down", "up")
    }
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(tensors, module.config)
    converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    wanted = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in converted.items()})
    assert {int(v): k.partition(".lora_")[0] for k, v in wanted.items()} == dict(enumerate(found.values()))


def ldm_of(module: nn.Module, path: str) -> str | None:
    """The LDM name of a layer by the table of blocks."""
    table = {own: ldm for ldm, own in ldm_names(module).items()}
    outer, inner = path, ""
    while outer and outer not in table:
        outer, _, last = outer.rpartition(".")
        inner = f".{last}{inner}"
    return table[outer] + inner if outer else None


@pytest.mark.parametrize(
    "name",
    [
        f"unet.{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn1.to_q",
        f"lora_unet_{flat(BLOCK)}_attn1_to_q",
        f"lycoris_{flat(BLOCK)}_attn1_to_q",
        f"base_model.model.{BLOCK}.attn1.to_q",
        f"unet.{BLOCK}.attn1.processor.to_q_lora",
        f"{BLOCK}.attn1.processor.to_q_lora",
        f"diffusion_model.input_blocks.1.1.{ATTENTION}",
    ],
)
def test_all_spellings_of_one_layer(names: Names, name: str) -> None:
    assert names.find(name) == Place("unet", f"{BLOCK}.attn1.to_q")


def test_the_old_processors_output(names: Names) -> None:
    assert names.find(f"unet.{BLOCK}.attn1.processor.to_out_lora") == Place("unet", f"{BLOCK}.attn1.to_out.0")


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_text_encoders_with_and_without_their_shell(name: str) -> None:
    """transformers 5 left the module `text_model` out; older versions have it."""
    for shell in (False, True):
        encoder: nn.Module = tiny_clip()
        path = "encoder.layers.0.self_attn.q_proj"
        if shell:
            encoder, path = nn.ModuleDict({"text_model": encoder}), f"text_model.{path}"
        assert Names({"unet": unet(), "text_encoder": encoder}).find(name) == Place("text_encoder", path)


def test_bert_and_a_second_text_encoder() -> None:
    names = Names({"text_encoder": tiny_bert(), "text_encoder_2": tiny_clip()})
    query = "encoder.layer.0.attention.self.query"
    for name in (f"lora_te_{flat(query)}", f"lora_te_bert_{flat(query)}", f"text_encoder.{query}"):
        assert names.find(name) == Place("text_encoder", query)
    second = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    assert names.find(second) == Place("text_encoder_2", "encoder.layers.0.mlp.fc1")


def test_a_transformer() -> None:
    block = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(2, 2)})})
    names = Names({"transformer": nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})})
    path = "transformer_blocks.0.attn.to_q"
    for name in (f"transformer.{path}", f"lora_transformer_{flat(path)}", f"lora_unet_{flat(path)}", path):
        assert names.find(name) == Place("transformer", path)


@pytest.mark.parametrize(
    "name",
    [
        "unet",
        "unet.",
        "",
        "lora_unet_",
        f"text_encoder.{BLOCK}.attn1.to_q",
        f"lora_te_{flat(BLOCK)}_attn1_to_q",
        f"unet.x.{BLOCK}.attn1.to_q",
        "text_encoder_2.encoder.layers.0.mlp.fc1",
    ],
)
def test_near_misses_lead_nowhere(names: Names, name: str) -> None:
    assert names.find(name) is None


def test_the_nearest_name(names: Names) -> None:
    assert names.nearest(f"lora_unet_{flat(BLOCK)}_attn1_to_x") in {
        Place("unet", f"{BLOCK}.attn1.to_{last}") for last in "qkv"
    }
    assert names.nearest("unet.down_blocks.9.resnets.0.time_emb_proj") is not None
    assert names.nearest("bundle_emb.ink.string_to_param") is None
    assert names.missing_component("lora_te2_text_model_encoder") == "text_encoder_2"
    assert names.missing_component("lora_unet_conv_in") is None


def test_layers_that_peft_wrapped_have_their_own_names() -> None:
    module = nn.ModuleDict({"to_q": nn.ModuleDict({"base_layer": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2)})})
    found = modules_by_path(module)
    assert found["to_q"] is module["to_q"]["base_layer"]  # type: ignore[index]
    assert "to_q.base_layer" not in found
