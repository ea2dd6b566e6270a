from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from allaprima.bench import command, measure, workloads
from allaprima.bench.floor import Ceiling
from allaprima.bench.memory import Request, measured_alone
from allaprima.bench.variants import VARIANTS
from tests.tiny import tiny_pipeline


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(workloads, "subject", lambda *asked: tiny_pipeline())
    monkeypatch.setattr(measure, "measured_ceiling", lambda dtype, device: Ceiling(1e11, 1e10))
    monkeypatch.setitem(VARIANTS, "ours", lambda pipe, components: None)
    monkeypatch.setattr(measure, "_later_costs", lambda *entry: None)
    monkeypatch.setattr(measure, "_told", lambda entry: {})
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(command.bench)
    return app


def run(program: typer.Typer, folder: Path, *options: str) -> Any:
    common = ["--what", "text", "--variants", "eager,ours", "--repeats", "2", "--no-memory", "--output", str(folder)]
    return CliRunner().invoke(program, [*common, *options])


def test_files_and_table(program: typer.Typer, tmp_path: Path) -> None:
    result = run(program, tmp_path)
    assert result.exit_code == 0, result.output
    assert "text batch 1" in result.output
    lines = (tmp_path / "bench-emoji-float32-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["kind"] == "run"
    assert {"cpu", "commit", "date", "command", "packages", "threads", "ceiling", "repeats"} <= set(first)
    assert len(lines) == 1 + 2 + 2
    assert (tmp_path / "bench-emoji-float32-cpu.png").exists()


def test_the_last_line_is_all_of_it(program: typer.Typer, tmp_path: Path) -> None:
    result = run(program, tmp_path, "--json", "--batches", "1,2")
    document = json.loads(result.stdout.splitlines()[-1])
    assert [entry["kind"] for entry in document] == ["run", "build", "build", *["outcome"] * 4]
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "eager,tensorrt"], "tensorrt"),
        (["--what", "unet"], "unet"),
        (["--sizes", "64x65"], "64x65"),
        (["--batches", "1,two"], "'two'"),
        (["--batches", "0"], "'0'"),
    ],
)
def test_wrong_options(program: typer.Typer, tmp_path: Path, options: list[str], said: str) -> None:
    result = run(program, tmp_path, *options)
    assert result.exit_code != 0
    assert said in str(result.exception)


def test_sizes_default_to_the_native_one_and_its_double(tiny_pipe: Any) -> None:
    assert command._sizes(None, tiny_pipe) == [(128, 128), (256, 256)]
    assert command._sizes("72x64, 96", tiny_pipe) == [(72, 64), (96, 96)]


def test_help_loads_no_torch() -> None:
    code = "import sys, allaprima.bench.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_memory_of_a_process_of_its_own(tiny_pipe: Any, tmp_path: Path) -> None:
    tiny_pipe.save_pretrained(tmp_path)
    case = dict(what="text", width=0, height=0, batch=1, steps=1)
    found = measured_alone(Request(None, str(tmp_path), "float32", "cpu", "eager", case), 300)
    assert 2**20 < found.loaded <= found.building
    assert found.running >= found.loaded * 0.9
    with pytest.raises(RuntimeError, match="no-such-variant"):
        measured_alone(Request(None, str(tmp_path), "float32", "cpu", "no-such-variant", case), 300)
