"""Kernels are timed here too: the interpreter has to be chosen before they are decorated."""

from tests.backends.cuda import conftest  # noqa: F401
