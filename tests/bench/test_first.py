from __future__ import annotations

import json

import pytest

from allaprima.bench import first, workloads
from tests.tiny import tiny_pipeline


def test_from_the_start_to_the_pictures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(workloads, "subject", lambda *asked: tiny_pipeline())
    assert first.main(["--variant", "eager", "--sizes", "64x64,128x64", "--steps", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith('{"kind": "first"'), "the summary of a session looks for it"
    found = json.loads(line)
    assert [s["size"] for s in found["sizes"]] == ["64x64", "128x64"]
    assert all(len(s["pictures_s"]) == 3 and min(s["pictures_s"]) > 0 and s["peak_bytes"] > 0 for s in found["sizes"])
    assert found["first_picture_s"] >= found["load_s"] + found["prepare_s"]
    assert found["loaded_bytes"] > 0
