"""One capture a signature: counted with the real engines, and noticed where it is not so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from allaprima.models import EMBEDDED
from allaprima.pipelines import engines
from allaprima.verification import captures
from allaprima.verification.captures import Checkpoint, Count, plan
from tests.tiny import tiny_bert_pipeline, tiny_pipeline

GOOD = Count(calls=9, captures=1, loaded=0, signatures=1, confirmations=0, fallbacks=0)
OPTIONS = ("--models", "clip,bert", "--sizes", "64x64,72x64", "--batches", "1,3", "--schedulers", "DDIM, Euler a")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, pipes: Any = None) -> Any:
    pipes = pipes or {"clip": tiny_pipeline(), "bert": tiny_bert_pipeline(seed=1)}
    monkeypatch.setattr(captures, "load", lambda model, dtype: pipes[model])
    program = typer.Typer()
    program.command()(captures.command)
    return CliRunner().invoke(program, [*OPTIONS, *options, "--output", str(folder)])


def test_the_second_checkpoint_captures_only_what_is_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "captures.json").read_text())
    clip, bert = (found["checkpoints"][name] for name in ("clip", "bert"))
    assert found["passed"]
    assert found["settings"]["schedulers"] == ["DDIM", "Euler a"]
    assert clip["pictures"] == bert["pictures"] == 2 * 2 * 2 * 2
    assert clip["late"] == bert["late"] == []
    assert {name: count["captures"] for name, count in clip["last"].items()} == {
        "text_encoder": 1, "unet": 1, "vae.decoder": 1,
    }  # fmt: skip
    assert {name: count["loaded"] for name, count in bert["last"].items()} == {
        "text_encoder": 0, "unet": 1, "vae.decoder": 1,
    }  # fmt: skip
    assert clip["last"]["unet"]["calls"] == 2 * clip["pictures"]


def test_a_second_capture_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def draw_badly(pipe: Any, prompt: str, picture: captures.Picture) -> None:
        for engine in engines(pipe).values():
            engine.events.calls += 1
            if picture.width == 72 or not engine.events.captures:
                engine.events.captures += 1
                engine.events.signatures.append("(sample)")

    monkeypatch.setattr(captures, "_draw", draw_badly)
    result = run(monkeypatch, tmp_path, "--models", "clip")
    assert result.exit_code == 1
    assert "after the first picture: unet at 2: Picture(scheduler='DDIM'" in result.stdout


def test_every_condition_can_fail() -> None:
    assert GOOD.passed
    assert replace(GOOD, captures=0, signatures=0, loaded=1).passed
    assert replace(GOOD, captures=2, signatures=2).passed
    for bad in (dict(captures=2), dict(fallbacks=1), dict(captures=0, signatures=0)):
        count = replace(GOOD, **bad)
        assert not count.passed
        assert not Checkpoint(9, 1.0, {"unet": GOOD}, {"unet": count, "vae.decoder": GOOD}, ()).passed
    assert not Checkpoint(0, 0.0, {}, {}, ()).passed


def test_the_plan_has_every_combination() -> None:
    sizes = [(64, 64), (72, 64)]
    pictures = plan(sizes, [1, 2, 3], ["DDIM", "UniPC"])
    assert len(set(pictures)) == len(pictures) == 2 * 3 * 2 * 2
    assert {picture.guidance_scale for picture in pictures} == {4.0, 1.0}
    assert [(picture.width, picture.height) for picture in pictures[:2]] == sizes


def test_what_is_claimed_by_default() -> None:
    """12 sizes, batches of 1 to 4, 3 schedulers, all checkpoints."""
    assert len(set(captures.SIZES.split(","))) == 12
    assert captures.BATCHES == "1,2,3,4"
    assert len(set(captures.SCHEDULERS.split(","))) == len(EMBEDDED) == 3
