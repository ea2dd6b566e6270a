"""What is the same for every row is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima.capture import DynamicDim
from allaprima.graph import Dim, aten, shape
from allaprima.rewrite.broadcast import DropBroadcast, SinkBroadcast, broadcast_shape
from allaprima.rewrite.clean import RemoveNoOps
from tests.rewrite.check import Case, randn

SINK = (RemoveNoOps(), SinkBroadcast())
BOTH = (*SINK, DropBroadcast())


def batch_of_x(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {0: DynamicDim(5, "batch")} if name == "x" else {}


ROW_WISE: dict[str, Callable[..., Any]] = {
    "silu": lambda m, t: F.silu(t),
    "number": lambda m, t: 2.0 * t + 1,
    "tensor without axes": lambda m, t: t * m.vector.sum(),
    "weights of the row": lambda m, t: t * m.vector,
    "weights with one row": lambda m, t: t * m.vector[None],
    "linear": lambda m, t: F.linear(t, m.matrix, m.vector),
    "layer_norm": lambda m, t: F.layer_norm(t, (4,), m.vector),
    "cat": lambda m, t: torch.cat([torch.sin(t), torch.cos(t)], -1),
    "slice": lambda m, t: t[:, 1:3],
    "unsqueeze": lambda m, t: t[:, None, :, None],
    "transpose": lambda m, t: t[:, :, None].transpose(1, 2),
    "permute": lambda m, t: t[:, :, None].permute(0, 2, 1),
    "cast": lambda m, t: t.to(torch.float32),
    "power": lambda m, t: t**2,
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_operators_run_on_one_row(name: str) -> None:
    function = ROW_WISE[name]
    case = Case(
        lambda m, x, t: function(m, t.expand(x.shape[0], -1)),
        randn(5, 3), randn(1, 4), dims=batch_of_x, matrix=randn(4, 4), vector=randn(4),
    )  # fmt: skip
    assert case.fires(*SINK) >= 1
    assert case.graph.results[0].target is aten.expand.default, "the broadcast is the last thing that happens"
    assert shape(case.graph.results[0].args[0])[0] == 1
    case.agrees((randn(1, 3), randn(1, 4)), (randn(2, 3), randn(1, 4)))


def test_tensors_without_axes_are_no_rows() -> None:
    case = Case(lambda m, x: x.sum() * torch.sin(x.sum() + 1), randn(5, 3), dims=batch_of_x)
    assert case.reason(*SINK) == ""


NOT_ROW_WISE: dict[str, Callable[..., Any]] = {
    "sum over rows": lambda m, t: t.sum(0),
    "softmax over rows": lambda m, t: t.softmax(0),
    "cat of rows": lambda m, t: torch.cat([t, t], 0),
    "rows backwards": lambda m, t: t.flip(0),
    "new first axis": lambda m, t: t[None],
    "transpose of rows": lambda m, t: t.transpose(0, 1),
}


@pytest.mark.parametrize("name", NOT_ROW_WISE)
def test_operators_that_mix_rows_stay_behind_the_broadcast(name: str) -> None:
    function = NOT_ROW_WISE[name]
    case = Case(lambda m, x, t: function(m, t.expand(x.shape[0], -1)), randn(5, 3), randn(1, 4), dims=batch_of_x)
    assert case.reason(*SINK) == ""
    case.agrees((randn(2, 3), randn(1, 4)))


def test_a_broadcast_of_columns_is_not_one_of_rows() -> None:
    case = Case(lambda m, x: torch.sin(x.expand(-1, 6)), randn(5, 1), dims=batch_of_x)
    assert case.reason(*SINK) == ""


def test_a_linear_over_the_broadcast_axis_itself_stays() -> None:
    case = Case(lambda m, x: F.linear(x[0, :1].expand(4), m.w), randn(5, 3), dims=batch_of_x, w=randn(2, 4))
    assert case.reason(*SINK) == ""
    case.agrees((randn(2, 3),))


def test_rows_that_differ_stop_the_broadcast() -> None:
    case = Case(lambda m, x, t: torch.sin(x * t.expand(x.shape[0], -1)), randn(5, 4), randn(1, 4), dims=batch_of_x)
    assert case.reason(*SINK) == ""
    assert case.fires(DropBroadcast()) == 1
    assert case.count(aten.expand.default) == 0
    case.agrees((randn(1, 4), randn(1, 4)))


def test_a_time_embedding_does_not_depend_on_the_batch() -> None:
    def function(m: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[None].expand(x.shape[0])[:, None] * m.frequencies[None]
        wave = torch.cat([torch.sin(angles), torch.cos(angles)], -1)
        hidden = F.silu(F.linear(F.silu(F.linear(wave, m.first)), m.second))
        return x + F.linear(hidden, m.third)[:, :, None, None]

    case = Case(
        function, randn(2, 6, 3, 3), torch.tensor(3.0, dtype=torch.float64), dims=batch_of_x,
        frequencies=randn(4), first=randn(5, 8), second=randn(7, 5), third=randn(6, 7),
    )  # fmt: skip
    assert case.fires(*BOTH) == 1
    assert case.count(aten.expand.default) == 0
    assert all(shape(n)[0] == 1 for n in case.graph.calls(aten.linear.default, aten.silu.default, aten.sin.default))
    for batch in (1, 3):
        case.agrees((randn(batch, 6, 3, 3), torch.tensor(500.0, dtype=torch.float64)))


def test_a_mask_is_not_expanded_for_attention() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(4)
        mask = (places[None, None, None, :] <= places[None, None, :, None]).expand(x.shape[0], 1, 4, 4)
        return F.scaled_dot_product_attention(x, x, x, mask)

    case = Case(function, randn(5, 2, 4, 8), dims=batch_of_x)
    assert case.fires(RemoveNoOps(), DropBroadcast()) == 1
    assert case.count(aten.expand.default) == 0
    case.agrees((randn(1, 2, 4, 8),))


def test_expanded_queries_and_needed_expands_stay() -> None:
    def query(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x[:1].expand(x.shape[0], -1, -1, -1), x, x)

    assert Case(query, randn(5, 2, 4, 8), dims=batch_of_x).reason(DropBroadcast()) == ""

    def both(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.row.expand(5, 4) + m.column.expand(5, 4) + x

    case = Case(both, randn(1, 1), dims=lambda name, t: {}, row=randn(1, 4), column=randn(5, 1))
    case.fires(DropBroadcast())
    case.agrees()


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([("s0", 4), (4,)], ("s0", 4)),
        ([("s0", 1, 3), ("s1", 1)], ("s0", "s1", 3)),
        ([("s0",), ("s1",)], None),
        ([(1,), ("s1", 1)], ("s1", 1)),
        ([(), (2,)], (2,)),
        ([("s0",), (4,)], None),
    ],
)
def test_shapes_broadcast_by_their_texts(shapes: list[tuple[Dim, ...]], expected: tuple[Dim, ...] | None) -> None:
    assert broadcast_shape(shapes) == expected


def test_a_number_without_axes_stays_expanded_since_it_would_not_decide_the_dtype() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x.float() + m.number.expand(4)

    case = Case(function, randn(5, 4), dims=batch_of_x, number=torch.tensor(0.1, dtype=torch.float64))
    assert case.reason(DropBroadcast()) == ""
    case.agrees((randn(2, 4),))
