"""Stable Diffusion in miniature: the real diffusers classes with small random weights, built in a second.

Everything is seeded and in eval mode, so that two calls with the same arguments give equal weights.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from allaprima.alt_diffusion import AltTextConfig, AltTextEncoder

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


def tiny_clip(seed: int = 0, dtype: torch.dtype = torch.float32, kind: Any = CLIPTextModel, **changes: Any) -> Any:
    """`kind` may be CLIPTextModelWithProjection."""
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
    return _seeded(lambda: kind(CLIPTextConfig(**{**config, **changes})), seed, dtype)


def tiny_bert_tokenizer(model_max_length: int = 64) -> BertTokenizer:
    """One token a Chinese character of `CHINESE`, one a lower-case letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    characters = sorted(set(CHINESE) | set(letters)) + [f"##{letter}" for letter in letters]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=model_max_length)


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


# ---- other families ------------------------------------------------------------------------------------------------

TWO_LEVELS: dict[str, Any] = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(1, 2),
)
"""Changes of `tiny_unet` that make a smaller UNet, which is captured sooner."""

XL: dict[str, Any] = TWO_LEVELS | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + CROSS_DIM,
    cross_attention_dim=2 * CROSS_DIM,
)
"""Changes that make SDXL's: sizes and a pooled text join the timestep, two encoders' embeddings the cross-attention."""


def tiny_taiyi_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Taiyi's text encoder as it is: a BERT of 512 positions, whose tokenizer pads to all of them."""
    encoder = tiny_bert(seed, dtype, max_position_embeddings=512)
    return _assemble(encoder, tiny_bert_tokenizer(512), seed, dtype, tiny_unet(seed, dtype, **TWO_LEVELS))


def tiny_sd2_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """SD 2.1 in miniature: v-prediction, heads of one size, linear projections, a wider text encoder."""
    unet = tiny_unet(seed, dtype, **TWO_LEVELS, use_linear_projection=True, cross_attention_dim=64)
    text = tiny_clip(seed, dtype, hidden_size=64, hidden_act="gelu", num_attention_heads=2, intermediate_size=128)
    pipe = _assemble(text, tiny_clip_tokenizer(), seed, dtype, unet)
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    return pipe


def tiny_xlm_tokenizer() -> XLMRobertaTokenizer:
    """One token a Chinese character of `CHINESE`, one a lower-case letter."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "▁"]
    tokens = special + sorted(set(CHINESE) | set("abcdefghijklmnopqrstuvwxyz"))
    return XLMRobertaTokenizer(vocab=[(token, 0.0) for token in tokens], model_max_length=77)


def tiny_alt_encoder(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> AltTextEncoder:
    """AltDiffusion's text encoder, in the later models' form."""
    config: dict[str, Any] = dict(
        vocab_size=len(tiny_xlm_tokenizer()),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=80,
        type_vocab_size=1,
        project_dim=CROSS_DIM,
        has_pre_transformation=True,
    )
    return _seeded(lambda: AltTextEncoder(AltTextConfig(**{**config, **changes})), seed, dtype)


def tiny_alt_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """AltDiffusion in miniature, of our own text encoder."""
    unet = tiny_unet(seed, dtype, **TWO_LEVELS)
    return _assemble(tiny_alt_encoder(seed, dtype), tiny_xlm_tokenizer(), seed, dtype, unet)


def tiny_inpainting_pipeline(seed: int = 0) -> diffusers.StableDiffusionInpaintPipeline:
    """SD 1.5's inpainting model: a UNet of nine channels, which sees the mask and the picture without it."""
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_clip(seed),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_unet(seed, **TWO_LEVELS, in_channels=9),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> diffusers.StableDiffusionXLPipeline:
    """SDXL in miniature: two text encoders, the second with a projection."""
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(seed, dtype),
        text_encoder=tiny_clip(seed, dtype),
        text_encoder_2=_projecting_clip(seed + 1, dtype),
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_clip_tokenizer(),
        unet=tiny_unet(seed, dtype, **XL),
        scheduler=_euler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_refiner(seed: int = 0, dtype: torch.dtype = torch.float32) -> diffusers.StableDiffusionXLImg2ImgPipeline:
    """SDXL's refiner: only the second text encoder, and an aesthetic score among five numbers."""
    sizes = {"projection_class_embeddings_input_dim": 5 * 8 + CROSS_DIM, "cross_attention_dim": CROSS_DIM}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=tiny_vae(seed, dtype),
        text_encoder=None,
        text_encoder_2=_projecting_clip(seed + 1, dtype),
        tokenizer=None,
        tokenizer_2=tiny_clip_tokenizer(),
        unet=tiny_unet(seed, dtype, **(XL | sizes)),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> ControlNetModel:
    """Fits `tiny_unet(**TWO_LEVELS)`.  A new ControlNet's zero convolutions are given weights, so that it does
    something."""
    names = ("block_out_channels", "down_block_types", "attention_head_dim")
    config: dict[str, Any] = dict(
        {name: TWO_LEVELS[name] for name in names},
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CROSS_DIM,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    )
    net = _seeded(lambda: ControlNetModel(**{**config, **changes}), seed, dtype)
    zeros = [*net.controlnet_down_blocks, net.controlnet_mid_block]
    generator = torch.Generator().manual_seed(seed + 1)
    for conv in zeros:
        torch.nn.init.normal_(conv.weight, std=0.3, generator=generator)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=2.0, generator=generator)
    return net


def tiny_controlnet_pipeline(num_nets: int = 1, seed: int = 0) -> diffusers.StableDiffusionControlNetPipeline:
    nets = [tiny_controlnet(seed + i) for i in range(num_nets)]
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_clip(seed),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_unet(seed, **TWO_LEVELS),
        controlnet=nets[0] if num_nets == 1 else nets,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_image_encoder(seed: int = 0, dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
    """Pictures of 32 x 32 pixels in patches of 8."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2, num_attention_heads=1,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return _seeded(lambda: CLIPVisionModelWithProjection(config), seed, dtype)


def tiny_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def tiny_ip_adapter(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """The state dict of an IP-Adapter for `unet` and `tiny_image_encoder`: four tokens a picture, which each
    cross-attention looks at with a key and a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    image_dim, text_dim = 32, unet.config.cross_attention_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    projection = {"proj.weight": random(4 * text_dim, image_dim), "proj.bias": random(4 * text_dim),
                  "norm.weight": 1 + random(text_dim), "norm.bias": random(text_dim)}  # fmt: skip
    crossing = [part for name, part in unet.named_modules() if name.endswith("attn2")]
    keys = {f"{2 * i + 1}.to_{kind}_ip.weight": random(part.to_q.out_features, text_dim)
            for i, part in enumerate(crossing) for kind in "kv"}  # fmt: skip
    return {"image_proj": projection, "ip_adapter": keys}


def tiny_ip_pipeline(seed: int = 0, num_adapters: int = 1) -> StableDiffusionPipeline:
    pipe = _assemble(tiny_clip(seed), tiny_clip_tokenizer(), seed, torch.float32, tiny_unet(seed, **TWO_LEVELS))
    pipe.register_modules(image_encoder=tiny_image_encoder(seed), feature_extractor=tiny_image_processor())
    adapters = [tiny_ip_adapter(pipe.unet, seed + i) for i in range(num_adapters)]
    pipe.load_ip_adapter(adapters, subfolder=[""] * num_adapters, weight_name=[""] * num_adapters)
    return pipe


def tiny_lcm_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> diffusers.LatentConsistencyModelPipeline:
    """A latent consistency model: the guidance scale goes into the UNet as an embedding, so each picture is one row."""
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=tiny_vae(seed, dtype),
        text_encoder=tiny_clip(seed, dtype),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_unet(seed, dtype, **TWO_LEVELS, time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> diffusers.StableDiffusion3Pipeline:
    """SD3 in miniature, without its optional third text encoder: a transformer over patches of 2 x 2 latents."""
    transformer = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
            pos_embed_max_size=24,
        ),
        seed,
        dtype,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed, dtype, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_projecting_clip(seed, dtype),
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=_projecting_clip(seed + 1, dtype),
        tokenizer_2=tiny_clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _projecting_clip(seed: int, dtype: torch.dtype) -> CLIPTextModelWithProjection:
    return tiny_clip(seed, dtype, CLIPTextModelWithProjection, projection_dim=CROSS_DIM, hidden_act="gelu")


def _assemble(
    text_encoder: Any, tokenizer: Any, seed: int, dtype: torch.dtype, unet: UNet2DConditionModel | None = None
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(seed, dtype),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet or tiny_unet(seed, dtype),
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


def _euler() -> diffusers.EulerDiscreteScheduler:
    """The scheduler_config.json that SDXL ships."""
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _seeded(build: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        return model if dtype == torch.float32 else model.to(dtype)
