"""Train a UNet together with its text encoders.

    python -m recipes.emoji.train_text2img --name both --languages en zh --minutes 8
    python -m recipes.emoji.train_text2img --name emoji --languages en --init both --minutes 3
    python -m recipes.emoji.train_text2img --name emoji-zh --languages zh --init both --minutes 3
    python -m recipes.emoji.train_text2img --name emoji-zh-3d --languages zh --init emoji-zh --style fluent-3d --freeze-text --minutes 2

With two languages one UNet learns to draw from both encoders at once, which is cheaper than learning to draw twice; the
checkpoints part ways afterwards. Scenes are encoded by the VAE before, so that a step is only UNet and text encoder.
`--resume` carries on after a break.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.emoji.diffusion import alphas, denoising_loss, sample
from recipes.emoji.networks import count, load_tokenizer, make_text_encoder, make_unet
from recipes.emoji.scenes import Atlas, scene_tensors
from recipes.emoji.training import Clock, Curve, FlatAdamW, Step, arguments, setup, sheet

UNCONDITIONAL = 0.12
# latent height and width -> share of the steps
SIZES = {(16, 16): 0.80, (12, 16): 0.03, (16, 12): 0.03, (16, 24): 0.04, (24, 16): 0.04, (24, 24): 0.04, (32, 32): 0.02}
TINY_SIZES = {(8, 8): 0.7, (8, 12): 0.3}
PROMPTS = {
    "en": [
        "a red apple", "a cat", "three penguins, 3D render, pink background", "a house to the left of a guitar, cartoon sticker, yellow background",
        "a girl with a hat", "a car", "an astronaut", "a slice of pizza, flat illustration", "a sunflower, sky blue background", "grinning face",
        "a rocket above a planet", "two strawberries", "a lion, 3D render", "a castle, navy background", "a robot", "four balloons",
        "an octopus, simple icon", "a bicycle", "a birthday cake, picture book", "a penguin wearing a crown",
    ],
    "zh": [
        "一个红苹果", "一只猫", "三只企鹅，三维渲染，粉色背景", "房子在吉他的左边，卡通贴纸，黄色背景", "1个女孩", "一辆汽车", "宇航员", "披萨，扁平插画",
        "向日葵，天蓝色背景", "笑脸", "火箭在行星的上面", "两个草莓", "狮子，三维渲染", "城堡，深蓝色背景", "机器人", "四个气球", "章鱼，简约图标",
        "自行车", "生日蛋糕，绘本", "戴皇冠的企鹅",
    ],
}  # fmt: skip


class Pool:
    """Encoded scenes of one size on the device: latents [N, 4, h, w] f16 and tokens of each language [N, 77] int16."""

    def __init__(
        self,
        args: argparse.Namespace,
        atlas: Atlas,
        vae: Any,
        size: tuple[int, int],
        scenes: int,
        look: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        height, width = 8 * size[0], 8 * size[1]
        cache = (
            args.runs
            / "pools"
            / f"{height}x{width}-{scenes}-{args.seed}-{args.style}-{look.__name__ if look else ''}.pt"
        )
        if cache.exists():
            kept = torch.load(cache, map_location=atlas.concept.device, weights_only=True)
            self.latents, self.tokens = kept["latents"], kept["tokens"]
            return
        seed = args.seed + 100 * size[0] + size[1]
        made = scene_tensors(args.data, scenes, height, width, seed, atlas.concept.device, args.style)
        self.tokens = {"en": made["en_ids"], "zh": made["zh_ids"]}
        chunk = max(1, 1024 * 128 * 128 // (height * width))
        with torch.no_grad():
            parts = []
            for rows in torch.arange(scenes, device=atlas.concept.device).split(chunk):
                images = atlas.compose(*(made[k][rows] for k in ("sprite", "box", "background")), height, width)
                images = look(images) if look else images
                latents = vae.encode(images.to(vae.dtype)).latent_dist.sample()
                parts.append((latents.float() * vae.config.scaling_factor).half())
        self.latents = torch.cat(parts)
        cache.parent.mkdir(exist_ok=True)
        torch.save({"latents": self.latents, "tokens": self.tokens}, cache)


class Model(nn.Module):
    """A UNet and the text encoders that feed it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizers = {language: load_tokenizer(language, args.data) for language in args.languages}
        self.unet = make_unet(args.tiny)
        self.text = nn.ModuleDict({language: make_text_encoder(language, t) for language, t in self.tokenizers.items()})
        if args.init:
            weights = load_file(args.runs / f"{args.init}.safetensors")
            kept = {
                k: v.float() for k, v in weights.items() if k.startswith("unet.") or k.split(".")[1] in args.languages
            }
            self.load_state_dict(kept)
        if args.freeze_text:
            self.text.requires_grad_(False)
        print(f"unet: {count(self.unet)}; " + "; ".join(f"text encoder {k}: {count(v)}" for k, v in self.text.items()))

    def tokens(self, language: str, prompts: list[str]) -> Tensor:
        tokenizer = self.tokenizers[language]
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
        return torch.tensor(ids, device=self.unet.device)

    def embed(self, language: str, ids: Tensor) -> Tensor:
        return self.text[language](ids.long())[0]

    def draw(
        self, vae: Any, language: str, prompts: list[str], height: int = 128, width: int = 128, **options: Any
    ) -> Tensor:
        with torch.no_grad():
            text, empty = (self.embed(language, self.tokens(language, p)) for p in (prompts, [""]))
        return sample(self.unet, vae, text, empty, height, width, **options)


def training_step(
    model: Model, pool: Pool, optimizer: FlatAdamW, batch: int, alpha: Tensor, total: Tensor
) -> Callable[[], None]:
    """The whole step for one size: an equal part of the batch for each language."""
    share = batch // len(model.text)
    empty = {language: model.tokens(language, [""]) for language in model.text}

    def function() -> None:
        latents, text = [], []
        for language in model.text:
            rows = torch.randint(len(pool.latents), (share,), device=total.device)
            silent = torch.rand(share, 1, device=total.device) < UNCONDITIONAL
            ids = torch.where(silent, empty[language], pool.tokens[language][rows].long())
            latents.append(pool.latents[rows].float())
            text.append(model.embed(language, ids))
        loss = denoising_loss(model.unet, torch.cat(latents), torch.cat(text), alpha)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    return function


def sheets(model: Model, vae: Any, name: str, runs: Path, tiny: bool = False) -> None:
    """Draw the prompts at the native size, and some wider."""
    steps = 2 if tiny else 30
    for language in model.text:
        prompts = PROMPTS[language][: 2 if tiny else 20]
        sheet(model.draw(vae, language, prompts, steps=steps), runs / f"{name}-{language}.png")
        wide = model.draw(vae, language, prompts[:10], 128, 192, seed=1, steps=steps)
        sheet(wide, runs / f"{name}-{language}-wide.png", 5)


def save(model: Model, optimizer: FlatAdamW, path: Path) -> None:
    """The averaged weights in half precision."""
    optimizer.use_average()
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)


def load_vae(runs: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(runs / "vae", torch_dtype=dtype).to(device).eval().requires_grad_(False)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--name", default="both")
    parser.add_argument("--languages", nargs="+", default=["en", "zh"], choices=["en", "zh"])
    parser.add_argument("--init", help="start from this run's weights")
    parser.add_argument("--style", help="draw every scene in this style")
    parser.add_argument("--freeze-text", action="store_true")
    parser.add_argument(
        "--graphs", action="store_true", help="replay each step as a CUDA graph: pays for small batches"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--scenes", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--floor", type=float, default=0.0, help="the learning rate ends at this share of its peak")
    parser.add_argument("--average", type=float, default=0.9995, help="decay of the moving average of the weights")
    args = parser.parse_args(argv)
    if args.tiny:
        args.scenes, args.batch = 64, 8
    return args


def make_pools(args: argparse.Namespace, atlas: Atlas, vae: Any) -> dict[tuple[int, int], Pool]:
    """The encoded scenes of every size; the first size is the native one and has most of them."""
    sizes = TINY_SIZES if args.tiny else SIZES
    return {
        size: Pool(args, atlas, vae, size, args.scenes if k == 0 else args.scenes // 40) for k, size in enumerate(sizes)
    }


def train(args: argparse.Namespace, pools: dict[tuple[int, int], Pool], device: torch.device) -> Model:
    """Train for `args.minutes`, save the averaged weights, and return the model with them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Model(args).to(device)
    optimizer = FlatAdamW(model.parameters(), dtype, args.average)
    model.to(dtype)
    curve, alpha, state = Curve(args.name, args.runs, device), alphas(device), args.runs / f"{args.name}-state.pt"
    first = optimizer.load(state) if args.resume and state.exists() else 0
    sizes = TINY_SIZES if args.tiny else SIZES
    native = next(iter(sizes))
    steps = {}
    for size, pool in pools.items():
        batch = args.batch * native[0] * native[1] // (size[0] * size[1]) // 4 * 4
        steps[size] = Step(
            training_step(model, pool, optimizer, batch, alpha, curve.total), device, eager=not args.graphs
        )
    curve.total.zero_()
    choice, clock = random.Random(args.seed), Clock(args, args.lr, first, args.floor)
    while clock.share < 1:
        optimizer.schedule(clock.step, clock.lr)
        steps[choice.choices(list(sizes), list(sizes.values()))[0]].run()
        clock.step += 1
        curve.log(clock, args.batch, every=1 if args.tiny else 200)
        if clock.step % 1000 == 0:
            optimizer.save(state, clock.step)
    curve.save()
    save(model, optimizer, args.runs / f"{args.name}.safetensors")
    return model.eval()


def main() -> None:
    args = parse()
    device = setup(args)
    began = time.perf_counter()
    vae = load_vae(args.runs, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    pools = make_pools(args, Atlas(args.data, device), vae)
    print(f"scenes ready after {time.perf_counter() - began:.0f} s", flush=True)
    args.minutes -= (time.perf_counter() - began) / 60
    sheets(train(args, pools, device), vae, args.name, args.runs, args.tiny)


if __name__ == "__main__":
    main()
