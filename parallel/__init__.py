"""The old name of arcshard.parallel; it works for one release."""

from utils.moved import moved

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
__getattr__ = moved(__name__, "arcshard.parallel")
