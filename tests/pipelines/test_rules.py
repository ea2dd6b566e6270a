"""The rules on graphs of other families: what they write for GPUs computes the same, and docs/pipelines.md says it."""

from __future__ import annotations

from pathlib import Path

import pytest

import allaprima as ap
import allaprima.engine
from allaprima.config import Config
from allaprima.pipelines import as_task
from allaprima.rewrite import rules_for
from tests.pipelines.comparing import difference, draw, no_fallbacks
from tests.pipelines.table import HEADER, PIPELINES, row

SAMPLE = ("StableDiffusionXLPipeline", "StableDiffusionControlNetPipeline", "IP-Adapter", "StableDiffusion3Pipeline")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in PIPELINES]
)
def test_with_the_rules_for_cuda(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused operators' references stand for their kernels."""
    monkeypatch.setattr(allaprima.engine, "rules_for", lambda backend: rules_for("cuda"))
    build, task, options = PIPELINES[name]
    pipe = ap.optimize(build(), Config(backend="aten", cache_dir=cache))
    twin = as_task(pipe, task)
    ours = draw(twin, **options)
    assert {"GroupNormSilu", "ConvAdd"} <= ap.explain(pipe).fired.keys()
    no_fallbacks(pipe)
    with ap.pipelines.eager(pipe):
        assert difference(ours, draw(twin, **options)) < 2e-4


def test_the_table_has_a_row_for_each(repository: Path) -> None:
    lines = (repository / "docs" / "pipelines.md").read_text().splitlines()
    start = lines.index(HEADER[0])
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines[start + 2 : start + 2 + len(PIPELINES)]]
    assert rows == list(PIPELINES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_the_table_says_what_explain_says(name: str, repository: Path) -> None:
    pytest.importorskip("openvino")
    assert row(name) in (repository / "docs" / "pipelines.md").read_text().splitlines()
