"""The kernels, one file an operator: what Triton compiles, the finite set of its forms, the call that launches it."""
