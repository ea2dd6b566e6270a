"""The attention kernel against the reference in float64, for every form that it has."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from allaprima import ops
from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels import attention as kernel
from allaprima.backends.cuda.kernels.attention import Blocks, attention
from allaprima.errors import InputError

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
A100, H100 = (next(d for d in KNOWN if d.name == name) for name in ("A100", "H100"))
TINY = Blocks(16, 16, 4, 2)
"""Few rows and keys: many blocks from few tokens, as the interpreter is slow."""


@pytest.fixture(autouse=True)
def interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as integers and multiplies them as such: give its product their values."""
    product = interpreter.InterpreterBuilder.create_dot

    def value(handle: Any) -> Any:
        if not handle.dtype.is_bf16():
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, value(a), value(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def heads_of_product(
    batch: int, rows: int, heads: int, channels: int, parts: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """`parts` tensors [B, N, H, D] as slices of one product [B, N, …] that is surrounded and separated by NaN."""
    width = heads * channels
    whole = torch.full((batch + 2, rows + 2, parts * (width + 8) + 8), float("nan"), dtype=dtype, device=device)
    slices = []
    for part in range(parts):
        first = 8 + part * (width + 8)
        piece = whole[1:-1, 1:-1, first : first + width]
        piece.copy_(randn(batch, rows, width, seed=part))
        slices.append(piece.unflatten(-1, (heads, channels)))
    return slices


def assert_no_worse(
    ours: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> None:
    """Our error is at most twice eager's plus one rounding of the output (truth in float64)."""
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    truth = ops.attention(q.double(), k.double(), v.double(), wide, scale, causal)
    # Clones, as ATen's products on the CPU read what lies between the rows.
    eager = ops.attention(q.clone(), k.clone(), v.clone(), mask, scale, causal)
    assert ours.dtype == eager.dtype
    assert ours.shape == truth.shape
    assert ours.is_contiguous()
    rounding = torch.finfo(ours.dtype).eps * truth.abs()
    allowed = 2 * (eager.double() - truth).abs().max() + rounding
    error = (ours.double() - truth).abs()
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Blocks,
    scale: float | None = None,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> None:
    """The kernel is right, and writes every element of `out` and nothing else."""
    around = torch.full((q.numel() + 128,), float("nan"), dtype=q.dtype, device=q.device)
    out = around[64:-64].view(q.shape)
    result = attention(q, k, v, mask, scale, causal, parameters=blocks, out=out)
    assert result is out
    assert bool(around[:64].isnan().all())
    assert bool(around[-64:].isnan().all())
    assert_no_worse(result, q, k, v, scale, causal, mask)


# ---- every form ----------------------------------------------------------------------------------------------------
FLAGS = {
    "plain": {},
    "lazy": dict(lazy=True),
    "ones": dict(ones=True),
    "ones lazy": dict(ones=True, lazy=True),
}
SPLITS = {
    "padded": {},
    "split v": dict(split_v=True),
    "split": dict(split_k=True, split_v=True),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("splits", "dtype"),
    [*itertools.product(SPLITS, [torch.float16]), ("split", torch.bfloat16), ("split", torch.float32)],
)
def test_each_way_to_compute(flags: str, splits: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = heads_of_product(1, 21, 2, 40, 3, dtype, device)
    check(q, k, v, replace(TINY, **FLAGS[flags], **SPLITS[splits]))


@pytest.mark.parametrize(
    ("channels", "dtype"), [*itertools.product((8, 32, 64, 72, 80, 160), HALVES), (24, torch.float32)]
)
@pytest.mark.parametrize("split", [False, True])
def test_sizes_of_heads(channels: int, dtype: torch.dtype, split: bool, device: torch.device) -> None:
    q, k, v = heads_of_product(1, 19, 1, channels, 3, dtype, device)
    check(q, k, v, replace(TINY, split_k=split, split_v=split))


@pytest.mark.parametrize("columns", [0, 128, 256])
def test_wide_heads(columns: int, device: torch.device) -> None:
    for channels in (264, 512):
        q, k, v = heads_of_product(1, 18, 1, channels, 3, torch.float16, device)
        check(q, k, v, replace(TINY, columns=columns))


@pytest.mark.parametrize("head", [*kernel.HEADS])
def test_the_parameters_that_are_shipped(head: int, device: torch.device) -> None:
    for blocks in kernel.HALF_BLOCKS[head]:
        keys = min(blocks.keys + blocks.more_keys, 77) if blocks.single else blocks.keys + 5
        q, _, _ = heads_of_product(1, 9, 1, head, 3, torch.float16, device)
        _, k, v = heads_of_product(1, keys, 1, head, 3, torch.float16, device)
        check(q, k, v, blocks)
    for blocks in kernel.FLOAT_BLOCKS.get(head, ()):
        check(*heads_of_product(1, blocks.keys + 5, 1, head, 3, torch.float32, device), blocks)


# ---- sizes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 65), (17, 7), (16, 16), (7, 48)])
def test_odd_sizes(rows: int, keys: int, flags: str, device: torch.device) -> None:
    q, _, _ = heads_of_product(1, rows, 2, 40, 3, torch.float16, device)
    _, k, v = heads_of_product(1, keys, 2, 40, 3, torch.float16, device)
    check(q, k, v, replace(TINY, split_v=True, **FLAGS[flags]))


SINGLE = replace(TINY, single=True, split_k=True, split_v=True)
SINGLE_MORE = replace(SINGLE, more_keys=16)


@pytest.mark.parametrize(
    ("keys", "blocks"),
    [*itertools.product([1, 13, 16], [SINGLE]), *itertools.product([17, 29, 32], [SINGLE_MORE])],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_keys_in_one_block(
    keys: int, blocks: Blocks, causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    q, _, _ = heads_of_product(2, 19, 1, 40, 3, dtype, device)
    _, k, v = heads_of_product(2, keys, 1, 40, 3, dtype, device)
    check(q, k, v, blocks, causal=causal)


@pytest.mark.parametrize("rows", [1, 16, 33, 70])
@pytest.mark.parametrize("turns", [0, 2, 3, 9])
def test_blocks_of_rows_in_turn(rows: int, turns: int, device: torch.device) -> None:
    q, _, _ = heads_of_product(1, rows, 2, 40, 3, torch.float16, device)
    _, k, v = heads_of_product(1, 21, 2, 40, 3, torch.float16, device)
    check(q, k, v, replace(SINGLE_MORE, turns=turns))


# ---- masks ---------------------------------------------------------------------------------------------------------
MASKED = {
    "single": SINGLE,
    "more keys": SINGLE_MORE,
    "many": replace(TINY, split_v=True),
    "many, ones": replace(TINY, split_v=True, ones=True),
}


@pytest.mark.parametrize("blocks", MASKED)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 24), (19, 1), (2, 1, 1, 24), (2, 19, 24), (2, 2, 19, 24)], ids=str)
def test_masks(shape: tuple[int, ...], dtype: torch.dtype, added: bool, blocks: str, device: torch.device) -> None:
    keys = 16 if blocks == "single" else 24
    shape = tuple(keys if n == 24 else n for n in shape)
    q, _, _ = heads_of_product(2, 19, 2, 40, 3, dtype, device)
    _, k, v = heads_of_product(2, keys, 2, 40, 3, dtype, device)
    mask = randn(*shape).to(device)
    mask = mask.to(dtype) if added else mask > -0.5
    check(q, k, v, MASKED[blocks], mask=mask)


@pytest.mark.parametrize("blocks", MASKED)
@pytest.mark.parametrize("lowest", [None, -65504.0, -float("inf")])
def test_rows_that_may_look_at_little_or_nothing(blocks: str, lowest: float | None, device: torch.device) -> None:
    """A mask of text that was padded on either side, and a row without any key: 0, or with numbers the mean."""
    keys = 16 if blocks == "single" else 24
    seen = torch.ones(19, keys, dtype=torch.bool).tril()
    seen[:7, :2] = False
    seen[11] = False
    q, _, _ = heads_of_product(1, 19, 1, 40, 3, torch.float16, device)
    _, k, v = heads_of_product(1, keys, 1, 40, 3, torch.float16, device)
    mask = seen if lowest is None else torch.zeros(19, keys, dtype=torch.float16).masked_fill(~seen, lowest)
    check(q, k, v, MASKED[blocks], mask=mask.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_most_negative_number_as_a_mask(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = heads_of_product(1, 18, 1, 40, 3, dtype, device)
    mask = torch.full((18, 18), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    mask[3] = torch.finfo(dtype).min
    check(q, k, v, TINY, mask=mask, scale=2.0)


# ---- causal, layouts -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (40, 40), (33, 20), (20, 50), (77, 77)])
@pytest.mark.parametrize("flags", ["plain", "lazy", "ones"])
@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 32)])
def test_causal(rows: int, keys: int, flags: str, shape: tuple[int, int], device: torch.device) -> None:
    q, _, _ = heads_of_product(1, rows, 1, 40, 3, torch.float16, device)
    _, k, v = heads_of_product(1, keys, 1, 40, 3, torch.float16, device)
    check(q, k, v, replace(TINY, rows=shape[0], keys=shape[1], **FLAGS[flags]), causal=True)


def test_slices_of_one_table_of_text(device: torch.device) -> None:
    """k and v of all layers lie in one [B, 77, …]; q in another product."""
    table = torch.full((2, 19, 960), float("nan"), dtype=torch.float16, device=device)
    table[..., 320:640] = randn(2, 19, 320).to(table)
    k, v = (table[..., i : i + 160].unflatten(-1, (4, 40)) for i in (320, 480))
    (q,) = heads_of_product(2, 18, 4, 40, 1, torch.float16, device)
    for blocks in (replace(TINY, split_v=True, ones=True), replace(TINY, keys=32, single=True)):
        check(q, k, v, blocks)


def test_heads_before_rows(device: torch.device) -> None:
    """Any order of axes will do while channels are dense."""
    q, k, v = (randn(2, 3, 20, 32, seed=i).to(device, torch.float16).transpose(1, 2) for i in range(3))
    check(q, k, v, TINY)


def test_one_batch_for_all(device: torch.device) -> None:
    """A stride of 0, as after expand; and a size of 1 with whatever stride."""
    q, k, v = heads_of_product(1, 18, 1, 32, 3, torch.float16, device)
    check(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), TINY)
    odd = q.as_strided(q.shape, (3, q.stride(1), 5, 1), q.storage_offset())
    check(odd, k, v, TINY)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Strides with which offsets of 32 bits would wrap around; the memory between is reserved, not touched."""
    far = (1 << 31) + 64
    store = torch.empty(far + 4096, dtype=torch.float16, device=device)
    for axis in (0, 1, 2):
        sizes, strides = [1, 1, 1, 32], [32, 32, 32, 1]
        sizes[axis], strides[axis] = 2, far
        k, v = (store.as_strided(sizes, strides, i * 64) for i in (1, 2))
        for t, seed in ((k, 1), (v, 2)):
            t.copy_(randn(*sizes, seed=seed))
        q = randn(*sizes, seed=3).to(device, torch.float16)
        if axis == 1:
            assert "32 bits" in (kernel.supports(q, k, v) or "")
            continue
        check(q, k, v, TINY)
        far_q = store.as_strided(sizes, strides, 192).copy_(q)
        check(far_q, k, v, TINY)


def test_rows_beyond_32_bits(device: torch.device) -> None:
    """Blocks of rows and of keys that lie further apart than 32 bits reach."""
    stride = 1 << 23
    rows = 272
    store = torch.empty(stride * (rows - 1) + 512, dtype=torch.float16, device=device)
    q, k, v = (store.as_strided((1, rows, 1, 32), (0, stride, 0, 1), i * 64) for i in range(3))
    assert q.storage_offset() + stride * (rows - 1) > 1 << 31
    for i, t in enumerate((q, k, v)):
        t.copy_(randn(1, rows, 1, 32, seed=i))
    check(q, k, v, replace(TINY, rows=64, keys=64))


# ---- numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("gain", [0.0, 30.0, 1000.0])
def test_scores_of_any_size(flags: str, gain: float, device: torch.device) -> None:
    """Scores up to 1e7: the exponentials of all but the largest vanish, none overflows."""
    q, k, v = heads_of_product(1, 18, 1, 40, 3, torch.float16, device)
    q.mul_(gain)
    check(q, k, v, replace(TINY, split_v=True, **FLAGS[flags]))


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("step", [-3.0, 0.3, 5.0, 14.0, 300.0])
def test_scores_that_rise_or_fall_from_block_to_block(flags: str, step: float, device: torch.device) -> None:
    """The running maximum moves by less or more than the lazy threshold, upwards or downwards, at every block."""
    q, k, v = heads_of_product(1, 18, 1, 40, 3, torch.float16, device)
    q, k, v = q[:, :], k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1)
    q[..., 0] = 1.0
    k[..., 0] = (torch.arange(72, device=device) // 16 * step)[None, :, None]
    check(q, k, v, replace(TINY, split_v=True, **FLAGS[flags]), scale=1.0)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale: float, device: torch.device) -> None:
    q, k, v = heads_of_product(1, 18, 1, 32, 3, torch.float16, device)
    check(q, k, v, TINY, scale=scale)


def test_nan_in_one_head_stays_there(device: torch.device) -> None:
    q, k, v = heads_of_product(1, 18, 2, 40, 3, torch.float16, device)
    v[0, 3, 1, 2] = float("nan")
    found = attention(q, k, v, parameters=replace(TINY, split_v=True, ones=True))
    assert bool(found[:, :, 1, 2].isnan().all())
    assert int(found.isnan().sum()) == 18


# ---- the call ------------------------------------------------------------------------------------------------------
def test_it_says_what_it_cannot_take(device: torch.device) -> None:
    q, k, v = heads_of_product(1, 18, 2, 40, 3, torch.float16, device)
    assert kernel.supports(q, k, v) is None
    assert kernel.supports(q, k, v, causal=True) is None
    refused = {
        "the mask is": (q, k, v, torch.zeros(18, 18, device=device)),
        "does not broadcast": (q, k, v, torch.zeros(2, 18, dtype=torch.bool, device=device)),
        "together": (q, k, v, torch.ones(18, 18, dtype=torch.bool, device=device), None, True),
        "scale": (q, k, v, None, 0.0),
        "are not [B, N, H, D]": (q, k, v[:, :3]),
        "are not [B, N, H, D] and": (q[..., :8], k, v),
        "multiple of 8 up to 512": (q[..., :36], k[..., :36], v[..., :36]),
        "multiple of 8 up to 160": tuple(t.float().repeat(1, 1, 1, 5) for t in (q, k, v)),
        "torch.float64": (q.double(), k.double(), v.double()),
        "k is torch.float32": (q, k.float(), v),
        "not dense": (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        "strides": (torch.zeros(1, 18, 2, 44, dtype=q.dtype, device=device)[..., :40], k, v),
        "16 bytes": (torch.zeros(1, 18, 2, 48, dtype=q.dtype, device=device)[..., 4:44], k, v),
        "0 keys": (q, k[:, :0], v[:, :0]),
        "with a mask": (*(t.repeat(1, 1, 1, 4) for t in (q, k, v)), None, None, True),
    }
    for reason, arguments in refused.items():
        assert reason in (kernel.supports(*arguments) or ""), reason
        with pytest.raises(InputError):
            attention(*arguments, parameters=TINY)
    for blocks in (replace(TINY, single=True), replace(TINY, keys=32, single=True, more_keys=16)):
        with pytest.raises(InputError, match="one block"):
            attention(q, k, v, parameters=blocks)
    with pytest.raises(InputError, match="no column"):
        attention(*(torch.zeros(1, 2, 1, 64, dtype=q.dtype, device=device),) * 3, parameters=replace(TINY, ones=True))
    for out in (q.new_empty(1, 18, 80), q.new_empty(1, 18, 2, 80)[..., :40], q.float(), q.new_empty(1, 18, 2, 48)):
        with pytest.raises(InputError, match="out"):
            attention(q, k, v, parameters=TINY, out=out)


def test_no_rows(device: torch.device) -> None:
    q, k, v = heads_of_product(1, 18, 2, 40, 3, torch.float16, device)
    assert attention(q[:, :0], k, v, parameters=TINY).shape == (1, 0, 2, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, "causal", "bool", "added"])
def test_what_it_launches_is_among_the_variants(dtype: torch.dtype, mask: str | None) -> None:
    """Sizes do not matter: none of them compiles anything."""
    names = {v.name for v in kernel.variants(dtype)}
    for channels, rows, keys in itertools.product((8, 32, 40, 48, 64, 80, 128, 160, 512), (1, 64, 4096), (1, 77, 4096)):
        q = torch.empty(1, rows, 1, channels, dtype=dtype, device="meta")
        k = torch.empty(1, keys, 1, channels, dtype=dtype, device="meta")
        masks = {"bool": torch.empty(rows, keys, dtype=torch.bool, device="meta")}
        masks["added"] = masks["bool"].to(dtype)
        for device in KNOWN:
            if kernel.supports(q, k, k, masks.get(mask or ""), None, mask == "causal"):
                continue
            for blocks in kernel.candidates(rows, keys, channels, dtype, device, masked=mask is not None):
                launch = kernel.launch_of(
                    q, k, k, q, None, mask == "causal", mask=masks.get(mask or ""), parameters=blocks
                )
                assert launch.variant.name in names
                types = [a.dtype if isinstance(a, torch.Tensor) else type(a) for a in launch.arguments]
                assert types == [a if isinstance(a, torch.dtype) else type(a) for a in launch.variant.arguments]


def test_a_column_of_ones_fits_every_head_of_its_class() -> None:
    for channels in range(8, 513, 8):
        head = kernel.head_class(channels)
        for blocks in kernel.HALF_BLOCKS[head]:
            k1, k2, v1, v2 = blocks.widths(head)
            assert k1 + k2 >= channels
            assert blocks.columns or v1 + v2 >= channels
            assert not blocks.ones or v1 + v2 > channels
            assert all(first < channels for first, second in ((k1, k2), (v1, v2)) if second)


# ---- the choice ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KNOWN, ids=lambda d: d.name)
@pytest.mark.parametrize("channels", kernel.HEADS)
def test_every_size_has_a_candidate_that_fits(channels: int, device: object) -> None:
    masks = (False, True) if channels <= kernel.MASKED_HEADS[-1] else (False,)
    for rows, keys, masked in itertools.product((1, 64, 16384), (1, 64, 65, 77, 100, 4096), masks):
        found = kernel.candidates(rows, keys, channels, torch.float16, device, heads=16, masked=masked)
        assert found
        for blocks in found:
            assert blocks.shared_bytes(channels, 2) <= device.shared_bytes
            assert not blocks.single or blocks.holds(keys)


def test_estimates_grow_with_the_work() -> None:
    for channels in (40, 64, 80, 160, 512):
        for blocks in kernel.HALF_BLOCKS[kernel.head_class(channels)]:
            if blocks.single:
                continue
            times = [kernel.estimate_us(2, n, n, 8, channels, 2, blocks, H100) for n in (64, 256, 1024, 4096, 16384)]
            assert times == sorted(times)
            assert times[0] >= kernel.LAUNCH_US
            slow, fast = (kernel.estimate_us(2, 4096, 4096, 8, channels, 2, blocks, d) for d in (A100, H100))
            assert slow > fast


def test_estimates_are_near_what_was_measured() -> None:
    """On an H100, 2 × 8 heads (512 channels: one), in a CUDA graph."""
    both = dict(split_k=True, split_v=True)
    measured = [
        (4096, 4096, 40, Blocks(128, 64, 8, 3, ones=True, **both), 176.2),
        (16384, 16384, 40, Blocks(128, 64, 8, 3, ones=True, **both), 2665.2),
        (4096, 4096, 80, Blocks(128, 64, 8, 3, registers=128, **both), 206.3),
        (4096, 4096, 80, Blocks(64, 64, 4, 3, **both), 251.4),
        (256, 256, 160, Blocks(64, 64, 4, 2, **both), 7.8),
        (1024, 1024, 160, Blocks(128, 64, 8, 3, **both), 25.8),
        (4096, 4096, 512, Blocks(64, 32, 4, 2, columns=256), 173.9),
        (9216, 9216, 512, Blocks(64, 32, 4, 2, columns=256), 1348.1),
        (16384, 16384, 512, Blocks(128, 16, 8, 3, columns=256), 2610.6),
        (4096, 77, 40, Blocks(64, 64, 4, 3, single=True, more_keys=16, turns=2, **both), 8.8),
        (1024, 77, 160, Blocks(64, 64, 4, 2, single=True, more_keys=16, **both), 8.0),
    ]
    for rows, keys, channels, blocks, time in measured:
        batch, heads = (1, 1) if channels == 512 else (2, 8)
        estimate = kernel.estimate_us(batch, rows, keys, heads, channels, 2, blocks, H100)
        assert estimate == pytest.approx(time, rel=0.15), blocks


def test_forms_that_spill_before_hopper_are_left_out_there() -> None:
    """As compiling them for sm_80 shows: 492, 328, 36 and 460 bytes of spilled registers."""
    both = dict(split_k=True, split_v=True)
    spilling = {
        160: (Blocks(64, 64, 4, 2, **both), Blocks(128, 64, 8, 3, **both)),
        512: (Blocks(64, 32, 4, 2, columns=256),),
    }
    for channels, forms in spilling.items():
        old, new = (kernel.candidates(4096, 4096, channels, torch.float16, d) for d in (A100, H100))
        assert not set(forms) & set(old)
        assert set(forms) <= set(new)
