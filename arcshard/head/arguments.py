"""Checks of PartialFC's arguments; each error states the value and what is allowed."""

from __future__ import annotations

import math

import torch

from arcshard.head.row_optimizer import RowOptimizer
from arcshard.margins.base import Margin


def check_arguments(
    margin: Margin,
    embedding_size: int,
    num_classes: int,
    sample_rate: float,
    row_optimizer: RowOptimizer | None,
    update: str,
    batch_size_per_rank: int | None,
    centers_per_class: int,
    workspace_mib: float | str,
    half: torch.dtype | None,
    dtype: torch.dtype,
    center_device: torch.device | str | None,
) -> None:
    """Checks the arguments of PartialFC, which have the same names there.

    Raises:
        ValueError: An argument does not fit. The message names the first one.
    """
    is_fused = update == "fused"
    for ok, sentence in (
        (
            embedding_size >= 1 and num_classes >= 1,
            f"embedding_size={embedding_size}, num_classes={num_classes}: at least 1 each",
        ),
        (
            0.0 <= sample_rate <= 1.0,
            f"sample_rate={sample_rate!r}: a share in [0, 1] (1 uses all classes)",
        ),
        (update in ("fused", "autograd"), f"update={update!r}: fused or autograd"),
        (
            not is_fused or row_optimizer is not None,
            "update='fused' moves the class centers itself: pass row_optimizer=SGDRows(...) or "
            "AdamWRows(...)",
        ),
        (
            batch_size_per_rank is None or batch_size_per_rank >= 1,
            f"batch_size_per_rank={batch_size_per_rank}: at least 1, or None",
        ),
        (centers_per_class >= 1, f"centers_per_class={centers_per_class}: at least 1"),
        (
            workspace_mib == "auto"
            or (isinstance(workspace_mib, (int, float)) and 0 < workspace_mib < math.inf),
            f"workspace_mib={workspace_mib!r}: MiB above 0, or 'auto'",
        ),
        (
            half in (None, torch.bfloat16),
            f"half={half}: torch.bfloat16, or None for full precision",
        ),
        (
            dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and is_fused),
            f"dtype={dtype}: class centers are float32 or float64, or bfloat16 with update='fused'",
        ),
        (
            center_device is None or (is_fused and sample_rate < 1.0 and not margin.bias),
            f"center_device={center_device!r}: centers away from the computing device need "
            "update='fused', sample_rate < 1 and a loss without bias",
        ),
        (
            center_device is None or torch.device(center_device).type == "cpu",
            f"center_device={center_device!r}: 'cpu' (host memory), or None",
        ),
    ):
        if not ok:
            raise ValueError(sentence)
