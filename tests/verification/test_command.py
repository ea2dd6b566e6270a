"""`python -m allaprima.verification`: its files, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from allaprima.verification import command
from tests.verification.sabotage import noise, optimized

OPTIONS = ("--prompts", "2", "--sizes", "64x64", "--tasks", "text2img", "--steps", "2")


def run(monkeypatch: pytest.MonkeyPatch, pipe: Any, *options: str) -> Result:
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: pipe)
    monkeypatch.setattr(command, "optimize", lambda pipe: pipe)
    program = typer.Typer()
    program.command()(command.command)
    return CliRunner().invoke(program, [*OPTIONS, *options])


def test_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, optimized(), "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("passed: 2 of 2 drawings")
    found = json.loads((tmp_path / "verify-emoji-float32.json").read_text())
    assert found["summary"]["count"] == len(found["reports"]) == 2
    assert {"commit", "packages", "command"} <= set(found["environment"])
    with Image.open(tmp_path / "verify-emoji-float32.png") as sheet:
        assert sheet.width > 6 * 64


def test_a_difference_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, optimized(unet=noise(0.05)), "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED: 0 of 2 drawings")


def test_it_is_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "allaprima.verification", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prompts" in done.stdout
