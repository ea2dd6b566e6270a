"""Write the trained models into the package, in diffusers' folder layout and half precision.

    python -m recipes.emoji.export [--draft both] [--to src/allaprima/models]

What several checkpoints use is written once, under `shared/`; `components.json` says where each part lies.
`--draft RUN` takes every UNet from one run, to have something to look at before the last trainings are done.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recipes.emoji.diffusion import SCHEDULER
from recipes.emoji.networks import load_tokenizer, make_text_encoder, make_unet
from recipes.emoji.prepare import DATA
from recipes.emoji.training import RUNS

CHECKPOINTS = {"emoji": "en", "emoji-zh": "zh", "emoji-zh-3d": "zh"}
PACKAGE = Path(__file__).resolve().parents[2] / "src" / "allaprima" / "models"


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}


def save_text_encoder(language: str, weights: dict[str, torch.Tensor], data: Path, folder: Path) -> None:
    model = make_text_encoder(language, load_tokenizer(language, data))
    model.load_state_dict(part(weights, f"text.{language}."))
    model.half().save_pretrained(folder)
    if language == "en":
        # the key names that Stable Diffusion's checkpoints have; new versions of transformers drop the prefix
        file = folder / "model.safetensors"
        state = {k if k.startswith("text_model.") else f"text_model.{k}": v.clone() for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})


def forget_path(file: Path) -> None:
    """Drop the folder that diffusers loaded from and notes in the configuration."""
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


def model_index(language: str) -> dict[str, Any]:
    text = ["transformers", "BertModel" if language == "zh" else "CLIPTextModel"]
    tokenizer = ["transformers", "BertTokenizer" if language == "zh" else "CLIPTokenizer"]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": text,
        "tokenizer": tokenizer,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def export(name: str, language: str, run: Path, data: Path, to: Path) -> dict[str, str]:
    """Write one checkpoint; returns where its parts lie."""
    from diffusers import DDIMScheduler

    weights = load_file(run)
    unet = make_unet()
    unet.load_state_dict(part(weights, "unet."))
    unet.half().save_pretrained(to / name / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(to / name / "scheduler")
    (to / name / "model_index.json").write_text(json.dumps(model_index(language), indent=2))
    shared = {"text_encoder": "shared/text_encoder_zh", "tokenizer": "shared/tokenizer_zh"}
    own = {"text_encoder": f"{name}/text_encoder", "tokenizer": f"{name}/tokenizer"}
    places = shared if language == "zh" else own
    if name != "emoji-zh-3d":
        save_text_encoder(language, weights, data, to / places["text_encoder"])
        load_tokenizer(language, data).save_pretrained(to / places["tokenizer"])
    return {"vae": "shared/vae", "unet": f"{name}/unet", "scheduler": f"{name}/scheduler", **places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", help="one run to take all UNets from")
    parser.add_argument("--data", type=Path, default=DATA / "emoji")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--to", type=Path, default=PACKAGE)
    args = parser.parse_args()
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(args.runs / "vae", torch_dtype=torch.float16).save_pretrained(
        args.to / "shared" / "vae"
    )
    forget_path(args.to / "shared" / "vae" / "config.json")
    components = {}
    for name, language in CHECKPOINTS.items():
        components[name] = export(name, language, args.runs / f"{args.draft or name}.safetensors", args.data, args.to)
    (args.to / "components.json").write_text(json.dumps(components, indent=2))
    concepts = json.loads((args.data / "index.json").read_text())["concepts"]
    names = {language: [c[language][0] for c in concepts] for language in ("en", "zh")}
    (args.to / "vocabulary.json").write_text(json.dumps(names, ensure_ascii=False, indent=0))
    for file in (args.runs / "loras").rglob("*.safetensors"):
        target = args.to / "loras" / file.relative_to(args.runs / "loras")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    sizes = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    print(f"{sizes / 1e6:.1f} MB in {args.to}")


if __name__ == "__main__":
    main()
