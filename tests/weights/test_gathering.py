"""Slabs: nothing overlaps, little is lost, and a gathered parameter is still a parameter like any other."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from allaprima.weights import gathering
from allaprima.weights.binding import Sources
from allaprima.weights.gathering import ALIGNMENT, PORTION_BYTES, Unit, gather, offsets, portions, segment_bytes

MIB = 1 << 20
SIZES = st.lists(st.one_of(st.integers(1, 4096), st.integers(1, 8 * MIB), st.integers(8 * MIB, 90 * MIB)), max_size=60)


@given(SIZES)
def test_places_are_aligned_in_order_and_apart(sizes: list[int]) -> None:
    runs = portions(sizes)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    for run in runs:
        there = [sizes[i] for i in run]
        starts = offsets(there)
        assert all(start % ALIGNMENT == 0 for start in starts)
        assert all(a + n <= b < a + n + ALIGNMENT for a, n, b in zip(starts, there, starts[1:], strict=False))
        assert sum(there) - max(there) <= PORTION_BYTES


@given(SIZES)
def test_the_segments_are_the_least_of_all_cuts(sizes: list[int]) -> None:
    """At least no more than those of slabs that are closed once they are full."""

    def held(runs: list[list[int]]) -> int:
        return sum(segment_bytes(offsets(run)[-1] + run[-1]) for run in runs)

    full: list[list[int]] = []
    for size in sizes:
        if full and sum(full[-1]) + size <= PORTION_BYTES // 2:
            full[-1].append(size)
        else:
            full.append([size])
    assert held([[sizes[i] for i in run] for run in portions(sizes)]) <= held(full)


def test_little_is_lost_under_many_odd_sizes() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = [int(n) * 1000 for n in torch.randint(3000, 7000, (200,), generator=random)]
    held = sum(
        segment_bytes(offsets(there)[-1] + there[-1]) for there in ([sizes[i] for i in r] for r in portions(sizes))
    )
    assert held - sum(sizes) < 0.02 * sum(sizes)


def test_units_move_in_the_order_of_their_addresses_and_groups_share_no_slab() -> None:
    moved: list[tuple[int, int]] = []

    def unit(address: int) -> Unit:
        return Unit(address, 100, torch.device("cpu"), lambda place: moved.append((address, place.data_ptr())))

    kept = []  # or a slab may come where the last one was
    fill = gathering._fill
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gathering, "_fill", lambda units: (kept.append([u.address for u in units]), fill(units)))
        gather([unit(a) for a in (5, 1, 9)], [unit(a) for a in (4, 8, 2)])
    assert kept == [[1, 5, 9], [2, 4, 8]]
    assert [address for address, _ in moved] == [1, 5, 9, 2, 4, 8]


class Mixed(nn.Module):
    """Parameters of several dtypes and layouts, tied, shared, empty, and one without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.tied = nn.Linear(5, 3), nn.Linear(5, 3)
        self.tied.weight = self.plain.weight
        self.narrow = nn.Parameter(torch.randn(7, 3).half())
        self.taps = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.number = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
        self.small = nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), requires_grad=False)
        both = torch.randn(8)
        self.first, self.second = nn.Parameter(both[:5]), nn.Parameter(both[3:])
        self.expanded = nn.Parameter(torch.randn(1).expand(4))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.absent = nn.Parameter(torch.empty(3, device="meta"))
        self.register_buffer("mean", torch.randn(3))


@pytest.fixture
def mixed() -> Mixed:
    return Mixed()


def gathered(module: nn.Module) -> Sources:
    sources = Sources(module)
    sources.refresh()
    gather(sources.scattered())
    return sources


STAY = {"first", "second", "expanded", "empty", "absent"}


def test_what_has_memory_to_itself_moves_and_nothing_else(mixed: Mixed) -> None:
    before = {name: (p.data_ptr(), p.detach().clone(), p.stride()) for name, p in mixed.named_parameters()}
    mean = mixed.mean.data_ptr()
    sources = gathered(mixed)
    for name, parameter in mixed.named_parameters():
        address, value, stride = before[name]
        assert (parameter.data_ptr() == address) == (name in STAY), name
        assert parameter.stride() == stride
        if name != "absent":
            assert torch.equal(parameter.float(), value.float()), name
    assert mixed.mean.data_ptr() == mean
    assert mixed.tied.weight is mixed.plain.weight
    assert sources.scattered() == [], "once is enough"
    assert sources.refresh() == set(), "moving is no change"


def test_a_gathered_parameter_is_all_that_its_storage_holds(mixed: Mixed) -> None:
    gathered(mixed)
    for name, parameter in mixed.named_parameters():
        if name not in STAY:
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            assert parameter.storage_offset() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_small(copied: Any) -> None:
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(50)))
    expected = len(pickle.dumps(module))
    gathered(module)
    assert len(pickle.dumps(module)) < 1.1 * expected
    twin = copied(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(p.any() for p in twin.parameters())


def test_saving_and_loading(tmp_path: Any) -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    gathered(module)
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())
    places = [p.data_ptr() for p in module.parameters()]
    module.load_state_dict({name: value + 1 for name, value in found.items()})
    assert places == [p.data_ptr() for p in module.parameters()]
    assert torch.equal(module.state_dict()["1.bias"], found["1.bias"] + 1)


def test_the_slab_goes_with_its_last_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = []
    empty = torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        if options.get("dtype") == torch.uint8:
            slabs.append(weakref.ref(made.untyped_storage()))
        return made

    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    monkeypatch.setattr(torch, "empty", watched)
    sources = gathered(module)
    (slab,) = slabs
    sources.release()
    gc.collect()
    assert slab() is None
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_another_module_that_holds_the_numbers_keeps_them(mixed: Mixed) -> None:
    other = nn.Parameter(mixed.narrow.data)
    before = other.detach().clone()
    gathered(mixed)
    with torch.no_grad():
        mixed.narrow.zero_()
    assert torch.equal(other, before)
