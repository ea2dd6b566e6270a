"""Running one program: its stages on their backends, each stage only when an input of it changed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .backends import build
from .backends.aten import AtenExecutable
from .backends.base import INPUT_ROLES, Executable
from .config import Config
from .errors import GraphError, is_out_of_memory
from .graph import Graph, SizeSpec, number
from .stage import Program, Stage, Time, Value
from .weights.binding import Binding, Sources, weight_names
from .weights.gathering import give_back

MAX_BUFFERS = 8
"""Sets of shapes (batches, lengths of the prompt) for which an earlier stage's results keep their addresses."""


class Runner:
    """A program on its backend, with the values that its earlier stages last computed."""

    def __init__(
        self,
        captured: Graph,
        program: Program,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        runs: Counter[str],
    ) -> None:
        self.captured, self.program, self.runs, self._device = captured, program, runs, device
        self.binding = Binding(program)
        self.confirmed: set[tuple[str, int]] = set()
        """Sizes (symbol, size) outside of the capture's ranges for which it is known to hold all the same."""
        self.stale: set[str] = set()
        self.bound = False
        self._fixed: dict[str, torch.Tensor] = {}
        self.backends: dict[Time, str] = {}
        self._stages: list[_RunningStage] = []
        for when, stage in program.stages.items():
            if when is not Time.WEIGHTS:
                executable, self.backends[when] = build(stage.graph, config, dtype, device, frozenset(program.inputs))
                self._stages.append(_RunningStage(stage, executable, device))

    @property
    def executables(self) -> dict[Time, Executable]:
        """What runs each stage."""
        return {running.stage.time: running.executable for running in self._stages}

    def backend(self, time: Time) -> str:
        """In words, which backend runs a stage and why."""
        executable = self.executables[time]
        if failed := getattr(executable, "failed", None):
            return f"aten: {failed}"
        return "aten until the kernels are compiled" if getattr(executable, "waits", False) else self.backends[time]

    def bind(self, sources: Sources) -> bool:
        """Give changed weights to the stages that read them.  returns whether a bound stage was built again."""
        with torch.inference_mode(False), torch.no_grad():  # buffers of inference mode could not be written to later
            return self._bound(sources)

    def _bound(self, sources: Sources) -> bool:
        owner = sources if stays_in_place(self._device) else None
        changed = self.binding.update(sources.tensors, self.stale if self.bound else sources.tensors, owner)
        concerned = [
            running
            for running in self._stages
            if not self.bound or not weight_names(running.stage.graph).isdisjoint(changed)
        ]
        # A backend compiles in C++ on one core, so the stages are compiled beside one another.
        with ThreadPoolExecutor(max(1, len(concerned))) as pool:
            built = list(pool.map(lambda running: self._bind_stage(running, sources.tensors, changed), concerned))
        self._fixed = {
            r.name: self.binding.value(r.role, r.name, sources.tensors)
            for r in self.program.results
            if isinstance(r, Value) and r.role != "input"
        }
        if not self.bound:
            give_back(self._device)  # where the parameters lay before they moved; recorded graphs cannot use it
        rebuilt = self.bound and any(built)
        self.stale, self.bound = set(), True
        return rebuilt

    def _bind_stage(self, running: _RunningStage, sources: Mapping[str, torch.Tensor], changed: set[str]) -> bool:
        """Bind a stage; one that its backend cannot build after all runs on ATen, and `explain` says so.

        returns  whether something was built
        """
        graph = running.stage.graph
        weights = self.binding.values(graph, sources)
        new = {p.name for p in graph.placeholders("parameter", "buffer", "derived") if p.meta["source"] in changed}
        running.forget()
        try:
            return running.executable.bind(weights, new if self.bound else None)
        except (RuntimeError, GraphError) as error:
            if isinstance(running.executable, AtenExecutable) or is_out_of_memory(error):
                raise
            failed = self.backends[running.stage.time].split(":")[0]
            reason = str(error).strip()[:200]
            told = reason if isinstance(error, GraphError) else f"{failed} failed with {reason!r}"
            self.backends[running.stage.time] = f"aten: {told}"
            running.executable = AtenExecutable(graph)
            running.executable.bind(weights)
            return True

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        symbols: Mapping[str, int],
        timesteps: tuple[torch.Tensor, int] | None,
    ) -> list[Any]:
        values: dict[str, Any] = {**self._fixed, **dict(zip(self.program.inputs, tensors, strict=True))}
        for running in self._stages:
            if running.stage.time is Time.STEP:
                outputs = running.run(values, symbols)
                self.runs[Time.STEP.name] += 1
            elif running.stage.rows and timesteps is not None:
                schedule, row = timesteps
                table = running.kept({running.stage.inputs[0]: schedule}, symbols, self.runs)
                outputs = [t[row : row + 1] for t in table]
            else:
                outputs = running.kept(values, symbols, self.runs)
            values.update(zip(running.stage.outputs, outputs, strict=True))
        return [_result(r, values, symbols) for r in self.program.results]


def stays_in_place(device: torch.device) -> bool:
    """Whether buffers keep their addresses: recorded CUDA graphs know them by nothing else."""
    return device.type == "cuda"


def _result(result: Any, values: Mapping[str, Any], symbols: Mapping[str, int]) -> Any:
    if isinstance(result, Value):
        return values[result.name].clone() if result.shared else values[result.name]
    if isinstance(result, SizeSpec):
        return number(result.expr, symbols)
    return result.clone() if isinstance(result, torch.Tensor) else result


class _RunningStage:
    """One stage and its last results."""

    def __init__(self, stage: Stage, executable: Executable, device: torch.device) -> None:
        self.stage, self.executable, self.device = stage, executable, device
        self._arguments = [(p.meta["role"], p.meta["source"]) for p in stage.graph.placeholders(*INPUT_ROLES)]
        self._seen: list[tuple[Any, int]] | None = None
        self._results: list[Any] = []
        self._buffers: OrderedDict[Any, list[torch.Tensor]] = OrderedDict()

    def run(self, values: Mapping[str, Any], symbols: Mapping[str, int]) -> list[Any]:
        given = [symbols[s] if role == "size" else values[s] for role, s in self._arguments]
        if self.stage.rows:
            name = self.stage.inputs[0]
            given = [
                _as_rows(values[name], self.device) if s == name else g
                for (_, s), g in zip(self._arguments, given, strict=True)
            ]
        return self.executable.run(given)

    def kept(self, values: Mapping[str, Any], symbols: Mapping[str, int], runs: Counter[str]) -> list[Any]:
        """The last results, computed again only if an input changed."""
        given = [symbols[s] if role == "size" else values[s] for role, s in self._arguments]
        if self._seen is None or not all(map(_same, self._seen, given)):
            results = self.run(values, symbols)
            in_place = stays_in_place(self.device) and not self.stage.rows
            self._results = self._settled(results) if in_place else results
            self._seen = [_remember(g) for g in given]
            runs[self.stage.time.name] += 1
        return self._results

    def _settled(self, results: list[Any]) -> list[Any]:
        """The results in tensors that stay at their addresses, one set for each set of shapes: recorded CUDA graphs of
        later stages read them there."""
        tensors = [r for r in results if isinstance(r, torch.Tensor)]
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key not in self._buffers:
            with torch.inference_mode(False):  # or they could not be written to outside of it
                self._buffers[key] = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        self._buffers.move_to_end(key)
        while len(self._buffers) > MAX_BUFFERS:
            self._buffers.popitem(last=False)
        if tensors:
            torch._foreach_copy_(self._buffers[key], tensors)
        settled = iter(self._buffers[key])
        return [next(settled) if isinstance(r, torch.Tensor) else r for r in results]

    def forget(self) -> None:
        self._seen = None


def _as_rows(timesteps: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Timesteps as float32 `[T]`; a single one is a table of one row.  A scheduler may keep them on another device."""
    return timesteps.reshape(-1).to(device=device, dtype=torch.float32)


def _remember(value: Any) -> tuple[Any, int]:
    """A value and its version; tensors of inference mode have no version, so a copy is kept."""
    if not isinstance(value, torch.Tensor):
        return value, -1
    return (value.clone(), -2) if value.is_inference() else (value, value._version)


def _same(seen: tuple[Any, int], value: Any) -> bool:
    old, version = seen
    if version == -1:
        return bool(old == value)
    if version == -2 or not isinstance(value, torch.Tensor) or value.is_inference():
        return isinstance(value, torch.Tensor) and old.shape == value.shape and torch.equal(old, value)
    if old is value:
        return bool(value._version == version)
    # Another tensor may hold the same numbers: single timesteps and embeddings of an unchanged prompt do.
    unchanged = old._version == version and old.shape == value.shape and old.device == value.device
    return unchanged and value.device.type == "cpu" and torch.equal(old, value)


def row_of(timestep: Any, schedule: torch.Tensor) -> int | None:
    """The row of `schedule` that `timestep` is a view of, found without reading it (that would stop the host)."""
    if not isinstance(timestep, torch.Tensor) or schedule.dim() != 1:
        return None
    if timestep.dim() != 0 or timestep.dtype != schedule.dtype:
        return None
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    row, rest = divmod(int(timestep.storage_offset() - schedule.storage_offset()), int(schedule.stride(0)))
    return row if rest == 0 and 0 <= row < schedule.shape[0] else None
