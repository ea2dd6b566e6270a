"""Records: the same graph after a round trip; anything else than a sound record of ours is captured again."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allaprima import record
from allaprima.capture import CallReader, bind_symbols, capture, dim_rules, same_program
from allaprima.graph import Graph


class Small(nn.Module):
    """Weights, a constant, sizes, several results and a branch on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.plain = torch.arange(8.0)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.linear(x) + self.plain / x.shape[1]
        first, second = y.reshape(x.shape[0], -1, 2, 4).unbind(2)
        return {"a": first * float("inf") if x.shape[1] % 2 else first, "b": [second.to(torch.float64), None]}


@pytest.fixture(scope="module")
def graph() -> Graph:
    module = Small().eval()
    call = CallReader(module.forward)((torch.randn(3, 6, 8),), {})
    return capture(module, module.forward, call, dim_rules(call.tensors)[0])


@pytest.fixture
def path(graph: Graph, tmp_path: Path) -> Path:
    where = tmp_path / "graphs" / "one.json.gz"
    assert record.save(graph, where)
    return where


def test_a_record_holds_the_same_graph(graph: Graph, path: Path) -> None:
    found = record.load(path)
    assert found is not None
    assert str(found) == str(graph)
    assert (found.ranges, found.guards) == (graph.ranges, graph.guards)
    assert found.guards, "the branch on a size should be a guard"
    assert found.outputs == graph.outputs
    assert found.constants
    assert found.constants.keys() == graph.constants.keys()
    assert all(torch.equal(found.constants[k], graph.constants[k]) for k in graph.constants)


def test_a_loaded_graph_computes_the_same_numbers(graph: Graph, path: Path) -> None:
    found, weights = record.load(path), dict(Small().named_parameters())
    assert found is not None
    x = torch.randn(5, 4, 8)

    def run(g: Graph) -> list[Any]:
        given = {"input": lambda p: x, "parameter": lambda p: weights[p.meta["source"]],
                 "constant": lambda p: g.constants[p.name]}  # fmt: skip
        return list(g.module()(*(given[p.meta["role"]](p) for p in g.placeholders())))

    for ours, theirs in zip(run(found), run(graph), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_a_loaded_graph_counts_as_the_same_program(graph: Graph, path: Path) -> None:
    found = record.load(path)
    assert found is not None
    tensors = (torch.zeros(2, 4, 8),)
    assert isinstance(bind_symbols(found, tensors), dict)
    assert same_program(found, graph, tensors)


def test_a_record_is_json_and_small(path: Path) -> None:
    json.loads(gzip.decompress(path.read_bytes()))
    assert path.stat().st_size < 4000


def test_no_record_means_none(tmp_path: Path) -> None:
    assert record.load(tmp_path / "nothing.json.gz") is None


def damaged(raw: bytes) -> dict[str, bytes]:
    text = json.loads(gzip.decompress(raw))
    evil = {**text, "nodes": [[*n[:2], "os.system", *n[3:]] if n[0] == "call_function" else n for n in text["nodes"]]}
    code = {**text, "guards": ["().__class__.__base__.__subclasses__()"]}
    return {
        "empty": b"",
        "truncated": raw[: len(raw) // 2],
        "a byte flipped": raw[:30] + bytes([raw[30] ^ 0xFF]) + raw[31:],
        "not gzip": b"{}",
        "not JSON": gzip.compress(b"\x80\x04K\x01."),
        "pickle": pickle.dumps({"format": 1}),
        "another version": gzip.compress(json.dumps({**text, "format": record.FORMAT + 1}).encode()),
        "a list": gzip.compress(b"[]"),
        "no nodes": gzip.compress(json.dumps({**text, "nodes": []}).encode()),
        "an operator of Python": gzip.compress(json.dumps(evil).encode()),
        "code for a guard": gzip.compress(json.dumps(code).encode()),
        "a wrong constant": gzip.compress(json.dumps({**text, "constants": {"x": {}}}).encode()),
    }


@pytest.mark.parametrize("what", [*damaged(gzip.compress(json.dumps({"nodes": [], "n": [*range(99)]}).encode()))])
def test_a_damaged_record_is_none_and_gone(path: Path, what: str) -> None:
    path.write_bytes(damaged(path.read_bytes())[what])
    assert record.load(path) is None
    assert not path.exists()


def test_nothing_is_left_behind_when_writing_fails(graph: Graph, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not record.save(graph, path.with_name("two.json.gz"))
    assert [p.name for p in path.parent.iterdir()] == ["one.json.gz"]


def test_a_folder_that_cannot_be_made_is_no_error(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not record.save(graph, tmp_path / "file" / "graphs" / "one.json.gz")


def test_a_graph_that_only_lives_in_this_process_is_not_written(graph: Graph, tmp_path: Path) -> None:
    twin = graph.copy()
    twin.calls()[0].kwargs = {"strange": object()}  # type: ignore[dict-item]
    assert not record.save(twin, tmp_path / "one.json.gz")
    assert not list(tmp_path.iterdir())
