"""Kernels compiled beside the process that needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from allaprima.backends.cuda import warming
from allaprima.backends.cuda.compile import every_variant, one_of_each
from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels.variant import Variant
from tests.backends.cuda.simulation import AS_IF_ON_HOPPER

H100 = next(d for d in KNOWN if d.name == "H100")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(warming, "_running", {})
    monkeypatch.setattr(warming, "_marker", lambda variants, arch: tmp_path / f"{arch}.txt")


def test_asked_again_and_again_it_starts_once(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return real([sys.executable, "-c", "import time; time.sleep(2)"])

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    assert not warming.ready(torch.float16, H100)
    assert not warming.ready(torch.float16, H100)
    assert len(started) == 1
    assert started[0][1:3] == ["-m", "allaprima.backends.cuda.warming"]
    assert {"90", "float16"} <= set(started[0])
    assert "once on this machine" in capfd.readouterr().err
    warming.wait()
    assert warming.ready(torch.float16, H100)


def test_what_is_compiled_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*given: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / "90.txt").write_text("")
    assert warming.ready(torch.float16, H100)


def test_where_no_process_can_be_started_kernels_are_compiled_when_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*given: Any, **options: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", start)
    assert warming.ready(torch.float16, H100)


def test_a_compiler_that_fails_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    monkeypatch.setattr(warming, "_running", {(torch.float16, 90): process})
    with pytest.warns(RuntimeWarning, match="ended with 3"):
        assert warming.ready(torch.float16, H100)
    assert warming.ready(torch.float16, H100), "no second warning: they are errors here"


def test_a_sample_does_not_say_that_all_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(warming, "compile_all", lambda variants, arch: ["a form: too large"])
    assert warming.main(["--arch", "90", "--sample"]) == 1
    assert not list(tmp_path.iterdir())
    assert warming.main(["--arch", "90"]) == 1
    assert (tmp_path / "90.txt").read_text() == "a form: too large"
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_asks_for_which(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        warming.main([])
    assert "--arch" in capsys.readouterr().err


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    monkeypatch.setattr(warming, "_running", {(torch.float16, 90): process})
    start = time.monotonic()
    warming.wait(limit_s=0.2)
    assert time.monotonic() - start < 5
    assert not warming.ready(torch.float16, H100)
    process.kill()
    process.wait()


def test_a_form_that_cannot_be_compiled_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = one_of_each(every_variant([torch.float16]))[:3]

    def fails(self: Variant, arch: int) -> None:
        if self is forms[1]:
            raise RuntimeError("too many registers")

    monkeypatch.setattr(Variant, "compile_for", fails)
    (told,) = warming.compile_all(forms, 90, processes=2)
    assert forms[1].name in told
    assert "too many registers" in told


@pytest.mark.slow
def test_the_process_beside_leaves_kernels_and_says_that_it_is_done(tmp_path: Path) -> None:
    """What it compiles is what a launch looks for: the cache stays as it is when the launch's own way compiles."""
    done, cache = tmp_path / "done.txt", tmp_path / "cache"
    asked = f"--arch 90 --dtype float16 --sample --done {done}".split()
    command = [sys.executable, "-m", "allaprima.backends.cuda.warming", *asked]
    subprocess.run(command, check=True, capture_output=True, env=_environment(cache))
    assert done.read_text() == ""
    before = set(cache.iterdir())
    assert len(before) >= 5
    subprocess.run([sys.executable, "-c", _AS_LAUNCHED], check=True, capture_output=True, env=_environment(cache))
    assert set(cache.iterdir()) == before


def _environment(cache: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**plain, "TRITON_CACHE_DIR": str(cache)}


_AS_LAUNCHED = (
    AS_IF_ON_HOPPER
    + """
import torch
from allaprima.backends.cuda.compile import every_variant, modules_of, one_of_each

for variant in one_of_each(every_variant([torch.float16], modules_of(90))):
    variant.warm_up()
"""
)
