"""What the optimizer did: rules fired and declined, stages, backends, captures, fallbacks, memory."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .engine import Engine
from .errors import ConfigError
from .pipelines import engines
from .rewrite.rule import Declined
from .stage import Time
from .tuners import layers_in_force


@dataclass(frozen=True)
class StageSummary:
    component: str
    time: str
    backend: str
    calls: int
    linears: int
    convolutions: int
    attentions: int
    runs: int


@dataclass(frozen=True)
class Explanation:
    """Everything that happened since `optimize`.

    captures   graphs captured; `loaded` were found on disk, `discharged` are captures that only confirmed a size
    rebuilds   compiled stages built again after a change of weights, and the seconds that took
    fired      rule -> how often;  declined: (node, rule, reason)
    fallbacks  why calls ran eagerly -> how often
    adapters   component -> adapter (PEFT's, as diffusers loads them) -> layers whose weights it changes now
    """

    captures: int
    loaded: int
    discharged: int
    capture_s: float
    build_s: float
    rebuilds: int
    rebuild_s: float
    calls: dict[str, int]
    fired: dict[str, int]
    declined: tuple[Declined, ...]
    fallbacks: dict[str, int]
    stages: tuple[StageSummary, ...]
    signatures: dict[str, list[str]] = field(default_factory=dict)
    adapters: dict[str, dict[str, int]] = field(default_factory=dict)
    weight_bytes: int = 0
    derived_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(target: Any) -> Explanation:
    """Explain an optimized pipeline or module.  raises ConfigError where it is not optimized."""
    found = engines(target)
    if not found:
        raise ConfigError(f"this {type(target).__name__} is not optimized: call allaprima.optimize on it first.")
    events = [e.events for e in found.values()]
    return Explanation(
        captures=sum(e.captures for e in events),
        loaded=sum(e.loaded for e in events),
        discharged=sum(e.discharged for e in events),
        capture_s=sum(e.capture_s for e in events),
        build_s=sum(e.build_s for e in events),
        rebuilds=sum(e.rebuilds for e in events),
        rebuild_s=sum(e.rebuild_s for e in events),
        calls={name: e.events.calls for name, e in found.items()},
        fired=dict(sum((e.fired for e in events), Counter())),
        declined=tuple(d for e in events for d in e.declined),
        fallbacks=dict(Counter({f"{n}: {why}": k for n, e in found.items() for why, k in e.events.fallbacks.items()})),
        stages=tuple(s for name, engine in found.items() for s in _stages(name, engine)),
        signatures={name: list(e.events.signatures) for name, e in found.items()},
        adapters={name: layers for name, engine in found.items() if (layers := layers_in_force(engine.module))},
        weight_bytes=sum(e.weight_bytes() for e in found.values()),
        derived_bytes=sum(e.derived_bytes() for e in found.values()),
    )


def _stages(name: str, engine: Engine) -> list[StageSummary]:
    summaries = []
    for runner in engine.runners():
        for when, stage in runner.program.stages.items():
            names = Counter(str(c.target).split(".")[1] if "." in str(c.target) else c.target.__name__  # type: ignore[union-attr]
                            for c in stage.graph.calls())  # fmt: skip
            summaries.append(
                StageSummary(
                    component=name,
                    time=when.name.lower(),
                    backend="aten, once per state of the weights" if when is Time.WEIGHTS else runner.backend(when),
                    calls=sum(names.values()),
                    linears=names["linear"],
                    convolutions=names["conv2d"] + names["upsample_conv"],
                    attentions=names["attention"] + names["scaled_dot_product_attention"],
                    runs=engine.events.stage_runs[when.name],
                )
            )
    return summaries


def _lines(e: Explanation) -> list[str]:
    lines = [
        f"captures   {e.captures} in {e.capture_s:.1f} s, {e.loaded} found on disk, {e.discharged} sizes confirmed",
        f"built      {e.build_s:.2f} s; {e.rebuilds} rebuilds after a change of weights, {e.rebuild_s:.2f} s",
        f"weights    {e.weight_bytes / 2**20:.1f} MiB, derived {e.derived_bytes / 2**20:.1f} MiB",
        "adapters   " + (_adapters(e.adapters) or "none of PEFT's"),
        "calls      " + ", ".join(f"{name} {count}" for name, count in e.calls.items()),
        "",
        f"{'stage':<24}{'runs':>6}{'calls':>7}{'linear':>8}{'conv':>6}{'attn':>6}  backend",
    ]
    for s in e.stages:
        name = f"{s.component} · {s.time}"
        lines.append(
            f"{name:<24}{s.runs:>6}{s.calls:>7}{s.linears:>8}{s.convolutions:>6}{s.attentions:>6}  "
            + textwrap.shorten(s.backend, 120, placeholder=" …")
        )
    lines += ["", "rules fired"]
    lines += [f"  {count:>5} × {rule}" for rule, count in sorted(e.fired.items(), key=lambda item: -item[1])]
    if e.declined:
        reasons = Counter((d.rule, d.reason) for d in e.declined)
        lines += ["rules declined"] + [f"  {n:>5} × {rule}: {why}" for (rule, why), n in reasons.most_common()]
    lines += ["calls that ran eagerly"] + (
        [f"  {count:>5} × {why}" for why, count in e.fallbacks.items()] if e.fallbacks else ["  none"]
    )
    return lines


def _adapters(found: dict[str, dict[str, int]]) -> str:
    return "; ".join(
        f"{component}: " + ", ".join(f"{name} in {layers} layers" for name, layers in adapters.items())
        for component, adapters in found.items()
    )
