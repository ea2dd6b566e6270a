"""A rewrite rule: an equation, a pattern, a precondition and a replacement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from ..graph import Graph, verify


class Rule:
    """One equation, tried at every node whose target is one of `roots`.

    The class docstring states the equation.  `match` looks only at structure; `declines` states in words why a match
    may not be rewritten (that reason is shown by `explain`); `rewrite` edits the graph around the match and leaves
    every new node with its spec.  Dead nodes are removed by the caller.
    """

    roots: ClassVar[tuple[Callable[..., Any], ...]] = ()

    @property
    def name(self) -> str:
        return type(self).__name__

    def match(self, node: Node) -> Any | None:
        """What `declines` and `rewrite` need to know, or None where the pattern is not."""
        raise NotImplementedError

    def declines(self, found: Any) -> str | None:
        """The reason why this match is left alone, or None."""
        return None

    def rewrite(self, found: Any) -> None:
        raise NotImplementedError


def source(node: Node) -> Any:
    """What a call reads first: for most operators the tensor that they work on."""
    return node.args[0] if node.args else None


@dataclass(frozen=True)
class Declined:
    node: str
    rule: str
    reason: str


@dataclass
class Rewritten:
    """What a list of rules did to a graph."""

    fired: Counter[str] = field(default_factory=Counter)
    declined: list[Declined] = field(default_factory=list)


def apply(rule: Rule, graph: Graph, report: Rewritten) -> int:
    """Try one rule at every node, in order.  returns how often it fired."""
    fired = 0
    for node in graph.calls(*rule.roots):
        if node._erased or (found := rule.match(node)) is None:
            continue
        if reason := rule.declines(found):
            report.declined.append(Declined(node.name, rule.name, reason))
            continue
        rule.rewrite(found)
        fired += 1
    if fired:
        report.fired[rule.name] += fired
        graph.clean()
        verify(graph)
    return fired


def rewrite(graph: Graph, rules: Sequence[Rule]) -> Rewritten:
    """Apply the rules in their order, in place; the graph is verified after each one that fired."""
    report = Rewritten()
    for rule in rules:
        apply(rule, graph, report)
    return report
