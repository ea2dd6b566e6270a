"""The engine: stands in a module's `forward`, captures each call signature once, and runs programs after that."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import __version__, record
from .backends import preferred, prepare
from .capture import (
    Call,
    CallReader,
    DimRule,
    Signature,
    beyond,
    bind_symbols,
    capture,
    dim_rules,
    no_dim,
    out_of_range,
    range_of,
    same_program,
    widen_guards,
)
from .config import Config
from .errors import AllaprimaError, CaptureError, OutOfMemoryError, SizeError, is_out_of_memory
from .fingerprint import StructureWatch, WeightsWatch, structure
from .graph import Graph, peak_bytes
from .rewrite import rewrite, rules_for
from .rewrite.rule import Declined
from .runner import Runner, row_of, stays_in_place
from .stage import Time, batch_rows, cut
from .tuners import peeled
from .weights.binding import Sources
from .weights.gathering import Unit, gather

MAX_PROGRAMS = 8
"""Captures of one signature before the engine gives up on it: a module that needs more is not size-independent."""


Key: TypeAlias = tuple[str, str, Signature]
"""Structure of the module, its device, and the signature of the call."""


@dataclass(frozen=True)
class Profile:
    """What is known of a module beyond its code; the defaults suit any module.

    name       shown by `explain`
    times      inputs that change less often than every call
    dims       (tensors) -> rules to try in order for which sizes change
    normalise  brings the arguments to one form, so that equal calls have equal signatures
    capturing  context in which the module is captured
    schedules  the lists of timesteps that may be running; lets the schedule stage run once for all of a list
    timestep   the argument that is one of them
    options    the argument whose entry "scale" multiplies the scales of adapters (diffusers' `apply_lora_scale`)
    """

    name: str = "module"
    times: Mapping[str, Time] = field(default_factory=dict)
    dims: Callable[[Sequence[torch.Tensor]], Sequence[DimRule]] = dim_rules
    normalise: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda *args, **kwargs: (args, kwargs)
    capturing: Callable[[nn.Module], AbstractContextManager[None]] = lambda module: nullcontext()
    schedules: Callable[[], Sequence[torch.Tensor]] = tuple
    timestep: str | None = None
    options: str | None = None


@dataclass
class Events:
    """What happened since `optimize`: the numbers behind `explain`."""

    captures: int = 0
    discharged: int = 0
    capture_s: float = 0.0
    loaded: int = 0
    rebuilds: int = 0
    rebuild_s: float = 0.0
    build_s: float = 0.0
    calls: int = 0
    stage_runs: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    declined: list[Declined] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)


class Engine:
    """Callable that replaces `module.forward`.

    It runs the module eagerly, and says so in `events.fallbacks`, where it cannot do better: train mode, hooks inside
    the module, inputs that require gradients, adapters that cannot be merged, calls that cannot be captured.
    """

    def __init__(self, module: nn.Module, config: Config, profile: Profile | None = None) -> None:
        self.module, self.config, self.profile = module, config, profile or Profile()
        self._replaced = module.__dict__.get("forward")
        self.original: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self.original, updated=())
        self.events = Events()
        self.bypassed = False
        self.observe: Callable[[Any, tuple[Any, ...]], Any] | None = None
        self._read = CallReader(self.original)
        self._lock = threading.RLock()
        self._sources = Sources(module)
        self._structure: StructureWatch | None = None
        self._weights: WeightsWatch | None = None
        self._forms: list[Any] = []
        self._place = ("", "")
        self._storable = False
        """Whether the versions of torch and its like stand for all of the module's code."""
        self._runners: dict[Key, list[Runner]] = {}
        self._hopeless: dict[Key, str] = {}
        self._schedule: tuple[torch.Tensor, torch.Tensor] | None = None
        """The list of timesteps that was copied last: as it was, and beside the weights."""

    # -- in and out of the module

    def install(self) -> Engine:
        self.module.forward = self
        return self

    def remove(self) -> None:
        self._runners.clear()
        self._sources.release()
        if self.module.__dict__.get("forward") is not self:
            self.bypassed = True  # somebody wrapped the engine, or put another in its place: step aside
        elif self._replaced is not None:
            self.module.forward = self._replaced
        else:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return eager_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return eager_forward, (self.module,)

    # -- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bypassed:
            return self.original(*args, **kwargs)
        with self._lock:
            self.events.calls += 1
            try:
                result = self._run(args, kwargs)
            except (RuntimeError, MemoryError) as error:
                raise_if_out_of_memory(error)
                raise
        return self.observe(result, args) if self.observe else result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scale, unscaled = self._scale(kwargs)
        if reason := self._eager_reason(args, kwargs, scale):
            return self._fall_back(reason, args, kwargs)
        key: Key | None = None
        try:
            timesteps = self._timesteps(args, unscaled)
            here_args, here_kwargs = self._with_timestep(timesteps, args, unscaled)
            normal_args, normal_kwargs = self.profile.normalise(*here_args, **here_kwargs)
            call = self._read(normal_args, normal_kwargs)
            key = (*self._place, call.signature)
            runner, symbols = self._runner(call, key)
        except CaptureError as error:
            result = self._fall_back(str(error), args, kwargs)
            if key is not None:  # a call that the module itself refuses says nothing about the next one
                self._hopeless[key] = str(error)
            return result
        self._bind(runner)
        self._check_budget(runner, symbols)
        with torch.no_grad():
            leaves = runner(call.tensors, symbols, timesteps)
        return pytree.tree_unflatten(leaves, runner.program.outputs)

    def _scale(self, kwargs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """What this call multiplies the adapters' scales by (data, as they are), and the call without that."""
        name = self.profile.options
        options = kwargs.get(name) if name else None
        if name is None or not isinstance(options, Mapping):
            return 1.0, kwargs
        rest = {key: value for key, value in options.items() if key != "scale"}
        others = {key: value for key, value in kwargs.items() if key != name}
        return float(options.get("scale", 1.0)), others | ({name: rest} if rest else {})

    def _timesteps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, int] | None:
        """All timesteps of the present run, where the weights are, and which of them this call is for."""
        if self.profile.timestep is None:
            return None
        timestep = kwargs.get(self.profile.timestep, args[1] if len(args) > 1 else None)
        rows = ((schedule, row_of(timestep, schedule)) for schedule in self.profile.schedules())
        found = next(((schedule, row) for schedule, row in rows if row is not None), None)
        return None if found is None else (self._beside_weights(found[0]), found[1])

    def _beside_weights(self, schedule: torch.Tensor) -> torch.Tensor:
        """A list of timesteps on the module's device: copied once a list, since each copy makes the host wait, and in
        float32, which is exact for them and what the stages compute with."""
        device = _placement(self.module)[0]
        if schedule.device == device:
            return schedule
        if self._schedule is None or self._schedule[1].device != device or not torch.equal(self._schedule[0], schedule):
            self._schedule = schedule.clone(), schedule.to(device=device, dtype=torch.float32)
        return self._schedule[1]

    def _with_timestep(
        self, timesteps: tuple[torch.Tensor, int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with its timestep out of the list beside the weights."""
        name = self.profile.timestep
        if timesteps is None or name is None:
            return args, kwargs
        timestep = timesteps[0][timesteps[1]]
        if name in kwargs:
            return args, kwargs | {name: timestep}
        return (args[0], timestep, *args[2:]), kwargs

    def _eager_reason(self, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float) -> str | None:
        """Notice what changed; returns why this call has to run eagerly."""
        same_structure = self._structure is not None and self._structure.unchanged()
        same_weights = self._weights is not None and self._weights.unchanged() and self._sources.scale == scale
        if not same_structure or not same_weights:
            self._look_again(same_structure, scale)
        assert self._structure is not None
        if self.module.training:
            return "train mode: call .eval()"
        if hooked := self._structure.hooked():
            return f"a forward hook inside ({hooked})"
        if self._sources.unmergeable:
            return f"an adapter that is no change of weights ({self._sources.unmergeable})"
        if torch.is_autocast_enabled(torch.device(self._place[1]).type):
            return "autocast is on: give the model its dtype instead (pipe.to(dtype))"
        if torch.is_grad_enabled() and any(_wants_grad(v) for v in (*args, *kwargs.values())):
            return "an input requires gradients"
        return None

    def _look_again(self, same_structure: bool, scale: float) -> None:
        same_layers = same_structure and self._weights is not None and self._weights.same_layers()
        if not same_structure:
            self._structure = StructureWatch(self.module)
        if not same_layers:
            self._sources.forget_layers()
            self._weights = None
        self._sources.scale = scale
        self._refresh_sources()
        self._watch_weights()  # after parameters gave up their place to merged ones
        assert self._weights is not None
        forms = self._weights.forms()
        if same_structure and forms == self._forms:
            return
        self._forms = forms
        with self.profile.capturing(self.module):  # what the call brings is no part of it
            key, foreign = structure(self.module)
        self._storable = foreign is None and getattr(self.original, "__func__", None) is type(self.module).forward
        place = key, str(_placement(self.module)[0])
        if place != self._place:
            self._forget_all_but(place, self._place)
            self._place = place

    def _watch_weights(self) -> None:
        if self._weights is None:
            self._weights = WeightsWatch(self.module)
        else:
            self._weights.look()

    def _refresh_sources(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # merged weights are written into buffers
            changed = self._sources.refresh()
        for runners in self._runners.values():
            for runner in runners:
                runner.stale |= changed

    def _forget_all_but(self, *places: tuple[str, str]) -> None:
        """Compiled programs hold memory: keep those of the present form of the module and of the one before."""
        self._runners = {k: r for k, r in self._runners.items() if k[:2] in places}

    def _fall_back(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.events.fallbacks[reason] += 1
        return self.original(*args, **kwargs)

    # -- finding or making a program

    def _runner(self, call: Call, key: Key) -> tuple[Runner, dict[str, int]]:
        """The program for a call and the call's sizes.  raises CaptureError where there can be none."""
        runners = self._runners.get(key)
        if runners is None:
            device, dtype = _placement(self.module)
            prepare(self.config, dtype, device)  # it goes on while the module is captured
            runners = self._runners[key] = [self._prepare(g) for g in self._stored(key)]
        fitting = [(r, s) for r in runners if isinstance(s := bind_symbols(r.program.symbols, call.tensors), dict)]
        for runner, symbols in fitting:
            if not self._outside(runner, symbols):
                return runner, symbols
        if key in self._hopeless:
            raise CaptureError(self._hopeless[key])
        if not fitting:
            fitting = [self._add(self._export(call, self.profile.dims(call.tensors)), call, key)]
            if not self._outside(*fitting[0]):
                return fitting[0]
        return self._discharge(fitting, call, key)

    def _outside(self, runner: Runner, symbols: Mapping[str, int]) -> dict[str, int]:
        outside = out_of_range(runner.captured, symbols)
        return {symbol: size for symbol, size in outside.items() if (symbol, size) not in runner.confirmed}

    def _discharge(
        self, fitting: Sequence[tuple[Runner, dict[str, int]]], call: Call, key: Key
    ) -> tuple[Runner, dict[str, int]]:
        """Sizes outside of every range: a capture made at these sizes tells whether a known program is right there
        too; if none is, it is a program of its own."""
        runner, symbols = fitting[0]
        outside = self._outside(runner, symbols)
        rules = [beyond(runner.captured, dims, outside) for dims in self.profile.dims(call.tensors)]
        special = self._export(call, [*rules, no_dim])
        for runner, symbols in fitting:
            if same_program(runner.captured, special, call.tensors):
                self.events.discharged += 1
                self._widen(runner, special, symbols)
                if path := self._path(key, self._runners[key].index(runner)):
                    record.save(runner.captured, path)
                return runner, symbols
        return self._add(special, call, key)

    def _widen(self, runner: Runner, special: Graph, symbols: Mapping[str, int]) -> None:
        """Let the program's ranges cover what the special capture is known to hold for."""
        graph = runner.captured
        for symbol, size in self._outside(runner, symbols).items():
            low, high = graph.ranges.get(symbol, (1, None))
            if low <= size and (high is None or size <= high):
                continue
            least, most = range_of(special, graph, symbol) or (size, size)
            if (high is None or least <= high + 1) and (most is None or most >= low - 1):
                graph.ranges[symbol] = (min(low, least), None if high is None or most is None else max(high, most))
            else:
                runner.confirmed.add((symbol, size))
        widen_guards(graph, special, symbols)

    def _add(self, graph: Graph, call: Call, key: Key) -> tuple[Runner, dict[str, int]]:
        runners = self._runners[key]
        if len(runners) >= MAX_PROGRAMS:
            raise CaptureError(f"{MAX_PROGRAMS} captures of ({call.signature}) did not cover this size.")
        symbols = bind_symbols(graph, call.tensors)
        if isinstance(symbols, str):
            raise CaptureError(f"the capture does not serve the call it was made for: {symbols}.")
        self.events.captures += 1
        self.events.signatures.append(str(call.signature))
        if path := self._path(key, len(runners)):
            record.save(graph, path)
        runners.append(self._prepare(graph))
        return runners[-1], symbols

    def _export(self, call: Call, rules: Sequence[DimRule]) -> Graph:
        reasons: list[CaptureError] = []
        for dims in rules:
            started = time.perf_counter()
            try:
                with self.profile.capturing(self.module), peeled(self.module):
                    return capture(self.module, self.original, call, dims)
            except CaptureError as error:
                reasons.append(error)
            finally:
                self.events.capture_s += time.perf_counter() - started
        raise reasons[0]

    def _prepare(self, graph: Graph) -> Runner:
        started = time.perf_counter()
        work = graph.copy()
        device, dtype = _placement(self.module)
        report = rewrite(work, rules_for(preferred(self.config, device)[0]))
        program = cut(work, self.profile.times, report.fired)
        if self.profile.timestep and Time.SCHEDULE in program.stages:
            program.stages[Time.SCHEDULE] = batch_rows(program.stages[Time.SCHEDULE], self.profile.timestep)
        runner = Runner(graph, program, self.config, dtype, device, self.events.stage_runs)
        self.events.fired.update(report.fired)
        self.events.declined.extend(report.declined)
        self.events.build_s += time.perf_counter() - started
        return runner

    def _path(self, key: Key, index: int) -> Path | None:
        if self.config.cache_dir is None or not self._storable:
            return None
        structure, _, signature = key
        parts = (structure, signature.structure, repr(signature.leaves), *_versions())
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return self.config.cache_dir / "graphs" / f"{digest}-{index}.json.gz"

    def _stored(self, key: Key) -> Iterator[Graph]:
        for index in range(MAX_PROGRAMS):
            path = self._path(key, index)
            graph = record.load(path) if path else None
            if graph is None:
                return
            self.events.loaded += 1
            yield graph

    # -- looking inside

    def runners(self) -> list[Runner]:
        """The programs of the module's present form."""
        return [r for key, runners in self._runners.items() if key[:2] == self._place for r in runners]

    def weight_bytes(self) -> int:
        unique = {t.data_ptr(): t.numel() * t.itemsize for t in self._sources.tensors.values()}
        return sum(unique.values())

    def derived_bytes(self) -> int:
        return sum(r.binding.derived_bytes() for r in self.runners())

    # -- weights

    def rebind(self) -> None:
        """Read all weights again at the next call."""
        with self._lock:
            self._sources.forget()
            self._weights = None

    @property
    def bound(self) -> bool:
        """Whether a program of the module's present form has its weights."""
        return any(runner.bound for runner in self.runners())

    def _scattered(self) -> list[Unit]:
        if self.bound or not stays_in_place(_placement(self.module)[0]):
            return []
        self._refresh_sources()
        return self._sources.scattered()

    def _bind(self, runner: Runner) -> None:
        if runner.bound and not runner.stale:
            return
        started = time.perf_counter()
        rebuilt = runner.bind(self._sources)
        self._watch_weights()  # parameters may have moved
        seconds = time.perf_counter() - started
        if rebuilt:
            self.events.rebuilds += 1
            self.events.rebuild_s += seconds
        else:
            self.events.build_s += seconds

    def _check_budget(self, runner: Runner, symbols: dict[str, int]) -> None:
        if self.config.memory_limit is None:
            return
        needed = self.weight_bytes() + max(
            (peak_bytes(s.graph, symbols) for s in runner.program.stages.values()), default=0
        )
        if needed > self.config.memory_limit:
            raise SizeError(
                f"{self.profile.name} at this size needs {needed / 2**30:.2f} GiB, the budget (Config.memory_limit) is "
                f"{self.config.memory_limit / 2**30:.2f} GiB. Draw a smaller size or batch, or raise the limit."
            )


def gather_parameters(engines: Iterable[Engine]) -> None:
    """Move the parameters of several modules together, before their first programs do it module by module: where they
    lie between one another's, no segment would empty.  What is never called stays gathered, too."""
    unbound = [engine for engine in engines if not engine.bound]
    with ExitStack() as held, suppress(torch.OutOfMemoryError):
        for engine in unbound:
            held.enter_context(engine._lock)
        gather(*[engine._scattered() for engine in unbound])


def eager_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, bound: what a copy of an optimized module gets."""
    return MethodType(type(module).forward, module)


def _placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the module, and the dtype in which most of its parameters are."""
    first = next(iter(module.parameters()), None)
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return (first.device if first is not None else torch.device("cpu")), floating


def _wants_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


@functools.cache
def _versions() -> tuple[str, ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = [torch.__version__, __version__]
    for package in ("diffusers", "transformers"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("none")
    return tuple(found)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Turn the many ways in which memory runs out into our error."""
    if is_out_of_memory(error) and not isinstance(error, AllaprimaError):
        raise OutOfMemoryError(
            f"out of memory: {str(error)[:200]}. Draw a smaller size or batch; the pipeline stays usable."
        ) from error
