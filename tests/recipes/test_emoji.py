"""The recipe at toy size: language, scenes, and every training from end to end, without a download."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from recipes.emoji import export, train_classifier, train_lora, train_text2img, train_vae
from recipes.emoji.captions import Captioner, plural, with_article
from recipes.emoji.names import STYLES
from recipes.emoji.scenes import LOOKS, Atlas, make_scenes
from recipes.emoji.tokenizers import train_tokenizers

THINGS = [
    ("red apple", "红苹果", "个"),
    ("cat", "猫", "只"),
    ("girl", "女孩", "个"),
    ("woman's hat", "女帽", "顶"),
    ("grapes", "葡萄", "串"),
]
COLORS = ["red", "orange", "gold", "purple", "green"]


def sprite(color: str) -> bytes:
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).ellipse((10, 10, 150, 150), fill=color)
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=True)
    return data.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with five discs for things, each in two styles."""
    folder = tmp_path_factory.mktemp("data")
    concepts = [{"en": [en], "zh": [zh], "measure": m, "weight": 1.0, "subgroup": ""} for en, zh, m in THINGS]
    rows, blob = [], b""
    for style in range(2):
        for number, color in enumerate(COLORS):
            rows.append([number, style, len(blob), len(sprite(color))])
            blob += sprite(color)
    (folder / "sprites.bin").write_bytes(blob)
    (folder / "index.json").write_text(json.dumps({"styles": list(STYLES), "concepts": concepts, "sprites": rows}))
    train_tokenizers(folder, Captioner(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("apple", "an apple", "apples"),
        ("unicorn", "a unicorn", "unicorns"),
        ("mouse", "a mouse", "mice"),
        ("pot of food", "a pot of food", "pots of food"),
        ("person biking", "a person biking", "people biking"),
        ("butterfly", "a butterfly", "butterflies"),
        ("bus", "a bus", "buses"),
        ("hourglass", "an hourglass", "hourglasses"),
    ],
)
def test_english_of_one_and_many(name: str, one: str, many: str) -> None:
    assert with_article(name) == one
    assert plural(name) == many


def test_what_cannot_be_counted_has_no_article() -> None:
    assert with_article("grapes") == "grapes"
    assert with_article("bread") == "bread"


def test_captions_speak_both_languages(data: Path) -> None:
    scenes = Captioner(data, seed=1).batch(400, 128, 128)
    english, chinese = " ".join(scenes["en"]), " ".join(scenes["zh"])
    assert "two cats" in english
    assert "两只猫" in chinese
    assert "background" in english
    assert "背景" in chinese
    assert "a grapes" not in english
    assert any("hat" in text and "girl" in text for text in scenes["en"])


def test_the_same_seed_gives_the_same_scenes(data: Path) -> None:
    first, second = (Captioner(data, seed=3).batch(50, 96, 128) for _ in range(2))
    assert first["en"] == second["en"]
    assert (first["box"] == second["box"]).all()


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 128), (128, 192)])
def test_scenes_lie_inside_the_canvas(data: Path, height: int, width: int) -> None:
    scenes = Captioner(data, seed=2).batch(300, height, width)
    used = scenes["sprite"] >= 0
    x, y, size = (scenes["box"][..., k][used] for k in range(3))
    assert (size > 16).all()
    assert (x - size / 2 > -0.1 * width).all()
    assert (x + size / 2 < 1.1 * width).all()
    assert (y - size / 2 > -0.1 * height).all()
    assert (y + size / 2 < 1.1 * height).all()


def test_composed_pictures_show_sprite_and_background(data: Path) -> None:
    atlas = Atlas(data, torch.device("cpu"))
    sprite = torch.tensor([[0, -1, -1, -1]], dtype=torch.int16)
    box = torch.tensor([[[64.0, 64.0, 100.0]] + [[0.0, 0.0, 0.0]] * 3])
    image = atlas.compose(sprite, box, torch.tensor([[0, 0, 255]], dtype=torch.uint8), 128, 128)[0]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    torch.testing.assert_close(image[:, 64, 64], torch.tensor([1.0, -1.0, -1.0]), atol=0.05, rtol=0)
    for look in LOOKS.values():
        changed = look(image[None])
        assert changed.shape == image[None].shape
        assert changed.abs().max() <= 1


def test_tokens_are_those_of_the_tokenizers(data: Path) -> None:
    from transformers import BertTokenizer, CLIPTokenizer

    scenes = make_scenes((data, 5, 9, 128, 128, None))
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    english = CLIPTokenizer.from_pretrained(data / "tokenizer")(scenes["en"], **options)["input_ids"]
    assert scenes["en_ids"].tolist() == english
    chinese = BertTokenizer.from_pretrained(data / "tokenizer_zh")(scenes["zh"], **options)["input_ids"]
    assert scenes["zh_ids"][1:8].tolist() == chinese[1:8]


@pytest.mark.filterwarnings("ignore")  # of the libraries that are trained with
def test_the_whole_recipe_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--tiny", "--steps", "2", "--data", str(data), "--runs", str(tmp_path)]

    def run(main: object, *args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["recipe", *common, *args])
        main()  # type: ignore[operator]

    run(train_classifier.main)
    run(train_vae.main)
    run(train_text2img.main, "--name", "both")
    run(train_text2img.main, "--name", "emoji", "--languages", "en", "--init", "both")
    run(train_lora.main, "sketch")
    made = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors")}
    assert {"classifier.safetensors", "both.safetensors", "emoji.safetensors"} <= made
    assert {"loras/sketch.safetensors", "loras/kohya/watercolor.safetensors"} <= made
    assert (tmp_path / "vae-sheet.png").exists()
    assert (tmp_path / "emoji-en.png").exists()
    assert len(json.loads((tmp_path / "emoji.json").read_text())["rows"]) == 2


def test_the_model_index_names_the_encoder() -> None:
    assert export.model_index("zh")["text_encoder"] == ["transformers", "BertModel"]
    assert export.model_index("en")["text_encoder"] == ["transformers", "CLIPTextModel"]
