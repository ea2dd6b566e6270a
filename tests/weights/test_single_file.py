"""Files in the original layout: every family offline, every tensor used or named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import allaprima as ap
from allaprima.errors import CheckpointError
from allaprima.fingerprint import structure_key
from allaprima.models.architectures import architecture
from allaprima.weights import single_file
from allaprima.weights.contents import Component, empty, fitted, named_tensors
from allaprima.weights.single_file import V_STATISTIC, of_single_file
from tests.ldm import ldm_tensors, open_clip_tensors, save_ldm
from tests.tiny import tiny_pipeline, tiny_vae, tiny_xl_pipeline

CLIP = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(where)
    return where


@pytest.fixture
def ldm_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_ldm(tiny_pipeline(), path)
    return path


def equal(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def changed(path: Path, **changes: Any) -> Path:
    """The file with tensors added, or left out where they are None."""
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    other = path.with_name("changed.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, other)
    return other


# ---- the families


def part(name: str, settings: dict[str, Any]) -> Any:
    """A module of full size, without memory."""
    return empty(single_file_component(name, settings))


def single_file_component(name: str, settings: dict[str, Any]) -> Component:
    (found,) = [entry for entry in single_file._kinds(settings) if entry[0] == name]
    return Component(*found, (), dict, name)


def tensors_of(family: str) -> dict[str, torch.Tensor]:
    """A checkpoint of the family as its authors published it: names and shapes, without memory."""
    settings = architecture(family)
    encoders = {name: part(name, settings) for name in ("text_encoder", "text_encoder_2") if name in settings}
    layouts = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
    prefix = "conditioner.embedders.0.model." if family == "sdxl-refiner" else layouts.get(family.partition("-")[0], "")
    unet, vae = part("unet", settings), part("vae", settings)
    return ldm_tensors(
        unet, vae, encoders.get("text_encoder"), open_clip=prefix, text_encoder_2=encoders.get("text_encoder_2")
    )


EXPECTED = {
    "sd1": "StableDiffusionPipeline", "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline", "sd2-base": "StableDiffusionPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline", "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}  # fmt: skip


QUICK = ("sd1", "sd2", "sd2-base", "sdxl")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EXPECTED])
def test_each_family_is_told_and_complete(family: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size, on the meta device: every weight of every module gets the tensor of its original name."""
    tensors = tensors_of(family)
    if family in ("sd2", "sd2-base"):
        tensors[V_STATISTIC] = torch.linspace(-1, 1, 320) * (0.3 if family == "sd2" else 0.05)
    monkeypatch.setattr(single_file, "load_file", lambda path: dict(tensors))
    checkpoint = of_single_file(weights)
    settings = architecture(family)
    assert checkpoint.pipeline.__name__ == EXPECTED[family]
    assert checkpoint.modules.keys() == {name for name in settings if name in ("unet", "vae") or "encoder" in name}
    for name, component in checkpoint.modules.items():
        wanted = named_tensors(empty(component))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fitted(component, wanted)
        assert found.keys() == wanted.keys(), name
    scheduler = checkpoint.others["scheduler"][1]()
    assert scheduler.config.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert len(checkpoint.others["tokenizer_2" if "refiner" in family else "tokenizer"][1]()) == 49408


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "sound.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    return path


def test_a_file_says_that_its_unet_predicts_v(folder: Path, ldm_file: Path) -> None:
    plain = of_single_file(ldm_file, config=folder)
    settings = {"unet": {"cross_attention_dim": 32}}
    for name, expected in (("v_pred", "v_prediction"), ("other", "epsilon")):
        tensors = {single_file.UNET_FIRST: torch.zeros(4, 4, 3, 3), name: torch.zeros(0)}
        assert single_file.prediction(ldm_file, tensors, settings)["prediction_type"] == expected
    path = ldm_file.with_name("v.safetensors")
    save_file(load_file(ldm_file), path, metadata={"modelspec.prediction_type": "v"})
    assert single_file.prediction(path, load_file(path), settings)["prediction_type"] == "v_prediction"
    assert plain.source == str(ldm_file)


def test_what_was_never_a_stable_diffusion(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Stable Diffusion UNet"):
        ap.load(weights)
    for name, said in (("lora_unet_down.lora_up.weight", "is a LoRA"), ("decoder.up.0.block.0.conv1.bias", "is a VAE")):
        save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=said):
            ap.load(tmp_path / "other.safetensors")
    save_ldm(tiny_pipeline(), tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"another architecture.*unet\.|lacks weights"):
        ap.load(tmp_path / "tiny.safetensors")


# ---- values


def test_a_file_and_its_folder_are_one_program(ldm_file: Path, folder: Path) -> None:
    """Equal structure: what was captured for the one serves the other."""
    one, other = ap.load(ldm_file, dtype="float32", config=folder), ap.load(folder, dtype="float32")
    for name in ("unet", "vae"):
        assert structure_key(getattr(one, name)) == structure_key(getattr(other, name))
    assert not one.unet.training


def test_an_encoder_in_open_clips_layout(folder: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    tensors = ldm_tensors(pipe.unet, pipe.vae, pipe.text_encoder, open_clip="cond_stage_model.model.")
    assert any("in_proj_weight" in name for name in tensors)
    path = tmp_path / "sd2.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    assert equal(ap.load(path, dtype="float32", config=folder).text_encoder, pipe.text_encoder)
    assert open_clip_tensors(pipe.text_encoder, "").keys() >= {"ln_final.weight", "positional_embedding"}


def test_both_encoders_of_sdxl(tmp_path: Path) -> None:
    pipe = tiny_xl_pipeline()
    pipe.save_pretrained(tmp_path / "xl")
    tensors = ldm_tensors(
        pipe.unet, pipe.vae, pipe.text_encoder, open_clip="conditioner.embedders.1.model.",
        text_encoder_2=pipe.text_encoder_2,
    )  # fmt: skip
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, tmp_path / "xl.safetensors")
    loaded = ap.load(tmp_path / "xl.safetensors", dtype="float32", config=tmp_path / "xl")
    assert type(loaded) is type(pipe)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert equal(getattr(loaded, name), getattr(pipe, name)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_are_rounded_once(ldm_file: Path, folder: Path, dtype: str) -> None:
    pipe = ap.load(ldm_file, dtype=dtype, config=folder)
    assert equal(pipe.unet, tiny_pipeline().unet.to(getattr(torch, dtype)))


def test_a_model_does_not_change_with_its_file(ldm_file: Path, folder: Path) -> None:
    pipe = ap.load(ldm_file, dtype="float32", config=folder)
    with ldm_file.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\x7f" * 4096)
    assert equal(pipe.unet, tiny_pipeline().unet)


# ---- what else is in files


def averaged(pipe: Any, factor: float) -> dict[str, torch.Tensor]:
    own = ldm_tensors(pipe.unet, pipe.vae)
    names = [name for name in own if name.startswith("model.diffusion_model.")]
    found = {"model_ema." + name.removeprefix("model.").replace(".", ""): own[name] * factor for name in names}
    return {**found, "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}


def test_averages_are_taken_where_they_are_asked_for(ldm_file: Path, folder: Path) -> None:
    both = changed(ldm_file, **averaged(tiny_pipeline(), 0.5))
    plain, average = (ap.load(both, dtype="float32", config=folder, ema=ema) for ema in (False, True))
    assert equal(plain.unet, tiny_pipeline().unet)
    for name, tensor in tiny_pipeline().unet.state_dict().items():
        assert torch.equal(average.unet.state_dict()[name], tensor * 0.5)
    with pytest.raises(CheckpointError, match="no EMA"):
        ap.load(ldm_file, dtype="float32", config=folder, ema=True)


def test_what_training_left_is_passed_over_and_the_rest_is_named(ldm_file: Path, folder: Path) -> None:
    known = changed(ldm_file, betas=torch.zeros(3), first_stage_model__loss__logvar=torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ap.load(known, dtype="float32", config=folder)
    strange = {"model.diffusion_model.out.7.weight": torch.ones(2), "something.else": torch.ones(2)}
    with pytest.warns(UserWarning, match=r"not used.*out\.7\.weight, something\.else\."):
        ap.load(changed(ldm_file, **strange), dtype="float32", config=folder)


def test_a_vae_from_elsewhere(ldm_file: Path, folder: Path, tmp_path: Path) -> None:
    other = tiny_vae(seed=5)
    other.save_pretrained(tmp_path / "vae")
    tensors = {n.removeprefix("first_stage_model."): t for n, t in ldm_tensors(tiny_pipeline().unet, other).items()}
    own = {
        n: t.contiguous().clone() for n, t in tensors.items() if n.startswith(("encoder", "decoder", "quant", "post"))
    }
    save_file(own, tmp_path / "original.safetensors")
    save_file({f"first_stage_model.{n}": t for n, t in own.items()}, tmp_path / "prefixed.safetensors")
    without = changed(ldm_file, **{n: None for n in load_file(ldm_file) if n.startswith("first_stage_model.")})
    with pytest.raises(CheckpointError, match="vae=FOLDER_OR_FILE"):
        ap.load(without, dtype="float32", config=folder)
    places = ["vae", "original.safetensors", "prefixed.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    for source in (ldm_file, without):
        for place in places:
            pipe = ap.load(source, dtype="float32", config=folder, vae=tmp_path / place)
            assert equal(pipe.vae, other), place
    assert equal(ap.load(folder, dtype="float32", vae=tmp_path / "original.safetensors").vae, other)
    assert equal(ap.load(folder, dtype="float32", vae="emoji").vae, ap.load("emoji", dtype="float32").vae)
    with pytest.raises(CheckpointError, match="lacks weights"):
        ap.load("emoji", dtype="float32", vae=tmp_path / "original.safetensors")


def test_a_text_encoder_from_elsewhere(ldm_file: Path, folder: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(seed=3)
    other.save_pretrained(tmp_path / "other")
    for place in ("other", "other/text_encoder", "other/text_encoder/model.safetensors"):
        pipe = ap.load(ldm_file, dtype="float32", config=folder, text_encoder=tmp_path / place)
        assert equal(pipe.text_encoder, other.text_encoder), place
        assert equal(pipe.unet, tiny_pipeline().unet)
