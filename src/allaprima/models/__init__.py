"""The small trained models that come with the package: three checkpoints, three LoRAs, and what they can draw.

Stable Diffusion's architecture, only smaller, in diffusers' folder layout. Parts that several checkpoints use are
stored once, under `shared/`; `components.json` says which folder each part comes from. Importing this module loads
neither torch nor diffusers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

__all__ = ["EMBEDDED", "LORAS", "EmbeddedLora", "EmbeddedModel", "component_paths", "load_embedded", "vocabulary"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class EmbeddedModel:
    """A checkpoint that comes with the package.

    language         of its prompts: "en" or "zh"
    example_prompts  that it draws well
    native_size      height and width in pixels that it was trained at most
    steps, guidance_scale, scheduler   what its pictures look best with
    """

    name: str
    title: str
    language: str
    description: str
    example_prompts: tuple[str, ...]
    native_size: tuple[int, int] = (128, 128)
    steps: int = 30
    guidance_scale: float = 4.0
    scheduler: str = "DDIMScheduler"


@dataclass(frozen=True)
class EmbeddedLora:
    """A LoRA that comes with the package, as diffusers writes it (`path`) and as kohya's tools do (`kohya_path`)."""

    name: str
    path: Path
    kohya_path: Path
    description: str
    targets: str
    model: str = "emoji"


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            "emoji",
            "Emoji",
            "en",
            "About 1,180 things in seven drawing styles, from English prompts.",
            (
                "a red apple",
                "a car",
                "a girl with a hat",
                "two strawberries",
                "a sunflower, sky blue background",
                "a castle, navy background",
                "a lion, 3D render",
                "three penguins, 3D render, pink background",
                "a house to the left of a guitar, cartoon sticker, yellow background",
            ),
        ),
        EmbeddedModel(
            "emoji-zh",
            "Emoji, Chinese",
            "zh",
            "The same things and styles from Chinese prompts, through a BERT text encoder.",
            (
                "一个红苹果",
                "一辆汽车",
                "1个女孩",
                "两个草莓",
                "向日葵，天蓝色背景",
                "城堡，深蓝色背景",
                "狮子，三维渲染",
                "三只企鹅，三维渲染，粉色背景",
                "房子在吉他的左边，卡通贴纸，黄色背景",
            ),
        ),
        EmbeddedModel(
            "emoji-zh-3d",
            "Emoji, Chinese, 3D",
            "zh",
            "emoji-zh fine-tuned to draw everything as a 3D render; shares its text encoder.",
            ("一个红苹果", "一只企鹅，粉色背景", "1个女孩", "火箭", "两个草莓", "狮子", "房子在吉他的左边，黄色背景"),
        ),
    )
}

LORA_FOLDER = FOLDER / "loras"
LORAS: dict[str, EmbeddedLora] = {
    name: EmbeddedLora(name, LORA_FOLDER / f"{name}.safetensors", LORA_FOLDER / f"kohya/{name}.safetensors", *text)
    for name, text in {
        "watercolor": ("Pale colours on warm paper.", "attention of the UNet"),
        "sketch": (
            "Ink lines and a light wash on paper.",
            "attention and convolutions of the UNet, attention of the text encoder",
        ),
        "neon": ("Glowing outlines on a night sky.", "attention and feed-forward of the UNet"),
    }.items()
}


def component_paths(name: str) -> dict[str, Path]:
    """Where each part of a checkpoint lies: component name ("unet", "vae", …) -> folder.  raises KeyError."""
    components: dict[str, dict[str, str]] = json.loads((FOLDER / "components.json").read_text())
    return {part: FOLDER / folder for part, folder in components[name].items()}


def vocabulary(name: str) -> list[str]:
    """The things that a checkpoint can draw, in its language, the official name of each."""
    names: dict[str, list[str]] = json.loads((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))
    return names[EMBEDDED[name].language]


def load_embedded(name: str, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """Load a checkpoint as diffusers' own pipeline, in eval mode, quietly.

    dtype    of the weights in memory (default float32; the files hold float16)
    raises   KeyError if there is no such checkpoint
    """
    import torch

    paths, dtype = component_paths(name), dtype or torch.float32
    with _quiet():
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

        text_encoder, tokenizer = _text_parts(EMBEDDED[name].language, paths, dtype)
        parts: dict[str, Any] = {
            "vae": AutoencoderKL.from_pretrained(paths["vae"], torch_dtype=dtype, local_files_only=True),
            "unet": UNet2DConditionModel.from_pretrained(paths["unet"], torch_dtype=dtype, local_files_only=True),
            "text_encoder": text_encoder,
        }
        for part in parts.values():
            part.eval()
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=_scheduler(EMBEDDED[name].scheduler, paths["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    return pipe


def _text_parts(language: str, paths: dict[str, Path], dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    encoder = transformers.BertModel if language == "zh" else transformers.CLIPTextModel
    tokenizer = transformers.BertTokenizer if language == "zh" else transformers.CLIPTokenizer
    return (
        encoder.from_pretrained(paths["text_encoder"], dtype=dtype, local_files_only=True),
        tokenizer.from_pretrained(paths["tokenizer"], local_files_only=True),
    )


def _scheduler(name: str, path: Path) -> Any:
    import diffusers

    return getattr(diffusers, name).from_pretrained(path, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and notices of both libraries, and put them back as they were."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    levels = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    bars = transformers_log.is_progress_bar_enabled()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_log.set_verbosity(levels[0])
        transformers_log.set_verbosity(levels[1])
        if bars:
            transformers_log.enable_progress_bar()
