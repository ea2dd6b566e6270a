"""Measure whether the models draw what they are asked for.

    python -m recipes.emoji.quality [--model emoji emoji-zh emoji-zh-3d] [--count 200]

200 names are drawn with fixed seeds. A picture is right if the named thing is among its five nearest neighbours among all
sprites of the style, by the features of the classifier that the recipe trains. Writes benchmarks/models-quality.json and a
contact sheet for each model in docs/images/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.emoji.captions import Captioner, with_article
from recipes.emoji.names import STYLES
from recipes.emoji.networks import Classifier
from recipes.emoji.prepare import DATA
from recipes.emoji.scenes import Atlas
from recipes.emoji.train_classifier import load_classifier
from recipes.emoji.training import RUNS

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"emoji": 0.80, "emoji-zh": 0.70, "emoji-zh-3d": 0.70}
# model -> (language, style whose sprites are the neighbours, is the style named in the prompt)
TESTS = {"emoji": ("en", "noto", True), "emoji-zh": ("zh", "noto", True), "emoji-zh-3d": ("zh", "fluent-3d", False)}


def questions(captioner: Captioner, model: str, count: int) -> tuple[list[int], list[str]]:
    """The things to draw and their prompts: chosen once, by a fixed seed."""
    language, style, named = TESTS[model]
    able = [i for i, of in enumerate(captioner.of) if style in of]
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(2024)).tolist()
    things = [able[k] for k in order[:count]]
    _, words_en, words_zh = STYLES[style]
    prompts = []
    for thing in things:
        name = captioner.concepts[thing][language][0]
        prompt = with_article(name) if language == "en" else name
        prompts.append(prompt + ((f", {words_en[0]}" if language == "en" else f"，{words_zh[0]}") if named else ""))
    return things, prompts


def rank(classifier: Classifier, atlas: Atlas, style: str, images: Tensor, things: list[int]) -> list[int]:
    """For each image [N, 3, 128, 128] in [-1, 1]: how many things of this style are nearer to it than the one asked for."""
    device = atlas.concept.device
    rows = (atlas.style == atlas.styles.index(style)).nonzero().squeeze(1)
    sprite = torch.full((len(rows), 4), -1, dtype=torch.int16, device=device)
    sprite[:, 0] = rows.to(torch.int16)
    box = torch.tensor([64.0, 64.0, 104.0], device=device).expand(len(rows), 4, 3)
    white = torch.full((len(rows), 3), 255, dtype=torch.uint8, device=device)
    with torch.no_grad():
        known = torch.cat(
            [
                classifier.features(atlas.compose(s, b, w, 128, 128))
                for s, b, w in zip(sprite.split(256), box.split(256), white.split(256), strict=True)
            ]
        )
        near = classifier.features(images.to(device)) @ known.T
    own = torch.stack([(atlas.concept[rows] == t).nonzero()[0, 0] for t in things])
    return [int(n) for n in (near > near.gather(1, own[:, None])).sum(1)]


def report(ranks: list[int], model: str, settings: dict[str, Any]) -> dict[str, Any]:
    among = {f"top{k}": round(sum(r < k for r in ranks) / len(ranks), 4) for k in (1, 5)}
    return {
        "model": model,
        "names": len(ranks),
        **among,
        "goal_top5": GOALS[model],
        "style": TESTS[model][1],
        **settings,
    }


def contact_sheet(images: Tensor, ranks: list[int], path: Path, columns: int = 20, side: int = 96) -> None:
    """All pictures; a red frame where the thing asked for is not among the five nearest."""
    from PIL import Image

    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    cell = side + 6
    page = Image.new("RGB", (columns * cell, math.ceil(len(pixels) / columns) * cell), (240, 240, 240))
    for n, (picture, r) in enumerate(zip(pixels, ranks, strict=True)):
        x, y = n % columns * cell, n // columns * cell
        page.paste((240, 240, 240) if r < 5 else (220, 60, 60), (x, y, x + cell, y + cell))
        page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x + 3, y + 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=88)


def draw(model: str, prompts: list[str], device: torch.device, batch: int = 20) -> tuple[Tensor, dict[str, Any]]:
    """Draw with the shipped model and its own defaults."""
    from allaprima.models import EMBEDDED, load_embedded

    about = EMBEDDED[model]
    pipe = load_embedded(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        drawn = pipe(
            part,
            height=128,
            width=128,
            num_inference_steps=about.steps,
            guidance_scale=about.guidance_scale,
            generator=generators,
            output_type="pt",
        )
        images.append(drawn.images.float().cpu() * 2 - 1)
        print(f"{model}: {start + len(part)} of {len(prompts)}", flush=True)
    return torch.cat(images), {
        "steps": about.steps,
        "guidance_scale": about.guidance_scale,
        "scheduler": about.scheduler,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--data", type=Path, default=DATA / "emoji")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "models-quality.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the contact sheets")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner, atlas = Captioner(args.data), Atlas(args.data, device)
    classifier = load_classifier(args.runs / "classifier.safetensors", device)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for model in args.model:
        things, prompts = questions(captioner, model, args.count)
        images, settings = draw(model, prompts, device)
        ranks = rank(classifier, atlas, TESTS[model][1], images, things)
        results[model] = report(ranks, model, settings)
        contact_sheet(images, ranks, args.images / f"models-{model}.jpg")
        print(json.dumps(results[model]))
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
