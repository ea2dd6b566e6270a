"""Compose scenes on the training device: transparent sprites over a plain background, and three looks for the LoRAs."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.emoji.captions import MAX_SPRITES, Captioner

WORKERS = min(12, os.cpu_count() or 1)
SHARES = 12  # of the scenes, each with its own seed: the same scenes on every machine


class Atlas:
    """All sprites on the device as premultiplied RGBA, at several sizes, so that shrinking stays free of aliasing.

    levels   list of uint8 [S, 4, s, s], s = 160, 113, 80, 57, 40
    concept  [S] int64 and style [S] int64: what each sprite shows, and how
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        index = json.loads((folder / "index.json").read_text())
        data = (folder / "sprites.bin").read_bytes()
        with ThreadPoolExecutor(WORKERS) as pool:
            sprites = list(pool.map(lambda row: decode(data[row[2] : row[2] + row[3]]), index["sprites"]))
        full = torch.from_numpy(np.stack(sprites)).to(device).permute(0, 3, 1, 2)
        size = full.shape[-1]
        self.levels = [shrink(full, round(size / 2 ** (k / 2))) for k in range(5)]
        self.concept = torch.tensor([row[0] for row in index["sprites"]], device=device)
        self.style = torch.tensor([row[1] for row in index["sprites"]], device=device)
        self.styles: list[str] = index["styles"]

    def compose(self, sprite: Tensor, box: Tensor, background: Tensor, height: int, width: int) -> Tensor:
        """Draw scenes: sprite [N, 4], box [N, 4, 3] in pixels, background [N, 3] uint8 -> images [N, 3, H, W] in [-1, 1]."""
        canvas = (background.float() / 255)[:, :, None, None].repeat(1, 1, height, width)
        for slot in range(MAX_SPRITES):
            used = sprite[:, slot] >= 0
            if not used.any():
                break
            size = box[:, slot, 2]
            level = ((self.levels[0].shape[-1] / size).log2() * 2).floor().clamp(0, len(self.levels) - 1)
            for k, texture in enumerate(self.levels):
                rows = (used & (level == k)).nonzero().squeeze(1)
                if len(rows):
                    canvas[rows] = paste(canvas[rows], texture[sprite[rows, slot].long()], box[rows, slot])
        return canvas.mul_(2).sub_(1)


def decode(data: bytes) -> np.ndarray[Any, Any]:
    """WebP bytes -> premultiplied RGBA [H, W, 4] uint8."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), np.uint16)
    pixels = pixels.copy()
    pixels[..., :3] = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    return pixels.astype(np.uint8)


def shrink(sprites: Tensor, size: int) -> Tensor:
    """[S, 4, H, W] uint8 -> [S, 4, size, size] uint8, averaged over what shrinks together."""
    if sprites.shape[-1] == size:
        return sprites.contiguous()
    parts = [F.interpolate(s.float(), (size, size), mode="bilinear", antialias=True) for s in sprites.split(512)]
    return torch.cat([p.round().to(torch.uint8) for p in parts])


def paste(canvas: Tensor, texture: Tensor, box: Tensor) -> Tensor:
    """Lay texture [n, 4, s, s] uint8 over canvas [n, 3, H, W] in [0, 1]; box [n, 3] = centre x, centre y, size in pixels."""
    n, _, height, width = canvas.shape
    x, y, size = box.unbind(1)
    theta = torch.zeros(n, 2, 3, device=canvas.device)
    theta[:, 0, 0], theta[:, 1, 1] = width / size, height / size
    theta[:, 0, 2], theta[:, 1, 2] = (width - 2 * x) / size, (height - 2 * y) / size
    grid = F.affine_grid(theta, [n, 4, height, width], align_corners=False)
    layer = F.grid_sample(texture.float() / 255, grid, align_corners=False, padding_mode="zeros")
    return canvas * (1 - layer[:, 3:]) + layer[:, :3]


# -- looks for the LoRAs: images [N, 3, H, W] in [-1, 1] -> the same shape ---------------------------------------------


def edges(images: Tensor) -> Tensor:
    """Strength of the strongest edge among the colours, [N, 1, H, W] in [0, 1]."""
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]], device=images.device) / 8
    kernels = torch.stack([kernel, kernel.T])[:, None].repeat(3, 1, 1, 1)
    slopes = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernels, groups=3)
    return slopes.unflatten(1, (3, 2)).pow(2).sum(2).sqrt().amax(1, keepdim=True)


def pixel_art(images: Tensor) -> Tensor:
    """Blocks of 4 x 4 pixels in a small palette."""
    blocks = F.avg_pool2d(images, 4)
    levels = ((blocks + 1) / 2 * 7).round() / 7 * 2 - 1
    return F.interpolate(levels, scale_factor=4, mode="nearest")


def ink_sketch(images: Tensor) -> Tensor:
    """Dark ink lines and a light wash of the colours on paper."""
    paper = torch.tensor([0.97, 0.945, 0.885], device=images.device)[:, None, None] * 2 - 1
    ink = torch.tensor([0.16, 0.15, 0.24], device=images.device)[:, None, None] * 2 - 1
    wash = paper + 0.28 * (images - 1)
    line = (edges(images) * 2.2 - 0.12).clamp(0, 1)
    return (wash * (1 - line) + ink * line).clamp(-1, 1)


def neon(images: Tensor) -> Tensor:
    """Glowing outlines in the colours of the thing, on a night sky."""
    night = torch.tensor([0.05, 0.03, 0.14], device=images.device)[:, None, None]
    unit = (images + 1) / 2
    low, high = unit.amin(1, keepdim=True), unit.amax(1, keepdim=True)
    vivid = (unit - 0.8 * low) / (high - 0.8 * low + 0.15)
    colored = (high - low) + 0.05
    hue = blur(vivid * colored, 5) / blur(colored, 5)
    hue = hue / hue.amax(1, keepdim=True).clamp(min=0.2)
    line = (edges(images) * 2.2 - 0.08).clamp(0, 1)
    glow = 0.75 * blur(line, 5) + 0.35 * blur(line, 11)
    body = 0.12 * unit * (blur(colored, 5) > 0.12)
    return ((night + body + hue * (line + glow)).clamp(0, 1)) * 2 - 1


def blur(images: Tensor, size: int) -> Tensor:
    """Box blur, twice."""
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, [size // 2] * 4, mode="replicate"), size, stride=1)
    return images


LOOKS: dict[str, Callable[[Tensor], Tensor]] = {"pixel": pixel_art, "sketch": ink_sketch, "neon": neon}


# -- many scenes at once ------------------------------------------------------------------------------------------------


def make_scenes(job: tuple[Path, int, int, int, int, str | None]) -> dict[str, Any]:
    """One worker's share: scenes with their captions as token numbers [N, 77] int16."""
    from tokenizers import Tokenizer

    folder, seed, count, height, width, style = job
    scenes = Captioner(folder, seed).batch(count, height, width, style)
    for key, name in (("en", "tokenizer"), ("zh", "tokenizer_zh")):
        tokenizer = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
        scenes[key + "_ids"] = encode(tokenizer, scenes[key])
    # the Chinese encoder hears plain English names, too
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_zh" / "tokenizer.json"))
    scenes["zh_ids"][::8] = encode(tokenizer, scenes["en"][::8])
    return scenes


def encode(tokenizer: Any, texts: list[str], length: int = 77) -> np.ndarray[Any, Any]:
    """Texts -> token numbers [N, 77] int16, cut and padded as the pipeline does it."""
    pad = "[PAD]" if tokenizer.token_to_id("[PAD]") is not None else "<|endoftext|>"
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return np.array([e.ids for e in tokenizer.encode_batch(texts)], np.int16)


def scene_tensors(
    folder: Path, count: int, height: int, width: int, seed: int, device: torch.device, style: str | None = None
) -> dict[str, Tensor]:
    """`count` scenes as tensors on the device: sprite, box, background, en_ids, zh_ids; made by several processes."""
    shares = [
        (folder, seed * 1000 + k, len(part), height, width, style)
        for k, part in enumerate(np.array_split(range(count), SHARES))
        if len(part)
    ]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if WORKERS == 1 or count < 2000:
        parts = [make_scenes(share) for share in shares]
    else:
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            parts = pool.map(make_scenes, shares)
    keys = ("sprite", "box", "background", "en_ids", "zh_ids")
    return {key: torch.from_numpy(np.concatenate([p[key] for p in parts])).to(device) for key in keys}
