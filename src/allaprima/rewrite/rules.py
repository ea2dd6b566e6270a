"""Every rule, in the order in which they are applied."""

from __future__ import annotations

from .attention import AttentionWithoutTransposes
from .broadcast import DropBroadcast, SinkBroadcast
from .clean import (
    CastToDtype,
    ComposePermutes,
    ComposeReshapes,
    MergeEqualCalls,
    RemoveNoOps,
    SizesFromInputs,
    ViewToReshape,
)
from .conv import ConvAdd, FoldUpsample, UpsampleConv
from .layout import ChannelsLastInputs, ChannelsLastWeights, PointwiseConvFromRows, PointwiseConvToRows
from .linear import GegluLinear, LinearAdd, MergeSiblingLinears
from .norm import AddLayerNorm, FoldBatchNorm, GroupNormSilu, NoConcatenation
from .rule import Rule

PORTABLE: tuple[Rule, ...] = (
    ViewToReshape(),
    CastToDtype(),
    SizesFromInputs(),
    RemoveNoOps(),
    ComposePermutes(),
    ComposeReshapes(),
    MergeEqualCalls(),
    SinkBroadcast(),
    DropBroadcast(),
    PointwiseConvToRows(),
    PointwiseConvFromRows(),
    AttentionWithoutTransposes(),
    MergeSiblingLinears(),
    FoldBatchNorm(),
    UpsampleConv(),
)
"""What any backend can run."""

CHANNELS_LAST: tuple[Rule, ...] = (ChannelsLastWeights(), ChannelsLastInputs())
"""For backends whose convolutions want their channels last and do not see to it themselves."""

CUDA: tuple[Rule, ...] = (
    FoldUpsample(halves=True),
    GroupNormSilu(),
    NoConcatenation(),
    GegluLinear(),
    ConvAdd(),
    LinearAdd(),
    AddLayerNorm(),
    ComposePermutes(),
    *CHANNELS_LAST,
    MergeEqualCalls(),
)
"""Fused operators: one kernel each on CUDA, plain PyTorch elsewhere."""

_BY_BACKEND = {
    "portable": PORTABLE,
    "aten": (*PORTABLE, FoldUpsample()),
    # OpenVINO runs one product per range of columns that is read, so merged weights would only be copies.
    "openvino": (*(r for r in PORTABLE if not isinstance(r, MergeSiblingLinears)), FoldUpsample()),
    "cuda": PORTABLE + CUDA,
}


def rules_for(backend: str) -> tuple[Rule, ...]:
    """The rules for a backend, in order.  raises KeyError for a backend without a list."""
    return _BY_BACKEND[backend]
