"""The fused operators: what each computes, in plain PyTorch.

A graph calls them by these names; a backend replaces the ones for which it has a kernel.
"""

from .attention import attention

__all__ = ["attention"]
