from __future__ import annotations

import torch
from torch import nn

from allaprima.bench.floor import Ceiling, count_flops, measured_ceiling, on_meta, weight_bytes


def test_operations_of_a_convolution_by_hand() -> None:
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    height, width = 6, 8  # of the result, for 12x16
    by_hand = 2 * (2 * height * width) * 8 * 3 * 5 * 5
    assert count_flops(conv, [torch.randn(2, 3, 12, 16)]) == by_hand


def test_operations_of_attention_by_hand() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, kv = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 77, 8)
    assert count_flops(Attention(), [q, kv, kv]) == 2 * (2 * 4) * (16 * 77 * 8) * 2


def test_keyword_arguments_and_other_leaves() -> None:
    linear = nn.Linear(4, 5)
    assert count_flops(linear, [], {"input": torch.randn(3, 4)}) == 2 * 3 * 4 * 5


def test_counting_copies_no_weight_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ghost = on_meta(module)
    assert {t.device.type for t in ghost.state_dict().values()} == {"meta"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_shared_weights_are_counted_once() -> None:
    one = nn.Linear(10, 10, bias=False)
    assert weight_bytes(nn.ModuleList([one, one])) == 400


def test_the_floor_is_the_later_of_two() -> None:
    ceiling = Ceiling(flops_per_s=1e12, bytes_per_s=1e9)
    assert ceiling.floor_ms(2 * 10**9, 0) == 2
    assert ceiling.floor_ms(2 * 10**9, 5 * 10**6) == 5


def test_the_better_of_two_ceilings() -> None:
    assert Ceiling(1.0, 4.0).or_better(Ceiling(2.0, 3.0)) == Ceiling(2.0, 4.0)


def test_the_ceiling_is_of_this_machine() -> None:
    found = measured_ceiling(torch.float32, "cpu", tries=1)
    assert 1e9 < found.flops_per_s < 1e14
    assert 1e8 < found.bytes_per_s < 1e13
