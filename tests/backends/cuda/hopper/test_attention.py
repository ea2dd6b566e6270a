"""Attention for Hopper: simulated with its barriers, registers and inline PTX, against the reference in float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels.hopper import attention as kernel
from allaprima.backends.cuda.kernels.hopper.attention import BLOCKS, Blocks, variants
from allaprima.backends.cuda.kernels.hopper.form import Tile
from allaprima.errors import InputError

from .gluon_simulation import Bars, Descriptor, Int, Pointer, Shared, Simulation, _nothing

HALVES = (torch.float16, torch.bfloat16)


# ---- registers and inline PTX --------------------------------------------------------------------------------------
def to_registers(x: torch.Tensor) -> torch.Tensor:
    """[64, W] as WGMMA accumulators lie: [W/2 registers, 128 threads]."""
    warps = x.view(4, 2, 8, x.shape[1] // 8, 4, 2)  # warp, upper or lower rows, lane / 4, block, lane % 4, pair
    return warps.permute(3, 1, 5, 0, 2, 4).reshape(-1, 128)


def from_registers(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, 2, 4, 8, 4).permute(3, 1, 4, 0, 5, 2).reshape(64, -1)


class Ptx:
    """Executes straight PTX with one forward branch, for 128 threads at once."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"\.reg[^;]*;|[{}]", " ", text)
        self.statements = [s.strip() for s in re.split(r"[;\n]", text) if s.strip()]

    def run(self, operands: list[torch.Tensor], num_results: int) -> list[torch.Tensor]:
        self.values: dict[str, torch.Tensor] = {f"${i}": x for i, x in enumerate(operands)}
        active = torch.ones(128, dtype=torch.bool)
        for statement in self.statements:
            if statement == "DONE:":
                active[:] = True
                continue
            if statement.startswith("@!p bra DONE"):
                active &= self.values["p"]
                continue
            name, rest = statement.split(None, 1)
            target, *sources = [s.strip() for s in rest.split(",")]
            result = self.result(name, [self.value(s) for s in sources])
            old = self.values.get(target, torch.zeros_like(result))
            self.values[target] = torch.where(active, result, old.to(result.dtype))
        return [self.values[f"${i}"] for i in range(num_results)]

    def value(self, source: str) -> torch.Tensor:
        if source in self.values:
            return self.values[source]
        if source.startswith("0f"):
            bits = int(source[2:], 16)
            return torch.tensor(bits - (1 << 32 if bits >> 31 else 0), dtype=torch.int32).view(torch.float32)
        return torch.tensor(int(source, 0) & 0x7FFFFFFF, dtype=torch.int32)

    @staticmethod
    def result(name: str, x: list[torch.Tensor]) -> torch.Tensor:
        def whole(i: int) -> torch.Tensor:
            return x[i].view(torch.int32) if x[i].dtype == torch.float32 else x[i]

        match name:
            case "setp.neu.f32":
                return x[0] != x[1]
            case "setp.neu.or.f32":
                return (x[0] != x[1]) | x[2]
            case "vote.sync.any.pred":
                return x[0].view(4, 32).any(1, keepdim=True).expand(4, 32).reshape(-1)
            case "mul.f32":
                return x[0] * x[1]
            case "sub.f32":
                return x[0] - x[1]
            case "neg.f32":
                return -x[0]
            case "max.f32":
                return torch.maximum(x[0], x[1])
            case "fma.rn.f32":
                return (x[0].double() * x[1].double() + x[2].double()).float()
            case "ex2.approx.ftz.f32":
                return torch.exp2(x[0])
            case "mov.b32":
                return whole(0)
            case "shl.b32":
                return whole(0) << int(x[1])
            case "add.s32":
                return whole(0) + whole(1)
        raise AssertionError(name)


def inline_asm(asm: str, constraints: Any, inputs: list[torch.Tensor], _dtype: Any, _pure: bool, pack: int) -> Any:
    registers = [to_registers(x.expand(64, -1).float().contiguous()) for x in inputs]
    program, made = Ptx(asm), []
    for first in range(0, len(registers[0]), pack):
        operands = [x[first + i] for x in registers for i in range(pack)]
        results = program.run([torch.zeros(128)] * pack + operands, pack)
        if str(constraints).count("0,"):  # results are tied to the first input
            results = program.run([*operands[:pack], *operands], pack)
        made += [r if r.dtype == torch.float32 else r.view(torch.float32) for r in results]
    return from_registers(torch.stack(made)).as_subclass(Registers)


# ---- the simulation ------------------------------------------------------------------------------------------------
class Registers(torch.Tensor):
    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)


class Output(Pointer):
    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.numbers.dtype)

    def __add__(self, other: Any) -> Output:
        return Output(self.numbers, self.offset + other)


class AttentionSimulation(Simulation):
    def __init__(self, programs: tuple[int, ...], seed: int) -> None:
        super().__init__(0, 1, seed)
        self.programs = programs

    def gl(self) -> SimpleNamespace:
        def zeros(shape: Any, dtype: Any, _layout: Any = None) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype).as_subclass(Registers)

        def where(condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
            return torch.where(condition, a, b).as_subclass(Registers)

        def static_assert(condition: bool) -> None:
            assert condition

        own = dict(
            program_id=lambda axis: Int(self.programs[axis]), zeros=zeros, where=where, static_assert=static_assert,
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), maximum=torch.maximum, ceil=torch.ceil,
            broadcast=torch.broadcast_tensors, zeros_like=torch.zeros_like, inline_asm_elementwise=inline_asm,
            exp2=torch.exp2, convert_layout=lambda value, layout, assert_trivial=False: value,
            DotOperandLayout=_nothing, BlockedLayout=_nothing,
        )  # fmt: skip
        return SimpleNamespace(**vars(super().gl()) | own)

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        made = super().allocate(dtype, shape, layout)
        return made.index(0) if isinstance(made, Bars) and shape == [1] else made

    def warpgroup_mma(self, a: Any, b: Any, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
        assert is_async
        self.own.products.append((a, b, acc, use_acc))
        return acc

    def warpgroup_mma_wait(self, num_outstanding: int, deps: tuple[torch.Tensor, ...]) -> Any:
        self.pause()
        while len(self.own.products) > num_outstanding:
            a, b, acc, use_acc = self.own.products.pop(0)
            left = a if isinstance(a, torch.Tensor) else a.view
            product = (left.float() @ b.view.float()).as_subclass(torch.Tensor)
            acc.copy_(product + (acc if use_acc else 0.0))
        return deps if len(deps) > 1 else deps[0]


def part(self: Shared, start: int, length: int, dim: int) -> Any:
    assert dim == 1
    return SimpleNamespace(store=lambda value: self.view[:, start : start + length].copy_(value))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the CPU, program by program."""
    from triton.experimental.gluon._runtime import GluonJITFunction

    monkeypatch.setattr(Shared, "slice", part, raising=False)
    original = kernel.flash
    for name, value in vars(kernel).copy().items():
        if isinstance(value, GluonJITFunction) and value is not original:
            monkeypatch.setattr(kernel, name, value.fn)
    serial = threading.Lock()

    def launch(form: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        assert len(arguments) == len(form.arguments)
        for y in range(grid[1]):
            for x in range(grid[0]):
                simulation = AttentionSimulation((x, y), seed=x + 100 * y)
                with serial:
                    for name in ("gl", "mbarrier", "tma"):
                        monkeypatch.setattr(kernel, name, getattr(simulation, name)())
                    monkeypatch.setattr(kernel, "warpgroup_mma", simulation.warpgroup_mma)
                    monkeypatch.setattr(kernel, "warpgroup_mma_wait", simulation.warpgroup_mma_wait)
                    monkeypatch.setattr(kernel, "fence_async_shared", lambda: None)
                    original.fn(*map(simulated_argument, arguments), **form.constants)

    monkeypatch.setattr(kernel.Form, "launch", launch)


def simulated_argument(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Output(argument.view(-1))
    return (
        argument
        if isinstance(argument, float)
        else Int(argument)
        if isinstance(argument, int)
        else Descriptor(argument)
    )


# ---- numbers -------------------------------------------------------------------------------------------------------
def heads(batch: int, rows: int, keys: int, count: int, channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as slices of one product whose rows lie among NaN; scores grow from the last key to the first."""
    wide = count * channels
    whole = torch.full((batch, max(rows, keys) + 3, 3 * wide + 8), float("nan"), dtype=dtype)
    found = []
    generator = torch.Generator().manual_seed(rows + keys + channels)
    for i, length in enumerate((rows, keys, keys)):
        piece = whole[:, 1 : 1 + length, 8 + i * wide :][..., :wide]
        numbers = torch.randn(piece.shape, generator=generator)
        if i == 1:
            numbers *= torch.linspace(9.0, 0.2, length)[:, None]
        piece.copy_(numbers)
        found.append(piece.unflatten(-1, (count, channels)))
    return found


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: Blocks) -> None:
    got = kernel.attention(
        q, k, v, parameters=blocks, out=torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    )
    right, eager = truth(q, k, v), truth(q, k, v, q.dtype)
    error, limit = ((x.double() - right).norm() / right.norm() for x in (got, eager))
    assert error <= 2 * limit + torch.finfo(q.dtype).eps / 2, (error, limit)


FORMS = [
    (40, Blocks(2, 64, 2)),
    (40, Blocks(3, 64, 2, split_v=False, ones=True)),
    (40, Blocks(2, 128, 3, split_v=True, ones=True)),
    (80, Blocks(2, 128, 2)),
    (80, Blocks(3, 64, 3)),
    (160, Blocks(2, 64, 2)),
]


@pytest.mark.parametrize(("channels", "blocks"), FORMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("simulated")
def test_against_the_reference(channels: int, blocks: Blocks, dtype: torch.dtype) -> None:
    # Rows and keys end within a block; more blocks than stages.
    check(*heads(2, 150, 5 * blocks.keys + 33, 2, channels, dtype), blocks)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (64, 64), (130, 128), (77, 129), (300, 7)])
@pytest.mark.usefixtures("simulated")
def test_sizes(rows: int, keys: int) -> None:
    check(*heads(1, rows, keys, 1, 40, torch.float16), Blocks(2, 64, 2, split_v=False, ones=True))


# ---- what is compiled ----------------------------------------------------------------------------------------------
COMPILE = """
import subprocess, sys, tempfile, torch
from pathlib import Path
from allaprima.backends.cuda.kernels.hopper import attention
import triton
ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
dtype = getattr(torch, sys.argv[1])
for form in list(attention.variants(dtype))[:int(sys.argv[2])]:
    compiled = form.compile_for(90)
    assert compiled.metadata.shared <= 227 << 10, form.name
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True).stderr
    # A warning says that products are not asynchronous.
    assert " 0 bytes spill stores" in told and "arning" not in told and "serialized" not in told, form.name + told
"""


def compiled(dtype: str, most: int) -> None:
    """In a process of its own: here kernels are decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, dtype, str(most)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_one_form_compiles_for_hopper() -> None:
    compiled("float16", 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_form_compiles_for_hopper(dtype: str) -> None:
    compiled(dtype, 99)


def test_forms_have_names_of_their_own() -> None:
    names = [form.name for dtype in HALVES for form in variants(dtype)]
    assert len(set(names)) == len(names) == 2 * sum(map(len, BLOCKS.values()))


def test_a_head_is_held_without_waste() -> None:
    for channels, several in BLOCKS.items():
        for blocks in several:
            k1, k2, v1, v2 = blocks.widths(channels)
            assert channels <= k1 + k2 < channels + 16
            assert channels + blocks.ones <= v1 + v2


def test_tiles() -> None:
    tile = Tile(torch.float16, (1, 64, 1, 16))
    x = torch.zeros(1, 5, 720, dtype=torch.float16)[..., 240:480].unflatten(-1, (6, 40))
    given = tile.of(x)
    assert (given.shape, given.block_shape) == ([1, 5, 6, 40], [1, 64, 1, 16])
    assert given.strides == [16, 720, 40, 1]
    assert tile.layout.swizzle_byte_width == 32
    assert Tile(torch.bfloat16, (1, 64, 1, 128)).layout.swizzle_byte_width == 128


def test_what_is_refused() -> None:
    q, k, v = (torch.zeros(2, 9, 3, 40, dtype=torch.float16) for _ in range(3))
    assert kernel.supports(q, k, v) is None
    given = BLOCKS[40][0]
    refused: dict[str, tuple[Any, ...]] = {
        "masks": (q, k, v, torch.zeros(9, 9)),
        "not all f16": (q.float(), k.float(), v.float()),
        "twice": (q, k[:, :, :2], v[:, :, :2]),
        "not one of": (q[..., :32], k[..., :32], v[..., :32]),
        "beyond the grid": (q, k[:, :0], v[:, :0]),
        "aligned rows": (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
        "not positive": (q, k, v, None, -1.0),
    }
    for reason, arguments in refused.items():
        assert reason in (kernel.supports(*arguments) or "")
        with pytest.raises(InputError, match=reason):
            kernel.attention(*arguments, parameters=given)
    with pytest.raises(InputError, match="contiguous"):
        kernel.attention(q, k, v, parameters=given, out=q[:1])


def test_candidates() -> None:
    h100 = next(d for d in KNOWN if d.name == "H100")
    for channels, several in BLOCKS.items():
        q, short, long = (torch.empty(2, n, 8, channels, dtype=torch.float16) for n in (4096, 77, 8192))
        assert kernel.candidates(q, q, q, None, None, False, h100) == list(several)
        assert not kernel.candidates(q, short, short, None, None, False, h100)
        assert not kernel.candidates(q, q, q, None, None, True, h100)
        assert not kernel.candidates(q, q, q, None, None, False, replace(h100, arch=80))
        for blocks in several:
            time = kernel.estimate_us(q, q, blocks, h100)
            peak_us = 4 * 2 * 8 * 4096 * 4096 * channels / (h100.half_tflops * 1e6)
            assert peak_us < time < 6 * peak_us
            assert 1.8 * time < kernel.estimate_us(q, long, blocks, h100) < 2.1 * time
