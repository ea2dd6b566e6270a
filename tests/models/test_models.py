"""The embedded models: complete, small, quiet, and drawing what they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from allaprima.models import EMBEDDED, FOLDER, LORAS, component_paths, load_embedded, vocabulary


def weights() -> list[Path]:
    return sorted(FOLDER.rglob("*.safetensors"))


def test_importing_the_list_loads_no_torch() -> None:
    code = "import sys, allaprima.models; sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_fits_its_budget() -> None:
    """The models' own; CLIP's vocabulary, which other people's checkpoints need, is beside them."""
    files = [file for file in FOLDER.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    sizes = [file.stat().st_size for file in files if (FOLDER / "clip") not in file.parents]
    assert sum(sizes) <= 40e6
    assert max(sizes) <= 16 * 2**20


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_part_is_there(name: str) -> None:
    paths = component_paths(name)
    assert set(paths) == {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}
    assert all(any(path.iterdir()) for path in paths.values())


def test_the_unets_share_one_configuration_and_no_weights() -> None:
    folders = [component_paths(name)["unet"] for name in EMBEDDED]
    assert len({(folder / "config.json").read_text() for folder in folders}) == 1
    assert len({(folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders}) == len(EMBEDDED)


def test_weights_are_half_precision_and_finite() -> None:
    from safetensors.torch import load_file

    for file in weights():
        for name, value in load_file(file).items():
            assert value.dtype == torch.float16 or name.endswith(".alpha"), (file, name)
            assert torch.isfinite(value).all(), (file, name)


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        component_paths("emoij")
    with pytest.raises(KeyError):
        load_embedded("emoij")


@pytest.mark.parametrize("name", EMBEDDED)
def test_vocabulary_is_in_the_language_of_the_model(name: str) -> None:
    words = vocabulary(name)
    assert len(words) > 1000
    assert ("cat" in words) == (EMBEDDED[name].language == "en")
    assert ("猫" in words) == (EMBEDDED[name].language == "zh")


@pytest.mark.parametrize("name", EMBEDDED)
def test_loading_is_quiet_and_ready_to_draw(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = load_embedded(name, torch.bfloat16)
    assert capfd.readouterr() == ("", "")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    encoder = "BertModel" if EMBEDDED[name].language == "zh" else "CLIPTextModel"
    assert type(pipe.text_encoder).__name__ == encoder
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def draw(pipe: object, prompt: str, size: int = 64, steps: int = 2) -> np.ndarray:
    """[H, W, 3] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    return pipe(  # type: ignore[operator]
        prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prompt"), [("emoji", "a sunflower, blue background"), ("emoji-zh", "向日葵，蓝色背景")]
)
def test_a_named_background_has_its_color(name: str, prompt: str) -> None:
    image = draw(load_embedded(name), prompt, size=128, steps=8)
    red, green, blue = image[:6].mean((0, 1))
    assert blue > red + 0.2
    assert blue > green + 0.1
    assert np.abs(image[40:80, 40:80].mean((0, 1)) - image[:6].mean((0, 1))).max() > 0.2


@pytest.mark.filterwarnings("ignore")  # of peft and diffusers, when a LoRA has no part for the text encoder
@pytest.mark.parametrize("name", LORAS)
def test_both_formats_of_a_lora_give_one_picture(name: str) -> None:
    pipe = load_embedded("emoji")
    base = draw(pipe, "a car")
    pictures = []
    for path in (LORAS[name].path, LORAS[name].kohya_path):
        pipe.load_lora_weights(str(path), adapter_name=name)
        pictures.append(draw(pipe, "a car"))
        pipe.unload_lora_weights()
    assert np.abs(pictures[0] - base).mean() > 0.01
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-5)
    np.testing.assert_array_equal(draw(pipe, "a car"), base)


def test_loras_reach_the_parts_they_name() -> None:
    from safetensors import safe_open

    def layers(name: str) -> list[str]:
        with safe_open(LORAS[name].path, "pt") as file:
            return list(file.keys())

    assert all(key.startswith("unet.") and ".attn" in key for key in layers("watercolor"))
    assert any(key.startswith("text_encoder.") for key in layers("sketch"))
    assert any(".conv1." in key for key in layers("sketch"))
    assert any(".ff." in key for key in layers("neon"))
