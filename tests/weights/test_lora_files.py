"""Names lead to files as A1111's users expect, and what cannot be used is told."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allaprima.errors import AdapterError, CheckpointError
from allaprima.models import LORAS
from allaprima.weights import lora_files
from allaprima.weights.lora_files import find, folders, read

TENSORS = {"unet.conv_in.lora_A.weight": torch.ones(2, 3), "unet.conv_in.lora_B.weight": torch.ones(4, 2)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of LoRAs as users have them."""
    (tmp_path / "style").mkdir()
    (tmp_path / "other" / "style").mkdir(parents=True)
    for name in ("ink", "iuV35.uv1P", "水墨画", "style/pixel", "other/style/crayon", "Ünder score"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    save_file(TENSORS, tmp_path / "model-000012.safetensors", {"ss_output_name": "watercolour v2"})
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ink", "ink"),
        ("ink.safetensors", "ink"),
        ("iuV35.uv1P", "iuV35.uv1P"),
        ("iuV35.uv1P.safetensors", "iuV35.uv1P"),
        ("水墨画", "水墨画"),
        ("pixel", "style/pixel"),
        ("style/pixel", "style/pixel"),
        ("style\\pixel", "style/pixel"),
        ("other/style/crayon", "other/style/crayon"),
        ("watercolour v2", "model-000012"),
        (unicodedata.normalize("NFD", "Ünder score"), "Ünder score"),
    ],
)
def test_a_name_leads_to_its_file(place: Path, name: str, file: str) -> None:
    assert find(name, [place]) == place / f"{file}.safetensors"


def test_embedded_names_and_paths_need_no_folder(place: Path) -> None:
    assert find("sketch") == LORAS["sketch"].path
    assert find(str(place / "ink.safetensors")) == place / "ink.safetensors"
    save_file(TENSORS, place / "style" / "adapter_model.safetensors")
    assert find(str(place / "style")) == place / "style" / "adapter_model.safetensors"


@pytest.mark.parametrize(
    "name", ["inc", "pixle", "no such thing", "", "../ink", "style", "notes.txt", "a\0b", "x" * 5000]
)
def test_an_unknown_name_is_told_with_the_nearest(place: Path, name: str) -> None:
    near = {"inc": "ink", "pixle": "pixel"}.get(name, "ink")
    with pytest.raises(AdapterError, match=f"Nearest names: .*{near}"):
        find(name, [place])


def test_a_name_of_two_files_is_refused_until_its_folder_is_given(place: Path) -> None:
    save_file(TENSORS, place / "style" / "ink.safetensors")
    assert find("ink", [place]) == place / "ink.safetensors", "the whole name goes before a part of it"
    save_file(TENSORS, place / "other" / "pixel.safetensors")
    with pytest.raises(AdapterError, match="means 2 files"):
        find("pixel", [place])
    assert find("style/pixel", [place]) == place / "style" / "pixel.safetensors"


@pytest.mark.parametrize("name", ["old", "old.pt"])
def test_pickles_are_refused(place: Path, name: str) -> None:
    for asked in (name, str(place / "old.pt")):
        with pytest.raises(AdapterError, match="allaprima models convert"):
            find(asked, [place])
    with pytest.raises(AdapterError, match="pickle"):
        read(place / "old.pt")


def test_folders_come_from_the_caller_or_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALLAPRIMA_LORAS", raising=False)
    assert folders() == ()
    assert folders(place) == folders([str(place)]) == (place,)
    with pytest.raises(AdapterError, match="no folder"):
        folders(place / "nowhere")
    monkeypatch.setenv("ALLAPRIMA_LORAS", os.pathsep.join([str(place), "~/loras"]))
    assert folders() == (place, Path.home() / "loras")


def test_hostile_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ink.safetensors"
    for content in (b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="ink"):
            read(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("content", ["no json", "[]"])
def test_a_broken_configuration_is_told(tmp_path: Path, content: str) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match="adapter_config"):
        read(tmp_path / "adapter_model.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors", {"lora_adapter_metadata": content})
    with pytest.raises(AdapterError, match="lora_adapter_metadata"):
        read(tmp_path / "b.safetensors")


def test_files_are_kept_in_memory_up_to_a_bound(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = place / "ink.safetensors", place / "水墨画.safetensors"
    first = read(path)
    assert read(path) is first
    monkeypatch.setattr(lora_files, "CACHE_BYTES", first.nbytes)
    read(other)
    assert read(path) is first, "what is in use costs nothing to keep"
    identity = id(first.layers)
    del first
    read(other)
    assert id(read(path).layers) != identity


def test_the_cache_holds_no_earlier_state_of_a_file(place: Path) -> None:
    path = place / "ink.safetensors"
    first = read(path)
    os.utime(path, ns=(1, 1))
    assert read(path) is not first
