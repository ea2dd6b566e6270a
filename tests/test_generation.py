"""Pictures for the command line: sizes, seeds, batches, tasks, files and what goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from allaprima import generation
from allaprima.errors import InputError, NumericsError, OutOfMemoryError, SizeError
from allaprima.generation import Picture, Request, Settings, check_size, draw, parse_size, save, settle
from allaprima.infotext import Infotext, read_png
from allaprima.schedulers import set_scheduler
from tests import stand_ins

FAST = Request(("a red apple",), steps=2, size=(64, 64), seed=5)


@pytest.fixture
def pipelines(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> stand_ins.Pipelines:
    module = stand_ins.Pipelines(tiny_pipe)
    stand_ins.install(monkeypatch, module)
    return module


def pictures(pipelines: stand_ins.Pipelines, request: Request, **options: Any) -> list[Picture]:
    settings = settle(request, pipelines.pipe, "tiny")
    return list(draw(pipelines.pipe, request, settings, **options))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


# ---- what may be asked


@given(st.integers(8, 256).map(lambda n: 8 * n), st.integers(8, 256).map(lambda n: 8 * n))
def test_every_multiple_of_8_from_64_to_2048_is_a_size(width: int, height: int) -> None:
    assert parse_size(f"{width}x{height}") == (width, height)


@given(st.integers(-10, 5000), st.integers(-10, 5000))
def test_every_other_size_names_the_nearest_that_can_be_drawn(width: int, height: int) -> None:
    if all(n % 8 == 0 and 64 <= n <= 2048 for n in (width, height)):
        return
    with pytest.raises(SizeError) as caught:
        check_size(width, height)
    near = str(caught.value).rpartition(" ")[2].rstrip(".")
    assert parse_size(near)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("250x192", "248x192"),
        ("100x100", "96x96"),
        ("32x64", "64x64"),
        ("4096x64", "2048x64"),
        ("big", "256x192"),
        ("x", "WIDTH"),
    ],
)
def test_a_wrong_size_is_explained(text: str, said: str) -> None:
    with pytest.raises(SizeError, match=said):
        parse_size(text)


def test_a_square_can_be_given_by_one_number() -> None:
    assert parse_size("128") == (128, 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": ()}, "No prompt"),
        ({"prompts": (3,)}, "not int"),
        ({"prompts": ("bad \udcff",)}, "UTF-8"),
        ({"steps": 0}, "steps is 0"),
        ({"count": 0}, "count is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -2}, "seed is -2"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"clip_skip": 0}, "clip_skip is 0"),
        ({"mask": Path("mask.png")}, "--init-image"),
    ],
)
def test_a_wrong_request_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(FAST, **change)


# ---- what is decided


def test_the_model_decides_what_the_request_leaves_open(tiny_pipe: Any) -> None:
    settings = settle(Request(("a",)), tiny_pipe, "models/my sd.safetensors")
    assert (settings.width, settings.height) == (128, 128)
    assert (settings.steps, settings.guidance_scale) == (generation.STEPS, generation.GUIDANCE_SCALE)
    assert settings.model == "my sd"
    assert 0 <= settings.seed < 2**32


def test_an_init_image_decides_the_size(tiny_pipe: Any, tmp_path: Path) -> None:
    Image.new("RGB", (100, 77)).save(tmp_path / "a.png")
    settings = settle(Request(("a",), init_image=tmp_path / "a.png"), tiny_pipe, "tiny")
    assert (settings.width, settings.height) == (96, 80)


def test_a_large_init_image_asks_for_a_size(tiny_pipe: Any, tmp_path: Path) -> None:
    Image.new("L", (3000, 100)).save(tmp_path / "a.png")
    with pytest.raises(SizeError, match="--size"):
        settle(Request(("a",), init_image=tmp_path / "a.png"), tiny_pipe, "tiny")


@pytest.mark.parametrize(
    "name", ["PNDM", "DDIM", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE Karras", "UniPC"]
)
def test_a_scheduler_has_a1111s_name(tiny_pipe: Any, name: str) -> None:
    set_scheduler(tiny_pipe, name)
    assert generation.sampler_name(tiny_pipe.scheduler) == name


def test_clip_skip_takes_another_layer_without_the_optimizer_too(pipelines: stand_ins.Pipelines) -> None:
    skipped = pictures(pipelines, dataclasses.replace(FAST, clip_skip=2), optimized=False)
    assert difference(skipped[0].image, pictures(pipelines, FAST, optimized=False)[0].image) > 0


def test_the_loras_of_tags_and_options_are_one_list() -> None:
    tagged = dataclasses.replace(FAST, prompts=("a <lora:pen:0.5> cat<lora:水墨:0.2:1>",), adapters=(("pen", 0.25),))
    assert tagged.loras == (("pen", 0.75, 0.75), ("水墨", 0.2, 1.0))
    assert tagged.adapters == (("pen", 0.25),)


def test_the_prompts_of_a_request_share_their_loras() -> None:
    same = ("<lora:a:1><lora:b:1> cat", "dog <lora:b:1><lora:a:1>")
    assert len(dataclasses.replace(FAST, prompts=same).loras) == 2
    with pytest.raises(InputError, match="different LoRA tags"):
        dataclasses.replace(FAST, prompts=("<lora:a:1> cat", "dog"))
    with pytest.raises(InputError, match="'strong'"):
        dataclasses.replace(FAST, prompts=("<lora:a:strong> cat",))


# ---- drawing


def test_each_image_of_a_batch_can_be_drawn_alone_with_its_seed(pipelines: stand_ins.Pipelines) -> None:
    asked = dataclasses.replace(FAST, prompts=("a red apple", "a cat"), count=2, batch=3)
    drawn = pictures(pipelines, asked)
    assert [picture.seed for picture in drawn] == [5, 6, 7, 8]
    assert [picture.info.prompt for picture in drawn] == ["a red apple"] * 2 + ["a cat"] * 2
    assert difference(drawn[0].image, drawn[1].image) > 8
    for picture in drawn:
        alone = dataclasses.replace(FAST, prompts=(picture.info.prompt,), seed=picture.info.seed)
        # Batches differ in the last bit of float32, which may turn one rounding to 8 bits.
        assert difference(pictures(pipelines, alone)[0].image, picture.image) <= 1


def test_negative_prompt_and_guidance_reach_the_pipeline(pipelines: stand_ins.Pipelines) -> None:
    plain = pictures(pipelines, FAST)[0].image
    for change in ({"negative_prompt": "blurry"}, {"guidance_scale": 1.0}):
        assert difference(pictures(pipelines, dataclasses.replace(FAST, **change))[0].image, plain) > 0


@pytest.mark.parametrize("mask", [False, True])
def test_pictures_start_from_a_picture(pipelines: stand_ins.Pipelines, tmp_path: Path, mask: bool) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "init.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    asked = dataclasses.replace(
        FAST,
        steps=4,
        strength=0.5,
        count=2,
        init_image=tmp_path / "init.png",
        mask=tmp_path / "mask.png" if mask else None,
    )
    drawn = pictures(pipelines, asked)
    assert [picture.image.size for picture in drawn] == [(64, 64)] * 2
    assert drawn[0].info.settings["Denoising strength"] == "0.5"


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_an_init_image_that_is_none_is_refused(tiny_pipe: Any, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        settle(dataclasses.replace(FAST, init_image=path, size=None), tiny_pipe, "tiny")


def test_a_strength_without_a_step_is_refused(pipelines: stand_ins.Pipelines, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="strength"):
        pictures(pipelines, dataclasses.replace(FAST, init_image=tmp_path / "a.png", strength=0.1))


def test_progress_counts_images(pipelines: stand_ins.Pipelines) -> None:
    told: list[float] = []
    pictures(
        pipelines, dataclasses.replace(FAST, count=3, batch=2), on_step=lambda start, done: told.append(start + done)
    )
    assert told == sorted(told)
    assert told[-1] == 3


# ---- what goes wrong


def test_bad_numbers_are_drawn_again_without_the_optimizer(pipelines: stand_ins.Pipelines) -> None:
    pipelines.bad_calls, pipelines.optimized = 1, True
    drawn = pictures(pipelines, dataclasses.replace(FAST, count=2, batch=1))
    assert "without the optimizer" in drawn[0].notes[0]
    assert not drawn[1].notes
    assert pipelines.asked == [("eager",)]


def test_bad_numbers_are_never_a_black_image(pipelines: stand_ins.Pipelines) -> None:
    with torch.no_grad():
        pipelines.pipe.vae.decoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="float32"):
        pictures(pipelines, FAST, optimized=False)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError()]
)
def test_memory_that_runs_out_says_what_to_do(pipelines: stand_ins.Pipelines, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    pipelines.pipe.unet.forward = fail
    with pytest.raises(OutOfMemoryError, match="--batch 1"):
        pictures(pipelines, FAST)


def test_other_errors_keep_their_type(pipelines: stand_ins.Pipelines) -> None:
    pipelines.pipe.unet.forward = None
    with pytest.raises(TypeError):
        pictures(pipelines, FAST)


def plain_diffusers(pipe: Any, request: Request, prompts: list[str]) -> list[np.ndarray]:
    """What the pipeline draws without anything of ours."""
    settings = settle(request, pipe, "tiny")
    images = pipe(
        prompts,
        negative_prompt=[request.negative_prompt] * len(prompts),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        width=settings.width,
        height=settings.height,
        generator=[torch.Generator("cpu").manual_seed(settings.seed + i) for i in range(len(prompts))],
    ).images
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("prompts", [("a red apple",), ("一个（苹果", "a: b, {c} 16：9", "")])
def test_prompts_without_syntax_draw_what_diffusers_draws_to_the_bit(
    pipelines: stand_ins.Pipelines, prompts: tuple[str, ...]
) -> None:
    asked = dataclasses.replace(FAST, prompts=prompts, negative_prompt="blurry")
    drawn = [np.asarray(picture.image) for picture in pictures(pipelines, asked)]
    expected = plain_diffusers(pipelines.pipe, asked, list(prompts))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_prompts_are_read_in_a1111s_syntax(pipelines: stand_ins.Pipelines) -> None:
    asked = dataclasses.replace(
        FAST, prompts=("cat", "(cat:1.5)", "[cat:a green house on a hill:1]", "cat AND dog", "cat :0.5")
    )
    drawn = pictures(pipelines, asked)
    cats = plain_diffusers(pipelines.pipe, asked, ["cat"] * 5)
    differences = [difference(picture.image, Image.fromarray(cat)) for picture, cat in zip(drawn, cats, strict=True)]
    assert differences[0] <= 1 < min(differences[1:])
    assert [picture.info.prompt for picture in drawn] == list(asked.prompts)
    alone = pictures(pipelines, dataclasses.replace(asked, prompts=asked.prompts[3:4], seed=8))
    assert difference(drawn[3].image, alone[0].image) <= 1


def test_a_prompt_longer_than_a_chunk_is_read_to_its_end(pipelines: stand_ins.Pipelines) -> None:
    """Beside a short one, whose picture stays what it is alone."""
    ends = ("a" * 80 + "b", "a" * 80 + "c")
    asked = dataclasses.replace(FAST, prompts=("a", *ends))
    drawn = pictures(pipelines, asked)
    one = pictures(pipelines, dataclasses.replace(asked, prompts=ends[:1], seed=7))[0].image
    assert difference(drawn[2].image, one) > 0
    assert difference(drawn[0].image, pictures(pipelines, dataclasses.replace(asked, prompts=("a",)))[0].image) <= 1


def test_what_is_read_otherwise_than_expected_is_told(pipelines: stand_ins.Pipelines) -> None:
    drawn = pictures(pipelines, dataclasses.replace(FAST, prompts=("a <hypernet:b:1> cat", "in 16:9", "in 16 : 1")))
    assert [len(picture.notes) for picture in drawn] == [1, 1, 0]
    assert "<hypernet:b:1>" in drawn[0].notes[0]
    assert "9" in drawn[1].notes[0]


def test_characters_that_the_model_does_not_know_are_told(tiny_bert_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_ins.Pipelines(tiny_bert_pipe)
    stand_ins.install(monkeypatch, module)
    drawn = pictures(module, dataclasses.replace(FAST, prompts=("（红色的苹果）", "[红色的龙:苹果:0.5]")))
    assert [picture.notes for picture in drawn] == [(), ("the model does not know 龙",)]


# ---- files


def picture(seed: int = 9) -> Picture:
    return Picture(
        Image.new("RGB", (8, 8)), seed, 0.1, Infotext("a", "", {"Steps": "1", "Seed": str(seed), "Size": "8x8"})
    )


def test_files_of_a_folder_count_up(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert [save(picture(seed), folder).name for seed in (9, 9, 10)] == ["00001-9.png", "00002-9.png", "00003-10.png"]
    (folder / "00001-9.png").unlink()
    assert save(picture(), folder).name == "00004-9.png"


def test_one_file_can_be_named(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "deep" / "a.PNG")
    info = read_png(path)
    assert path.name == "a.PNG"
    assert info
    assert info.seed == 9


@pytest.mark.parametrize(("name", "count"), [("a.png", 2), ("a.jpg", 1)])
def test_an_output_that_cannot_hold_the_pictures_is_refused(tmp_path: Path, name: str, count: int) -> None:
    with pytest.raises(InputError, match="folder"):
        generation.check_output(tmp_path / name, count)


def test_the_infotext_draws_it_again() -> None:
    settings = Settings("emoji", 256, 192, 20, 7.0, "DPM++ 2M Karras", 7)
    asked = Request(("一个红苹果",), "模糊", clip_skip=2)
    assert generation.infotext(asked, settings, "一个红苹果", 8).format().splitlines()[-1] == (
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 8, Size: 256x192, "
        f"Model: emoji, Clip skip: 2, RNG: CPU, Version: allaprima {generation.__version__}"
    )
