"""Pulling from a hub on this machine: what is fetched, what goes on after a cut, what each refusal says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import allaprima as ap
from allaprima.errors import CheckpointError
from allaprima.weights import hub as ours
from allaprima.weights.hub import cached, choose, is_hub_id, pull
from tests.hub import Hub, serving
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what authors leave in one."""
    where = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_pipeline().save_pretrained(where)
    for file in list(where.glob("*/*.safetensors")):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"))
        shutil.copy(file, file.with_suffix(".bin"))
    (where / "safety_checker").mkdir()
    (where / "safety_checker" / "model.safetensors").write_bytes(b"x" * 1000)
    shutil.copy(next(where.glob("unet/*.safetensors")), where / "whole.safetensors")
    (where / "README.md").write_text("x")
    return where


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is kept of a cut download counts in these
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.repositories["some/tiny"] = folder
        yield server


def fetched(hub: Hub) -> set[str]:
    return {line.split("/", 5)[-1] for line in hub.requests if line.startswith("GET /some/tiny/resolve")}


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_what_was_pulled_loads_without_network(hub: Hub) -> None:
    place = pull("some/tiny")
    found = names(place)
    assert "unet/diffusion_pytorch_model.safetensors" in found
    assert not [name for name in found if name.endswith((".bin", ".md")) or ".fp16." in name or "safety" in name]
    assert "whole.safetensors" not in found
    hub.repositories.clear()
    hub.requests.clear()
    pipe = ap.load("some/tiny", dtype="float32", device="cpu")
    assert torch.equal(pipe.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight)
    assert ap.switch(pipe, "some/tiny") is pipe
    assert hub.requests == []


def test_what_was_not_pulled_is_fetched_by_load(hub: Hub) -> None:
    assert cached("some/tiny") is None
    ap.load("some/tiny", dtype="float32", device="cpu")
    assert cached("some/tiny") is not None


def test_load_completes_a_pull_that_was_cut_off(hub: Hub) -> None:
    place = pull("some/tiny")
    for lost in ("unet/diffusion_pytorch_model.safetensors", "tokenizer"):
        gone = place / lost
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        assert not ours.is_complete(place)
        hub.requests.clear()
        ap.load("some/tiny", dtype="float32", device="cpu")
        assert hub.requests
        assert ours.is_complete(place)


def test_a_variant(hub: Hub) -> None:
    place = pull("some/tiny", variant="fp16")
    assert {name for name in names(place) if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    pipe = ap.load("some/tiny", dtype="float32", device="cpu")
    assert torch.equal(pipe.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight.half().float())
    ap.switch(pipe, "some/tiny")
    for file in list(place.glob("*/*.fp16.safetensors")):
        file.rename(file.with_name(file.name.replace("fp16", "no_ema")))
    assert torch.equal(
        ap.load(place, dtype="float32", device="cpu").vae.state_dict()["quant_conv.bias"], pipe.vae.quant_conv.bias
    )
    ap.switch(pipe, place)


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut = ("diffusion_pytorch_model.safetensors", 50_000)
    place = pull("some/tiny")
    assert [line for line in hub.requests if "bytes=" in line]
    assert load_file(place / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_pull_that_was_given_up_goes_on(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut, hub.always_cut = ("diffusion_pytorch_model.safetensors", 1000), True
    with pytest.raises(CheckpointError, match=r"some/tiny cannot be pulled from http://127.* goes on where"):
        stop_after(hub, 4, monkeypatch)
    hub.cut, hub.always_cut = None, False
    hub.requests.clear()
    place = pull("some/tiny")
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (place / name).read_bytes() == (folder / name).read_bytes()
    again = {line.split("/", 5)[-1].split()[0] for line in hub.requests if line.startswith("GET /some/tiny/resolve")}
    assert again <= {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}


def stop_after(hub: Hub, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub tries again for as long as something comes; here its patience ends."""
    from huggingface_hub import file_download

    count = 0
    whole = file_download.http_get

    def impatient(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return whole(*args, **{**options, "_nb_retries": 0 if count > times else options.get("_nb_retries", 5)})

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", impatient)
        # nothing new comes any more
        hub.cut = ("diffusion_pytorch_model.safetensors", 0)
        pull("some/tiny")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, "GatedRepo"), "accept their terms.*HF_TOKEN"),
        ((401, "GatedRepo"), "accept their terms"),
        ((404, "RepoNotFound"), "no such repository"),
        ((401, "RepoNotFound"), "no such repository, or it is private"),
        ((503, ""), "503"),
    ],
)
def test_what_a_refusal_says(hub: Hub, refusal: tuple[int, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.refused["some/tiny"] = refusal
    with pytest.raises(CheckpointError, match=said):
        pull("some/tiny")
    with pytest.raises(CheckpointError, match=said):
        ap.load("some/tiny")


def test_a_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull("some/tiny")
    assert "Bearer hf_secret" in hub.agents


def test_no_server_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(CheckpointError, match="cannot be pulled"):
        pull("some/tiny")


def test_a_disk_without_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(CheckpointError, match="do not fit on the disk"):
        pull("some/tiny")
    assert fetched(hub) == set()


def test_a_damaged_file_is_told(hub: Hub, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    hub.repositories["some/tiny"] = tmp_path / "damaged"
    with pytest.raises(CheckpointError, match="no sound safetensors"):
        pull("some/tiny")


def test_one_file(hub: Hub) -> None:
    path = pull("some/tiny", file="whole.safetensors")
    assert path.name == "whole.safetensors"
    assert fetched(hub) == {"whole.safetensors"}
    with pytest.raises(CheckpointError, match=r"no file 'other.safetensors'; it has .*whole"):
        pull("some/tiny", file="other.safetensors")


# ---- which files


def test_shards_come_with_their_table() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    files = ["model_index.json", "unet/config.json", index, *shards, "unet/flax_model.msgpack", "vae/model.onnx"]
    assert sorted(choose("a/b", files)) == sorted(["model_index.json", "unet/config.json", index, *shards])


def test_only_a_variant_is_better_than_nothing() -> None:
    assert "unet/model.fp16.safetensors" in choose("a/b", ["model_index.json", "unet/model.fp16.safetensors"])


def test_pickles_are_not_fetched_unasked() -> None:
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"as a pickle alone.*--pickles"):
        choose("a/b", files)
    assert choose("a/b", files, pickles=True) == files


def test_a_repository_of_single_files() -> None:
    with pytest.raises(CheckpointError, match=r"v1-5\.safetensors: pull one with --file"):
        choose("a/b", ["v1-5.safetensors", "README.md"])


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for text, expected in (("owner/name-1.5", True), ("a/b", False), ("../b", False), ("/a/b", False), ("a", False)):
        assert is_hub_id(text) == expected, text
