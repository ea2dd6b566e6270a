"""Headers that are work or harm for the reader, and pickles by another name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import allaprima as ap
from allaprima.errors import CheckpointError
from allaprima.weights import soundness
from allaprima.weights.soundness import check_safetensors, metadata, refuse_pickle


def written(path: Path, entries: object, body: int = 128) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * body)
    return path


def entry(start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 64), "b": entry(32, 96)},
        {"a": entry(0, 64), "b": entry(0, 64)},
        {"a": entry(64, 128)},
        {"a": entry(0, 64, "F33"), "b": entry(64, 128)},
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"__metadata__": {"a": 3}, "a": entry(0, 128)},
        b'{"a": ' * 1000,
        b"[" * 100_000,
        b"\xff\xfe\xfa",
    ],
)
def test_a_header_that_contradicts_itself(tmp_path: Path, entries: object) -> None:
    with pytest.raises(CheckpointError, match="no sound safetensors"):
        check_safetensors(written(tmp_path / "x.safetensors", entries))


def test_a_header_that_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({str(i): torch.zeros(1) for i in range(10)}, path)
    check_safetensors(path)
    for limit, value, said in (
        ("MAX_TENSORS", 9, "10 tensors; allowed: 9"),
        ("MAX_HEADER_BYTES", 100, "allowed: 2 to 100"),
        ("MAX_NAME", 0, "a name of|name of 1 letters"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(soundness, limit, value)
            with pytest.raises(CheckpointError, match=said):
                check_safetensors(path)


def test_a_pickle_by_another_name_is_told(tmp_path: Path) -> None:
    for zipped in (True, False):
        path = tmp_path / "model.safetensors"
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"pickle by another name.*allaprima models convert model\.ckpt"):
            ap.load(path)


def test_a_pickles_name_is_enough(tmp_path: Path) -> None:
    for name in ("x.ckpt", "x.CKPT", "x.bin"):
        with pytest.raises(CheckpointError, match="allaprima models convert"):
            refuse_pickle(tmp_path / name)
    refuse_pickle(tmp_path / "x.safetensors")


def test_metadata_is_text(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"a": "b"})
    assert metadata(tmp_path / "x.safetensors") == {"a": "b"}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert metadata(tmp_path / "x.safetensors") == {}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.integers(0, 255))
def test_any_byte_of_a_header_may_be_wrong(tmp_path: Path, place: int, byte: int) -> None:
    """Sound, or our error: nothing else."""
    path = tmp_path / "x.safetensors"
    save_file({"first": torch.zeros(3, 4), "second": torch.ones(5, dtype=torch.float16)}, path)
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = byte
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        check_safetensors(path)
