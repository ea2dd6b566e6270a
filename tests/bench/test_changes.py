from __future__ import annotations

import json
from pathlib import Path

import pytest

from allaprima.bench import changes, gpu_session, workloads
from tests.tiny import tiny_pipeline


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_change_is_timed_and_nothing_is_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "subject", lambda *asked: tiny_pipeline())
    assert changes.main(["--size", "64x64"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(line)
    assert found["captures"] == 0
    assert list(found["loras"]["step_ms"]) == ["0", "1", "5"]
    assert len(found["switch"]["page_cache_s"]) == len(found["switch"]["pool_s"]) == 4
    assert found["diffusers"].keys() == {"eager", "ours"}
    (tmp_path / "log.txt").write_text(line + "\n")
    told = "\n".join(gpu_session.summary(tmp_path))
    assert "changes at 64x64: 0 captures; step in ms: 0 LoRAs" in told
    assert "ap.loras, ms: first" in told
    assert "diffusers' calls, eager, ms: load" in told
    assert "switch from pool, s:" in told


def test_the_lora_is_one_that_changes_what_it_is_for(tmp_path: Path) -> None:
    import allaprima as ap

    pipe = tiny_pipeline()
    path = changes.lora_file(pipe.unet, tmp_path / "a.safetensors", 0, rank=2)
    (lora,) = ap.loras(pipe, {str(path): 1.0}).values()
    linears = [n for n, _ in pipe.unet.named_modules() if n.endswith(changes.PROJECTIONS)]
    assert len(lora.applied) == 2 * len(linears)
    assert lora.unused == {}
