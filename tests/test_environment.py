"""What is written beside every figure, read from this machine and from files like those of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from allaprima import environment as module
from allaprima.environment import commit, cpu_flags, cpu_model, environment, free_memory_bytes, package_version

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


def test_a_figure_says_where_it_is_from() -> None:
    found = environment()
    assert {"allaprima", "commit", "date", "command", "cpu", "cores", "threads", "gpu", "packages"} <= set(found)
    assert {"torch", "diffusers", "transformers"} <= set(found["packages"])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/home/someone/venv/bin/allaprima", "allaprima --scheduler 'Euler a'"),
        ("/home/allaprima/src/allaprima/demo.py", "python -m allaprima.demo --scheduler 'Euler a'"),
        (
            "/home/someone/src/allaprima/verification/__main__.py",
            "python -m allaprima.verification --scheduler 'Euler a'",
        ),
        ("/home/someone/src/allaprima/bench/memory.py", "python -m allaprima.bench.memory --scheduler 'Euler a'"),
    ],
)
def test_the_command_names_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--scheduler", "Euler a"])
    assert environment()["command"] == said
    assert str(Path.cwd()) not in json.dumps(environment())


def test_the_processor_is_read(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text(X86)
    (tmp_path / "arm").write_text(ARM)
    assert cpu_flags(tmp_path / "x86") == {"fpu", "avx2", "amx_bf16"}
    assert cpu_model(tmp_path / "x86") == "Some CPU (amx_bf16)"
    assert "bf16" in cpu_flags(tmp_path / "arm")
    assert cpu_model(tmp_path / "arm").endswith("(no vector extension known)")
    assert not cpu_flags(tmp_path / "none")


def test_free_memory_is_read(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemAvailable:  1024 kB\n")
    assert free_memory_bytes(tmp_path / "meminfo") == 2**20
    assert free_memory_bytes(tmp_path / "none") is None


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert package_version("torch")
    assert package_version("no-such-package") is None


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*words: Any) -> str:
        raise error

    monkeypatch.setattr(module, "_git", fail)
    assert commit() is None


def test_sources_that_were_changed_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_git", lambda folder, *words: "abc" if words[0] == "rev-parse" else " M a.py")
    assert commit() == "abc+"
