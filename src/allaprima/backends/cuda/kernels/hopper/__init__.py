"""Kernels written for Hopper alone (compute capability 9.0), in Gluon: warpgroup products and the bulk copy engine."""
