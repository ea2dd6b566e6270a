"""Loading: only sound safetensors, and an error that says what to do for anything else."""

from __future__ import annotations

import json
import pickle
import re
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import allaprima as ap
from allaprima.errors import CheckpointError, ConfigError, ModelError, UnknownModelError
from allaprima.weights import checkpoints
from allaprima.weights.checkpoints import check_safetensors, choose_device, choose_dtype
from tests.ldm import save_ldm
from tests.test_pipelines import draw
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(where)
    return where


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "sound.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.zeros(3, dtype=torch.float16)}, path)
    return path


def header(text: bytes, length: int | None = None, body: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}).encode()


HOSTILE = {
    "an empty file": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": header(b"{}", length=1 << 20),
    "a header of 2^63 bytes": header(b"{}", length=1 << 63),
    "a header of 100 MB": header(b"{}", length=100 << 20),
    "no JSON": header(b"not json"),
    "a list": header(b"[]"),
    "no tensors": header(b"{}", body=b""),
    "offsets beyond the end": header(entry(data_offsets=[0, 1 << 40], shape=[1 << 38])),
    "offsets backwards": header(entry(data_offsets=[64, 0])),
    "a shape that does not fill its bytes": header(entry(shape=[2, 2])),
    "a shape that overflows": header(entry(shape=[1 << 62, 1 << 62])),
    "a negative shape": header(entry(shape=[-4, -4])),
    "an unknown dtype": header(entry(dtype="EVIL")),
    "a hole": header(entry(), body=b"\0" * 128),
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\x03\x04" + b"\0" * 64,
    "a web page": b"<!DOCTYPE html><html>404</html>",
}


def test_a_sound_file_is_sound(weights: Path) -> None:
    check_safetensors(weights)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_not_sound_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        check_safetensors(path)
    with pytest.raises(CheckpointError):
        ap.load(path, dtype="float32")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.999))
def test_a_truncated_file_is_refused_wherever_it_ends(weights: Path, share: float) -> None:
    raw = weights.read_bytes()
    path = weights.with_name("cut.safetensors")
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError):
        check_safetensors(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        ap.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        ap.load(tmp_path / "gone.safetensors")


# ---- folders


def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(folder: Path) -> None:
    for dtype, expected in (("float32", torch.float32), ("bf16", torch.bfloat16), (torch.float64, torch.float64)):
        pipe = ap.load(folder, dtype=dtype, device="cpu")
        assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == expected


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    pipe = ap.load(str(folder), dtype="float32", device="cpu")
    for name, weight in tiny_pipeline().unet.state_dict().items():
        assert torch.equal(weight, pipe.unet.state_dict()[name])
    assert not pipe.unet.training


def copy_of(folder: Path, where: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, where / "copy"))


def test_a_folder_without_its_index(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    (broken / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        ap.load(broken)


def test_a_folder_whose_index_is_no_json(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        ap.load(broken)


def test_a_folder_with_pickles_only(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    for file in broken.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickle"):
        ap.load(broken)


def test_a_folder_with_one_pickle(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    (file,) = (broken / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError):
        ap.load(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_a_truncated_file(folder: Path, tmp_path: Path, part: str) -> None:
    broken = copy_of(folder, tmp_path)
    (file,) = (broken / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=part):
        ap.load(broken)


def test_a_folder_with_weights_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    config = broken / "unet" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"block_out_channels": [64, 64, 64]}))
    with pytest.raises(CheckpointError):
        ap.load(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_that_lacks_a_tensor(folder: Path, tmp_path: Path, part: str) -> None:
    """diffusers and transformers would draw random numbers for it."""
    broken = copy_of(folder, tmp_path)
    (file,) = (broken / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{part} lacks weights .* 1 in all, among them {part}.{name}"):
        ap.load(broken, device="cpu")


def test_a_folder_with_a_tensor_too_many_says_so(folder: Path, tmp_path: Path) -> None:
    odd = copy_of(folder, tmp_path)
    (file,) = (odd / "text_encoder").glob("*.safetensors")
    save_file(load_file(file) | {"stray.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"not used, for want of a place: stray\.weight"):
        ap.load(odd, device="cpu")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_folder_that_was_saved_with_adapters_in_it(tmp_path: Path, part: str) -> None:
    pipe = tiny_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "q_proj"])
    getattr(pipe, part).add_adapter(config, "ink")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with adapters of PEFT in it: .*unload_lora_weights"):
        ap.load(tmp_path, device="cpu")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no diffusers folder"):
        ap.load(tmp_path)


# ---- single files in the layout of latent diffusion


@pytest.fixture(scope="module")
def ldm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "tiny.safetensors"
    save_ldm(tiny_pipeline(), path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_names_are_those_of_sd_1(ldm_file: Path) -> None:
    """Some that every SD v1.x checkpoint has, whatever its width."""
    with safe_open(ldm_file, framework="pt") as file:
        names = set(file.keys())
        assert file.get_slice("first_stage_model.decoder.mid.attn_1.q.weight").get_shape()[2:] == [1, 1]
    unet, vae, clip = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
    assert {
        f"{unet}time_embed.0.weight", f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.1.0.in_layers.2.weight",
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", f"{unet}middle_block.1.proj_in.weight",
        f"{unet}middle_block.2.emb_layers.1.bias", f"{unet}output_blocks.0.0.skip_connection.weight",
        f"{unet}out.2.bias", f"{vae}encoder.down.0.block.0.norm1.weight", f"{vae}encoder.down.0.downsample.conv.bias",
        f"{vae}decoder.up.3.upsample.conv.weight", f"{vae}decoder.mid.attn_1.proj_out.bias", f"{vae}quant_conv.weight",
        f"{clip}encoder.layers.0.self_attn.q_proj.weight", f"{clip}embeddings.position_ids",
    } <= names  # fmt: skip
    assert not [name for name in names if re.search(r"down_blocks|up_blocks|resnets|\.to_q\..*attn_1", name)]


@pytest.mark.usefixtures("offline")
def test_a_single_file_draws_the_pictures_of_its_folder(ldm_file: Path, folder: Path) -> None:
    pipes = ap.load(ldm_file, dtype="float32", config=folder), ap.load(folder, dtype="float32")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in pipes)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, other = (draw(pipe) for pipe in pipes)
    assert np.array_equal(one, other)
    assert one.std() > 0.01
    assert np.abs(draw(ap.optimize(pipes[0])) - other).max() < 1e-3


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("first_stage_model.", "AutoencoderKL"),
        ("cond_stage_model.", "CLIPTextModel"),
        ("model.diffusion_model.out.2.bias", "lacks weights"),
        ("first_stage_model.decoder.mid.attn_1.q", "lacks weights"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm",
            r"lacks weights .* 2 in all, .*text_encoder.final_layer_norm",
        ),
    ],
)
def test_a_single_file_that_lacks_weights(ldm_file: Path, folder: Path, tmp_path: Path, prefix: str, said: str) -> None:
    path = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in load_file(ldm_file).items() if not name.startswith(prefix)}, path)
    with pytest.raises(CheckpointError, match=said):
        ap.load(path, dtype="float32", config=folder)


# ---- names, devices, dtypes


def test_an_unknown_name_lists_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EMBEDDED", {"emoji": None, "emoji-zh": None})
    with pytest.raises(UnknownModelError, match="emoji") as caught:
        ap.load("emojii")
    assert isinstance(caught.value, ModelError)
    assert caught.value.nearest[0] == "emoji"


def test_a_path_that_is_not_there_is_no_hub_id() -> None:
    for name in ("./nothing/here", "/no/where", "~/nowhere", "a/b/c"):
        with pytest.raises(UnknownModelError):
            ap.load(name)


def test_dtypes_by_their_names() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("fp16", cpu) is torch.float16
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="int8"):
        choose_dtype("int8", cpu)


def test_auto_takes_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(checkpoints, "native_bfloat16", lambda native=native: native)
        assert choose_dtype("auto", torch.device("cpu")) is expected


def test_a_device_that_is_not_there() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="gpu0"):
        choose_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="doctor"):
            choose_device("cuda:1")
