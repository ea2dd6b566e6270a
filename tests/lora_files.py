"""Adapter files for the miniature pipelines, made by the libraries that own the formats.

LyCORIS' modules are put into the layers of a pipeline and saved under kohya's names: the pipeline then is the
reference, since it computes with the library's own forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_LAYERS = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn1.to_out.0",
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
)
CLIP_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")
BERT_LAYERS = ("encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense")
NORMS = ("down_blocks.0.resnets.0.norm1", f"{BLOCK}.norm1", "conv_norm_out")


def lycoris_file(pipe: Any, path: Path, algorithm: str, dtype: torch.dtype | None = None, **options: Any) -> list[Any]:
    """Put LyCORIS' modules into a pipeline, and write them as one file.

    algorithm  "locon", "loha", "lokr", "full", "norm" or "ia3"
    returns    the modules; `multiplier` is their strength
    """
    modules, tensors = [], {}
    for name, layer in kohya_layers(pipe, NORMS if algorithm == "norm" else None):
        module = _lycoris(algorithm, name, layer, **options)
        modules.append(module)
        tensors |= {f"{name}.{key}": value.detach().clone() for key, value in _saved(module, algorithm).items()}
        module.apply_to()
    save_file({key: value.to(dtype) if dtype else value for key, value in tensors.items()}, path)
    return modules


def kohya_layers(pipe: Any, unet_layers: tuple[str, ...] | None = None) -> list[tuple[str, nn.Module]]:
    encoder = pipe.text_encoder
    is_bert = "Bert" in type(encoder).__name__
    found = [("lora_unet_" + flat(name), pipe.unet.get_submodule(name)) for name in unet_layers or UNET_LAYERS]
    if unet_layers is None:
        head = "" if is_bert else "text_model_"
        found += [
            (f"lora_te_{head}{flat(name)}", encoder.get_submodule(name))
            for name in (BERT_LAYERS if is_bert else CLIP_LAYERS)
        ]
    return found


def flat(name: str) -> str:
    return name.replace(".", "_")


def _lycoris(algorithm: str, name: str, layer: nn.Module, **options: Any) -> Any:
    from lycoris.modules.full import FullModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    kinds = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "full": FullModule, "norm": NormModule}
    kind = {**kinds, "ia3": IA3Module}[algorithm]
    module = kind(name, layer, 1.0, **{"lora_dim": 3, "alpha": 2.0, **options})
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key == "dora_scale":
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def _saved(module: Any, algorithm: str) -> dict[str, torch.Tensor]:
    if algorithm == "full":
        return {"diff": module.weight} | ({} if module.bias is None else {"diff_b": module.bias})
    if algorithm == "norm":
        return {"w_norm": module.w_norm, "b_norm": module.b_norm}
    if algorithm == "ia3":
        return {"weight": module.weight, "on_input": module.on_input}
    return module.custom_state_dict()


def set_multiplier(modules: list[Any], strength: float) -> None:
    for module in modules:
        module.multiplier = strength


def peft_file(pipe: Any, folder: Path, targets: list[str], **options: Any) -> Path:
    """Give the UNet an adapter of PEFT, and let diffusers write it, with PEFT's settings in the header."""
    config = LoraConfig(target_modules=targets, **{"r": 3, "init_lora_weights": False, **options})
    pipe.unet.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="made")
    metadata = config.to_dict()
    pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"
