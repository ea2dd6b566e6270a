"""Another checkpoint in a living pipeline: the numbers of a fresh load, nothing captured, and nothing changed by a
file that does not fit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import allaprima as ap
from allaprima.errors import CheckpointError, ConfigError, UnknownModelError
from allaprima.pipelines import as_task, eager, engines
from allaprima.pipelines import state as of
from allaprima.weights import pool as pools
from allaprima.weights import writing
from allaprima.weights.pool import Pool
from tests.ldm import save_ldm
from tests.tiny import (
    tiny_alt_pipeline,
    tiny_controlnet_pipeline,
    tiny_pipeline,
    tiny_sd3_pipeline,
    tiny_unet,
    tiny_xl_pipeline,
)

PARTS = ("unet", "vae", "text_encoder")


def saved(where: Path, seed: int = 0, **changes: Any) -> Path:
    pipe = tiny_pipeline(seed)
    for name, part in changes.items():
        setattr(pipe, name, part)
    pipe.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one architecture, one as a single file, and one whose UNet is wider."""
    home = tmp_path_factory.mktemp("checkpoints")
    saved(home / "one", 0)
    saved(home / "two", 1)
    save_ldm(tiny_pipeline(2), home / "three.safetensors")
    saved(home / "wide", 3, unet=tiny_unet(3, block_out_channels=(64, 64, 64)))
    return home


def state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name in PARTS
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def assert_holds(pipe: Any, expected: dict[str, torch.Tensor]) -> None:
    found = state(pipe)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def addresses(pipe: Any) -> list[int]:
    return [p.data_ptr() for name in PARTS for p in getattr(pipe, name).parameters()]


def draw(pipe: Any, prompt: str = "a", **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2} | options
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **settings).images[0])


# ---- plain pipelines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_switch_is_a_fresh_load_in_the_same_memory(home: Path, dtype: str) -> None:
    pipe = ap.load(home / "one", dtype=dtype, device="cpu")
    before, places, config = state(pipe), addresses(pipe), home / "one"
    for source in ("two", "three.safetensors", "one"):
        expected = ap.load(home / source, dtype=dtype, device="cpu", config=config if "." in source else None)
        assert switched(pipe, home / source, config) is pipe
        assert_holds(pipe, state(expected))
        assert addresses(pipe) == places
    assert_holds(pipe, before)


def switched(pipe: Any, source: Path, config: Path) -> Any:
    """The miniatures' single files are of no family that is known: their configuration comes from a folder."""
    if source.suffix != ".safetensors":
        return ap.switch(pipe, source)
    from allaprima.weights import checkpoints

    whole = checkpoints.of_single_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoints, "of_single_file", lambda path, **options: whole(path, **options | {"config": config})
        )
        return ap.switch(pipe, source)


def test_back_and_forth_twenty_times(home: Path) -> None:
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    one, places = state(pipe), addresses(pipe)
    two = state(ap.switch(pipe, home / "two"))
    assert not torch.equal(one["unet.conv_in.weight"], two["unet.conv_in.weight"])
    for _ in range(9):
        ap.switch(pipe, home / "one")
        ap.switch(pipe, home / "two")
    assert_holds(ap.switch(pipe, home / "one"), one)
    assert_holds(ap.switch(pipe, home / "two"), two)
    assert addresses(pipe) == places


def test_signs_of_zeros_are_numbers_too() -> None:
    living = torch.zeros(4)
    assert writing.copy([(living, torch.tensor([0.0, -0.0, 0.0, -0.0]))]) == 1
    assert torch.signbit(living).tolist() == [False, True, False, True]
    assert writing.copy([(living, living.clone())]) == 0


def test_scheduler_and_tokenizer_follow(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "two", tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    scheduler, tokenizer = pipe.scheduler, pipe.tokenizer
    ap.switch(pipe, home / "two")
    assert pipe.scheduler is scheduler
    assert pipe.tokenizer is tokenizer
    ap.switch(pipe, tmp_path / "v")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer is tokenizer
    settings = tmp_path / "v" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("77", "40"))
    ap.switch(pipe, tmp_path / "v")
    assert pipe.tokenizer.model_max_length == 40


def test_what_does_not_change_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    copy = writing.copy
    monkeypatch.setattr(writing, "copy", lambda pairs: moved.append(len(pairs)) or copy(pairs))
    pipe = ap.load("emoji-zh", dtype="float32", device="cpu")
    versions = [p._version for name in ("vae", "text_encoder") for p in getattr(pipe, name).parameters()]
    ap.switch(pipe, "emoji-zh-3d")
    assert moved == [len(pipe.unet.state_dict())]
    assert versions == [p._version for name in ("vae", "text_encoder") for p in getattr(pipe, name).parameters()]
    ap.switch(pipe, "emoji-zh-3d")
    assert len(moved) == 1
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(2)  # it holds what is in the file no more
    ap.switch(pipe, "emoji-zh-3d")
    assert_holds(pipe, state(ap.load("emoji-zh-3d", dtype="float32", device="cpu")))


def test_tokens_that_were_added_go(home: Path) -> None:
    """Textual inversion: a longer table, and a tokenizer whose last ids the new table does not have."""
    pipe, pool = ap.load(home / "one", dtype="float32", device="cpu"), Pool(1 << 30)
    pool.prefetch(home / "two").result()
    for _ in range(2):
        length = len(pipe.tokenizer)
        pipe.tokenizer.add_tokens(["<statue>"])
        pipe.text_encoder.resize_token_embeddings(length + 1)
        ap.switch(pipe, home / "two", pool=pool)
        assert len(pipe.tokenizer) == length
        assert_holds(pipe, state(tiny_pipeline(1)))
    pool.close()


def test_a_tokenizer_of_equal_contents_stays(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "two", tmp_path / "two")
    path = tmp_path / "two" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({"name_or_path": "elsewhere", **settings}))
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    tokenizer = pipe.tokenizer
    assert ap.switch(pipe, tmp_path / "two").tokenizer is tokenizer


def test_a_cast_is_noticed(home: Path) -> None:
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    pipe.to(torch.bfloat16)
    pipe.to(torch.float32)
    assert_holds(ap.switch(pipe, home / "one"), state(tiny_pipeline(0)))


# ---- what does not fit


def broken(home: Path, where: Path, part: str, change: Any) -> Path:
    shutil.copytree(home / "two", where)
    (file,) = (where / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    change(tensors, name)
    save_file(tensors, file)
    return where


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("lacks weights", lambda tensors, name: tensors.pop(name)),
        ("another architecture", lambda tensors, name: tensors.update({name: torch.zeros(3, 3)})),
    ],
)
def test_a_wrong_file_changes_nothing(home: Path, tmp_path: Path, part: str, said: str, change: Any) -> None:
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    before = state(pipe)
    with pytest.raises(CheckpointError, match=said):
        ap.switch(pipe, broken(home, tmp_path / "broken", part, change))
    assert_holds(pipe, before)


def test_a_truncated_file_changes_nothing(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "two", tmp_path / "cut")
    file = tmp_path / "cut" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    before = state(pipe)
    with pytest.raises(CheckpointError, match="vae"):
        ap.switch(pipe, tmp_path / "cut")
    with pytest.raises(UnknownModelError):
        ap.switch(pipe, "emojy")
    with pytest.raises(ConfigError, match="Linear"):
        ap.switch(nn.Linear(1, 1), "emoji")
    assert_holds(pipe, before)


def test_a_fused_lora_is_not_overwritten() -> None:
    pipe = ap.load("emoji", dtype="float32", device="cpu")
    pipe.load_lora_weights(str(ap.models.LORAS["neon"].path))
    pipe.fuse_lora()
    with pytest.raises(CheckpointError, match="unfuse"):
        ap.switch(pipe, "emoji")


# ---- optimized pipelines


@pytest.fixture(scope="module")
def optimized(home: Path) -> Any:
    pipe = ap.optimize(ap.load(home / "one", dtype="float32", device="cpu"))
    draw(pipe)
    return pipe


def test_pictures_are_the_new_checkpoints_and_nothing_is_captured(home: Path, optimized: Any) -> None:
    captures = ap.explain(optimized).captures
    for source in ("two", "one", "two"):
        ap.switch(optimized, home / source)
        ours = draw(optimized)
        with eager(optimized):
            theirs = draw(optimized)
        fresh = draw(ap.load(home / source, dtype="float32", device="cpu"))
        assert np.array_equal(theirs, fresh)
        assert np.abs(ours - fresh).max() < 1e-3
    assert ap.explain(optimized).captures == captures
    assert not ap.explain(optimized).fallbacks


def test_a_pipeline_for_another_task_follows(home: Path, optimized: Any) -> None:
    twin = as_task(optimized, "inpaint")
    ap.switch(twin, home / "one")
    assert twin.unet is optimized.unet
    assert twin.scheduler is optimized.scheduler
    assert_holds(optimized, state(tiny_pipeline(0)))


def test_another_architecture_takes_its_place(home: Path) -> None:
    pipe = ap.optimize(ap.load(home / "one", dtype="float32", device="cpu"))
    twin = as_task(pipe, "img2img")
    old, vae = weakref.ref(pipe.unet), pipe.vae
    assert ap.switch(pipe, home / "wide") is pipe
    assert_holds(pipe, state(ap.load(home / "wide", dtype="float32", device="cpu")))
    assert pipe.vae is vae
    assert twin.unet is pipe.unet
    assert engines(twin)["unet"] is engines(pipe)["unet"]
    gc.collect()
    assert old() is None


@pytest.mark.slow
def test_another_architecture_draws_and_its_memory_returns(home: Path) -> None:
    pipe = ap.optimize(ap.load(home / "one", dtype="float32", device="cpu"))
    draw(pipe)
    old = weakref.ref(pipe.unet)
    ap.switch(pipe, home / "wide")
    gc.collect()
    assert old() is None
    fresh = draw(ap.load(home / "wide", dtype="float32", device="cpu"))
    assert np.abs(draw(pipe) - fresh).max() < 1e-3
    assert not ap.explain(pipe).fallbacks


def test_bert_for_clip_and_back() -> None:
    pipe = ap.load("emoji", dtype="float32", device="cpu")
    before = state(pipe)
    assert ap.switch(pipe, "emoji-zh") is pipe
    assert type(pipe.text_encoder).__name__ == "BertModel"
    assert pipe.tokenizer("苹果").input_ids == ap.load("emoji-zh", dtype="float32").tokenizer("苹果").input_ids
    assert_holds(ap.switch(pipe, "emoji"), before)


def test_alt_diffusion(tmp_path: Path) -> None:
    """As published: the pipeline and the encoder are of classes that diffusers reads no more."""
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        tiny_alt_pipeline(seed).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": "AltDiffusionPipeline"}
        index["text_encoder"] = ["alt_diffusion", "RobertaSeriesModelWithTransformation"]
        (folder / "model_index.json").write_text(json.dumps(index))
    pipe = ap.load(tmp_path / "0", dtype="float32", device="cpu")
    assert_holds(pipe, state(tiny_alt_pipeline(0)))
    places = addresses(pipe)
    assert_holds(ap.switch(pipe, tmp_path / "1"), state(tiny_alt_pipeline(1)))
    assert addresses(pipe) == places


def test_sdxl_and_back(home: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_xl_pipeline(seed).save_pretrained(tmp_path / str(seed))
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    large = ap.switch(pipe, tmp_path / "0")
    assert type(large).__name__ == "StableDiffusionXLPipeline"
    assert pipe.unet is None
    places = addresses(large)
    assert ap.switch(large, tmp_path / "1") is large
    assert_holds(large, state(tiny_xl_pipeline(1)))
    assert torch.equal(next(large.text_encoder_2.parameters()), next(tiny_xl_pipeline(1).text_encoder_2.parameters()))
    assert addresses(large) == places
    small = ap.switch(large, home / "one")
    assert type(small) is type(pipe)
    assert_holds(small, state(tiny_pipeline(0)))


def test_a_transformer_in_place(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_sd3_pipeline(seed).save_pretrained(tmp_path / str(seed))
    pipe = ap.load(tmp_path / "0", dtype="float32", device="cpu")
    assert ap.switch(pipe, tmp_path / "1") is pipe
    expected = tiny_sd3_pipeline(1).transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_a_controlnet_stays_or_is_in_the_way(home: Path, tmp_path: Path) -> None:
    pipe = tiny_controlnet_pipeline()
    net = pipe.controlnet
    assert ap.switch(pipe, home / "two").controlnet is net
    assert_holds(pipe, state(tiny_pipeline(1)))
    tiny_xl_pipeline(0).save_pretrained(tmp_path / "xl")
    with pytest.raises(CheckpointError, match="no place for this pipeline's controlnet"):
        ap.switch(pipe, tmp_path / "xl")
    assert_holds(pipe, state(tiny_pipeline(1)))


def test_nothing_piles_up(home: Path, optimized: Any) -> None:
    def living() -> tuple[int, int]:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()), len(of(optimized).undo)

    counts = []
    for _ in range(3):
        for source in ("two", "one"):
            ap.switch(optimized, home / source)
            optimized.check_inputs("a", 64, 64, 1)
        counts.append(living())
    assert counts[1] == counts[2]


def test_another_kind_of_pipeline_is_another_object(home: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    parts = {**tiny_pipeline(4).components, "unet": tiny_unet(4, in_channels=9)}
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "nine")
    pipe = ap.optimize(ap.load(home / "one", dtype="float32", device="cpu"))
    old = weakref.ref(pipe.unet)
    new = ap.switch(pipe, tmp_path / "nine")
    assert type(new) is StableDiffusionInpaintPipeline
    assert new.unet.config.in_channels == 9
    assert pipe.unet is None
    gc.collect()
    assert old() is None
    assert set(engines(new)) >= {"unet", "vae.decoder"}
    assert_holds(new, state(ap.load(tmp_path / "nine", dtype="float32", device="cpu")))


# ---- LoRAs


def test_loras_stay_on_the_new_numbers(tmp_path: Path) -> None:
    """The switched pipeline with its LoRAs is a fresh one with the same; without them it is the plain checkpoint."""
    other = ap.load("emoji", dtype="float32", device="cpu")
    with torch.no_grad():
        for part in (other.unet, other.text_encoder):
            for parameter in part.parameters():
                parameter.mul_(0.875)
    other.save_pretrained(tmp_path / "other")
    pipe, fresh = ap.load("emoji", dtype="float32", device="cpu"), ap.load(tmp_path / "other", dtype="float32")
    plain = state(fresh)
    for one in (pipe, fresh):
        ap.loras(one, {"sketch": 0.75, "neon": -0.25})
    for _ in range(2):
        ap.switch(pipe, tmp_path / "other")
        assert_holds(pipe, state(fresh))
    assert ap.loras(pipe).keys() == {"sketch", "neon"}
    ap.loras(pipe, {})
    assert_holds(pipe, plain)


def test_peft_adapters_stay(tmp_path: Path) -> None:
    pipe = ap.load("emoji", dtype="float32", device="cpu")
    pipe.load_lora_weights(str(ap.models.LORAS["neon"].path), adapter_name="neon")
    with torch.no_grad():
        pipe.unet.conv_in.weight.zero_()
        for name, parameter in pipe.unet.named_parameters():
            if "lora" not in name:
                parameter.zero_()
    ap.switch(pipe, "emoji")
    assert pipe.get_active_adapters() == ["neon"]
    pipe.unload_lora_weights()
    assert_holds(pipe, state(ap.load("emoji", dtype="float32", device="cpu")))


def test_loras_of_another_architecture_are_told() -> None:
    pipe = ap.load("emoji", dtype="float32", device="cpu")
    ap.loras(pipe, {"sketch": 1.0})
    with pytest.warns(UserWarning, match=r"left behind .* sketch \(text_encoder\)"):
        ap.switch(pipe, "emoji-zh")
    assert ap.loras(pipe)["sketch"].weights == {"unet": 1.0}
    ap.loras(pipe, {})
    assert_holds(pipe, state(ap.load("emoji-zh", dtype="float32", device="cpu")))


def test_adapters_of_diffusers_that_are_lost_are_told(home: Path) -> None:
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "ink")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "ink")
    with pytest.warns(UserWarning, match=r"left behind .* ink \(unet\)"):
        ap.switch(pipe, home / "wide")
    assert pipe.text_encoder.active_adapters() == ["ink"]


# ---- the pool


def test_a_pool_gives_the_same_numbers_without_the_file(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "two", tmp_path / "two")
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    pool = Pool(1 << 30)
    pool.prefetch(tmp_path / "two").result()
    files = sorted((tmp_path / "two").glob("*/*.safetensors"))
    assert pool.bytes == sum(t.nbytes for file in files for t in load_file(file).values())
    for file in files:  # other numbers, under the same size and time: the pool's must be the old
        stat = file.stat()
        raw = bytearray(file.read_bytes())
        raw[-1024:] = b"\0" * 1024
        with file.open("r+b") as opened:
            opened.write(raw)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ap.switch(pipe, tmp_path / "two", pool=pool)
    assert_holds(pipe, state(tiny_pipeline(1)))
    pool.close()


def test_a_pool_reads_again_what_has_changed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "two", tmp_path / "two")
    pool = Pool(1 << 30)
    pool.prefetch(tmp_path / "two").result()
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(home / "one", tmp_path / "two")
    pipe = ap.load(home / "two", dtype="float32", device="cpu")
    assert_holds(ap.switch(pipe, tmp_path / "two", pool=pool), state(tiny_pipeline(0)))
    pool.close()


def test_a_pool_is_bounded_and_keeps_what_was_used_last(home: Path) -> None:
    size = sum(t.nbytes for file in (home / "one").glob("*/*.safetensors") for t in load_file(file).values())
    pool = Pool(size + size // 2)
    for source in ("one", "two", "one"):
        pool.prefetch(home / source).result()
        assert 0 < pool.bytes <= pool.max_bytes
    held = pool._held.keys()
    assert {part.identity for part in pool.checkpoint(home / "one").modules.values()} <= held
    assert Pool(0).prefetch(home / "one").result() is None
    with pytest.raises(ConfigError):
        Pool(-1)
    with pytest.raises(UnknownModelError):
        pool.prefetch("emojy").result()
    pool.close()


def test_shared_parts_are_held_once() -> None:
    pool = Pool(1 << 30)
    sizes = []
    for name in ("emoji-zh", "emoji-zh-3d"):
        pool.prefetch(name).result()
        sizes.append(pool.bytes)
    unet = load_file(ap.models.component_paths("emoji-zh")["unet"] / "diffusion_pytorch_model.safetensors")
    assert sizes[1] - sizes[0] == sum(tensor.nbytes for tensor in unet.values())
    pool.close()


def test_slabs_hold_the_same_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SLAB_BYTES", 1024)
    shapes = [(), (3,), (0, 4), (7, 5, 3), (1000,), (2, 2), (500,)]
    tensors = {f"{s} {d}": torch.randn(s).to(d) for s in shapes for d in (torch.float32, torch.float16)}
    held = pools.in_slabs(tensors, pinned=False)
    assert all(torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype for name, tensor in tensors.items())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values() if t.numel()}
    assert sum(storages.values()) < sum(t.nbytes for t in tensors.values()) + len(storages) * 1024


# ---- through pinned memory


@pytest.mark.parametrize("stage_bytes", [256, 4096, 1 << 20])
def test_staged_writes_are_plain_writes(stage_bytes: int) -> None:
    """The way to a GPU, on the CPU: pieces, casts, layouts."""
    shapes = [(3,), (), (64, 3, 3, 3), (7, 5), (1, 40), (0, 4), (300, 2)]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.float16)]
    living = [nn.Parameter(torch.zeros(v.shape, dtype=torch.float16)) for v in values]
    living[4] = nn.Parameter(living[4].detach().contiguous(memory_format=torch.channels_last))
    places, versions = [t.data_ptr() for t in living], [t._version for t in living]
    with torch.no_grad():
        writing.through_pinned(list(zip(living, values, strict=True)), torch.device("cpu"), stage_bytes)
    assert all(t._version > version for t, version in zip(living, versions, strict=True))
    assert all(torch.equal(t, v.half()) for t, v in zip(living, values, strict=True))
    assert [t.data_ptr() for t in living] == places


@pytest.mark.gpu
def test_on_a_gpu_graphs_stay_valid(home: Path) -> None:
    pipe = ap.optimize(ap.load(home / "one", dtype="float16"))
    draw(pipe)
    captures, places = ap.explain(pipe).captures, addresses(pipe)
    pool = Pool(1 << 30)
    pool.prefetch(home / "two").result()
    for options in ({}, {"pool": pool}):
        for source in ("two", "one"):
            ap.switch(pipe, home / source, **options)
            assert_holds(pipe, state(ap.load(home / source, dtype="float16")))
            with eager(pipe):
                expected = draw(pipe)
            assert np.abs(draw(pipe) - expected).max() < 0.05
    assert ap.explain(pipe).captures == captures
    assert addresses(pipe) == places
