"""Download the emoji art and its names, render every picture once, and train the two tokenizers.

    python -m recipes.emoji.prepare [--tiny]

Writes under `recipes/data/emoji/`: `index.json` (concepts and sprites), `sprites.bin` (transparent WebP pictures, one after
another), `tokenizer/` (English, CLIP's byte-pair encoding) and `tokenizer_zh/` (Chinese, BERT's WordPiece).
The only downloads are ten npm packages, by name and version.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from recipes.emoji.names import COMMON, MEASURE, MEASURE_BY_SUBGROUP, STYLES

DATA = Path(__file__).resolve().parents[1] / "data"
SPRITE_SIZE = 160
PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "names": "cldr-annotations-full@48.2.0",
    "names-derived": "cldr-annotations-derived-full@48.2.0",
    "groups": "emojibase-data@17.0.0",
}
FACES, PEOPLE, SYMBOLS = 0, 1, (2, 8, 9)
TINY_NAMES = ("red apple", "cat", "automobile", "house", "girl", "woman's hat", "penguin", "star")


class Package:
    """One npm tarball, read in place."""

    def __init__(self, name: str) -> None:
        filename = name.removeprefix("@").replace("/", "-").rsplit("@", 1)
        self.path = DATA / "npm" / f"{filename[0]}-{filename[1]}.tgz"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            npm = shutil.which("npm")
            if npm is None:
                raise SystemExit("npm is needed to fetch the art; install Node.js")
            subprocess.run([npm, "pack", "--silent", name], cwd=self.path.parent, check=True)
        self.tar = tarfile.open(self.path)  # noqa: SIM115 - read from as long as the package is

    def bytes(self, name: str) -> bytes:
        file = self.tar.extractfile(f"package/{name}")
        assert file is not None
        return file.read()

    def json(self, name: str) -> Any:
        return json.loads(self.bytes(name))

    def names(self) -> set[str]:
        return {name.removeprefix("package/") for name in self.tar.getnames()}


def spoken_names(language: str) -> dict[str, str]:
    """Emoji (without variation selectors) -> its CLDR name."""
    names = {}
    for package, key in (("names", "annotations"), ("names-derived", "annotationsDerived")):
        table = Package(PACKAGES[package]).json(f"{key}/{language}/annotations.json")[key]["annotations"]
        for emoji, entry in table.items():
            if "tts" in entry:
                names[plain(emoji)] = entry["tts"][0].replace("’", "'")
    return names


def plain(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def is_drawable(entry: dict[str, Any], subgroup: str, english: str, chinese: str) -> bool:
    """Keep things with a plain name; leave out flags, symbols, clock faces and every variant by skin, sex or direction."""
    group, emoji = entry.get("group"), plain(entry["emoji"])
    if group is None or group in SYMBOLS or ":" in english or ":" in chinese or "：" in chinese:
        return False
    if "o'clock" in english or "-thirty" in english or subgroup in ("person-symbol", "hair-style"):
        return False
    return not (group == PEOPLE and "\u200d" in emoji and not emoji.startswith("\U0001f9d1\u200d"))


def read_concepts() -> list[dict[str, Any]]:
    """Every drawable thing: emoji, names in both languages (official first), subgroup, measure word, weight."""
    groups = Package(PACKAGES["groups"])
    subgroups = groups.json("meta/groups.json")["subgroups"]
    english, chinese = spoken_names("en"), spoken_names("zh")
    concepts = []
    for entry in groups.json("en/data.json"):
        emoji = plain(entry["emoji"])
        if emoji not in english or emoji not in chinese or "subgroup" not in entry:
            continue
        subgroup = subgroups[str(entry["subgroup"])]
        if is_drawable(entry, subgroup, english[emoji], chinese[emoji]):
            concepts.append(describe(entry, subgroup, english[emoji], chinese[emoji]))
    taken_en = {c["en"][0] for c in concepts}
    taken_zh = {c["zh"][0] for c in concepts}
    for c in concepts:
        c["en"] = c["en"][:1] + [n for n in c["en"][1:] if n not in taken_en]
        c["zh"] = c["zh"][:1] + [n for n in c["zh"][1:] if n not in taken_zh]
    return concepts


def describe(entry: dict[str, Any], subgroup: str, english: str, chinese: str) -> dict[str, Any]:
    more_en, more_zh = COMMON.get(english, ("", ""))
    return {
        "emoji": plain(entry["emoji"]),
        "hexcode": entry["hexcode"].lower(),
        "en": [english, *filter(None, more_en.split(","))],
        "zh": [chinese, *filter(None, more_zh.split(","))],
        "subgroup": subgroup,
        "measure": MEASURE.get(chinese, MEASURE_BY_SUBGROUP.get(subgroup, "个")),
        "weight": 2.0
        if english in COMMON
        else 0.6
        if entry["group"] == PEOPLE
        else 0.8
        if entry["group"] == FACES
        else 1.0,
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


def svg_pictures(style: str, concepts: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """(concept, SVG text) for each picture that an Iconify package has, found by code point or else by name."""
    package = Package(PACKAGES[style])
    table = package.json("icons.json")
    icons, aliases = table["icons"], table.get("aliases", {})
    chars = package.json("chars.json") if "chars.json" in package.names() else {}
    for index, concept in enumerate(concepts):
        code = concept["hexcode"]
        name = chars.get(code) or chars.get(code.replace("-fe0f", "")) or slug(concept["en"][0])
        if style == "fxemoji":
            name = slug(concept["en"][0]).replace("-", "")
        name = aliases.get(name, {}).get("parent", name)
        if name in icons:
            icon = icons[name]
            width, height = (icon.get(k, table.get(k, 16)) for k in ("width", "height"))
            left, top = icon.get("left", 0), icon.get("top", 0)
            yield (
                index,
                (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
                ),
            )


def pictures(style: str, concepts: list[dict[str, Any]]) -> Iterator[tuple[int, Image.Image]]:
    """(concept, RGBA picture) of one style."""
    if style == "fluent-3d":
        package = Package(PACKAGES[style])
        names = package.names()
        for index, concept in enumerate(concepts):
            for code in (concept["hexcode"], concept["hexcode"] + "-fe0f", concept["hexcode"].replace("-fe0f", "")):
                if f"assets/{code}.webp" in names:
                    yield index, Image.open(io.BytesIO(package.bytes(f"assets/{code}.webp"))).convert("RGBA")
                    break
        return
    import resvg_py

    for index, svg in svg_pictures(style, concepts):
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_SIZE)
        yield index, Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def fit(picture: Image.Image) -> Image.Image | None:
    """Crop to what is drawn and centre it on a transparent square of SPRITE_SIZE, so that every style has one scale."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = SPRITE_SIZE / max(picture.size)
    size = tuple(max(1, round(s * scale)) for s in picture.size)
    # premultiplied resampling: plain RGBA resampling would drag the colour of transparent pixels into the edges
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    square.paste(picture, ((SPRITE_SIZE - size[0]) // 2, (SPRITE_SIZE - size[1]) // 2))
    return square


def write_sprites(folder: Path, concepts: list[dict[str, Any]]) -> list[list[int]]:
    """Render all pictures into `sprites.bin`; returns rows (concept, style, offset, length)."""
    rows = []
    with open(folder / "sprites.bin", "wb") as file:
        for number, style in enumerate(STYLES):
            for index, picture in tqdm(pictures(style, concepts), desc=style, total=len(concepts)):
                sprite = fit(picture)
                if sprite is not None:
                    data = io.BytesIO()
                    sprite.save(data, "WEBP", quality=75, alpha_quality=60, method=4)
                    rows.append([index, number, file.tell(), file.write(data.getvalue())])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="eight things only, for a quick look")
    args = parser.parse_args()
    folder = DATA / ("emoji-tiny" if args.tiny else "emoji")
    folder.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts()
    if args.tiny:
        concepts = [c for c in concepts if c["en"][0] in TINY_NAMES]
    sprites = write_sprites(folder, concepts)
    index = {"styles": list(STYLES), "concepts": concepts, "sprites": sprites}
    (folder / "index.json").write_text(json.dumps(index, ensure_ascii=False))
    from recipes.emoji.captions import Captioner
    from recipes.emoji.tokenizers import train_tokenizers

    train_tokenizers(folder, Captioner(folder))
    print(f"{len(concepts)} things, {len(sprites)} pictures in {folder}")


if __name__ == "__main__":
    main()
