"""The doctor looks at everything, advises where something is amiss, and never fails itself."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from allaprima import doctor
from allaprima.doctor import Finding, examine


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_it_looks_at_everything() -> None:
    names = set(by_name(examine()))
    assert {"Python", "torch", "diffusers", "transformers", "OpenVINO", "GPU", "Processor", "bf16", "Cache"} <= names


def test_what_is_amiss_has_advice() -> None:
    assert all(finding.advice for finding in examine() if finding.state != "good")


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken() -> Iterator[Finding]:
        raise OSError("libtorch is gone")
        yield

    monkeypatch.setattr(doctor, "LOOKS", (_broken,))
    assert examine() == [Finding("broken", "bad", "OSError: libtorch is gone", "reinstall allaprima and torch")]


@pytest.mark.parametrize(
    ("version", "state"), [("2.10.1", "bad"), ("2.11.0", "good"), ("2.13.0+cpu", "good"), ("2.14.0", "bad")]
)
def test_an_untested_torch_is_named(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    finding = doctor._package("torch", *doctor.TORCH_RANGE)
    assert finding.state == state
    assert ("pip install 'torch>=2.11,<2.14'" in finding.advice) is (state == "bad")


def test_missing_openvino_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    (finding,) = doctor._openvino()
    assert finding.state == "note"
    assert "allaprima[cpu]" in finding.advice


def test_a_driver_without_cuda_in_torch_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "NVIDIA H100, 570")
    (finding,) = doctor._gpu()
    assert finding.state == "bad"
    assert "allaprima[cuda]" in finding.advice


def test_the_cache_is_measured(private_cache: Path) -> None:
    private_cache.mkdir(parents=True, exist_ok=True)
    (private_cache / "graph.json").write_bytes(bytes(2**21))
    (finding,) = doctor._cache()
    assert "files, 2.0 MiB" in finding.found or "MiB" in finding.found
    assert str(private_cache) in finding.found


def test_a_cache_that_has_grown_may_be_deleted(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_cache.mkdir(parents=True, exist_ok=True)
    (private_cache / "graph.json").write_bytes(bytes(8))
    monkeypatch.setattr(doctor, "CACHE_LIMIT_BYTES", 1)
    (finding,) = doctor._cache()
    assert (finding.state, "delete" in finding.advice) == ("note", True)


def test_little_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: 2**29)
    (finding,) = doctor._memory()
    assert finding.state == "note"


def test_a_finding_prints_its_advice_and_no_markup_of_others() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(Finding("GPU", "bad", "[red]odd[/]", "do this"))
    assert captured.get() == "✗ GPU: [red]odd[/]\n    → do this\n"
