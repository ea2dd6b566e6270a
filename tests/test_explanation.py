"""`explain`: everything that happened since `optimize`, and nothing silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import ConfigError
from tests.test_pipelines import draw
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.getbasetemp() / "cache"
    made = ap.optimize(tiny_pipeline(), Config(cache_dir=cache))
    draw(made, num_inference_steps=3)
    return made


def test_calls_and_runs_are_counted(pipe: Any) -> None:
    found = ap.explain(pipe)
    assert found.calls == {"text_encoder": 2, "unet": 4, "vae.decoder": 1, "vae.encoder": 0}
    assert found.captures + found.loaded == 3
    runs = {(s.component, s.time): s.runs for s in found.stages}
    assert runs["unet", "prompt"] == 1
    assert runs["unet", "schedule"] == 1
    assert runs["unet", "step"] == 4
    assert found.fallbacks == {}


def test_stages_say_what_they_hold_and_who_runs_them(pipe: Any) -> None:
    stages = {(s.component, s.time): s for s in ap.explain(pipe).stages}
    assert stages["unet", "step"].attentions == 14
    assert stages["unet", "step"].convolutions > 20
    assert stages["unet", "step"].backend.startswith(("openvino", "aten"))
    assert stages["unet", "prompt"].linears >= 1
    assert stages["vae.decoder", "step"].attentions == 1


def test_rules_and_memory_are_told(pipe: Any) -> None:
    found = ap.explain(pipe)
    assert found.fired["AttentionWithoutTransposes"] >= 14
    parameters = [
        p for part in (pipe.unet, pipe.text_encoder, pipe.vae.decoder, pipe.vae.encoder) for p in part.parameters()
    ]
    assert 0 < found.weight_bytes <= sum(p.numel() * p.itemsize for p in parameters)
    assert all(d.node and d.rule and d.reason for d in found.declined)


def test_it_prints_well(pipe: Any) -> None:
    text = str(ap.explain(pipe))
    for words in (
        "captures",
        "unet · step",
        "rules fired",
        "AttentionWithoutTransposes",
        "calls that ran eagerly\n  none",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 200


def test_it_goes_into_json(pipe: Any) -> None:
    again = json.loads(json.dumps(ap.explain(pipe).as_dict()))
    assert again["calls"]["unet"] == ap.explain(pipe).calls["unet"]


def test_a_rebuild_is_counted_and_timed(pipe: Any) -> None:
    before = ap.explain(pipe)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.1)
    draw(pipe)
    after = ap.explain(pipe)
    assert after.rebuilds == before.rebuilds + 1
    assert after.rebuild_s > before.rebuild_s
    assert after.captures == before.captures


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_call_that_ran_eagerly_is_listed_with_its_reason(tmp_path: Path) -> None:
    module = ap.optimize(DataDependent().eval(), Config(cache_dir=tmp_path))
    for x in (torch.ones(2, 2), -torch.ones(2, 2), torch.ones(3, 2)):
        assert torch.equal(module(x), x * 2 if x.sum() > 0 else x)
    found = ap.explain(module)
    ((reason, count),) = found.fallbacks.items()
    assert "DataDependent cannot be captured" in reason
    assert count == 3
    assert reason in str(found)
    assert found.captures == 0


def test_what_is_not_optimized_has_no_explanation() -> None:
    with pytest.raises(ConfigError, match="optimize"):
        ap.explain(nn.Linear(2, 2))
