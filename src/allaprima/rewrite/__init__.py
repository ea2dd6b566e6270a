"""Rewriting: an ordered list of equations, applied to a graph in place."""

from .rule import Declined, Rewritten, Rule, apply, rewrite
from .rules import CHANNELS_LAST, CUDA, PORTABLE, rules_for

__all__ = ["CHANNELS_LAST", "CUDA", "PORTABLE", "Declined", "Rewritten", "Rule", "apply", "rewrite", "rules_for"]
