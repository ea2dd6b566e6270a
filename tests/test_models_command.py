"""`allaprima models` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allaprima.models import EMBEDDED
from tests.test_cli import run


def test_the_list_has_three_names() -> None:
    assert run("models") == run("models", "list")
    assert all(name in run("models", "list") for name in EMBEDDED)
    assert run("models", "list", "--vocabulary", "emoji-zh") == run("models", "--vocabulary", "emoji-zh")


@pytest.mark.parametrize("command", ["list", "pull", "convert"])
def test_help_teaches_by_example(command: str) -> None:
    assert f"allaprima models {command}" in run("models", command, "--help")


def test_a_pickle_is_converted_and_loads_by_its_new_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}, "extra": [1]}, tmp_path / "x.ckpt")
    assert f"allaprima models convert {tmp_path / 'x.ckpt'}" in run(
        "generate", "a", "--model", f"{tmp_path}/x.ckpt", code=2
    )
    text = run("models", "convert", str(tmp_path / "x.ckpt"), "-o", str(tmp_path / "new.safetensors"))
    assert f"{tmp_path / 'new.safetensors'}: 1 tensors" in text
    assert "left out: extra" in text
    assert "there already" in run(
        "models", "convert", str(tmp_path / "x.ckpt"), "-o", str(tmp_path / "new.safetensors"), code=2
    )


def test_what_is_pulled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allaprima.weights import hub

    asked = []
    monkeypatch.setattr(hub, "pull", lambda *args, **options: asked.append((args, options)) or tmp_path)
    text = run("models", "pull", "owner/name", "--variant", "fp16")
    assert "owner/name is in" in text
    assert "--model owner/name" in text
    assert asked == [(("owner/name",), {"variant": "fp16", "file": None, "pickles": False})]
    assert "models convert" in run("models", "pull", "owner/name", "--pickles")
    assert "no hub id" in run("models", "pull", "name", code=2)
