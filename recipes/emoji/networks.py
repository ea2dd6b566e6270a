"""The networks: Stable Diffusion's, only smaller, and a small classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 160  # of the text encoders, and of the UNet's cross-attention
LATENT = 16  # 128 pixels


def make_vae(tiny: bool = False) -> Any:
    """AutoencoderKL: images [B, 3, 8h, 8w] <-> latents [B, 4, h, w]; 1.8 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16) if tiny else (32, 64, 80, 80),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=8 * LATENT,
    )


def make_unet(tiny: bool = False) -> Any:
    """UNet2DConditionModel with three levels, cross-attention at all but the lowest; 4.8 M parameters."""
    from diffusers import UNet2DConditionModel

    channels = (32, 32, 64) if tiny else (64, 96, 128)
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        # despite its name this is the number of heads: each has 32 channels
        attention_head_dim=tuple(c // 32 for c in channels),
        cross_attention_dim=WIDTH,
        norm_num_groups=32,
    )


def make_text_encoder(language: str, tokenizer: Any) -> Any:
    """CLIPTextModel for "en", BertModel for "zh": token numbers [B, 77] -> [B, 77, 160]."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

    shape = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3}
    if language == "zh":
        return BertModel(
            BertConfig(**shape, num_attention_heads=5, max_position_embeddings=77, pad_token_id=tokenizer.pad_token_id,
                       hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )  # fmt: skip
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(
        CLIPTextConfig(**shape, num_attention_heads=5, max_position_embeddings=77, projection_dim=WIDTH, **special)
    )


def load_tokenizer(language: str, data: Path) -> Any:
    from transformers import BertTokenizer, CLIPTokenizer

    return (
        BertTokenizer.from_pretrained(data / "tokenizer_zh")
        if language == "zh"
        else CLIPTokenizer.from_pretrained(data / "tokenizer")
    )


def count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


class Block(nn.Module):
    """Residual block, halving height and width: [B, C, H, W] -> [B, D, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


class Classifier(nn.Module):
    """Says what an image [B, 3, H, W] in [-1, 1] shows; its features measure how near two pictures are."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (32, 64, 128, 192, 256)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.embed = nn.Linear(widths[-1] * 2, 128)
        self.head = nn.Linear(128, classes, bias=False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The feature maps of each level."""
        maps = []
        for block in self.blocks:
            maps.append(x := block(x))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> directions [B, 128] of length 1."""
        x = self.maps(x)[-1]
        return F.normalize(self.embed(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).float(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.features(x) @ F.normalize(self.head.weight.float(), dim=1).T
