"""The fused operators: what each computes, in plain PyTorch.

A graph calls them by these names; a backend replaces the ones for which it has a kernel or a better form.
"""

from .batch_norm import fold_batch_norm
from .convolution import conv2d_add, conv2d_cat
from .group_norm import group_norm_silu, group_norm_silu_cat
from .layer_norm import add_layer_norm
from .linear import geglu_linear, linear_add
from .sdpa import attention
from .upsampling import fold_upsample_weight, upsample_conv, upsample_conv_folded

__all__ = [
    "add_layer_norm",
    "attention",
    "conv2d_add",
    "conv2d_cat",
    "fold_batch_norm",
    "fold_upsample_weight",
    "geglu_linear",
    "group_norm_silu",
    "group_norm_silu_cat",
    "linear_add",
    "upsample_conv",
    "upsample_conv_folded",
]
