"""Train a LoRA for `emoji`: a drawing style made by processing the scenes (scenes.LOOKS).

    python -m recipes.emoji.train_lora sketch|neon [--minutes 1] [--tiny]

With sketch comes watercolor: the part of it that lies in the UNet's attention, made stronger, without lines of its own.
Writes `runs/loras/NAME.safetensors` as diffusers does, and `runs/loras/kohya/NAME.safetensors` as kohya's tools do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes.emoji import train_text2img
from recipes.emoji.diffusion import alphas
from recipes.emoji.scenes import LOOKS, Atlas
from recipes.emoji.train_text2img import PROMPTS, Model, Pool, load_vae, training_step
from recipes.emoji.training import Clock, Curve, FlatAdamW, arguments, setup, sheet

ATTENTION = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*ff\.net\.(0\.proj|2)"
CONVOLUTIONS = r"up_blocks\..*conv[12]"
TEXT = r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)"


@dataclass(frozen=True)
class Targets:
    """Which layers a LoRA changes: patterns of the names of layers, and the rank."""

    unet: tuple[str, ...]
    text: tuple[str, ...] = ()
    rank: int = 4


LORAS = {
    "sketch": Targets((ATTENTION, CONVOLUTIONS), (TEXT,)),
    "neon": Targets((ATTENTION, FEED_FORWARD)),
}


def add_adapters(model: Model, targets: Targets) -> None:
    """Put fresh adapters into the model; everything else stops learning."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    for module, patterns in ((model.unet, targets.unet), (model.text["en"], targets.text)):
        if patterns:
            config = LoraConfig(
                r=targets.rank, lora_alpha=targets.rank, target_modules="|".join(f"({p})" for p in patterns)
            )
            inject_adapter_in_model(config, module)


def adapter_weights(model: Model) -> dict[str, Tensor]:
    """The adapters under the names that diffusers gives them."""
    weights = {}
    for prefix, module in (("unet.", model.unet), ("text_encoder.text_model.", model.text["en"])):
        for name, value in module.state_dict().items():
            if ".lora_" in name:
                name = name.removeprefix("text_model.").replace(".default", "")
                weights[prefix + name] = value.detach().cpu().half().contiguous()
    return weights


def watercolor(sketch: dict[str, Tensor], strength: float = 1.5) -> dict[str, Tensor]:
    """The UNet-attention part of the sketch LoRA, at this strength: pale colours on warm paper."""
    part = {name: value for name, value in sketch.items() if name.startswith("unet.") and ".attn" in name}
    return {name: value * strength if ".lora_B." in name else value for name, value in part.items()}


def to_kohya(weights: dict[str, Tensor], alpha_share: float = 0.5) -> dict[str, Tensor]:
    """The same LoRA under kohya's names, with an alpha of its own: up x (alpha / rank) stays what it was, exactly."""
    result = {}
    for name, value in weights.items():
        layer, side, _ = name.rsplit(".", 2)
        layer = (
            "lora_te_" + layer.removeprefix("text_encoder.")
            if layer.startswith("text_encoder.")
            else "lora_unet_" + layer.removeprefix("unet.")
        )
        layer = layer.replace(".", "_")
        if side == "lora_A":
            result[f"{layer}.lora_down.weight"] = value
            result[f"{layer}.alpha"] = torch.tensor(alpha_share * value.shape[0])
        else:
            result[f"{layer}.lora_up.weight"] = value / alpha_share
    return result


def write(weights: dict[str, Tensor], name: str, runs: Path) -> None:
    (runs / "loras" / "kohya").mkdir(parents=True, exist_ok=True)
    save_file(weights, runs / "loras" / f"{name}.safetensors", metadata={"format": "pt"})
    save_file(
        to_kohya(weights),
        runs / "loras" / "kohya" / f"{name}.safetensors",
        metadata={"ss_network_module": "networks.lora"},
    )


def train(name: str, args: Any, model: Model, pool: Pool, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    add_adapters(model, LORAS[name])
    optimizer = FlatAdamW(model.parameters(), dtype, decay=0.99)
    model.to(dtype)
    curve, clock = Curve(f"lora-{name}", args.runs, device), Clock(args, 3e-3)
    step = training_step(model, pool, optimizer, 8 if args.tiny else 256, alphas(device), curve.total)
    while clock.share < 1:
        optimizer.schedule(clock.step, clock.lr)
        step()
        clock.step += 1
        curve.log(clock, 256, every=1 if args.tiny else 100)
    curve.save()
    optimizer.use_average()
    weights = adapter_weights(model)
    write(weights, name, args.runs)
    if name == "sketch":
        write(watercolor(weights), "watercolor", args.runs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("name", choices=LORAS)
    parser.add_argument("--model", default="emoji", help="the run that the LoRA is for")
    parser.set_defaults(minutes=1.0)
    mine = parser.parse_args()
    args = train_text2img.parse(
        ["--languages", "en", "--init", mine.model, "--scenes", "16000", "--seed", str(mine.seed)]
        + ["--tiny"] * mine.tiny
    )
    args.data, args.runs, args.minutes, args.steps = mine.data, mine.runs, mine.minutes, mine.steps
    device = setup(args)
    vae = load_vae(args.runs, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    size = next(iter(train_text2img.TINY_SIZES if args.tiny else train_text2img.SIZES))
    pool = Pool(args, Atlas(args.data, device), vae, size, args.scenes, LOOKS[mine.name])
    model = Model(args).to(device)
    train(mine.name, args, model, pool, device)
    prompts, steps = (PROMPTS["en"][:2], 2) if args.tiny else (PROMPTS["en"], 30)
    sheet(model.eval().draw(vae, "en", prompts, steps=steps), args.runs / f"lora-{mine.name}.png")


if __name__ == "__main__":
    main()
