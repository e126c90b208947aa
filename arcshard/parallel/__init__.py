"""Parallel layers for any model: each rank holds a part of a weight, and the result is the same.

split.py         this rank's part of a tensor; parameters and activations that know theirs
groups.py        model groups and data groups; parameters that DDP must ignore
collectives.py   copy, reduce, gather, scatter, with gradients
linear.py        ParallelLinear, convert_parallel_linear
embedding.py     ParallelEmbedding
loss.py          ParallelCrossEntropyLoss
arc.py           ParallelArcLinear, ParallelArcLoss
clip.py          clip_grad_norm_, grad_norm
state_dict.py    collect_state_dict, relocate_state_dict
"""

from arcshard.parallel.arc import ParallelArcLinear, ParallelArcLoss
from arcshard.parallel.clip import clip_grad_norm_, grad_norm
from arcshard.parallel.collectives import copy, gather, reduce, scatter
from arcshard.parallel.embedding import ParallelEmbedding
from arcshard.parallel.groups import Groups, init_process_group, register_ddp_parameters_to_ignore
from arcshard.parallel.linear import ParallelLinear, convert_parallel_linear
from arcshard.parallel.loss import ParallelCrossEntropyLoss
from arcshard.parallel.split import (
    Split,
    as_dtensor,
    get_parallel_dim,
    mark_split,
    parallel_splits,
    placements,
    register_parallel_dim,
    split_of,
)
from arcshard.parallel.state_dict import collect_state_dict, relocate_state_dict

__all__ = [
    "Groups",
    "ParallelArcLinear",
    "ParallelArcLoss",
    "ParallelCrossEntropyLoss",
    "ParallelEmbedding",
    "ParallelLinear",
    "Split",
    "as_dtensor",
    "clip_grad_norm_",
    "collect_state_dict",
    "convert_parallel_linear",
    "copy",
    "gather",
    "get_parallel_dim",
    "grad_norm",
    "init_process_group",
    "mark_split",
    "parallel_splits",
    "placements",
    "reduce",
    "register_ddp_parameters_to_ignore",
    "register_parallel_dim",
    "relocate_state_dict",
    "scatter",
    "split_of",
]
