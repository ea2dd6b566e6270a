"""Rewriting: an ordered list of equations, applied to a graph in place."""

from .rule import Declined, Rewritten, Rule, apply, rewrite
from .rules import PORTABLE, rules_for

__all__ = ["PORTABLE", "Declined", "Rewritten", "Rule", "apply", "rewrite", "rules_for"]
