"""Stable Diffusion in miniature: the real diffusers classes with small random weights, built in a second.

Everything is seeded and in eval mode, so that two calls with the same arguments give equal weights.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CROSS_DIM = 32
CHINESE = "红色的苹果绿树房子猫狗女孩一个只朵花蓝天太阳月亮在左边右上面下,，。1个"


def tiny_unet(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> UNet2DConditionModel:
    """Three levels (attention in two of them), heads of 32 channels; `changes` go into the config."""
    config: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 2),  # diffusers' name for the number of heads
        norm_num_groups=8,
        cross_attention_dim=CROSS_DIM,
    )
    return _seeded(lambda: UNet2DConditionModel(**{**config, **changes}), seed, dtype)


def tiny_vae(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> AutoencoderKL:
    """Factor 8, four latent channels."""
    config: dict[str, Any] = dict(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )
    return _seeded(lambda: AutoencoderKL(**{**config, **changes}), seed, dtype)


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A byte-level vocabulary without merges: any text is known, one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_clip(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> CLIPTextModel:
    tokenizer = tiny_clip_tokenizer()
    config: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=CROSS_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _seeded(lambda: CLIPTextModel(CLIPTextConfig(**{**config, **changes})), seed, dtype)


def tiny_bert_tokenizer() -> BertTokenizer:
    """One token a Chinese character of `CHINESE`, one a lower-case letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    characters = sorted(set(CHINESE) | set(letters)) + [f"##{letter}" for letter in letters]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=64)


def tiny_bert(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> BertModel:
    config: dict[str, Any] = dict(
        vocab_size=len(tiny_bert_tokenizer()),
        hidden_size=CROSS_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    return _seeded(lambda: BertModel(BertConfig(**{**config, **changes}), add_pooling_layer=False), seed, dtype)


def tiny_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """SD v1.5 in miniature: CLIP text encoder, UNet, VAE, PNDM; native size 128."""
    return _assemble(tiny_clip(seed, dtype), tiny_clip_tokenizer(), seed, dtype)


def tiny_bert_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Taiyi in miniature: the same UNet and VAE behind a BERT text encoder."""
    return _assemble(tiny_bert(seed, dtype), tiny_bert_tokenizer(), seed, dtype)


def _assemble(text_encoder: Any, tokenizer: Any, seed: int, dtype: torch.dtype) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(seed, dtype),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(seed, dtype),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> PNDMScheduler:
    """The scheduler_config.json that SD v1.5 ships."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _seeded(build: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        return model if dtype == torch.float32 else model.to(dtype)
