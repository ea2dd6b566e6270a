"""One go on a GPU must leave its numbers behind, whatever fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from allaprima.bench import gpu_session
from allaprima.bench.command import Options
from allaprima.bench.gpu_session import SECTIONS, Outcome, Section, chosen, run, summary


def test_a_failure_and_a_limit_end_their_section_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = [
        Section("broken", "fails", 60, ("no_such_module", "platform ARCH")),
        Section("endless", "does not end", 1.5, ("http.server 0", "platform never")),
        Section("good", "works", 60, ("platform --terse",)),
    ]
    outcomes = run(sections, tmp_path, "--arch none")
    assert [(o.name, o.status) for o in outcomes] == [("broken", 1), ("endless", -1), ("good", 0)]
    assert outcomes[1].seconds < 8
    log = (tmp_path / "log.txt").read_text()
    assert "no_such_module" in log
    assert "its time was over" in log
    assert "Linux" in log or "macOS" in log or "Windows" in log
    assert log in capsys.readouterr().out.replace("\r", "")
    told = json.loads((tmp_path / "session.json").read_text())
    assert [s["name"] for s in told["sections"]] == ["broken", "endless", "good"]
    assert {p.name for p in tmp_path.iterdir()} == {"log.txt", "session.json", "bench.jsonl"}


def outcome(variant: str, **more: Any) -> dict[str, Any]:
    case = {"kind": "outcome", "what": "step", "width": 64, "height": 64, "batch": 1, "status": "ok", "note": ""}
    return {**case, "variant": variant, **more}


def test_lines_of_benchmarks_come_together_and_are_summed_up(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    (parts / "bench-0").mkdir(parents=True)
    lines = [
        {"kind": "run"},
        outcome("eager", median_ms=20.0, error=0.001, extra_s=0.1, flops=10**12, floor_share=0.1),
        outcome("ours", median_ms=5.0, error=0.0012, extra_s=0.25, flops=10**12, floor_share=0.4),
        outcome("xformers", status="failed", note="ModuleNotFoundError: xformers"),
    ]
    (parts / "bench-0" / "bench-sd15.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    gpu_session._gather(tmp_path, parts, "bench")
    gathered = [json.loads(x) for x in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [x["section"] for x in gathered] == ["bench"] * 4
    first = {
        "kind": "first", "variant": "ours", "import_s": 1.0, "load_s": 2.0, "prepare_s": 0.1, "first_picture_s": 9.0,
        "sizes": [{"size": "64x64", "pictures_s": [3.0, 0.6, 0.5], "peak_bytes": 2 * 10**9}],
    }  # fmt: skip
    (tmp_path / "log.txt").write_text("and more\n" + json.dumps(first) + "\n")
    told = "\n".join(summary(tmp_path))
    assert "eager 20.00 ms; ours 5.00 ms, new size +0.25 s; xformers ModuleNotFoundError: xformers" in told
    assert "median 1.200" in told
    assert "5.000 ms per TFLOP, floor share 40%" in told
    assert "first_picture 9.0" in told
    assert "pictures 3.00 0.60 0.50 s, new size +2.60 s, peak 2.00 GB" in told


def test_every_command_is_one_that_there_is(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """A word wrong here would be found out where time is dear."""
    import typer
    from typer.testing import CliRunner

    from allaprima.backends.cuda import warming
    from allaprima.bench import changes, command, first, operators, profiling

    asked: list[Options] = []
    monkeypatch.setattr(command, "run", asked.append)
    app = typer.Typer()
    app.command()(command.bench)
    for section in SECTIONS:
        for text in section.commands:
            module, *words = gpu_session._filled(
                text, {"FOLDER": "f", "PARTS": "p", "NUMBER": "0", "ARCH": "--arch sd15 --dtype float16", "XDIST": ""}
            ).split()
            if module == "pytest":
                assert [w for w in words if w.startswith("tests/") and not (repository / w).exists()] == []
            elif module == "allaprima.bench.command":
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, done.output
            else:
                main = {
                    "allaprima.bench.changes": changes, "allaprima.bench.first": first,
                    "allaprima.bench.operators": operators,
                    "allaprima.bench.profiling": profiling, "allaprima.backends.cuda.warming": warming,
                }[module].main  # fmt: skip
                with pytest.raises(SystemExit) as ended:
                    main([*words, "--help"])
                assert ended.value.code == 0
    from allaprima.bench.variants import VARIANTS
    from allaprima.bench.workloads import WORKLOADS

    for options in asked:
        assert set(options.variants.split(",")) <= set(VARIANTS)  # type: ignore[union-attr]
        assert set(options.what.split(",")) <= set(WORKLOADS)
        assert not options.memory
        assert options.arch == "sd15"


def test_sections_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [s.name for s in chosen("profile, compile")] == ["profile", "compile"]
    assert chosen(None) == list(SECTIONS)
    with pytest.raises(SystemExit, match=r"nothing: there are compile, kernels"):
        chosen("nothing")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    seen: list[Any] = []

    def start(*given: Any) -> list[Outcome]:
        seen.extend(given)
        return [Outcome("compile", "", 1.0, 0, ())]

    assert gpu_session.main(["--only", "compile", "--dtype", "bfloat16"], start) == 0
    assert seen[1:] == [(tmp_path / "out").resolve(), "--arch sd15 --dtype bfloat16"]
